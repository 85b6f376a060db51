"""Predictors in place of the head, as SpecEE has them (arXiv 2504.08850): what they read, and how they are trained.

The head of the first exit proposes `WORDS` words for a token; SpecEE takes them from a draft model, which there is none
of here. At every exit a predictor reads 3 x WORDS numbers: the logits of these words there, which are as many products
with columns of the head; their softmax among themselves; and by how much that has changed since the exit before, whose
state it reads for this (at the first exit: since nothing). SpecEE's code takes the last exit at which a predictor ran;
the exit before makes what is recorded the same whichever exits check.

A predictor is a network of two layers, as in SpecEE's code, trained on texts that are not traced: on whether the exit's
own word is full depth's and among the words, so that the token leaves rightly where the head is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrate.exits.hidden import Passage, batches, kept_tensors, start_token, states
from calibrate.exits.training import largest
from calibrate.stages import NotEnoughTime
from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.exits.rule import WORDS

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.heads import ExitHeads

FILE = "predictors.safetensors"
FEATURES = 3 * WORDS
TENSORS = ("mean", "spread", "weight", "bias", "out", "offset")
_CHUNK_TOKENS = 512
_LEARNING_RATE, _BATCH, _MOST_STEPS, _EPOCHS = 2e-3, 512, 4_000, 40
SURE = 0.5  # from which SpecEE asks the head

Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True, slots=True, eq=False)
class Predictors:
    """One for each early exit, in the order of the exits."""

    exits: tuple[int, ...]
    tensors: tuple[Tensors, ...]  # mean and spread (FEATURES,), weight (width, FEATURES), bias and out (width,), offset

    @property
    def width(self) -> int:
        return len(self.tensors[0]["bias"])

    def predicted(self, exit_index: int, seen: Tensor) -> Tensor:
        """The probability (n,) that a token leaves rightly, from features (n, FEATURES)."""
        return _logit(self.tensors[exit_index], seen).sigmoid()

    def digest(self) -> str:
        """Of the numbers, so that what was read with others is not taken for theirs."""
        import hashlib

        found = hashlib.sha256()
        for name, tensor in sorted(self._named().items()):
            found.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return found.hexdigest()

    def write(self, folder: Path) -> None:
        """Writes the file, in float16 as it was rounded after training."""
        from safetensors.torch import save

        content = save({name: tensor.half().contiguous().cpu() for name, tensor in self._named().items()})
        files.write_bytes(folder / FILE, content)

    def _named(self) -> dict[str, Tensor]:
        pairs = zip(self.exits, self.tensors, strict=True)
        return {f"{depth}.{name}": tensor for depth, of in pairs for name, tensor in of.items()}


def read_predictors(folder: Path, device: Any = "cpu") -> Predictors:
    """Those that were written there. UserError where the file is missing or damaged."""
    stored = kept_tensors(folder / FILE)
    fix = "train them anew with `python -m calibrate +task=predictors`"
    if stored is None:
        raise UserError("predictors", str(folder / FILE), "a file of predictors", fix)
    exits = tuple(sorted({int(name.partition(".")[0]) for name in stored}))
    if set(stored) != {f"{depth}.{name}" for depth in exits for name in TENSORS}:
        raise UserError("predictors", str(folder / FILE), f"{', '.join(TENSORS)} of each exit", fix)
    of = (({name: stored[f"{depth}.{name}"].float().to(device) for name in TENSORS}) for depth in exits)
    return Predictors(exits, tuple(of))


def proposed(model: SegmentedModel, heads: ExitHeads, first: Tensor) -> Tensor:
    """The words (n, WORDS) that the first exit finds likeliest, from the states (n, d) there."""
    return largest(_normed(model, heads, 0, first) @ model.outer.head.T, WORDS)[1]


def features(
    model: SegmentedModel, heads: ExitHeads, exit_index: int, state: Tensor, before: Tensor | None, words: Tensor
) -> Tensor:
    """(n, FEATURES) at an exit, from the states (n, d) there and at the exit before (None: there is none)."""
    import torch

    columns = model.outer.head[words].float()  # (n, WORDS, d)
    logits = torch.einsum("nd,nkd->nk", _normed(model, heads, exit_index, state).float(), columns)
    shares = logits.softmax(-1)
    change = shares
    if before is not None:
        earlier = torch.einsum("nd,nkd->nk", _normed(model, heads, exit_index - 1, before).float(), columns)
        change = shares - earlier.softmax(-1)
    return torch.cat((logits, shares, change), -1)


def signed(predicted: Tensor, choice: Tensor, words: Tensor) -> Tensor:
    """The measure `predictor`, (n,): negative where the exit's own word (n,) is none of the words (n, WORDS)."""
    return predicted * ((words == choice[:, None]).any(-1).float() * 2 - 1)


