"""An offline bundle: everything that a host without network needs to run a campaign.

`python -m calibrate.bundle out=DIR python=3.12 models=[smollm2-135m]` makes DIR with

- `wheels/`: this project and the packages that the host lacks, for that Python version;
- `models/`: files of the cache (weights, labelled texts), those above the size limit in parts;
- `SHA256SUMS`: a line for every file;
- `run.py`: verifies, joins and installs with Python's standard library alone, and runs what it is given:
  `python3 run.py +campaign=card budget_s=540 out=OUT`.

torch and its dependencies are taken from the host: they are large, and built for its driver.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from helios_sim import files
from helios_sim.entry import run
from helios_sim.errors import UserError
from helios_sim.help import is_asked
from helios_sim.live.checkpoint.known import KNOWN
from helios_sim.shared_data import cache_folder

SUMS, RUN, WHEELS, MODELS, PART = "SHA256SUMS", "run.py", "wheels", "models", ".part"
MIB = 1 << 20
# Packages that GPU images often lack. Other packages are expected there, or named by `with`.
PACKAGES = ("simpy", "hydra-core", "omegaconf", "jinja2", "markupsafe", "pyyaml", "gguf", "nvidia-ml-py")
SOURCES = ("antlr4-python3-runtime",)  # pure Python without a wheel on the index: built here
GLIBCS = (39, 35, 34, 31, 28, 27, 24, 17)  # pip matches manylinux_2_N exactly, so each is named
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
_PACKAGE = re.compile(r"[A-Za-z0-9][\w.-]*(==[\w.+!-]+)?")  # no option of pip, no address
_PINS = Path(__file__).resolve().parents[1] / "requirements"  # of the checkout
_RUNNER = Path(__file__).with_name("bundle_run.py")


@dataclass(frozen=True, slots=True)
class BundleSettings:
    """The settings of a bundle."""

    out: Path
    python: str = "3.12"
    part_mib: int = 30  # so that a part and the rest of the bundle travel together where 64 MiB are carried at once
    models: tuple[str, ...] = ()  # a campaign without a text model needs none
    more: tuple[str, ...] = ()  # further packages that the host lacks
    packages: tuple[str, ...] = PACKAGES
    sources: tuple[str, ...] = SOURCES

    @classmethod
    def read(cls, arguments: Sequence[str]) -> BundleSettings:
        """Parse key=value arguments. Raises UserError for a missing or impossible setting."""
        given: dict[str, str] = {}
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if not equals or key not in ("out", "python", "part_mib", "models", "with"):
                allowed = "settings are out=, python=, part_mib=, models=[...], with=[...]"
                raise UserError("argument", argument, allowed, "python -m calibrate.bundle out=DIR python=3.12")
            given[key] = value
        if not given.get("out"):
            raise UserError("out", None, "a folder for the bundle", "add out=DIR")
        python, part = given.get("python", "3.12"), given.get("part_mib", "30")
        if not re.fullmatch(r"3\.1[1-3]", python):
            raise UserError("python", python, "the host's version, 3.11 to 3.13", "set python=3.12, say")
        if not part.isdigit() or int(part) < 1:
            raise UserError("part_mib", part, "a whole number of at least 1", "set part_mib=30, say")
        models = _listed(given.get("models", ""))
        unknown = [name for name in models if name not in KNOWN]
        if unknown:
            raise UserError("models", unknown, f"some of {', '.join(KNOWN)}", "correct the names")
        more = _listed(given.get("with", ""))
        if no_names := [word for word in more if not _PACKAGE.fullmatch(word)]:
            raise UserError("with", no_names, "names of packages, or NAME==VERSION", "correct the names")
        return cls(Path(given["out"]).expanduser(), python, int(part), models, more)


def make_bundle(wanted: BundleSettings) -> Path:
    """Make the bundle and return its folder.

    Raises UserError if the folder is not empty, a wheel cannot be fetched, or weights are not in the cache.
    """
    out = wanted.out
    if out.is_dir() and any(out.iterdir()):
        raise UserError("out", str(out), "a new or an empty folder", "choose another one, or remove it")
    sources = list(_cached(wanted.models))
    files.make_folder(out / MODELS)
    fetch_wheels(out / WHEELS, wanted.python, (*wanted.packages, *wanted.more), wanted.sources)
    for name, source in sources:
        split(source, out / MODELS / name, wanted.part_mib * MIB)
    shutil.copyfile(_RUNNER, out / RUN)
    files.write_text(out / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums(out).items()))
    return out


def fetch_wheels(folder: Path, python: str, packages: Sequence[str], sources: Sequence[str]) -> None:
    """Fetch wheels of this project and of `packages`, without their dependencies.

    Packages that the checkout pins get the pinned version and are checked against their digests. Other packages get the
    version that is installed here, if any. `sources` are built here.
    """
    folder.mkdir(parents=True)
    into: tuple[str, ...] = ("--no-deps", "--wheel-dir", str(folder))
    # Without isolation pip builds with the tools installed here; with isolation it fetches them.
    there = find_spec("hatchling") is not None and find_spec("setuptools") is not None
    into += ("--no-build-isolation",) if there else ()
    _pip("wheel", *into, str(_PINS.parent))
    if sources:
        _fetch("wheel", (*into, "--use-pep517"), sources)
    if packages:
        tags = [f"manylinux_2_{n}_x86_64" for n in GLIBCS] + ["manylinux2014_x86_64", "any"]
        on = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        on += [word for tag in tags for word in ("--platform", tag)]
        _fetch("download", ("--no-deps", *on, "--dest", str(folder)), packages)
    bound = [wheel.name for wheel in folder.glob("*.whl") if not _suits(wheel.name, python)]
    if bound:
        raise UserError(
            "python", python, f"no wheel for it: {', '.join(bound)}", "leave it out, or use that Python here"
        )


def split(source: Path, target: Path, part_bytes: int) -> list[Path]:
    """Copy the file, in parts `NAME.part000`, ... if it is larger than `part_bytes`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size <= part_bytes:
        shutil.copyfile(source, target)
        return [target]
    parts: list[Path] = []
    with source.open("rb") as file:
        while content := file.read(part_bytes):
            parts.append(target.with_name(f"{target.name}{PART}{len(parts):03d}"))
            parts[-1].write_bytes(content)
    return parts


