"""The simulated engine for clients: lengths of prompts come from their token ids, exits from the trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import simpy

from helios_sim.engine.simulated import ModelData, SimulatedEngine
from helios_sim.exits.trace import TokenSpan
from helios_sim.request import Request
from helios_sim.serve.asked import Ask, Asked, Book
from helios_sim.serving.iteration import IntArray
from helios_sim.workload import Workload, generate


class AskedSimulated(SimulatedEngine):
    def __init__(self, env: simpy.Environment, models: Mapping[str, ModelData], book: Book) -> None:
        super().__init__(env, models)
        self._book = book

    def tokenize(self, model: str, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        asked = self._book.of(request)
        if asked is None:
            return super().tokenize(model, request, answered_chars)
        trace = self._models[model].trace
        span = trace.locate(request.task, request.text_start, 1)
        left = max(1, asked.n_tokens - asked.produced)
        start = (span.start + asked.produced) % span.length
        return len(asked.ask.prompts[model]) + asked.produced, TokenSpan(span.first, start, span.length, left)

    def tokens_of(self, model: str, requests: IntArray) -> IntArray:
        found = []
        for row in requests.tolist():
            tokens, span = self.tokenize(model, Request(*row))
            found.append((tokens, span.n_tokens, span.first, span.start, span.length))
        return np.array(found, np.int64).reshape(-1, 5)


class Answers:
    """Draws the lengths of simulated answers from the workload.

    A simulated model produces no end token, so an answer is as long as one that the workload draws, within the client's
    limits. With `ignore_eos` it has exactly as many tokens as the client allows.
    """

    def __init__(self, workload: Workload, seed: int, models: Mapping[str, ModelData]) -> None:
        self._workload, self._seed, self._models = workload, seed, models
        self._drawn = self._requests()

    def next(self, ask: Ask, model: str) -> tuple[Asked, Request]:
        """Draws the answer of a request, and the workload's request that it follows. `model` is the loaded model."""
        like = next(self._drawn)
        n_tokens = ask.max_tokens
        if not ask.ignore_eos:
            drawn = self._models[model].trace.locate(like.task, like.text_start, like.output_chars).n_tokens
            n_tokens = min(ask.max_tokens, max(drawn, ask.min_tokens, 1))
        return Asked(ask, n_tokens), like

    def _requests(self) -> Iterator[Request]:
        seed = self._seed
        while True:
            for block in generate(self._workload, seed):
                yield from block.rows()
            seed += 1
