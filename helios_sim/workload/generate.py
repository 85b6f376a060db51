"""Requests from a specification and a seed, block by block, and figures that describe them.

Each component draws from its own Generator, so changing one does not move the others' values, and all arms that use a
seed see the same requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray

from helios_sim.errors import UserError, require_count, require_positive
from helios_sim.logs import PromptTexts
from helios_sim.request import NS_PER_S, RequestBlock, token_counts
from helios_sim.workload.arrivals import AllAtOnce, Arrivals, ClosedLoop, TraceArrivals
from helios_sim.workload.lengths import Lengths, TraceLengths
from helios_sim.workload.mix import Per, TaskMix
from helios_sim.workload.prefixes import Sessions, SharedPrefixes

BLOCK_REQUESTS = 4096
TEXT_POSITIONS = 2**62  # text starts are uniform below this; exit traces take them modulo their length


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of a run: arrivals, lengths and tasks.

    `n_requests` may be None only if a trace is used in its own order: then all of the trace is used.
    `chars_per_token` belongs to the tokenizer in which the lengths are counted; a model with the same figure gets back
    exactly these token counts. It is None if the lengths are characters already.
    """

    arrivals: Arrivals
    lengths: Lengths
    mix: TaskMix
    n_requests: int | None = None
    chars_per_token: float | None = 4.0
    system_prompts: tuple[int, ...] | None = None  # by task, the length of the text with which all its prompts begin
    sessions: Sessions | None = None
    id_tokens: int = 512  # prompt tokens that each of a trace's hash_ids stands for

    def __post_init__(self) -> None:
        if self.texts is not None and (self.sessions is not None or self.system_prompts is not None):
            key = "sessions" if self.sessions is not None else "system_prompts"
            allowed = "left out where the trace says by its hash_ids what prompts share"
            raise UserError(f"workload.{key}", "set", allowed, "leave one out, or take another trace")
        if self.n_requests is not None:
            require_count("workload.n_requests", self.n_requests, "ask for at least one request")
        self._check_traces()
        self._check_unit()
        if self.mix.needs_arrivals() and isinstance(self.arrivals, AllAtOnce | ClosedLoop):
            raise UserError(
                "workload.mix.per",
                self.mix.per.value,
                "a drift in seconds needs arrivals that are known before the run",
                "use per=requests, where a position is the share of requests so far",
            )

    @property
    def requests(self) -> int:
        """The number of requests."""
        if self.n_requests is not None:
            return self.n_requests
        return min(limit for _, limit, _ in self._trace_limits())

    @property
    def recorded_priority(self) -> NDArray[np.int64] | None:
        """The recorded priority of each request; None unless the lengths follow a trace with priorities in order."""
        lengths = self.lengths
        return lengths.trace.priority if isinstance(lengths, TraceLengths) and not lengths.resample else None

    @property
    def texts(self) -> PromptTexts | None:
        """The ids of prompt texts recorded in the trace that gives the lengths; None if there are none."""
        return self.lengths.trace.texts if isinstance(self.lengths, TraceLengths) else None

    @property
    def prefixes(self) -> SharedPrefixes | None:
        """The shared beginnings of prompts, by the row that a request names; None if none are known."""
        if isinstance(self.lengths, TraceLengths) and self.chars_per_token is not None:
            found = SharedPrefixes.of_trace(self.lengths.trace, self.id_tokens, self.chars_per_token)
            if found is not None:
                return found
        if self.system_prompts is None:
            return None
        chars = _chars(np.array(self.system_prompts, np.int64), self.chars_per_token).tolist()
        return SharedPrefixes.of([[(task, n)] if n else [] for task, n in enumerate(chars)])

    @property
    def has_priorities(self) -> bool:
        return self.mix.priorities is not None or self.recorded_priority is not None

    @property
    def users(self) -> int | None:
        """Requests in the system at any time in a closed loop; None if arrivals do not wait for answers."""
        return self.arrivals.users if isinstance(self.arrivals, ClosedLoop) else None

    def _trace_limits(self) -> list[tuple[str, int, str]]:
        limits = []
        if isinstance(self.arrivals, TraceArrivals):
            limits.append((self.arrivals.trace.source, len(self.arrivals.trace), "or draw the arrivals"))
        if isinstance(self.lengths, TraceLengths) and not self.lengths.resample:
            limits.append((self.lengths.trace.source, len(self.lengths.trace), "or resample the lengths"))
        return limits

    def _check_traces(self) -> None:
        limits = self._trace_limits()
        if self.n_requests is None:
            if not limits:
                raise UserError(
                    "workload.n_requests", None, "may be null only for a trace in its own order", "give a number"
                )
            return
        for source, limit, way_out in limits:
            if self.n_requests > limit:
                raise UserError(
                    "workload.n_requests",
                    self.n_requests,
                    f"{source} has {limit} requests",
                    f"ask for at most {limit}, {way_out}",
                )

    def _check_unit(self) -> None:
        if self.chars_per_token is None:
            if isinstance(self.lengths, TraceLengths):
                raise UserError(
                    "workload.chars_per_token", None, "a trace's lengths are in tokens", "give characters per token"
                )
        elif not 1.0 <= self.chars_per_token <= 1000.0:
            # Below one character per token, different token counts could round to the same number of characters.
            raise UserError(
                "workload.chars_per_token",
                self.chars_per_token,
                "must lie from 1 to 1000",
                "English text has about 4 in the usual tokenizers; null if the lengths are characters",
            )


