"""What one iteration runs: rows (tokens on their way), chunks of prompts, and their counts that a profile prices."""

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


@dataclass(slots=True)
class Row:
    """A token that yields the next one: of a request that decodes, or the last one of a prompt that finishes."""

    slot: int
    position: int
    token: int
    last_layer: int  # it is sampled there at the latest
    asks: bool = False  # exits at the first confident exit
    decodes: bool = True
    seen: ObservedToken | None = None  # observed at every exit
    owed: list[OwedToken] = field(default_factory=list)  # tokens of its request that left early
    sure: bool = False  # was confident at some exit
    recorded: Mapping[int, bool] | None = None  # confidence by depth from a trace, in place of the model's
    chosen: int | None = None  # the next token
    layers: int = 0  # depth at which it exited; 0 before that
    breach: bool = False
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
