"""Replay of a recorded trace under a rule: where each token leaves, and whether that changes the token.

This module also sums over a trace, as policies know it before a run, and compares the exits of two models.

Under a cap the recorded values are exact for the same text: layers up to the cap never see deeper layers' KV. Two
effects are left out. After a changed token the real text goes on differently; here it does not. And per-token exits
with propagated KV change the K and V that deeper layers read, which a trace cannot show.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.rule import (
    MOST_LOOKS,
    Clairvoyant,
    Confidence,
    DraftModel,
    ExitRule,
    FixedCap,
    FullDepth,
    PerToken,
    ReleaseEarly,
    SelfSpeculation,
    require_leaving,
)
from helios_sim.exits.trace import ANY_TASK, ExitTrace


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """The T tokens of a trace under one rule, with the model loaded up to `layers`, which include E' exits.

    A batch that leaves together (lazy) leaves at the largest `exit_index` of its tokens; the column of `agree` at that
    exit then tells which tokens change.
    """

    exits: tuple[int, ...]  # depths of the E' exits loaded; the last is `layers`
    layers: int
    exit_index: NDArray[np.int8]  # (T,) the exit at which each token leaves if it leaves alone
    breach: NDArray[np.bool_]  # (T,) whether the token leaves at the cap without confidence
    agree: NDArray[np.bool_]  # (T, E') whether the token, if it left at that exit, would equal full depth's
    agreed: NDArray[np.bool_]  # (T,) `agree` at the token's own exit


_replays: WeakKeyDictionary[ExitTrace, dict[tuple[ExitRule, int], Replay]] = WeakKeyDictionary()


def replay(trace: ExitTrace, rule: ExitRule, layers: int) -> Replay:
    """Replays the trace under `rule` with `layers` loaded; the result is cached as long as the trace lives.

    - FullDepth: every token runs all loaded layers; without a check there is no breach.
    - FixedCap: every token runs all loaded layers; a token that is not confident at the cap is a breach unless the
      whole model is loaded.
    - PerToken: a token leaves at the first exit where it is confident, else at the last one loaded, which is a breach
      unless it is the whole model. With `near` only the exits that check every token count here: which others check
      depends on the request.
    - Clairvoyant: a token leaves at the first exit that gives the full-depth prediction, else at the last one loaded;
      never a breach.
    - ReleaseEarly: a token is delivered at the first ramp where its confidence reaches the ramp's threshold, else at
      the last layer; never a breach.
    - SelfSpeculation, DraftModel: every token is the whole model's. The replay of accepted drafts is exact: a draft
      counts only if all tokens before it are the whole model's, and those are the recorded text.

    UserError if `layers` is not an exit, or the trace cannot answer the rule's threshold or measure.
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
        case SelfSpeculation(exit_layers):
            if not whole:
                raise UserError(
                    "layers", layers, f"self-speculation verifies with all {trace.n_layers} layers of {trace.model}",
                    "load the whole model",
                )  # fmt: skip
            if exit_layers not in exits[:last]:
                raise UserError(
                    "exit_layers", exit_layers,
                    f"{trace.model} has exits before its last layer at {', '.join(map(str, exits[:last])) or 'none'}",
                    "choose one of these",
                )  # fmt: skip
        case DraftModel():
            if not whole:
                allowed = f"drafts are verified with all {trace.n_layers} layers of {trace.model}"
                raise UserError("layers", layers, allowed, "load the whole model")
            trace.drafted_by_all(rule.drafters)
        case ReleaseEarly(ramps, thresholds, confidence):
            require_leaving(confidence)
            if not whole or not set(ramps) <= set(exits[:last]) or len(ramps) != len(thresholds):
                raise UserError(
                    "ramps", ramps, f"with all {trace.n_layers} layers of {trace.model}, exits before the last: "
                    f"{', '.join(map(str, exits[:last])) or 'none'}, each with a threshold", "choose among these",
                )  # fmt: skip
            sure = np.zeros((trace.n_tokens, last + 1), np.bool_)
            for ramp, threshold in zip(ramps, thresholds, strict=True):
                sure[:, exits.index(ramp)] = trace.recorded(confidence)[:, exits.index(ramp)] >= np.float32(threshold)
            exit_index = first_true(sure, otherwise=last)
        case FixedCap(threshold, confidence):
            require_leaving(confidence)
            confident = trace.confident_at(threshold, confidence)
            if not whole:
                breach = np.logical_not(confident[:, last])
        case PerToken(threshold, confidence):
            if not set(rule.checkpoints or ()) <= set(trace.exits[:-1]):
                known = ", ".join(map(str, trace.exits[:-1])) or "none"
                allowed = f"{trace.model} has exits before its last layer at {known}"
                raise UserError("checkpoints", list(rule.checkpoints or ()), allowed, "choose among these")
            if rule.looks and len(trace.exits) > MOST_LOOKS:
                allowed = f"at most {MOST_LOOKS} exits where each token is looked at alone"
                raise UserError("exits", len(trace.exits), allowed, "take a trace with fewer exits")
            checked = [rule.checks_at(depth) for depth in exits[:-1]]
            confident = trace.confident_at(threshold, confidence)[:, : last + 1] & [*checked, True]
            exit_index = first_true(confident, otherwise=last)
            if not whole:
                breach = np.logical_not(confident.any(axis=1))
        case Clairvoyant(disagreement_budget):
            exit_index = _clairvoyant(trace, agree, disagreement_budget)
    agreed = np.take_along_axis(agree, exit_index[:, None].astype(np.intp), axis=1)[:, 0]
    return Replay(exits, layers, exit_index, breach, agree, agreed)


