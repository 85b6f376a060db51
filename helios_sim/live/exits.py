"""Early exit within one iteration: its tokens (rows and prompt chunks), the heads' output, and which rows leave.

`ExitReader` computes the heads' output at an exit, `ExitDecider` applies the exit rule, and `Tally` counts what ran,
in the form that a profile prices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helios_sim.exits.rule import (
    MEASURES,
    OF_ANSWERS,
    Confidence,
    ExitRule,
    FixedCap,
    PerToken,
    ReleaseEarly,
    require_leaving,
    require_live,
)
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.heads import ExitHeads
from helios_sim.live.model.predictors import Predictors
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.serving.iteration import Plan

if TYPE_CHECKING:
    from helios_sim.live.release import RampedToken

_PER_BAND = ("decode_tokens", "decode_kv_tokens", "check_tokens", "classifier_tokens", "propagated_tokens")


@dataclass(slots=True)
class OwedToken:
    """A token that exited early and still has to run the layers from `depth` on, before its K and V there are read."""

    position: int
    depth: int
    hidden: Tensor  # (1, d_model)


@dataclass(slots=True)
class ObservedToken:
    """What each exit said about one observed token, in the order of the exits."""

    choices: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)


Choice = Callable[[Tensor], int]
"""Chooses a token from its logits (V,) on the device."""


@dataclass(slots=True)
class Row:
    """An input token that yields a next token: of a decoding request, or the last one of a prompt that finishes."""

    slot: int
    position: int
    token: int
    last_layer: int  # depth at which it is sampled at the latest
    asks: bool = False  # leaves at the first confident exit
    judged: bool = False  # the confidence in the next token is measured at full depth
    decodes: bool = True
    seen: ObservedToken | None = None  # what every exit says, if the token is observed
    owed: list[OwedToken] = field(default_factory=list)  # earlier tokens of its request that owe layers
    ramped: RampedToken | None = None  # what ramps say about it, if its answer may be released
    waits: OwedToken | None = None  # its state at the exit where it waits, before or after the iteration
    sure: bool = False  # was confident at some exit
    recorded: Mapping[int, bool] | None = None  # whether it is confident, by depth, from a trace instead of the model
    asked: Mapping[int, bool] | None = None  # whether a predictor asks the head, by depth, from a trace
    checks: int | None = None  # bit mask of the exits that check it; None for those of the rule
    choice: Choice | None = None  # samples the next token; None for the likeliest
    more: bool = False  # another token of its request is planned after the next
    chosen: int | None = None  # the next token
    layers: int = 0  # depth at which it exited; 0 before that
    breach: bool = False
    confidence: float | None = None  # in the next token, if it was judged
    finite: bool = True


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a prompt. `row` is its last token if the prompt finishes with it."""

    slot: int
    tokens: Sequence[int]
    context: int
    layers: int
    row: Row | None


class Tally:
    """Counts what an iteration runs in each band, as a `Composition`."""

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self._counts = {name: np.zeros((1, len(bounds)), np.int64) for name in _PER_BAND}
        self._sampled = 0
        self._contexts: list[int] = []

    def ran(self, band: int, contexts: Sequence[int]) -> None:
        """Count rows that run the band. `contexts`: how many tokens each attends to, itself included."""
        self._counts["decode_tokens"][0, band] += len(contexts)
        self._counts["decode_kv_tokens"][0, band] += sum(contexts)
        if band == 0:
            self._contexts += contexts

    def add(self, name: str, band: int, rows: int) -> None:
        self._counts[name][0, band] += rows

    def propagated_above(self, band: int, rows: int) -> None:
        self._counts["propagated_tokens"][0, band + 1 :] += rows

    def sampled(self, rows: int) -> None:
        self._sampled += rows

    def composition(self, plan: Plan, chunks: Sequence[Chunk], on_card: bool = False) -> Composition:
        """Return the counts. `on_card`: at a ramp the host waits for the result before it launches the next layers."""

        def used(name: str) -> NDArray[np.int64] | None:
            return self._counts[name] if self._counts[name].any() else None

        spread: dict[str, Any] = {}
        if self._contexts:
            spread["decode_kv_least"] = np.array([min(self._contexts)])
            spread["decode_kv_most"] = np.array([max(self._contexts)])
        return Composition(
            bounds=self.bounds,
            decode_tokens=self._counts["decode_tokens"],
            decode_kv_tokens=self._counts["decode_kv_tokens"],
            sampled_tokens=np.array([self._sampled], np.int64),
            check_tokens=used("check_tokens"),
            classifier_tokens=used("classifier_tokens"),
            propagated_tokens=used("propagated_tokens"),
            prefill=tuple(PrefillChunk(len(chunk.tokens), chunk.context, chunk.layers) for chunk in chunks),
            host_sync_at_checks=isinstance(plan.exit_rule, PerToken)
            or (on_card and isinstance(plan.exit_rule, ReleaseEarly)),
            host_ahead=plan.host_ahead,
            loading=plan.loading,
            **spread,
        )


