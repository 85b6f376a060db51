"""Profiles whose every cost is a line through given numbers: unlike a flat one, depth, rows and KV all cost time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from helios_sim.profile.profile import Profile
from helios_sim.profile.synthetic import GRID_END, flat_profile
from helios_sim.profile.tables import GridTable, LayerTables, RowsTable

_ROWS = np.array([1, GRID_END], dtype=np.int64)
_KV = np.array([0, GRID_END], dtype=np.int64)


def line(first_s: float, per_row_s: float = 0.0) -> RowsTable:
    """first_s for one row and per_row_s for each further one."""
    return RowsTable(_ROWS, np.array([first_s, first_s + per_row_s * (GRID_END - 1)]))


def priced_profile(
    name: str = "a",
    *,
    n_layers: int = 4,
    layer_s: float = 1e-3,  # of a layer, for one row
    row_s: float = 0.0,  # of a layer, for each further row
    kv_projection_s: float = 0.0,  # of a layer's K and V, whatever the rows
    kv_token_s: float = 0.0,  # of a layer's decode attention, for each KV token
    prefill_token_s: float = 0.0,  # of a layer's prefill attention, for each new token; above kv_token_s
    head_s: float = 0.0,
    check_s: float | None = None,  # None: a check goes through the head
    classifier_s: float | None = None,  # None: no classifier's cost is known
    launch_s_per_layer: float = 0.0,
    launch_s_per_graph: float = 0.0,
    sync_s: float = 0.0,
    host_s: float = 0.0,
    load_slowdown: float = 1.0,
    hbm_bytes: int = 40 * 2**30,
    load_bytes_per_s: float = 25e9,
    chars_per_token: float = 1.0,
    max_context_tokens: int = 1 << 20,
) -> Profile:
    profile = flat_profile(
        host_s, n_layers=n_layers, name=name, hbm_bytes=hbm_bytes, load_bytes_per_s=load_bytes_per_s,
        chars_per_token=chars_per_token, max_context_tokens=max_context_tokens,
    )  # fmt: skip
    batches = np.array([1, 4096])
    decode_s = kv_token_s * batches[:, None] * _KV[None, :]
    prefill_s = np.array([[prefill_token_s * tokens + kv_token_s * kv for kv in _KV] for tokens in _ROWS])
    layer = LayerTables(
        line(layer_s, row_s), line(kv_projection_s), GridTable(batches, _KV, decode_s), GridTable(_ROWS, _KV, prefill_s)
    )
    runtime = replace(
        profile.runtime, launch_s_per_layer=launch_s_per_layer, launch_s_per_graph=launch_s_per_graph, sync_s=sync_s
    )
    return replace(
        profile,
        runtime=runtime,
        layer_tables=(layer,),
        head=line(head_s),
        check=None if check_s is None else line(check_s),
        check_classifier=None if classifier_s is None else line(classifier_s),
        load_slowdown=load_slowdown,
    )
