"""A model without exits: the trace that makes every token run all layers. Knows nothing that was recorded."""

from __future__ import annotations

import numpy as np

from helios_sim.exits.trace import ANY_TASK, ExitTrace
from helios_sim.profile.spec import ModelSpec
from helios_sim.provenance import Provenance, ProvenanceClass

_TOKENS = 1000  # so that a fractional number of characters per token comes out to 0.1 %


def no_exits(spec: ModelSpec) -> ExitTrace:
    """One exit, the last layer, which agrees with itself. For full depth only; it only says how long tokens are."""
    ends = np.floor(np.arange(_TOKENS + 1) * spec.chars_per_token + 1e-9).astype(np.int64)
    return ExitTrace(
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
