"""Studies as a user runs them: what is said and written, sweeps, several processes, a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import helios_sim.report.write
from command_line import STUDY, CommandLine, write_study
from helios_sim.errors import UserError
from helios_sim.study.command import run
from helios_sim.study.schema import (
    ArrivalsConfig,
    Config,
    GateConfig,
    LengthConfig,
    LengthsConfig,
    MixConfig,
    WorkloadConfig,
)

HELD = """
import time
from pathlib import Path
from helios_sim.policy.full_depth import FullDepthParameters, FullDepthPolicy

class Held(FullDepthPolicy):
    '''Waits for a file before its second run, so that a test can stop the study in the middle.'''
    def __init__(self):
        super().__init__(FullDepthParameters())
    def start(self, situation):
        again = Path("begun").exists()
        Path("begun").touch()
        if again:
            Path("waiting").touch()
        while again and not Path("go").exists():
            time.sleep(0.01)
        return super().start(situation)
"""
HALF_WAY = STUDY.replace("baseline:", "  last: {policy: custom, object: 'held:Held'}\nbaseline:") + "jobs: 1\n"


@pytest.fixture
def helios(command, monkeypatch) -> CommandLine:
    """Without report.html and figures, which take most of a small study's time."""
    monkeypatch.setattr(helios_sim.report.write, "write_pictures", lambda *_: None)
    return command


def without_the_clock(summary):
    """All but what two runs of the same study may differ in."""
    return {key: value for key, value in summary.items() if key != "provenance"}


@pytest.mark.slow
def test_what_is_said_and_written(command, tmp_path):
    said = command(*write_study(tmp_path))
    folder = tmp_path / "out"
    assert said.status == 0
    lines = said.out.splitlines()
    assert said.summary == json.loads((folder / "summary.json").read_text())
    assert said.summary["schema_version"] == 1
    assert lines[-2] == f"output folder: {folder}"
    for arm in said.summary["arms"]:
        assert any(line.split()[:1] == [arm] for line in lines)
    sentences = [line for line in lines if line.endswith(".")]
    assert len(sentences) == len(set(sentences))  # nothing is said twice
    # a line a job, no bar: each arm, and the pair at both ends of the profiles' band
    assert [line.split(",")[0].split("] ")[1] for line in said.err.splitlines()] == [
        "full_depth", "early_exit", "early_exit", "full_depth", "early_exit", "full_depth",
    ]  # fmt: skip
    assert said.err.count("times x 0.89") == said.err.count("times x 1.17") == 2
    assert said.err.startswith("[1/")
    assert "\x1b" not in said.err + said.out
    written = {path.name for path in folder.iterdir()}
    assert written == {
        ".hydra", "summary.json", "requests.parquet", "decisions.parquet", "provenance.json", "report.html", "figures",
        "finished.jsonl",
    }  # fmt: skip


@pytest.mark.slow
def test_a_failed_gate_is_status_2_and_the_files_are_there(helios, tmp_path):
    text = STUDY + "gates: [{arm: early_exit, metric: layers_per_token, high: 1}]\n"
    said = helios(*write_study(tmp_path, text))
    assert said.status == 2
    assert "gate FAILED: early_exit layers_per_token " in said.out
    assert "must be <= 1" in said.out
    assert not said.summary["gates"][0]["passed"]
    assert (tmp_path / "out" / "requests.parquet").is_file()


@pytest.mark.slow
def test_requests_that_never_fit_are_a_result_and_it_says_why(helios, tmp_path):
    text = STUDY.replace("lengths: {", "lengths: {prompt: {kind: fixed, value: 5000}, ")
    said = helios(*write_study(tmp_path, text))
    assert said.status == 0
    assert "all 12 requests were dropped, most often: " in said.out
    assert "; there are no times" in said.out
    metrics = said.summary["arms"]["early_exit"]["metrics"]
    assert (metrics["requests_dropped"], metrics["requests_completed"], metrics["e2e_s_mean"]) == (12, 0, None)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["helios", "switch_only", "early_exit_lazy", "static_cap", "oracle"])
def test_a_policy_adds_an_arm(helios, tmp_path, policy):
    said = helios(*write_study(tmp_path), f"policy={policy}")
    assert said.status == 0, said.err
    assert list(said.summary["arms"]) == ["full_depth", "early_exit", policy]