_LEAST_LOG = -1e4  # least log probability that is used; p log p is 0 there


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """Output of the head at an exit for n rows, on the host.

    `finite`: whether the logits are finite; if not, token and confidence mean nothing.
    """

    tokens: list[int]  # the likeliest
    confidence: list[float] | None
    finite: list[bool]
    logits: Tensor  # (n, V), on the device

    def token(self, row: int, choose: Choice | None) -> int:
        """The row's next token. `choose` takes another transfer to the host."""
        return self.tokens[row] if choose is None or not self.finite[row] else choose(self.logits[row])


class ExitReader:
    """Reads a model's exits by depth. At a depth without heads the model's own norm and LM head are used."""

    def __init__(self, heads: ExitHeads, n_layers: int, predictors: Predictors | None = None) -> None:
        self.heads, self.predictors = heads, predictors
        self._index = {depth: i for i, depth in enumerate((*heads.exits, n_layers))}

    @torch.inference_mode()
    def read(self, model: SegmentedModel, depth: int, hidden: Tensor, measure: Confidence | None) -> HeadOutput:
        """Put hidden (n, d) after `depth` layers through the head, with one transfer to the host.

        `measure`: the confidence to return as well, if any. A confidence that is computed from the hidden state does
        not come from the head, but is part of the same transfer.
        """
        tokens, confidence, best, logits = self.on_device(model, depth, hidden, measure)
        columns = [tokens.double(), best.double()] if confidence is None else [
            tokens.double(), best.double(), confidence.double()
        ]  # fmt: skip
        rows = torch.stack(columns).tolist()
        finite = [value - value == 0.0 for value in rows[1]]
        return HeadOutput([int(t) for t in rows[0]], None if confidence is None else rows[2], finite, logits)

    @torch.inference_mode()
    def tokens(self, model: SegmentedModel, adapted: Tensor) -> HeadOutput:
        """Tokens of states (n, d) that are already adapted, from any depths, with one transfer to the host."""
        logits = model.logits(adapted)
        best = logits.max(-1)
        rows = torch.stack((best.indices.double(), best.values.double())).tolist()
        return HeadOutput([int(t) for t in rows[0]], None, [value - value == 0.0 for value in rows[1]], logits)

    def tokens_on_device(self, model: SegmentedModel, adapted: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n,) and the largest logits (n,) of adapted states (n, d), on the device."""
        logits = model.logits(adapted)
        found = model.kernels.look_at(logits, None, 1.0)
        if found is not None:
            return found[0], found[1]
        best = logits.max(-1)
        return best.indices, best.values

    def on_device(
        self, model: SegmentedModel, depth: int, hidden: Tensor, measure: Confidence | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Tokens (n,), confidence (n,) if requested, the largest logit (n,) and all logits (n, V), on the device."""
        index = self._index.get(depth)
        logits = model.logits(self.adapted(model, depth, hidden))
        by_head = None if measure is None or not measure.by_head else measure.value
        temperature = 1.0 if by_head is None or index is None else self.heads.temperature[index]
        found = model.kernels.look_at(logits, by_head, temperature)
        if found is not None:
            tokens, best, sure = found
            if by_head is None:
                return tokens, None if measure is None else self.check(depth, hidden, measure), best, logits
            return tokens, sure, best, logits
        if measure is None or not measure.by_head:
            best = logits.max(-1)
            return best.indices, None if measure is None else self.check(depth, hidden, measure), best.values, logits
        logits = logits.float()
        if temperature != 1.0:
            logits = logits / temperature
        seen = HeadView(logits)
        return seen.best.indices, MEASURES[measure].of(seen), seen.best.values, logits

    def adapted(self, model: SegmentedModel, depth: int, hidden: Tensor) -> Tensor:
        """Adapt hidden states (n, d) after `depth` layers for the model's own norm and LM head."""
        index = self._index.get(depth)
        return hidden if index is None else self.heads.adapt(index, hidden).to(model.dtype)

    def check(self, depth: int, hidden: Tensor, measure: Confidence) -> Tensor:
        """The confidence (n,) of a check on hidden states (n, d). UserError if it cannot be computed live."""
        require_live(measure)
        require_leaving(measure)
        return MEASURES[measure].of(_StateView(self, depth, hidden))

    def classify(self, depth: int, hidden: Tensor) -> Tensor:
        """The classifier's confidence (n,). Raises UserError for heads without one."""
        index = self._index.get(depth)
        if index is None:
            raise ValueError(f"no head at layer {depth}; heads at {tuple(self._index)}")
        return self.heads.classify(index, hidden)


