"""The stages of a campaign: their order of worth, how long each should take, and the archive of each."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

from calibrate.campaigns.device import RecordingDevice, measure_card_energy, measure_device
from calibrate.campaigns.headline import FULL_DEPTH, arms, headline, live_headline, served, steady, weights_of
from calibrate.inputs import Inputs, measured_by
from calibrate.schema import TRAIN_EXITS, CalibrateConfig, CampaignConfig, ModelConfig
from calibrate.stages import CannotRun, Stage, StageRun, allowance
from calibrate.work import ADAPTERS, CEILINGS, ENERGY, PROFILE, TRACES, Effort, Run, memory_named, stages_of
from helios_sim.errors import TooLittleMemory, UserError
from helios_sim.live.checkpoint.known import KNOWN

DEVICE, PROFILES, LIVE, HEADLINE = "a-device", "b-profiles", "d-live", "e-headline"  # archives
TRANSCRIPT = "device.jsonl"

# Seconds of each kind of stage: guesses for a card like an H100, to be corrected after the first campaign on one.
FIRST, FURTHER, EXITS, STEADY, LOADS, SIMULATED, SWITCHED, TRAINED, JOULES = (
    "first profile", "profile", "exits", "steady", "loads", "simulated", "switched", "trained", "energy",
)  # fmt: skip
EFFORTS = {
    DEVICE: Effort(15, 5),
    FIRST: Effort(90, 20),
    FURTHER: Effort(60, 20),
    EXITS: Effort(45, 25),
    STEADY: Effort(45, 15),
    LOADS: Effort(75, 40),
    SIMULATED: Effort(15, 5),
    SWITCHED: Effort(75, 30),
    TRAINED: Effort(300, 60),
    JOULES: Effort(60, 25),
}
REHEARSED = Effort(4, 0.5)
TRAINED_WIDTH = 128  # largest width of trained exits' adapters, so that they fit into an archive with the change
QUICK_SIZES = {"buffer_bytes": 16 << 20, "matrix_rows": 128, "copy_bytes": 4 << 20}


def profile_stage(model: str) -> str:
    return f"{PROFILE}-{model}"


@dataclass(frozen=True, slots=True)
class Planned:
    """One stage of the plan: its name, archive, time, and the stages that it needs.

    `make` builds the stage and needs the device.
    """

    name: str
    group: str
    effort: Effort
    needs: tuple[str, ...]
    make: Callable[[], Stage]

    @property
    def estimate_s(self) -> float:
        return self.effort.estimate_s

    @property
    def shortest_s(self) -> float:
        return self.effort.least_s


class CampaignPlan:
    """All stages of a campaign in order of worth, and the archive group of each."""

    def __init__(self, config: CampaignConfig) -> None:
        self.config = config
        last = [] if config.last_model is None else [config.last_model]
        self._inputs = {model: Inputs(self._calibration(model)) for model in (*config.models, *last)}
        self.planned: list[Planned] = []
        self._add_all()

    @property
    def groups(self) -> dict[str, str]:
        """The archive of each stage."""
        return {planned.name: planned.group for planned in self.planned}

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages. Raises UserError if the device or a checkpoint is missing."""
        return [
            replace(
                made := planned.make(), name=planned.name, worth=1000.0 - number, estimate_s=planned.estimate_s,
                least_s=planned.shortest_s, needs=planned.needs, run=_alone(made.run),
            )
            for number, planned in enumerate(self.planned)
        ]  # fmt: skip

    def timetable(self, budget_s: float) -> list[tuple[Planned, float, float | None]]:
        """(stage, start, seconds) if each stage uses its whole allowance; None as seconds if the stage is not begun."""
        found: list[tuple[Planned, float, float | None]] = []
        at_s, waiting, begun = 0.0, list(self.planned), set[str]()
        for planned in self.planned:
            left_s, lasts_s = budget_s - at_s, None
            if left_s >= planned.shortest_s and begun.issuperset(planned.needs):
                lasts_s = allowance(planned, waiting, left_s, by_worth=True)
                begun.add(planned.name)
            waiting.remove(planned)
            found.append((planned, at_s, lasts_s))
            at_s += lasts_s or 0.0
        return found

    def check(self) -> None:
        """Raise UserError for anything that would stop a stage: packages, device, shapes, weights.

        A model that is too large for the memory fails only its own stages.
        """
        from helios_sim.live.checkpoint.random_weights import RANDOM

        config, text = self.config, self.config.text_model
        if text is not None and weights_of(config, text).startswith(RANDOM):
            known = KNOWN.get(text)
            fix = "name them in weights, or set text_model=null"
            fix = fix if known is None else f"{known.get_it}, or set text_model=null"
            allowed = "weights of its own: exits trained and traced with random ones mean nothing"
            raise UserError("text_model", text, allowed, fix)
        for inputs in self._inputs.values():
            with suppress(TooLittleMemory):
                inputs.check()

    @property
    def device_name(self) -> str:
        return self._inputs[self.config.models[0]].device.facts.name

    def _add_all(self) -> None:
        """Add the stages: first one model's profile and its simulation against live serving, then exits and gains."""
        config, (first, *others) = self.config, self.config.models
        pair, text, last = config.live.pair, config.text_model, config.last_model
        self._add(CEILINGS, DEVICE, DEVICE, (), self._ceilings)
        self._profiles([first], FIRST)
        self._study(f"live-steady-{first}", LIVE, STEADY, [first], partial(steady, config, first), exits=False)
        full_depth = {name: arm for name, arm in arms(config, [first]).items() if arm["policy"] == FULL_DEPTH}
        run = partial(served, config, [first], full_depth)
        self._study(f"live-loads-{first}", LIVE, LOADS, [first], run, exits=False)
        if text is not None:
            self._profiles([text])
            self._add(ADAPTERS, PROFILES, EXITS, (), partial(self._exits, ADAPTERS))
            self._add(TRACES, PROFILES, EXITS, (ADAPTERS,), partial(self._exits, TRACES))
            self._served([text])
        if pair:
            self._profiles(pair)
            self._served(pair)
        second = [model for model in others if profile_stage(model) not in self.groups]
        self._profiles(second[:1])
        if text is not None:
            self._add(TRAIN_EXITS, HEADLINE, TRAINED, (), partial(self._exits, TRAIN_EXITS))
        self._add(ENERGY, DEVICE, JOULES, (CEILINGS, profile_stage(first)), self._energy)
        self._profiles(second[1:])
        if last is not None:
            self._profiles([last])
            self._study(f"headline-{last}", HEADLINE, SIMULATED, [last], partial(headline, config, [last]))

    def _served(self, models: Sequence[str]) -> None:
        """Add the stages for HELIOS's gains with these models, simulated and live, and for all arms under load."""
        config, largest = self.config, models[-1]
        simulated = f"headline-{largest}"
        self._study(simulated, HEADLINE, SIMULATED, models, partial(headline, config, models))
        run = partial(live_headline, config, models, simulated)
        self._study(f"live-{simulated}", HEADLINE, SWITCHED, models, run, simulated)
        self._study(f"live-{largest}", LIVE, LOADS, models, partial(served, config, models, arms(config, models)))

    def _profiles(self, models: Sequence[str], kind: str = FURTHER) -> None:
        for model in models:
            if profile_stage(model) not in self.groups:
                self._add(profile_stage(model), PROFILES, kind, (CEILINGS,), partial(self._profile, model))

    def _study(
        self, name: str, group: str, kind: str, models: Sequence[str], run: Run, *more: str, exits: bool = True
    ) -> None:
        """Add a stage that needs the models' profiles, the text model's traces if `exits`, and the stages in `more`."""

        needs = tuple(profile_stage(model) for model in models)
        needs += (ADAPTERS, TRACES) if exits and self.config.text_model in models else ()

        def make() -> Stage:
            settings = {"live": asdict(self.config.live), "quick": self.config.quick, "seed": self.config.seed}
            return Stage(name, run, 0, 0, settings={**settings, **measured_by()})

        self._add(name, group, kind, (*needs, *more), make)

    def _add(self, name: str, group: str, kind: str, needs: tuple[str, ...], make: Callable[[], Stage]) -> None:
        """Add a stage of the next lower worth."""
        effort = REHEARSED if self.config.quick else EFFORTS[kind]
        self.planned.append(Planned(name, group, effort, needs, make))

    def _ceilings(self) -> Stage:
        config, inputs = self.config, self._inputs[self.config.models[0]]

        def run(stage: StageRun) -> Mapping[str, Any]:
            with (stage.folder / TRANSCRIPT).open("w", encoding="utf-8") as file:
                device = RecordingDevice(inputs.device, file)
                sizes = QUICK_SIZES if config.quick else {}
                return measure_device(device, config.dtype, device.now_s, device.sleep, power=False, **sizes)

        facts = inputs.device.facts
        settings = {"device": facts.name, "dtype": config.dtype, "threads": config.threads, "quick": config.quick}
        settings |= measured_by()
        return Stage(CEILINGS, run, 0, 0, settings=settings)

    def _energy(self) -> Stage:
        """The stage that measures the energy of the device and of the first two models' iterations."""
        config, models = self.config, self.config.models[:2]

        def run(stage: StageRun) -> Mapping[str, Any]:
            inputs = [self._inputs[model] for model in models if profile_stage(model) in stage.finished]
            return measure_card_energy(inputs, config.dtype, stage)

        facts = self._inputs[models[0]].device.facts
        settings = {"device": facts.name, "models": models, "quick": config.quick, **measured_by()}
        return Stage(ENERGY, run, 0, 0, settings=settings)

    def _profile(self, model: str) -> Stage:
        inputs = self._inputs[model]
        _, stage = stages_of(inputs)

        def run(given: StageRun) -> Mapping[str, Any]:
            inputs.check()  # whether it fits
            return stage.run(given)

        return replace(stage, run=_released(inputs, run))

    def _exits(self, name: str) -> Stage:
        """The stage that trains or traces exits of the text model, with its own weights."""
        assert self.config.text_model is not None
        config = replace(self._calibration(self.config.text_model), heads=None)
        if name == TRAIN_EXITS:
            width = min(config.adapter_width, TRAINED_WIDTH)
            own = self.config.train_exits
            inputs = Inputs(replace(config, task=TRAIN_EXITS, train_exits=own, adapter_width=width))
        else:
            inputs = Inputs(replace(config, task="adapters"))
        (stage,) = (stage for stage in stages_of(inputs) if stage.name == name)
        return replace(stage, run=_released(inputs, stage.run))

    def _calibration(self, model: str) -> CalibrateConfig:
        """The settings of a calibration of one model."""
        c = self.config
        return CalibrateConfig(
            task="latency", model=ModelConfig(model, weights_of(c, model)), device=c.device, threads=c.threads,
            memory_bytes=c.memory_bytes, dtype=c.dtype, tasks=c.tasks, train_tokens=c.train_tokens,
            trace_tokens=c.trace_tokens, adapter_width=c.adapter_width, check_width=c.check_width,
            max_batch=c.max_batch, max_context_tokens=c.max_context_tokens, quick=c.quick, seed=c.seed, out=c.out,
            energy=False,
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
