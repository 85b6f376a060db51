"""Rewrites the recorded digests: `python -m digests.record [serving|prices|experiments] ...` in the folder `tests`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from digests.experiments import experiment_digests, experiment_names
from digests.prices import BLOCKS, block_digests, profile_names
from digests.serving import CASES, case_digests
from helios_sim import files

DATA = Path(__file__).parent / "data"


def recorded(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / f"{kind}.json").read_text())
    return found


def _serving() -> dict[str, Any]:
    return {str(seed): " ".join(case_digests(seed)) for seed in range(CASES)}


def _prices() -> dict[str, Any]:
    return {name: [" ".join(block_digests(name, i).values()) for i in range(BLOCKS)] for name in profile_names()}


def _experiments() -> dict[str, Any]:
    return {name: experiment_digests(name) for name in experiment_names()}


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "serving": _serving,
    "prices": _prices,
    "experiments": _experiments,
}


def main(kinds: list[str]) -> None:
    for kind in kinds or list(KINDS):
        found = KINDS[kind]()
        path = DATA / f"{kind}.json"
        before = recorded(kind) if path.is_file() else {}
        kept = {key: value for key, value in before.items() if kind == "experiments" and key not in found}
        files.write_text(path, json.dumps(kept | found, indent=1, sort_keys=kind == "experiments") + "\n")
        changed = sum(before.get(key) != value for key, value in found.items())
        print(f"{path}: {changed} of {len(found)} entries changed")


if __name__ == "__main__":
    main(sys.argv[1:])