class HeadView:
    """LM head output, from its logits (n, V) in float32, in the form that `exits.rule.MEASURES` reads."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.best, self.total = logits, logits.max(-1), logits.logsumexp(-1)

    @property
    def vocab_size(self) -> int:
        return int(self.logits.shape[-1])

    def top(self, k: int) -> Tensor:
        largest = self.best.values[:, None] if k == 1 else self.logits.topk(k, dim=-1).values
        return (largest - self.total[:, None]).exp()

    def expected(self, of: Callable[[Any], Any]) -> Tensor:
        return mean_of(self.logits - self.total[:, None], of)


def mean_of(log_p: Tensor, of: Callable[[Any], Any]) -> Tensor:
    """The mean of `of` (log probability) under distributions (n, V); tokens of probability 0 add nothing."""
    log_p = log_p.clip(min=_LEAST_LOG)
    return (log_p.exp() * of(log_p)).sum(-1)


@dataclass(frozen=True, slots=True)
class _StateView:
    """Hidden states (n, d) after `depth` layers, for confidence measures that need no head.

    Only the state after the exit's layer is kept, so measures that compare two layers are refused (`require_live`).
    """

    exits: ExitReader
    depth: int
    hidden: Tensor

    def predicted(self) -> Tensor:
        return self.exits.classify(self.depth, self.hidden)


class CapturedHeads(Protocol):
    """Exit heads that are captured as graphs."""

    def read(self, exits: ExitReader, depth: int, states: Tensor, measure: Confidence | None) -> HeadOutput | None:
        """Return the head's output for the states, without logits; None if there is no graph for it."""
        ...


