"""A subject whose every part takes a time in closed form on a virtual clock: the oracle of what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from calibrate.measure.subject import Subject, TableLimits
from fake_device import VirtualClock, VirtualDevice
from helios_sim.live.kernels.interface import TORCH
from helios_sim.live.memory.kv import MixedStep
from helios_sim.live.model.architecture import Architecture, Rope

LIMITS = TableLimits(max_batch=8, max_rows=64, max_chunk=64, max_kv_tokens=256, max_head_rows=16)
ARCHITECTURE = Architecture(
    "gemma3", n_layers=6, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16, vocab_size=32,
    max_context_tokens=256, norm_eps=1e-6, activation="gelu_tanh", tied_embeddings=True, attention_scale=0.5,
    rope=Rope(1e4), window_tokens=64, sliding_rope=Rope(1e4), sliding=(True, True, False) * 2,
)  # fmt: skip


@dataclass
class Costs:
    """Seconds. All are linear in rows and bilinear in (rows, length), unless a knee or a factor says otherwise."""

    knee: int = 1  # dense layers cost the same up to so many rows
    mixed: float = 1.0  # of the layers, where prompts and decodes share a run
    speed: float = 1.0

    def embedding(self, rows: int) -> float:
        return self.speed * (1e-5 + 1e-7 * rows)

    def dense(self, rows: int) -> float:
        return self.speed * (1e-3 + 1e-5 * max(rows, self.knee))

    def kv_projection(self, rows: int) -> float:
        return self.speed * (1e-4 + 2e-6 * rows)

    def head(self, rows: int) -> float:
        return self.speed * (4e-3 + 1e-4 * rows)

    def classifier(self, rows: int) -> float:
        return self.speed * (3e-6 + 1e-7 * rows)

    def predictor(self, rows: int) -> float:
        return self.speed * (2e-5 + 3e-7 * rows)

    def decode(self, slides: bool, kv_tokens: Sequence[int]) -> float:
        """By the longest context of the batch, as our engine reads them."""
        total = len(kv_tokens) * max(kv_tokens)
        return self.speed * (1e-4 * len(kv_tokens) + (1e-6 if slides else 3e-6) * total)

    def prefill(self, slides: bool, tokens: int, context_tokens: int) -> float:
        return self.speed * (1e-4 + 1e-6 * tokens + (1e-8 if slides else 5e-8) * tokens * context_tokens)


class StubStep:
    """An attention step that only takes its time."""

    def __init__(self, clock: VirtualClock, cost_s: Callable[[bool], float]) -> None:
        self.rotations = [None] * ARCHITECTURE.n_layers
        self.positions = torch.zeros(1, dtype=torch.int64)
        self._clock, self._cost_s = clock, cost_s

    def __call__(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        self._clock.pass_s(self._cost_s(ARCHITECTURE.slides(layer)))
        return q.reshape(len(q), -1)

    def write(self, layer: int, k: Any, v: Any) -> None:
        return None


class StubModel:
    architecture, dtype, n_loaded = ARCHITECTURE, torch.float32, ARCHITECTURE.n_layers
    weight_bytes, kernels = 0, TORCH

    def __init__(self, clock: VirtualClock, costs: Costs) -> None:
        self._clock, self._costs = clock, costs
        self.layers = [SimpleNamespace() for _ in range(self.n_loaded)]

    def embed(self, tokens: Any, positions: Any) -> Any:
        self._clock.pass_s(self._costs.embedding(len(tokens)))
        return torch.zeros(len(tokens), 8)

    def run(self, hidden: Any, start: int, end: int, attend: Any) -> Any:
        part = torch.zeros(len(hidden), 1, 1)
        for layer in range(start, end):
            before_s = self._clock.now_s
            self._clock.pass_s(self._costs.dense(len(hidden)))
            attend(layer, part, part, part)
            if isinstance(attend, MixedStep):
                self._clock.pass_s((self._costs.mixed - 1.0) * (self._clock.now_s - before_s))
        return hidden

    def propagate(self, hidden: Any, start: int, end: int, attend: Any) -> None:
        self._clock.pass_s((end - start) * self._costs.kv_projection(len(hidden)))

    def logits(self, hidden: Any) -> Any:
        self._clock.pass_s(self._costs.head(len(hidden)))
        return torch.zeros(len(hidden), 32)


class VirtualSubject(Subject):
    """Six layers in two classes, of which every third attends to everything."""

    def __init__(self, costs: Costs | None = None, limits: TableLimits = LIMITS, **changes: Any) -> None:
        self.clock, self.costs = VirtualClock(), costs or Costs()
        device = VirtualDevice(self.clock, **changes)
        super().__init__(StubModel(self.clock, self.costs), device, limits)  # type: ignore[arg-type]

    @property
    def has_classifier(self) -> bool:
        return True

    def classified(self, hidden: Any, exit_index: int = 0) -> Any:
        self.clock.pass_s(self.costs.classifier(len(hidden)))

    @property
    def has_predictor(self) -> bool:
        return True

    def foreseen(self, hidden: Any, words: Any) -> Any:
        assert len(words) == len(hidden)
        self.clock.pass_s(self.costs.predictor(len(hidden)))

    def words(self, rows: int) -> Any:
        return torch.zeros(rows, 4, dtype=torch.int64)

    def hidden(self, rows: int) -> Any:
        return torch.zeros(rows, 8)

    def layer_tensors(self, layer: int) -> list[Any]:
        return [torch.zeros(64)]

    def decode_step_in(self, cache: Any, kv_tokens: Sequence[int], first_slot: int) -> Any:
        return StubStep(self.clock, lambda slides: self.costs.decode(slides, kv_tokens))

    def prompt_step(self, tokens: int, context_tokens: int) -> Any:
        return StubStep(self.clock, lambda slides: self.costs.prefill(slides, tokens, context_tokens))
