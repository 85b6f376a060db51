"""The stages of a calibration: which there are, what each is worth and needs. Knows whom to call, not how they work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from calibrate.inputs import Inputs
from calibrate.stages import Stage, StageRun

CEILINGS = "ceilings"


def stages_of(inputs: Inputs) -> list[Stage]:
    """Those of the task that was asked for."""
    return [_ceilings(inputs)]


def _ceilings(inputs: Inputs) -> Stage:
    def run(stage: StageRun) -> Mapping[str, Any]:
        from calibrate.ceilings import measure_ceilings

        found = measure_ceilings(inputs.device, inputs.dtype)
        return {"facts": asdict(inputs.device.facts), "ceilings": found.to_json()}

    facts = inputs.device.facts
    settings = {"device": facts.name, "dtype": inputs.dtype, "threads": inputs.config.threads}
    return Stage(CEILINGS, run, estimate_s=10, least_s=3, worth=100, settings=settings)