def sums(folder: Path) -> Mapping[str, str]:
    """The sha256 of every file except the list itself, by path relative to the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / SUMS:
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _cached(models: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(name in the cache, file) of the models' weights and tokenizers, and of labelled texts."""
    cache = cache_folder()
    for model in models:
        path = cache / KNOWN[model].file
        if not path.is_file():
            raise UserError("models", model, f"its file {path.name} in {cache}", KNOWN[model].get_it)
        yield path.name, path
        yield from _below(cache, cache / "tokenizers" / KNOWN[model].sha256)
    yield from _below(cache, cache / "texts")


def _below(cache: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.glob("*")):
        if path.is_file():
            yield str(path.relative_to(cache)), path


def _suits(wheel: str, python: str) -> bool:
    """Whether the wheel's tags fit: pure Python, or built for that version."""
    *_, tag, abi, platform = wheel.removesuffix(".whl").split("-")
    return "any" in platform or f"cp{python.replace('.', '')}" in tag or "abi3" in abi


def _fetch(command: str, options: Sequence[str], packages: Sequence[str]) -> None:
    """Run pip for the packages: first packages that the checkout pins, by their digests, then the others."""
    pins = _pins()
    pinned, others = [pins[p] for p in packages if p in pins], [_installed(p) for p in packages if p not in pins]
    with tempfile.TemporaryDirectory() as scratch:
        if pinned:
            path = Path(scratch) / "pinned.txt"
            path.write_text("\n".join(pinned) + "\n")
            _pip(command, *options, "--require-hashes", "--requirement", str(path))
    if others:
        _pip(command, *options, *others)


def _pins() -> Mapping[str, str]:
    """The entry of every package in the checkout's requirements, version and digests, by name."""
    texts = [path.read_text() for path in sorted(_PINS.glob("*.txt"))]
    entries = [entry for text in texts for entry in re.split(r"\n(?=[^\s#])", text) if "--hash=" in entry]
    return {entry.split("==")[0]: entry for entry in entries}


def _pip(command: str, *arguments: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(  # noqa: S603 - words, no shell; the packages are checked settings
            [*_PIP, command, *arguments], cwd=scratch, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise UserError("package", arguments[-1], f"pip {command}: {said[-1]}", "check the network and pip's index")


def _installed(package: str) -> str:
    """The package with the version that is installed here, since this version was tested."""
    if "=" in package:
        return package
    with suppress(PackageNotFoundError):
        return f"{package}=={version(package)}"
    return package


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[\[\], ]+", text) if word)


def main(arguments: Sequence[str] | None = None) -> int:
    return run("calibrate.bundle", _bundled, arguments)


def _bundled(arguments: Sequence[str]) -> int:
    if is_asked(arguments):
        print(__doc__)
        return 0
    out = make_bundle(BundleSettings.read(arguments))
    n_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {len(sums(out))} files, {n_bytes / MIB:.0f} MiB")
    print(f"    python3 {out / RUN} +campaign=card budget_s=540 out=OUT")
    return 0


if __name__ == "__main__":
    sys.exit(main())
