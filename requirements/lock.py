"""Write the pins of this folder anew: `make pins`, or `make pins UPGRADE=--upgrade` for newer versions.

Every file holds exact versions with the sha256 of all files of that version on the public index, so that the same pins
hold on every platform and for Python 3.11 to 3.13. A file leaves out what the files that it stands on hold. torch is
the exception: which of its builds is right depends on the machine (PyPI has the one for CUDA, its makers' own index
those for CPUs), so `torch.txt` has the versions of torch and of the CUDA libraries alone, without digests. Triton,
which the build for CUDA needs, is tested without a card, so it is among the tests' too.

Needs uv, of the extra `audit`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
PROJECT = FOLDER.parent / "pyproject.toml"
# The file -> the files that it stands on. `core` has the dependencies of the project, `build` what builds it and the
# one dependency without a wheel (antlr4-python3-runtime, by setuptools), `audit` tools that lie in an environment of
# their own; the others are extras of the project.
LAYERS: dict[str, tuple[str, ...]] = {
    "build": (), "core": (), "sweep": ("core",), "trace": ("core", "sweep"), "serve": ("core", "sweep", "trace"),
    "test": ("core", "sweep", "trace", "serve"), "live": ("core",), "audit": (),
}  # fmt: skip
BUILT_WITH = ("editables", "setuptools")
OF_TORCH = re.compile(r"torch|triton|cuda-.*|nvidia-(?!ml-py).*")
HEAD = "# Exact versions with the sha256 of all their files, by `make pins`. Installed with pip's --require-hashes.\n"
HEAD_TORCH = "# Exact versions without digests: the right build depends on the machine. A constraint for `make live`.\n"


def compiled(*words: str, given: str = "") -> str:
    """What uv answers: versions for all platforms, with their digests."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--default-index", "https://pypi.org/simple", *words]
    uv = Path(sys.executable).with_name("uv")
    return subprocess.run([str(uv), *command[1:]], input=given, capture_output=True, text=True, check=True).stdout


def entries(text: str) -> dict[str, str]:
    """The text of every package, by its name."""
    return {block.split("==")[0]: block for block in re.split(r"\n(?=[^\s#])", text.strip()) if "==" in block}


def kept(names: tuple[str, ...]) -> list[str]:
    return [word for name in names if (path := FOLDER / f"{name}.txt").exists() for word in ("-c", str(path))]


def main() -> int:
    """Resolve everything at once, for versions that go together, and divide it into files."""
    settings = tomllib.loads(PROJECT.read_text())
    alone = {
        "build": "\n".join((*settings["build-system"]["requires"], *BUILT_WITH)),
        "audit": "\n".join(settings["project"]["optional-dependencies"]["audit"]),
    }
    before = [] if "--upgrade" in sys.argv else kept((*LAYERS, "torch"))
    # Not the extra `clients`: those do not go together, and each is installed into an environment of its own.
    extras = [word for layer in LAYERS if layer not in ("build", "core") for word in ("--extra", layer)]
    whole = entries(compiled(str(PROJECT), "-", *extras, *before, given=alone["build"]))
    exact = "\n".join(re.split(r"[ \\]", block)[0] for block in whole.values())
    pins = FOLDER / "whole.tmp"
    pins.write_text(exact)
    try:
        names: dict[str, set[str]] = {}
        for layer in LAYERS:
            words = ["-"] if layer in alone else [str(PROJECT)] if layer == "core" else [str(PROJECT), "--extra", layer]
            names[layer] = set(entries(compiled(*words, "-c", str(pins), given=alone.get(layer, ""))))
    finally:
        pins.unlink()
    for layer, under in LAYERS.items():
        here = names[layer].difference(*(names[lower] for lower in under))
        blocks = [whole[name] for name in sorted(here) if layer == "test" or not OF_TORCH.fullmatch(name)]
        (FOLDER / f"{layer}.txt").write_text(HEAD + "\n".join(blocks) + "\n")
    torch = [whole[name].splitlines()[0].rstrip(" \\") for name in sorted(names["live"]) if OF_TORCH.fullmatch(name)]
    (FOLDER / "torch.txt").write_text(HEAD_TORCH + "\n".join(torch) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
