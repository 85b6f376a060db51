"""One live run of a job: opens models and texts, makes an engine for each replica, starts the clock.

The clock starts when `begin` has begun the last replica. Before, one replica after the other reads its weights and
warms up its kernels. torch is imported here and only here, when a live run is asked for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from simpy.events import Timeout

from helios_sim.by_answer import Bandit, Cascade
from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence, DraftModel, ExitRule, FullDepth, ReleaseEarly, SelfSpeculation
from helios_sim.exits.store import folder_of
from helios_sim.live.clock import WallClock
from helios_sim.live.energy import ABSENT, Meter, open_counter
from helios_sim.live.served import OpenSettings, check_packages, open_models, read_texts
from helios_sim.live.threads import share_threads
from helios_sim.provenance import Provenance, ProvenanceClass
from helios_sim.report.columns import Maybe
from helios_sim.report.metrics import Metrics, MetricValue, energy_metrics, gco2e_per_million
from helios_sim.report.records import Records
from helios_sim.request import Request, RequestRecord
from helios_sim.routing import AnswerRouter, Routing
from helios_sim.serving.iteration import Engine
from helios_sim.study.answer_routers import Hears, require_whole
from helios_sim.study.build import Parts, confidence
from helios_sim.study.fleet import Fleet, of_kind
from helios_sim.study.live_replica import LiveReplica
from helios_sim.study.schema import Config
from helios_sim.study.watched import LiveNotes
from helios_sim.study.workload import task_names
from helios_sim.workload import generate

if TYPE_CHECKING:
    from helios_sim.live.engine import LiveEngine
    from helios_sim.live.served import LiveModel
    from helios_sim.serving.server import Server


# Metrics that a run cannot know while it serves, since full depth is not computed and not all layers are loaded.
UNKNOWN = frozenset({"agreement", "bits_per_char", "late_time_fraction"})
METER_LEAD_NS = 20_000_000  # energy meters start this long before the first arrival
OF_SIMULATIONS = ("tensor_parallel", "quantization", "kv_cache_dtype", "kernels")  # of a kind's own server settings


class LiveRun:
    """All replicas of a run, each with its engine on its device."""

    def __init__(self, config: Config, fleet: Fleet, seed: int) -> None:
        """Open everything. Raises UserError as `check_settings`, `open_models` and `read_texts` do."""
        check_settings(config, fleet)
        self._config, self._fleet = config, fleet
        self.clock = WallClock()
        self._devices = [config.live.device_of(number) for number in range(fleet.replicas)]
        self.meters = {d: Meter(open_counter(d), ABSENT[d.partition(":")[0]]) for d in config.live.used}
        self.replicas: list[LiveReplica] = []
        self._undo_sharing: Callable[[], None] = lambda: None
        self._models: dict[tuple[str, str], dict[str, LiveModel]] = {}  # by kind and device
        requests = [r for block in generate(fleet.parts.workload, seed) for r in block.rows()]
        self._first_ns = requests[0].arrival_ns
        with ExitStack() as failed:
            failed.callback(self.close)
            self._share_processors()
            texts = read_texts(fleet.parts.workload.mix.tasks, config.live.texts)
            for number in range(fleet.replicas):
                kind, meter, alone = fleet.kind_of(number), self.meters[self._devices[number]], fleet.replicas == 1
                replica = LiveReplica(
                    config, kind, number, self._opened(number), texts, requests, self.clock, meter, alone
                )
                self.replicas.append(replica)
                replica.device_engine.judges = self._is_judged(number)
            if any(k.parts.situation.schedule_ahead for k in fleet.kinds) and any(
                replica.device_engine.device.kernels.name == "torch" for replica in self.replicas
            ):
                raise _no_ahead()
            failed.pop_all()

    @property
    def device_engine(self) -> LiveEngine:
        """The first replica's engine."""
        return self.replicas[0].device_engine

    def begin(self, number: int, make_server: Callable[[Engine], Server]) -> Server:
        """Return the replica's server, with its first deployment loaded and warm. The last replica starts the clock.

        Energy is counted from the first arrival to the last completion, like the span. UserError if memory does not
        suffice for the first deployment.
        """
        server = self.replicas[number].begin(make_server)
        device = self._devices[number]
        server.joules = partial(_share, self.meters[device], self._devices.count(device))
        if number == len(self.replicas) - 1:
            self._meter_from(self._first_ns)
            gc.collect()
            gc.freeze()  # the collector skips what has been opened: searching it takes up to 0.1 s amid a run
            self.clock.sync()
        return server

    def routing(self, routing: Routing) -> Routing:
        """Return the routing with live judgement: a cascade goes by what was measured while an answer was decoded, a
        bandit by the bits that are recorded of the requests' own texts."""
        cascade = routing.by_answer
        if isinstance(cascade, Bandit):
            return replace(routing, by_answer=Hears(cascade, self._fleet.models))
        if not isinstance(cascade, Cascade):
            return routing
        recorded = cascade.confidence

        def measured(request: Request, record: RequestRecord) -> float:
            if not self._is_judged(record.replica):  # its engine replays the exits of a trace
                return recorded(request, record)
            require_whole(record)
            return fmean(self.replicas[record.replica].device_engine.answers[request.request_id].sure)

        return replace(routing, by_answer=replace(cascade, confidence=measured))

    def as_known(self, records: Records) -> Records:
        """Return records without the bits of the recorded text, which serving does not compute, and with the agreement
        with full depth if that was computed afterwards."""
        known = replace(records, microbits=Maybe(records.microbits.values, np.zeros(len(records), np.bool_)))
        if not self._config.live.score:
            return known
        from helios_sim.live.answers import agreed_tokens

        found: dict[tuple[int, int], int] = {}
        for number, replica in enumerate(self.replicas):
            answers = [answer for request, answer in replica.device_engine.answers.items() if request >= 0]
            agreed = agreed_tokens(self._opened(number), answers, self._devices[number])
            found |= {(number, request): tokens for request, tokens in agreed.items()}
        served = zip(records.replica.tolist(), records.request_id.tolist(), strict=True)
        agreed_of = [found.get(of, 0) for of in served]
        return replace(known, agreed_tokens=np.array(agreed_of, records.agreed_tokens.dtype))

    def measured(self, metrics: Metrics, records: Records) -> dict[str, MetricValue]:
        """Return metrics with the devices' measured energy in place of the simulated band; unknown ones are None."""
        # If answers leave at ramps, each token runs at full depth too, so its agreement is known.
        decisions = [decision for replica in self.replicas for decision in replica.server.decisions]
        judged = all(isinstance(decision.deployment.exit_rule, ReleaseEarly) for decision in decisions)
        unknown = UNKNOWN - {"agreement"} if judged or self._config.live.score else UNKNOWN
        known = {name: None if name in unknown else value for name, value in metrics.items()}
        done, energy_j = records.completed, self._energy_j
        known |= energy_metrics(energy_j, int(done.sum()), int(records.output_chars[done].sum()))
        tokens, carbon = int(records.output_tokens[done].sum()), self._config.cost.gco2e_per_kwh
        return known | {"gco2e_per_million_tokens": gco2e_per_million(energy_j, carbon, tokens)}

    def inputs(self) -> dict[str, Provenance]:
        """Return the sources of energy figures, and the kernels with which a card computed."""
        found = {}
        if self._energy_j is not None:
            sources = ", ".join(dict.fromkeys(meter.source for meter in self.meters.values()))
            found["energy"] = Provenance(ProvenanceClass.MEASURED, sources, "mode=live")
        if kernels := self._kernels():
            found["kernels"] = Provenance(ProvenanceClass.MEASURED, kernels, "mode=live")
        return found

    def notices(self) -> tuple[str, ...]:
        """Return notices for the reader: unknown energy, kernels, shared devices."""
        found = [f"Energy is not known: {meter.why}." for meter in self.meters.values() if meter.why]
        if kernels := self._kernels():
            found.append(f"The card ran {kernels}.")
        found += [
            f"{n} replicas shared {device}: each is slower while others compute, which a profile of one alone does not "
            "know."
            for device in self.meters if (n := self._devices.count(device)) > 1
        ]  # fmt: skip
        return tuple(dict.fromkeys(found))

    def end(self) -> LiveNotes:
        """Stop counting energy at the end of the run, and return the sums of all replicas."""
        for meter in self.meters.values():
            meter.stop()
        return LiveNotes.together([replica.end() for replica in self.replicas])

    def close(self) -> None:
        """Leave nothing of the run on the devices, however it ended."""
        for meter in self.meters.values():
            meter.stop()
        gc.unfreeze()
        with ExitStack() as each:
            each.callback(self._undo_sharing)
            for replica in self.replicas:
                each.callback(replica.close)

    @property
    def _energy_j(self) -> float | None:
        """Energy of all devices; None if it is not known of one of them."""
        known = [meter.energy_j for meter in self.meters.values()]
        return None if None in known else sum(filter(None, known))

    def _kernels(self) -> str | None:
        """Return the kernels with which cards compute; None without a card."""
        from helios_sim.live.kernels.choice import described

        used = dict.fromkeys(
            described(replica.device_engine.device.kernels)
            for replica in self.replicas if replica.device_engine.device.captures
        )  # fmt: skip
        return ", ".join(used) or None

    def _is_judged(self, number: int) -> bool:
        """Whether the replica's engine measures how sure models are of their answers, for a cascade."""
        cascade = self._fleet.routing.by_answer
        replays = any(model.replays for model in self._opened(number).values())
        return isinstance(cascade, Cascade) and number not in cascade.stages[-1] and not replays

    def _opened(self, number: int) -> dict[str, LiveModel]:
        """Return the replica's models, opened once for each kind and device; weights in host memory are shared."""
        kind, device = self._fleet.kind_of(number), self._devices[number]
        if (kind.name, device) not in self._models:
            known = {name: model for of_kind in self._models.values() for name, model in of_kind.items()}
            self._models[kind.name, device] = opened(self._config, kind.parts, device, known)
        return self._models[kind.name, device]

    def _share_processors(self) -> None:
        """Give each of several engines on the CPU its share of the threads that one engine would have."""
        several = self._devices.count("cpu")
        if several > 1 and self._config.live.threads is None:
            check_packages("serving on a device")
            self._undo_sharing = share_threads(several)

    def _meter_from(self, arrival_ns: int) -> None:
        """Start the meters before the first arrival: asking a card takes milliseconds, which would delay a request."""

        def start() -> None:
            for meter in self.meters.values():
                meter.start()

        if arrival_ns <= METER_LEAD_NS:
            start()
            return
        soon = Timeout(self.clock, arrival_ns - METER_LEAD_NS)
        assert soon.callbacks is not None
        soon.callbacks.append(lambda _: start())


