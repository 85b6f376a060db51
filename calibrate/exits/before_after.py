"""The effect of training a model for early exit: how often exits agree with full depth, bits per character, and how
many layers tokens run if a given share of them may change.

"Before" is the frozen model with exits attached, trained on the same tokens; "after" is the trained model. Both are
traced on the same held-out text. Intervals come from leaving out one of ten groups of passages in turn
(`helios_sim.report.intervals`); a difference compares the same passages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrate.exits.potential import halves
from calibrate.exits.reliability import at_agreement, fit_logistic, risk_scale
from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence
from helios_sim.exits.trace import ExitTrace
from helios_sim.report.intervals import bounds, left_out

AGREEMENTS = (0.95, 0.98)  # shares of tokens that must stay what full depth gives
CONFIDENCES = (Confidence.CLASSIFIER, Confidence.MAX_PROBABILITY)
GROUPS = 10  # of passages
BEFORE, AFTER = "before", "after"
CHANGE = "change"  # folder in the stage with the change of the weights
HEADS = {BEFORE: "scratch/heads-before", AFTER: "heads"}  # folders in the stage; scratch is not archived
TRACES = {BEFORE: "trace-before", AFTER: "trace"}

Figure = list[float | None]  # a value, and the two ends of its interval
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """A figure as a quotient of sums by group: (..., GROUPS) each."""

    above: Floats
    below: Floats

    def figure(self, share: bool = False) -> Figure:
        whole, without = self._left_out()
        low, high = bounds(whole, without, share=share)
        return [_number(whole), _number(low), _number(high)]

    def less(self, other: Sums) -> Figure:
        """This figure minus the other one, with an interval from leaving the same group out of both in turn."""
        (ours, our_without), (theirs, their_without) = self._left_out(), other._left_out()
        low, high = _signed(ours - theirs, our_without - their_without)
        return [_number(ours - theirs), low, high]

    def _left_out(self) -> tuple[Floats, Floats]:
        (above, above_without), (below, below_without) = left_out(self.above), left_out(self.below)
        with np.errstate(divide="ignore", invalid="ignore"):
            return above / below, above_without / below_without


def _signed(whole: Floats, without: Floats) -> tuple[float | None, float | None]:
    """Bounds of a difference by Student's t, whatever the sign of the difference.

    `bounds` uses Student's t directly only below zero, so values are shifted below zero, and bounds shifted back.
    """
    shift = 1.0 + 2 * max(float(np.abs(whole).max()), float(np.abs(without).max()))
    low, high = bounds(whole - shift, without - shift)
    return _number(low + shift), _number(high + shift)


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def compared(before: ExitTrace, after: ExitTrace, kept: NDArray[np.bool_]) -> dict[str, Any]:
    """All figures as JSON values. Raises UserError for traces of different exits or texts.

    `kept` (T, E): whether the trained model gives the frozen model's full-depth token at each exit.
    """
    same = before.exits == after.exits and np.array_equal(before.chars, after.chars)
    if not same or not np.array_equal(before.prompt, after.prompt):
        allowed = "the same exits and passages in both"
        raise UserError("traces", f"{before.exits} and {after.exits}", allowed, "trace both anew")
    group = before.prompt % GROUPS
    tokens, chars = _sums(np.ones(before.n_tokens), group), _sums(before.chars, group)
    sides: dict[str, Any] = {}
    change: dict[str, Any] = {}
    of: dict[str, dict[str, list[Sums]]] = {"agreement": {}, "bits_per_char": {}}
    depths: dict[str, dict[tuple[str, str], Sums]] = {}
    for name, trace in ((BEFORE, before), (AFTER, after)):
        assert trace.bits is not None
        of["agreement"][name] = [Sums(_sums(column, group), tokens) for column in trace.agree.T[:-1]]
        of["bits_per_char"][name] = [Sums(_sums(column, group), chars) for column in trace.bits.T]
        side: dict[str, Any] = {
            "agreement": [it.figure(share=True) for it in of["agreement"][name]],
            "bits_per_char": [it.figure() for it in of["bits_per_char"][name]],
            "at": {},
        }
        depths[name] = {}
        for confidence in CONFIDENCES:
            for least in AGREEMENTS:
                told, layers = _at(trace, confidence, least, group)
                side["at"].setdefault(confidence.value, {})[str(least)] = told
                depths[name][confidence.value, str(least)] = layers
        sides[name] = side
    for what, both in of.items():
        change[what] = [ours.less(theirs) for ours, theirs in zip(both[AFTER], both[BEFORE], strict=True)]
    change["layers_per_token"] = {}
    for by, share_kept in depths[AFTER]:
        gained = depths[AFTER][by, share_kept].less(depths[BEFORE][by, share_kept])
        change["layers_per_token"].setdefault(by, {})[share_kept] = gained
    sides[AFTER]["kept"] = [Sums(_sums(column, group), tokens).figure(share=True) for column in kept.T]
    about = {"tokens": before.n_tokens, "passages": len(np.unique(before.prompt)), "exits": list(before.exits)}
    return {**about, **sides, "change": change}


def _sums(values: NDArray[Any], group: NDArray[Any]) -> Floats:
    return np.asarray(np.bincount(group, weights=values.astype(np.float64), minlength=GROUPS), dtype=np.float64)


def sure_of(trace: ExitTrace, confidence: Confidence, fitted: NDArray[np.bool_]) -> Floats:
    """The calibrated confidence (T, E) of each exit, 1 at full depth. A trained check's is already calibrated.

    Another confidence is calibrated on the tokens `fitted` (T,), exit by exit, and its risk weighted like a check's.
    """
    sure = trace.recorded(confidence).astype(np.float64)
    sure[:, -1] = 1.0
    if confidence is Confidence.CLASSIFIER:
        return sure
    for e, scale in enumerate(risk_scale(trace.exits[:-1], trace.n_layers)):
        p = np.clip(sure[:, e], 1e-6, 1 - 1e-6)
        logit = np.log(p / (1 - p))
        slope, offset = fit_logistic(logit[fitted], trace.agree[fitted, e])
        sure[:, e] = 1 - scale / (1 + np.exp(slope * logit + offset))
    return sure


def _at(trace: ExitTrace, confidence: Confidence, least: float, group: NDArray[Any]) -> tuple[dict[str, Any], Sums]:
    """Figures, and layers per token, at the lowest threshold that keeps a share `least` of tokens unchanged.

    The threshold is chosen on one half of the passages; the figures and the layers are of the other half.
    """
    assert trace.bits is not None
    fitted = halves(trace)
    sure = sure_of(trace, confidence, fitted)
    threshold = at_agreement(sure[fitted], trace.agree[fitted], trace.exits, least, 0.0).threshold
    judged = ~fitted
    leaves = sure[judged, :-1] >= threshold
    last = len(trace.exits) - 1
    index = np.where(leaves.any(1), leaves.argmax(1), last)
    rows, mine = np.arange(len(index)), group[judged]
    tokens = _sums(np.ones(len(index)), mine)
    layers = Sums(_sums(np.asarray(trace.exits)[index], mine), tokens)
    agreed = Sums(_sums(trace.agree[judged][rows, index], mine), tokens)
    bits = Sums(_sums(trace.bits[judged][rows, index], mine), _sums(trace.chars[judged], mine))
    return {
        "threshold": threshold,
        "layers_per_token": layers.figure(),
        "agreement": agreed.figure(share=True),
        "bits_per_char": bits.figure(),
        "left": (np.bincount(index, minlength=last + 1) / len(index)).tolist(),
    }, layers


def verdict(found: Mapping[str, Any]) -> list[str]:
    """Sentences that say what training changed, made from the figures alone."""
    exits, before, after, change = found["exits"], found[BEFORE], found[AFTER], found["change"]
    told = [
        f"Full depth gives the frozen model's token for {share(after['kept'][-1])} of the tokens; its bits per "
        f"character change by {shown(change['bits_per_char'][-1], '+.3f')}.",
    ]
    told += [
        f"After layer {exits[e]} of {exits[-1]} it agrees with its full depth on {share(after['agreement'][e])} of the "
        f"tokens, attached exits on {share(before['agreement'][e])}: {points(change['agreement'][e])}."
        for e in sorted({0, len(exits) - 2})
    ]
    least, by = str(AGREEMENTS[0]), CONFIDENCES[0].value
    gain = change["layers_per_token"][by][least]
    ours, theirs = (side["at"][by][least]["layers_per_token"] for side in (after, before))
    told.append(
        f"Where {AGREEMENTS[0]:.0%} of the tokens must stay, they run {shown(ours, '.1f')} layers, with attached exits "
        f"{shown(theirs, '.1f')} ({shown(gain, '+.1f')})."
    )
    value, low, high = gain
    if low is None or high is None or low <= 0 <= high:
        told.append("Training the model made no difference to the depth of its tokens that chance could not make.")
    else:
        when = "earlier" if value < 0 else "later"
        told.append(f"Trained, the model lets tokens leave {when} than exits that are attached to it.")
    return told


def shown(figure: Figure, how: str) -> str:
    """The figure in this format with its interval, or with [–] if it has no interval."""
    value, low, high = figure
    return f"{value:{how}} [{low:{how}}, {high:{how}}]" if low is not None else f"{value:{how}} [–]"


def points(figure: Figure) -> str:
    """A change of a share in percentage points with its interval."""
    return f"{shown([None if value is None else 100 * value for value in figure], '+.1f')} points"


def share(figure: Figure) -> str:
    """A share in per cent with its interval."""
    value, low, high = figure
    return f"{value:.1%} [{low:.1%}, {high:.1%}]" if low is not None else f"{value:.1%} [–]"
