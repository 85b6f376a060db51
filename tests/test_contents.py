"""A file is known by what it holds: not by its name, its size or its times."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from helios_sim.contents import code_of, digest_of, sha256_of
from helios_sim.study.inputs import made_of
from helios_sim.study.schema import Config
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


def test_code_is_known_by_its_sources_and_their_names(tmp_path: Path) -> None:
    for name in ("one.py", "inside/two.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    before = {parts: code_of(tmp_path, *parts) for parts in ((), ("inside",), ("one.py",))}
    assert len(set(before.values())) == 3
    (tmp_path / "inside" / "notes.txt").write_text("no code")
    assert {parts: code_of(tmp_path, *parts) for parts in before} == before
    (tmp_path / "inside" / "two.py").write_text("x = 2")
    assert [code_of(tmp_path, *parts) == found for parts, found in before.items()] == [False, False, True]
    (tmp_path / "one.py").rename(tmp_path / "other.py")
    assert code_of(tmp_path, "other.py") != before[("one.py",)]


def test_every_stage_goes_by_the_code_that_measures(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import calibrate
    import helios_sim
    from calibrate.campaigns.plan import CampaignPlan
    from calibrate.inputs import MEASURED, MEASURING, Inputs
    from calibrate.schema import CalibrateConfig, CampaignConfig, ModelConfig
    from calibrate.stages import CODE
    from calibrate.work import stages_of

    tiny = {"device": "cpu", "dtype": "float32", "quick": True}
    plan = CampaignPlan(
        CampaignConfig(models=["t"], text_model="t", weights={"t": "tiny:smollm2-135m"}, last_model=None, **tiny)
    )
    calibration = CalibrateConfig(model=ModelConfig("t", "tiny:smollm2-135m"), **tiny)
    stages = [*plan.stages, *stages_of(Inputs(calibration))]
    assert len({(stage.settings[CODE], stage.settings["torch"]) for stage in stages}) == 1
    for package, parts in ((calibrate, MEASURING), (helios_sim, MEASURED)):
        assert [part for part in parts if not (Path(package.__path__[0]) / part).exists()] == []


def test_free_memory_is_no_part_of_what_a_calibration_is_known_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a calibration on a CPU goes on where more or less of it is free than when it began."""
    pytest.importorskip("torch")
    from calibrate.inputs import Inputs
    from calibrate.schema import CalibrateConfig, ModelConfig
    from calibrate.work import stages_of

    asked = CalibrateConfig(model=ModelConfig("t", "tiny:smollm2-135m"), device="cpu", dtype="float32", threads=1)
    found = []
    for free_kilobytes in (4_000_000, 3_999_999):
        monkeypatch.setattr("calibrate.measure.devices._kilobytes", lambda path, key, free=free_kilobytes: free)
        inputs = Inputs(asked)
        known = [inputs.identity(), {stage.name: stage.settings for stage in stages_of(inputs)}]
        found.append((inputs.device.facts.memory_bytes, known))
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


def test_what_is_served_live_is_made_of_torch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    live = Config(models=["smollm2-135m"], hardware="epyc-2core", mode="live")
    before = made_of(live)
    monkeypatch.setattr("helios_sim.study.inputs.version", lambda name: "0.1")
    assert {name for name, found in made_of(live).items() if found != before[name]} == {"torch"}
    assert "torch" not in made_of(replace(live, mode="simulate"))


@pytest.mark.slow
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