def _share(meter: Meter, replicas: int) -> float | None:
    """Return the energy in J of one of several replicas on a device: an equal share, as a counter sees only the sum."""
    joules = meter.so_far_j()
    return None if joules is None else joules / replicas


def opened(
    config: Config, parts: Parts, device: str, known: Mapping[str, LiveModel] | None = None
) -> dict[str, LiveModel]:
    profiles = {name: data.profile for name, data in parts.models.items()}
    traces = {name: data.trace for name, data in parts.models.items()}
    return open_models(wanted(config, parts.models, device), profiles, traces, known)


def check_live(config: Config, fleet: Fleet) -> None:
    """Raise UserError for anything that would stop a live run before its first request, without reading any layer."""
    check_settings(config, fleet)
    known: dict[str, LiveModel] = {}
    for number in range(fleet.replicas):
        kind, device = fleet.kind_of(number), config.live.device_of(number)
        if number == kind.numbers[0] or device != config.live.device_of(number - 1):
            with of_kind(kind.name):
                known |= opened(config, kind.parts, device, known)
    read_texts(task_names(config.workload.mix), config.live.texts)


def check_drafter(config: Config, parts: Parts, model: str, drafter: str) -> None:
    """Raise UserError for a drafter with other tokens than the model's."""
    from helios_sim.live.other_drafts import require_one_tokenizer

    require_one_tokenizer(opened(config, parts, config.live.used[0]), model, drafter)


