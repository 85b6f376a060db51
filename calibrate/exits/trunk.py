"""Trains a model for early exit: low-rank changes of its trunk, and adapters at its exits, by LayerSkip's recipe.

The frozen model is the teacher: at every exit and at full depth the loss is the KL divergence from its own full-depth
distribution on the same text (self-distillation). So the loss holds full depth close to its original output. Layer
dropout, the curriculum and the loss weights are those of `calibrate.exits.layer_skip`.

An adapter starts from an existing head at its depth, else from a regression of the last hidden state.

For each exit a second adapter is trained at the same depth of the frozen model, on the same tokens in the same order:
an attached exit for the same effort. The difference between the two is the benefit of changing the trunk.

The trunk's change is W + B A for every product of every layer, computed beside W, which needs no gradient.

A step depends only on the seed, its number, and three decisions that depend on time: which exits have joined, when the
learning rate begins to fall, and when the run ends. The decisions are kept with the state, so a run that was killed
continues from its last checkpoint and gives the same bits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrate.drafts import kept
from calibrate.exits import layer_skip
from calibrate.exits.layer_skip import Curriculum, LayerSkip
from calibrate.exits.low_rank import (
    Factors,
    Place,
    Target,
    first_factors,
    frequent_tokens,
    hidden_rows,
    target_of,
    through,
)
from calibrate.exits.skipping import with_changes, without_some
from calibrate.exits.training import Say, Tensors, first_adapter
from helios_sim import files
from helios_sim.live.kernels.interface import TORCH
from helios_sim.live.model.heads import ADAPTER

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import AdamW

    from helios_sim.live.memory.kv import Packed
    from helios_sim.live.model.decoder import SegmentedModel

STATE = "training.safetensors"
PARTS = ("qkv", "attention_out", "mlp_in", "mlp_out")
_FIRST_TEXTS = 32  # texts of the regression from which adapters start
_WARM_STEPS = 20
_KEEP_EVERY_S = 60.0
_TOLD_EVERY = 10  # steps


@dataclass(frozen=True, slots=True)
class TrunkPlan:
    """What to train and how. `identity` has the fields that change a run's bits."""

    exits: tuple[int, ...]  # depths in layers, ascending, below the model's last
    rank: int = 8
    parts: tuple[str, ...] = PARTS
    skip: LayerSkip = field(default_factory=LayerSkip)
    width: int = 128  # width of a new adapter's gated network
    learning_rate: float = 5e-4  # learning rate of the trunk's change
    adapter_learning_rate: float = 5e-4
    batch_texts: int = 2
    steps: int | None = None  # None: as many as the time allows
    fall: float = 0.25  # share of the run in which the learning rate falls to zero
    vocabulary: int = 6_144  # vocabulary, drawn and considered are as in calibrate.exits.training.Recipe
    drawn: int = 1_024
    considered: int = 8
    seed: int = 0

    def places(self, layers: int) -> tuple[Place, ...]:
        return tuple((layer, part) for layer in range(layers) for part in self.parts)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that the bits of a step depend on."""
        return {name: value for name, value in asdict(self).items() if name not in ("steps", "fall")}


@dataclass(slots=True)
class Progress:
    """The progress of a run, and decisions that depended on time."""

    step: int = 0
    tokens: int = 0
    spent_s: float = 0.0
    joined: int = 0  # number of exits in the gradual curriculum so far
    falls_from: int | None = None  # the step at which the learning rate begins to fall
    ends_at: int | None = None  # the step before which the run ends
    history: list[dict[str, Any]] = field(default_factory=list)  # mean losses, every few steps

    @property
    def over(self) -> bool:
        return self.ends_at is not None and self.step >= self.ends_at


@dataclass(frozen=True, slots=True, eq=False)
class TrainedTrunk:
    """The tensors that a run has learned."""

    factors: Mapping[Place, Factors]
    adapters: Mapping[int, Tensors]  # by depth, for the changed trunk
    attached: Mapping[int, Tensors]  # by depth, for the frozen trunk
    progress: Progress

    @property
    def short(self) -> str:
        """What the run lacks for want of time, in words; "" if nothing."""
        return "" if self.progress.over else "the time was over before the learning rate had fallen to zero"


def train_trunk(
    model: SegmentedModel,
    texts: Tensor,
    start: int,
    plan: TrunkPlan,
    folder: Path,
    budget_s: float | None = None,
    say: Say = print,
    first: Mapping[int, Tensors] | None = None,
    keep_every_s: float = _KEEP_EVERY_S,
    clock: Callable[[], float] = time.monotonic,
) -> TrainedTrunk:
    """Train on texts (n, T) of token ids, each of which follows the token `start`.

    Without `plan.steps` the run takes `budget_s` seconds; with `plan.steps`, at most `budget_s` seconds. Every text is
    read before any is read again. `first`: initial adapters by depth. `folder` keeps the state; a state of another
    plan, other texts or other initial adapters is not used.
    """
    began_s = clock()
    run = _Run(model, texts, start, plan, first or {})
    progress = run.resumed(folder / STATE) or Progress()
    if plan.steps is not None:
        progress.ends_at, progress.falls_from = plan.steps, round((1 - plan.fall) * plan.steps)
    elif budget_s is None:
        raise ValueError("a run needs a number of steps or a budget")
    before_s, kept_s, last_s = progress.spent_s, clock(), 0.0
    whole_s = None if budget_s is None else before_s + budget_s
    while not progress.over:
        step_began_s = clock()
        progress.spent_s = before_s + step_began_s - began_s
        if whole_s is not None:
            if progress.spent_s + last_s > whole_s:
                break
            if progress.ends_at is None and progress.spent_s >= (1 - plan.fall) * whole_s:
                left = round(progress.step * plan.fall / (1 - plan.fall))
                progress.falls_from, progress.ends_at = progress.step, progress.step + max(1, left)
        losses = run.step(progress, whole_s)
        now_s = clock()
        last_s = now_s - step_began_s
        progress.spent_s = before_s + now_s - began_s
        if progress.step % _TOLD_EVERY == 0 or progress.over:
            say(f"trunk: step {progress.step}, {progress.tokens:,} tokens, {losses}, {progress.spent_s:.0f} s")
        if now_s - kept_s >= keep_every_s:
            run.keep(folder / STATE, progress)
            kept_s = clock()
    run.keep(folder / STATE, progress)
    return run.found(progress)


class _Run:
    """The tensors of one run and their optimizer."""

    def __init__(
        self, model: SegmentedModel, texts: Tensor, start: int, plan: TrunkPlan, first: Mapping[int, Tensors]
    ) -> None:
        import torch

        self.plan, self.texts, self.start = plan, texts, start
        self.layers = model.architecture.n_layers
        self.teacher = copy.copy(model)
        self.teacher.kernels = TORCH
        places = plan.places(self.layers)
        originals = {(layer, part): getattr(model.layers[layer], part) for layer, part in places}
        self.factors = first_factors(originals, places, plan.rank, plan.seed)
        self.student = with_changes(self.teacher, self.factors)
        self.attached = self._first_adapters(first)
        self.adapters = {d: {k: t.clone() for k, t in of.items()} for d, of in self.attached.items()}
        self.groups: dict[str, list[Tensor]] = {
            "trunk": [t for of in self.factors.values() for t in (of.down, of.up)],
            "exits": [t for of in self.adapters.values() for k, t in of.items() if k != "scale"],
            "attached": [t for of in self.attached.values() for k, t in of.items() if k != "scale"],
        }
        self.identity = self._digest()
        for tensor in self.learned:
            tensor.requires_grad_(True)
        rates = {"trunk": plan.learning_rate}
        groups = [{"params": of, "rate": rates.get(k, plan.adapter_learning_rate)} for k, of in self.groups.items()]
        self.optimizer: AdamW = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self.frequent = torch.from_numpy(
            frequent_tokens([texts.flatten().cpu().numpy()], plan.vocabulary, len(model.outer.head))
        ).to(model.device)
        self.rates = np.array(layer_skip.drop_rates(self.layers, plan.skip.drop_most))
        self._attends: dict[int, Packed] = {}
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self._sums: dict[str, list[float]] = {}

    @property
    def learned(self) -> list[Tensor]:
        return [tensor for group in self.groups.values() for tensor in group]

    def step(self, progress: Progress, whole_s: float | None) -> str:
        """Run one training step. Returns the mean losses of the latest steps, in words."""
        import torch

        plan, step = self.plan, progress.step
        exits = self._exits(progress, whole_s)
        depths = (*exits, self.layers)
        shares = layer_skip.weights(depths, self.layers, plan.skip.loss_scale)
        drawn = np.random.default_rng((plan.seed, 1, step))
        batch = self._texts(step)
        left_in = drawn.random((self.layers, len(batch))) >= self.rates[:, None]
        others = torch.from_numpy(drawn.integers(len(self.teacher.outer.head), size=plan.drawn)).to(batch.device)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self._rate(progress)
        self.optimizer.zero_grad(set_to_none=True)
        frozen = dict(zip((*plan.exits, self.layers), self._frozen(batch), strict=True))
        with torch.no_grad():
            target = target_of(self.teacher, frozen[self.layers], plan.considered, self.frequent, others)
        states = self._trained(batch, depths, left_in)
        self._learn(depths, shares, states, frozen, target)
        for tensors in self.groups.values():  # separately, so that other gradients do not affect attached exits
            torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        self.optimizer.step()
        progress.step += 1
        progress.tokens += batch.numel()
        return self._told(progress)

    def _learn(
        self,
        depths: Sequence[int],
        shares: Sequence[float],
        states: Sequence[Tensor],
        frozen: Mapping[int, Tensor],
        target: Target,
    ) -> None:
        """Gradients of the losses at these depths, in the changed model and at the exits attached to the frozen one."""
        import torch

        losses = []
        for depth, share, state in zip(depths, shares, states, strict=True):
            loss = target.divergence(self.student, self.adapters.get(depth), state)
            losses.append(share * loss)
            self._note(str(depth), loss)
            if depth in self.attached:
                beside = target.divergence(self.teacher, self.attached[depth], frozen[depth])
                (share * beside).backward()
                self._note(f"attached {depth}", beside)
        torch.stack(losses).sum().backward()

    def _exits(self, progress: Progress, whole_s: float | None) -> tuple[int, ...]:
        plan = self.plan
        if plan.skip.curriculum is Curriculum.ROTATIONAL:
            return layer_skip.rotated(plan.exits, progress.step, plan.skip.every)
        if plan.steps is not None:
            share = progress.step / plan.steps
        else:
            share = progress.spent_s / (whole_s or math.inf)
        count = max(progress.joined, len(layer_skip.joined(plan.exits, share)))
        progress.joined = count  # once joined, an exit stays
        return plan.exits[len(plan.exits) - count :]

    def _rate(self, progress: Progress) -> float:
        """The learning rate's factor: rises for some steps, stays, and falls to zero at the end."""
        factor = min(1.0, (progress.step + 1) / _WARM_STEPS)
        if progress.falls_from is not None and progress.ends_at is not None and progress.step >= progress.falls_from:
            factor *= (progress.ends_at - progress.step) / (progress.ends_at - progress.falls_from)
        return factor

    def _texts(self, step: int) -> Tensor:
        """The step's texts (B, T). Each pass over all texts has a new random order."""
        first = step * self.plan.batch_texts
        chosen = [self._text(number) for number in range(first, first + self.plan.batch_texts)]
        return self.texts[chosen].to(self.teacher.device)

    def _text(self, number: int) -> int:
        again, place = divmod(number, len(self.texts))
        if self._order is None or self._order[0] != again:
            drawn = np.random.default_rng((self.plan.seed, 2, again))
            self._order = (again, drawn.permutation(len(self.texts)))
        return int(self._order[1][place])

    def _frozen(self, batch: Tensor) -> list[Tensor]:
        """Hidden states (B T, d) of the frozen model at the exits and after the last layer."""
        import torch

        rows = hidden_rows(batch.to(self.teacher.device), self.start)
        with torch.no_grad():
            return through(self.teacher, rows, None, 0, (*self.plan.exits, self.layers))

    def _trained(self, batch: Tensor, depths: Sequence[int], left_in: NDArray[np.bool_]) -> list[Tensor]:
        """Hidden states (B T, d) of the changed model at each depth; `left_in` (L, B): whether a text runs a layer."""
        rows = hidden_rows(batch, self.start)
        return without_some(self.student, rows, depths, left_in, self._attend)

    def _attend(self, texts: int, tokens: int) -> Packed:
        from helios_sim.live.memory.kv import Packed

        if texts not in self._attends:
            model = self.teacher
            self._attends[texts] = Packed(model.architecture, texts, tokens, model.dtype, model.device)
        return self._attends[texts]

    def _note(self, name: str, loss: Tensor) -> None:
        self._sums.setdefault(name, []).append(float(loss.detach()))

    def _told(self, progress: Progress) -> str:
        means = {name: round(float(np.mean(values)), 4) for name, values in sorted(self._sums.items())}
        if progress.step % _TOLD_EVERY == 0:
            progress.history.append({"step": progress.step, "tokens": progress.tokens, **means})
            self._sums.clear()
        return ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())

    def found(self, progress: Progress) -> TrainedTrunk:
        def plain(of: Tensors) -> Tensors:
            return {name: tensor.detach() for name, tensor in of.items()}

        return TrainedTrunk(
            {place: Factors(of.down.detach(), of.up.detach()) for place, of in self.factors.items()},
            {depth: plain(of) for depth, of in self.adapters.items()},
            {depth: plain(of) for depth, of in self.attached.items()},
            progress,
        )

    def _digest(self) -> str:
        """A digest of the plan, the texts and the first tensors, which identifies the run of a state."""
        digest = hashlib.sha256(json.dumps([self.plan.identity, self.start], sort_keys=True).encode())
        for tensor in (self.texts, *self.learned):
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _first_adapters(self, first: Mapping[int, Tensors]) -> dict[int, Tensors]:
        """Initial adapters by depth: from `first`, else a regression of the last hidden state on some texts."""
        plan = self.plan
        found = {d: {k: first[d][k].float().clone() for k in ADAPTER} for d in plan.exits if d in first}
        if len(found) < len(plan.exits):
            *hidden, last = self._frozen(self.texts[:_FIRST_TEXTS])
            states = dict(zip(plan.exits, hidden, strict=True))
            found |= {d: first_adapter(h, last, plan.width, plan.seed) for d, h in states.items() if d not in found}
        return {d: found[d] for d in plan.exits}

    def keep(self, path: Path, progress: Progress) -> None:
        from safetensors.torch import save

        tensors = {}
        for number, tensor in enumerate(self.learned):
            tensors[f"{number}.value"] = tensor.detach().contiguous()
            for name, value in self.optimizer.state.get(tensor, {}).items():
                tensors[f"{number}.{name}"] = value.contiguous()
        told = {"progress": json.dumps(asdict(progress)), "identity": self.identity, "sums": json.dumps(self._sums)}
        files.write_bytes(path, save(tensors, told))

    def resumed(self, path: Path) -> Progress | None:
        """Resume from a kept state. None if there is no state, or it belongs to another run."""
        import torch
        from safetensors import safe_open

        def read(place: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
            with safe_open(place, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118

        found = kept(path, read)
        if found is None or found[1].get("identity") != self.identity:
            return None
        tensors, told = found
        with torch.no_grad():
            for number, tensor in enumerate(self.learned):
                tensor.copy_(tensors.pop(f"{number}.value"))
                names = [name for name in tensors if name.startswith(f"{number}.")]
                if names:
                    state = {name.partition(".")[2]: tensors.pop(name) for name in names}
                    on_device = {k: v if k == "step" else v.to(tensor.device) for k, v in state.items()}
                    self.optimizer.state[tensor] = on_device
        self._sums = json.loads(told["sums"])
        return Progress(**json.loads(told["progress"]))