def first_true(flags: NDArray[np.bool_], otherwise: int) -> NDArray[np.int8]:
    """Index of the first true column in each row of (T, E'), or `otherwise` if there is none."""
    return np.where(flags.any(axis=1), flags.argmax(axis=1), otherwise).astype(np.int8)


def _clairvoyant(trace: ExitTrace, agree: NDArray[np.bool_], budget: float) -> NDArray[np.int8]:
    """The first agreeing exit of each token, but exit 0 for floor(budget x tokens) tokens of each task.

    The budget goes first to the tokens that agree deepest; a token that agrees at no loaded exit counts as deepest.
    Among equals the chosen tokens are spread evenly over the text, since requests read pieces of it.
    """
    n_exits = agree.shape[1]
    needed = first_true(agree, otherwise=n_exits)  # n_exits if it agrees at none
    leaves: NDArray[np.int8] = np.minimum(needed, n_exits - 1).astype(np.int8)
    for first, end in zip(trace.task_first[:-1], trace.task_first[1:], strict=True):
        left = int(np.floor(budget * (end - first) + 1e-9))  # 0.07 x 100 is 7
        for depth in range(n_exits, 0, -1):
            candidates = first + np.flatnonzero(needed[first:end] == depth)
            take = min(left, len(candidates))
            leaves[candidates[np.arange(take) * len(candidates) // max(take, 1)]] = 0
            left -= take
    return leaves


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class OfflineExits:
    """Sums over a trace, known before the run: shares of tokens at E exits (the last is full depth), over P prompts."""

    model: str
    exits: tuple[int, ...]
    confident_share: NDArray[np.float64]  # (E,) share of tokens confident there, whether or not at earlier exits
    exit_share: NDArray[np.float64]  # (E,) share that leave there with per-token exits, all layers loaded; sums to 1
    disagreement: NDArray[np.float64]  # (E,) share that would differ from full depth if all left there
    prompt_tokens: NDArray[np.int64]  # (P,)
    prompt_disagreements: NDArray[np.int64]  # (P, E) tokens that differ, for bounds over prompts
    chars_per_token: float
    bits_per_char: NDArray[np.float64] | None  # (E,) on human text only
    confidence: Confidence = Confidence.MAX_PROBABILITY  # the measure behind the shares of confident tokens
    certified_caps: tuple[bool, ...] | None = None  # (E,) caps that keep a promise; None if nothing was promised


def offline_exits(
    trace: ExitTrace, rule_threshold: float, confidence: Confidence, tasks: Collection[str] | None = None
) -> OfflineExits:
    """Sums over the tokens of `tasks`, or over the whole trace if `tasks` is None.

    UserError if a task is missing or the trace cannot answer the threshold or measure.
    """
    rows = _rows(trace, tasks)
    confident = trace.confident_at(rule_threshold, confidence)[rows]
    differs = ~trace.agree[rows]
    n_exits = len(trace.exits)
    first = first_true(confident, otherwise=n_exits - 1)
    # Prompts come out sorted by id, not by first appearance: in every trace we write, ids rise along the text.
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
            "tasks", missing, f"the exit trace of {trace.model} has {', '.join(trace.tasks)}",
            "choose a workload of such texts, or name some of these in workload.mix.tasks",
        )
    return np.asarray(wanted)[trace.task]


@dataclass(frozen=True, slots=True, eq=False)
class JointExits:
    """Joint distribution of the exits of two models on the same text, lined up by characters."""

    models: tuple[str, str]
    exits: tuple[tuple[int, ...], tuple[int, ...]]
    share: NDArray[np.float64]  # (E of the first, E of the second) share of the characters; sums to 1

    @property
    def early_in_either(self) -> float:
        """Share of the text that leaves at the first exit of at least one of the two models."""
        return float(1 - self.share[1:, 1:].sum())

    @property
    def late_helped(self) -> float | None:
        """Share of the text past the first model's first exit that leaves at the second's first exit; None if none is
        past it."""
        late = self.share[1:]
        return float(late[:, 0].sum() / late.sum()) if late.sum() else None


def joint_exits(first: ExitTrace, first_rule: ExitRule, second: ExitTrace, second_rule: ExitRule) -> JointExits:
    """Joint exits of two models, both loaded completely, over the characters of the same texts.

    UserError unless the traces cover the same texts: the same tasks, each with the same number of characters.
    """
    if first.tasks != second.tasks or not np.array_equal(first.task_chars(), second.task_chars()):
        texts = [dict(zip(t.tasks, t.task_chars().tolist(), strict=True)) for t in (first, second)]
        raise UserError(
            "exits",
            f"{first.model} with {second.model}",
            f"both cover the same texts; characters by task: {texts[0]} and {texts[1]}",
            "take traces of the same prompts",
        )
    ends = [t.char_start[1:] for t in (first, second)]
    cuts = np.union1d(*ends)  # between two neighbouring cuts lies one token of each model
    chars = np.diff(cuts, prepend=0)
    rows, columns = (
        replay(trace, rule, trace.n_layers).exit_index[np.searchsorted(end, cuts)]
        for trace, rule, end in zip((first, second), (first_rule, second_rule), ends, strict=True)
    )
    share = np.zeros((len(first.exits), len(second.exits)))
    np.add.at(share, (rows, columns), chars)
    return JointExits((first.model, second.model), (first.exits, second.exits), share / chars.sum())
