"""Self-speculation on the device: requests draft at an exit, and one pass of the whole model verifies.

A drafting step runs one token of every request that drafts through the layers up to the exit, and the exit's head gives
the next draft. The hidden states of these tokens are kept, and their K and V stay in the cache. Verification runs the
first layers for the last draft alone, and the other layers for all drafts at once, together with prompt chunks. K and V
of rejected drafts are overwritten by later tokens of their request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from helios_sim.exits.rule import OF_ANSWERS
from helios_sim.live.exits import Choice, Chunk, ExitReader
from helios_sim.live.memory.blocks import BlockStep
from helios_sim.live.memory.decodes import decode_step
from helios_sim.live.memory.kv import KvCache, MixedStep, PromptStep
from helios_sim.live.model.decoder import Attend, SegmentedModel
from helios_sim.profile.composition import Composition, PrefillChunk


@dataclass(slots=True)
class Drafts:
    """The drafts of one request in an iteration, and what the whole model chooses in their place."""

    slot: int
    cached: int  # tokens in the KV cache
    token: int  # its latest token, which is not in the cache
    most: int  # how many tokens it drafts
    choice: Choice | None = None  # samples its next token, if it drafts none; None for the likeliest
    tokens: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)  # (1, d_model) at the exit, of each token that drafted
    chosen: list[int] = field(default_factory=list)  # the whole model's tokens, after `token` and after each draft
    finite: list[bool] = field(default_factory=list)
    confidence: Sequence[float | None] = ()  # the whole model's, in each token that it chose, if judged

    @property
    def latest(self) -> int:
        return self.tokens[-1] if self.tokens else self.token

    @property
    def position(self) -> int:
        """Position of the latest token, which runs next."""
        return self.cached + len(self.tokens)

    def agreed(self) -> int:
        """Number of drafts before the first one that differs from the whole model's token."""
        pairs = zip(self.tokens, self.chosen, strict=False)
        return next((n for n, (draft, chosen) in enumerate(pairs) if draft != chosen), len(self.tokens))


