"""Made-up traces for tests of other parts. Knows no real model, and says so in its provenance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from helios_sim.exits.trace import ANY_TASK, ExitTrace
from helios_sim.provenance import Provenance, ProvenanceClass


def synthetic_trace(
    model: str = "synthetic",
    exits: Sequence[int] = (4, 8, 12),
    tasks: Sequence[str] = (ANY_TASK,),
    tokens: int = 2_000,
    seed: int = 0,
    *,
    chars_per_token: int = 4,
    uneven: bool = False,
    nested: bool = True,
    prompt_tokens: int = 50,
    human_text: bool = True,
) -> ExitTrace:
    """A trace with every column: `tokens` per task, all of `chars_per_token` characters unless `uneven`.

    Traces line up when tokens x chars_per_token is the same. Each token needs a depth drawn uniformly from the
    model's; deeper exits are more confident and agree more often. `nested`: once an exit agrees, deeper ones do.
    Thresholds from 0 (all confident) to above 1 (none) answer.
    """
    rng = np.random.default_rng(seed)
    n = tokens * len(tasks)
    shape = (n, len(exits))
    depth = np.asarray(exits) / exits[-1]
    needed = rng.uniform(size=n)[:, None]
    confidence = np.clip(0.5 + 0.5 * (depth - needed) + rng.normal(0, 0.1, size=shape), 0, 1)
    slack = rng.normal(0, 0.1, size=(n, 1) if nested else shape)
    agree = depth >= needed + slack
    agree[:, -1] = True
    return ExitTrace(
        model=model,
        exits=tuple(exits),
        tasks=tuple(tasks),
        task=np.repeat(np.arange(len(tasks), dtype=np.int32), tokens),
        prompt=np.arange(n, dtype=np.int32) // prompt_tokens,
        chars=np.concatenate([_lengths(rng, tokens, chars_per_token, uneven) for _ in tasks]),
        agree=agree,
        provenance=Provenance(ProvenanceClass.PUBLISHED, "synthetic, for tests: no model", "synthetic_trace(...)"),
        confidence=confidence.astype(np.float32),
        margin=(confidence * rng.uniform(size=shape)).astype(np.float32),
        bits=rng.gamma(2.0, 2.0 / depth, size=shape).astype(np.float32),
        classifier=np.clip(confidence + rng.normal(0, 0.05, size=shape), 0, 1).astype(np.float32),
        human_text=human_text,
    )


def _lengths(rng: np.random.Generator, tokens: int, chars_per_token: int, uneven: bool) -> NDArray[np.int32]:
    """Characters of each token; `uneven` cuts the text at places drawn at random, some of them twice."""
    if not uneven:
        return np.full(tokens, chars_per_token, dtype=np.int32)
    cuts = np.sort(rng.integers(0, tokens * chars_per_token + 1, size=tokens - 1))
    return np.diff(np.concatenate(([0], cuts, [tokens * chars_per_token]))).astype(np.int32)