@pytest.mark.slow
def test_settings_of_the_added_policy_reach_it(helios, tmp_path):
    text = STUDY.replace("models: [opt-1.3b]", "models: [opt-1.3b, opt-6.7b]").replace(
        "{policy: full_depth}", "{policy: full_depth, model: opt-6.7b}"
    )
    study = write_study(tmp_path, text.replace("{policy: early_exit}", "{policy: early_exit, model: opt-1.3b}"))
    said = helios(*study, "policy=static_cap", "policy.model=opt-1.3b", "policy.cap_layers=12", "policy.batch_limit=1")
    metrics = said.summary["arms"]["static_cap_opt-1.3b"]["metrics"]
    assert metrics["layers_per_token"] == 12
    assert metrics["batch_mean"] == 1


@pytest.mark.slow
def test_several_studies_in_one_command(helios, tmp_path):
    said = helios(*write_study(tmp_path), "-m", "server.max_running_requests=1,2", "workload.n_requests=12")
    assert said.status == 0, said.err
    studies = [json.loads(line) for line in said.out.splitlines() if line.startswith('{"schema_version"')]
    limits = [study["provenance"]["configuration"]["server"]["max_running_requests"] for study in studies]
    assert limits == [1, 2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0", "1", "multirun.yaml"}


@pytest.mark.slow
def test_objective_and_runtime_are_chosen_by_name(helios, tmp_path):
    said = helios(*write_study(tmp_path), "objective=energy", "runtime=eager", "hardware=h100-80gb")
    configuration = said.summary["provenance"]["configuration"]
    assert configuration["objective"]["goal"] == "energy"
    assert configuration["runtime"]["preset"] == "eager"
    assert configuration["hardware"] == "h100-80gb"


def test_help_is_for_newcomers(helios):
    said = helios("--help")
    assert said.status == 0
    assert said.out.count("python -m helios_sim ") >= 6
    for name in ("quickstart", "helios_probe", "early_exit", "energy", "eager", "--config-dir"):
        assert name in said.out
    assert max(len(line) for line in said.out.splitlines()) <= 120
    groups = {line.partition(":")[0] for line in said.out.splitlines() if line[:1].islower()}
    assert {"experiment", "workload", "policy", "objective", "runtime"} <= groups
    assert not groups & {"campaign", "task", "helios", "paper"}  # of python -m calibrate, and parts of files


HEAVY = {
    "hydra", "omegaconf", "numpy", "scipy", "numba", "simpy", "pandas", "pyarrow", "matplotlib", "rich", "joblib",
    "optuna", "ray", "torch", "transformers", "jinja2",
}  # fmt: skip


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_what_needs_no_study_loads_no_library(tmp_path, flag):
    program = f"import sys, helios_sim.__main__ as m; m.main([{flag!r}]); print(*sys.modules, file=sys.stderr)"
    environment = os.environ | {"PYTHONPATH": str(Path(helios_sim.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "helios_sim" in ran.stdout
    assert not HEAVY & {name.partition(".")[0] for name in ran.stderr.split()}


def test_help_lists_a_folder_of_the_users_own(helios, tmp_path):
    folder = write_study(tmp_path)[1]
    for flags in (("--config-dir", folder), (f"--config-dir={folder}",)):
        page = " ".join(helios(*flags, "--help").out.split())
        experiments = page.partition("experiment: ")[2].partition(": ")[0].split(", ")
        assert {"ablation", "mine", "quickstart"} <= set(experiments)


def test_version(helios):
    said = helios("--version")
    assert (said.status, said.out) == (0, f"helios_sim {helios_sim.__version__}\n")


@pytest.mark.slow
def test_processes_do_not_change_a_bit(helios, tmp_path):
    text = STUDY + (
        "seeds: [0, 1]\nsweeps: [{axes: [{name: rate, settings: [workload.arrivals.rate_per_s], values: [4, 16]}]}]\n"
    )
    study = write_study(tmp_path, text)
    one = helios(*study, "jobs=1", into="one")
    two = helios(*study, "jobs=2", into="two")
    again = helios(*study, "jobs=1", into="again")
    assert (one.status, two.status, again.status) == (0, 0, 0), one.err + two.err + again.err
    assert len((tmp_path / "two" / "finished.jsonl").read_text().splitlines()) >= 8
    assert without_the_clock(one.summary) == without_the_clock(two.summary) == without_the_clock(again.summary)
    assert (tmp_path / "one" / "requests.parquet").read_bytes() == (tmp_path / "two" / "requests.parquet").read_bytes()


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    root = str(Path(helios_sim.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-m", "helios_sim", *write_study(tmp_path, HALF_WAY), "hydra.run.dir=out", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished(folder: Path) -> list[str]:
    return [json.loads(line)["arm"] for line in (folder / "finished.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_study_stopped_half_way_goes_on_where_it_was(helios, tmp_path, how):
    (tmp_path / "held.py").write_text(HELD)
    process = start(tmp_path)
    wait_for(tmp_path / "waiting", process)
    process.send_signal(how)
    out, err = process.communicate(timeout=30)
    assert out == ""
    if how is signal.SIGINT:
        assert process.returncode == 1
        assert err.splitlines()[-2].startswith("helios_sim: stopped")
        assert "Traceback" not in err
    folder = tmp_path / "out"
    assert finished(folder) == ["last", "full_depth", "early_exit"]  # a policy of one's own runs first
    assert not (folder / "summary.json").exists()
    kept = sorted((folder / "finished").iterdir())

    (folder / "finished.jsonl").open("a").write('{"key": "half a li')  # as a kill while writing leaves it
    (tmp_path / "go").touch()
    process = start(tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err.count("kept from before") == len(kept) == 3
    assert finished(folder) == ["last", "full_depth", "early_exit", "last", "last", "full_depth", "full_depth"]
    assert not (folder / "finished").exists()

    helios.monkeypatch.syspath_prepend(tmp_path)
    undisturbed = helios(*write_study(tmp_path, HALF_WAY), into="undisturbed")
    assert without_the_clock(json.loads(out.splitlines()[-1])) == without_the_clock(undisturbed.summary)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are read from /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_a_study_of_several(tmp_path, how):
    (tmp_path / "held.py").write_text(HELD)
    process = start(tmp_path, "jobs=2")
    wait_for(tmp_path / "waiting", process)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(how)
    process.wait(timeout=30)
    deadline = time.monotonic() + 10
    while left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.slow
def test_a_damaged_leftover_is_run_again(helios, tmp_path):
    study = write_study(tmp_path)
    first = helios(*study)
    key = json.loads((tmp_path / "out" / "finished.jsonl").read_text().splitlines()[0])["key"]
    (tmp_path / "out" / "finished").mkdir()
    (tmp_path / "out" / "finished" / f"{key}.pickle").write_bytes(b"\x80\x05damage")
    again = helios(*study)
    assert again.status == 0
    assert "kept from before" not in again.err
    assert without_the_clock(first.summary) == without_the_clock(again.summary)


def test_a_study_from_python_is_checked_before_it_runs():
    config = Config(
        models=["opt-1.3b"],
        workload=WorkloadConfig(
            n_requests=5,
            arrivals=ArrivalsConfig("all_at_once"),
            lengths=LengthsConfig(prompt=LengthConfig(value=20), output=LengthConfig(value=5)),
            mix=MixConfig({"gsm8k": 1.0}),
        ),
        arms={"full_depth": {"policy": "full_depth"}},
    )
    assert run(config).arms["full_depth"].metrics["requests_completed"] == 5
    with pytest.raises(UserError, match=r"gates\.metric='speed'"):
        run(replace(config, gates=[GateConfig(arm="full_depth", metric="speed", low=1.0)]))


@pytest.mark.slow
def test_what_the_reader_of_a_trace_changed_is_said_in_the_report(command, tmp_path):
    (tmp_path / "unsorted.csv").write_text("arrival_s,prompt_tokens,output_tokens\n2,20,5\n1,20,5\n3,20,5\n")
    trace = [
        f"workload.{part}.{key}"
        for part in ("arrivals", "lengths")
        for key in ("kind=trace", f"trace={tmp_path}/unsorted.csv")
    ]
    assert command(*write_study(tmp_path), *trace, "workload.n_requests=null").status == 0
    assert "1 of 3 rows arrive before the row above" in (tmp_path / "out" / "report.html").read_text()
