"""A model without exits: the trace that makes every token run all layers. Knows nothing that was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helios_sim.exits.trace import ANY_TASK, BoundTrace, ExitTrace, TokenSpan
from helios_sim.profile.spec import ModelSpec
from helios_sim.provenance import Provenance, ProvenanceClass

_TOKENS = 1000  # so that a fractional number of characters per token comes out to 0.1 %


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class NoExits(ExitTrace):
    """A trace whose tokens are all alike, so that answers can be counted in whole tokens."""

    spec: ModelSpec

    def bind(self, task_names: Sequence[str]) -> BoundTrace:
        return _BoundNoExits(self, (0,) * len(task_names))


@dataclass(frozen=True, slots=True, eq=False)
class _BoundNoExits(BoundTrace):
    def locate(self, task: int, text_start: int, output_chars: int) -> TokenSpan:
        """As many tokens as the model's tokenizer makes of such a text, wherever it lies.

        Counting the tokens that begin within a span would give one more or one less, depending on where it begins;
        so a workload in this model's own tokens gets its counts back.
        """
        trace = self.trace
        assert isinstance(trace, NoExits)
        return TokenSpan(0, text_start % trace.n_tokens, trace.n_tokens, trace.spec.tokens(output_chars))

    def locate_many(
        self, task: NDArray[np.int64], text_start: NDArray[np.int64], output_chars: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        trace = self.trace
        assert isinstance(trace, NoExits)
        length = trace.n_tokens
        columns = np.broadcast_arrays(0, text_start % length, length, trace.spec.tokens_of_many(output_chars))
        return np.stack(columns, axis=1)


def no_exits(spec: ModelSpec) -> NoExits:
    """One exit, the last layer, which agrees with itself. For full depth only; it only says how long tokens are."""
    ends = np.floor(np.arange(_TOKENS + 1) * spec.chars_per_token + 1e-9).astype(np.int64)
    return NoExits(
        spec=spec,
        model=spec.name,
        exits=(spec.n_layers,),
        tasks=(ANY_TASK,),
        task=np.zeros(_TOKENS, np.int32),
        prompt=np.zeros(_TOKENS, np.int32),
        chars=np.diff(ends).astype(np.int32),
        agree=np.ones((_TOKENS, 1), bool),
        provenance=Provenance(ProvenanceClass.DERIVED, "no exits: every token runs all layers", "no_exits"),
        confidence=np.ones((_TOKENS, 1), np.float32),
    )
