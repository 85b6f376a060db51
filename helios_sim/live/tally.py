"""Counts what an iteration ran, in the numbers that a profile prices. Knows no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.exits.rule import PerToken
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.serving.iteration import Plan

if TYPE_CHECKING:
    from helios_sim.live.forward import Chunk


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
