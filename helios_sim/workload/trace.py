"""A recorded workload in memory: arrivals and lengths in tokens. Knows no file format; `readers` makes these."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Columns of shape (n,), dtype int64, n >= 1, by arrival; lengths are at least 1 token."""

    source: str  # the file, for messages and reports
    arrival_ns: NDArray[np.int64] | None  # from 0, not decreasing; None: the file has lengths only
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    notices: tuple[str, ...] = ()  # what the reader changed, for the report

    def __len__(self) -> int:
        return len(self.prompt_tokens)
