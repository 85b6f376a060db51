"""Whether a model exits at all: how many tokens could leave where, and what that could save on a card.

The input is an exit trace at evenly spaced depths through the model's own head (logit lens). A check is a logistic
regression of agreement with full depth on the exit's confidences, fitted on one half of the texts and judged on the
other. A threshold is the lowest at which, on the fitted half, the tokens that leave change at most an allowed
share of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.prediction import Depths, decode_time_s, fixed_depth
from helios_sim.profile.profile import MemoryBudget, Profile

ALLOWED = (0.01, 0.02, 0.05)  # shares of all tokens that may differ from full depth's
CONTEXT_TOKENS = 1_000  # context of each request in the speed estimates
UTILISATION = 0.9  # share of the card's memory that is used
MOST_REQUESTS = 256  # largest batch
WORTH = 1.05  # least speed-up at which early exit is worthwhile
PULL = 1e-3  # strength of the prior that keeps a check finite if all or no tokens agree

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class AtExit:
    """One exit alone: a token leaves there or runs to the end."""

    depth: int
    unchanged: float  # share of tokens that equal full depth's
    alike: float | None  # correlation of being unchanged here and at the exit before; None at the first
    leave: tuple[float, ...]  # by ALLOWED: share of the judged half that the check lets go
    changed: tuple[float, ...]  # by ALLOWED: share of the judged half that this changes


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed-ups of decoding over full depth throughout, per token."""

    batch: int
    at_most: float  # every token leaves at the first exit that is right, found by a free oracle
    checked: tuple[float, ...]  # by ALLOWED: with the check, at the best single exit or at all exits
    at: tuple[int | None, ...]  # by ALLOWED: the depth of the single exit; None: all exits


@dataclass(frozen=True, slots=True)
class Potential:
    """The answer for one model and card."""

    tokens: int
    exits: tuple[AtExit, ...]  # below full depth
    layers: int
    mean_layers: tuple[float, ...]  # by ALLOWED: mean layers run per token with all exits together
    changed: tuple[float, ...]  # by ALLOWED: share of the judged half that all exits together change
    card: str
    speeds: tuple[Speed, ...]  # at batch 1 and with as many requests as fit

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "allowed": list(ALLOWED), "context_tokens": CONTEXT_TOKENS}


def potential(trace: ExitTrace, profile: Profile) -> Potential:
    """The potential of the traced model, with the profile's costs.

    Raises UserError if the trace has a single token, or no exit below full depth.
    """
    fitted = halves(trace)
    if len(trace.exits) < 2 or not fitted.any() or fitted.all():
        allowed = "at least two tokens and one exit below full depth"
        raise UserError("trace_tokens", trace.n_tokens, allowed, "trace more text, or name exits by model.exits")
    agree = trace.agree[:, :-1]
    scores = np.column_stack([_check(_seen(trace, e), agree[:, e], fitted) for e in range(agree.shape[1])])
    exits = []
    for e in range(agree.shape[1]):
        let = [scores[:, e] >= threshold(scores[fitted, e], agree[fitted, e], most) for most in ALLOWED]
        judged = [go[~fitted] for go in let]
        exits.append(
            AtExit(
                depth=trace.exits[e],
                unchanged=float(agree[:, e].mean()),
                alike=None if e == 0 else alike(agree[:, e - 1], agree[:, e]),
                leave=tuple(float(go.mean()) for go in judged),
                changed=tuple(float((go & ~agree[~fitted, e]).mean()) for go in judged),
            )
        )
    where, changed = zip(*(_together(trace, scores, agree, fitted, most) for most in ALLOWED), strict=True)
    first_right = np.where(agree.any(axis=1), agree.argmax(axis=1), agree.shape[1])
    return Potential(
        tokens=trace.n_tokens,
        exits=tuple(exits),
        layers=trace.n_layers,
        mean_layers=tuple(float(np.asarray(trace.exits)[it].mean()) for it in where),
        changed=changed,
        card=profile.hardware.name,
        speeds=tuple(_speed(trace.exits, profile, n, first_right, exits, where) for n in (1, full_queue(profile))),
    )