def check_judged(config: Config, kind: str, rule: ExitRule) -> None:
    """Raise UserError for a kind with judged answers and an exit rule that lets tokens leave before the last layer."""
    asked = config.cluster.cascade.kinds[:-1]
    judged = asked if config.server.router != AnswerRouter.THOMPSON else config.cluster.kinds
    if kind in judged and not isinstance(rule, FullDepth | SelfSpeculation | DraftModel):
        allowed = "live, one that runs all layers for every token: by what the last layer says answers are judged"
        fix = "serve the kinds before the last with full_depth" if asked else "serve all kinds with full_depth"
        raise UserError("policy", type(rule).__name__, allowed, fix)


def check_settings(config: Config, fleet: Fleet) -> None:
    """Raise UserError for settings that only a simulation can follow."""
    server, live, several = config.server, config.live, fleet.replicas > 1
    if server.enable_prefix_caching:
        raise UserError("server.enable_prefix_caching", True, "false when mode=live: each request has a place of its "
                        "own", "set server.enable_prefix_caching=false")  # fmt: skip
    for name, kind in config.cluster.kinds.items():
        for key in kind.get("server") or ():
            if key in OF_SIMULATIONS:
                allowed = "left out when mode=live: the kind's models run on one device, as they are"
                raise UserError(f"cluster.kinds.{name}.server.{key}", kind["server"][key], allowed, "leave it out")
    if server.router == AnswerRouter.BEST_ANSWER:
        allowed = "one that needs no knowledge of what will come when mode=live"
        raise UserError("server.router", server.router, allowed, "set server.router=thompson, cascade or by_task")
    devices = [live.device_of(number) for number in range(fleet.replicas)] if not live.devices else live.devices
    if len(devices) != fleet.replicas:
        allowed = f"one for each replica, of which there are {fleet.replicas}"
        raise UserError("live.devices", list(devices), allowed, "name as many, or leave it out and set live.device")
    cards = [int(device.partition(":")[2] or 0) for device in devices if device != "cpu"]
    if len(set(cards)) < len(cards):
        allowed = "a card for each replica: what is captured of steps on one card shares memory, one run at a time"
        key, value = ("live.devices", list(devices)) if live.devices else ("live.device", live.device)
        raise UserError(key, value, allowed, "name other cards in live.devices, or set live.device=cpu")
    if several and live.pace_every_s is not None:
        allowed = "null with several replicas: the clock cannot be stopped for a step while others compute"
        raise UserError("live.pace_every_s", live.pace_every_s, allowed, "leave it out")
    if several and config.fidelity_live.loads:
        allowed = "none with several replicas: they slow each other down, and a profile is of one alone"
        raise UserError("fidelity_live.loads", list(config.fidelity_live.loads), allowed, "compare one replica, or set "
                        "mode=live and mode=simulate")  # fmt: skip
    ahead = any(kind.parts.situation.schedule_ahead for kind in fleet.kinds)
    if ahead and ("cpu" in devices or live.kernels == "torch"):
        raise _no_ahead()


def _no_ahead() -> UserError:
    why = "otherwise an iteration is planned when the one before it has ended"
    only = f"0 when mode=live, except where a card computes by Triton's kernels; {why}"
    return UserError("server.schedule_ahead", 1, only, "set server.schedule_ahead=0")


def wanted(config: Config, models: Iterable[str] | None = None, device: str | None = None) -> OpenSettings:
    """Return how to open these models (None for the study's) on a device (None for the first replica's)."""
    live = config.live
    return OpenSettings(
        device or live.used[0], live.dtype, live.threads, dict(live.weights), dict(live.heads), live.kernels,
        _predictors(config, config.models if models is None else models),
    )  # fmt: skip


def _predictors(config: Config, models: Iterable[str]) -> dict[str, Path]:
    """Return by model the folder of its predictors, which is that of its trace; empty if no arm asks for them."""
    entries = [config.policy or {}, *config.arms.values(), *config.cluster.kinds.values()]
    asked = [confidence(config).value, *(entry.get("confidence") for entry in entries)]
    if Confidence.PREDICTOR.value not in asked:
        return {}
    return {model: folder_of(model, config.exits.source.replace("{model}", model)) for model in models}
