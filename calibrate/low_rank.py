"""Low-rank changes inside the trunk, trained with an early-exit loss. Knows tensors and losses, no text and no file.

LayerSkip (Elhoushi et al. 2024, https://arxiv.org/abs/2404.16710) trains a whole model so that its early layers answer
better. Here the trunk stays frozen but for W + B A with A (rank, in) and B (out, rank) in the last layers before each
exit. Deeper layers then read other hidden states, so full depth is held to what it said before:

    loss = KL(original full depth || full depth with changes) + mean over exits of KL(original full depth || exit)

Adapters at the exits learn along. With rank 0 only they do: what the changes are to be compared with.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calibrate.shortlist import frequent_tokens
from calibrate.training import Say, Tensors, teach
from helios_sim.live.model.heads import ADAPTER, adapted

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from helios_sim.live.model.decoder import SegmentedModel

Place = tuple[int, str]  # layer, counted from 0, and the field of LayerWeights


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One change B A."""

    down: Tensor  # A (rank, in)
    up: Tensor  # B (out, rank), 0 at the start


@dataclass(frozen=True, slots=True)
class LowRankPlan:
    """What to change and how to train it."""

    exits: tuple[int, ...]  # depths in layers, ascending
    before: int = 3  # layers changed before each exit
    rank: int = 16  # 0: adapters only
    parts: tuple[str, ...] = ("qkv", "attention_out", "mlp_out")
    learning_rate: float = 2e-3
    adapter_learning_rate: float = 3e-4
    batch_texts: int = 3
    vocabulary: int = 6_144  # as in calibrate.training.Recipe, likewise the next two
    drawn: int = 1_024
    considered: int = 8
    seed: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """The changed layers, ascending."""
        return tuple(sorted({layer for e in self.exits for layer in range(max(0, e - self.before), e)}))

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple((layer, part) for layer in self.layers for part in self.parts) if self.rank else ()


def changed(
    model: SegmentedModel, originals: Mapping[Place, Tensor], factors: Mapping[Place, Factors]
) -> SegmentedModel:
    """The model with W + B A in the factors' places; `model` stays as it is and shares all other weights.

    `originals` are the W in float32: a change too small for the model's dtype would be lost if W lay on its grid.
    """
    changes: dict[int, dict[str, Tensor]] = {}
    for (layer, part), of in factors.items():
        weight = originals[layer, part] + of.up @ of.down
        changes.setdefault(layer, {})[part] = weight.to(model.dtype)
    found = copy.copy(model)
    found.layers = [replace(w, **changes.get(layer, {})) for layer, w in enumerate(model.layers)]
    return found


def first_factors(originals: Mapping[Place, Tensor], plan: LowRankPlan) -> dict[Place, Factors]:
    """Changes that change nothing yet."""
    import torch

    drawn = torch.Generator().manual_seed(plan.seed)
    found = {}
    for place in plan.places:
        out, into = originals[place].shape
        down = torch.randn(plan.rank, into, generator=drawn) / math.sqrt(into)
        found[place] = Factors(down, torch.zeros(out, plan.rank))
    return found