def generate(workload: Workload, seed: int, block_requests: int = BLOCK_REQUESTS) -> Iterator[RequestBlock]:
    """Yields the workload's requests in order, in blocks of `block_requests` (the last may be shorter).

    The same workload and seed give the same requests to the last bit, whatever the size of a block. Only one block is
    held in memory. UserError for a seed or block size out of range, before the first block.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError("seed", seed, "must be a whole number of at least 0", "for instance 0")
    require_count("workload.block_requests", block_requests, f"for instance {BLOCK_REQUESTS}")
    return _blocks(workload, int(seed), block_requests)


def _blocks(workload: Workload, seed: int, block_requests: int) -> Iterator[RequestBlock]:
    stream = partial(_stream, seed)
    arrivals = workload.arrivals.sampler(stream("workload.arrivals"))
    lengths = workload.lengths.sampler(stream("workload.prompt_lengths"), stream("workload.output_lengths"))
    task_rng, text_rng = stream("workload.tasks"), stream("workload.text")
    sessions = None if workload.sessions is None else workload.sessions.sampler(stream("workload.sessions"))
    total = workload.requests
    for first in range(0, total, block_requests):
        n = min(block_requests, total - first)
        index = np.arange(first, first + n, dtype=np.int64)
        arrival_ns = arrivals(first, n)
        prompt, output, rows = lengths(first, n)
        position = index / total if workload.mix.per is Per.REQUESTS else arrival_ns / NS_PER_S
        task = workload.mix.pick(task_rng.random(n), position)
        recorded = workload.recorded_priority
        shared = stream_of = None
        if workload.texts is not None:
            shared = rows
        if sessions is not None:
            prompt, stream_of = sessions(first, prompt, output)
        if workload.system_prompts is not None:
            prompt, shared = prompt + np.array(workload.system_prompts, np.int64)[task], task
        yield RequestBlock(
            request_id=index,
            arrival_ns=arrival_ns,
            prompt_chars=_chars(prompt, workload.chars_per_token),
            output_chars=_chars(output, workload.chars_per_token),
            task=task,
            text_start=text_rng.integers(0, TEXT_POSITIONS, n, dtype=np.int64),
            priority=workload.mix.priority(task) if recorded is None else recorded[first : first + n],
            shared=shared,
            stream=stream_of,
        )


def up_to(blocks: Iterable[RequestBlock], until_ns: int) -> tuple[Iterator[RequestBlock], int]:
    """The requests that arrive up to `until_ns` and the first one after it, with their number."""
    found: list[RequestBlock] = []
    for block in blocks:
        n = int(np.searchsorted(block.arrival_ns, until_ns, side="right")) + 1
        found.append(block[:n])
        if n <= len(block):
            break
    return iter(found), sum(map(len, found))


def _stream(seed: int, name: str) -> Generator:
    """A component's own Generator, keyed by its name, so that its draws do not depend on which others exist."""
    return np.random.Generator(np.random.PCG64(SeedSequence(seed, spawn_key=tuple(name.encode()))))


