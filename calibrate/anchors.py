"""The two steps that are timed all along, so that samples of another second are comparable. Knows no table.

As `helios_sim.live.pace` has them: whoever serves from the profile times the same steps again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from calibrate.device import Step
from calibrate.points import Point
from calibrate.sampling import Job
from calibrate.subject import Subject
from helios_sim.profile.pace import DECODE, DECODE_KV_TOKENS, DECODE_ROWS, PROMPT, PROMPT_ROWS

CARD_PROMPT_ROWS = 512  # fewer wait for memory on a card


def anchor_places(subject: Subject) -> dict[str, tuple[int, int]]:
    """Of each the tokens that are computed at once, and of decodes the tokens of each context."""
    limits = subject.limits
    kv_tokens = max(1, min(DECODE_KV_TOKENS, limits.max_kv_tokens // 4))
    prompt_rows = CARD_PROMPT_ROWS if subject.device.asynchronous else PROMPT_ROWS
    return {
        DECODE: (min(DECODE_ROWS, limits.max_batch), kv_tokens),
        PROMPT: (min(prompt_rows, limits.max_chunk), 0),
    }


def nearer_anchor(subject: Subject, rows: int) -> str:
    """That of decodes or that of a prompt, for what is computed for so many tokens at once."""
    (few, _), (many, _) = anchor_places(subject).values()
    return DECODE if rows < (few * many) ** 0.5 else PROMPT


def anchor_jobs(subject: Subject) -> dict[str, Job]:
    return {name: _job(subject, *place) for name, place in anchor_places(subject).items()}


def _job(subject: Subject, rows: int, kv_tokens: int) -> Job:
    def build() -> Sequence[Step]:
        step = subject.decode_step([kv_tokens] * rows) if kv_tokens else subject.prompt_step(rows, 0)
        return [partial(subject.model.run, subject.hidden(rows), 0, subject.n_layers, step)]

    point = Point("anchor", -1, rows, kv_tokens)
    return Job((point,), build, lambda laps_s: {point: laps_s[0]})
