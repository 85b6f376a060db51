"""What prompts have in common: the texts that they begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from helios_sim.core.layout import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefixes:
    """Rows of segments: row i is those from `starts[i]` to `starts[i + 1]`, which a prompt of that row begins with.

    A segment is the text of its id up to where it ends, in characters from the start of the prompt; two prompts have
    the same text as far as their segments are the same. What follows the last one is the request's own.
    """

    starts: IntArray  # (rows + 1,)
    ids: IntArray  # (segments,), at least 0
    end_chars: IntArray  # (segments,)

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[int, int]]]) -> SharedPrefixes:
        """From the segments of each row: their id, and the characters that each has."""
        starts = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        ids = np.array([text for row in rows for text, _ in row], np.int64)
        ends = np.array([end for row in rows for end in np.cumsum([chars for _, chars in row])], np.int64)
        return cls(starts, ids, ends)
