"""Counts what an iteration ran, in the numbers that a profile prices. Knows no tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from helios_sim.exits.rule import PerToken
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.serving.iteration import Plan


@dataclass(slots=True)
class OwedToken:
    """A token that left and still has to run the layers from `depth` on, before anybody reads its K and V there."""

    position: int
    depth: int
    hidden: Tensor  # (1, d_model)


@dataclass(slots=True)
class ObservedToken:
    """What each exit said of one observed token, in the order of the exits."""

    choices: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Row:
    """A token on its way: of a request that decodes, or the last one of a prompt that finishes."""

    slot: int
    position: int
    token: int
    last_layer: int  # where it is sampled at the latest
    asks: bool = False  # leaves at the first confident exit
    decodes: bool = True
    seen: ObservedToken | None = None  # observed at every exit
    owed: list[OwedToken] = field(default_factory=list)  # of its request
    sure: bool = False  # was confident somewhere
    recorded: Mapping[int, bool] | None = None  # whether exits are confident, by depth, whatever the model says
    chosen: int | None = None  # the token that it became
    layers: int = 0  # after which it left; 0 while it has not
    breach: bool = False
    finite: bool = True


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a prompt. `row` is its last token, where that one yields the next."""

    slot: int
    tokens: Sequence[int]
    context: int
    layers: int
    row: Row | None


class Tally:
    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self._counts = {name: np.zeros((1, len(bounds)), np.int64) for name in _PER_BAND}
        self._sampled = 0
        self._contexts: list[int] = []

    def ran(self, band: int, contexts: Sequence[int]) -> None:
        """Rows that run the band, by the tokens that each attends to, itself included."""
        self._counts["decode_tokens"][0, band] += len(contexts)
        self._counts["decode_kv_tokens"][0, band] += sum(contexts)
        if band == 0:
            self._contexts = list(contexts)

    def add(self, name: str, band: int, rows: int) -> None:
        self._counts[name][0, band] += rows

    def propagated_above(self, band: int, rows: int) -> None:
        self._counts["propagated_tokens"][0, band + 1 :] += rows

    def sampled(self, rows: int) -> None:
        self._sampled += rows

    def composition(self, plan: Plan, chunks: Sequence[Chunk]) -> Composition:
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
            host_sync_at_checks=isinstance(plan.exit_rule, PerToken),
            host_ahead=plan.host_ahead,
            loading=plan.loading,
            **spread,
        )


_PER_BAND = ("decode_tokens", "decode_kv_tokens", "check_tokens", "classifier_tokens", "propagated_tokens")
