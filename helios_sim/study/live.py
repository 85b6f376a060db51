"""One live run of a job: opens models and texts, makes the engine, times the device's pace, starts the clock.

Everything before `begin` happens before time does: weights are read, kernels are warm. torch is loaded here and only
here, when a live run is asked for."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from simpy.events import Timeout

from helios_sim.errors import TooLittleMemory, UserError
from helios_sim.exits.rule import Confidence, ReleaseEarly
from helios_sim.exits.store import folder_of
from helios_sim.live.clock import WallClock
from helios_sim.live.energy import ABSENT, Meter, open_counter
from helios_sim.live.served import OpenSettings, open_models, read_texts
from helios_sim.profile.pace import DECODE, PROMPT
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Anchors
from helios_sim.provenance import Provenance, ProvenanceClass
from helios_sim.report.metrics import Metrics, MetricValue, energy_metrics, gco2e_per_million
from helios_sim.report.records import Maybe, Records
from helios_sim.request import Request, to_ns
from helios_sim.serving.iteration import Engine, OutOfMemory
from helios_sim.study.build import Parts, build_profile, confidence, exit_trace
from helios_sim.study.schema import Config
from helios_sim.study.watched import LiveNotes, WatchedEngine
from helios_sim.study.workload import task_names
from helios_sim.workload import generate

if TYPE_CHECKING:
    from helios_sim.live.device import Step
    from helios_sim.live.engine import LiveEngine
    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.weights import LayerWeights
    from helios_sim.live.served import LiveModel
    from helios_sim.profile.spec import Anchor
    from helios_sim.serving.server import Server


# Metrics that a run cannot know while it serves, since full depth is not computed.
UNKNOWN = frozenset({"agreement", "bits_per_char"})
WARM_REQUESTS = 8  # at most, running together
KEPT_STEPS = 10_000  # of a few hundred bytes each
METER_LEAD_NS = 20_000_000  # before the first arrival
_log = logging.getLogger(__name__)


class LiveRun:
    """`device_engine` serves one replica, `engine` is what its server sees of it."""

    def __init__(self, config: Config, parts: Parts, seed: int) -> None:
        """Raises UserError as `open_models` and `read_texts` do, and for more than one replica."""
        check_settings(config)
        self._config, self._parts, self._seed = config, parts, seed
        self._server: Server  # from `begin` on
        self.clock = WallClock()
        self.device_engine = make_engine(config, parts, seed, self.clock)
        if config.server.schedule_ahead and self.device_engine.device.kernels.name == "torch":
            self.device_engine.close()
            raise _no_ahead()
        device = config.live.device
        self.meter = Meter(open_counter(device), ABSENT[device.partition(":")[0]])
        profiles = {name: data.profile for name, data in parts.models.items()}
        self._pace = Pace(self.device_engine, profiles, self.clock, self.meter, config.live.pace_every_s)
        self.engine = WatchedEngine(self.device_engine, self.clock, self._pace.look_within, KEPT_STEPS)

    def begin(self, make_server: Callable[[Engine], Server]) -> Server:
        """The server with its first deployment in memory and everything warm. Time starts.

        Energy is counted from the first arrival to the last completion, as the span is. UserError where memory does not
        suffice for the first deployment.
        """
        from helios_sim.live.pace import warm_up

        server = make_server(self.engine)
        self.device_engine.faults = server
        server.joules = self.meter.so_far_j
        server.open()
        self._server = server
        deployment, live = server.decisions[0].deployment, self._config.live
        places = self.device_engine.work.places[deployment.active.model].requests
        requests = list(islice(self._requests(), min(WARM_REQUESTS, places)))
        try:
            self.device_engine.capture(deployment)
            warm_up(self.device_engine, deployment, requests, self._parts.situation.max_batch_tokens, live.warm_up)
        except OutOfMemory as short:
            raise TooLittleMemory(
                "memory", short.reason, "enough for captured steps and an iteration beside weights and KV",
                "lower server.max_running_requests or server.max_batch_tokens, or free memory",
            ) from short  # fmt: skip
        self._pace.look_beside()
        self._meter_from(requests[0].arrival_ns)
        gc.collect()
        gc.freeze()  # what has been opened is looked through no more: that takes up to 0.1 s in the middle of a run
        self.clock.sync()
        return server

    def as_known(self, records: Records) -> Records:
        """Records without the bits of the recorded text, which serving does not compute, and with the agreement with
        full depth where that was computed afterwards."""
        known = replace(records, microbits=Maybe(records.microbits.values, np.zeros(len(records), np.bool_)))
        if not self._config.live.score:
            return known
        from helios_sim.live.answers import agreed_tokens

        answers = [answer for number, answer in self.device_engine.answers.items() if number >= 0]
        found = agreed_tokens(opened(self._config, self._parts), answers, self._config.live.device)
        agreed = [found.get(number, 0) for number in records.request_id.tolist()]
        return replace(known, agreed_tokens=np.array(agreed, records.agreed_tokens.dtype))

    def measured(self, metrics: Metrics, records: Records) -> dict[str, MetricValue]:
        """Metrics with energy from the device's counter in place of the simulated band; null for what is not known."""
        # Where answers leave at ramps, full depth has said of each token whether it would have given it.
        judged = all(isinstance(decision.deployment.exit_rule, ReleaseEarly) for decision in self._server.decisions)
        unknown = UNKNOWN - {"agreement"} if judged or self._config.live.score else UNKNOWN
        known = {name: None if name in unknown else value for name, value in metrics.items()}
        done = records.completed
        known |= energy_metrics(self.meter.energy_j, int(done.sum()), int(records.output_chars[done].sum()))
        tokens, carbon = int(records.output_tokens[done].sum()), self._config.cost.gco2e_per_kwh
        return known | {"gco2e_per_million_tokens": gco2e_per_million(self.meter.energy_j, carbon, tokens)}

    def inputs(self) -> dict[str, Provenance]:
        """Where the energy comes from, and which kernels a card computed with."""
        found = {}
        if self.meter.energy_j is not None:
            found["energy"] = Provenance(ProvenanceClass.MEASURED, self.meter.source, "mode=live")
        if self.device_engine.device.captures:
            found["kernels"] = Provenance(ProvenanceClass.MEASURED, self._kernels(), "mode=live")
        return found

    def _kernels(self) -> str:
        from helios_sim.live.kernels.choice import described

        return described(self.device_engine.device.kernels)

    def notices(self) -> tuple[str, ...]:
        """What a reader may miss."""
        energy = (f"Energy is not known: {self.meter.why}.",) if self.meter.why else ()
        return (*energy, f"The card ran {self._kernels()}.") if self.device_engine.device.captures else energy

    def end(self) -> LiveNotes:
        """The run is over, and so is the counting of energy. Returns its sums."""
        self.meter.stop()
        work = self.device_engine.work
        self._pace.look_beside()
        return replace(
            self.engine.notes(),
            pace=self._pace.mean(DECODE),
            prompt_pace=self._pace.mean(PROMPT),
            shortages=self.device_engine.shortages,
            kv_bytes=work.reserved_bytes,
            places=min(places.requests for places in work.places.values()),
            places_wanted=work.wanted,
        )

    def close(self) -> None:
        """Leave nothing of the run on the device, however it ended."""
        self.meter.stop()
        self._pace.close()
        gc.unfreeze()
        self.device_engine.close()

    def _meter_from(self, arrival_ns: int) -> None:
        """Asking a card takes some milliseconds, which are not to be the first request's."""
        if arrival_ns <= METER_LEAD_NS:
            self.meter.start()
            return
        soon = Timeout(self.clock, arrival_ns - METER_LEAD_NS)
        assert soon.callbacks is not None
        soon.callbacks.append(lambda _: self.meter.start())

    def _requests(self) -> Iterator[Request]:
        return (r for block in generate(self._parts.workload, self._seed) for r in block.rows())


