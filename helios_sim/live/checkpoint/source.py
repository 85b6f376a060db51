"""Checkpoints by what a user names: a known name, a folder, a GGUF file, a hub id, or a shape.

Known names are those of `helios_sim.live.checkpoint.known.KNOWN`. Their files lie in the cache folder and are checked
by sha256.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from helios_sim.contents import Stamp, digest_of, sha256_of, stamp
from helios_sim.errors import UserError, WeightsError
from helios_sim.live.checkpoint.gguf_file import GgufFile
from helios_sim.live.checkpoint.hub_config import not_read
from helios_sim.live.checkpoint.hub_folder import OF_MODELS, SafetensorsFolder
from helios_sim.live.checkpoint.known import KNOWN, is_as_written, seal_tokenizer
from helios_sim.live.checkpoint.random_weights import RandomWeights, draw, is_random
from helios_sim.live.model.architecture import Architecture, Shape
from helios_sim.live.model.delta import HEADER as DELTA, WeightsDelta, read_header
from helios_sim.live.model.weights import StoredPiece
from helios_sim.shared_data import cache_folder
from helios_sim.untrusted import in_short, reading

Stamps = tuple[tuple[str, Stamp], ...]

_log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab*"]


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk with their tokenizer. Only headers are read until a tensor is requested."""

    name: str  # short: the known name, or the name of the folder or file
    source: str  # where it came from, for provenance
    licence: str | None
    storage: GgufFile | SafetensorsFolder | RandomWeights
    delta: WeightsDelta | None = None  # a change that is added to the layers when they are read

    @property
    def architecture(self) -> Architecture:
        return self.storage.architecture

    @property
    def is_random(self) -> bool:
        """Whether the weights are random, so that tokens and confidences mean nothing."""
        return isinstance(self.storage, RandomWeights)

    def pieces(self, part: str, layer: int | None) -> tuple[StoredPiece, ...]:
        return self.storage.pieces(part, layer)

    def shape(self, name: str) -> Shape:
        return self.storage.shape(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.storage.rows(name, start, stop)

    def added(self, part: str, layer: int | None) -> Tensor | None:
        return None if self.delta is None else self.delta.of(part, layer)

    def tensor(self, name: str) -> Tensor:
        """One stored tensor, as it is named and laid out in the file, dequantized if it is quantized."""
        return self.rows(name, 0, self.shape(name)[0])

    def tokenizer(self) -> Any:
        """transformers' tokenizer, made once. Raises UserError if the checkpoint has none.

        A tokenizer made from a GGUF file is cached under the file's sha256, since making it takes 3 to 20 s.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        if isinstance(self.storage, RandomWeights):
            return self.storage.tokenizer()
        if isinstance(self.storage, SafetensorsFolder):
            return _tried(self.storage.tokenizer(), self.source)
        kept = cache_folder() / "tokenizers" / self.stored_sha256
        if (found := _kept(kept)) is not None:
            return found
        made = _tried(self.storage.tokenizer(), self.source)
        _keep(made, kept)
        return made

    @property
    def is_tiny(self) -> bool:
        """Whether this is `tiny:NAME`: a few small layers under the name of a known shape."""
        return isinstance(self.storage, RandomWeights) and self.storage.tiny

    @cached_property
    def digest(self) -> str:
        """Digest of all that the model's tokens depend on: the contents of weights, configuration and tokenizer.

        For random weights it is their description.
        """
        if isinstance(self.storage, RandomWeights):
            return self.source
        beside = self.storage.folder.glob("*") if isinstance(self.storage, SafetensorsFolder) else ()
        small = [path for path in beside if path.is_file() and path.suffix in OF_MODELS]
        change = () if self.delta is None else self.delta.files
        return digest_of(*sorted({*self.storage.files, *small, *change}))

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the weights as they are read; with a change, a hash of its sha256 and the stored one."""
        if self.delta is None:
            return self.stored_sha256
        return hashlib.sha256(f"{self.stored_sha256} {self.delta.header['sha256']}".encode()).hexdigest()

    @cached_property
    def stored_sha256(self) -> str:
        """The weight file's sha256. For several files, that of the lines "digest  name", sorted by name.

        All files are read. For random weights, which have no file, it is the sha256 of their description.
        """
        files = self.storage.files
        if isinstance(self.storage, RandomWeights):
            return hashlib.sha256(self.source.encode()).hexdigest()
        digests = [sha256_of(path) for path in files]
        if len(files) == 1:
            return digests[0]
        lines = "".join(f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()


def _tried(tokenizer: Any, where: str) -> Any:
    """The tokenizer, after reading and writing a text with it. Raises WeightsError if that fails."""
    allowed, fix = "weights with a tokenizer that works", "save the tokenizer anew (save_pretrained)"
    with reading("weights", where, allowed, fix, WeightsError):
        ids = tokenizer("One text, then another.", add_special_tokens=False)["input_ids"]
        if not ids or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"it reads a text as {ids!r}")
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        tokenizer.get_vocab()
    return tokenizer


def _kept(folder: Path) -> Any | None:
    """The cached tokenizer; None if there is none. A damaged one is removed, to be made again."""
    if not (folder / "tokenizer.json").exists():
        return None
    import transformers

    try:
        if not is_as_written(folder):
            raise ValueError("it is not what was written there")
        return _tried(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False), str(folder))
    except Exception as error:  # a damaged cache costs time, and is never an error
        _log.warning("the tokenizer kept in %s is damaged and is made again: %s", folder, in_short(error))
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _keep(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer atomically. A cache that cannot be written only costs time, so this just warns."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            tokenizer.save_pretrained(Path(scratch) / "whole")
            seal_tokenizer(Path(scratch) / "whole")
            os.replace(Path(scratch) / "whole", folder)
    except OSError as error:
        _log.warning("the tokenizer is not kept in %s: %s", folder, error)


def find_checkpoint(weights: str, cache: Path | None = None) -> Checkpoint:
    """Open what `weights` names: a known name, a folder, a .gguf file, a hub id (OWNER/NAME), or a shape.

    `random:NAME` is a known shape without a checkpoint; `tiny:NAME` has a few small layers of its family. A folder with
    a change (`live.model.delta`) opens the weights that it belongs to, changed. `cache` is the folder of known weights
    (None for `shared_data.cache_folder()`).

    Raises UserError for a name that is none of these, missing weights, a file that is damaged or not the recorded one,
    or an unsupported family.
    """
    if weights in KNOWN:
        return _known(weights, cache or cache_folder())
    if is_random(weights):
        return random_checkpoint(weights)
    path = Path(weights).expanduser()
    if (path / DELTA).is_file():
        return _changed(path, cache)
    if path.is_dir():
        return _opened(path, _stamps(path), path.resolve().name, str(path), None)
    if path.is_file():
        if path.suffix != ".gguf":
            raise WeightsError("weights", weights, "a folder or a .gguf file", "give the folder that holds this file")
        return _opened(path, _stamps(path), path.stem, str(path), None)
    if _HUB_ID.fullmatch(weights) and path.suffix != ".gguf":
        return _from_hub(weights)
    raise WeightsError(
        "weights", weights, f"one of {', '.join(KNOWN)}, a folder, a .gguf file or a hub id OWNER/NAME",
        "choose one of these, or check the path",
    )  # fmt: skip


@lru_cache(maxsize=4)
def random_checkpoint(weights: str, device: str = "cpu", seed: int = 0) -> Checkpoint:
    """A checkpoint for `random:NAME` or `tiny:NAME`, drawn on `device`. Raises UserError for an unknown shape."""
    source = f"{weights}, seed {seed}: a shape with random weights, no checkpoint"
    return Checkpoint(weights.partition(":")[2], source, None, draw(weights, device, seed))


def _known(name: str, cache: Path) -> Checkpoint:
    known = KNOWN[name]
    path = cache / known.file
    if not path.exists():
        raise WeightsError("weights", name, f"its file {known.file} in {cache}", known.get_it)
    if (digest := sha256_of(path)) != known.sha256:
        raise UserError(f"sha256 of {path}", digest, known.sha256, f"delete the file and get it again: {known.get_it}")
    return _opened(path, _stamps(path), name, f"{known.file}, sha256 {known.sha256}", known.licence)


def _changed(folder: Path, cache: Path | None) -> Checkpoint:
    """Open the weights that a change belongs to, with it. UserError if they are missing, or not those that it names."""
    header = read_header(folder)
    if (Path(header["weights"]).expanduser() / DELTA).is_file():
        raise WeightsError(f"weights of {folder}", header["weights"], "weights that are stored whole", "train it anew")
    try:
        stored = find_checkpoint(header["weights"], cache)
    except WeightsError as error:
        raise error.named_by(f"weights of {folder}") from error
    if stored.stored_sha256 != header["weights_sha256"]:
        allowed = f"{header['weights_sha256']}, as {folder / DELTA} says: it was trained for these"
        raise WeightsError("weights_sha256", stored.stored_sha256, allowed, "get the weights that it belongs to")
    return changed_by(folder, stored)


def changed_by(folder: Path, stored: Checkpoint) -> Checkpoint:
    """Stored weights with the change in a folder. UserError if it is damaged or of another shape of model."""
    return _merged(folder, _stamps(folder), stored)


@lru_cache(maxsize=4)
def _merged(folder: Path, stamps: Stamps, stored: Checkpoint) -> Checkpoint:
    """Add the change to the stored weights. Cached by its arguments, as `_opened` is."""
    delta = WeightsDelta.load(folder, stored.architecture)
    source = f"{stored.source}, with the change {folder} (sha256 {delta.header['sha256']})"
    return replace(stored, name=folder.resolve().name, source=source, delta=delta)


@lru_cache(maxsize=4)
def _opened(path: Path, stamps: Stamps, name: str, source: str, licence: str | None) -> Checkpoint:
    """Open a file or folder. Cached by its arguments, together with its tokenizer and its copy in host memory."""
    if not path.is_dir():
        file = GgufFile(path)
        return Checkpoint(name, _said(source, file.not_read), licence, file)
    storage = SafetensorsFolder(path)
    return Checkpoint(name, _said(source, not_read(path)), licence, storage)


def _said(source: str, left: str) -> str:
    """The source, with a note on what is not read of its config or header. The note is logged too."""
    if left:
        _log.warning("%s", left)
    return f"{source} ({left})" if left else source


def _stamps(path: Path) -> Stamps:
    """Names and stamps of the files, which change when a file is written."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple((file.name, stamp(file)) for file in files if file.exists())  # a link may lead nowhere


def _from_hub(hub_id: str) -> Checkpoint:
    """Download from the Hugging Face hub. Raises UserError for a missing or gated model, or without a network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        raise WeightsError(
            "weights", hub_id, "a model that you may read; this one is gated",
            f"accept its terms at https://huggingface.co/{hub_id} and log in (hf auth login), or choose another model",
        ) from error  # fmt: skip
    except RepositoryNotFoundError as error:
        raise WeightsError(
            "weights",
            hub_id,
            "a model on the hub, or a folder that exists",
            "check the name, or log in (hf auth login)",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise WeightsError(
            "weights", hub_id, f"a model that can be fetched ({str(error).splitlines()[0] if str(error) else error!r})",
            "check network and disk, or give a local folder or .gguf file",
        ) from error  # fmt: skip
    storage = SafetensorsFolder(folder)
    return Checkpoint(hub_id.split("/")[-1].lower(), _said(f"huggingface.co/{hub_id}", not_read(folder)), None, storage)
