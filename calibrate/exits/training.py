"""Training of adapters and checks on hidden states of a frozen model.

**Adapter**: starts from a ridge regression of the last layer's hidden state, then minimizes the KL divergence to the
full-depth distribution (mixed with its own first choice, since agreement counts). The divergence is taken over a part
of the vocabulary: the tokens that full depth considers most often, the tokens that it considers at the batch's
positions, and tokens drawn at random. The cost is a sixth of SmolLM2's whole vocabulary, and a thirtieth of Gemma's.
Matrix products are in the model's dtype, parameters and softmax in float32.

**Check**: a small network on the hidden state, trained on whether the adapter's token equals full depth's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibrate.exits.reliability import fit_logistic
from helios_sim.live.model.heads import adapted, check_logit, scaled
from helios_sim.live.model.predictors import largest

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.model.decoder import SegmentedModel

Tensors = dict[str, "Tensor"]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How heads are trained."""

    width: int = 256  # width of the adapter's gated network
    adapter_share: float = 0.67  # share of the training tokens for adapters; checks use these and the rest
    check_width: int = 256
    check_soft: float = 0.6  # weight of the exit's own calibrated probability in a check's target
    vocabulary: int | None = 6_144  # tokens compared in every batch, by rank at full depth; None: all
    drawn: int = 1_024  # further tokens drawn at random for each batch
    considered: int = 8  # first choices of full depth that count as considered
    sharpen: float = 0.25  # weight of full depth's first choice in the target, beside its distribution
    epochs: float = 2.0
    check_epochs: float = 6.0
    batch: int = 512  # tokens
    learning_rate: float = 1e-3
    check_learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """The full-depth output at N tokens."""

    normed: Tensor  # (N, d), hidden states after the final norm
    top: Tensor  # (N, considered), its first choices, best first


def teach(model: SegmentedModel, last: Tensor, considered: int) -> Teacher:
    """The full-depth choices for hidden states (N, d) after the last layer."""
    import torch

    normed, top = [], []
    with torch.inference_mode():
        for chunk in last.split(512):
            normed.append(model.normed(chunk))
            top.append(largest(normed[-1] @ model.outer.head.T, considered)[1])
    return Teacher(torch.cat(normed), torch.cat(top))


def common_tokens(teacher: Teacher, count: int, vocabulary: int) -> NDArray[np.int64]:
    """The tokens that full depth considers most often, (count,), most frequent first."""
    counts = np.bincount(teacher.top.cpu().numpy().ravel(), minlength=vocabulary)
    return np.argsort(-counts, kind="stable")[:count].astype(np.int64)


def first_adapter(hidden: Tensor, last: Tensor, width: int, seed: int) -> Tensors:
    """An adapter with the linear part from a ridge regression of `last` on `hidden`, both (N, d) divided by rms."""
    import torch

    d, on = hidden.shape[1], hidden.device
    drawn = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts from the same values
    unit, _ = scaled(torch.ones(d, device=on), hidden)
    scale = 1 / unit.std(0).clamp_min(1e-4)
    x, z = scaled(scale, hidden)
    target = scaled(torch.ones(d, device=on), last)[0] - x
    ones = torch.cat((z, torch.ones(len(z), 1, device=on)), 1)
    gram = ones.T @ ones
    gram += 0.003 * len(z) * torch.eye(d + 1, device=on)
    solved = torch.linalg.solve(gram, ones.T @ target).T
    return {
        "scale": scale,
        "linear": solved[:, :d].contiguous(),
        "bias": solved[:, d].contiguous(),
        "gate": torch.randn(width, d, generator=drawn).to(on) / math.sqrt(d),
        "up": torch.randn(width, d, generator=drawn).to(on) / math.sqrt(d),
        "down": torch.zeros(d, width, device=on),
    }


def train_adapters(
    model: SegmentedModel,
    teacher: Teacher,
    hidden: Callable[[int, Tensor], Tensor],
    adapters: dict[int, Tensors],
    recipe: Recipe,
    deadline: Callable[[], float],
    say: Say,
) -> None:
    """Train the adapters (by depth) in place. `hidden(depth, rows)` gives hidden states; rows index the teacher's.

    Training ends after `recipe.epochs`, or earlier when `deadline()`, the spent share of the time budget, reaches 1.
    The learning rate falls to zero by the end.
    """
    import torch

    head, n = model.outer.head, len(teacher.normed)
    on = head.device
    common = None
    if recipe.vocabulary is not None:
        common = torch.from_numpy(common_tokens(teacher, recipe.vocabulary, len(head))).to(on)
    trained = [t.requires_grad_(True) for of in adapters.values() for name, t in of.items() if name != "scale"]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    drawn = torch.Generator().manual_seed(recipe.seed)
    steps = max(1, int(recipe.epochs * n / recipe.batch))
    order = torch.cat([torch.randperm(n, generator=drawn) for _ in range(math.ceil(recipe.epochs) + 1)])
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        progress = max(step / steps, deadline())
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * progress))
        rows = order[step * recipe.batch : (step + 1) * recipe.batch]
        compared, words, line = torch.arange(len(head), device=on), head, torch.arange(len(rows), device=on)
        if common is not None:
            others = torch.randint(len(head), (recipe.drawn,), generator=drawn).to(on)
            compared = torch.unique(torch.cat((common, teacher.top[rows].flatten(), others)))
            words = head[compared]
        target = torch.softmax((teacher.normed[rows] @ words.T).float(), -1) * (1 - recipe.sharpen)
        choice = torch.searchsorted(compared, teacher.top[rows, 0].contiguous())
        target[line, choice] += recipe.sharpen
        optimizer.zero_grad(set_to_none=True)
        for depth, tensors in adapters.items():
            normed = model.normed(adapted(tensors, hidden(depth, rows)).to(model.dtype))
            with torch.no_grad():
                logits = (normed @ words.T).float()
                q = torch.softmax(logits, -1)
                running = 0.98 * running + 0.02 * float(-(q[line, choice] + 1e-9).log().mean())
                slope = (q - target).to(model.dtype)  # gradient of the cross entropy by the logits
                gradient = (slope @ words) / len(rows)
            normed.backward(gradient)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 == 0:
            say(f"adapters: step {step} of {steps}, loss {running:.3f}, {time.monotonic() - started:.0f} s")
    for tensor in trained:
        tensor.requires_grad_(False)


