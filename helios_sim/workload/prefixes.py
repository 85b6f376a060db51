"""Texts that prompts share: common beginnings of prompts, and sessions with a context that grows from turn to turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from helios_sim.core.layout import IntArray
from helios_sim.errors import UserError, require_count
from helios_sim.workload.lengths import Length
from helios_sim.workload.traces import RequestTrace

SessionSampler = Callable[[int, IntArray, IntArray], tuple[IntArray, IntArray]]
"""(index of the first request, lengths of n new texts, lengths of their answers) -> lengths of whole prompts (n,) and
numbers of their sessions (n,)."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefixes:
    """Beginnings of prompts, as rows of segments: a prompt of row i begins with segments `starts[i]:starts[i + 1]`.

    A segment has an id, which stands for its text, and ends at so many characters from the start of the prompt. Two
    prompts have the same text as far as their segments are equal. The text after the last segment is the request's own.
    """

    starts: IntArray  # (rows + 1,)
    ids: IntArray  # (segments,), at least 0
    end_chars: IntArray  # (segments,)

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[int, int]]]) -> SharedPrefixes:
        """Makes the rows from the segments of each: pairs of an id and a number of characters."""
        starts = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        ids = np.array([text for row in rows for text, _ in row], np.int64)
        ends = np.array([end for row in rows for end in np.cumsum([chars for _, chars in row])], np.int64)
        return cls(starts, ids, ends)

    @classmethod
    def of_trace(cls, trace: RequestTrace, id_tokens: int, chars_per_token: float) -> SharedPrefixes | None:
        """Makes the rows from the hash_ids of a trace, each of which covers `id_tokens` tokens; None if it has none.

        UserError if a prompt has more ids than its tokens can hold, or if in the median the ids cover less than half of
        a prompt.
        """
        texts = trace.texts
        if texts is None:
            return None
        counts = np.diff(texts.starts)
        _check_ids(trace, counts, id_tokens)
        place = np.arange(len(texts.ids)) - np.repeat(texts.starts[:-1], counts)
        ends = np.minimum((place + 1) * id_tokens, np.repeat(trace.prompt_tokens, counts))
        return cls(texts.starts, texts.ids, np.rint(ends * chars_per_token).astype(np.int64))


def _check_ids(trace: RequestTrace, counts: IntArray, id_tokens: int) -> None:
    key, fix = "workload.lengths.id_tokens", "set it to the tokens of each of the trace's hash_ids"
    many = np.flatnonzero(counts > -(-trace.prompt_tokens // id_tokens))
    if many.size:
        row = int(many[0])
        told = f"{counts[row]} hash_ids for {trace.prompt_tokens[row]} tokens"
        raise UserError(key, id_tokens, f"request {row + 1} of {trace.source} by arrival has {told}", fix)
    covered = float(np.median(counts * id_tokens / trace.prompt_tokens))
    if covered < 0.5:
        told = f"the ids of {trace.source} would be about {covered:.0%} of a usual prompt"
        raise UserError(key, id_tokens, f"at least half of it: {told}", fix)


@dataclass(frozen=True, slots=True)
class Sessions:
    """Multi-turn sessions. `users` take turns, request after request; each prompt is the session so far and a new text.

    A session ends after its turns, or before it would exceed `longest` tokens; then its user begins another.
    """

    users: int
    turns: Length
    longest: int | None = None

    def __post_init__(self) -> None:
        require_count("workload.sessions.users", self.users, "give at least one user")
        if self.longest is not None:
            require_count("workload.sessions.max_tokens", self.longest, "null for no limit")

    def sampler(self, rng: Generator) -> SessionSampler:
        draw = self.turns.sampler(rng)
        left, said, number = [0] * self.users, [0] * self.users, [0] * self.users
        begun = 0

        def sample(first: int, texts: IntArray, answers: IntArray) -> tuple[IntArray, IntArray]:
            nonlocal begun
            prompts, sessions = np.empty_like(texts), np.empty_like(texts)
            for i, (text, answer) in enumerate(zip(texts.tolist(), answers.tolist(), strict=True)):
                user = (first + i) % self.users
                if not left[user] or (self.longest is not None and said[user] + text + answer > self.longest):
                    left[user], said[user], number[user] = int(draw(1)[0]), 0, begun
                    begun += 1
                prompts[i], sessions[i] = said[user] + text, number[user]
                said[user] += text + answer
                left[user] -= 1
            return prompts, sessions

        return sample