def make_engine(config: Config, parts: Parts, seed: int, clock: WallClock) -> LiveEngine:
    """The live engine, with room for the workload's longest requests."""
    from helios_sim.live.engine import LiveEngine
    from helios_sim.live.replaying import ReplayingEngine
    from helios_sim.serving.replica import SERVED_TEXTS

    live_models = opened(config, parts)
    texts = read_texts(parts.workload.mix.tasks, config.live.texts)
    requests = [r for block in generate(parts.workload, seed) for r in block.rows()]
    slots = min(config.server.max_running_requests, len(requests))
    engine = ReplayingEngine if any(model.replays for model in live_models.values()) else LiveEngine
    return engine(
        clock, live_models, texts, slots=slots, slot_tokens=_slot_tokens(config, live_models, requests),
        device=config.live.device, kernels=config.live.kernels,
        kept_answers=None if config.live.score else SERVED_TEXTS,  # they are read once more when all is over
    )  # fmt: skip


def opened(config: Config, parts: Parts) -> dict[str, LiveModel]:
    profiles = {name: data.profile for name, data in parts.models.items()}
    return open_models(wanted(config), profiles, {name: data.trace for name, data in parts.models.items()})


def check_live(config: Config) -> None:
    """UserError for whatever would stop a live run before its first request, found without reading any layer."""
    check_settings(config)
    profiles: Mapping[str, Profile] = {name: build_profile(config, name) for name in config.models}
    tasks = task_names(config.workload.mix)
    open_models(wanted(config), profiles, {n: exit_trace(config, n, p).bind(tasks) for n, p in profiles.items()})
    read_texts(tasks, config.live.texts)


def check_drafter(config: Config, parts: Parts, model: str, drafter: str) -> None:
    """UserError for a drafter with other tokens than the model's."""
    from helios_sim.live.other_drafts import require_one_tokenizer

    require_one_tokenizer(opened(config, parts), model, drafter)