def train_low_rank(
    model: SegmentedModel,
    originals: Mapping[Place, Tensor],
    adapters: Mapping[int, Tensors],
    texts: Tensor,
    start: int,
    plan: LowRankPlan,
    budget_s: float | None = None,
    say: Say = print,
) -> tuple[dict[Place, Factors], dict[int, Tensors], int]:
    """Factors, adapters by depth and the tokens read, from adapters by depth and texts (n, T) of token ids.

    Every text stands after the token `start`. Reads every text once, or fewer with the learning rate brought to zero
    by the time budget, of which what full depth says about the texts takes its part.
    """
    import torch

    began = time.monotonic()
    factors = first_factors(originals, plan)
    tensors = {d: {k: t.clone() for k, t in adapters[d].items() if k in ADAPTER} for d in plan.exits}
    learned = [t.requires_grad_() for of in tensors.values() for k, t in of.items() if k != "scale"]
    inside = [t.requires_grad_() for of in factors.values() for t in (of.down, of.up)]
    groups = [{"params": learned, "rate": plan.adapter_learning_rate}]
    groups += [{"params": inside, "rate": plan.learning_rate}] if inside else []
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    drawn = torch.Generator().manual_seed(plan.seed)
    order = torch.randperm(len(texts), generator=drawn)
    frequent = torch.from_numpy(frequent_tokens([texts.flatten().numpy()], plan.vocabulary, len(model.outer.head)))
    steps = max(1, len(texts) // plan.batch_texts)
    seen = 0
    for step in range(steps):
        progress = max(step / steps, 0.0 if budget_s is None else (time.monotonic() - began) / budget_s)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * progress))
        batch = texts[order[step * plan.batch_texts : (step + 1) * plan.batch_texts]]
        optimizer.zero_grad(set_to_none=True)
        losses = exit_losses(model, changed(model, originals, factors), tensors, batch, start, plan, frequent, drawn)
        (losses[-1] + losses[:-1].mean()).backward()
        torch.nn.utils.clip_grad_norm_([*learned, *inside], 1.0)
        optimizer.step()
        seen += batch.numel()
        if step % 10 == 0:
            shown = ", ".join(f"{x:.3f}" for x in losses.tolist())
            say(f"low rank: step {step} of {steps}, divergence {shown}, {time.monotonic() - began:.0f} s")
    for tensor in (*learned, *inside):
        tensor.requires_grad_(False)
    return factors, tensors, seen


def exit_losses(
    original: SegmentedModel,
    model: SegmentedModel,
    adapters: Mapping[int, Tensors],
    batch: Tensor,
    start: int,
    plan: LowRankPlan,
    frequent: Tensor,
    drawn: Generator,
) -> Tensor:
    """KL from the original's full depth of each exit and, last, of full depth, (E + 1,), in nats a token.

    Over a part of the vocabulary: the frequent tokens, those that full depth considers, others drawn at random.
    """
    import torch
    import torch.nn.functional as F

    rows, head = hidden_rows(batch, start), model.outer.head
    depths = (*plan.exits, model.architecture.n_layers)
    below = min(plan.layers)  # what lies below is the same for both
    with torch.no_grad():
        shared, last = through(original, rows, None, 0, (below, depths[-1]))
        teacher = teach(original, last, plan.considered)
        others = torch.randint(len(head), (plan.drawn,), generator=drawn)
        words = head[torch.unique(torch.cat((frequent, teacher.top.flatten(), others)))]
        target = torch.log_softmax((teacher.normed @ words.T).float(), -1)
    losses = []
    found = through(model, rows, shared, below, depths)
    for depth, hidden in zip(depths, found, strict=True):
        state = adapted(adapters[depth], hidden).to(model.dtype) if depth in adapters else hidden
        said = torch.log_softmax((model.normed(state) @ words.T).float(), -1)
        losses.append(F.kl_div(said, target, reduction="batchmean", log_target=True))
    return torch.stack(losses)


def hidden_rows(batch: Tensor, start: int) -> Tensor:
    """What the model reads to predict each token of texts (B, T): (B, T), the start token first."""
    import torch

    return torch.cat((torch.full_like(batch[:, :1], start), batch[:, :-1]), 1)


def through(
    model: SegmentedModel, rows: Tensor, hidden: Tensor | None, done: int, depths: Sequence[int]
) -> list[Tensor]:
    """Hidden states (B T, d) at each depth for tokens (B, T); from `hidden` after `done` layers where it is given."""
    from helios_sim.live.memory.kv import Packed

    attend = Packed(model.architecture, len(rows), rows.shape[1], model.dtype, model.device)
    state = model.embed(rows.flatten(), attend.positions) if hidden is None else hidden
    found = []
    for depth in depths:
        state = model.run(state, done, depth, attend)
        done = depth
        found.append(state)
    return found
