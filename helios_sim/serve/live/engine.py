"""The live engine for clients: it reads their token ids, samples as they ask, and ends answers at an end token.

torch is loaded here, and only for mode=live.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helios_sim.exits.trace import TokenSpan
from helios_sim.live.answers import Answer
from helios_sim.live.clock import WallClock
from helios_sim.live.engine import LiveEngine
from helios_sim.live.exits import Choice
from helios_sim.live.replaying import ReplayingEngine
from helios_sim.live.served import LiveModel, PromptTexts
from helios_sim.request import Request
from helios_sim.serve.asked import Asked, Book, Sampling


class AskedLive(LiveEngine):
    """The live engine with prompts of clients, kept in `book`. A request that is not in it warms the engine up."""

    book: Book
    _sampled: dict[int, Sampler]
    _ends: dict[str, frozenset[int]]

    @classmethod
    def opened(cls, clock: WallClock, models: Mapping[str, LiveModel], book: Book, **settings: Any) -> AskedLive:
        kind = AskedReplaying if any(model.replays for model in models.values()) else cls
        engine = kind(clock, models, _Passage(), **settings)
        engine.book, engine._sampled = book, {}
        engine._ends = {name: end_tokens(model.tokenizer) for name, model in models.items()}
        return engine

    def tokenize(self, model: str, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        asked = self.book.of(request)
        if asked is None:
            return super().tokenize(model, request, answered_chars)
        span = self._models[model].trace.locate(request.task, request.text_start, 1)
        left = max(1, asked.n_tokens - asked.produced)
        n_tokens = len(self._ids(asked, model, self._answered(request.request_id)))
        return n_tokens, TokenSpan(span.first, span.start, span.length, left)

    def prompt(self, model: str, request: Request, n_tokens: int, answered: str = "") -> list[int]:
        asked = self.book.of(request)
        if asked is None:
            return super().prompt(model, request, n_tokens, answered)
        return self._ids(asked, model, answered)

    def choice(self, answer: Answer) -> Choice | None:
        asked = self.book.of(answer.request)
        if asked is None:
            return None
        number, ask = answer.request.request_id, asked.ask
        banned = self._ends[answer.model] if ask.ignore_eos or asked.produced < ask.min_tokens else frozenset()
        if number not in self._sampled:
            self._sampled[number] = Sampler(ask.sampling, number)
        sampler = self._sampled[number]
        if not sampler.needed and not banned:
            return None
        return partial(sampler.choose, asked, banned)

    def ends(self, answer: Answer) -> bool:
        asked = self.book.of(answer.request)
        if asked is None or asked.ask.ignore_eos:
            return False
        return answer.tokens[-1] in self._ends[answer.model]

    def forget(self, request_id: int, again: bool = False) -> None:
        super().forget(request_id, again)
        self._sampled.pop(request_id, None)

    def _answered(self, request_id: int) -> str:
        """Text of the answer so far, by all models."""
        known = self.answers.get(request_id)
        return "" if known is None else known.before + self._models[known.model].decode(known.tokens)

    def _ids(self, asked: Asked, model: str, answered: str) -> list[int]:
        """Token ids of the prompt and of the answer so far, in this model's vocabulary."""
        return [*asked.ask.prompts[model], *(self._models[model].encode(answered) if answered else ())]


class AskedReplaying(AskedLive, ReplayingEngine):
    """The same engine for models with random weights: their exits follow recorded traces."""


class Sampler:
    """Samples the tokens of one request."""

    def __init__(self, how: Sampling, number: int) -> None:
        self._how, self._drawn = how, torch.Generator()
        if how.seed is None:
            self._drawn.seed()
        else:
            self._drawn.manual_seed(how.seed)
        self.needed = how.temperature > 0 or how.logprob

    def choose(self, asked: Asked, banned: frozenset[int], logits: Tensor) -> int:
        """Chooses the next token, never a `banned` one, and notes its logprob if asked for. `logits` (V,)."""
        scores = logits.float().cpu()
        if banned:
            scores = scores.index_fill(0, torch.tensor(sorted(banned)), -torch.inf)
        best = int(scores.argmax())
        token = best if self._how.temperature == 0 else self._draw(scores / self._how.temperature)
        if self._how.logprob:
            log_p = scores.log_softmax(-1)
            asked.logprobs.append((float(log_p[token]), best, float(log_p[best])))
        return token

    def _draw(self, scores: Tensor) -> int:
        p = scores.softmax(-1)
        if self._how.top_p < 1:  # keep the fewest tokens that reach this probability together
            ordered, at = p.sort(descending=True)
            kept = ordered.cumsum(-1) - ordered < self._how.top_p
            ordered = ordered * kept
            return int(at[torch.multinomial(ordered, 1, generator=self._drawn)])
        return int(torch.multinomial(p, 1, generator=self._drawn))


def end_tokens(tokenizer: Any) -> frozenset[int]:
    """Token ids that end an answer: the tokenizer's own end token, and tokens that end a turn of a chat."""
    known = tokenizer.get_vocab()
    names = {tokenizer.eos_token, "<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|eot_id|>", "<eos>"}
    return frozenset(int(known[name]) for name in names if name in known)


class _Passage(PromptTexts):
    """The text of requests that warm the engine up."""

    def prompt(self, task: int, start: int, chars: int) -> str:
        passage = "The river ran high in March, and the keeper of the bridge wrote down each cart that crossed it. "
        return (passage * (chars // len(passage) + 1))[:chars]
