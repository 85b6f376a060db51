"""Measuring on a strict card: graphs are kept, noise is drawn once, and prompts need no mask in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right

from calibrate.measure import devices, host
from calibrate.measure.build_profile import _runtime, line_through
from calibrate.measure.devices import TimedCuda
from calibrate.measure.host import HostCosts, ServingCosts, measure_host
from calibrate.measure.sampling import Clock, Points, Sampler, TimingJob, TimingPoint
from calibrate.measure.subject import Subject, TableLimits
from exact_torch import exact
from helios_sim.live.checkpoint.source import random_checkpoint
from helios_sim.live.cuda import WARM_UP_CALLS, CudaDevice
from helios_sim.live.graphs import GraphedDecodes
from helios_sim.live.memory import kv
from helios_sim.live.model.decoder import SegmentedModel
from strict_cuda import StrictCuda
from virtual_subject import ARCHITECTURE


def timed(cuda: StrictCuda) -> TimedCuda:
    return TimedCuda.of(SimpleNamespace(cuda=cuda, __version__="2.11", version=SimpleNamespace(cuda="13.0")), None, 0)


def test_a_step_is_captured_once_however_often_it_is_timed(tmp_path: Path) -> None:
    cuda, made = StrictCuda(), []

    def build() -> list:
        x = torch.ones(3)
        made.append(x)
        return [lambda: x.add_(1.0)]

    with cuda.watched():
        sampler = Sampler(timed(cuda), Points(tmp_path / "points.parquet"), Clock(60.0))
        jobs = [
            TimingJob((point,), build, lambda laps_s, point=point: {point: laps_s[0]})
            for point in (TimingPoint("a", 0, 1), TimingPoint("b", 0, 1))
        ]
        assert sampler.measure(jobs, samples=1)
        assert sampler.measure(jobs, samples=4)
    assert cuda.captures == len(made) == len(jobs)


@pytest.mark.parametrize("kind", ["pinned", "pageable"])
def test_noise_is_drawn_once_and_repeated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, drawn, draw = StrictCuda(), [], torch.randint

    def noted(low: int, high: int, shape: tuple[int, ...], **more: object) -> torch.Tensor:
        drawn.append(shape[0])
        return draw(low, high, shape, **more)

    monkeypatch.setattr(devices, "NOISE_BYTES", 1 << 12)
    monkeypatch.setattr(torch, "randint", noted)
    memory = timed(cuda).host_buffer(10_000, kind)
    assert drawn == [1 << 12]
    assert len(memory) == 10_000
    assert len(memory[-1000:].unique()) > 200
    assert cuda.runtime.holds(memory) == (kind == "pinned")


def test_a_card_s_host_costs_grow_with_the_batch_and_prompts_are_issued_layer_by_layer() -> None:
    """As they are served: decodes are one launch, iterations with prompts are not captured."""
    inside = {1: 1e-4, 64: 2e-4, 256: 5e-4}
    inside_host = HostCosts(inside, inside, dict.fromkeys(inside, 1e-5), 9e-5, 2e-5, dict.fromkeys(inside, 4e-4))
    around = {batch: 3e-4 + 1e-5 * batch for batch in inside}
    serving = ServingCosts(around, around, around, 16)
    subject = SimpleNamespace(
        device=SimpleNamespace(asynchronous=True), limits=SimpleNamespace(max_batch=256), decides_exits=False
    )
    runtime = _runtime(SimpleNamespace(subject=subject), SimpleNamespace(host=inside_host, serving=serving))
    for batch in inside:
        served_s = around[batch] + inside[batch] + 4e-4
        assert runtime.host_overhead_s + batch * runtime.host_s_per_request == pytest.approx(served_s, rel=0.1)
    assert (runtime.launch_s_per_layer, runtime.prefill_launch_s_per_layer) == (0.0, 9e-5)
    assert HostCosts.from_json(json.loads(json.dumps(inside_host.to_json()))) == inside_host
    assert line_through({1: 3e-4, 64: 2e-4}) == (2.5e-4, 0.0)


def test_host_costs_are_those_of_captured_steps() -> None:
    """Numbers are staged, and a step is made on the card, as in service."""
    cuda, staged, stage = StrictCuda(), [], GraphedDecodes.stage

    def noted(graphs: GraphedDecodes, rows: list) -> tuple[int, bool]:
        staged.append(len(rows))
        return stage(graphs, rows)

    with cuda.watched(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphedDecodes, "stage", noted)
        opened = CudaDevice(torch.device("cpu"), cuda)
        patch.setattr("calibrate.measure.host.open_device", lambda name, kernels: opened)
        model = SegmentedModel.load(random_checkpoint("tiny:llama-2-7b", "cpu", 0))
        on = timed(cuda)
        patch.setattr(TimedCuda, "torch_device", property(lambda self: "cpu"))
        subject = Subject(model, on, TableLimits(4, 64, 16, 32, 16))
        with torch.no_grad():
            found = measure_host(subject, 2, (1, 4))
    assert set(found.step_s) == set(staged) == {1, 4}
    assert all(time_s > 0 for time_s in (*found.overhead_s.values(), *found.step_s.values()))


def test_an_exit_of_a_card_costs_what_the_card_takes_to_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its kernels decide within a captured pass no confidence comes to the host."""
    cuda, decided = StrictCuda(), []
    monkeypatch.setattr(TimedCuda, "torch_device", property(lambda self: "cpu"))
    monkeypatch.setattr(host, "_syncs_s", None)
    with cuda.watched(), exact() as kernels, torch.no_grad():
        opened = CudaDevice(torch.device("cpu"), cuda, kernels)
        monkeypatch.setattr(host, "open_device", lambda name, wanted: opened)
        leave = type(kernels).leave
        monkeypatch.setattr(
            type(kernels), "leave", lambda *given, **more: decided.append(cuda.capturing) or leave(*given, **more)
        )
        model = SegmentedModel.load(random_checkpoint("tiny:llama-2-7b", "cpu", 0), kernels=kernels)
        subject = Subject(model, timed(cuda), TableLimits(4, 64, 16, 32, 16))
        found = measure_host(subject, 2, (1, 4))
    assert set(found.sync_s) == {1, 4}
    assert sum(graph is not None for graph in decided) == 2  # captured once for each batch
    assert len(decided) == 2 * (1 + WARM_UP_CALLS)


