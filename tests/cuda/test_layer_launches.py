"""What any layer of a decode step launches, for every family with a gated MLP and every batch size that is captured.

`test_launches.py` counts whole steps of some models; here a layer is at most 9 launches whether its rows are plain,
have left at an exit before, or run beside tokens of their own requests that owe it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")  # there is none for macOS and Windows

from test_launches import META, TARGET, Counting

from helios_sim.exits.rule import Confidence
from helios_sim.live.checkpoint.random_weights import RandomWeights, draw
from helios_sim.live.exits import ExitReader, Row
from helios_sim.live.graphs import SIZES, GraphedDecodes
from helios_sim.live.kernels.card import TRITON
from helios_sim.live.memory.decodes import ExactStep, decode_step_on_device
from helios_sim.live.memory.kv import KvCache
from helios_sim.live.model import weights
from helios_sim.live.model.architecture import Architecture, Rope
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.heads import ExitHeads
from helios_sim.live.one_pass import OnePass, Rule
from kernel_builds import noted

ROWS = [n for n in SIZES if n <= 256]
TOKENS = 4096
LAYERS = 3
SHIPPED = ("llama-2-7b", "llama-2-13b", "llama-3-8b", "codellama-34b", "smollm2-135m")
OF_CONFIGS = {  # d_model, heads, KV heads, width, MLP width
    "qwen2": (896, 14, 2, 64, 4864), "gemma3": (640, 4, 1, 256, 2048),
}  # fmt: skip


def architecture(name: str) -> Architecture:
    """The shape, with few layers; one of Gemma-3's has no window."""
    llama = draw(f"random:{name if name in SHIPPED else 'llama-3-8b'}").architecture
    if name in SHIPPED:
        return replace(llama, n_layers=LAYERS)
    d, heads, kv_heads, width, ff = OF_CONFIGS[name]
    shape = replace(
        llama, family=name, n_layers=LAYERS, d_model=d, n_heads=heads, n_kv_heads=kv_heads, head_dim=width, d_ff=ff
    )
    if name == "gemma3":
        return replace(
            shape, activation="gelu_tanh", window_tokens=512, sliding_rope=Rope(1e4), sliding=(True, False, True)
        )
    return shape


@pytest.fixture(params=[*SHIPPED, *OF_CONFIGS])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SegmentedModel:
    monkeypatch.setattr(weights, "fill", lambda *given: None)
    source = RandomWeights(architecture(request.param), 4.0)
    model = SegmentedModel(source, weights.load_outer(source, torch.bfloat16, META), torch.bfloat16, META, TRITON)
    model.layers = [weights.load_layer(source, i, torch.bfloat16, META) for i in range(LAYERS)]
    return model


def cache_of(model: SegmentedModel) -> KvCache:
    return KvCache(model.architecture, LAYERS, ROWS[-1], TOKENS, torch.bfloat16, META, kernels=TRITON)


def numbers(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(rows, dtype=torch.int64, device=META), torch.empty(rows, dtype=torch.int64, device=META)


def launched(on: Counting, step: object) -> int:
    before = on.ops.launches.total()
    with noted() as own, torch.inference_mode():
        on.prepare(step)
    assert not on.ops.host  # no wait for the host inside a graph, and no copy from it
    return on.ops.launches.total() - before + len(own)


@pytest.mark.parametrize("kind", ["plain", "after an exit", "beside tokens that owe the layer"])
def test_no_layer_is_more_than_nine_kernels(model: SegmentedModel, kind: str) -> None:
    cache, on, found = cache_of(model), Counting(), {}
    for rows in (*ROWS, 2 * ROWS[-1]) if kind.startswith("beside") else ROWS:
        hidden = torch.empty(rows, model.architecture.d_model, dtype=model.dtype, device=META)
        if kind.startswith("beside"):
            attend = decode_step_on_device(cache, *numbers(rows), 0, True, repeated=True)
        else:
            attend = ExactStep(cache, *numbers(rows), frozen=kind == "after an exit")
        upto = [launched(on, partial(model.run, hidden, 0, n, attend)) for n in (1, 2)]
        found[rows] = upto[1] - upto[0]
    assert not {rows: n for rows, n in found.items() if n > TARGET}


def test_what_is_captured_for_tokens_that_owe_layers_are_these(model: SegmentedModel) -> None:
    """A request's earlier tokens beside its last, as serving runs them: no launch but those of the layers and two."""
    cache, on = cache_of(model), Counting()
    graphs = GraphedDecodes(model, cache, on)  # type: ignore[arg-type]
    for rows in (4, 32, 64):
        hidden = torch.empty(2 * rows, model.architecture.d_model, dtype=model.dtype, device=META)
        decodes, late = ([Row(i, at, 0, LAYERS) for i in range(rows)] for at in (9, 8))
        with noted() as own:
            found = []
            for end in (2, 3):
                before = on.ops.launches.total() + len(own)
                graphs.run(decodes, hidden, 1, end, late)
                found.append(on.ops.launches.total() + len(own) - before)
        assert found[1] - found[0] <= TARGET


def test_an_exit_that_is_checked_adds_nothing_to_a_layer(model: SegmentedModel) -> None:
    cache, on = cache_of(model), Counting()
    for rows in (1, 4, 8, 64, 128, 256):
        found = []
        for end in (2, 3):
            reader = ExitReader(ExitHeads.own((1,)), end)
            rule = Rule((1, end), (True,), Confidence.MAX_PROBABILITY, lazy=False, watched=False)
            one_pass = OnePass(GraphedDecodes(model, cache, on), on)  # type: ignore[arg-type]
            found.append(_of_pass(one_pass, rule, rows, reader, on))
        assert found[1] - found[0] <= TARGET, rows


def _of_pass(one_pass: OnePass, rule: Rule, rows: int, reader: ExitReader, on: Counting) -> int:
    before = on.ops.launches.total()
    with noted() as own:
        one_pass._pass(rule, rows, reader)
    return on.ops.launches.total() - before + len(own)


def test_k_and_v_of_tokens_that_left_are_three_kernels_a_layer(model: SegmentedModel) -> None:
    """Norm, product and writing; of few rows norm and product are one."""
    cache, on = cache_of(model), Counting()
    for rows in (1, 4, 5, 64, 256):
        hidden = torch.empty(rows, model.architecture.d_model, dtype=model.dtype, device=META)
        steps = [ExactStep(cache, *numbers(rows)) for _ in range(2)]
        upto = [launched(on, partial(model.propagate, hidden, 0, n, steps[n - 1])) for n in (1, 2)]
        assert upto[1] - upto[0] <= 3, rows