class Speculation:
    """Runs iterations in which requests draft after `exit_layers` layers."""

    judged = False  # whether the whole model's confidence in its tokens is measured

    def __init__(self, model: SegmentedModel, exits: ExitReader, cache: KvCache, exit_layers: int) -> None:
        self._model, self._exits, self._cache, self._exit = model, exits, cache, exit_layers

    @torch.inference_mode()
    def draft(self, requests: Sequence[Drafts], chunks: Sequence[Chunk] = ()) -> list[Composition]:
        """Let every request draft `most` tokens. Returns what each step ran.

        The prompt chunks do not run here but in `verify`.
        """
        ran = []
        while taking := [one for one in requests if len(one.tokens) < one.most]:
            ran.append(self._composition([one.position + 1 for one in taking], 0, len(taking), (), drafting=True))
            states = self._first_layers(taking, [])
            said = self._exits.read(self._model, self._exit, states, None)
            for one, state, token in zip(taking, states.split(1), said.tokens, strict=True):
                one.states.append(state)
                one.tokens.append(token)
        return ran

    @torch.inference_mode()
    def verify(self, requests: Sequence[Drafts], chunks: Sequence[Chunk]) -> Composition:
        """Run the whole model for all drafts and these prompt chunks. The rows of prompts get their token too."""
        model, n = self._model, len(requests)
        prompts = [PromptStep(self._cache, c.slot, len(c.tokens), c.context) for c in chunks]
        states = self._to_verify(requests, list(zip(chunks, prompts, strict=True)))
        rows = [one.most + 1 for one in requests]
        blocks = [(k, list(alike)) for k, alike in groupby(requests, key=lambda one: one.most + 1)]
        steps = [block_step(self._cache, [o.slot for o in of], [o.cached for o in of], k) for k, of in blocks]
        sizes = [*(k * len(alike) for k, alike in blocks), *(len(c.tokens) for c in chunks)]
        states = model.run(states, self._exit, model.n_loaded, together([*steps, *prompts], sizes))
        ends = np.cumsum(sizes)[len(steps) :]
        finishing = [(c.row, int(end) - 1) for c, end in zip(chunks, ends, strict=True) if c.row is not None]
        at = [*range(sum(rows)), *(place for _, place in finishing)]
        measure = OF_ANSWERS if self.judged else None
        said = self._exits.read(model, model.n_loaded, states if len(at) == len(states) else states[at], measure)
        sure: Sequence[float | None] = said.confidence or [None] * len(at)
        place = 0
        for one, k in zip(requests, rows, strict=True):
            one.chosen = [said.token(place + n, one.choice) for n in range(k)]
            one.finite, one.confidence = said.finite[place : place + k], sure[place : place + k]
            place += k
        for at_head, (row, _) in enumerate(finishing, place):
            row.chosen, row.layers, row.finite = said.token(at_head, row.choice), model.n_loaded, said.finite[at_head]
            row.confidence = sure[at_head]
        contexts = [one.cached + one.most + 1 for one in requests]
        prefill = tuple(PrefillChunk(len(c.tokens), c.context, c.layers) for c in chunks)
        return self._composition(contexts, sum(rows) - n, len(at), prefill, drafting=False)

    def _to_verify(self, requests: Sequence[Drafts], pieces: Sequence[tuple[Chunk, PromptStep]]) -> Tensor:
        """States at the exit of all tokens to verify, request by request, and then of these chunks."""
        hidden = self._first_layers(requests, pieces)
        joined = [state for i, one in enumerate(requests) for state in (*one.states, hidden[i : i + 1])]
        return torch.cat([*joined, hidden[len(requests) :]])

    def _first_layers(self, requests: Sequence[Drafts], pieces: Sequence[tuple[Chunk, PromptStep]]) -> Tensor:
        """Run the latest token of each request, and these chunks, up to the exit. Returns their states."""
        step = decode_step(self._cache, [one.slot for one in requests], [one.position for one in requests])
        ids = [one.latest for one in requests] + [token for chunk, _ in pieces for token in chunk.tokens]
        positions = torch.cat([step.positions, *(prompt.positions for _, prompt in pieces)])
        hidden = self._model.embed(torch.tensor(ids, device=self._cache.device), positions)
        sizes = [len(requests), *(len(chunk.tokens) for chunk, _ in pieces)]
        return self._model.run(hidden, 0, self._exit, together([step, *(prompt for _, prompt in pieces)], sizes))

    def _composition(
        self, contexts: Sequence[int], verified: int, sampled: int, prefill: tuple[PrefillChunk, ...], drafting: bool
    ) -> Composition:
        n, kv = len(contexts), sum(contexts)
        return Composition(
            bounds=(self._exit, self._model.n_loaded),
            decode_tokens=np.array([[n, 0 if drafting else n]], np.int64),
            decode_kv_tokens=np.array([[kv, 0 if drafting else kv]], np.int64),
            sampled_tokens=np.array([sampled], np.int64),
            decode_kv_least=np.array([min(contexts)], np.int64),
            decode_kv_most=np.array([max(contexts)], np.int64),
            prefill=prefill,
            host_sync_at_checks=False,
            verified_tokens=np.array([[0, verified]], np.int64),
            drafting=drafting,
        )


def block_step(cache: KvCache, slots: Sequence[int], lengths: Sequence[int], tokens: int) -> Attend:
    """Attention of `tokens` tokens of each request: one call for all, or one each if kernels take any lengths."""
    if not cache.kernels.any_lengths:
        return BlockStep(cache, slots, lengths, tokens)
    each: list[Attend] = [PromptStep(cache, at, tokens, n) for at, n in zip(slots, lengths, strict=True)]
    return together(each, [tokens] * len(each))


def together(steps: list[Attend], rows: list[int]) -> Attend:
    """Join several steps into one. `rows`: number of rows of each step."""
    return steps[0] if len(steps) == 1 else MixedStep(steps, rows)
