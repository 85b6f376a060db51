"""A file is known by what it holds: not by its name, its size or its times."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helios_sim.contents import digest_of, sha256_of
from helios_sim.workload.traces import read_trace


def rewritten(path: Path, text: str) -> None:
    """Other contents of the same length, with the times that the file had."""
    before = path.stat()
    assert len(text) == before.st_size
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_contents_of_the_same_size_and_time_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    before = sha256_of(path), digest_of(tmp_path)
    rewritten(path, "two")
    assert sha256_of(path) != before[0]
    assert digest_of(tmp_path) != before[1]
    rewritten(path, "one")
    assert (sha256_of(path), digest_of(tmp_path)) == before


def test_a_trace_rewritten_with_its_time_kept_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,20\n1.0,10,20\n")
    assert read_trace(path).prompt_tokens.tolist() == [10, 10]
    rewritten(path, "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,11,20\n1.0,12,20\n")
    assert read_trace(path).prompt_tokens.tolist() == [11, 12]


def test_a_calibration_goes_by_the_contents_of_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from calibrate.inputs import Inputs
    from calibrate.schema import CalibrateConfig, ModelConfig
    from tiny_models import write_tiny

    write_tiny("llama", tmp_path / "tiny")
    identity = Inputs(CalibrateConfig(model=ModelConfig("tiny", str(tmp_path / "tiny")))).checkpoint.digest
    (weights,) = (tmp_path / "tiny").glob("*.safetensors")
    before, content = weights.stat(), bytearray(weights.read_bytes())
    weights.write_bytes(content)  # the same
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    again = Inputs(CalibrateConfig(model=ModelConfig("tiny", str(tmp_path / "tiny"))))
    assert again.checkpoint.digest == identity
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = Inputs(CalibrateConfig(model=ModelConfig("tiny", str(tmp_path / "tiny"))))
    assert changed.checkpoint.digest != identity
