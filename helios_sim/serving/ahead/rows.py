"""Requests as objects and as rows of arrays. Knows both, and no step of the loop."""

from __future__ import annotations

import numpy as np

from helios_sim.exits.trace import TokenSpan
from helios_sim.profile.composition import IntArray
from helios_sim.request import Request, RequestRecord, Status
from helios_sim.serving.ahead import layout as at
from helios_sim.serving.batch import Sequence, batch_row, take_row
from helios_sim.serving.replica import CONTEXT_EXCEEDED, POOL_EXCEEDED

WHY_DROPPED = {at.CONTEXT_EXCEEDED: CONTEXT_EXCEEDED, at.POOL_EXCEEDED: POOL_EXCEEDED}


def _moment(time_ns: int | None) -> int:
    return at.NEVER if time_ns is None else time_ns


def time_of(value: int) -> int | None:
    return None if value == at.NEVER else value


def slot_row(sequence: Sequence, member: int) -> list[int]:
    """A request that is not in the batch as a row of slots; `member` is where its object is found again."""
    request = sequence.request
    row = [*batch_row(sequence, 0), *[0] * (at.SLOT_COLUMNS - at.BATCH_COLUMNS)]
    row[at.PROMPT_TOKENS], row[at.OUTPUT_TOKENS] = sequence.prompt_tokens, sequence.output_tokens
    row[at.SCHEDULED_NS] = _moment(sequence.scheduled_ns)
    row[at.FIRST_TOKEN_NS] = _moment(sequence.first_token_ns)
    row[at.PREEMPTIONS], row[at.STARTED] = sequence.preemptions, int(sequence.started)
    row[at.EARLIER_CHARS], row[at.EARLIER_TOKENS] = sequence.earlier_chars, sequence.earlier_tokens
    row[at.REQUEST_ID], row[at.ARRIVAL_NS] = request.request_id, request.arrival_ns
    row[at.PROMPT_CHARS], row[at.OUTPUT_CHARS] = request.prompt_chars, request.output_chars
    row[at.TASK], row[at.TEXT_START], row[at.MEMBER] = request.task, request.text_start, member
    return row


def sequence_of(row: list[int], known: list[Sequence], model: str) -> Sequence:
    """The request of a row of slots: the object that it was before, or a new one."""
    if row[at.MEMBER] != at.NEVER:
        sequence = known[row[at.MEMBER]]
    else:
        tokens = row[at.OUTPUT_TOKENS]
        span = TokenSpan(row[at.FIRST], row[at.START], row[at.LENGTH], tokens)
        sequence = Sequence(request_of(row), model, row[at.PROMPT_TOKENS], tokens, span)
    take_row(sequence, row)
    sequence.scheduled_ns = time_of(row[at.SCHEDULED_NS])
    sequence.first_token_ns = time_of(row[at.FIRST_TOKEN_NS])
    sequence.preemptions = row[at.PREEMPTIONS]
    sequence.started = bool(row[at.STARTED])
    return sequence


def request_of(row: list[int]) -> Request:
    return Request(
        request_id=row[at.REQUEST_ID],
        arrival_ns=row[at.ARRIVAL_NS],
        prompt_chars=row[at.PROMPT_CHARS],
        output_chars=row[at.OUTPUT_CHARS],
        task=row[at.TASK],
        text_start=row[at.TEXT_START],
    )


def record_of(row: list[int], replica: int, model: str, scores_text: bool) -> RequestRecord:
    """The record of a row of slots that has left."""
    why = row[at.WHY]
    return RequestRecord(
        request_id=row[at.REQUEST_ID],
        replica=replica,
        task=row[at.TASK],
        model=model,
        status=Status.DROPPED if why else Status.COMPLETED,
        drop_reason=WHY_DROPPED[why].format(model) if why else None,
        arrival_ns=row[at.ARRIVAL_NS],
        scheduled_ns=time_of(row[at.SCHEDULED_NS]),
        first_token_ns=time_of(row[at.FIRST_TOKEN_NS]),
        last_token_ns=time_of(row[at.LAST_TOKEN_NS]),
        prompt_tokens=row[at.PROMPT_TOKENS],
        output_tokens=row[at.EARLIER_TOKENS] + row[at.GENERATED],
        prompt_chars=row[at.PROMPT_CHARS],
        output_chars=row[at.OUTPUT_CHARS],
        layers_run=row[at.LAYERS_RUN],
        early_tokens=row[at.EARLY],
        breach_tokens=row[at.BREACH],
        agreed_tokens=row[at.AGREED],
        evaluated_tokens=row[at.EVALUATED],
        preemptions=row[at.PREEMPTIONS],
        microbits=row[at.MICROBITS] if scores_text else None,
    )


def rows_of(columns: IntArray, n: int) -> list[list[int]]:
    rows: list[list[int]] = columns[:n].tolist()
    return rows


def empty(*shape: int) -> IntArray:
    return np.zeros(shape, np.int64)
