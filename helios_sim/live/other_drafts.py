"""Speculation with a drafter: another model drafts on the device, and one pass of the serving model verifies.

The drafter keeps its K and V in a cache of its own (`Workspace.beside`), where a request has a slot of the same number.
`Answer.read` counts the request's tokens that the drafter has read. With its first draft for a request, the drafter
reads all tokens that it has not read yet, such as the last draft of a pass that was accepted as a whole. In the same
step it reads prompt chunks. K and V of rejected drafts are overwritten by later tokens of their request.

A draft is only a guess, so any token will do if the drafter's token is unknown to the verifying model, or its logits
are NaN. After NaN logits the drafter's K and V in that slot are zeroed, since NaN would spoil later tokens even if
masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helios_sim.errors import UserError
from helios_sim.live.answers import Answer
from helios_sim.live.exits import Chunk, ExitReader
from helios_sim.live.memory.decodes import decode_step
from helios_sim.live.memory.kv import KvCache, PromptStep
from helios_sim.live.model.decoder import Attend, SegmentedModel
from helios_sim.live.served import LiveModel
from helios_sim.live.speculation import Drafts, Speculation, block_step, together
from helios_sim.profile.composition import Composition, PrefillChunk


class OtherDrafts(Speculation):
    """Runs iterations in which `drafter` drafts. `answers`: those of all requests of the batch, by slot."""

    def __init__(
        self,
        model: SegmentedModel,
        exits: ExitReader,
        cache: KvCache,
        drafter: SegmentedModel,
        head: ExitReader,
        beside: KvCache,
        answers: Mapping[int, Answer],
    ) -> None:
        super().__init__(model, exits, cache, 0)
        self._drafter, self._head, self._beside = drafter, head, beside
        self._answers = answers

    @torch.inference_mode()
    def draft(self, requests: Sequence[Drafts], chunks: Sequence[Chunk] = ()) -> list[Composition]:
        """Let the drafter draft for every request, after reading what it has not read yet, including these chunks.

        A request drafts only as far as the drafter's slot reaches. Returns what each step ran.
        """
        for one in requests:
            one.most = max(0, min(one.most, self._beside.max_tokens - one.cached))
        taking, ran = [one for one in requests if one.most], []
        if taking or chunks:
            ran.append(self._catch_up(taking, chunks))
        while taking := [one for one in taking if len(one.tokens) < one.most]:
            step = decode_step(self._beside, [one.slot for one in taking], [one.position for one in taking])
            hidden = self._run([[one.latest] for one in taking], [one.position for one in taking], step)
            self._note(taking, hidden)
            ran.append(self._drafted([one.position for one in taking], 0, ()))
        return ran

    def _catch_up(self, taking: Sequence[Drafts], chunks: Sequence[Chunk]) -> Composition:
        """Make the first draft of each request from all tokens that the drafter has not read. Read these chunks too."""
        behind = sorted(taking, key=lambda one: (one.cached - self._answers[one.slot].read, one.slot))
        steps: list[Attend] = []
        sizes: list[int] = []
        texts: list[list[int]] = []
        starts: list[int] = []
        for unread, alike in groupby(behind, key=lambda one: one.cached - self._answers[one.slot].read):
            of = list(alike)
            slots, lengths = [one.slot for one in of], [one.cached - unread for one in of]
            alone = unread == 0
            steps.append(decode_step(self._beside, slots, lengths) if alone else block_step(
                self._beside, slots, lengths, unread + 1
            ))  # fmt: skip
            sizes.append(len(of) * (unread + 1))
            texts += [self._answers[one.slot].ids(one.cached - unread, one.cached + 1) for one in of]
            starts += lengths
        rows, prefill = sum(sizes), []
        for chunk in chunks:
            answer, room = self._answers[chunk.slot], self._beside.max_tokens
            ids = answer.ids(answer.read, min(chunk.context + len(chunk.tokens), room))
            if not ids:
                continue
            steps.append(PromptStep(self._beside, chunk.slot, len(ids), answer.read))
            sizes.append(len(ids))
            texts.append(ids)
            starts.append(answer.read)
            prefill.append(PrefillChunk(len(ids), answer.read, self._drafter.n_loaded))
            answer.read += len(ids)
        hidden = self._run(texts, starts, together(steps, sizes)) if steps else None
        if hidden is not None and behind:
            ends = np.cumsum([len(ids) for ids in texts[: len(behind)]]) - 1
            self._note(behind, hidden[ends.tolist()])
        return self._drafted([one.position for one in behind], rows - len(behind), tuple(prefill))

    def _run(self, texts: Sequence[Sequence[int]], starts: Sequence[int], step: Attend) -> Tensor:
        """Run these ids, each text from its start position on, through the drafter. Returns their states."""
        device, known = self._beside.device, self._drafter.architecture.vocab_size - 1
        ids = torch.tensor([min(token, known) for text in texts for token in text], device=device)
        at = [start + n for start, text in zip(starts, texts, strict=True) for n in range(len(text))]
        hidden = self._drafter.embed(ids, torch.tensor(at, device=device))
        return self._drafter.run(hidden, 0, self._drafter.n_loaded, step)

    def _note(self, requests: Sequence[Drafts], states: Tensor) -> None:
        """Add to each request the draft that the head gives for its state (n, d_model)."""
        said = self._head.read(self._drafter, self._drafter.n_loaded, states, None)
        known = self._model.architecture.vocab_size - 1
        for one, token, finite in zip(requests, said.tokens, said.finite, strict=True):
            self._answers[one.slot].read = one.position + 1
            one.tokens.append(min(token, known))
            if not finite:
                for tensor in (*self._beside.keys, *self._beside.values):
                    tensor[one.slot] = 0.0

    def _to_verify(self, requests: Sequence[Drafts], pieces: Sequence[tuple[Chunk, PromptStep]]) -> Tensor:
        device = self._cache.device
        ids = [token for one in requests for token in (one.token, *one.tokens)]
        at = [one.cached + n for one in requests for n in range(one.most + 1)]
        ids += [token for chunk, _ in pieces for token in chunk.tokens]
        positions = torch.cat([torch.tensor(at, device=device), *(prompt.positions for _, prompt in pieces)])
        return self._model.embed(torch.tensor(ids, device=device), positions)

    def _drafted(self, contexts: Sequence[int], more: int, prefill: tuple[PrefillChunk, ...]) -> Composition:
        """Composition of a step of the drafter, with `more` rows of tokens that it had not read."""
        return _of_all_layers(self._drafter, contexts, more, len(contexts), prefill, drafting=True)

    def _composition(
        self, contexts: Sequence[int], verified: int, sampled: int, prefill: tuple[PrefillChunk, ...], drafting: bool
    ) -> Composition:
        return _of_all_layers(self._model, contexts, verified, sampled, prefill, drafting)


def _of_all_layers(
    model: SegmentedModel, contexts: Sequence[int], more: int, sampled: int, prefill: tuple[PrefillChunk, ...],
    drafting: bool,
) -> Composition:  # fmt: skip
    return Composition(
        bounds=(model.n_loaded,),
        decode_tokens=np.array([[len(contexts)]], np.int64),
        decode_kv_tokens=np.array([[sum(contexts)]], np.int64),
        sampled_tokens=np.array([sampled], np.int64),
        decode_kv_least=np.array([min(contexts)], np.int64) if contexts else None,
        decode_kv_most=np.array([max(contexts)], np.int64) if contexts else None,
        prefill=prefill,
        host_sync_at_checks=False,
        verified_tokens=np.array([[more]], np.int64),
        drafting=drafting,
    )


def require_one_tokenizer(models: Mapping[str, LiveModel], model: str, drafter: str) -> None:
    """Raise UserError unless the drafter's tokens are those of the model that verifies them."""
    if not are_one_tokenizer(models[model].tokenizer, models[drafter].tokenizer):
        raise UserError(
            "policy.drafter", drafter, f"live, a model with the very tokenizer of {model}, whose tokens it drafts",
            "name models of one family, or set mode=simulate",
        )  # fmt: skip


def are_one_tokenizer(ours: Any, theirs: Any) -> bool:
    """Whether both tokenizers have the same vocabulary, so that one model can verify the other's drafts."""
    same: bool = ours.get_vocab() == theirs.get_vocab()
    return same