class ExitDecider:
    """Applies a plan's exit rule at the end of each band: which rows exit there, and with which token."""

    def __init__(
        self,
        model: SegmentedModel,
        exits: ExitReader,
        rule: ExitRule,
        lazy: bool,
        captured: CapturedHeads | None = None,
    ) -> None:
        """`captured`: captured heads, for the states of captured steps."""
        self._model, self._exits, self._lazy, self._captured = model, exits, lazy, captured
        watched = rule if isinstance(rule, FixedCap | PerToken) else None
        self._threshold = 0.0 if watched is None else watched.threshold
        self._measure = None if watched is None else watched.confidence
        self._checks_at = rule.checks_at if isinstance(rule, PerToken) else lambda layers: True
        self._by_head = self._measure is None or self._measure.by_head
        self._whole = model.architecture.n_layers
        self._waiting: list[tuple[list[Row], Tensor]] = []  # rows that wait for the head, with their adapted states

    def measure_at(self, end: int) -> Confidence | None:
        """The confidence to compute for rows that stop at this depth without a check; None at full depth."""
        return self._measure if end < self._whole else None

    def decide(
        self, band: int, end: int, rows: Sequence[Row], states: Tensor, tally: Tally, said: HeadOutput | None = None
    ) -> None:
        """Sample the rows that stop here, check the rows that may exit, and record what is observed.

        `states` (n, d) are the rows' hidden states after `end` layers. There is at most one transfer to the host for
        the checks and one for the tokens; they are the same if the head gives both. Rows that exit by a check
        on the hidden state get their token in `finish`. `said`: the head's output, if it is known already.
        """
        stops = {i for i, row in enumerate(rows) if row.last_layer == end}
        asking = [i for i, row in enumerate(rows) if row.asks and i not in stops and self._asks(row, band, end)]
        leaving: set[int] = set()
        if asking and not self._by_head:
            tally.add("classifier_tokens", band, len(asking))
            assert self._measure is not None
            sure = self._exits.check(end, some(states, asking), self._measure) >= self._threshold
            leaving = self._exiting(rows, asking, end, sure.tolist())
        observed = {i for i, row in enumerate(rows) if row.seen is not None}
        watched = {i for i in stops if rows[i].decodes and i not in observed} if end < self._whole else set()
        judged = {i for i, row in enumerate(rows) if row.judged} if end == self._whole else set()
        later = set() if self._by_head else (stops | leaving) - observed - watched - judged
        self._exit_later(end, rows, sorted(later), states, tally)
        through = sorted((stops | leaving | observed | (set(asking) if self._by_head else set())) - later)
        if not through:
            return
        asks_head = self._by_head and bool(asking)
        measure = self._measure if observed or watched or asks_head else OF_ANSWERS if judged else None
        if said is None:
            said = self._said(end, [rows[i] for i in through], some(states, through), measure)
        confidence = said.confidence or [0.0] * len(through)
        if asks_head:
            by_row = dict(zip(through, confidence, strict=True))
            leaving = self._exiting(rows, asking, end, [by_row[i] >= self._threshold for i in asking])
        sampled = (stops | (set() if self._by_head else leaving)) - later
        tally.sampled(len(sampled))
        tally.add("check_tokens", band, len(through) - len(sampled))
        if not self._by_head:
            tally.add("classifier_tokens", band, len(watched))
        for place, (i, sure_here) in enumerate(zip(through, confidence, strict=True)):
            row = rows[i]
            if row.seen is not None:
                row.seen.choices.append(said.tokens[place])
                row.seen.confidence.append(sure_here)
            if i in stops or i in leaving:
                row.chosen, row.layers, row.finite = said.token(place, row.choice), end, said.finite[place]
                row.confidence = sure_here if i in judged and measure is OF_ANSWERS else None
                row.breach = i in watched and self._measure is not None and not (
                    row.sure or confident(row, end, sure_here >= self._threshold)
                )  # fmt: skip

    def _asks(self, row: Row, band: int, end: int) -> bool:
        return self._checks_at(end) if row.checks is None else bool(row.checks >> band & 1)

    def _said(self, end: int, rows: Sequence[Row], states: Tensor, measure: Confidence | None) -> HeadOutput:
        """The head's output for the rows' states, by a captured graph unless a row samples from the logits."""
        if self._captured is not None and all(row.choice is None for row in rows):
            said = self._captured.read(self._exits, end, states, measure)
            if said is not None:
                return said
        return self._exits.read(self._model, end, states, measure)

    def finish(self) -> None:
        """Give every row that exited without a token its token: the head runs once for all depths."""
        if not self._waiting:
            return
        found = self._exits.tokens(self._model, torch.cat([adapted for _, adapted in self._waiting]))
        rows = [row for left, _ in self._waiting for row in left]
        for place, row in enumerate(rows):
            row.chosen, row.finite = found.token(place, row.choice), found.finite[place]
        self._waiting.clear()

    def _exit_later(self, end: int, rows: Sequence[Row], going: list[int], states: Tensor, tally: Tally) -> None:
        if not going:
            return
        left = [rows[i] for i in going]
        for row in left:
            row.layers = end
        tally.sampled(len(left))
        adapted = self._exits.adapted(self._model, end, some(states, going))
        self._waiting.append((left, adapted.clone() if adapted is states else adapted))  # a later band may overwrite it

    def _exiting(self, rows: Sequence[Row], asking: list[int], end: int, sure: list[bool]) -> set[int]:
        """The rows that exit: each by itself, or, if lazy, all together once each was confident at some exit."""
        for i, here in zip(asking, sure, strict=True):
            rows[i].sure = rows[i].sure or confident(rows[i], end, here)
        if self._lazy:
            return set(asking) if all(rows[i].sure for i in asking) else set()
        return {i for i in asking if rows[i].sure}


def confident(row: Row, depth: int, sure: bool) -> bool:
    """Whether the row is confident: by its recorded trace if it has one, else by the model (`sure`)."""
    return sure if row.recorded is None else row.recorded[depth]


def some(states: Tensor, rows: Sequence[int]) -> Tensor:
    """Select the states (n, ...) of these rows, given in ascending order."""
    return states if len(rows) == len(states) else states[list(rows)]