def choices(
    model: SegmentedModel, tensors: Tensors | None, hidden: Tensor, words: Tensor | None = None, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """First choice and its probability, (N,) each, at hidden states (N, d), among `words` (None: all).

    The states go through the adapter `tensors`, if given.
    """
    import torch

    head = model.outer.head if words is None else model.outer.head[words]
    found, sure = [], []
    with torch.inference_mode():
        for part in hidden.split(chunk):
            state = part if tensors is None else adapted(tensors, part).to(model.dtype)
            logits = model.normed(state) @ head.T
            peak, best = logits.max(-1, keepdim=True)
            found.append(best[:, 0])
            sure.append(1 / (logits - peak).float().exp_().sum(-1))
    index = torch.cat(found)
    return (index if words is None else words[index]), torch.cat(sure)


def exit_logits(model: SegmentedModel, tensors: Tensors, hidden: Tensor) -> Tensor:
    """Logits (N, V) in the model's dtype, from hidden states (N, d) through an adapter."""
    import torch

    with torch.inference_mode():
        return model.normed(adapted(tensors, hidden).to(model.dtype)) @ model.outer.head.T


def confidences(logits: Tensor, temperature: float, rows: int = 16) -> NDArray[np.float64]:
    """The largest probability (N,) of each row of logits (N, V) divided by the temperature."""
    import torch

    with torch.inference_mode():
        parts = (part.float() / temperature for part in logits.split(rows))
        found = torch.cat([1 / (part - part.amax(-1, keepdim=True)).exp_().sum(-1) for part in parts])
    return found.double().cpu().numpy()


def softened(probability: Tensor, agree: Tensor, share: float) -> Tensor:
    """Targets of a check, (N,): agreement mixed with the exit's own calibrated probability of agreement.

    The agreement of a single token is noisy. The exit's probability, calibrated on the same tokens, has less noise and
    is a function of the hidden state, so a check needs fewer tokens to learn.
    """
    import torch

    p = probability.double().clamp(1e-6, 1 - 1e-6)
    logit = torch.log(p / (1 - p))
    slope, offset = fit_logistic(logit.cpu().numpy(), agree.cpu().numpy())
    return share * torch.sigmoid(slope * logit + offset).float() + (1 - share) * agree.float()


def train_check(hidden: Tensor, target: Tensor, scale: Tensor, recipe: Recipe) -> Tensors:
    """A check trained to predict `target` (N,), between 0 and 1, from hidden states (N, d)."""
    import torch
    import torch.nn.functional as F

    d, width, on = hidden.shape[1], recipe.check_width, hidden.device
    drawn = torch.Generator().manual_seed(recipe.seed)
    tensors: Tensors = {
        "check_in": torch.randn(width, d, generator=drawn).to(on) / math.sqrt(d),
        "check_bias": torch.zeros(width, device=on),
        "check_out": torch.randn(width, generator=drawn).to(on) / math.sqrt(width),
        "check_offset": torch.zeros((), device=on),
    }
    trained = [t.requires_grad_(True) for t in tensors.values()]
    optimizer = torch.optim.AdamW(trained, lr=recipe.check_learning_rate, weight_decay=0.02)
    n, batch = len(target), 1024
    steps = max(1, int(recipe.check_epochs * n / batch))
    order = torch.cat([torch.randperm(n, generator=drawn) for _ in range(math.ceil(recipe.check_epochs) + 1)])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.check_learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = order[step * batch : (step + 1) * batch]
        logit = check_logit({**tensors, "scale": scale}, hidden[rows])
        loss = F.binary_cross_entropy_with_logits(logit, target[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in tensors.items()}


def fold(check: Tensors, slope: float, offset: float) -> Tensors:
    """The check with its logit scaled by `slope` and shifted by `offset`."""
    return {
        **check,
        "check_out": check["check_out"] * slope,
        "check_offset": check["check_offset"] * slope + offset,
    }


def check_logits(tensors: Tensors, hidden: Tensor, chunk: int = 8192) -> NDArray[np.float64]:
    """The check's logits (N,) at hidden states (N, d)."""
    import torch

    with torch.inference_mode():
        return torch.cat([check_logit(tensors, part) for part in hidden.split(chunk)]).double().cpu().numpy()
