"""What each task's requests got under an arm: a drifting mix hides in totals what it does to each task.

Knows records and task numbers, not what the tasks are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.records import Records
from helios_sim.request import NS_PER_S


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """Of the completed requests of one task, all replicates together."""

    requests: int
    bits_per_char: float | None
    layers_per_token: float
    early_exit_fraction: float
    agreement: float
    e2e_s_mean: float
    models: dict[str, float]  # share of the requests that each model finished


def by_task(replicates: Sequence[Records], tasks: Sequence[str]) -> dict[str, TaskFigures]:
    """By task name, in the order of `tasks`; those without a completed request are left out."""
    found = {}
    for number, name in enumerate(tasks):
        chosen = [(records, records.completed & (records.task == number)) for records in replicates]
        requests = sum(int(rows.sum()) for _, rows in chosen)
        if not requests:
            continue
        bits = [(records.bits_per_char(rows), int(records.output_chars[rows].sum())) for records, rows in chosen]
        tokens = _sum(chosen, "output_tokens")
        served: Counter[str | None] = Counter()
        for records, rows in chosen:
            served.update(records.model.counts(rows))
        waited_ns = sum(int((r.last_token_ns.values - r.arrival_ns)[rows].sum()) for r, rows in chosen)
        found[name] = TaskFigures(
            requests=requests,
            bits_per_char=_weighted(bits),
            layers_per_token=_sum(chosen, "layers_run") / tokens,
            early_exit_fraction=_sum(chosen, "early_tokens") / tokens,
            agreement=_sum(chosen, "agreed_tokens") / tokens,
            e2e_s_mean=waited_ns / NS_PER_S / requests,
            models={str(model): served[model] / requests for model in sorted(served, key=str)},
        )
    return found


def _sum(chosen: Sequence[tuple[Records, NDArray[np.bool_]]], column: str) -> int:
    return sum(int(getattr(records, column)[rows].sum()) for records, rows in chosen)


def _weighted(bits: Sequence[tuple[float | None, int]]) -> float | None:
    """Bits per character over all replicates; None where one that served the task does not know them."""
    known = [(value, chars) for value, chars in bits if chars]
    total = sum(chars for _, chars in known)
    if not total or any(value is None for value, _ in known):
        return None
    return sum(value * chars for value, chars in known if value is not None) / total
