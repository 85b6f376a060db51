"""Sliding measurements that policies and triggers read. They are folded in step order and hold a bounded history."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from helios_sim.request import NS_PER_S

RECENT = 256  # arrivals and completed requests that sliding means look back on


class BreachWindow:
    """The confidence breach counter: breaches among the last `window_tokens` decode tokens."""

    def __init__(self, window_tokens: int, limit: int) -> None:
        self.window_tokens = window_tokens
        self.limit = limit
        self._flags = np.zeros(0, np.int64)

    @property
    def breaches(self) -> int:
        return int(self._flags.sum())

    @property
    def over_limit(self) -> bool:
        return len(self._flags) >= self.window_tokens and self.breaches > self.limit

    def clear(self) -> None:
        self._flags = np.zeros(0, np.int64)

    @property
    def flags(self) -> NDArray[np.int64]:
        """The latest tokens, at most the window, oldest first: 1 for a breach."""
        return self._flags

    @flags.setter
    def flags(self, flags: NDArray[np.int64]) -> None:
        self._flags = flags

    def first_over_limit(self, breach: NDArray[np.bool_]) -> int | None:
        """Index of the first iteration at whose end the full window holds more than the limit.

        `breach` has shape (k, D): iterations by requests. None if there is no such iteration.
        """
        k, batch = breach.shape
        flags = np.concatenate([self._flags, breach.ravel()])
        until = np.concatenate([[0], np.cumsum(flags)])
        ends = len(self._flags) + batch * np.arange(1, k + 1)
        in_window = until[ends] - until[np.maximum(ends - self.window_tokens, 0)]
        over = np.flatnonzero((ends >= self.window_tokens) & (in_window > self.limit))
        return int(over[0]) if len(over) else None

    def add(self, breach: NDArray[np.bool_]) -> None:
        """Folds in iterations of shape (k, D), in order of iteration and then of request."""
        flags = np.concatenate([self._flags, breach.ravel()])
        self._flags = flags[-self.window_tokens :]


class Recent:
    """Latest completed requests and arrivals of a replica."""

    def __init__(self) -> None:
        self._prompt_tokens: deque[int] = deque(maxlen=RECENT)
        self._output_tokens: deque[int] = deque(maxlen=RECENT)
        self._arrivals_ns: deque[int] = deque(maxlen=RECENT)

    def completed(self, prompt_tokens: int, output_tokens: int) -> None:
        self._prompt_tokens.append(prompt_tokens)
        self._output_tokens.append(output_tokens)

    def arrived(self, now_ns: int) -> None:
        self._arrivals_ns.append(now_ns)

    @property
    def prompt_tokens_mean(self) -> float | None:
        return sum(self._prompt_tokens) / len(self._prompt_tokens) if self._prompt_tokens else None

    @property
    def output_tokens_mean(self) -> float | None:
        return sum(self._output_tokens) / len(self._output_tokens) if self._output_tokens else None

    @property
    def arrival_rate_per_s(self) -> float | None:
        """None with fewer than two arrivals or when all came at once."""
        if len(self._arrivals_ns) < 2 or self._arrivals_ns[-1] == self._arrivals_ns[0]:
            return None
        return (len(self._arrivals_ns) - 1) * NS_PER_S / (self._arrivals_ns[-1] - self._arrivals_ns[0])
