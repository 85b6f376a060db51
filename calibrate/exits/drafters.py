"""What other models predict for the tokens of a model's answers: a joint trace, from which their drafts are replayed.

A drafter reads prompt and answer in one pass and predicts each token of the answer from the true text before it. That
is the token that it would have drafted: with greedy verification, every draft up to the first rejected one follows the
true text. The trace also holds the drafter's confidence, by which the drafts of several drafters are fused.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrate.drafts import kept
from calibrate.exits.answers import GreedyAnswer
from calibrate.exits.hidden import batches, read_rows
from calibrate.exits.traces import Tell, TimeSpent, load_columns, observe, quiet, save_columns, short
from helios_sim.exits.rule import Confidence
from helios_sim.exits.trace import ExitTrace
from helios_sim.live.model.heads import ExitHeads

if TYPE_CHECKING:
    from helios_sim.live.model.decoder import SegmentedModel

_OWN_HEAD = ExitHeads.own(())
_COLUMNS = ("right", "sure", "bits")


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """What a drafter predicts for N tokens of answers."""

    right: NDArray[np.bool_]  # (N,) whether the predicted token is the answer's token
    sure: NDArray[np.float32]  # (N,) probability of the predicted token
    bits: NDArray[np.float32]  # (N,) -log2 of the probability of the answer's token


def predictions(
    drafter: SegmentedModel,
    answers: Sequence[GreedyAnswer],
    scratch: Path,
    tell: Tell = quiet,
    left_s: Callable[[], float] | None = None,
) -> Predicted:
    """Predictions for the tokens of all answers, in order. Each batch is kept in `scratch`, and a later call goes on.

    Raises TimeSpent if fewer seconds are left (None: no limit) than the slowest batch took, and CannotRun if an answer
    with its prompt is longer than the drafter's context.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    found: list[Predicted | None] = [None] * len(answers)
    groups = list(batches([_Text(np.concatenate((a.prompt, a.tokens))) for a in answers]))
    slowest_s = 0.0
    for b, group in enumerate(groups):
        began_s, of = time.monotonic(), [answers[i] for i in group]
        path = scratch / f"{_digest(of)}.npz"
        columns = kept(path, load_columns)
        if columns is None:
            if left_s is not None and left_s() < slowest_s:
                raise TimeSpent(f"{b} of {len(groups)} batches were read")
            columns = _read(drafter, of)
            save_columns(path, columns)
            slowest_s = max(slowest_s, time.monotonic() - began_s)
        ends = np.cumsum([len(a.tokens) for a in of])[:-1]
        for i, *parts in zip(group, *(np.split(columns[name], ends) for name in _COLUMNS), strict=True):
            found[i] = Predicted(*parts)
        tell(f"batch {b + 1} of {len(groups)}", (b + 1) / len(groups))
    each = [it for it in found if it is not None]
    return Predicted(*(np.concatenate([getattr(it, name) for it in each]) for name in _COLUMNS))


def joint_trace(
    trace: ExitTrace, drafters: Mapping[str, Predicted], weights_sha256: Mapping[str, str], command: str
) -> ExitTrace:
    """The trace of answers, with each drafter's predictions for their tokens."""
    origin, names = trace.provenance, ", ".join(drafters)
    return replace(
        trace,
        drafters={name: it.right for name, it in drafters.items()},
        drafters_sure={name: short(it.sure) for name, it in drafters.items()},
        provenance=replace(
            origin,
            command=command,
            source=f"{origin.source}; {names}: one pass each over prompts and answers",
            details={**origin.details, "drafters_weights_sha256": dict(weights_sha256)},
        ),
    )


def drafters_trace(
    trace: ExitTrace, name: str, layers: int, predicted: Predicted, weights_sha256: str, command: str
) -> ExitTrace:
    """The trace of a drafter with `layers` layers on the same answers, which it reads but did not write."""
    origin = trace.provenance
    return replace(
        trace,
        model=name,
        exits=(layers,),
        agree=np.ones((trace.n_tokens, 1), np.bool_),
        confidences={Confidence.MAX_PROBABILITY: short(predicted.sure)[:, None]},
        bits=short(predicted.bits)[:, None],
        provenance=replace(
            origin,
            command=command,
            source=f"{name}, reading what {origin.source} wrote",
            details={**origin.details, "weights_sha256": weights_sha256},
        ),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    tokens: NDArray[np.int64]


def _digest(answers: Sequence[GreedyAnswer]) -> str:
    parts = [part.tobytes() for a in answers for part in (a.prompt, np.array([-1]), a.tokens, np.array([-2]))]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:20]


def _read(drafter: SegmentedModel, answers: Sequence[GreedyAnswer]) -> dict[str, NDArray[Any]]:
    """The columns (N,) of all tokens of these answers, read as one batch."""
    import torch

    known = drafter.architecture.vocab_size - 1  # a larger id would have no embedding
    rows = [np.minimum(np.concatenate((a.prompt, a.tokens[:-1])), known) for a in answers]
    with torch.inference_mode():
        (hidden,) = read_rows(drafter, rows, [drafter.architecture.n_layers])
        ends = np.cumsum([len(row) for row in rows])
        of_answers = np.concatenate([np.arange(e - len(a.tokens), e) for a, e in zip(answers, ends, strict=True)])
        tokens = np.concatenate([a.tokens for a in answers])
        states = hidden[torch.from_numpy(of_answers).to(hidden.device)]
        seen = observe(drafter, _OWN_HEAD, [states], np.minimum(tokens, known))
    sure = seen.confidences[Confidence.MAX_PROBABILITY][:, 0]
    return {"right": seen.choice[:, 0] == tokens, "sure": sure, "bits": seen.bits[:, 0]}
