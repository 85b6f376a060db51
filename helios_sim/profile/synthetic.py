"""Profiles with costs known in closed form, for oracles in tests."""

from __future__ import annotations

import numpy as np

from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Basis, CostSource, HardwareSpec, ModelSpec, Runtime
from helios_sim.profile.tables import GridTable, LayerTables, RowsTable
from helios_sim.provenance import Provenance, ProvenanceClass

GRID_END = 65_536


def flat_profile(
    iteration_s: float,
    *,
    n_layers: int = 4,
    hbm_bytes: int = 40 * 2**30,
    max_context_tokens: int = 1 << 20,
    name: str = "flat",
    chars_per_token: float = 1.0,
    load_bytes_per_s: float = 25e9,
) -> Profile:
    """A profile on which every iteration takes exactly `iteration_s`: a server of constant service time.

    The model is tiny (head size 1), so that memory binds only where a test wants it to.
    """
    rows = np.array([1, GRID_END], dtype=np.int64)
    nothing = RowsTable(rows, np.zeros(2))
    no_attention = GridTable(np.array([1, 4096]), np.array([0, GRID_END]), np.zeros((2, 2)))
    model = ModelSpec(
        name=name, family="llama", n_layers=n_layers, d_model=2, n_heads=1, n_kv_heads=1, head_dim=1, d_ff=2,
        gated_mlp=False, vocab_size=16, tied_embeddings=True, max_context_tokens=max_context_tokens,
        learned_positions=False, bias=False, weight_bytes_per_value=2, kv_bytes_per_value=2,
        chars_per_token=chars_per_token,
    )  # fmt: skip
    hardware = HardwareSpec(
        name="anywhere", hbm_bytes=hbm_bytes, hbm_bytes_per_s=1e15, flops_per_s=1e18, tdp_w=1.0, idle_w=None,
        source="synthetic: no card",
    )  # fmt: skip
    runtime = Runtime(
        launch_s_per_layer=0.0, launch_s_per_graph=0.0, sync_s=0.0, host_overhead_s=iteration_s,
        graph_batch_sizes=None,
        sources=(CostSource("host_overhead_s", Basis.STATED, "synthetic: the whole iteration"),),
    )  # fmt: skip
    return Profile(
        model=model, hardware=hardware, runtime=runtime,
        provenance=Provenance(ProvenanceClass.DERIVED, "synthetic: constant iteration time", "flat_profile"),
        layer_tables=(LayerTables(nothing, nothing, no_attention, no_attention),),
        layer_class=(0,) * n_layers, head=nothing, embedding=nothing, check=None,
        activation_reserve_bytes=0, load_bytes_per_s=load_bytes_per_s,
    )  # fmt: skip
