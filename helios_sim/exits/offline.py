"""What was known about a model's exits before the run: sums over a trace, for policies. Knows no single token."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.replay import first_true
from helios_sim.exits.rule import Confidence
from helios_sim.exits.trace import ANY_TASK, ExitTrace


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class OfflineExits:
    """Shares are of tokens. E exits, the last being the whole model; P prompts, in the order of the text."""

    model: str
    exits: tuple[int, ...]
    confident_share: NDArray[np.float64]  # (E,) confident there, whatever happened before
    exit_share: NDArray[np.float64]  # (E,) leave there first with per-token exits, all layers loaded; sums to 1
    disagreement: NDArray[np.float64]  # (E,) differ from full depth if all left there
    prompt_tokens: NDArray[np.int64]  # (P,)
    prompt_disagreements: NDArray[np.int64]  # (P, E) tokens that differ, for a bootstrap over prompts
    chars_per_token: float
    bits_per_char: NDArray[np.float64] | None  # (E,) on human text only
    confidence: Confidence = Confidence.MAX_PROBABILITY  # by which tokens are confident here


def offline_exits(
    trace: ExitTrace, rule_threshold: float, confidence: Confidence, tasks: Collection[str] | None = None
) -> OfflineExits:
    """Sums over the tokens of `tasks` (None: all of the trace).

    UserError when a task is missing or the trace cannot answer the threshold or measure.
    """
    rows = _rows(trace, tasks)
    confident = trace.confident_at(rule_threshold, confidence)[rows]
    differs = ~trace.agree[rows]
    n_exits = len(trace.exits)
    first = first_true(confident, otherwise=n_exits - 1)
    # Prompts in order of first appearance would need a sort back; ids rise along the text in every trace we write.
    _, prompt, prompt_tokens = np.unique(trace.prompt[rows], return_inverse=True, return_counts=True)
    disagreements = [np.bincount(prompt, differs[:, e], len(prompt_tokens)) for e in range(n_exits)]
    chars = int(trace.chars[rows].sum(dtype=np.int64))
    bits = None
    if trace.bits is not None and trace.human_text:
        bits = trace.bits[rows].sum(axis=0, dtype=np.float64) / chars
    return OfflineExits(
        model=trace.model,
        exits=trace.exits,
        confident_share=confident.mean(axis=0),
        exit_share=np.bincount(first, minlength=n_exits) / len(first),
        disagreement=differs.mean(axis=0),
        prompt_tokens=prompt_tokens.astype(np.int64),
        prompt_disagreements=np.stack(disagreements, axis=1).astype(np.int64),
        chars_per_token=chars / len(first),
        bits_per_char=bits,
        confidence=confidence,
    )


def _rows(trace: ExitTrace, tasks: Collection[str] | None) -> slice | NDArray[np.bool_]:
    if tasks is None or trace.tasks == (ANY_TASK,):
        return slice(None)
    wanted = [name in tasks for name in trace.tasks]
    missing = sorted(set(tasks) - set(trace.tasks))
    if missing or not any(wanted):
        raise UserError(
            "tasks", missing, f"the exit trace of {trace.model} has {', '.join(trace.tasks)}", "name some of these"
        )
    return np.asarray(wanted)[trace.task]
