"""What a decode step of a whole model launches and reads, counted at full shape on a device that computes nothing.

The counts are of today's steps: they may fall, and never rise. With the project's kernels a layer is at most 9
launches, one graph serves a batch size at all lengths, and `test_kernels.py` shows that no byte of K and V is read in
vain. With torch's operations a step reads up to twice what it must.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from helios_sim.exits.rule import Confidence
from helios_sim.live.checkpoint.random_weights import draw
from helios_sim.live.exits import ExitReader, Row
from helios_sim.live.graphs import GraphedDecodes
from helios_sim.live.kernels.interface import TORCH
from helios_sim.live.memory.kv import DecodeStep, KvCache, MixedStep, PromptStep
from helios_sim.live.memory.workspace import Slots, Workspace
from helios_sim.live.model import weights
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.heads import ExitHeads
from helios_sim.live.one_pass import OnePass, Rule

TARGET = 9  # launches a layer
# by model: launches a layer, and beside the layers (embedding, rotations, mask, rows), by torch's operations
TODAY = {"llama-2-7b": (18, 21), "llama-3-8b": (18, 21), "smollm2-135m": (18, 21), "opt-6.7b": (14, 14)}
# by model: launches of an iteration of 16 decodes and a prompt's 256 tokens after 256 others, which is not captured
MIXED = {"llama-2-7b": 704, "llama-3-8b": 704, "smollm2-135m": 660, "opt-6.7b": 576}
# by the project's kernels, for batches of at most 4 and of more
KERNELS = {  # with 8 KV heads or more a batch of 64 has work for all cores, and is not split
    "llama-2-7b": {4: (6, 3), 64: (8, 3)}, "llama-3-8b": {4: (6, 3), 64: (8, 3)},
    "smollm2-135m": {4: (6, 3), 64: (9, 3)}, "opt-6.7b": {4: (6, 5), 64: (8, 5)},
}  # fmt: skip
EXIT = {4: 5, 64: 6}  # launches of an exit that is checked inside a captured pass, by batch
META = torch.device("meta")
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
FREE = {"empty", "empty_strided", "empty_like", "new_empty"}  # memory alone


class Ops(TorchDispatchMode):
    """Counts what a card would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.host: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, found = function.overloadpacket.__name__, function(*args, **(kwargs or {}))
        inputs = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
        if name in WAITS or (name in ("copy_", "_to_copy") and len({t.device.type for t in (*inputs, found)}) > 1):
            self.host.append(name)
        if name not in FREE and (function._schema.is_mutable or not _is_view(found, inputs)):
            self.launches[name] += 1
        return found


def _is_view(found: torch.Tensor, inputs: list[torch.Tensor]) -> bool:
    """What says that it is a view, such as a reshape, may be a copy."""
    first = found[0] if isinstance(found, list | tuple) else found
    return first.untyped_storage()._cdata in {tensor.untyped_storage()._cdata for tensor in inputs}


class Whole(TorchFunctionMode):
    """Operations that are one kernel on a card and several elsewhere. Attention notes what it reads."""

    def __init__(self, ops: Ops) -> None:
        super().__init__()
        self.ops, self.attention = ops, []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.rms_norm or function is F.scaled_dot_product_attention:
            self.ops.launches[function.__name__] += 1
            if function is F.scaled_dot_product_attention:
                self.attention.append((args, kwargs))
            return torch.empty_like(args[0])
        return function(*args, **kwargs)