def _chars(lengths: NDArray[np.int64], chars_per_token: float | None) -> NDArray[np.int64]:
    """Lengths in whole characters. Rounding errs by at most half a character, which is less than half a token, so that
    rounding back finds the token count."""
    if chars_per_token is None:
        return lengths.astype(np.int64)  # a copy: a block never shares memory with a trace
    chars: NDArray[np.int64] = np.rint(lengths * chars_per_token).astype(np.int64)
    return chars


@dataclass(frozen=True, slots=True)
class LengthFigures:
    """Mean, percentiles and maximum of lengths. Percentiles interpolate linearly (NumPy's default)."""

    mean: float
    p50: float
    p95: float
    p99: float
    largest: int


@dataclass(frozen=True, slots=True)
class WorkloadFigures:
    """Figures of generated requests."""

    requests: int
    prompt_tokens: LengthFigures
    output_tokens: LengthFigures
    task_shares: dict[str, float]  # share of all requests, by task
    arrival_span_s: float  # first to last arrival; 0 in a closed loop or with all requests at once
    arrival_rate_per_s: float | None  # number of gaps over their sum; None if the span is 0
    arrival_cv: float | None  # standard deviation of the gaps over their mean; None if the span is 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(blocks: Iterable[RequestBlock], tasks: tuple[str, ...], chars_per_token: float) -> WorkloadFigures:
    """Figures of the requests in these blocks, in tokens of a tokenizer with that many characters per token.

    `tasks` are the mix's names. Takes about 24 bytes a request. UserError if there is no request.
    """
    require_positive("chars_per_token", chars_per_token, "English text has about 4")
    arrivals, prompts, outputs = [], [], []
    per_task = np.zeros(len(tasks), dtype=np.int64)
    for block in blocks:
        arrivals.append(block.arrival_ns)
        prompts.append(block.prompt_chars)
        outputs.append(block.output_chars)
        per_task += np.bincount(block.task, minlength=len(tasks))
    requests = int(per_task.sum())
    if not requests:
        raise UserError("workload", "no requests", "there must be one to describe", "generate at least one")
    arrival_ns = np.concatenate(arrivals)
    span_ns = int(arrival_ns[-1] - arrival_ns[0])
    gaps = np.diff(arrival_ns)
    return WorkloadFigures(
        requests=requests,
        prompt_tokens=_length_figures(np.concatenate(prompts), chars_per_token),
        output_tokens=_length_figures(np.concatenate(outputs), chars_per_token),
        task_shares={task: count / requests for task, count in zip(tasks, per_task.tolist(), strict=True)},
        arrival_span_s=span_ns / NS_PER_S,
        arrival_rate_per_s=len(gaps) / (span_ns / NS_PER_S) if span_ns else None,
        arrival_cv=float(gaps.std() / gaps.mean()) if span_ns else None,
    )


def _length_figures(chars: NDArray[np.int64], chars_per_token: float) -> LengthFigures:
    tokens = token_counts(chars, chars_per_token)
    p50, p95, p99 = np.percentile(tokens, (50, 95, 99)).tolist()
    return LengthFigures(float(tokens.mean()), p50, p95, p99, int(tokens.max()))
