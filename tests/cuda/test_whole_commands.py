"""Whole commands on a strict card, from the first capture to the last: a live study, and a profile's calibration."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calibrate.measure.devices import TimedCuda
from calibrate_line import calibrate
from command_line import CommandLine
from helios_sim.live.cuda import CudaDevice
from live_study import write_live_study
from strict_cuda import StrictCuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A strict card in place of every device that is opened."""
    strict = StrictCuda()
    for place in ("helios_sim.live.engine", "calibrate.measure.host"):
        monkeypatch.setattr(f"{place}.open_device", lambda *given: CudaDevice(torch.device("cpu"), strict))
    monkeypatch.setattr(TimedCuda, "torch_device", property(lambda self: "cpu"))
    fake = SimpleNamespace(cuda=strict, __version__="2.11", version=SimpleNamespace(cuda="13.0"))
    timed = TimedCuda.of(fake, None, 0, 1 << 28)
    monkeypatch.setattr("calibrate.measure.devices.open_device", lambda name, memory_bytes, threads: timed)
    with strict.watched():
        yield strict


def test_a_live_study(
    cuda: StrictCuda, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = CommandLine(capsys, monkeypatch, tmp_path)(*write_live_study(tmp_path), "mode=live")
    assert said.status == 0, said.err
    for arm in said.summary["arms"].values():
        assert arm["metrics"]["requests_completed"] > 0
    assert cuda.replays > 10
    assert not cuda.pinned_pools
    assert not any(pool.used_by for pool in cuda.pools.values())  # all runs are over


def test_the_calibration_of_a_profile(
    cuda: StrictCuda, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = calibrate(
        monkeypatch, capsys, tmp_path, "+task=latency", "model.name=tiny", "model.weights=tiny:llama-2-7b",
        "quick=true", "max_batch=4", "max_context_tokens=32", "max_batch_tokens=32", "budget_s=15", "out=out",
        "dtype=float32",
    )  # fmt: skip
    assert said.status == 0, said.err
    (profile,) = (tmp_path / "out" / "profile").glob("*/profile.json")
    runtime = json.loads(profile.read_text())["runtime"]
    assert runtime["prefill_launch_s_per_layer"] > 0
    assert cuda.captures > 20
    assert not cuda.pinned_pools