class Counting:
    """A device whose captures are counted."""

    torch_device, captures, kernels = META, True, TORCH

    def __init__(self) -> None:
        self.ops = Ops()
        self.whole = Whole(self.ops)

    def host_empty(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def mark(self) -> Any:
        return self

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def prepare(self, step: Any) -> Any:
        with self.ops, self.whole:
            step()
        return lambda: None


def model_of(shape: str, monkeypatch: pytest.MonkeyPatch, kernels: Any = TORCH) -> SegmentedModel:
    monkeypatch.setattr(weights, "fill", lambda *given: None)
    source = draw(f"random:{shape}")
    outer = weights.load_outer(source, torch.bfloat16, META)
    model = SegmentedModel(source, outer, torch.bfloat16, META, kernels)
    model.layers = [weights.load_layer(source, i, torch.bfloat16, META) for i in range(source.architecture.n_layers)]
    return model


def counted(model: SegmentedModel, batch: int, context: int, max_tokens: int = 1024) -> Counting:
    shape = (model.architecture, len(model.layers), batch, max_tokens, torch.bfloat16, META)
    cache, on = KvCache(*shape, kernels=model.kernels), Counting()
    rows = [Row(i, context - 1, 5, len(model.layers)) for i in range(batch)]
    GraphedDecodes(model, cache, on).run(rows, None, 0, len(model.layers))  # type: ignore[arg-type]
    return on


def kv_bytes(on: Counting) -> int:
    """Bytes of K and V that attention reads."""
    return sum(args[i].numel() * args[i].element_size() for args, _ in on.whole.attention for i in (1, 2))


@pytest.mark.parametrize("shape", TODAY)
def test_a_captured_step_launches_no_more_than_it_did(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(shape, monkeypatch)
    n, whole = len(model.layers), counted(model, 64, 500).ops
    model.layers = model.layers[: n // 2]
    total, of_half = whole.launches.total(), counted(model, 64, 500).ops.launches.total()
    layer = (total - of_half) / (n - n // 2)
    assert (layer, total - n * layer) == TODAY[shape], "fewer: write them down here"
    assert layer > TARGET, "the target is reached: say so here"
    assert not whole.host  # no wait for the host inside a graph, and no copy from it


@pytest.mark.parametrize("batch", [4, 64])
@pytest.mark.parametrize("shape", KERNELS)
def test_a_layer_is_few_kernels(shape: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from helios_sim.live.kernels.card import TRITON
    from kernel_builds import noted

    model = model_of(shape, monkeypatch, TRITON)
    n, found = len(model.layers), []
    for layers in (n, n // 2):
        model.layers = model.layers[:layers]
        with noted() as own:
            on = counted(model, batch, 500)
        assert not on.ops.host  # no wait for the host inside a graph, and no copy from it
        found.append(on.ops.launches.total() + len(own))
    layer = (found[0] - found[1]) / (n - n // 2)
    assert (layer, found[0] - n * layer) == KERNELS[shape][batch], "fewer: write them down here"
    assert layer <= TARGET


def test_one_graph_of_the_kernels_serves_all_lengths_and_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from helios_sim.live.kernels.card import TRITON
    from kernel_builds import noted

    model = model_of("smollm2-135m", monkeypatch, TRITON)
    layers, on = len(model.layers), Counting()
    cache = KvCache(model.architecture, layers, 16, 2048, torch.bfloat16, META, kernels=TRITON)
    graphs = GraphedDecodes(model, cache, on)  # type: ignore[arg-type]
    with noted():
        assert graphs.capture([(0, 8), (8, layers)]) == 2 * 5  # batches of 1, 2, 4, 8 and 16
        after = on.ops.launches.total()
        # as they come: where requests leave or move up a layer, nothing is copied or gathered
        for slots, length in (((0, 1, 2), 1), ((5, 2, 9), 700), ((15, 3, 4), 2000)):
            rows = [Row(slot, length, 5, layers) for slot in slots]
            graphs.run(rows, graphs.run(rows, None, 0, 8), 8, layers)
    assert on.ops.launches.total() == after


@pytest.mark.parametrize("batch", [4, 64])
def test_exits_on_the_card_add_launches_at_exits_alone(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer launches more for rows that have left, and nothing inside waits for the host or copies from it."""
    pytest.importorskip("triton")
    from helios_sim.live.kernels.card import TRITON
    from kernel_builds import noted

    model, found = model_of("llama-3-8b", monkeypatch, TRITON), {}
    layers = len(model.layers)
    for exits in ((layers,), (8, layers), (8, 16, layers), (layers // 2,), (8, layers // 2)):
        cache, on = KvCache(model.architecture, layers, batch, 1024, torch.bfloat16, META, kernels=TRITON), Counting()
        rule = Rule(exits, (True,) * (len(exits) - 1), Confidence.MAX_PROBABILITY, lazy=False, watched=False)
        reader = ExitReader(ExitHeads.own(exits[:-1]), exits[-1])
        with noted() as own:
            OnePass(GraphedDecodes(model, cache, on), on)._pass(rule, batch, reader)  # type: ignore[arg-type]
        assert not on.ops.host
        found[exits] = on.ops.launches.total() + len(own)
    of_exit = found[8, layers] - found[layers,]
    assert found[8, 16, layers] - found[8, layers] == of_exit == EXIT[batch], "fewer: write them down here"
    assert found[layers,] - found[layers // 2,] == layers // 2 * KERNELS["llama-3-8b"][batch][0]
    assert found[8, layers] - found[8, layers // 2] == layers // 2 * KERNELS["llama-3-8b"][batch][0]


@pytest.mark.parametrize(("context", "most"), [(100, 1.28), (128, 1.0), (500, 1.03), (520, 1.97), (1024, 1.0)])
@pytest.mark.parametrize("shape", ["llama-2-7b", "smollm2-135m"])
def test_attention_reads_less_than_twice_what_it_must(
    shape: str, context: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step reads as many tokens of every request as its span has: a power of two."""
    model = model_of(shape, monkeypatch)
    a, batch = model.architecture, 16
    needed = 2 * a.n_layers * batch * context * a.kv_width * 2
    assert 1.0 <= kv_bytes(counted(model, batch, context)) / needed <= most


@pytest.mark.parametrize("shape", TODAY)
def test_an_iteration_with_a_prompt_launches_no_more_than_it_did(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(shape, monkeypatch)
    cache = KvCache(model.architecture, len(model.layers), 17, 1024, torch.bfloat16, META)
    on, decodes, tokens = Counting(), 16, 256
    step = DecodeStep(cache, range(decodes), [300 + i for i in range(decodes)])
    attend = MixedStep([step, PromptStep(cache, decodes, tokens, tokens)], [decodes, tokens])
    with on.ops, on.whole, torch.inference_mode():
        hidden = torch.empty(decodes + tokens, model.architecture.d_model, dtype=model.dtype, device=META)
        model.run(hidden, 0, len(model.layers), attend)
    assert on.ops.launches.total() == MIXED[shape], "fewer: write them down here"
    of_prompt = [kwargs["attn_mask"] for args, kwargs in on.whole.attention if args[0].shape[2] == tokens]
    assert len(of_prompt) == len(model.layers)
    assert all(isinstance(mask, CausalBias) for mask in of_prompt)  # so flash attention runs it, grouped heads too


def test_where_slots_may_lie_anywhere_no_request_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's operations those that decode lie in slots 0, 1, ...: each departure moves K and V of all layers."""
    moved = []
    for any_lengths in (False, True):
        slots = Slots(4, lambda *given: moved.append(any_lengths))  # noqa: B023 - called before the next
        work = Workspace.__new__(Workspace)
        work.slots, work.cache = slots, SimpleNamespace(kernels=SimpleNamespace(any_lengths=any_lengths))  # type: ignore[assignment]
        answers = [SimpleNamespace(request=SimpleNamespace(request_id=i), written=5) for i in range(3)]
        for i in range(3):
            slots.take(i)
        slots.give(0)
        work.arrange(answers[1:], 2)  # type: ignore[arg-type]
    assert moved == [False]
