"""Named host costs. Knows what is assumed and why; nothing here was measured."""

from __future__ import annotations

from helios_sim.errors import UserError
from helios_sim.profile.spec import Runtime

# vLLM's default capture sizes: 1, 2, 4, then every 8
GRAPH_BATCH_SIZES = (1, 2, 4, *range(8, 513, 8))

_SYNC = ("sync_s", "assumed: device to host copy of a few bytes and back to the launching thread, 10 to 30 us")
_OVERHEAD = ("host_overhead_s", "assumed: batch scheduling, sampling results and detokenization of a tuned engine")

PRESETS = {
    "captured_graphs": Runtime(
        launch_s_per_layer=0.0,
        launch_s_per_graph=20e-6,
        sync_s=20e-6,
        host_overhead_s=200e-6,
        graph_batch_sizes=GRAPH_BATCH_SIZES,
        sources=(
            (
                "launch_s_per_layer",
                "by definition: the layers are inside the graph; prefill is taken to hide its eager launches",
            ),
            ("launch_s_per_graph", "assumed: one graph launch, of the order of 10 us plus argument copies"),
            _SYNC,
            _OVERHEAD,
            ("graph_batch_sizes", "vLLM's default capture sizes: 1, 2, 4, then multiples of 8 to 512"),
        ),
    ),
    "eager": Runtime(
        launch_s_per_layer=100e-6,
        launch_s_per_graph=0.0,
        sync_s=20e-6,
        host_overhead_s=200e-6,
        graph_batch_sizes=None,
        sources=(
            (
                "launch_s_per_layer",
                "assumed: about 15 kernels a layer at 4 to 6 us each (susun-blog.com/blog/pegainfer-3-cuda-graph), "
                "somewhat more from Python; swept from 0 to 0.5 ms (vLLM of 2023 on 8 cards was bound by its host at "
                "0.4 to 0.6 ms a layer, communication included: experiments/profile_validation)",
            ),
            ("launch_s_per_graph", "by definition: no graphs"),
            _SYNC,
            _OVERHEAD,
            ("graph_batch_sizes", "by definition: no graphs, so no padding"),
        ),
    ),
}


def preset(name: str) -> Runtime:
    """Raises UserError for an unknown name."""
    if name not in PRESETS:
        allowed = f"one of {', '.join(PRESETS)}, or profile for the costs that came with it"
        raise UserError("runtime.preset", name, allowed, "choose one of these")
    return PRESETS[name]
