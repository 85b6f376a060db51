"""Host time of an iteration: inside the forward pass, and around it when the real server runs.

Inside the pass, the host turns lists of requests into tensors and a step, and tokens back into lists; the device part
begins when these inputs are ready. On a CPU both are wall time of the same cores, and issuing the layers' operations is
part of device time.

Around the pass, the time from the end of one iteration to the end of the next is known, and so is the part of it inside
the forward pass. The difference is host time during which the device waits: server, scheduler, policy, telemetry and
the engine's bookkeeping. It is measured by serving the model at full depth with the real server and live engine. The
server needs a profile before there is one, so it gets one made from the model's shape and the ceilings, for sizes only:
no time of the run depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np

from calibrate.measure.ceilings import Ceilings
from calibrate.measure.sampling import figure
from calibrate.measure.subject import Subject
from calibrate.measure.whole import NO_HOST
from helios_sim.exits.artificial import no_exits
from helios_sim.exits.replay import offline_exits
from helios_sim.exits.rule import Confidence
from helios_sim.live.clock import WallClock
from helios_sim.live.device import Device, open_device
from helios_sim.live.engine import LiveEngine
from helios_sim.live.exits import ExitReader
from helios_sim.live.memory.decodes import decode_step
from helios_sim.live.memory.residents import Residents
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.heads import ExitHeads
from helios_sim.live.served import LiveModel
from helios_sim.policy.full_depth import FullDepthParameters, FullDepthPolicy
from helios_sim.policy.telemetry import Candidate, Goal, Objective, Situation
from helios_sim.profile.profile import MemoryBudget, Profile
from helios_sim.profile.roofline import roofline_profile
from helios_sim.profile.spec import HardwareSpec, ModelSpec
from helios_sim.request import NS_PER_S, RequestBlock, RequestRecord
from helios_sim.serving.server import Server
from helios_sim.simulation import simulate
from helios_sim.study.watched import Step, WatchedEngine

REPEATS = 15
LAYERS_BEFORE = 8  # layers run before each measurement, so that caches are filled as in service
WARM_ITERATIONS = 3  # decodes of each batch that are not counted
ITERATIONS = 16  # decodes of each batch that are counted
PROMPT_TOKENS = 4
_UNBOUNDED_BYTES = 1 << 50  # the server's memory budget, which must not limit the run


@dataclass(frozen=True, slots=True)
class HostCosts:
    """Medians in seconds, by batch where it matters. Launch costs are 0 by definition on a synchronous device."""

    overhead_s: dict[int, float]  # from lists to a step and back
    overhead_iqr_s: dict[int, float]
    sync_s: dict[int, float]
    launch_s_per_layer: float  # eager
    launch_s_per_graph: float  # all layers captured as one graph
    # device time to make a step (rotations, masks, rows) within a captured graph, if the kernels need one; on a CPU it
    # is part of `overhead_s`
    step_s: dict[int, float] = field(default_factory=dict)

    @property
    def middle_overhead_s(self) -> float:
        """The value at the middle batch."""
        return self.overhead_s[sorted(self.overhead_s)[len(self.overhead_s) // 2]]

    @property
    def host_sync_s(self) -> float:
        return self.sync_s[sorted(self.sync_s)[len(self.sync_s) // 2]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HostCosts:
        keys = ("overhead_s", "overhead_iqr_s", "sync_s", "step_s")
        by_batch = {k: {int(b): t for b, t in data.get(k, {}).items()} for k in keys}
        return cls(**{**data, **by_batch})


def measure_host(subject: Subject, repeats: int = REPEATS, batches: Sequence[int] | None = None) -> HostCosts:
    """Measure the host's costs inside the forward pass, in a second or two. `batches`: None for a few of the limits."""
    chosen = batches or subject.limits.few_batches
    overheads = {batch: figure(_overheads_s(subject, batch, repeats)) for batch in chosen}
    at_exit = _leaves_s if subject.decides_exits else _syncs_s
    syncs = {batch: figure(at_exit(subject, batch, repeats)).median_s for batch in overheads}
    per_layer, per_graph = _launches_s(subject)
    on_card = subject.device.asynchronous and not subject.model.kernels.any_lengths
    made = {batch: _step_s(subject, batch, repeats) for batch in overheads} if on_card else {}
    return HostCosts(
        {batch: f.median_s for batch, f in overheads.items()},
        {batch: f.iqr_s for batch, f in overheads.items()},
        syncs, per_layer, per_graph, made,
    )  # fmt: skip