def untrained(width: int, generator: Any, device: Any) -> Tensors:
    """A predictor of the right size, to be trained or timed."""
    import torch

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    return {
        "mean": torch.zeros(FEATURES, device=device), "spread": torch.ones(FEATURES, device=device),
        "weight": drawn(width, FEATURES) / math.sqrt(FEATURES), "bias": torch.zeros(width, device=device),
        "out": drawn(width) / math.sqrt(width), "offset": torch.zeros((), device=device),
    }  # fmt: skip


def drawn_predictors(exits: tuple[int, ...], device: Any, seed: int, width: int = 256) -> Predictors:
    """Predictors of the right size that have learned nothing, for timing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return Predictors(exits, tuple(untrained(width, generator, device) for _ in exits))


@dataclass(frozen=True, slots=True)
class PredictorPlan:
    """How predictors are trained."""

    width: int = 256
    seed: int = 0
    most_s: float | None = None  # seconds for reading texts; None: no limit


@dataclass(slots=True, eq=False)
class _Read:
    """What was read of N tokens, by exit."""

    seen: list[list[Tensor]]  # (n, FEATURES) of each batch
    agree: list[list[Tensor]]  # (n,) the exit's word is full depth's
    among: list[list[Tensor]]  # (n,) it is one of the words


def train_predictors(
    model: SegmentedModel,
    tokenizer: Any,
    heads: ExitHeads,
    passages: Sequence[Passage],
    plan: PredictorPlan,
    tell: Callable[[str, float | None], None],
    spent_s: Callable[[], float],
) -> tuple[Predictors, dict[str, Any]]:
    """The predictors, and what they reach on every fifth batch of the texts, which was kept from them.

    Raises NotEnoughTime where no two batches could be read.
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
        p = _logit(trained, torch.cat([seen[i] for i in judged])).sigmoid()
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
    """Features and truth at every exit, from states (n, d) at the exits and after the last layer."""
    choices = [(_normed(model, heads, e, state) @ model.outer.head.T).argmax(-1) for e, state in enumerate(hidden)]
    words = proposed(model, heads, hidden[0])
    for e, state in enumerate(hidden[:-1]):
        read.seen[e].append(features(model, heads, e, state, hidden[e - 1] if e else None, words))
        read.agree[e].append(choices[e] == choices[-1])
        read.among[e].append((words == choices[e][:, None]).any(-1))


def _trained(seen: Tensor, rightly: Tensor, plan: PredictorPlan) -> Tensors:
    """A predictor fitted to N tokens, rounded to float16 as it is kept."""
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
        loss = F.binary_cross_entropy_with_logits(_logit(fitted, seen[rows]), target[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return {name: tensor.detach().half().float() for name, tensor in fitted.items()}


def _logit(of: Tensors, seen: Tensor) -> Tensor:
    inside = ((seen - of["mean"]) / of["spread"]) @ of["weight"].T + of["bias"]
    return inside.relu() @ of["out"] + of["offset"]


def _normed(model: SegmentedModel, heads: ExitHeads, exit_index: int, state: Tensor) -> Tensor:
    """What the head reads of the states (n, d) at an exit; one past the exits is full depth."""
    return model.normed(heads.adapt(exit_index, state).to(model.dtype))
