"""`python -m calibrate` on folders written by `save_pretrained`: from raw timings to a simulated decision."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

import calibrate.work
from calibrate.schema import TASKS
from calibrate.stages import StageRun, read_finished
from calibrate_line import calibrate as calibrate_line
from command_line import CommandLine
from helios_sim.exits.store import read_trace
from helios_sim.profile.store import load_profile, read_profile
from tiny_models import FAMILIES, write_tiny

QUICK = ("quick=true", "threads=1", "dtype=float32", "tasks=[code]", "trace_tokens=600", "answers=3")


def tiny(family: str, folder: Path) -> Path:
    """With a context that takes a whole passage of text."""
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    return write_tiny(family, folder, **{name: 2048})


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("weights") / "tiny-llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_from_a_folder_to_a_simulated_decision(
    family, tmp_path, monkeypatch, capsys, request
) -> None:
    if family != "llama":  # figures are drawn once
        request.getfixturevalue("sketched")
    weights = tiny(family, tmp_path / f"tiny-{family}")
    said = calibrate_line(monkeypatch, capsys, tmp_path, f"model={weights}", *QUICK, "out=out")
    assert said.status == 0, said.err
    out = tmp_path / "out"
    assert said.summary == json.loads((out / "summary.json").read_text())
    assert {name: stage["status"] for name, stage in said.summary["stages"].items()} == dict.fromkeys(
        ("ceilings", "profile", "traces", "answers"), "done"
    )
    trace, (name,) = read_trace(out / "trace"), [path.name for path in (out / "profile").iterdir()]
    profile = load_profile(name, out / "profile")
    assert profile.model.family == family
    assert (profile.model.n_layers, trace.n_layers, trace.exits) == (6, 6, (1, 2, 3, 4, 5, 6))
    assert trace.n_tokens >= 300
    assert profile.model.chars_per_token == pytest.approx(trace.chars.sum() / trace.n_tokens)
    page = (out / "report.html").read_text()
    for heading in ("Device and its ceilings", "Times against their floor", "Memory", "Loading layers", "Energy",
                    "Where tokens leave", "Unchanged tokens", "How far confidences", "Simulate from this"):  # fmt: skip
        assert heading in page
    assert not re.search(r'(src|href)="(?!#|data:image)', page)
    assert "quick=true" in page  # and so it says that the numbers are worth little

    simulated = CommandLine(capsys, monkeypatch, tmp_path)
    line = shlex.split(said.summary["use"][0])
    assert line[:3] == ["python", "-m", "helios_sim"]
    result = simulated(*line[3:], "workload.n_requests=8", into="simulated")
    assert result.status == 0, result.err
    arms = result.summary["arms"]
    assert arms["early_exit"]["metrics"]["layers_per_token"] <= 6
    assert arms["full_depth"]["metrics"]["agreement"] == 1


def test_a_second_call_keeps_what_is_there_and_a_changed_setting_measures_only_what_it_touches(
    llama, tmp_path, monkeypatch, capsys
) -> None:
    def run(*arguments: str) -> dict[str, str]:
        said = calibrate_line(monkeypatch, capsys, tmp_path, f"model={llama}", *QUICK, "out=out", *arguments)
        assert said.status == 0, said.err
        return {name: stage["status"] for name, stage in said.summary["stages"].items()}

    assert run("+task=traces") == {"traces": "done", "answers": "done"}
    assert run("+task=traces") == {"traces": "kept", "answers": "kept"}
    assert run("+task=traces", "model.exits=[2,4]") == {"traces": "done", "answers": "done"}
    assert run("+task=latency", "model.exits=[2,4]") == {"ceilings": "done", "profile": "done"}
    assert read_trace(tmp_path / "out" / "trace").exits == (2, 4, 6)  # of the call before, which still counts
    assert "Where tokens leave" in (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "out" / "report.html").unlink()
    assert run("+task=report") == dict.fromkeys(("ceilings", "profile", "traces", "answers"), "kept")
    assert (tmp_path / "out" / "report.html").is_file()


def test_what_the_budget_does_not_allow_is_skipped_and_said(llama, tmp_path, monkeypatch, capsys) -> None:
    clock = {calibrate.work.PROFILE: 1e6, calibrate.work.TRACES: 1e6, calibrate.work.ANSWERS: 1e6}
    efforts = {name: calibrate.work.Effort(clock.get(name, 5), clock.get(name, 0.1)) for name in calibrate.work.EFFORTS}
    monkeypatch.setattr(calibrate.work, "EFFORTS", efforts)
    said = calibrate_line(
        monkeypatch, capsys, tmp_path, f"model={llama}", "threads=1", "memory_bytes=100000000", "budget_s=60", "out=out"
    )
    assert said.status == 1
    (message,) = [line for line in said.err.splitlines() if line.startswith("calibrate: ")]
    assert "nothing that can be used was measured: profile:" in message
    assert "of the budget are left" in message
    assert "out goes on with what was measured" in message
    assert said.out == ""


def test_a_budget_is_kept_and_gives_what_can_be_simulated_from(llama, tmp_path, monkeypatch, capsys) -> None:
    """Of a machine that others use as well, what there is comes with how far it may be off, and why."""
    line = (f"model={llama}", "threads=1", "memory_bytes=100000000", "+task=latency", "out=out")
    monkeypatch.setattr("calibrate.measure.profile.PART_SHARE", 0.0)
    began_s = time.monotonic()
    said = calibrate_line(monkeypatch, capsys, tmp_path, *line, "budget_s=18")
    assert said.status == 0, said.err
    assert time.monotonic() - began_s < 20.5
    short = next(s for s in said.summary["verdict"] if s.startswith("The time was short: times within about"))
    assert "briefly measured or assumed: host, serving, memory, load" in short
    profile = read_profile(next((tmp_path / "out" / "profile").iterdir()))
    assert profile.provenance.details["short"]["within"] >= 0.05
    assert "times_within" in {a.name for a in profile.provenance.assumptions}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory"),
    ],
)
def test_a_full_disk_or_memory_gives_one_message(error, message, llama, tmp_path, monkeypatch, capsys) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("calibrate.measure.ceilings.measure_ceilings", broken)
    said = calibrate_line(monkeypatch, capsys, tmp_path, f"model={llama}", *QUICK, "out=out")
    assert said.status == 1
    (line,) = [text for text in said.err.splitlines() if text.startswith("calibrate: ")]
    assert message in line
    assert "Fix: " in line
    assert not (tmp_path / "out").exists()


def test_a_defect_of_one_stage_costs_only_that_one(llama, tmp_path, monkeypatch, capsys) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("calibrate.exits.traces.reference_trace", broken)
    said = calibrate_line(monkeypatch, capsys, tmp_path, f"model={llama}", *QUICK, "+task=traces", "out=out")
    assert said.status == 1
    assert "traces failed by a defect: ZeroDivisionError: a defect" in said.err
    assert {name: stage["status"] for name, stage in said.summary["stages"].items()} == {
        "traces": "failed",
        "answers": "done",
    }


def test_torch_has_its_say_about_memory_in_one_way() -> None:
    def full(run: StageRun) -> dict:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(MemoryError, match="out of memory"):
        calibrate.work.memory_named(full)(None)  # type: ignore[arg-type]


def test_an_interrupt_keeps_finished_stages_and_says_how_to_go_on(llama, tmp_path, repository) -> None:
    arguments = [f"model={llama}", *QUICK, "trace_tokens=200000", "out=out"]
    started = subprocess.Popen(
        [sys.executable, "-m", "calibrate", *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while "ceilings" not in read_finished(tmp_path / "out"):
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 1
    assert out == ""
    assert "Traceback" not in err
    assert "calibrate: stopped" in err
    (line,) = [text for text in err.splitlines() if text.startswith("calibrate: stopped")]
    assert "go on with: python -m calibrate" in line
    assert "out=" in line
    assert "ceilings" in read_finished(tmp_path / "out")


def test_help_names_every_task_and_every_campaign(tmp_path, monkeypatch, capsys, repository) -> None:
    said = calibrate_line(monkeypatch, capsys, tmp_path, "--help")
    assert said.status == 0, said.err
    campaigns = sorted(path.stem for path in (repository / "conf" / "campaign").glob("*.yaml"))
    listed = {title: re.search(rf"^{title}: (.*)", said.out, re.MULTILINE)[1] for title in ("Tasks", "Campaigns")}
    assert [name for name in TASKS if name not in listed["Tasks"]] == []
    assert [name for name in campaigns if name not in listed["Campaigns"]] == []
    assert max(len(line) for line in said.out.splitlines()) <= 120
