"""Trains predictors that look at a few words in place of the head (`helios_sim/live/model/predictors.py`).

A predictor is a network of two layers, as in SpecEE's code, trained on texts that are not traced. Its target is whether
the exit's own word equals full depth's and is among the proposed words: then the head confirms the token's exit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrate.exits.hidden import Passage, batches, start_token, states
from calibrate.stages import NotEnoughTime
from helios_sim.live.model.predictors import Predictors, Tensors, features, likeliest, logit, normed, untrained

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.heads import ExitHeads

_CHUNK_TOKENS = 512
_LEARNING_RATE, _BATCH, _MOST_STEPS, _EPOCHS = 2e-3, 512, 4_000, 40
SURE = 0.5  # probability from which SpecEE runs the head


def proposed(model: SegmentedModel, heads: ExitHeads, first: Tensor) -> Tensor:
    """The likeliest words (n, WORDS) of the first exit, from the states (n, d) there."""
    return likeliest(normed(model, heads, 0, first) @ model.outer.head.T)


@dataclass(frozen=True, slots=True)
class PredictorPlan:
    """How predictors are trained."""

    width: int = 256
    seed: int = 0
    most_s: float | None = None  # seconds for reading texts; None: no limit


@dataclass(slots=True, eq=False)
class _Read:
    """Features and targets of N tokens, by exit."""

    seen: list[list[Tensor]]  # (n, FEATURES) of each batch
    agree: list[list[Tensor]]  # (n,) whether the exit's word is full depth's
    among: list[list[Tensor]]  # (n,) whether the exit's word is one of the proposed words


def train_predictors(
    model: SegmentedModel,
    tokenizer: Any,
    heads: ExitHeads,
    passages: Sequence[Passage],
    plan: PredictorPlan,
    tell: Callable[[str, float | None], None],
    spent_s: Callable[[], float],
) -> tuple[Predictors, dict[str, Any]]:
    """Train predictors. Returns them and their results on every fifth batch of the texts, which is held out.

    Raises NotEnoughTime if fewer than two batches could be read.
    """
    import torch

    start = start_token(tokenizer, model.architecture.vocab_size)
    depths = (*heads.exits, model.architecture.n_layers)
    groups = list(batches(passages))
    order = np.random.default_rng(plan.seed).permutation(len(groups))  # of all lengths, wherever the time ends
    read = _Read(*([[] for _ in heads.exits] for _ in range(3)))
    n_read = 0
    with torch.inference_mode():
        for done, at in enumerate(order.tolist()):
            if plan.most_s is not None and spent_s() > plan.most_s:
                break
            hidden = states(model, start, [passages[i].tokens for i in groups[at]], depths)
            for chunk in zip(*(state.split(_CHUNK_TOKENS) for state in hidden), strict=True):
                _look(model, heads, chunk, read)
            n_read += 1
            tell(f"texts for predictors: batch {done + 1} of {len(groups)}", (done + 1) / len(groups))
    if n_read < 2:
        raise NotEnoughTime("no time is left for two batches of texts from which predictors learn")
    found, reached = [], {}
    for e, depth in enumerate(heads.exits):
        seen, agree, among = (parts[e] for parts in (read.seen, read.agree, read.among))
        judged = [i for i in range(len(seen)) if i % 5 == 4] or [len(seen) - 1]
        fitted = [i for i in range(len(seen)) if i not in judged]
        rightly = torch.cat([agree[i] & among[i] for i in fitted])
        trained = _trained(torch.cat([seen[i] for i in fitted]), rightly, plan)
        found.append(trained)
        p = logit(trained, torch.cat([seen[i] for i in judged])).sigmoid()
        right, there = torch.cat([agree[i] for i in judged]), torch.cat([among[i] for i in judged])
        leaves = (p >= SURE) & there
        reached[str(depth)] = {
            "tokens": len(p),
            "agree": float(right.float().mean()),
            "asks_the_head": float((p >= SURE).float().mean()),
            "in_vain": float(((p >= SURE) & ~there).float().mean()),
            "leaves": float(leaves.float().mean()),
            "changed": float((leaves & ~right).float().mean()),
        }
    return Predictors(heads.exits, tuple(found)), reached


def _look(model: SegmentedModel, heads: ExitHeads, hidden: Sequence[Tensor], read: _Read) -> None:
    """Add features and targets at every exit to `read`, from states (n, d) at the exits and after the last layer."""
    choices = [(normed(model, heads, e, state) @ model.outer.head.T).argmax(-1) for e, state in enumerate(hidden)]
    words = proposed(model, heads, hidden[0])
    for e, state in enumerate(hidden[:-1]):
        read.seen[e].append(features(model, heads, e, state, hidden[e - 1] if e else None, words))
        read.agree[e].append(choices[e] == choices[-1])
        read.among[e].append((words == choices[e][:, None]).any(-1))


def _trained(seen: Tensor, rightly: Tensor, plan: PredictorPlan) -> Tensors:
    """A predictor fitted to N tokens, rounded to float16 as in the saved file."""
    import torch
    import torch.nn.functional as F

    drawn = torch.Generator().manual_seed(plan.seed)
    fitted = dict(untrained(plan.width, drawn, seen.device))
    fitted["mean"], fitted["spread"] = seen.mean(0), seen.std(0).clamp_min(1e-3)
    learns = [fitted[name].requires_grad_(True) for name in ("weight", "bias", "out", "offset")]
    optimizer = torch.optim.Adam(learns, lr=_LEARNING_RATE)
    steps = min(_MOST_STEPS, max(1, _EPOCHS * len(seen) // _BATCH))
    target = rightly.float()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(len(seen), (min(_BATCH, len(seen)),), generator=drawn).to(seen.device)
        loss = F.binary_cross_entropy_with_logits(logit(fitted, seen[rows]), target[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return {name: tensor.detach().half().float() for name, tensor in fitted.items()}
