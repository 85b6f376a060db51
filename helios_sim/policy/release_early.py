"""The policy release_early (Apparate, arXiv 2312.05385): tokens are delivered at ramps while the model runs on.

The whole model's own tokens then tell which were right, and tune the thresholds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.rule import MOST_THRESHOLD, Confidence, ReleaseEarly, require_threshold
from helios_sim.policy.checks import check_positive, find_model
from helios_sim.policy.deployment import Cause, Completed, Deployment, KvRule, Placement
from helios_sim.policy.prediction import decode_time_s, expected_load, fixed_depth, seen_load
from helios_sim.policy.telemetry import Candidate, Released, Situation, Telemetry
from helios_sim.profile.composition import Composition

STEP = 0.01  # each step lowers a threshold by this
CLOSED = 1.01  # a threshold that no confidence reaches
LEAST_TOKENS = 200  # observed tokens before thresholds and ramps are reviewed


@dataclass(frozen=True, slots=True)
class ReleaseEarlyParameters:
    """Settings of `policy=release_early`."""

    max_disagreement: float = 0.01  # share of all tokens that may be delivered unlike the whole model's
    ramps: int = 2  # most exits that check
    review_requests: int = 30  # completed requests between two reviews of thresholds and ramps
    window_tokens: int = 4000  # latest tokens by which thresholds are tuned
    fixed_threshold: float | None = None  # one threshold for every ramp; None means thresholds are tuned
    confidence: Confidence = Confidence.MAX_PROBABILITY
    model: str | None = None  # None means the only candidate
    batch_limit: int | None = None  # None means the server's own limit

    def __post_init__(self) -> None:
        for name in ("ramps", "review_requests", "window_tokens", "batch_limit"):
            check_positive(name, getattr(self, name))
        if not 0 <= self.max_disagreement <= 1:
            fix = "set policy.max_disagreement=0.01"
            raise UserError("policy.max_disagreement", self.max_disagreement, "a share from 0 to 1", fix)
        if self.fixed_threshold is not None:
            require_threshold("policy.fixed_threshold", self.fixed_threshold)


class ReleaseEarlyPolicy:
    """Tuning of thresholds and ramps.

    Thresholds begin closed. A review lowers them greedily, one threshold by one `STEP` at a time: the one that saves
    most time for each further token that differs from the whole model's. It stops before the number of such tokens
    among the latest ones, plus one standard deviation, exceeds the budget. A ramp is given up if its checks cost later
    tokens more time than it saves. The next deeper exit that has not been tried takes its place, or a shallower one.
    """

    def __init__(self, parameters: ReleaseEarlyParameters) -> None:
        self.parameters = parameters
        self._latest: deque[tuple[NDArray[np.float32], NDArray[np.bool_]]] = deque()  # at the present ramps

    def start(self, situation: Situation) -> Deployment:
        """Deploys the first ramps. Raises UserError if the model is not among the candidates, or has only one exit."""
        p, self._situation = self.parameters, situation
        self._model = find_model(situation, p.model)
        self._exits = self._candidate.offline.exits[:-1]
        if not self._exits:
            raise UserError("policy.model", self._model, "a model with exits before its last layer", "give it exits")
        exits, n = len(self._exits), min(p.ramps, len(self._exits))
        self._ramps = tuple(self._exits[(2 * k + 1) * exits // (2 * n)] for k in range(n))
        self._given_up: set[int] = set()
        first = CLOSED if p.fixed_threshold is None else p.fixed_threshold
        self._thresholds = (first,) * len(self._ramps)
        load = expected_load(situation)
        self._context = round(load.prompt_tokens(self._candidate) + load.output_tokens(self._candidate) / 2)
        return self._deployment()

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        """Sets thresholds and ramps until the next review; None if they stay."""
        for seen in telemetry.observations:
            if isinstance(seen, Released) and seen.confidences.shape[1] == len(self._ramps):
                self._latest.append((seen.confidences, seen.agrees))
        held = sum(len(confidences) for confidences, _ in self._latest)
        while len(self._latest) > 1 and held - len(self._latest[0][0]) >= self.parameters.window_tokens:
            held -= len(self._latest.popleft()[0])
        if not isinstance(cause, Completed) or held < LEAST_TOKENS:
            return None
        before = self._ramps, self._thresholds
        confidences, agrees = (np.concatenate(each) for each in zip(*self._latest, strict=True))
        load = seen_load(self._situation, telemetry, self._model)
        self._context = round(load.prompt_tokens(self._candidate) + load.output_tokens(self._candidate) / 2)
        batch = max(1, telemetry.running_requests)
        saved_s, check_s = self._saved_s(batch), self._check_s(batch)
        self._thresholds = tuned(confidences, agrees, saved_s, self.parameters.max_disagreement)
        self._review(released_shares(confidences, self._thresholds), saved_s, check_s)
        return None if (self._ramps, self._thresholds) == before else self._deployment()

    @property
    def _candidate(self) -> Candidate:
        return self._situation.candidates[self._model]

    def _saved_s(self, batch: int) -> NDArray[np.float64]:
        """Seconds by which a token that leaves at each ramp comes earlier, (ramps,)."""
        profile = self._candidate.profile
        *early_s, whole_s = (
            float(decode_time_s(profile, fixed_depth(layers), np.array([batch]), self._context)[0])
            for layers in (*self._ramps, profile.model.n_layers)
        )
        return np.array([whole_s - each_s for each_s in early_s])

    def _check_s(self, batch: int) -> float:
        """Seconds that the check of a ramp adds to an iteration."""
        profile, p = self._candidate.profile, self.parameters
        rows = np.array([[batch]], np.int64)
        plain = Composition(
            (profile.model.n_layers,), rows, rows * self._context, np.zeros(1, np.int64), host_sync_at_checks=False
        )
        # A check on the hidden state does not tell whether the ramp's token is right, so its head is run as well.
        checked = replace(plain, check_tokens=rows, classifier_tokens=None if p.confidence.by_head else rows)
        return float(profile.iteration_time_s(checked)[0] - profile.iteration_time_s(plain)[0])

    def _review(self, shares: NDArray[np.float64], saved_s: NDArray[np.float64], check_s: float) -> None:
        """Replaces the first ramp with a negative utility, or drops it if no other exit is left.

        The utility is the share of tokens that leave at the ramp x the time saved, minus the share that leaves later x
        the cost of the ramp's check.
        """
        later = 1.0 - np.cumsum(shares)
        poor = [ramp for ramp, u in zip(self._ramps, shares * saved_s - later * check_s, strict=True) if u < 0]
        for ramp in poor[:1]:  # one at a time: the next review sees the effect
            self._given_up.add(ramp)
            others = [each for each in self._exits if each not in self._given_up and each not in self._ramps]
            others.sort(key=lambda each: (each < ramp, abs(each - ramp)))
            if not others and len(self._ramps) == 1:
                return
            kept = {each: at for each, at in zip(self._ramps, self._thresholds, strict=True) if each != ramp}
            kept |= dict.fromkeys(others[:1], CLOSED)
            self._ramps = tuple(sorted(kept))
            self._thresholds = tuple(kept[each] for each in self._ramps)
            self._latest.clear()

    def _deployment(self) -> Deployment:
        p = self.parameters
        tunes = p.fixed_threshold is None
        told = ", ".join(
            f"{layers} ({'closed' if at > 1 else f'{at:.2f}'})"
            for layers, at in zip(self._ramps, self._thresholds, strict=True)
        )
        return Deployment(
            active=Placement(self._model, self._candidate.profile.model.n_layers),
            exit_rule=ReleaseEarly(self._ramps, self._thresholds, p.confidence, tells_all=tunes),
            kv_rule=KvRule.NONE,
            batch_limit=p.batch_limit,
            triggers=(Completed(p.review_requests),) if tunes else (),
            reason=f"{self._model}: answers leave at ramps {told} while the model goes on",
            evidence={"ramps": list(self._ramps), "thresholds": list(self._thresholds)},
        )


def released_shares(confidences: NDArray[np.float32], thresholds: Sequence[float]) -> NDArray[np.float64]:
    """Share of tokens that leave at each ramp, (ramps,), given `confidences` (tokens, ramps)."""
    leaf = _leaves(confidences, np.array(thresholds))
    return np.bincount(leaf, minlength=len(thresholds) + 1)[:-1] / len(confidences)


def tuned(
    confidences: NDArray[np.float32], agrees: NDArray[np.bool_], saved_s: NDArray[np.float64], budget: float
) -> tuple[float, ...]:
    """Tunes thresholds (ramps,) by greedy steps, see `ReleaseEarlyPolicy`. Tables have the shape (tokens, ramps)."""
    n, ramps = confidences.shape
    steps = np.full(ramps, round(CLOSED / STEP))
    known = np.column_stack([agrees, np.ones(n, np.bool_)])
    gains = np.append(saved_s, 0.0)

    def outcome(at: NDArray[np.int64]) -> tuple[float, int]:
        leaf = _leaves(confidences, at.astype(np.float64) * STEP)
        return float(gains[leaf].sum()), n - int(known[np.arange(n), leaf].sum())

    saved, wrong = outcome(steps)
    while True:
        best: tuple[float, float, int] | None = None
        for ramp in range(ramps):
            if steps[ramp] == 0:
                continue
            at = steps.copy()
            at[ramp] -= 1
            more, then = outcome(at)
            if then + math.sqrt(then) > budget * n or more < saved:
                continue
            worse = then - wrong
            merit = math.inf if worse <= 0 else (more - saved) / worse
            if best is None or (merit, more - saved) > best[:2]:
                best = merit, more - saved, ramp
        if best is None:
            return tuple(round(min(float(step) * STEP, MOST_THRESHOLD), 2) for step in steps)
        steps[best[2]] -= 1
        saved, wrong = outcome(steps)


def _leaves(confidences: NDArray[np.float32], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """The first ramp at which each token is confident, (tokens,), or the number of ramps if there is none."""
    sure = confidences >= thresholds.astype(np.float32)
    return np.asarray(np.where(sure.any(axis=1), sure.argmax(axis=1), confidences.shape[1]), np.int64)
