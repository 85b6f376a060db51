"""What is known of the requests to come: the operator knows means, the oracle every request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from helios_sim.engine.simulated import ModelData
from helios_sim.exits.trace import MICROBITS
from helios_sim.policy.telemetry import ExpectedLoad
from helios_sim.request import Request
from helios_sim.workload import Workload, generate


class Foresight:
    """The requests to come and the exits of their answers, for the oracle. Generated when it asks."""

    def __init__(self, workload: Workload, seed: int, models: Mapping[str, ModelData]) -> None:
        self._workload, self._seed, self._models = workload, seed, models

    def requests(self) -> Sequence[Request]:
        return [request for block in generate(self._workload, self._seed) for request in block.rows()]

    def agreement(self, model: str, request: Request) -> NDArray[np.bool_]:
        bound = self._models[model].trace
        span = bound.locate(request.task, request.text_start, request.output_chars)
        rows: NDArray[np.bool_] = bound.trace.agree[span.indices()]
        return rows

    def bits(self, model: str, request: Request) -> NDArray[np.float64] | None:
        bound = self._models[model].trace
        if bound.trace.microbits is None:
            return None
        span = bound.locate(request.task, request.text_start, request.output_chars)
        return bound.trace.microbits[span.indices()] / MICROBITS


def expected_load(workload: Workload, seed: int, share: float | Sequence[float] = 1.0) -> ExpectedLoad:
    """What an operator knows beforehand: mean lengths, and the rate or the users.

    `share`: the part of all requests, or of those of each task, that the server in question gets.
    """
    of_task = np.broadcast_to(np.asarray(share, np.float64), len(workload.mix.tasks))
    requests = 0
    ours = prompts = outputs = 0.0
    first_ns = last_ns = 0
    for block in generate(workload, seed):
        if not requests:
            first_ns = int(block.arrival_ns[0])
        weights = of_task[block.task]
        ours += float(weights.sum())
        prompts += float((weights * block.prompt_chars).sum())
        outputs += float((weights * block.output_chars).sum())
        requests += len(block)
        last_ns = int(block.arrival_ns[-1])
    span_s = (last_ns - first_ns) / 1e9
    rate = (requests - 1) / span_s * (ours / requests) if span_s > 0 and workload.users is None else None
    users = None if workload.users is None else max(1, round(workload.users * ours / requests))
    return ExpectedLoad(prompts / ours, outputs / ours, rate, users)