def halves(trace: ExitTrace) -> NDArray[np.bool_]:
    """A mask (T,) of every other text, in reading order. Tokens of one text are alike, so they stay together.

    A single text is cut in the middle.
    """
    texts, number = np.unique(trace.prompt, return_inverse=True)
    if len(texts) == 1:
        return np.arange(trace.n_tokens) < trace.n_tokens // 2
    return np.asarray(number % 2 == 0)


def threshold(scores: Floats, agree: NDArray[np.bool_], most_changed: float) -> float:
    """The lowest score from which tokens may leave, so that at most this share of all tokens changes."""
    order = np.argsort(-scores, kind="stable")
    changed = np.cumsum(~agree[order]) / len(scores)
    within = np.flatnonzero(changed <= most_changed)
    # Tokens with the same score leave together.
    while len(within) and within[-1] + 1 < len(order) and scores[order[within[-1] + 1]] == scores[order[within[-1]]]:
        within = within[scores[order[within]] > scores[order[within[-1]]]]
    return float(scores[order[within[-1]]]) if len(within) else np.inf


def alike(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float | None:
    """The correlation, from -1 to 1, of tokens being unchanged at two exits; None if all or none are at one of them."""
    if a.all() or b.all() or not a.any() or not b.any():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _seen(trace: ExitTrace, e: int) -> Floats:
    """The confidences (T, K) of an exit, on an unbounded scale."""
    columns = []
    for confidence, values in trace.confidences.items():
        if confidence is not Confidence.CLASSIFIER:
            p = np.clip(values[:, e].astype(np.float64), 1e-4, 1 - 1e-4)
            columns.append(np.log(p / (1 - p)))
    if not columns:
        raise UserError("model.exits", list(trace.exits), "a trace with recorded confidences", "trace the model anew")
    return np.column_stack(columns)


def _check(seen: Floats, agree: NDArray[np.bool_], fitted: NDArray[np.bool_]) -> Floats:
    """The fitted probability of agreement (T,), by logistic regression with Newton's method on standardized columns."""
    spread = seen[fitted].std(axis=0)
    x = (seen - seen[fitted].mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    x = np.column_stack([x, np.ones(len(x))])
    on, right = x[fitted], agree[fitted].astype(np.float64)
    weights = np.zeros(x.shape[1])
    pull = PULL * len(on) * np.eye(len(weights))
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(on @ weights, -30, 30)))
        step = np.linalg.solve(
            (on * (p * (1 - p))[:, None]).T @ on + pull + 1e-9 * np.eye(len(weights)),
            on.T @ (p - right) + pull @ weights,
        )
        weights = weights - np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return np.asarray(1 / (1 + np.exp(-np.clip(x @ weights, -30, 30))))


def _together(
    trace: ExitTrace, scores: Floats, agree: NDArray[np.bool_], fitted: NDArray[np.bool_], most: float
) -> tuple[NDArray[np.int64], float]:
    """The exits (J,) where tokens of the judged half leave with one threshold for all exits, and the share changed."""
    last = agree.shape[1]

    def leaves(rows: NDArray[np.bool_], at: float) -> tuple[NDArray[np.int64], float]:
        sure = scores[rows] >= at
        where = np.where(sure.any(axis=1), sure.argmax(axis=1), last)
        right = np.column_stack([agree[rows], np.ones(int(rows.sum()), bool)])
        return where, float(1 - right[np.arange(len(where)), where].mean())

    tried = np.unique(np.quantile(scores[fitted], np.linspace(0, 1, 401)))
    for at in tried:  # the lowest that keeps what is allowed
        if leaves(fitted, float(at))[1] <= most:
            return leaves(~fitted, float(at))
    return leaves(~fitted, np.inf)


