"""What a rule makes of a recorded trace: where each token leaves, and whether that changes it. Knows no time.

Under a cap the recorded values are exact for the same text: layers up to the cap never see deeper layers' KV. Two
things are left out. After a changed token the real text goes on differently, here it does not. And per-token exits
with propagated KV change what deeper layers read, which a trace cannot show.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.rule import Clairvoyant, ExitRule, FixedCap, FullDepth, PerToken
from helios_sim.exits.trace import ExitTrace


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """T tokens of a trace under one rule with the model loaded up to `layers`; E' exits lie within those.

    A batch that leaves together (lazy) leaves at the largest `exit_index` of its tokens, and `agree` at that exit
    says what becomes of each.
    """

    exits: tuple[int, ...]  # depths of the E' exits loaded; the last is `layers`
    layers: int
    exit_index: NDArray[np.int8]  # (T,) where each token leaves when it leaves alone
    breach: NDArray[np.bool_]  # (T,) left at the cap without confidence
    agree: NDArray[np.bool_]  # (T, E') equal to full depth if it left there
    agreed: NDArray[np.bool_]  # (T,) the same at its own exit


_replays: WeakKeyDictionary[ExitTrace, dict[tuple[ExitRule, int], Replay]] = WeakKeyDictionary()


def replay(trace: ExitTrace, rule: ExitRule, layers: int) -> Replay:
    """The trace under `rule` with `layers` loaded; remembered as long as the trace lives.

    FullDepth: every token runs all loaded layers, and without a check there is no breach. FixedCap: the same, and
    a token that is not confident there is a breach unless the whole model is loaded. PerToken: the first exit at
    which the token is confident, else the last one loaded, which is a breach unless it is the whole model.
    Clairvoyant: the first exit that gives the full-depth prediction, else the last one loaded; never a breach.

    UserError when `layers` is not an exit, or the trace cannot answer the rule's threshold or measure.
    """
    if layers not in trace.exits:
        raise UserError(
            "layers",
            layers,
            f"{trace.model} has no exit at layer {layers}; exits: {', '.join(map(str, trace.exits))}",
            "load the model up to one of these",
        )
    memory = _replays.setdefault(trace, {})
    if (rule, layers) not in memory:
        memory[rule, layers] = _replay(trace, rule, layers)
    return memory[rule, layers]


def _replay(trace: ExitTrace, rule: ExitRule, layers: int) -> Replay:
    exits = trace.exits[: trace.exits.index(layers) + 1]
    last = len(exits) - 1
    whole = layers == trace.n_layers
    agree = trace.agree[:, : last + 1]
    exit_index = np.full(trace.n_tokens, last, dtype=np.int8)
    breach: NDArray[np.bool_] = np.zeros(trace.n_tokens, dtype=bool)
    match rule:
        case FullDepth():
            pass
        case FixedCap(threshold, confidence):
            confident = trace.confident_at(threshold, confidence)
            if not whole:
                breach = np.logical_not(confident[:, last])
        case PerToken(threshold, confidence):
            confident = trace.confident_at(threshold, confidence)[:, : last + 1]
            exit_index = first_true(confident, otherwise=last)
            if not whole:
                breach = np.logical_not(confident.any(axis=1))
        case Clairvoyant(disagreement_budget):
            exit_index = _clairvoyant(trace, agree, disagreement_budget)
    agreed = np.take_along_axis(agree, exit_index[:, None].astype(np.intp), axis=1)[:, 0]
    return Replay(exits, layers, exit_index, breach, agree, agreed)


def first_true(flags: NDArray[np.bool_], otherwise: int) -> NDArray[np.int8]:
    """Index of the first true column of each row of (T, E'), or `otherwise` where there is none."""
    return np.where(flags.any(axis=1), flags.argmax(axis=1), otherwise).astype(np.int8)


def _clairvoyant(trace: ExitTrace, agree: NDArray[np.bool_], budget: float) -> NDArray[np.int8]:
    """First agreeing exit, and exit 0 for floor(budget x tokens) tokens of each task, deepest ones first.

    A token that agrees at no loaded exit counts as deepest. Among equals the chosen ones are spread evenly over the
    text, since requests read pieces of it.
    """
    n_exits = agree.shape[1]
    needed = first_true(agree, otherwise=n_exits)  # n_exits: at none
    leaves: NDArray[np.int8] = np.minimum(needed, n_exits - 1).astype(np.int8)
    for first, end in zip(trace.task_first[:-1], trace.task_first[1:], strict=True):
        left = int(np.floor(budget * (end - first) + 1e-9))  # 0.07 x 100 is 7
        for depth in range(n_exits, 0, -1):
            candidates = first + np.flatnonzero(needed[first:end] == depth)
            take = min(left, len(candidates))
            leaves[candidates[np.arange(take) * len(candidates) // max(take, 1)]] = 0
            left -= take
    return leaves
