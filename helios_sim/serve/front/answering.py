"""Turns tokens into chunks of a stream or into a whole answer, in the format of OpenAI's API.

Each token is one chunk with some text. A token waits for the next one in two cases: its last character is incomplete,
or its text may be the beginning of a stop string. The first chunk of a chat also has the role, the last token's chunk
has the finish reason. An end token is no part of the answer: the finish reason then comes in a chunk without text.
Usage, if it is asked for, and [DONE] end the stream.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any

from helios_sim.serve.front.hub import Hub, Stream
from helios_sim.serve.front.metrics import LEFT
from helios_sim.serve.front.problems import Problem
from helios_sim.serve.front.reading import Wanted
from helios_sim.serve.messages import Token
from helios_sim.serve.text import Growing, Reader, Script, Stops

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Piece:
    """A piece of an answer that becomes visible at once, most often one token."""

    text: str
    model: str
    reason: str | None = None  # the finish reason; None if the answer goes on
    logprobs: list[tuple[str, Token]] = field(default_factory=list)  # text and token, for each token
    layers: list[tuple[int, bool]] = field(default_factory=list)  # layers run and whether it was a breach, per token


class Answering:
    """The answer to one prompt. Iterate over its pieces; the metrics count it once it is complete."""

    def __init__(
        self, hub: Hub, stream: Stream, wanted: Wanted, readers: dict[str, Reader], scripts: dict[str, Script],
        began_s: float, name: str,
    ) -> None:  # fmt: skip
        self._hub, self._stream, self._wanted, self._readers, self._scripts = hub, stream, wanted, readers, scripts
        self._began_s, self._last_s, self._name = began_s, began_s, name
        self._gaps_s: list[float] = []
        self._first_s: float | None = None
        self._stops = Stops(wanted.stop)
        self._growing: Growing | None = None
        self._model, self._replica = "", 0
        self.prompt_tokens = 0
        self.tokens = 0  # tokens of the answer so far

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yields the pieces as they come. Raises Problem or Gone if the answer does not complete.

        The request is then cancelled. After a stop string, the engine is told to end the answer.
        """
        waits, whole = Piece("", ""), False
        try:
            while (item := await self._stream.get()) is not None:
                token, model, self._replica = item
                self._follow(model)
                waits.model, whole = model, token.last
                text = "" if token.ended else self._add(token, waits)
                new, stopped = self._stops.add(text)
                waits.text += new
                if token.last and not stopped:
                    assert self._growing is not None
                    tail, stopped = self._stops.add(self._growing.rest())
                    waits.text += tail + ("" if stopped else self._stops.rest())
                if stopped or token.last:
                    waits.reason = "stop" if stopped or token.ended else "length"
                    self._finish(model, waits.reason)
                    yield waits
                    return
                if waits.text:
                    yield waits
                    waits = Piece("", model)
            raise Problem(500, "The answer ended without a last token", None, "no_last_token")
        finally:
            if whole:  # the request leaves the engine by itself
                self._stream.closed = True
            if waits.reason:
                self._hub.end_answer(self._stream)
            self._hub.cancel(self._stream, LEFT)

    def _follow(self, model: str) -> None:
        """Continues the text in this model's tokens. Raises Problem if the client asked for another model only."""
        if model == self._model:
            return
        if self._stream.ask.model not in (None, model):
            raise Problem(503, f"{self._stream.ask.model} has left memory: the policy serves {model}", "model",
                          "model_not_loaded", 5)  # fmt: skip
        prompt = self._stream.ask.prompts[model]
        self._model, self.prompt_tokens = model, len(prompt)
        self._growing = Growing(self._readers[model], prompt)

    def _add(self, token: Token, piece: Piece) -> str:
        now_s, metrics = monotonic(), self._hub.metrics
        if self._first_s is None:
            self._first_s = now_s
            metrics.note_first(self._model, self._replica, now_s - self._began_s)
        else:
            metrics.note_gap(self._model, self._replica, now_s - self._last_s)
            self._gaps_s.append(now_s - self._last_s)
        self._last_s = now_s
        self.tokens += 1
        number = token.token
        if number is None:
            number = self._scripts[self._model].token(token.request_id, token.number)
        assert self._growing is not None
        text = self._growing.add(number)
        if self._wanted.logprobs and token.logprob is not None:
            piece.logprobs.append((self._readers[self._model].decode([number]), token))
        if self._wanted.depths:
            piece.layers.append((token.layers, token.breach))
        return text

    def _finish(self, model: str, reason: str) -> None:
        first_s = self._last_s if self._first_s is None else self._first_s
        ttft_s, e2e_s = first_s - self._began_s, self._last_s - self._began_s
        self._hub.metrics.note_answered(model, self._replica, reason, ttft_s, e2e_s, self.tokens)
        self._hub.note_answer(self._stream, {
            "request": self._name, "ended_unix_s": time(), "model": model, "reason": reason,
            "prompt_tokens": self.prompt_tokens, "output_tokens": self.tokens, "ttft_s": ttft_s, "e2e_s": e2e_s,
            "gaps_s": self._gaps_s,
        })  # fmt: skip

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
        }