def full_queue(profile: Profile) -> int:
    """The number of requests of `CONTEXT_TOKENS` that fit on the card. Raises UserError if not even one does."""
    memory = MemoryBudget(profile.hardware.hbm_bytes, UTILISATION)
    layers = profile.model.n_layers
    blocks = memory.pool_blocks([(profile, layers)], (profile, layers))
    fit = blocks // -(-CONTEXT_TOKENS // memory.block_tokens)
    if fit < 1:
        allowed = f"a card with room for {profile.model.name} and a request of {CONTEXT_TOKENS:,} tokens"
        raise UserError("card", profile.hardware.name, allowed, "name a larger one, or several: card=2xh100-80gb")
    return min(fit, MOST_REQUESTS)


def _speed(
    exits: Sequence[int],
    profile: Profile,
    batch: int,
    first_right: NDArray[np.int64],
    alone: Sequence[AtExit],
    together: Sequence[NDArray[np.int64]],
) -> Speed:
    def time_s(depths: Depths) -> float:
        return float(decode_time_s(profile, depths, np.array([batch], np.int64), float(CONTEXT_TOKENS))[0])

    whole_s, last = time_s(fixed_depth(profile.model.n_layers)), exits[-1]
    checked: list[float] = []
    at: list[int | None] = []
    for k, where in enumerate(together):
        ways: dict[int | None, Depths] = {it.depth: _checked((it.depth, last), (1.0, 1 - it.leave[k])) for it in alone}
        ways[None] = _checked(tuple(exits), _reach(where, len(exits)))
        took_s = {way: time_s(depths) for way, depths in ways.items()}
        at.append(min(took_s, key=lambda way: took_s[way]))
        checked.append(whole_s / took_s[at[-1]])
    bound = time_s(Depths(tuple(exits), _reach(first_right, len(exits))))
    return Speed(batch=batch, at_most=whole_s / bound, checked=tuple(checked), at=tuple(at))


def _checked(bounds: tuple[int, ...], reach: tuple[float, ...]) -> Depths:
    """Depths with a check through the head at every exit below the last, and K and V of leaving tokens propagated."""
    return Depths(bounds, reach, checked=Confidence.MAX_PROBABILITY, propagated=True)


def _reach(where: NDArray[np.int64], exits: int) -> tuple[float, ...]:
    """The share of tokens that runs each band of layers, from where tokens leave."""
    share = np.bincount(where, minlength=exits) / len(where)
    left = np.concatenate([[0.0], np.cumsum(share)[:-1]])
    return tuple(np.clip(1.0 - left, 0.0, 1.0).tolist())


def sentences(found: Potential, name: str) -> list[str]:
    """The verdict in words, from the figures alone."""
    one, full = found.speeds
    at = ALLOWED.index(0.02)
    best = max(found.exits, key=lambda it: it.leave[at] * (found.layers - it.depth))
    told = [
        f"After layer {best.depth} of {found.layers}, {best.leave[at]:.0%} of the tokens can leave if "
        f"{ALLOWED[at]:.0%} of all may change ({best.changed[at]:.1%} did, on text that the check was not fitted to)."
    ]
    bound = f"An exit that always knew would make decodes at most {one.at_most:.2f} times as fast at batch 1 and "
    bound += f"{full.at_most:.2f} at batch {full.batch} on {found.card}"
    real = f"with the check at its best exit they are {one.checked[at]:.2f} and {full.checked[at]:.2f} times as fast"
    told.append(f"{bound}; {real}.")
    if max(one.at_most, full.at_most) < WORTH:
        told.append(f"{name} does not exit: not even perfect exits save anything that matters.")
    elif max(one.checked[at], full.checked[at]) < WORTH:
        told.append(f"As it is, {name} hardly exits; trained exits may change that (+task=adapters).")
    elif full.checked[at] < WORTH:
        told.append(f"{name} exits where one request is served at a time, and not where many are.")
    else:
        told.append(f"{name} exits: +task=traces records what a study needs.")
    return told