def check_settings(config: Config) -> None:
    server = config.server
    for key, value, only, why in (
        ("replicas", server.replicas, 1, "one device is served"),
        ("enable_prefix_caching", server.enable_prefix_caching, False, "each request has a place of its own"),
    ):
        if value != only:
            raise UserError(f"server.{key}", value, f"{only} when mode=live: {why}", f"set server.{key}={only}")
    if server.schedule_ahead and (not config.live.device.startswith("cuda") or config.live.kernels == "torch"):
        raise _no_ahead()
    if config.cluster.kinds:
        raise UserError("cluster.kinds", list(config.cluster.kinds), "none when mode=live: one device is served",
                        "leave them out")  # fmt: skip


def _no_ahead() -> UserError:
    why = "otherwise an iteration is planned when the one before it has ended"
    only = f"0 when mode=live, except where a card computes by Triton's kernels; {why}"
    return UserError("server.schedule_ahead", 1, only, "set server.schedule_ahead=0")


def wanted(config: Config) -> OpenSettings:
    live = config.live
    return OpenSettings(
        live.device, live.dtype, live.threads, dict(live.weights), dict(live.heads), live.kernels, _predictors(config)
    )


def _predictors(config: Config) -> dict[str, Path]:
    """By model, where its predictors lie, beside its trace; empty where no arm asks for them."""
    entries = [config.policy or {}, *config.arms.values()]
    asked = [confidence(config).value, *(entry.get("confidence") for entry in entries)]
    if Confidence.PREDICTOR.value not in asked:
        return {}
    return {model: folder_of(model, config.exits.source.replace("{model}", model)) for model in config.models}


def _slot_tokens(config: Config, models: Mapping[str, LiveModel], requests: Sequence[Request]) -> int:
    """Tokens of a slot in whole blocks, and one block more: a text that changes its model half-way may grow."""
    block_tokens = config.server.block_tokens
    return (-(-_longest(models, requests) // block_tokens) + 1) * block_tokens


def _longest(models: Mapping[str, LiveModel], requests: Sequence[Request]) -> int:
    """Tokens of the longest request, prompt and answer, on whichever model makes most of it."""
    longest = 1
    for model in models.values():
        for request in requests:
            prompt_tokens, span = model.lengths(request)
            longest = max(longest, prompt_tokens + span.n_tokens)
    return longest


class Pace:
    """Times the steps beside a run and in turns within it, now and then, when clock and meter are stopped for it."""

    def __init__(
        self, engine: LiveEngine, profiles: Mapping[str, Profile], clock: WallClock, meter: Meter, every_s: float | None
    ) -> None:
        self._engine, self._profiles, self._clock, self._meter = engine, profiles, clock, meter
        self._every_ns = None if every_s is None else to_ns(every_s, "live.pace_every_s")
        self._due_ns = 0
        self._turns = cycle((DECODE, PROMPT))
        self._found: dict[str, list[float]] = {DECODE: [], PROMPT: []}
        # the steps of a model, and of which layers they are
        self._ready: dict[tuple[str, str], tuple[list[LayerWeights], Step]] = {}

    def mean(self, anchor: str) -> float | None:
        """Time of the step over its time beside the profile: above 1 is slower. None where the profile does not tell,
        the device has no memory for the step, or a run ended before its turn.

        The mean over the profile's median: tables hold medians, and what a run takes is a sum.
        """
        known = self._found[anchor]
        return fmean(known) if known else None

    def close(self) -> None:
        """Free the memory of the steps."""
        self._ready.clear()

    def look_beside(self) -> None:
        """Time some steps before the run or after it, unless they are timed within; their median counts."""
        from helios_sim.live.pace import REPEATS

        if self._every_ns is None:
            there = self._engine.residents.layers
            for anchor in self._found:
                self._note(anchor, max(there, key=lambda model: there[model]), REPEATS)

    def look_within(self, name: str) -> None:
        """One step of the model that runs next, if it is time for one. Nothing may be loading."""
        if self._every_ns is None or self._clock.wall_ns < self._due_ns:
            return
        with self._clock.stopped(), self._meter.left_out():
            self._note(next(self._turns), name, 1)
        self._due_ns = self._clock.wall_ns + self._every_ns

    def _note(self, name: str, of_model: str, repeats: int) -> None:
        """`name` is an anchor's, `of_model` that of a model in memory."""
        from helios_sim.live.pace import seconds

        known = self._profiles[of_model].anchors or Anchors()
        anchor = known.decode if name == DECODE else known.prompt
        if anchor is None:
            return
        model = self._engine.residents.running(of_model, 1)
        try:
            step = self._step((of_model, name), model, anchor)
            found_s = seconds(step, self._engine.device, repeats)
            self._found[name].append(found_s / model.n_loaded / anchor.layer_s)
        except (MemoryError, RuntimeError) as short:  # torch's own out-of-memory is a RuntimeError
            _log.warning("the device's pace is not known: %s", short)

    def _step(self, key: tuple[str, str], model: SegmentedModel, anchor: Anchor) -> Step:
        """The one of last time, unless layers came or went since."""
        from helios_sim.live.pace import prepared

        known = self._ready.get(key)
        if known is not None and list(map(id, known[0])) == list(map(id, model.layers)):
            return known[1]
        self._ready.pop(key, None)  # its memory first
        step: Step = prepared(model, self._engine.device, anchor)
        self._ready[key] = list(model.layers), step
        return step