def _opened(subject: Subject) -> Device:
    """The subject's device as it serves, with the subject's kernels."""
    return open_device(subject.device.torch_device, subject.model.kernels.name)


def _lengths(subject: Subject, batch: int) -> list[int]:
    rng = np.random.default_rng(batch)
    longest = min(subject.limits.max_kv_tokens, subject.pool_tokens // batch)
    found: list[int] = rng.integers(1, longest, batch, endpoint=True).tolist()
    return found


def _overheads_s(subject: Subject, batch: int, repeats: int) -> list[float]:
    """Seconds to make token ids and a decode step from lists, and a list from sampled ids.

    On a device with captured steps, the step's numbers are staged instead, as in service.
    """
    import torch

    from helios_sim.live.exits import Row
    from helios_sim.live.graphs import GraphedDecodes

    device, lengths = subject.device, _lengths(subject, batch)
    cache = subject.cache(batch, max(lengths))
    ids, slots, before = list(range(batch)), list(range(batch)), [n - 1 for n in lengths]
    found, layers = [], _layers(subject, batch)
    if device.asynchronous:
        graphs = GraphedDecodes(subject.model, cache, _opened(subject))
        rows = [Row(i, n - 1, i, subject.n_layers) for i, n in enumerate(lengths)]
        sampled = torch.tensor(ids, device=device.torch_device)
        for _ in range(repeats + 1):
            layers()
            device.wait()
            start_s = perf_counter()
            graphs.stage(rows)
            sampled.tolist()
            device.wait()
            found.append(perf_counter() - start_s)
        return found[1:]
    for _ in range(repeats + 1):
        layers()
        device.wait()
        start_s = perf_counter()
        tokens = torch.tensor(ids, device=device.torch_device)
        decode_step(cache, slots, before)
        tokens.tolist()
        device.wait()
        found.append(perf_counter() - start_s)
    return found[1:]


def _step_s(subject: Subject, batch: int, repeats: int) -> float:
    """Device seconds to make a decode step from numbers on the device, as a captured graph does."""
    import torch

    from helios_sim.live.memory.kv import DecodeStep

    device, longest = subject.device, max(_lengths(subject, batch))
    cache = subject.cache(batch, longest)
    slots = torch.arange(batch, device=device.torch_device)
    positions = torch.full((batch,), longest - 1, device=device.torch_device)
    make = device.prepare(lambda: DecodeStep.on_device(cache, slots, positions, longest, 0))
    device.laps_s([make])
    return figure([device.laps_s([make])[0] for _ in range(repeats)]).median_s


def _syncs_s(subject: Subject, batch: int, repeats: int) -> list[float]:
    """Seconds to bring confidences to the host, compare, gather the remaining rows and make a step for them."""
    import torch

    device, lengths = subject.device, _lengths(subject, batch)
    cache, hidden = subject.cache(batch, max(lengths)), subject.hidden(batch)
    confidence = torch.linspace(0.0, 1.0, batch, device=device.torch_device)
    found, layers = [], _layers(subject, batch)
    for _ in range(repeats + 1):
        layers()
        device.wait()
        start_s = perf_counter()
        stay = [i for i, c in enumerate(confidence.tolist()) if c < 0.5] or [0]
        hidden.index_select(0, torch.tensor(stay, device=device.torch_device))
        decode_step(cache, stay, [lengths[i] - 1 for i in stay])
        device.wait()
        found.append(perf_counter() - start_s)
    return found[1:]


def _leaves_s(subject: Subject, batch: int, repeats: int) -> list[float]:
    """Device seconds to decide, within a captured pass, which requests leave at an exit."""
    import torch

    from helios_sim.live.kernels.interface import UNKNOWN, Inside

    device, kernels = subject.device, subject.model.kernels
    slots = torch.arange(batch, device=device.torch_device)
    sure, threshold = slots.float() / batch, torch.full_like(slots, 0.5, dtype=torch.float64)
    recorded, said = torch.full_like(threshold, UNKNOWN), torch.zeros((4, batch), device=slots.device).double()
    rows = Inside(slots, torch.zeros_like(slots), said)
    decide = device.prepare(
        lambda: kernels.leave(rows, 1, sure, (slots, sure), threshold, recorded, lazy=False, last=False)
    )
    return [device.laps_s([decide])[0] for _ in range(repeats + 1)][1:]


def _layers(subject: Subject, batch: int) -> Callable[[], object]:
    """A run of the first layers for `batch` decodes with short contexts."""
    step, hidden = subject.decode_step([8] * batch), subject.hidden(batch)
    return lambda: subject.model.run(hidden, 0, min(LAYERS_BEFORE, subject.n_layers), step)


def _launches_s(subject: Subject) -> tuple[float, float]:
    """Host seconds to issue one layer eagerly, and to issue all layers captured."""
    device, model = subject.device, subject.model
    if not device.asynchronous:
        return 0.0, 0.0
    step, hidden = subject.decode_step([64]), subject.hidden(1)

    def run() -> object:
        return model.run(hidden, 0, subject.n_layers, step)

    eager_s = figure([device.launch_s(run) for _ in range(REPEATS)]).median_s
    captured = device.prepare(run)
    graph_s = figure([device.launch_s(captured) for _ in range(REPEATS)]).median_s
    return eager_s / subject.n_layers, graph_s


@dataclass(frozen=True, slots=True)
class ServingCosts:
    """Median seconds per iteration, by batch."""

    host_s: dict[int, float]  # outside the forward pass
    host_iqr_s: dict[int, float]
    forward_s: dict[int, float]  # inside it
    iterations: int  # counted for each batch

    @property
    def middle_host_s(self) -> float:
        """The value at the middle batch."""
        return self.host_s[sorted(self.host_s)[len(self.host_s) // 2]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ServingCosts:
        by_batch = {k: {int(b): t for b, t in data[k].items()} for k in ("host_s", "host_iqr_s", "forward_s")}
        return cls(**{**data, **by_batch})


def measure_serving(
    subject: Subject,
    spec: ModelSpec,
    ceilings: Ceilings,
    iterations: int = ITERATIONS,
    batches: Sequence[int] | None = None,
) -> ServingCosts:
    """Serve about 20 iterations at each of three batch sizes. KV memory for the largest batch must be free."""
    host, forward = {}, {}
    for batch in batches or subject.limits.few_batches:
        decodes = serve(subject, spec, ceilings, batch, 1 + WARM_ITERATIONS + iterations).decodes(batch)
        counted = decodes[WARM_ITERATIONS:]
        host[batch] = figure([step.overhead_ns / NS_PER_S for step in counted])
        forward[batch] = figure([step.forward_ns / NS_PER_S for step in counted])
    return ServingCosts(
        {batch: f.median_s for batch, f in host.items()},
        {batch: f.iqr_s for batch, f in host.items()},
        {batch: f.median_s for batch, f in forward.items()},
        iterations,
    )


@dataclass(frozen=True, slots=True)
class Served:
    """One run: its iterations in order, and the records of its requests."""

    steps: list[Step]
    records: list[RequestRecord]

    def decodes(self, batch: int) -> list[Step]:
        """The iterations in which `batch` requests decode and no prompt is read."""
        return [s for s in self.steps if not s.composition.prefill and s.composition.decode_tokens[0, 0] == batch]


def serve(subject: Subject, spec: ModelSpec, ceilings: Ceilings, batch: int, answer_tokens: int) -> Served:
    """Serve `batch` requests with short prompts that arrive at once and decode together to the end.

    Answers are cut to the model's context. Raises UserError if memory does not suffice.
    """
    spec = replace(spec, n_layers=subject.n_layers, chars_per_token=1.0)
    profile, trace = profile_of_shape(spec, subject, ceilings), no_exits(spec)
    letters = Letters()
    live = LiveModel(subject.model.source, ExitHeads.own(()), letters, profile, trace.bind(("text",)))
    answer_tokens = min(answer_tokens, subject.architecture.max_context_tokens - PROMPT_TOKENS)
    clock = WallClock()
    device = _opened(subject)
    engine = LiveEngine(
        clock, {spec.name: live}, letters, slots=batch, slot_tokens=PROMPT_TOKENS + answer_tokens, device=device,
        residents=InPlace(subject.model),
    )  # fmt: skip
    watched = WatchedEngine(engine, clock)
    offline = offline_exits(trace, 1.0, Confidence.MAX_PROBABILITY)
    situation = Situation(
        {spec.name: Candidate(profile, offline)}, MemoryBudget(_UNBOUNDED_BYTES, 1.0), Objective(Goal.THROUGHPUT, 1.0),
        max_running_requests=batch, max_batch_tokens=batch * PROMPT_TOKENS, seed=0,
    )  # fmt: skip
    records: list[RequestRecord] = []

    def make_server(env: Any, number: int, on_left: Any) -> Server:
        policy = FullDepthPolicy(FullDepthParameters())
        server = Server(env, number, watched, policy, situation, on_left)
        server.open()
        engine.capture(server.decisions[0].deployment)
        clock.sync()
        return server

    simulate(make_server, _requests(batch, answer_tokens), batch, records.append, env=clock)
    engine.close()
    return Served(watched.steps, records)


def profile_of_shape(spec: ModelSpec, subject: Subject, ceilings: Ceilings) -> Profile:
    """A roofline profile of the model on a device with these ceilings, without host costs."""
    facts = subject.device.facts
    hardware = HardwareSpec(
        name=facts.name, hbm_bytes=facts.memory_bytes, hbm_bytes_per_s=ceilings.bytes_per_s,
        flops_per_s=ceilings.flops_per_s, tdp_w=None, idle_w=None, source="the ceilings measured just before",
    )  # fmt: skip
    return roofline_profile(spec, hardware, NO_HOST, load_bytes_per_s=ceilings.bytes_per_s)


class InPlace(Residents):
    """Residents that hold the subject's own model: a second copy might not fit, and nothing is loaded."""

    def __init__(self, model: SegmentedModel) -> None:
        super().__init__({}, open_device("cpu"))
        self._model_there = model
        self._no_exits = ExitReader(ExitHeads.own(()), model.architecture.n_layers)

    def hold(self, layers: Mapping[str, int], for_good: bool = False) -> None:
        """Does nothing: the model is resident already."""

    def running(self, name: str, layers: int, late: bool = False) -> SegmentedModel:
        return self._model_there

    @contextmanager
    def laid_out(self, name: str) -> Iterator[SegmentedModel]:
        yield self._model_there

    def exits(self, name: str) -> ExitReader:
        return self._no_exits


class Letters:
    """Prompt text and a tokenizer with one token per letter: times do not depend on the text."""

    bos_token = eos_token = None

    def prompt(self, task: int, start: int, chars: int) -> str:
        return "a" * chars

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1 + i % 3 for i in range(len(text))]}

    def get_vocab(self) -> Mapping[str, int]:
        return {}


def _requests(count: int, answer_tokens: int) -> Iterator[RequestBlock]:
    nothing = np.zeros(count, np.int64)
    yield RequestBlock(np.arange(count), nothing, nothing + PROMPT_TOKENS, nothing + answer_tokens, nothing, nothing)
