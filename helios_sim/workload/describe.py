"""States what a workload asks for, in figures. Knows requests, not how they were served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.request import NS_PER_S, RequestBlock
from helios_sim.workload.ranges import require_positive


@dataclass(frozen=True, slots=True)
class LengthFigures:
    """Percentiles interpolate linearly between neighbouring values (NumPy's default)."""

    mean: float
    p50: float
    p95: float
    p99: float
    largest: int


@dataclass(frozen=True, slots=True)
class WorkloadFigures:
    requests: int
    prompt_tokens: LengthFigures
    output_tokens: LengthFigures
    task_shares: dict[str, float]  # of all requests, by task
    arrival_span_s: float  # first to last arrival; 0 in a closed loop or with all requests at once
    arrival_rate_per_s: float | None  # gaps over their sum; None where the span is 0
    arrival_cv: float | None  # standard deviation of the gaps over their mean; None where the span is 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(blocks: Iterable[RequestBlock], tasks: tuple[str, ...], chars_per_token: float) -> WorkloadFigures:
    """Figures of the requests in these blocks, in tokens of a tokenizer with that many characters per token.

    `tasks` are the mix's names. Holds about 24 bytes a request. Raises UserError where there is no request.
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
    tokens = np.maximum(1, np.rint(chars / chars_per_token))  # as ModelSpec.tokens does for one request
    p50, p95, p99 = np.percentile(tokens, (50, 95, 99)).tolist()
    return LengthFigures(float(tokens.mean()), p50, p95, p99, int(tokens.max()))
