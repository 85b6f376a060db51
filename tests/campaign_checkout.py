"""A stand-in for a checkout of this project, into which what a campaign measured may land."""

from __future__ import annotations

import shutil
from pathlib import Path

from calibrate.campaigns.land import EXPERIMENTS, PAGE, PAGES, PROFILES


def checkout(folder: Path, repository: Path) -> Path:
    """With the project's own page, and nothing measured."""
    for part in (PROFILES, EXPERIMENTS, PAGES):
        (folder / part).mkdir(parents=True)
    shutil.copyfile(repository / PAGES / PAGE, folder / PAGES / PAGE)
    return folder
