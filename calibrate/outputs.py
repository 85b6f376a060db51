"""Puts finished stages together into an output folder: profile, trace, summary, page, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibrate.schema import CalibrateConfig
from calibrate.stages import Finished, Outcome
from helios_sim.report import files


def write_outputs(
    config: CalibrateConfig, folder: Path, finished: Mapping[str, Finished], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    summary = {"schema_version": 1, "title": "", "headlines": {}, "verdict": [], "use": []}
    files.write_json(folder / "summary.json", summary)
    return summary
