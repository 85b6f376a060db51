"""The column names that traces use. Knows what each name means and its unit, not how a file is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from helios_sim.errors import UserError


class Role(StrEnum):
    ARRIVAL = "arrival"
    PROMPT = "prompt length"
    OUTPUT = "output length"


class Kind(StrEnum):
    """How a cell is written."""

    TOKENS = "tokens"
    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    NANOSECONDS = "nanoseconds"
    DATE = "date"  # 2023-11-16 18:15:46.6805900


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    role: Role
    kind: Kind


_KNOWN = {
    column.name: column
    for column in (
        Column("arrival_s", Role.ARRIVAL, Kind.SECONDS),  # ours; Vidur's request metrics
        Column("arrival_ns", Role.ARRIVAL, Kind.NANOSECONDS),  # LLMServingSim
        Column("timestamp", Role.ARRIVAL, Kind.MILLISECONDS),  # Mooncake
        Column("TIMESTAMP", Role.ARRIVAL, Kind.DATE),  # Azure 2023
        Column("prompt_tokens", Role.PROMPT, Kind.TOKENS),
        Column("prefill_tokens", Role.PROMPT, Kind.TOKENS),  # Vidur
        Column("num_prefill_tokens", Role.PROMPT, Kind.TOKENS),  # Vidur's processed traces
        Column("input_toks", Role.PROMPT, Kind.TOKENS),  # LLMServingSim, vLLM logs
        Column("input_length", Role.PROMPT, Kind.TOKENS),  # Mooncake
        Column("ContextTokens", Role.PROMPT, Kind.TOKENS),  # Azure 2023
        Column("output_tokens", Role.OUTPUT, Kind.TOKENS),
        Column("decode_tokens", Role.OUTPUT, Kind.TOKENS),
        Column("num_decode_tokens", Role.OUTPUT, Kind.TOKENS),
        Column("output_toks", Role.OUTPUT, Kind.TOKENS),
        Column("output_length", Role.OUTPUT, Kind.TOKENS),
        Column("GeneratedTokens", Role.OUTPUT, Kind.TOKENS),
    )
}


def find_columns(source: str, names: Sequence[str]) -> tuple[Column, ...]:
    """The columns of a file that a workload needs, one for each role; the arrival may be missing.

    Raises UserError where a length is missing or two columns have the same role.
    """
    found = tuple(_KNOWN[name] for name in names if name in _KNOWN)
    for role in Role:
        mine = [column.name for column in found if column.role is role]
        known = ", ".join(column.name for column in _KNOWN.values() if column.role is role)
        if len(mine) > 1:
            raise UserError(f"{source}, {role} column", mine, "there must be one", "remove or rename the others")
        if not mine and role is not Role.ARRIVAL:
            raise UserError(
                f"{source}, columns", list(names), f"the {role} column is called one of: {known}", "rename a column"
            )
    return found
