"""The KV cache of the model that runs, and whose texts lie in it. Knows no plan and no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set as AbstractSet

from helios_sim.errors import UserError
from helios_sim.live.answer import Answer
from helios_sim.live.captured import Captured
from helios_sim.live.device import Device
from helios_sim.live.kv import KvCache
from helios_sim.live.model import SegmentedModel
from helios_sim.live.slots import Slots


class Workspace:
    """One model computes at a time, so there is one cache; another model's takes its place."""

    def __init__(self, slots: int, slot_tokens: int, device: Device) -> None:
        self.slot_tokens, self._device = slot_tokens, device
        self.slots = Slots(slots, self._move)
        self.cache: KvCache
        self.captured: Captured | None = None
        self._spoilt: set[int] = set()  # slots that hold something that is no number
        self._name: str | None = None
        self._model: SegmentedModel | None = None

    def use(self, name: str, model: SegmentedModel, layers: int) -> None:
        """The cache of this model with so many layers. What requests have in it stays valid if the model stays."""
        if name != self._name or model is not self._model:
            self.slots.clear()
            self._spoilt.clear()
            self.captured = None
            context = min(self.slot_tokens, model.architecture.max_context_tokens)
            self._name = None
            self.cache = KvCache(model.architecture, layers, self.slots.count, context, model.dtype, model.device)
            self._name, self._model = name, model
            if self._device.captures:
                self.captured = Captured(model, self.cache, self._device)
        elif len(self.cache.keys) != layers:
            self.cache.resize(layers)

    def keep_only(self, requests: AbstractSet[int], answers: Mapping[int, Answer]) -> None:
        """Everyone else leaves its slot."""
        for request_id in self.slots:
            if request_id not in requests:
                self.give_up(answers[request_id])

    def give_up(self, answer: Answer) -> None:
        """This text leaves its slot, if it has one."""
        request_id = answer.request.request_id
        answer.lose_cache()
        if request_id not in self.slots:
            return
        slot = self.slots.of(request_id)
        self.slots.give(request_id)
        if slot in self._spoilt:
            self._spoilt.remove(slot)
            for tensor in (*self.cache.keys, *self.cache.values):
                tensor[slot] = 0.0

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

    def spoil(self, request_id: int) -> None:
        """K or V of this request may be no number, which even a masked place passes on. Its slot is wiped after it."""
        self._spoilt.add(self.slots.of(request_id))

    def arrange(self, answers: Sequence[Answer], decoding: int) -> None:
        """The first `decoding` of the batch's texts come to lie in a row."""
        cached = {answer.request.request_id: answer.cached for answer in answers}
        self.slots.arrange(list(cached)[:decoding], cached)

    def _move(self, source: int, target: int, tokens: int, swap: bool) -> None:
        for tensor in (*self.cache.keys, *self.cache.values):
            there, here = tensor[target, :, :tokens], tensor[source, :, :tokens]
            kept = there.clone() if swap else None
            there.copy_(here)
            if kept is not None:
                here.copy_(kept)
