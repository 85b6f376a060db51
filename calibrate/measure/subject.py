"""The model under measurement: a real model on a device, with noise in its KV cache, ready to run any step.

Inputs are noise, never zeros, which can run faster than data. One pool of KV memory serves every (batch, length): slots
are exactly as long as they need to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from calibrate.measure.device import TimedDevice
from helios_sim.exits.rule import WORDS
from helios_sim.live.model.architecture import Architecture
from helios_sim.live.model.predictors import drawn_predictors, features

if TYPE_CHECKING:
    from helios_sim.live.memory.decodes import Decodes
    from helios_sim.live.memory.kv import KvCache, PromptStep
    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.heads import ExitHeads

NOISE_VALUES = 1 << 20  # drawn a few times and repeated, since drawing gigabytes takes too long
DRAWS = 8
POOL_SHARE = 0.4  # largest share of the engine's memory for the pool
REST_SHARE = 0.6  # largest share of the memory beside the weights; activations, copies and graphs need the rest


@dataclass(frozen=True, slots=True)
class TableLimits:
    """How far the tables reach. Beyond that a profile extrapolates, and reports say so."""

    max_batch: int  # requests that decode at once
    max_rows: int  # tokens of one iteration
    max_chunk: int  # tokens of one prompt in one iteration
    max_kv_tokens: int  # context of one request
    max_head_rows: int  # rows through the LM head at once

    @property
    def few_batches(self) -> tuple[int, ...]:
        """1, a quarter of the largest batch, and the largest, for costs that depend little on the batch."""
        return tuple(sorted({1, max(1, self.max_batch // 4), self.max_batch}))

    def within(self, architecture: Architecture) -> TableLimits:
        """The limits, cut to the model's own context."""
        context = architecture.max_context_tokens
        return TableLimits(
            self.max_batch, self.max_rows, min(self.max_chunk, context // 2), min(self.max_kv_tokens, context),
            min(self.max_head_rows, self.max_rows),
        )  # fmt: skip


LIMITS = {
    "cpu": TableLimits(max_batch=32, max_rows=512, max_chunk=512, max_kv_tokens=2048, max_head_rows=128),
    "cuda": TableLimits(max_batch=256, max_rows=8192, max_chunk=8192, max_kv_tokens=8192, max_head_rows=1024),
}


class Subject:
    """The model under measurement. `classes`: its layers by kind of attention, in order of first appearance."""

    def __init__(
        self,
        model: SegmentedModel,
        device: TimedDevice,
        limits: TableLimits,
        heads: ExitHeads | None = None,
        seed: int = 0,
        fill_s: float | None = None,
    ) -> None:
        """`fill_s`: most seconds for filling the pool, which is smaller if time runs out; None for no limit."""
        import torch

        self.model, self.device, self.heads = model, device, heads
        exits = () if heads is None else heads.exits
        self._predictors = drawn_predictors(exits, model.device, seed) if exits else None
        self.architecture = a = model.architecture
        self.limits = limits.within(a)
        self.n_layers = model.n_loaded
        kinds = [a.slides(layer) for layer in range(self.n_layers)]
        order = list(dict.fromkeys(kinds))
        self.layer_class = tuple(order.index(kind) for kind in kinds)
        self.classes = tuple(tuple(i for i, k in enumerate(kinds) if k == kind) for kind in order)
        self._generator = torch.Generator(device=device.torch_device).manual_seed(seed)
        token_bytes = 2 * a.kv_width * self.n_layers * torch.empty((), dtype=model.dtype).element_size()
        wanted = self.limits.max_batch * self.limits.max_kv_tokens
        memory, rest = device.facts.memory_bytes, device.facts.memory_bytes - model.weight_bytes
        fits = int(min(memory * POOL_SHARE, rest * REST_SHARE)) // token_bytes
        self.pool_tokens = max(min(wanted, fits), self.limits.max_kv_tokens + self.limits.max_chunk)
        self.pool_tokens, self._pools = self._filled(self.pool_tokens, fill_s)

    def cache(self, slots: int, tokens: int) -> KvCache:
        """A cache of slots of `tokens` tokens inside the pool of noise. Raises ValueError if it does not fit."""
        from helios_sim.live.memory.kv import KvCache

        a = self.architecture
        if not self.holds(slots, tokens):
            raise ValueError(f"{slots} slots of {tokens} tokens exceed the pool of {self.pool_tokens}")
        cache = KvCache(
            a, 0, slots, tokens, self.model.dtype, self.device.torch_device, kernels=self.model.kernels
        )
        used = slots * tokens * a.kv_width
        shape = (slots, a.n_kv_heads, tokens, a.head_dim)
        cache.keys.extend(keys[:used].view(shape) for keys, _ in self._pools)
        cache.values.extend(values[:used].view(shape) for _, values in self._pools)
        return cache

    @property
    def decides_exits(self) -> bool:
        """Whether the device decides, inside a captured pass, which decodes leave at an exit."""
        return self.device.asynchronous and self.model.kernels.any_lengths

    def holds(self, slots: int, tokens: int) -> bool:
        return slots * tokens <= self.pool_tokens

    def decode_step(self, kv_tokens: Sequence[int]) -> Decodes:
        """A decode step for requests with these context lengths, including the new token."""
        return self.decode_step_in(self.decode_cache(kv_tokens), kv_tokens, 0)

    def decode_cache(self, kv_tokens: Sequence[int]) -> KvCache:
        """A cache for requests with these context lengths, as long as the longest.

        If a captured step reads a longer span of each request in service, the cache has that length if the pool allows.
        """
        from helios_sim.live.graphs import spans

        batch, tokens = len(kv_tokens), max(kv_tokens)
        if self.device.asynchronous and not self.model.kernels.any_lengths:
            span = next((n for n in spans(self.limits.max_kv_tokens) if n >= tokens), tokens)
            tokens = span if self.holds(batch, span) else tokens
        return self.cache(batch, tokens)

    def decode_step_in(self, cache: KvCache, kv_tokens: Sequence[int], first_slot: int) -> Decodes:
        """A decode step in a given cache, from a slot on.

        Several contexts get a mask even if they are equally long, since in service they hardly ever are. A single one
        gets a mask on a card, where a captured step serves any length. Kernels that take lengths need no mask.
        """
        from helios_sim.live.memory.decodes import decode_step

        slots = range(first_slot, first_slot + len(kv_tokens))
        span = max(kv_tokens) if len(kv_tokens) > 1 else None
        if self.device.asynchronous:
            span = cache.max_tokens
        return decode_step(cache, slots, [kv - 1 for kv in kv_tokens], span)

    def prompt_step(self, tokens: int, context_tokens: int) -> PromptStep:
        from helios_sim.live.memory.kv import PromptStep

        return PromptStep(self.cache(1, tokens + context_tokens), 0, tokens, context_tokens)

    def tokens(self, rows: int) -> Any:
        """Random token ids (rows,)."""
        import torch

        return torch.randint(
            self.architecture.vocab_size, (rows,), generator=self._generator, device=self.device.torch_device
        )

    def hidden(self, rows: int) -> Any:
        """Hidden states (rows, d_model): embeddings of random tokens."""
        ids = self.tokens(rows)
        return self.model.embed(ids, ids % self.architecture.max_context_tokens)

    def sampled(self, hidden: Any) -> Any:
        """The end of an iteration: the most probable token of each row."""
        return self.model.logits(hidden).argmax(-1)

    def checked(self, hidden: Any, exit_index: int = 0) -> Any:
        """An exit check through the LM head: the token and its probability, on the device."""
        adapted = hidden if self.heads is None else self.heads.adapt(exit_index, hidden)
        logits = self.model.logits(adapted.to(hidden.dtype)).float()
        best = logits.max(-1)
        return best.indices, (best.values - logits.logsumexp(-1)).exp()

    def classified(self, hidden: Any, exit_index: int = 0) -> Any:
        """An exit check by the classifier alone. Only with heads that have one."""
        assert self.heads is not None
        return self.heads.classify(exit_index % len(self.heads.exits), hidden)

    def foreseen(self, hidden: Any, words: Any) -> Any:
        """A check by a predictor at the deepest exit: its probability, on the device.

        `words` (rows, WORDS) are rows of the head. Any states stand for those at the exit before, and the predictor is
        untrained: neither affects the time.
        """
        assert self.heads is not None
        assert self._predictors is not None
        last = len(self.heads.exits) - 1
        before = hidden.flip(0) if last else None
        return self._predictors.predicted(last, features(self.model, self.heads, last, hidden, before, words))

    def words(self, rows: int) -> Any:
        """Random words (rows, WORDS), as a first exit would propose them."""
        return self.tokens(rows * WORDS).view(rows, WORDS)

    def layer_tensors(self, layer: int) -> list[Any]:
        """The weights of one layer."""
        from helios_sim.live.model.weights import tensors

        return list(tensors(self.model.layers[layer]))

    @property
    def has_predictor(self) -> bool:
        """Whether there is an exit that a predictor can check."""
        return self._predictors is not None

    @property
    def has_classifier(self) -> bool:
        return self.heads is not None and len(self.heads.exits) > 0 and self.heads.has_check

    def _filled(self, tokens: int, fill_s: float | None) -> tuple[int, list[tuple[Any, Any]]]:
        """The number of tokens that were filled before time ran out, and noise for their K and V in every layer."""
        import torch

        from helios_sim.live.device import block

        on, dtype, width = self.device.torch_device, self.model.dtype, self.architecture.kv_width
        least = self.limits.max_kv_tokens + self.limits.max_chunk
        drawn = [torch.randn(NOISE_VALUES, generator=self._generator, device=on).to(dtype) for _ in range(DRAWS)]
        pools = [
            tuple(block(tokens * width * dtype.itemsize, torch.device(on)).view(dtype) for _ in range(2))
            for _ in range(self.n_layers)
        ]
        each, done, began_s = max(1, NOISE_VALUES // width), 0, monotonic()
        while done < tokens and (fill_s is None or done < least or monotonic() - began_s < fill_s):
            end = min(tokens, done + each)
            for number, pool in enumerate(tensor for pair in pools for tensor in pair):
                pool[done * width : end * width].copy_(drawn[number % DRAWS][: (end - done) * width])
            done = end
        return done, [(keys[: done * width], values[: done * width]) for keys, values in pools]
