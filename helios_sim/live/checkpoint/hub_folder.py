"""A checkpoint folder as `save_pretrained` writes it: config.json, tokenizer, and safetensors read tensor by tensor.

Every tensor is used, known not to change what is computed, or refused by name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from helios_sim.errors import WeightsError
from helios_sim.live.checkpoint.hub_config import FETCH_AGAIN, OTHER_MODEL, read_architecture
from helios_sim.live.checkpoint.naming import HUB_HEAD, hub_embedding, hub_pieces
from helios_sim.live.model.architecture import Architecture, Shape
from helios_sim.live.model.weights import StoredPiece, stored_names
from helios_sim.untrusted import is_lfs_pointer, lfs_pointer, read_json, reading, shortened

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_READ = ("F64", "F32", "F16", "BF16")
# Ignored tensors: those that older versions stored although the shape implies them, and Gemma-3's vision parts.
_NO_MATTER = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|decoder\.version|position_ids)"
    r"|(model\.)?(vision_tower|multi_modal_projector)\..*"
)
_SCALES = re.compile(r".*(_scale|_scale_inv|\.scales|\.qzeros|\.qweight|\.absmax|\.quant_state\..*|_scale_2)")
_SHARD = re.compile(r"\w[\w.+ -]{0,250}")  # no folder in it
_CHUNK_ROWS = 4096
OF_MODELS, _MOST_BYTES = (".json", ".txt", ".model", ".jinja"), 256 << 20


class SafetensorsFolder:
    """One folder with config.json, a tokenizer, and model.safetensors or its shards with an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.architecture: Architecture = read_architecture(folder)
        self._shapes: dict[str, Shape] = {}
        self._kinds: dict[str, str] = {}
        with reading(str(folder), "damaged", "tensors that fit its config.json", FETCH_AGAIN, WeightsError):
            self._file_of = _files_by_tensor(folder)
            self._read_headers()
            self._prefix = self._find_prefix()
            self._untie()
            self._check_tensors()

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in order of name."""
        return tuple(sorted(set(self._file_of.values())))

    def pieces(self, part: str, layer: int | None) -> tuple[StoredPiece, ...]:
        return hub_pieces(self.architecture.family, self._prefix, part, layer)

    def shape(self, name: str) -> Shape:
        if name not in self._shapes:
            raise WeightsError(f"tensor {name}", "missing", f"there in {self.folder}", FETCH_AGAIN)
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of one tensor. The file is closed at once, so that none of its pages stay resident."""
        self.shape(name)
        with _whole(self._file_of[name]), _open(self._file_of[name]) as file:
            return file.get_slice(name)[start:stop]

    def tokenizer(self) -> Any:
        """Load transformers' tokenizer of the folder. Raises WeightsError if there is none that can be read."""
        if not any((self.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            fix = "save the tokenizer into it (save_pretrained)"
            raise WeightsError("weights", str(self.folder), "a folder with a tokenizer", fix)
        for path in self.folder.iterdir():  # transformers opens files by their names
            if path.suffix in OF_MODELS and not (path.is_file() and path.stat().st_size <= _MOST_BYTES):
                allowed = f"a file of at most {_MOST_BYTES} bytes"
                raise WeightsError(str(path), "no file, or too large", allowed, FETCH_AGAIN)
            if path.suffix in OF_MODELS and is_lfs_pointer(path):
                raise lfs_pointer(path, WeightsError)
        import transformers

        allowed = "a folder with a tokenizer that can be read"
        with reading("weights", str(self.folder), allowed, FETCH_AGAIN, WeightsError):
            return transformers.AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def _read_headers(self) -> None:
        """Read shape and kind of every tensor, and check that each file holds what is expected of it."""
        for path in self.files:
            with _whole(path), _open(path) as file:
                names = set(file.keys())
                for name in names:
                    stored = file.get_slice(name)
                    self._shapes[name], self._kinds[name] = tuple(stored.get_shape()), stored.get_dtype()
            expected = {name for name, of in self._file_of.items() if of == path}
            for name in sorted(expected - names):
                raise WeightsError(f"tensor {name}", "missing", f"there in {path}, as {INDEX} says", FETCH_AGAIN)
            for name in sorted(names - expected):
                raise WeightsError(f"tensor {name} of {path}", "there", f"in {INDEX} too", FETCH_AGAIN)

    def _find_prefix(self) -> str:
        """The prefix of all names: "model.", "transformer.", "", ... (older and multimodal files differ)."""
        suffix = hub_embedding(self.architecture.family)
        found = [name for name in self._file_of if name == suffix or name.endswith("." + suffix)]
        if not found:
            raise WeightsError(f"tensor {suffix}", "missing", f"there in {self.folder}", FETCH_AGAIN)
        return min(found, key=len).removesuffix(suffix)

    def _untie(self) -> None:
        """Use the file's own LM head if it is not the embedding, though the config ties them, as transformers does."""
        embedding = self._prefix + hub_embedding(self.architecture.family)
        if not self.architecture.tied_embeddings or HUB_HEAD not in self._shapes:
            return
        shape = self.shape(embedding)
        same = self.shape(HUB_HEAD) == shape and self._kinds[HUB_HEAD] == self._kinds[embedding]
        starts = range(0, shape[0], _CHUNK_ROWS) if same else ()
        same = same and all(self._chunk(HUB_HEAD, at).equal(self._chunk(embedding, at)) for at in starts)
        if same:
            del self._shapes[HUB_HEAD]
        else:
            self.architecture = replace(self.architecture, tied_embeddings=False)

    def _chunk(self, name: str, start: int) -> Tensor:
        return self.rows(name, start, min(start + _CHUNK_ROWS, self.shape(name)[0]))

    def _check_tensors(self) -> None:
        """Raise WeightsError for a tensor that is missing, of another shape or kind, or that nothing reads."""
        used = stored_names(self)
        for name, kind in self._kinds.items():
            where = f"tensor {name} of {self.folder}"
            if kind.startswith("F8") or _SCALES.fullmatch(name) or (name in used and kind not in _READ):
                fix = "choose the unquantized checkpoint, or a .gguf file"
                raise WeightsError(where, kind, f"{', '.join(_READ)}: quantized weights are not read", fix)
        for name in self._shapes:
            if name not in used and not _NO_MATTER.fullmatch(name):
                allowed = "a checkpoint without it: it is not read, and could change what the model computes"
                raise WeightsError(f"tensor {name} of {self.folder}", self._shapes[name], allowed, OTHER_MODEL)


def _open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def _whole(path: Path) -> Any:
    return reading(str(path), "damaged", "a whole file", FETCH_AGAIN, WeightsError)


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    """The file of each tensor. A single file comes before an index, as in transformers."""
    index, single = folder / INDEX, folder / SINGLE
    for path in (single, index):
        if path.is_file() and is_lfs_pointer(path):
            raise lfs_pointer(path, WeightsError)
    if single.is_file():
        with _whole(single), _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if index.is_file():
        return _shards(folder, read_json(index, FETCH_AGAIN, error=WeightsError))
    if found := sorted(path.name for path in folder.glob("*.bin")):
        raise WeightsError(
            "weights", str(folder), f"safetensors or GGUF; this folder has only .bin files (pickles), as {found[0]}",
            "load it with transformers and write it with save_pretrained, which gives safetensors",
        )  # fmt: skip
    named = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
    fix = f"rename {named}, or add its index" if named else "give a folder with weights"
    raise WeightsError("weights", str(folder), "a folder with model.safetensors", fix)


def _shards(folder: Path, index: dict[str, Any]) -> dict[str, Path]:
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise WeightsError(f"weight_map of {folder / INDEX}", None, "the file of every tensor", FETCH_AGAIN)
    for shard in sorted(set(names.values())):
        if not _SHARD.fullmatch(shard):
            allowed = "the name of a file in this folder"
            raise WeightsError(f"shard in {folder / INDEX}", shortened(shard), allowed, FETCH_AGAIN)
        if not (folder / shard).is_file():
            raise WeightsError("weights", str(folder), f"all shards; {shard} is missing", FETCH_AGAIN)
        if is_lfs_pointer(folder / shard):
            raise lfs_pointer(folder / shard, WeightsError)
    return {name: folder / shard for name, shard in names.items()}
