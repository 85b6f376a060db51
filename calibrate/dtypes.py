"""Which number format a device runs a model fastest in, by batch. Knows no accuracy: a choice needs both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrate.device import Device, Step
from calibrate.points import figure
from calibrate.subject import Limits, Subject

if TYPE_CHECKING:
    from helios_sim.live.model.decoder import SegmentedModel

DTYPES = ("float32", "bfloat16")
REPEATS = 5


@dataclass(frozen=True, slots=True)
class DtypeTimes:
    """`time_s[dtype]` holds the median of a whole iteration for each of `iterations`."""

    iterations: tuple[str, ...]
    time_s: Mapping[str, tuple[float, ...]]

    @property
    def fastest(self) -> str:
        """By the geometric mean over the iterations."""
        return min(self.time_s, key=lambda dtype: float(np.mean(np.log(self.time_s[dtype]))))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fastest": self.fastest}


def compare_dtypes(
    load: Callable[[str], SegmentedModel], device: Device, limits: Limits, dtypes: Sequence[str] = DTYPES
) -> DtypeTimes:
    """Decodes of small, middling and the largest batch, and a prompt; dtypes take turns. `load` gives the model."""
    import torch

    batches = limits.few_batches
    kv_tokens = max(1, limits.max_kv_tokens // 4)
    names = (*(f"decode, batch {b}, {kv_tokens} KV tokens" for b in batches), f"prompt, {limits.max_chunk} tokens")
    taken: dict[str, list[list[float]]] = {dtype: [[] for _ in names] for dtype in dtypes}
    small = replace(limits, max_kv_tokens=kv_tokens)
    with torch.no_grad():
        runs = {dtype: _runs(Subject(load(dtype), device, small), batches, kv_tokens) for dtype in dtypes}
        for repeat in range(REPEATS + 1):
            for i in range(len(names)):
                for dtype in dtypes:
                    time_s = sum(device.laps_s(runs[dtype][i]))
                    if repeat:  # the first one warms up
                        taken[dtype][i].append(time_s)
    medians = {dtype: tuple(figure(times).median_s for times in of) for dtype, of in taken.items()}
    return DtypeTimes(names, medians)


def _runs(subject: Subject, batches: Sequence[int], kv_tokens: int) -> list[list[Step]]:
    """Embedding, all layers and head of each iteration."""
    steps = [subject.decode_step([kv_tokens] * batch) for batch in batches]
    rows = [*batches, subject.limits.max_chunk]
    attends = [*steps, subject.prompt_step(subject.limits.max_chunk, 0)]
    return [
        _run(subject, n, attend, min(n, subject.limits.max_head_rows)) for n, attend in zip(rows, attends, strict=True)
    ]


def _run(subject: Subject, rows: int, attend: Any, sampled: int) -> list[Step]:
    model, ids, hidden = subject.model, subject.tokens(rows), subject.hidden(rows)
    steps: list[Step] = [
        lambda: model.embed(ids, attend.positions),
        lambda: model.run(hidden, 0, subject.n_layers, attend),
        lambda: subject.sampled(hidden[-sampled:]),
    ]
    return [subject.device.prepare(step) for step in steps]
