"""Named sets of host costs: two generic ones, and those of engines by version.

An engine's set has the batch sizes of its captured graphs, from its sources, and the host's time of an iteration: of
those versions for which end-to-end measurements of others were at hand it is fitted to one half of these
(experiments/fidelity_silicon), of the others it is that of the nearest version. It goes with the settings of the server
in conf/engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from helios_sim.errors import UserError
from helios_sim.profile.spec import Basis, CostSource, Runtime

# vLLM's default capture sizes: 1, 2, 4, then every 8
GRAPH_BATCH_SIZES = (1, 2, 4, *range(8, 513, 8))

_SYNC = CostSource(
    "sync_s", Basis.ASSUMED, "device to host copy of a few bytes and back to the launching thread, 10 to 30 us"
)
_OVERHEAD = CostSource(
    "host_overhead_s", Basis.ASSUMED, "batch scheduling, sampling results and detokenization of a tuned engine"
)
PRESETS = {
    "captured_graphs": Runtime(
        launch_s_per_layer=0.0, launch_s_per_graph=20e-6, sync_s=20e-6, host_overhead_s=200e-6,
        graph_batch_sizes=GRAPH_BATCH_SIZES,
        sources=(
            CostSource(
                "launch_s_per_layer", Basis.DEFINITION,
                "the layers are inside the graph; prefill is taken to hide its eager launches",
            ),
            CostSource(
                "launch_s_per_graph", Basis.ASSUMED, "one graph launch, of the order of 10 us plus argument copies"
            ),
            _SYNC,
            _OVERHEAD,
            CostSource(
                "graph_batch_sizes", Basis.STATED, "vLLM's default capture sizes: 1, 2, 4, then multiples of 8 to 512"
            ),
        ),
    ),
    "eager": Runtime(
        launch_s_per_layer=100e-6, launch_s_per_graph=0.0, sync_s=20e-6, host_overhead_s=200e-6,
        graph_batch_sizes=None,
        sources=(
            CostSource(
                "launch_s_per_layer", Basis.ASSUMED,
                "about 15 kernels a layer at 4 to 6 us each (susun-blog.com/blog/pegainfer-3-cuda-graph), "
                "somewhat more from Python; swept from 0 to 0.5 ms (vLLM of 2023 on 8 cards was bound by its host at "
                "0.4 to 0.6 ms a layer, communication included: experiments/profile_validation)",
            ),
            CostSource("launch_s_per_graph", Basis.DEFINITION, "no graphs"),
            _SYNC,
            _OVERHEAD,
            CostSource("graph_batch_sizes", Basis.DEFINITION, "no graphs, so no padding"),
        ),
    ),
}

_EVERY_8 = (1, 2, 4, *range(8, 257, 8))
HOST_TIME = "the engine's host time"  # its name among the inputs of a study, if it is fitted
FIT = "python experiments/fidelity_silicon/fit.py"
_FIT = "to one half of {n} rows of {what}, drawn by a hash of their ids (experiments/fidelity_silicon)"
_NEAREST = "to rows of {of}, the nearest version of which measurements were at hand (experiments/fidelity_silicon)"


def _engine(
    sizes: tuple[int, ...], sizes_from: str, host: Mapping[str, float], fitted_to: str
) -> Runtime:
    """An engine with captured graphs; `host` are fields of the runtime, fitted together."""
    plain = PRESETS["captured_graphs"]
    costs = {"host_overhead_s": 0.0, "host_s_per_request": 0.0, **host}
    kept = tuple(s for s in plain.sources if s.quantity not in (*costs, "graph_batch_sizes"))
    own = tuple(CostSource(name, Basis.FITTED, fitted_to) for name in costs)
    sizes_source = CostSource("graph_batch_sizes", Basis.STATED, sizes_from)
    return replace(plain.changed(**costs), graph_batch_sizes=sizes, sources=(*kept, *own, sizes_source))


_V0 = "1, 2, 4, then multiples of 8 to 256 (vllm/worker/model_runner.py of 0.6)"
_V1 = "1, 2, 4, then multiples of 8 to 512 (vllm/config of 0.8 to 0.11)"
_V12 = "1, 2, 4, multiples of 8 to 256, of 16 to 512 (vllm/config/vllm.py since 0.12)"
_TRTLLM = "1, 2, 4, multiples of 8 to 128, powers of 2 to 2048 (CudaGraphConfig, tensorrt_llm/llmapi/llm_args.py)"
_SGLANG = "1, 2, 4, 8, 12, 16, then multiples of 8 to 512 (sglang/srt/model_executor/cuda_graph_runner.py)"
_SIZES_V12 = (*_EVERY_8, *range(272, 513, 16))
_SIZES_TRTLLM = (1, 2, 4, *range(8, 129, 8), 256, 512, 1024, 2048)
_SYNC_12 = {"host_overhead_s": 1.71e-3, "host_s_per_request": 39.7e-6}
# Planned ahead, the host works beside the device; what it takes by itself is that of 0.12, and shows step by step.
_AHEAD_10 = {"host_overhead_s": 1.71e-3, "gap_s": 0.0, "gap_s_per_request": 38.1e-6}
_SIZES_SGLANG = (1, 2, 4, 8, 12, *range(16, 513, 8))
_TRTLLM_10 = {"host_overhead_s": 0.45e-3, "host_s_per_request": 11.7e-6}
_TRTLLM_11 = {"host_overhead_s": 0.0, "host_s_per_request": 0.6e-6}
_SGLANG_05 = {"host_overhead_s": 0.51e-3, "host_s_per_request": 10.4e-6}
PRESETS |= {
    "vllm-0.6": _engine(_EVERY_8, _V0, _SYNC_12, _NEAREST.format(of="vLLM 0.12")),
    "vllm-0.8": _engine(GRAPH_BATCH_SIZES, _V1, _SYNC_12, _NEAREST.format(of="vLLM 0.12")),
    "vllm-0.10": _engine(
        GRAPH_BATCH_SIZES, _V1, _AHEAD_10, _FIT.format(n=50, what="vLLM 0.10.2 with asynchronous scheduling")
    ),
    "vllm-0.12": _engine(_SIZES_V12, _V12, _SYNC_12, _FIT.format(n=45, what="vLLM 0.12.0")),
    "vllm-0.19": _engine(_SIZES_V12, _V12, _AHEAD_10, _NEAREST.format(of="vLLM 0.10")),
    "vllm-0.24": _engine(_SIZES_V12, _V12, _AHEAD_10, _NEAREST.format(of="vLLM 0.10")),
    "trtllm-1.0": _engine(_SIZES_TRTLLM, _TRTLLM, _TRTLLM_10, _FIT.format(n=177, what="TensorRT-LLM 1.0.0rc3")),
    "trtllm-1.1": _engine(_SIZES_TRTLLM, _TRTLLM, _TRTLLM_11, _FIT.format(n=72, what="TensorRT-LLM 1.1.0rc2")),
    "sglang-0.5": _engine(_SIZES_SGLANG, _SGLANG, _SGLANG_05, _FIT.format(n=43, what="SGLang 0.5.1 and 0.5.8")),
}  # fmt: skip


def preset(name: str) -> Runtime:
    """The host costs of a preset. Raises UserError for an unknown name."""
    if name not in PRESETS:
        allowed = f"one of {', '.join(PRESETS)}, or profile for the costs that came with it"
        raise UserError("runtime.preset", name, allowed, "choose one of these")
    return PRESETS[name]
