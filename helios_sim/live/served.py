"""A model as it is served: weights on disk, exit heads, tokenizer, and what the simulation knows of it.

Requests are spans of text. Their lengths in tokens are those of the simulation, to the token: prompts by the profile's
mean token, answers by the exit trace. The prompt's words are real, the text just before the recorded answer; the answer
is whatever the model writes, exactly as many tokens as planned: an end token does not end it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from helios_sim.exits.trace import BoundTrace, TokenSpan
from helios_sim.live.heads import ExitHeads
from helios_sim.live.weights import TensorSource
from helios_sim.profile.profile import Profile
from helios_sim.request import Request

_DTYPES = {4: torch.float32, 2: torch.bfloat16}


class Texts(Protocol):
    """Where the words of prompts come from."""

    def prompt(self, task: int, start: int, chars: int) -> str:
        """The `chars` characters of the workload's task number `task` that end just before character `start`.

        `start` is a request's `text_start`, where the recorded answer begins: any whole number. A task's text is
        circular, so that every span is there, however long.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LiveModel:
    """`tokenizer` is transformers'. The profile is what policies predict with; its bytes say the weights' dtype.

    `replays`: the weights are random, so the trace says who is confident and what would have changed.
    """

    checkpoint: TensorSource
    heads: ExitHeads
    tokenizer: Any
    profile: Profile
    trace: BoundTrace
    replays: bool = False
    start_token: int | None = field(init=False)  # of a text, where the vocabulary has one

    def __post_init__(self) -> None:
        # Looked up once: the vocabulary is made into a dictionary anew whenever it is asked for.
        object.__setattr__(self, "start_token", _start_token(self.tokenizer, self.checkpoint.architecture.vocab_size))

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and KV: policies and the server count with the bytes that the profile says."""
        return _DTYPES[self.profile.model.weight_bytes_per_value]

    @property
    def exits(self) -> tuple[int, ...]:
        """Depths at which a token may leave; the last is the whole model."""
        return self.trace.trace.exits

    def lengths(self, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        """Prompt tokens, with the characters answered so far, and the span of what is still to be answered."""
        span = self.trace.locate(
            request.task, request.text_start + answered_chars, request.output_chars - answered_chars
        )
        return self.profile.model.tokens(request.prompt_chars + answered_chars), span

    def prompt_ids(self, request: Request, texts: Texts, n_tokens: int, answered: str = "") -> list[int]:
        """Exactly `n_tokens` ids: a start token and the end of the text so far, `answered` included.

        The text is taken as long as it has to be, since tokens are longer in some places than the mean.
        """
        chars = max(16, round(2 * n_tokens * self.profile.model.chars_per_token))
        while True:
            text = texts.prompt(request.task, request.text_start, chars) + answered
            ids = self.encode(text)
            if len(ids) >= n_tokens:
                break
            chars *= 2
        start = self.start_token
        return ids[-n_tokens:] if start is None or n_tokens < 2 else [start, *ids[1 - n_tokens :]]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _start_token(tokenizer: Any, vocab_size: int) -> int | None:
    """The token between documents where the vocabulary has one, as in pretraining, else the tokenizer's own.

    A tokenizer may know tokens past the model's rows.
    """
    known = tokenizer.get_vocab()
    names = ("<bos>", "<|endoftext|>", tokenizer.bos_token, tokenizer.eos_token)
    return next((int(known[n]) for n in names if n in known and known[n] < vocab_size), None)
