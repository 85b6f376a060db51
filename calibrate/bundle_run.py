"""Runs a campaign from an offline bundle. Needs only Python's standard library.

`python3 run.py [--only-install] +campaign=card budget_s=540 out=OUT`: checks every file against SHA256SUMS, joins
parts, installs the wheels beside this file without an index, and passes the other arguments to `calibrate`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SITE, CACHE, DONE = HERE / "site", HERE / "cache", HERE / "site" / ".installed"


def verify(folder: Path) -> list[str]:
    """The names of files that are missing or have another checksum than the list."""
    wrong = []
    for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            wrong.append(name)
    return wrong


def join(models: Path, cache: Path) -> None:
    """Copy files into the cache, joining those that are in parts."""
    for path in sorted(models.rglob("*")):
        if not path.is_file():
            continue
        name, part, number = path.name.partition(".part")
        target = cache / path.relative_to(models).with_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb" if not part or int(number) == 0 else "ab") as whole:
            whole.write(path.read_bytes())


def install(wheels: Path, site: Path) -> int:
    """Install the wheels without any index. Returns pip's exit status."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    pip += ["--disable-pip-version-check", "--upgrade", "--target", str(site)]
    found = sorted(map(str, wheels.glob("*.whl")))
    return subprocess.run([*pip, *found], check=False).returncode  # noqa: S603 - words, no shell; all are verified


def prepare() -> int:
    """Verify, join and install, unless an earlier call did. Returns 0, or 1 after a message."""
    if DONE.exists():
        return 0
    if wrong := verify(HERE):
        print(f"run.py: damaged or missing: {', '.join(wrong)}. Fix: copy the bundle again.", file=sys.stderr)
        return 1
    join(HERE / "models", CACHE)
    if install(HERE / "wheels", SITE) != 0:
        print(f"run.py: the wheels cannot be installed with Python {sys.version.split()[0]}.", file=sys.stderr)
        return 1
    DONE.touch()
    return 0


def main(arguments: list[str]) -> int:
    """Replace this process by `python -m calibrate`, unless the preparation fails."""
    status = prepare()
    if status == 0 and "--only-install" not in arguments:
        path = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
        settings = {**os.environ, "PYTHONPATH": path, "HELIOS_CACHE": str(CACHE)}
        words = [sys.executable, "-m", "calibrate", *arguments]
        os.execve(sys.executable, words, settings)  # noqa: S606 - without a shell, as is meant
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
