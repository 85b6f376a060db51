"""Two alternatives to adapters, for experiments: low-rank changes of the trunk, and a check on a shortlist.

LayerSkip (Elhoushi et al. 2024, https://arxiv.org/abs/2404.16710) trains a whole model so that its early layers answer
better. Here the trunk stays frozen except for W + B A with A (rank, in) and B (out, rank) in the last layers before
each exit. Deeper layers then read other hidden states, so full depth is trained to keep its original output:

    loss = KL(original full depth || full depth with changes) + mean over exits of KL(original full depth || exit)

Adapters at the exits are trained together with the changes. With rank 0 only adapters are trained, as the baseline.

A shortlist check is the largest probability among the N most frequent tokens alone, read through the exit's adapter. It
is too high if the exit's own token is not on the list, so it is calibrated against agreement like every other check.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibrate.exits.training import Say, Tensors, choices, teach
from helios_sim.live.model.heads import ADAPTER, adapted

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from helios_sim.live.model.architecture import Architecture
    from helios_sim.live.model.decoder import SegmentedModel

Array = NDArray[np.float64]
Place = tuple[int, str]  # layer, counted from 0, and the field of LayerWeights


def frequent_tokens(texts: Iterable[NDArray[np.int64]], count: int, vocabulary: int) -> NDArray[np.int64]:
    """The most frequent tokens of the texts, (count,), most frequent first; ties by token id."""
    occurrences = np.zeros(vocabulary, dtype=np.int64)
    for tokens in texts:
        occurrences += np.bincount(tokens, minlength=vocabulary)
    return np.argsort(-occurrences, kind="stable")[:count].astype(np.int64)


def shortlist_logit(model: SegmentedModel, adapter: Tensors, hidden: Tensor, words: Tensor) -> Array:
    """Uncalibrated logits (n,) of the largest probability among `words` (N,), at hidden states (n, d)."""
    p = choices(model, adapter, hidden, words)[1].double().cpu().numpy().clip(1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def in_layers(weights: int, architecture: Architecture) -> float:
    """The number of weights in units of one layer's weights: the cost if bandwidth is the limit."""
    return weights / sum(int(np.prod(shape)) for shape in architecture.layer_shapes().values())


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A low-rank change B A."""

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
    vocabulary: int = 6_144  # vocabulary, drawn and considered are as in calibrate.exits.training.Recipe
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
    """A copy of the model with W + B A in the factors' places. It shares all other weights with `model`.

    `originals` are the W in float32: a small change would be lost if W were rounded to the model's dtype.
    """
    changes: dict[int, dict[str, Tensor]] = {}
    for (layer, part), of in factors.items():
        weight = originals[layer, part] + of.up @ of.down
        changes.setdefault(layer, {})[part] = weight.to(model.dtype)
    found = copy.copy(model)
    found.layers = [replace(w, **changes.get(layer, {})) for layer, w in enumerate(model.layers)]
    return found


def first_factors(
    originals: Mapping[Place, Tensor], places: Iterable[Place], rank: int, seed: int
) -> dict[Place, Factors]:
    """Initial factors in float32 beside the weights. Their changes are zero."""
    import torch

    drawn = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts from the same values
    found = {}
    for place in places:
        (out, into), on = originals[place].shape, originals[place].device
        down = torch.randn(rank, into, generator=drawn).to(on) / math.sqrt(into)
        found[place] = Factors(down, torch.zeros(out, rank, device=on))
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
    """Train factors and adapters on texts (n, T) of token ids. Returns both, and the number of tokens read.

    Every text follows the token `start` and is read once; fewer texts are read if the time budget ends earlier. The
    learning rate falls to zero by the end.
    """
    import torch

    began = time.monotonic()
    factors = first_factors(originals, plan.places, plan.rank, plan.seed)
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
    """KL divergence from the original full depth for each exit and, last, for full depth: (E + 1,), nats per token.

    It is computed over the frequent tokens, the first choices of full depth, and further tokens drawn at random.
    """
    import torch

    rows, head = hidden_rows(batch, start), model.outer.head
    depths = (*plan.exits, model.architecture.n_layers)
    below = min(plan.layers)  # layers below are the same in both models
    with torch.no_grad():
        shared, last = through(original, rows, None, 0, (below, depths[-1]))
        others = torch.randint(len(head), (plan.drawn,), generator=drawn)
        target = target_of(original, last, plan.considered, frequent, others)
    found = through(model, rows, shared, below, depths)
    return torch.stack([target.divergence(model, adapters.get(d), h) for d, h in zip(depths, found, strict=True)])


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """The full-depth distribution at N tokens, over a part of the vocabulary."""

    words: Tensor  # (V, d), rows of the LM head
    logs: Tensor  # (N, V) log probabilities among them, float32

    def divergence(self, model: SegmentedModel, adapter: Tensors | None, hidden: Tensor) -> Tensor:
        """KL divergence from this target of the model's distribution at hidden states (N, d), in nats per token.

        The states go through the adapter, if there is one, and the model's own norm and head.
        """
        import torch
        import torch.nn.functional as F

        state = hidden if adapter is None else adapted(adapter, hidden).to(model.dtype)
        said = torch.log_softmax((model.normed(state) @ self.words.T).float(), -1)
        return F.kl_div(said, self.logs, reduction="batchmean", log_target=True)


def target_of(model: SegmentedModel, last: Tensor, considered: int, frequent: Tensor, others: Tensor) -> Target:
    """The target from hidden states (N, d) after the last layer.

    It covers the frequent tokens, the `considered` first choices of full depth, and `others`.
    """
    import torch

    teacher = teach(model, last, considered)
    words = model.outer.head[torch.unique(torch.cat((frequent, teacher.top.flatten(), others)))]
    return Target(words, torch.log_softmax((teacher.normed @ words.T).float(), -1))


def hidden_rows(batch: Tensor, start: int) -> Tensor:
    """The model's input (B, T) to predict each token of texts (B, T): shifted by one, the start token first."""
    import torch

    return torch.cat((torch.full_like(batch[:, :1], start), batch[:, :-1]), 1)


def through(
    model: SegmentedModel, rows: Tensor, hidden: Tensor | None, done: int, depths: Sequence[int]
) -> list[Tensor]:
    """Hidden states (B T, d) at each depth for tokens (B, T), starting from `hidden` after `done` layers if given."""
    from helios_sim.live.memory.kv import Packed

    attend = Packed(model.architecture, len(rows), rows.shape[1], model.dtype, model.device)
    state = model.embed(rows.flatten(), attend.positions) if hidden is None else hidden
    found = []
    for depth in depths:
        state = model.run(state, done, depth, attend)
        done = depth
        found.append(state)
    return found
