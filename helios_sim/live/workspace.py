"""The KV cache of the model that runs, and whose texts lie in it. Knows no plan and no weights."""

from __future__ import annotations

from collections.abc import Mapping, Set as AbstractSet

from helios_sim.errors import UserError
from helios_sim.live.answer import Answer
from helios_sim.live.kv import KvCache
from helios_sim.live.model import SegmentedModel
from helios_sim.live.slots import Slots


class Workspace:
    """One model computes at a time, so there is one cache; another model's takes its place."""

    def __init__(self, slots: int, slot_tokens: int) -> None:
        self.slot_tokens = slot_tokens
        self.slots = Slots(slots, self._move)
        self.cache: KvCache
        self._name: str | None = None

    def use(self, name: str, model: SegmentedModel, layers: int) -> None:
        """The cache of this model with so many layers. What requests have in it stays valid if the model stays."""
        if name != self._name:
            self.slots.clear()
            context = min(self.slot_tokens, model.architecture.max_context_tokens)
            self._name = None
            self.cache = KvCache(model.architecture, layers, self.slots.count, context, model.dtype, model.device)
            self._name = name
        elif len(self.cache.keys) != layers:
            self.cache.resize(layers)

    def keep_only(self, requests: AbstractSet[int], answers: Mapping[int, Answer]) -> None:
        """Everyone else leaves its slot."""
        for request_id in self.slots:
            if request_id not in requests:
                self.slots.give(request_id)
                answers[request_id].lose_cache()

    def place(self, answer: Answer) -> None:
        """A slot for this text, if it has none. UserError where the text is longer than a slot."""
        request_id = answer.request.request_id
        if request_id in self.slots:
            return
        needed = len(answer.prompt) + answer.planned_tokens
        if needed > self.cache.max_tokens:
            raise UserError(
                "live.slot_tokens", self.slot_tokens, f"request {request_id} has {needed} tokens with its answer",
                "give slots at least so many tokens, or shorten the workload's texts",
            )  # fmt: skip
        answer.lose_cache()
        self.slots.take(request_id)

    def _move(self, source: int, target: int, swap: bool) -> None:
        for tensor in (*self.cache.keys, *self.cache.values):
            kept = tensor[target].clone() if swap else None
            tensor[target] = tensor[source]
            if kept is not None:
                tensor[source] = kept
