"""Sliding measurements that policies read, over a bounded history."""

from __future__ import annotations

from collections import deque

from helios_sim.request import NS_PER_S

RECENT = 256  # arrivals and completed requests that sliding means look back on


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
