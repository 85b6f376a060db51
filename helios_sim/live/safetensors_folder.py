"""A folder as `save_pretrained` writes it, read tensor by tensor. Knows the files, not what the tensors mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from helios_sim.errors import UserError
from helios_sim.live.architecture import Architecture, Shape
from helios_sim.live.hub_config import read_architecture
from helios_sim.live.naming import Piece, hub_embedding, hub_pieces

_FETCH_AGAIN = "fetch the checkpoint again"


class SafetensorsFolder:
    """config.json, tokenizer, and model.safetensors or its shards with an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.architecture: Architecture = read_architecture(folder)
        self._file_of = _files_by_tensor(folder)
        self._prefix = self._find_prefix()

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in order of name."""
        return tuple(sorted(set(self._file_of.values())))

    def pieces(self, part: str, layer: int | None) -> tuple[Piece, ...]:
        return hub_pieces(self.architecture.family, self._prefix, part, layer)

    def shape(self, name: str) -> Shape:
        with self._open(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one tensor. The file is closed again at once, so that its pages do not stay with the process."""
        with self._open(name) as file:
            return file.get_slice(name)[start:stop]

    def tokenizer(self) -> Any:
        """transformers' tokenizer of the folder. Raises UserError where there is none."""
        if not any((self.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise UserError(
                "weights", str(self.folder), "a folder with a tokenizer", "save the tokenizer into it (save_pretrained)"
            )
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.folder)

    def _find_prefix(self) -> str:
        """What stands before the names: "model.", "transformer.", nothing, ... (older and multimodal files differ)."""
        suffix = hub_embedding(self.architecture.family)
        found = [name for name in self._file_of if name == suffix or name.endswith("." + suffix)]
        if not found:
            raise UserError(f"tensor {suffix}", "missing", f"there in {self.folder}", _FETCH_AGAIN)
        return min(found, key=len).removesuffix(suffix)

    def _open(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if name not in self._file_of:
            raise UserError(f"tensor {name}", "missing", f"there in {self.folder}", _FETCH_AGAIN)
        try:
            return safe_open(self._file_of[name], framework="pt")
        except (SafetensorError, OSError) as error:
            raise _damaged(self._file_of[name], error) from error


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError) as error:
            raise _damaged(single, error) from error
    if index.exists():
        try:
            shards = {name: folder / shard for name, shard in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise _damaged(index, error) from error
        for shard in set(shards.values()):
            if not shard.exists():
                raise UserError("weights", str(folder), f"all shards; {shard.name} is missing", _FETCH_AGAIN)
        return shards
    if any(folder.glob("*.bin")):
        raise UserError(
            "weights", str(folder), "safetensors or GGUF; this folder has only .bin files (pickles)",
            "load it with transformers and write it with save_pretrained, which gives safetensors",
        )  # fmt: skip
    raise UserError("weights", str(folder), "a folder with model.safetensors", "give a folder with weights")


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(str(path), str(error), "a whole file", _FETCH_AGAIN)
