"""KV memory while serving: one block shared by the caches of all models, and the slots of requests in it.

Requests that decode occupy slots 0, 1, ... so that a decode step reads the cache in place instead of gathering it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set as AbstractSet

import torch
from torch import Tensor

from helios_sim.errors import TooLittleMemory
from helios_sim.exits.rule import Confidence
from helios_sim.live.ahead import RunAhead
from helios_sim.live.answers import Answer
from helios_sim.live.device import Device, room_for_caches, written_block
from helios_sim.live.exits import ExitReader
from helios_sim.live.graphs import GraphedDecodes, sizes_of
from helios_sim.live.kernels.launch import cores
from helios_sim.live.memory.decodes import decode_step
from helios_sim.live.memory.kv import CacheShape, KvCache, PromptStep
from helios_sim.live.memory.paged import plans_bytes
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.one_pass import OnePass, Rule
from helios_sim.serving.iteration import Places

PROMPT_TOKENS = 16


class Slots:
    """The assignment of requests to slots.

    `move(source, target, tokens, swap)` copies the first `tokens` tokens of a slot into another, or swaps the two.
    """

    def __init__(self, count: int, move: Callable[[int, int, int, bool], None]) -> None:
        self.count = count
        self._move = move
        self._of: dict[int, int] = {}  # request -> slot
        self._holder: dict[int, int] = {}  # slot -> request

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._of

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._of))

    def __len__(self) -> int:
        return len(self._of)

    def of(self, request_id: int) -> int:
        return self._of[request_id]

    def take(self, request_id: int) -> int:
        """Take the lowest free slot. Raises RuntimeError if none is free, though the server admits no more."""
        slot = next((slot for slot in range(self.count) if slot not in self._holder), None)
        if slot is None:
            raise RuntimeError(f"{self.count} KV slots, all taken; request {request_id} needs one")
        self._put(request_id, slot)
        return slot

    def give(self, request_id: int) -> None:
        del self._holder[self._of.pop(request_id)]

    def clear(self) -> None:
        self._of.clear()
        self._holder.clear()

    def arrange(self, decoding: Sequence[int], cached: Mapping[int, int]) -> None:
        """Move these requests into slots 0 .. len(decoding) - 1, in any order, with the fewest moves.

        `cached`: how many tokens each request has in its slot.
        """
        first = set(decoding)
        outside = [request for request in decoding if self._of[request] >= len(decoding)]
        places = [slot for slot in range(len(decoding)) if self._holder.get(slot) not in first]
        for request, slot in zip(outside, places, strict=True):
            source, other = self._of[request], self._holder.get(slot)
            tokens = max(cached[request], 0 if other is None else cached[other])
            self._move(source, slot, tokens, other is not None)
            del self._holder[source]
            if other is not None:
                self._put(other, source)
            self._put(request, slot)

    def _put(self, request_id: int, slot: int) -> None:
        self._of[request_id] = slot
        self._holder[slot] = request_id


class Workspace:
    """The KV caches of all models as views of one block, and the slots of the model that runs.

    Only one model computes at a time, so the caches can share the block, and a switch allocates nothing. A drafter has
    a cache behind the one of the model that it drafts for, in which a request has a slot of the same number.

    `slots`: how many slots of every shape are wanted.
    `reserve_bytes`: device memory that stays free for activations, beside the memory for FlashInfer's plans.
    """

    def __init__(self, shapes: Mapping[str, CacheShape], slots: int, device: Device, reserve_bytes: int) -> None:
        self.wanted = slots
        self._shapes, self._device, self._reserve_bytes = shapes, device, reserve_bytes
        self.places = {name: Places(slots, shape.slot_tokens) for name, shape in shapes.items()}  # before `reserve`
        self.slots = Slots(slots, self._move)
        self.cache: KvCache  # the cache of the model that runs
        self.captured: GraphedDecodes | None = None
        self._block: Tensor | None = None
        self._caches: dict[str, KvCache] = {}
        self.pair: tuple[str, str] | None = None  # a model and its drafter
        self.beside: KvCache | None = None  # the cache of the running model's drafter
        self._beside: KvCache | None = None
        self._captured: dict[str, GraphedDecodes] = {}
        self.ahead: RunAhead | None = None  # for the model that runs
        self.one_pass: OnePass | None = None
        self._passes: dict[str, OnePass] = {}
        self.reserved_bytes = 0  # size of the block, even after `close`
        self._spoilt: set[int] = set()  # slots that may hold NaN or infinity
        self._name: str | None = None
        self._model: SegmentedModel | None = None

    def close(self) -> None:
        """Free the block, and with it all caches and the graphs that read them."""
        self._stop_ahead()
        self.slots.clear()
        self._caches.clear()
        self._captured.clear()
        self._passes.clear()
        self._block = self._model = self._name = self.captured = self.one_pass = self.beside = self._beside = None
        if hasattr(self, "cache"):
            del self.cache

    @property
    def is_reserved(self) -> bool:
        return self._block is not None

    def reserve(self) -> None:
        """Allocate the block for all wanted slots, or for as many as there is free memory for.

        Raises UserError if not even one request of every model fits.
        """
        on = self._device.torch_device
        self._device.release()
        room = room_for_caches(on, self._reserve_bytes + self._plans_bytes())
        slots = {
            name: self.wanted if room is None else min(self.wanted, shape.slots_in(room))
            for name, shape in self._shapes.items()
        }
        for name, shape in self._shapes.items():
            if room is not None and not slots[name]:
                raise TooLittleMemory(
                    "memory", f"{room / 1e9:.2f} GB for KV on {on}",
                    f"{shape.n_bytes(1) / 1e9:.2f} GB for one request of {shape.slot_tokens} tokens on {name}",
                    "shorten the workload's texts, choose a smaller model or free memory",
                )  # fmt: skip
        n_bytes = max(shape.n_bytes(slots[name]) for name, shape in self._shapes.items())
        if self.pair is not None:
            slots[self.pair[0]] = both = self._slots_of_pair(slots[self.pair[0]], room)
            n_bytes = max(n_bytes, self._pair_bytes(both))
        self._block = block = written_block(n_bytes, on)
        self.reserved_bytes = len(block)
        for name in self._shapes:
            self._caches[name] = self._cache(name, 0, slots[name], block)
            self.places[name] = Places(slots[name], self._shapes[name].slot_tokens)
        if self.pair is not None:
            (model, drafter), shape = self.pair, self._shapes[self.pair[1]]
            behind = block[self._shapes[model].n_bytes(slots[model]) :]
            self._beside = self._cache(drafter, shape.layers, slots[model], behind)

    def _plans_bytes(self) -> int:
        """Bytes of FlashInfer's plans on the card, for all models, if all wanted slots fit."""
        page, on = self._device.kernels.page_tokens, self._device.torch_device
        if not page or not self._device.captures:
            return 0
        sizes = sizes_of(self.wanted)
        of_all = self._shapes.values()
        return sum(plans_bytes(shape.architecture, sizes, shape.slot_tokens, page, cores(on)) for shape in of_all)

    def _cache(self, name: str, layers: int, slots: int, memory: Tensor) -> KvCache:
        shape, device = self._shapes[name], self._device
        return KvCache(
            shape.architecture, layers, slots, shape.slot_tokens, shape.dtype, device.torch_device, memory,
            device.kernels,
        )  # fmt: skip

    def _pair_bytes(self, slots: int) -> int:
        return sum(self._shapes[name].n_bytes(slots) for name in self.pair or ())

    def _slots_of_pair(self, most: int, room: int | None) -> int:
        """The number of slots, up to `most`, that fit for a model and its drafter together. UserError if none fits."""
        fits = (slots for slots in range(most, 0, -1) if room is None or self._pair_bytes(slots) <= room)
        found = next(fits, 0)
        if not found:
            raise TooLittleMemory(
                "memory", f"{(room or 0) / 1e9:.2f} GB for KV on {self._device.torch_device}",
                f"{self._pair_bytes(1) / 1e9:.2f} GB for one request on {' and '.join(self.pair or ())}",
                "shorten the workload's texts, choose smaller models or free memory",
            )  # fmt: skip
        return found

    def use(self, name: str, model: SegmentedModel, layers: int) -> None:
        """Use the cache of this model with this many layers. Its contents stay valid while the model is the same."""
        if name != self._name or model is not self._model:
            self._wipe_for(name)
            self.cache = self._caches[name]
            self.slots.clear()
            self.slots.count = self.cache.slots
            self._stop_ahead()
            self.captured = graphs = self._graphs_of(name, model)
            if graphs is not None and self.cache.kernels.any_lengths:
                self.ahead = RunAhead(graphs, self._device)
            self.one_pass = self._passes.get(name)
            self._name, self._model = name, model
            self.beside = self._beside if self.pair is not None and self.pair[0] == name else None
        if len(self.cache.keys) != layers:
            self.cache.resize(layers)

    def capture(
        self,
        name: str,
        model: SegmentedModel,
        segments: Sequence[tuple[int, int]],
        exits: ExitReader,
        depths: Sequence[int],
        measures: Iterable[Confidence | None],
        owing: bool = False,
        rules: Iterable[Rule] = (),
    ) -> int:
        """Capture a model's decode steps through these segments of its layers before it runs. Returns how many.

        Exit heads are captured after segments that end at `depths`, with each of these confidences. `owing`: tokens
        that exited before run beside later ones. `rules`: those of passes through several exits. On a device that
        captures nothing, the result is 0.
        """
        graphs = self._graphs_of(name, model)
        if graphs is None:
            return 0
        cache = self._caches[name]
        before = len(cache.keys)
        cache.resize(max(end for _, end in segments))
        try:
            ends = sorted({end for _, end in segments} & {*depths})
            heads = sum(graphs.capture_heads(exits, ends, measure) for measure in measures)
            at_once = self._passes.get(name)
            passes = 0 if at_once is None else sum(at_once.capture(exits, rule) for rule in rules)
            return heads + passes + graphs.capture(segments, owing)
        finally:
            cache.resize(before)

    def _graphs_of(self, name: str, model: SegmentedModel) -> GraphedDecodes | None:
        """The model's captured steps, kept over switches for as long as the model object is the same."""
        if not self._device.captures:
            return None
        if name not in self._captured or self._captured[name].model is not model:
            self._captured[name] = graphs = GraphedDecodes(model, self._caches[name], self._device)
            if self._caches[name].kernels.any_lengths:
                self._passes[name] = OnePass(graphs, self._device)
        return self._captured[name]

    def _stop_ahead(self) -> None:
        if self.ahead is not None:
            self.ahead.close()
        self.ahead = None

    def keep_only(self, requests: AbstractSet[int], answers: Mapping[int, Answer]) -> None:
        """Free the slots of all other requests."""
        for request_id in self.slots:
            if request_id not in requests:
                self.give_up(answers[request_id])

    def give_up(self, answer: Answer) -> None:
        """Free this answer's slot, if it has one."""
        request_id = answer.request.request_id
        answer.lose_cache()
        if request_id not in self.slots:
            return
        slot = self.slots.of(request_id)
        self.slots.give(request_id)
        if slot in self._spoilt:
            self._spoilt.remove(slot)
            for tensor in self._tensors():
                tensor[slot] = 0.0

    def place(self, answer: Answer) -> None:
        """Give this answer a slot if it has none.

        Raises RuntimeError if it is longer than a slot; the server does not admit such requests.
        """
        request_id = answer.request.request_id
        if request_id in self.slots:
            return
        needed = len(answer.prompt) + answer.planned_tokens
        if needed > self.cache.max_tokens:
            raise RuntimeError(f"request {request_id} has {needed} tokens, a KV slot {self.cache.max_tokens}")
        answer.lose_cache()
        self.slots.take(request_id)

    def spoil(self, request_id: int) -> None:
        """Mark K or V of this request as possibly NaN; attention passes NaN on even from masked positions.

        The request's slot is zeroed when it is freed.
        """
        self._spoilt.add(self.slots.of(request_id))

    def arrange(self, answers: Sequence[Answer], decoding: int) -> None:
        """Move the first `decoding` of the batch's answers into contiguous slots from 0 on, if kernels need that."""
        if self.cache.kernels.any_lengths:
            return
        cached = {answer.request.request_id: answer.written for answer in answers}
        self.slots.arrange(list(cached)[:decoding], cached)

    def _wipe_for(self, name: str) -> None:
        """Zero the block if another model's values could be NaN in this model's dtype, or in its drafter's."""
        other = None if self._name is None else self._shapes[self._name].dtype
        read = {self._shapes[of].dtype for of in {name, *(self.pair or ())}}
        if self._block is not None and (self._spoilt or (other is not None and read != {other})):
            self._block.zero_()
        self._spoilt.clear()

    def _tensors(self) -> Iterator[Tensor]:
        """K and V of the model that runs, and of its drafter."""
        for cache in (self.cache, self.beside):
            if cache is not None:
                yield from (*cache.keys, *cache.values)

    def _move(self, source: int, target: int, tokens: int, swap: bool) -> None:
        for tensor in self._tensors():
            there, here = tensor[target, :, :tokens], tensor[source, :, :tokens]
            kept = there.clone() if swap else None
            there.copy_(here)
            if kept is not None:
                here.copy_(kept)


@torch.inference_mode()
def try_out(model: SegmentedModel, layers: int) -> None:
    """Run a short prompt and one decode in a separate cache, before KV memory is reserved.

    Libraries allocate the memory that they keep for themselves in a model's first run.
    """
    on = model.device
    cache = KvCache(model.architecture, layers, 1, PROMPT_TOKENS + 1, model.dtype, on, kernels=model.kernels)
    prompt = PromptStep(cache, 0, PROMPT_TOKENS)
    hidden = model.run(model.embed(torch.zeros_like(prompt.positions), prompt.positions), 0, layers, prompt)
    step = decode_step(cache, [0], [PROMPT_TOKENS])
    hidden = model.run(model.embed(torch.zeros_like(step.positions), step.positions), 0, layers, step)
    model.logits(hidden).argmax(-1).tolist()