def test_decodes_are_timed_over_the_span_that_serving_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask, also a single one."""
    cuda = StrictCuda()
    monkeypatch.setattr(TimedCuda, "torch_device", property(lambda self: "cpu"))
    with cuda.watched():
        model = SegmentedModel.load(random_checkpoint("tiny:llama-2-7b", "cpu", 0))
        subject = Subject(model, timed(cuda), TableLimits(4, 600, 16, 600, 16))
        read = {kv: subject.decode_step([kv])._span for kv in (1, 128, 129, 300, 600)}
        masks = subject.decode_step([128])._masks
    assert read == {1: 128, 128: 128, 129: 256, 300: 512, 600: min(600, model.architecture.max_context_tokens)}
    assert masks[0] is not None


def test_a_chunk_of_a_prompt_needs_no_mask_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "_masks", None)
    plain = replace(ARCHITECTURE, sliding=(False,) * ARCHITECTURE.n_layers, window_tokens=None)
    masks = kv._causal_masks(plain, 5, 7, torch.bfloat16, "meta")
    assert all(isinstance(mask, CausalBias) for mask in masks)
    assert kv._causal_masks(plain, 5, 0, torch.bfloat16, "meta") == [None] * plain.n_layers


def test_a_mask_by_its_shape_is_that_of_every_token() -> None:
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    (mask, *_) = kv._masks(ARCHITECTURE, torch.arange(7, 12)[:, None], torch.arange(12),
                           torch.arange(12) <= torch.arange(7, 12)[:, None], torch.float32, slides=False)  # fmt: skip
    by_shape = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(5, 12), enable_gqa=True)
    assert torch.allclose(by_shape, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True), atol=1e-6)
