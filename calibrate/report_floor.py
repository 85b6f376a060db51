"""The least time that each table's entries could take on the measured ceilings. Knows shapes and bytes, no kernel.

Bytes are those that must be read: weights once, K and V of every token attended to. Operations are two a weight and
row, and four a query, key and head width in attention. Activations are left out, which keeps it a floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calibrate.ceilings import Ceilings
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class OverFloor:
    """One entry of a table, or the sum of one layer of each class."""

    table: str
    place: tuple[int, ...]
    time_s: float
    floor_s: float
    iqr_s: float | None
    samples: int | None

    @property
    def ratio(self) -> float:
        return self.time_s / self.floor_s


def over_floor(profile: Profile, ceilings: Ceilings) -> dict[str, list[OverFloor]]:
    """By table, for the first class of layers; tables whose floor is next to nothing are left out."""
    spec = profile.model
    layer = profile.layer_tables[0]
    found: dict[str, list[OverFloor]] = {}
    by_rows = {"dense": layer.dense, "kv_projection": layer.kv_projection, "head": profile.head}
    if profile.check is not None:
        by_rows["check"] = profile.check
    for name, rows in by_rows.items():
        found[name] = [
            OverFloor(
                name,
                (int(n),),
                float(rows.time_s[i]),
                ceilings.floor_s(*_work_of_rows(spec, name, int(n))),
                None if rows.iqr_s is None else float(rows.iqr_s[i]),
                None if rows.samples is None else int(rows.samples[i]),
            )
            for i, n in enumerate(rows.rows)
        ]
    for name, grid in (("decode_attention", layer.decode_attention), ("prefill_attention", layer.prefill_attention)):
        found[name] = [
            OverFloor(
                name,
                (int(a), int(b)),
                float(grid.time_s[i, j]),
                ceilings.floor_s(*_work_of_attention(spec, name, int(a), int(b))),
                None if grid.iqr_s is None else float(grid.iqr_s[i, j]),
                None if grid.samples is None else int(grid.samples[i, j]),
            )
            for i, a in enumerate(grid.first)
            for j, b in enumerate(grid.second)
        ]
    return found


def median_ratio(entries: Sequence[OverFloor]) -> float:
    ordered = sorted(entry.ratio for entry in entries)
    return ordered[len(ordered) // 2]


def below_floor(found: dict[str, list[OverFloor]]) -> list[OverFloor]:
    """Entries faster than the ceilings allow: failed measurements. Attention, a difference of two, may be noise."""
    return [e for entries in found.values() for e in entries if e.ratio < 1 and "attention" not in e.table]


def _work_of_rows(spec: ModelSpec, table: str, rows: int) -> tuple[float, float]:
    """(bytes, operations)"""
    values = {
        "dense": spec.layer_values,
        "kv_projection": 2 * spec.d_model * spec.kv_width,
        "head": spec.vocab_size * spec.d_model,
        "check": spec.vocab_size * spec.d_model,
    }[table]
    return values * spec.weight_bytes_per_value, 2.0 * rows * values


def _work_of_attention(spec: ModelSpec, table: str, first: int, second: int) -> tuple[float, float]:
    """(bytes, operations)"""
    width = spec.n_heads * spec.head_dim
    if table == "decode_attention":
        pairs, kv = first * second, first * second
    else:
        pairs, kv = first * second + first * (first + 1) // 2, first + second
    return kv * spec.kv_bytes_per_token_layer, 4.0 * width * pairs
