"""Thresholds and caps with a promise: at most a share epsilon of the tokens changes, with probability 1 - delta.

The method is Learn then Test (Angelopoulos et al., arXiv 2110.01052, as used by CALM, arXiv 2207.07061): some prompts
are set apart for calibration, and settings are tested on them from the safest on, until one fails. The promise holds
for prompts like these. Requests are answers to the other prompts, so that a run shows the risk on prompts that had no
part in choosing the settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.replay import first_true
from helios_sim.exits.rule import MOST_THRESHOLD, Confidence
from helios_sim.exits.trace import ANY_TASK, ExitTrace

NO_TOKEN = MOST_THRESHOLD  # a threshold that no confidence reaches, so that no token leaves
_STAKES = (0.95, 0.75, 0.5, 0.25)  # shares of the largest stake at which a capital cannot turn negative
# Tested from the safest on. Small models are very sure of most tokens, so the first steps are fine-grained.
THRESHOLDS = (1.0, 0.9999, 0.9995, 0.999, 0.998, 0.995, *(hundredths / 100 for hundredths in range(99, -1, -1)))


@dataclass(frozen=True, slots=True)
class Promise:
    """A promise: at most `max_disagreement` of the tokens differ from full depth, with probability 1 - `failure`."""

    max_disagreement: float
    failure: float


@dataclass(frozen=True, slots=True)
class Certified:
    """The boldest settings of one model that keep a promise. The promise holds for all of them together."""

    threshold: float  # a token leaves at the first exit that reaches it; NO_TOKEN if no tested threshold passed
    caps: tuple[bool, ...]  # (E,) whether the model may be cut at the exit; true at the last, which changes nothing
    prompts: int  # number of prompts in the test


def split(trace: ExitTrace, share: float, seed: int) -> tuple[ExitTrace, ExitTrace]:
    """Splits a trace into a share of each task's prompts, for calibration, and the others, to serve.

    Traces of the same texts are split alike. UserError if a task has a single prompt.
    """
    apart = np.zeros(trace.n_tokens, np.bool_)
    for k, (first, end) in enumerate(zip(trace.task_first[:-1], trace.task_first[1:], strict=True)):
        prompts = np.unique(trace.prompt[first:end])
        if len(prompts) < 2:
            allowed = f"at least 2 prompts of each task: {trace.model} has one of {trace.tasks[k]}"
            raise UserError("exits.guarantee", trace.provenance.source, allowed, "take a trace of more prompts")
        n = min(max(round(share * len(prompts)), 1), len(prompts) - 1)
        chosen = np.random.default_rng((seed, k)).permutation(prompts)[:n]
        apart[first:end] = np.isin(trace.prompt[first:end], chosen)
    return _part(trace, apart), _part(trace, ~apart)


def _part(trace: ExitTrace, rows: NDArray[np.bool_]) -> ExitTrace:
    def cut(column: NDArray | None) -> NDArray | None:  # type: ignore[type-arg]
        return None if column is None else column[rows]

    return replace(
        trace, task=trace.task[rows], prompt=trace.prompt[rows], chars=trace.chars[rows], agree=trace.agree[rows],
        confidences={c: values[rows] for c, values in trace.confidences.items()}, confident=cut(trace.confident),
        bits=cut(trace.bits), drafters={name: drafted[rows] for name, drafted in trace.drafters.items()},
        drafters_sure={name: sure[rows] for name, sure in trace.drafters_sure.items()},
    )  # fmt: skip


def certify(
    trace: ExitTrace, confidence: Confidence, promise: Promise, mixes: Sequence[Mapping[str, float]]
) -> Certified:
    """Tests on the prompts of this trace which settings keep the promise for each of the mixes of tasks.

    Thresholds and caps are two families, each tested in a fixed order; each may fail with half of the probability. A
    published trace is tested at its only threshold. UserError for a task of a mix that the trace does not have.
    """
    prompts, starts, tokens = _prompts(trace)
    weights = [_weights(trace, mix, starts) for mix in mixes]

    def keeps(changed: NDArray[np.bool_]) -> bool:
        losses = np.bincount(prompts, changed, len(tokens)) / tokens
        found = (p_value(losses[w > 0], w[w > 0], promise.max_disagreement) for w in weights)
        return max(found) <= promise.failure / 2

    last = len(trace.exits) - 1
    caps = [True] * (last + 1)
    for e in range(last - 1, -1, -1):  # deeper ones first
        caps[e] = caps[e + 1] and keeps(~trace.agree[:, e])
    threshold = NO_TOKEN
    for asked in THRESHOLDS if trace.published_threshold is None else (trace.published_threshold,):
        leaves = first_true(trace.confident_at(asked, confidence), otherwise=last).astype(np.intp)
        if not keeps(~np.take_along_axis(trace.agree, leaves[:, None], axis=1)[:, 0]):
            break
        threshold = asked
    return Certified(threshold, tuple(caps), min(int((w > 0).sum()) for w in weights))


def _prompts(trace: ExitTrace) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.int64]]:
    """Each token's prompt (T,), each prompt's first token (P,), and its number of tokens (P,)."""
    _, starts, prompts, tokens = np.unique(trace.prompt, return_index=True, return_inverse=True, return_counts=True)
    return prompts, starts, tokens


def _weights(trace: ExitTrace, mix: Mapping[str, float], starts: NDArray[np.intp]) -> NDArray[np.float64]:
    """Weights (P,) of the prompts, so that their weighted mean is that of the mix.

    The weight of a prompt is its task's share in the mix over the task's share of the prompts. UserError for a task
    that the trace does not have.
    """
    trace.bind(tuple(mix))
    if trace.tasks == (ANY_TASK,) or not mix:
        return np.ones(len(starts))
    task = trace.task[starts]
    wanted = np.array([mix.get(name, 0.0) for name in trace.tasks], np.float64)
    there = np.bincount(task, minlength=len(trace.tasks)) * (wanted > 0)
    return np.asarray((wanted / wanted.sum() / (there / there.sum()).clip(1e-12))[task])


def p_value(losses: NDArray[np.float64], weights: NDArray[np.float64], limit: float) -> float:
    """An upper bound on the probability of losses this small if their weighted mean is above `limit`.

    Losses (P,) lie from 0 to 1. Prompts are the draws, not tokens, since tokens of one text are alike. The bound comes
    from bets against the risk (Waudby-Smith and Ramdas, arXiv 2010.09686). With x = w loss / max w and
    m = limit / max w, the capital prod(1 + b (m - x)) has an expectation of at most 1 if the mean of x is above m. This
    holds for independent x with different distributions, as under several tasks (by the inequality of the means), and
    for a mixture of stakes b. By Markov's inequality 1 / capital is the bound. If losses hardly spread, it is far below
    Hoeffding's bound, which ignores the spread; without any loss it is near the exact (1 - limit)^P.
    """
    most = float(weights.max())
    at, x = limit / most, weights * losses / most
    if at >= 1.0:
        return 0.0
    capital = [float(np.prod(1.0 + share / (1.0 - at) * (at - x))) for share in _STAKES]
    mean = sum(capital) / len(_STAKES)
    return min(1.0, 1.0 / mean) if mean > 0 else 1.0