class Writer:
    """Writes pieces of answers as chunks, or joins them into a whole answer."""

    def __init__(self, wanted: Wanted, answer_id: str, created: int, readers: dict[str, Reader]) -> None:
        self._wanted, self._id, self._created, self._readers = wanted, answer_id, created, readers
        self._begun: set[int] = set()

    def chunk(self, index: int, piece: Piece, usage: dict[str, int] | None) -> bytes:
        choice: dict[str, Any] = {"index": index}
        if self._wanted.chat:
            delta: dict[str, Any] = {} if index in self._begun else {"role": "assistant"}
            if piece.text or index not in self._begun:
                delta["content"] = piece.text
            choice["delta"] = delta
        else:
            choice["text"] = piece.text
        self._begun.add(index)
        choice["logprobs"] = self._logprobs([piece])
        choice["finish_reason"] = piece.reason
        if self._wanted.depths:
            choice["helios"] = self._depths([piece])
        return self._event([choice], piece.model, usage if self._wanted.usage_in_chunks else None)

    def usage(self, usage: dict[str, int], model: str) -> bytes:
        return self._event([], model, usage)

    def whole(self, answers: Sequence[Sequence[Piece]], usage: dict[str, int]) -> dict[str, Any]:
        choices = []
        for index, pieces in enumerate(answers):
            text, reason = "".join(piece.text for piece in pieces), pieces[-1].reason
            choice: dict[str, Any] = {"index": index}
            if self._wanted.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choice |= {"logprobs": self._logprobs(pieces), "finish_reason": reason}
            if self._wanted.depths:
                choice["helios"] = self._depths(pieces)
            choices.append(choice)
        return {
            "id": self._id, "object": "chat.completion" if self._wanted.chat else "text_completion",
            "created": self._created, "model": answers[-1][-1].model, "choices": choices, "usage": usage,
            "system_fingerprint": None,
        }  # fmt: skip

    def _event(self, choices: list[dict[str, Any]], model: str, usage: dict[str, int] | None) -> bytes:
        kind = "chat.completion.chunk" if self._wanted.chat else "text_completion"
        event: dict[str, Any] = {
            "id": self._id, "object": kind, "created": self._created, "model": model, "choices": choices,
        }  # fmt: skip
        if usage is not None:
            event["usage"] = usage
        return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    def _depths(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return [{"layers": layers, "breach": breach} for piece in pieces for layers, breach in piece.layers]

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._wanted.logprobs:
            return None
        found = [(piece.model, text, token) for piece in pieces for text, token in piece.logprobs]
        if self._wanted.chat:
            return {"content": [self._entry(model, text, token) for model, text, token in found], "refusal": None}
        top = [self._best(model, token) for model, _, token in found] if self._wanted.top_logprobs else None
        offsets, at = [], 0
        for _, text, _ in found:
            offsets.append(at)
            at += len(text)
        return {
            "tokens": [text for _, text, _ in found],
            "token_logprobs": [token.logprob[0] for *_, token in found if token.logprob is not None],
            "top_logprobs": None if top is None else [{text: value} for text, value in top],
            "text_offset": offsets,
        }

    def _entry(self, model: str, text: str, token: Token) -> dict[str, Any]:
        assert token.logprob is not None
        top = []
        if self._wanted.top_logprobs:
            best, value = self._best(model, token)
            top = [{"token": best, "logprob": value, "bytes": list(best.encode())}]
        return {"token": text, "logprob": token.logprob[0], "bytes": list(text.encode()), "top_logprobs": top}

    def _best(self, model: str, token: Token) -> tuple[str, float]:
        assert token.logprob is not None
        return self._readers[model].decode([token.logprob[1]]), token.logprob[2]


def error_event(problem: Problem) -> bytes:
    """The event that ends a stream with an error after it has begun."""
    return b"data: " + json.dumps(problem.body).encode() + b"\n\n" + DONE
