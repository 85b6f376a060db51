"""The stages of a campaign: their order of worth, what each needs, and the archive that it belongs to."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from calibrate.campaigns.device import RecordingDevice, measure_device
from calibrate.campaigns.headline import headline, live_headline, served, weights_of
from calibrate.inputs import Inputs, measured_by
from calibrate.schema import CalibrateConfig, CampaignConfig, ModelConfig
from calibrate.stages import CannotRun, Stage, StageRun
from calibrate.work import ADAPTERS, CEILINGS, PROFILE, TRACES, Effort, Run, memory_named, stages_of
from helios_sim.errors import TooLittleMemory, UserError
from helios_sim.live.checkpoint.known import KNOWN

DEVICE, PROFILES, EXITS, LIVE, HEADLINE = "a-device", "b-profiles", "c-exits", "d-live", "e-headline"
TRANSCRIPT = "device.jsonl"

# Guesses for a card like an H100, to be corrected after the first campaign on one.
EFFORTS = {
    DEVICE: Effort(20, 5),
    PROFILES: Effort(60, 20),
    EXITS: Effort(80, 25),
    LIVE: Effort(90, 40),
    HEADLINE: Effort(15, 5),
}
REHEARSED = Effort(4, 0.5)
QUICK_SIZES = {"buffer_bytes": 16 << 20, "matrix_rows": 128, "copy_bytes": 4 << 20}


def profile_stage(model: str) -> str:
    return f"{PROFILE}-{model}"


class CampaignPlan:
    """All stages of a campaign, and the archive group of each."""

    def __init__(self, config: CampaignConfig) -> None:
        self.config = config
        last = [] if config.last_model is None else [config.last_model]
        self._inputs = {model: Inputs(self._calibration(model)) for model in (*config.models, *last)}
        self.groups: dict[str, str] = {}
        self.stages: list[Stage] = []
        self._worth = 1000.0
        self._add_all()

    def check(self) -> None:
        """Raise UserError for anything that would stop a stage: packages, device, shapes, weights.

        A model that is too large for the memory fails only its own stages.
        """
        from helios_sim.live.checkpoint.random_weights import RANDOM

        config = self.config
        if weights_of(config, config.text_model).startswith(RANDOM):
            known = KNOWN.get(config.text_model)
            fix = "name them in weights" if known is None else known.get_it
            allowed = "weights of its own: exits trained and traced with random ones mean nothing"
            raise UserError("text_model", config.text_model, allowed, fix)
        for inputs in self._inputs.values():
            with suppress(TooLittleMemory):
                inputs.check()

    @property
    def device_name(self) -> str:
        return self._inputs[self.config.models[0]].device.facts.name

    def _add_all(self) -> None:
        config = self.config
        self._add(DEVICE, self._ceilings())
        for model in config.models:
            self._add(PROFILES, self._profile(model))
        for stage in self._exits():
            self._add(EXITS, stage)
        served_together = [*([config.live.pair] if config.live.pair else []), [config.text_model]]
        for models in served_together:
            self._add(LIVE, self._stage(f"live-{models[-1]}", partial(served, config, models), models))
        for models in served_together:
            self._add(HEADLINE, self._headline(models))
        for models in served_together:
            simulated = self._headline(models).name
            run = partial(live_headline, config, models, simulated)
            self._add(HEADLINE, self._stage(f"live-{simulated}", run, models, simulated), LIVE)
        if config.last_model is not None:
            self._add(PROFILES, self._profile(config.last_model))
            self._add(HEADLINE, self._headline([config.last_model]))

    def _add(self, group: str, stage: Stage, like: str | None = None) -> None:
        """Add a stage of the next lower worth, with the effort of its group, or of group `like`."""
        effort = REHEARSED if self.config.quick else EFFORTS[like or group]
        self._worth -= 1
        self.groups[stage.name] = group
        self.stages.append(
            replace(
                stage, worth=self._worth, estimate_s=effort.estimate_s, least_s=effort.least_s, run=_alone(stage.run)
            )
        )

    def _headline(self, models: Sequence[str]) -> Stage:
        return self._stage(f"headline-{models[-1]}", partial(headline, self.config, models), models)

    def _stage(self, name: str, run: Run, models: Sequence[str], *more: str) -> Stage:
        """A stage that needs the models' profiles, the text model's traces if it is among them, and `more` stages."""
        needs = tuple(profile_stage(model) for model in models)
        needs += (ADAPTERS, TRACES) if self.config.text_model in models else ()
        settings = {"live": asdict(self.config.live), "quick": self.config.quick, "seed": self.config.seed}
        settings |= measured_by()
        return Stage(name, run, 0, 0, needs=(*needs, *more), settings=settings)

    def _ceilings(self) -> Stage:
        config, inputs = self.config, self._inputs[self.config.models[0]]

        def run(stage: StageRun) -> Mapping[str, Any]:
            with (stage.folder / TRANSCRIPT).open("w", encoding="utf-8") as file:
                device = RecordingDevice(inputs.device, file)
                sizes = QUICK_SIZES if config.quick else {}
                return measure_device(device, config.dtype, device.now_s, device.sleep, **sizes)

        facts = inputs.device.facts
        settings = {"device": facts.name, "dtype": config.dtype, "threads": config.threads, "quick": config.quick}
        settings |= measured_by()
        return Stage(CEILINGS, run, 0, 0, settings=settings)

    def _profile(self, model: str) -> Stage:
        inputs = self._inputs[model]
        _, stage = stages_of(inputs)

        def run(given: StageRun) -> Mapping[str, Any]:
            inputs.check()  # whether it fits
            return stage.run(given)

        return replace(stage, name=profile_stage(model), run=_released(inputs, run))

    def _exits(self) -> list[Stage]:
        """The stages that train and trace exit adapters of the text model, with its own weights."""
        config = self._calibration(self.config.text_model)
        inputs = Inputs(replace(config, task="adapters", heads=None))
        return [replace(stage, run=_released(inputs, stage.run)) for stage in stages_of(inputs)]

    def _calibration(self, model: str) -> CalibrateConfig:
        """The settings of a calibration of one model."""
        c = self.config
        return CalibrateConfig(
            task="latency", model=ModelConfig(model, weights_of(c, model)), device=c.device, threads=c.threads,
            memory_bytes=c.memory_bytes, dtype=c.dtype, tasks=c.tasks, train_tokens=c.train_tokens,
            trace_tokens=c.trace_tokens, adapter_width=c.adapter_width, check_width=c.check_width,
            max_batch=c.max_batch, max_context_tokens=c.max_context_tokens, quick=c.quick, seed=c.seed, out=c.out,
        )  # fmt: skip


def _released(inputs: Inputs, run: Run) -> Run:
    """Wrap a stage so that its model is released afterwards, since the next one needs the memory."""

    def released(stage: StageRun) -> Mapping[str, Any]:
        try:
            return run(stage)
        finally:
            inputs.__dict__.pop("loaded", None)

    return released


def _alone(run: Run) -> Run:
    """Wrap a stage so that it frees unused device memory, and a UserError in it fails only this stage.

    With too little memory the stage is skipped.
    """

    def alone(stage: StageRun) -> Mapping[str, Any]:
        try:
            return memory_named(run)(stage)
        except MemoryError as error:
            raise CannotRun(f"the device's memory does not suffice: {error}") from error
        except TooLittleMemory as error:
            raise CannotRun(f"{error.value}: {error.allowed}") from error
        except UserError as error:  # mistakes that concern all stages were checked before the first
            raise RuntimeError(str(error)) from error
        finally:
            gc.collect()
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_available():
                torch.cuda.empty_cache()

    return alone
