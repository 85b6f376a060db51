"""Times of a model's parts on adaptive grids: rows, decode attention, prefill attention.

All layers run in one go and the time is divided among them, since a small kernel timed alone looks too fast. Attention
is how much longer a run with it takes than a run of the same rows without it, lap by lap, so that the parts add up to
whole iterations. Classes of layers differ only in attention: each class has a run in which only its layers attend. A
classifier's check is small compared with the overhead of the first operation after other work, which is paid anyway. So
its time is how much longer a run of some layers takes with a check after each; if noise hides the difference, the check
timed alone is used. A predictor's check has several operations and is timed alone.

Two anchors are timed all along: a few decodes and a prompt, the same steps as in `helios_sim.live.pace`, so that
serving from the profile can time them again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from calibrate.measure.device import Step
from calibrate.measure.grid import Axes, HeldOut, Place, geometric, refine
from calibrate.measure.sampling import Figure, Sampler, TimingJob, TimingPoint
from calibrate.measure.subject import Subject
from helios_sim.live.model.architecture import Architecture
from helios_sim.live.model.decoder import FusedAttend, Rotation, turned
from helios_sim.live.model.weights import LayerWeights
from helios_sim.profile import pace

CARD_PROMPT_ROWS = 512  # fewer rows would be memory-bound on a card
WHOLE_MODEL = -1
CHECKED_LAYERS = 8
CHECKED_REPEATS = 3  # laps with and without checks, in turns
NEAR_CONTEXT = 16  # a first chunk has its own kernel, so interpolation starts just after context 0
DENSE, KV_PROJECTION, EMBEDDING, HEAD = "dense", "kv_projection", "embedding", "head"
CHECK, CHECK_CLASSIFIER, CHECK_PREDICTOR = "check", "check_classifier", "check_predictor"
DECODE, PREFILL = "decode_attention", "prefill_attention"
CLASSIFIER_ALONE, CLASSIFIED_LAYER = f"{CHECK_CLASSIFIER}_alone", f"{CHECK_CLASSIFIER}_layer"
HEAD_ALONE = f"{HEAD}_alone"
OF_HEAD = (HEAD, CHECK, CHECK_PREDICTOR)  # measured for as many rows as go through the head at once


class NoAttention:
    """An attention step that does nothing: it returns the queries and stores no K and V."""

    def __init__(self, rotations: Sequence[Rotation | None]) -> None:
        self.rotations = rotations

    def __call__(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        return q.reshape(len(q), -1)

    def write(self, layer: int, k: Any, v: Any) -> None:
        return None


class OnlyLayers:
    """A real attention step in some layers and none in the others, to time one class of layers."""

    def __init__(self, step: Any, layers: Collection[int]) -> None:
        self._step, self._layers = step, frozenset(layers)
        self.rotations = step.rotations
        self._none = NoAttention(step.rotations)

    def __call__(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        return (self._step if layer in self._layers else self._none)(layer, q, k, v)

    def write(self, layer: int, k: Any, v: Any) -> None:
        self._step.write(layer, k, v)


class OnlyFusedLayers(OnlyLayers, FusedAttend):
    """`OnlyLayers` for a fused step, which normalizes and rotates q and k itself."""

    def __init__(self, step: Any, layers: Collection[int], architecture: Architecture) -> None:
        super().__init__(step, layers)
        self._architecture = architecture

    def fused(self, layer: int, qkv: Any, w: LayerWeights) -> Any:
        if layer in self._layers:
            return self._step.fused(layer, qkv, w)
        return self._none(layer, *turned(self._architecture, w, layer, qkv, self._none))

    def fused_write(self, layer: int, kv: Any, w: LayerWeights) -> None:
        self._step.fused_write(layer, kv, w)


def only_layers(step: Any, layers: Collection[int], architecture: Architecture) -> OnlyLayers:
    """The step restricted to these layers."""
    if isinstance(step, FusedAttend):
        return OnlyFusedLayers(step, layers, architecture)
    return OnlyLayers(step, layers)


def anchor_places(subject: Subject) -> dict[str, tuple[int, int]]:
    """The (rows, context tokens) of each anchor; context 0 for the prompt."""
    limits = subject.limits
    kv_tokens = max(1, min(pace.DECODE_KV_TOKENS, limits.max_kv_tokens // 4))
    prompt_rows = CARD_PROMPT_ROWS if subject.device.asynchronous else pace.PROMPT_ROWS
    return {
        pace.DECODE: (min(pace.DECODE_ROWS, limits.max_batch), kv_tokens),
        pace.PROMPT: (min(prompt_rows, limits.max_chunk), 0),
    }


def nearer_anchor(subject: Subject, rows: int) -> str:
    """The anchor (decode or prompt) that is closer to work on this many rows."""
    (few, _), (many, _) = anchor_places(subject).values()
    return pace.DECODE if rows < (few * many) ** 0.5 else pace.PROMPT


def anchor_jobs(subject: Subject) -> dict[str, TimingJob]:
    return {name: _job(subject, *place) for name, place in anchor_places(subject).items()}


def _job(subject: Subject, rows: int, kv_tokens: int) -> TimingJob:
    def build() -> Sequence[Step]:
        step = subject.decode_step([kv_tokens] * rows) if kv_tokens else subject.prompt_step(rows, 0)
        return [partial(subject.model.run, subject.hidden(rows), 0, subject.n_layers, step)]

    point = TimingPoint("anchor", -1, rows, kv_tokens)
    return TimingJob((point,), build, lambda laps_s: {point: laps_s[0]})


@dataclass(frozen=True, slots=True)
class Grids:
    """The axes of each table, and the places measured outside them."""

    axes: Mapping[str, Axes]
    held_out: Mapping[str, tuple[HeldOut, ...]]

    def with_table(self, table: str, axes: Axes, held_out: Sequence[HeldOut]) -> Grids:
        return Grids({**self.axes, table: axes}, {**self.held_out, table: tuple(held_out)})


class Latency:
    """Measures a subject's tables through a sampler. Calls may stop early; results are in the sampler's points."""

    def __init__(self, subject: Subject, sampler: Sampler) -> None:
        self.subject, self.sampler, self.points = subject, sampler, sampler.points
        sampler.anchors = anchor_jobs(subject)

    @property
    def row_tables(self) -> tuple[str, ...]:
        """The tables by rows. The first one is measured only by `rows_job`, at all rows."""
        own = (EMBEDDING, DENSE, HEAD, CHECK, KV_PROJECTION)
        looks = (CHECK_PREDICTOR,) if self.subject.has_predictor else ()
        return (*own, *looks, CHECK_CLASSIFIER) if self.subject.has_classifier else (*own, *looks)

    def coarse(self) -> Grids:
        """The initial axes: few points that span the limits."""
        limits = self.subject.limits
        rows = geometric(1, limits.max_rows, 2.0)
        head_rows = geometric(1, limits.max_head_rows, 2.0)
        kv = tuple(sorted({1, *geometric(min(128, limits.max_kv_tokens), limits.max_kv_tokens, 4.0)}))
        context = limits.max_kv_tokens - min(limits.max_chunk, limits.max_kv_tokens // 2)
        contexts = tuple(sorted({0, min(NEAR_CONTEXT, context // 2), context // 2, context}))
        chunks = tuple(sorted({1, *geometric(min(16, limits.max_chunk), limits.max_chunk, 4.0)}))
        axes = {table: Axes((head_rows if table in OF_HEAD else rows,)) for table in self.row_tables}
        axes[DECODE] = Axes((geometric(1, limits.max_batch, 2.0), kv))
        axes[PREFILL] = Axes((chunks, contexts))
        return Grids(axes, {})

    def sketch(self, share: float = 1.0) -> Grids:
        """The fewest points that tables can be read from: both ends of every axis, up to a share of the limits."""
        limits = self.subject.limits

        def ends(low: int, high: int) -> tuple[int, ...]:
            return (low, max(low + 1, round(high * share)))

        context = limits.max_kv_tokens - min(limits.max_chunk, limits.max_kv_tokens // 2)
        axes = {
            table: Axes((ends(1, limits.max_head_rows if table in OF_HEAD else limits.max_rows),))
            for table in self.row_tables
        }
        axes[DECODE] = Axes((ends(1, limits.max_batch), ends(1, limits.max_kv_tokens)))
        axes[PREFILL] = Axes((ends(1, limits.max_chunk), ends(0, context)))
        return Grids(axes, {})

    def sketch_jobs(self, grids: Grids) -> list[TimingJob]:
        """All jobs of the grids, jobs with little work first."""
        return sorted(self._jobs(grids), key=lambda job: job.points[0].first * (1 + job.points[0].second))

    def off_axes(self, grids: Grids, table: str) -> list[Place]:
        """Measured places between the ends of the table's axes but not on them."""
        layer_class = 0 if table in (DENSE, KV_PROJECTION, DECODE, PREFILL) else WHOLE_MODEL
        dimensions, on = len(grids.axes[table].values), set(grids.axes[table].places())
        found = [place[:dimensions] for place in self.points.of(table, layer_class)]
        ends = [(axis[0], axis[-1]) for axis in grids.axes[table].values]
        return [
            place for place in found
            if place not in on and all(low <= at <= high for at, (low, high) in zip(place, ends, strict=True))
        ]  # fmt: skip

    def measure(self, grids: Grids, samples: int, until_left_s: float = 0.0, more: bool = False) -> bool:
        """Measure all places of the grids and all held-out places (see `Sampler.measure`)."""
        return self.sampler.measure(self._jobs(grids), samples, until_left_s, more)

    def decode_jobs(self, grids: Grids) -> list[TimingJob]:
        """Jobs for the decodes that fit into memory, and for the head at up to the largest batch."""
        decodes = [job for place in grids.axes[DECODE].places() if (job := self._job(DECODE, place))]
        heads = [rows for rows in grids.axes[HEAD].values[0] if rows <= self.subject.limits.max_batch]
        return decodes + [self.head_job(rows) for rows in heads]

    def known(self, grids: Grids) -> bool:
        """Whether every place has a sample, clean or contended."""
        return all(self.points.known(job.points[0]) for job in self._jobs(grids))

    def _jobs(self, grids: Grids) -> list[TimingJob]:
        jobs: dict[tuple[str, Place], TimingJob] = {}
        for table, axes in grids.axes.items():
            held_out = [h.place for h in grids.held_out.get(table, ())]
            for place in [*axes.places(), *held_out]:
                if job := self._job(table, place):
                    jobs.setdefault((table if table in (DECODE, PREFILL) else DENSE, place), job)
        return list(jobs.values())

    def refine(self, grids: Grids, table: str, samples: int, tolerance: float, until_left_s: float = 0.0) -> Grids:
        """The grids with this table's axes refined as far as the time allows."""
        axes, held_out = refine(
            grids.axes[table],
            measure=lambda places: self.sampler.measure(
                [job for place in places if (job := self._job(table, place))], samples, until_left_s
            ),
            time_s=partial(self.time_s, table),
            scale_s=partial(self.scale_s, table),
            noise_s=partial(self.noise_s, table),
            tolerance=tolerance,
            fits=lambda place: table != DECODE or self.subject.holds(*place),
        )
        return grids.with_table(table, axes, held_out)

    def time_s(self, table: str, place: Place) -> float:
        """Seconds at a measured place, summed over all layers. Batches that do not fit are scaled in proportion."""
        if table in (DECODE, PREFILL):
            return sum(len(c) * self.attention_s(table, i, place) for i, c in enumerate(self.subject.classes))
        return self.rows_figure(table, place[0]).median_s * self._layers(table)

    def rows_figure(self, table: str, rows: int) -> Figure:
        """The figure of a table by rows, per layer if the table is one of layers."""
        found = self.points.figure(self._point(table, 0, (rows,)))
        if table == CHECK_CLASSIFIER and found.median_s <= 0:
            return self.points.figure(self._point(CLASSIFIER_ALONE, 0, (rows,)))
        return found

    def attention_s(self, table: str, layer_class: int, place: Place) -> float:
        """Attention seconds of one layer of a class. A batch that does not fit is scaled from the largest that does."""
        first, second = place
        fits = place
        if table == DECODE and not self.subject.holds(first, second):
            fits = (max(p[0] for p in self._measured(table, layer_class) if p[1] == second), second)
        return max(0.0, self.points.figure(self._point(table, layer_class, fits)).median_s) * (first / fits[0])

    def scale_s(self, table: str, place: Place) -> float:
        """The time to which an error at the place is relative.

        For attention and the embedding it is a whole step with all layers, for a classifier's check one layer with it.
        """
        own_s = self.time_s(table, place)
        if table == CHECK_CLASSIFIER:
            return own_s + self.points.figure(self._point(CLASSIFIED_LAYER, 0, place)).median_s
        if table not in (DECODE, PREFILL, EMBEDDING):
            return own_s
        return own_s + self.points.figure(self._point(DENSE, 0, (place[0],))).median_s * self.subject.n_layers

    def noise_s(self, table: str, place: Place) -> float:
        """Standard error of `time_s` at a measured place."""
        if table in (DECODE, PREFILL):
            figures = [
                (len(c), self.points.figure(self._point(table, i, place))) for i, c in enumerate(self.subject.classes)
            ]
            return sum(layers * f.standard_error_s for layers, f in figures)
        return self.points.figure(self._point(table, 0, place)).standard_error_s * self._layers(table)

    def _measured(self, table: str, layer_class: int) -> list[Place]:
        return list(self.points.of(table, layer_class))

    def _layers(self, table: str) -> int:
        return self.subject.n_layers if table in (DENSE, KV_PROJECTION) else 1

    def _point(self, table: str, layer_class: int, place: Place) -> TimingPoint:
        of = layer_class if table in (DENSE, KV_PROJECTION, DECODE, PREFILL) else WHOLE_MODEL
        return TimingPoint(table, of, *place)

    def _job(self, table: str, place: Place) -> TimingJob | None:
        if table == DECODE:
            return self.decode_job(*place) if self.subject.holds(*place) else None
        if table == PREFILL:
            return self.prefill_job(*place)
        return self.rows_job(place[0])

    def rows_job(self, rows: int) -> TimingJob:
        """A job for all tables by rows: embedding, layers without attention, K and V alone, head, checks."""
        subject, model = self.subject, self.subject.model
        tables, checked_layers = list(self.row_tables), min(CHECKED_LAYERS, subject.n_layers)
        if classifies := CHECK_CLASSIFIER in tables:
            tables[tables.index(CHECK_CLASSIFIER)] = CLASSIFIER_ALONE
        if rows > subject.limits.max_head_rows:
            tables = [t for t in tables if t not in OF_HEAD]

        def build() -> Sequence[Step]:
            step = subject.decode_step([8] * rows)
            ids, hidden, none = subject.tokens(rows), subject.hidden(rows), NoAttention(step.rotations)
            words = subject.words(rows) if CHECK_PREDICTOR in tables else None

            def layer_by_layer(check: bool) -> None:
                passed = hidden
                for layer in range(checked_layers):
                    passed = model.run(passed, layer, layer + 1, none)
                    if check:
                        subject.classified(passed, layer)

            steps: dict[str, Step] = {
                EMBEDDING: lambda: model.embed(ids, step.positions),
                DENSE: lambda: model.run(hidden, 0, subject.n_layers, none),
                KV_PROJECTION: lambda: model.propagate(hidden, 0, subject.n_layers, step),
                CLASSIFIER_ALONE: lambda: subject.classified(hidden),
                HEAD: lambda: subject.sampled(hidden),
                CHECK: lambda: subject.checked(hidden),
                CHECK_PREDICTOR: lambda: subject.foreseen(hidden, words),
            }
            in_turns = [partial(layer_by_layer, False), partial(layer_by_layer, True)] * CHECKED_REPEATS
            return [steps[table] for table in tables] + (in_turns if classifies else [])

        def read(laps_s: Sequence[float]) -> Mapping[TimingPoint, float]:
            found = {table: lap_s / self._layers(table) for table, lap_s in zip(tables, laps_s, strict=False)}
            if classifies:
                bare_s, with_s = (laps_s[len(tables) + i :: 2] for i in (0, 1))
                found[CLASSIFIED_LAYER] = median(bare_s) / checked_layers
                found[CHECK_CLASSIFIER] = median(w - b for w, b in zip(with_s, bare_s, strict=True)) / checked_layers
            return {self._point(table, 0, (rows,)): time_s for table, time_s in found.items()}

        measured = [*tables, *((CLASSIFIED_LAYER, CHECK_CLASSIFIER) if classifies else ())]
        return TimingJob(
            tuple(self._point(table, 0, (rows,)) for table in measured), build, read, nearer_anchor(subject, rows)
        )

    def head_job(self, rows: int) -> TimingJob:
        """A job for the head alone, which takes as long as all layers if the vocabulary is large.

        Its samples count for the head's table like those of `rows_job`, and on their own.
        """
        subject, points = self.subject, (self._point(HEAD_ALONE, 0, (rows,)), self._point(HEAD, 0, (rows,)))

        def build() -> Sequence[Step]:
            return [partial(subject.sampled, subject.hidden(rows))]

        return TimingJob(points, build, lambda laps_s: dict.fromkeys(points, laps_s[0]), nearer_anchor(subject, rows))

    def decode_job(self, batch: int, kv_tokens: int) -> TimingJob:
        """A job for decode attention of a batch with equal context lengths."""
        points = self._points_of_classes(DECODE, (batch, kv_tokens))
        return self.attention_job(points, batch, lambda: self.subject.decode_step([kv_tokens] * batch))

    def prefill_job(self, tokens: int, context_tokens: int) -> TimingJob:
        points = self._points_of_classes(PREFILL, (tokens, context_tokens))
        return self.attention_job(points, tokens, lambda: self.subject.prompt_step(tokens, context_tokens))

    def attention_job(self, points: tuple[TimingPoint, ...], rows: int, make: Callable[[], Any]) -> TimingJob:
        """A job for attention in one layer of each class. The run without it is also a sample of the dense table."""
        subject, model, classes = self.subject, self.subject.model, self.subject.classes
        dense = self._point(DENSE, 0, (rows,))

        def build() -> Sequence[Step]:
            step, hidden = make(), subject.hidden(rows)
            attends: list[Any] = [NoAttention(step.rotations)]
            a, several = subject.architecture, len(classes) > 1
            attends += [only_layers(step, layers, a) if several else step for layers in classes]
            return [partial(model.run, hidden, 0, subject.n_layers, attend) for attend in attends]

        def read(laps_s: Sequence[float]) -> Mapping[TimingPoint, float]:
            bare_s, *with_s = laps_s
            found = {
                point: (lap_s - bare_s) / len(layers)
                for point, layers, lap_s in zip(points, classes, with_s, strict=True)
            }
            return {**found, dense: bare_s / subject.n_layers}

        return TimingJob((*points, dense), build, read, nearer_anchor(subject, rows))

    def _points_of_classes(self, table: str, place: Place) -> tuple[TimingPoint, ...]:
        return tuple(TimingPoint(table, i, *place) for i in range(len(self.subject.classes)))


def grids_to_json(grids: Grids) -> dict[str, Any]:
    def outside(table: str) -> list[list[Any]]:
        return [[list(h.place), h.measured_s, h.interpolated_s, h.scale_s] for h in grids.held_out.get(table, ())]

    return {
        table: {"axes": [list(v) for v in axes.values], "held_out": outside(table)}
        for table, axes in grids.axes.items()
    }


def grids_from_json(data: Mapping[str, Any]) -> Grids:
    axes = {t: Axes(tuple(tuple(v) for v in d["axes"])) for t, d in data.items()}
    held_out = {t: tuple(HeldOut(tuple(p), *rest) for p, *rest in d["held_out"]) for t, d in data.items()}
    return Grids(axes, {t: h for t, h in held_out.items() if h})
