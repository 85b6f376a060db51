"""`python -m calibrate +campaign=rehearsal`: every stage of the campaign on tiny shapes, its archives, its mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from calibrate.campaigns.archives import MAX_BYTES, read_archive
from calibrate.campaigns.land import land
from calibrate.stages import STAGES as KEPT, drafts_in, read_finished
from calibrate_line import calibrate
from campaign_checkout import checkout
from command_line import CommandLine
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.store import write_trace
from helios_sim.profile.store import read_profile

FEW = (
    "+campaign=rehearsal", "models=[tiny-opt-1.3b,tiny-opt-6.7b,tiny-smollm2-135m]", "last_model=null",
    "live.loads=[0.8]",
)  # fmt: skip
STAGES = (
    "ceilings", "profile-tiny-opt-1.3b", "live-steady-tiny-opt-1.3b", "live-loads-tiny-opt-1.3b",
    "profile-tiny-smollm2-135m", "adapters", "traces",
    "headline-tiny-smollm2-135m", "live-headline-tiny-smollm2-135m", "live-tiny-smollm2-135m",
    "profile-tiny-opt-6.7b", "headline-tiny-opt-6.7b", "live-headline-tiny-opt-6.7b", "live-tiny-opt-6.7b",
    "train_exits", "energy",
)  # fmt: skip


def statuses(summary: dict) -> dict[str, str]:
    return {name: stage["status"] for name, stage in summary["stages"].items()}


@pytest.mark.usefixtures("sketched")
def test_the_rehearsal_runs_every_stage_and_a_second_call_goes_on_from_its_archives(
    repository, tmp_path, monkeypatch, capsys
) -> None:
    said = calibrate(monkeypatch, capsys, tmp_path, *FEW, "out=out")
    assert said.status == 0, said.err
    assert statuses(said.summary) == dict.fromkeys(STAGES, "done")
    out = tmp_path / "out"
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert {path.parent for path in files} == {out}
    assert all(path.stat().st_size <= MAX_BYTES for path in files)
    assert "no figure" in said.out.lower()
    assert "No figure below means anything" in (out / "report.md").read_text()
    over = said.summary["stages"]["profile-tiny-opt-6.7b"]["result"]["over_ceiling"]
    assert min(over.values()) > 0
    row = f"| tiny-opt-6.7b | {over['dense']:.2f} | {over['decode_attention']:.2f} |"
    assert row in (out / "report.md").read_text()

    for path in sorted(out.glob("*.tar.gz")):
        read_archive(path, "rehearsal", tmp_path / "state")
    finished = read_finished(tmp_path / "state")
    profile = finished["profile-tiny-opt-6.7b"]
    found = read_profile(profile.part("profile") / profile.result["name"])
    assert "random weights" in found.provenance.details["weights"]
    live = finished["live-tiny-opt-6.7b"].result
    assert "made up" in live["exits"]
    for point in live["points"]:  # decisions are replayed, so both sides leave after the same layers
        metrics = point["metrics"]
        for arm in ("full_depth", "early_exit"):
            live, simulated = (metrics[f"{kind}_{arm}"]["layers_per_token"] for kind in ("live", "simulated"))
            assert live == simulated
    (one,) = finished["live-steady-tiny-opt-1.3b"].result["steady"]  # no more users than run together
    assert one["users"] == 1
    assert one["live_s"] > 0 < one["simulate_s"]
    arms = finished["headline-tiny-smollm2-135m"].result["arms"]
    assert arms["simulated_helios_batched"]["throughput_requests_per_s"] > 0
    headline = finished["live-headline-tiny-opt-6.7b"].result
    for arm in ("full_depth", "early_exit_batched"):
        served, simulated = (headline["arms"][f"{mode}_{arm}"] for mode in ("live", "simulated"))
        assert served["layers_per_token"] == simulated["layers_per_token"]  # of the same requests
        assert not isinstance(served["energy_wh_per_request"], dict)  # a counter's value or none, never a band
        exits = None if arm == "full_depth" else "made up"
        assert served["provenance"]["times"] == "served here"
        assert (served["provenance"]["exits"], served["provenance"]["class"]) == (exits, exits or "measured")
    assert len(headline["gains"]) == 8
    pages = {name for name, stage in finished.items() if stage.part("report.html").is_file()}
    assert pages == {name for name in STAGES if name.startswith("live-")}

    again = calibrate(monkeypatch, capsys, tmp_path, *FEW, "resume=[out]", "out=second")
    assert again.status == 0, again.err
    assert statuses(again.summary) == dict.fromkeys(STAGES, "kept")
    assert {p.name for p in (tmp_path / "second").iterdir()} == {p.name for p in out.iterdir()}

    # what a full campaign would leave for good: profiles, an experiment on them, a row of the page
    written = land(out, checkout(tmp_path / "checkout", repository), trial=True)
    (experiment,) = (path for path in written if path.suffix == ".yaml")
    for model in ("tiny-opt-1.3b", "tiny-opt-6.7b"):
        write_trace(synthetic_trace(model, (2, 4), tokens=400), tmp_path / "traces" / model)
    simulated = CommandLine(capsys, monkeypatch, tmp_path)(
        "--config-dir", str(experiment.parents[1]), f"+experiment={experiment.stem}", "workload.n_requests=6",
        f"profile_folder={tmp_path}/checkout/helios_sim/data/profiles", "exits.threshold=0.6",
        f"exits.source='{tmp_path}/traces/{{model}}'", into="simulated",
    )  # fmt: skip
    assert simulated.status == 0, simulated.err
    assert simulated.summary["arms"]["helios_batched"]["metrics"]["requests_completed"] > 0  # some are too long


@pytest.mark.parametrize("budget_s", [0.6, 4])
def test_a_budget_is_kept_and_what_is_finished_is_delivered(budget_s: float, tmp_path, monkeypatch, capsys) -> None:
    began_s = time.monotonic()
    said = calibrate(monkeypatch, capsys, tmp_path, *FEW, f"budget_s={budget_s}", "out=out")
    assert time.monotonic() - began_s < budget_s + 3  # beside the pages, no more than a step of a stage is waited for
    last = said.err.splitlines()[-1]
    if said.status:  # on a busy machine nothing may be finished: that is said, and never a success
        assert said.status == 1
        assert f"budget_s={budget_s:.1f}: nothing that can be used was measured" in last
        assert f"allow more, such as budget_s={3 * budget_s:g}" in last
        return
    found = statuses(said.summary)
    assert (found["ceilings"], found["profile-tiny-opt-1.3b"]) == ("done", "done")
    assert "times within about" in said.summary["stages"]["profile-tiny-opt-1.3b"]["why"]
    assert found["live-headline-tiny-smollm2-135m"] == "skipped"
    assert said.summary["stages"]["live-headline-tiny-smollm2-135m"]["why"]
    assert "resume=[" in said.out
    assert (tmp_path / "out" / "b-profiles.tar.gz").is_file()


def half_measured(state: Path) -> list[str]:
    """Stages that have begun in the one campaign below this folder and are not finished."""
    drafts = [name for folder in state.iterdir() for name in drafts_in(folder)]
    return [name for name in drafts if not any((folder / KEPT / name).exists() for folder in state.iterdir())]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_whatever_ends_it_what_was_finished_is_there_and_is_taken_up(
    how, repository, tmp_path, monkeypatch, capsys
) -> None:
    command = [sys.executable, "-m", "calibrate", *FEW, f"out={tmp_path / 'out'}"]
    (tmp_path / "state").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "state")}
    victim = subprocess.Popen(
        command, cwd=repository, env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )  # fmt: skip
    archive, deadline = tmp_path / "out" / "b-profiles.tar.gz", time.monotonic() + 120
    while not (archive.exists() and half_measured(tmp_path / "state")):
        assert time.monotonic() < deadline
        assert victim.poll() is None, victim.stderr.read()
        time.sleep(0.02)
    victim.send_signal(how)
    _, told = victim.communicate()
    if how is signal.SIGINT:
        assert victim.returncode == 1
        assert "Traceback" not in told
        assert "finished stages are kept" in told
        assert (tmp_path / "out" / "f-unfinished.tar.gz").is_file()
    names = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert {"a-device.tar.gz", "b-profiles.tar.gz"} <= names
    said = calibrate(monkeypatch, capsys, tmp_path, *FEW, "resume=[out]", "budget_s=0.6", "out=later")
    assert said.status == 0, said.err
    found = statuses(said.summary)
    assert (found["ceilings"], found["profile-tiny-opt-1.3b"]) == ("kept", "kept")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("+campaign=a100",), ["campaign='a100'", "card, rehearsal"]),
        ((*FEW, "budget_s=0.1"), ["budget_s=0.1", "allow"]),
        ((*FEW, "resume=[gone.tar.gz]"), ["resume='gone.tar.gz'"]),
        ((*FEW, "resume=[damaged.tar.gz]"), ["resume='damaged.tar.gz'", "damaged"]),
        ((*FEW, "resume=[other.tar.gz]"), ["resume='other.tar.gz'", "the campaign card"]),
        (("+campaign=rehearsal", "models=[tiny-opt-1.3b]"), ["models", "tiny-opt-6.7b"]),
        ((*FEW, "weights={tiny-opt-1.3b: 'tiny:gpt-5'}"), ["gpt-5", "known shape"]),
        ((*FEW, "weights={tiny-smollm2-135m: 'random:smollm2-135m'}"), ["text_model=", "weights of its own"]),
        ((*FEW, "device=cuda:7"), ["device='cuda:7'"]),
        ((*FEW, "budgets=1"), ["budgets"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_a_mistake_is_one_message_and_leaves_nothing(arguments, parts, tmp_path, monkeypatch, capsys) -> None:
    from calibrate.campaigns.archives import write_archive

    (tmp_path / "damaged.tar.gz").write_bytes(b"nothing")
    write_archive(tmp_path / "other.tar.gz", "card", tmp_path, [])
    said = calibrate(monkeypatch, capsys, tmp_path, *arguments, "out=out")
    assert said.status == 1
    (line,) = said.err.strip().splitlines()
    for part in parts:
        assert part in line
    assert not (tmp_path / "out").exists()


@pytest.fixture
def last(tmp_path):
    """Runs the profile of a plan's last model alone."""
    from calibrate.campaigns.plan import CampaignPlan
    from calibrate.schema import CampaignConfig
    from calibrate.stages import run_stages

    def ran(last_model: str, memory_bytes: int):
        weights = {"small": "tiny:smollm2-135m", "same": "tiny:smollm2-135m"}
        plan = CampaignPlan(
            CampaignConfig(
                device="cpu",
                dtype="float32",
                quick=True,
                models=["small"],
                text_model="small",
                weights=weights,
                last_model=last_model,
                memory_bytes=memory_bytes,
            )
        )
        plan.check()
        (stage,) = (stage for stage in plan.stages if stage.name == f"profile-{last_model}")
        (outcome,) = run_stages([replace(stage, needs=())], tmp_path)
        return outcome

    return ran


def test_a_model_that_is_too_large_is_skipped_in_one_line(last) -> None:
    outcome = last("codellama-34b", 100 << 20)
    assert outcome.status == "skipped"
    assert outcome.why == "codellama-34b: 48 layers in float32 take 135 GB, and 105 MB are there"


def test_memory_that_runs_out_on_the_way_costs_that_stage_alone(last, monkeypatch) -> None:
    def load(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("helios_sim.live.model.decoder.SegmentedModel.load", load)
    outcome = last("same", 1 << 30)
    assert outcome.status == "skipped"
    assert outcome.why == "the device's memory does not suffice: CUDA out of memory. Tried to allocate 2.00 GiB."


def planned(name: str, **more):
    """The plan of a campaign's settings, of which nothing is measured."""
    import yaml

    from calibrate.campaigns.plan import CampaignPlan
    from calibrate.schema import CampaignConfig, CampaignLiveConfig, TrainExitsConfig
    from helios_sim.help import conf_folder

    settings = yaml.safe_load((Path(conf_folder()) / "campaign" / f"{name}.yaml").read_text()) | more
    live, trained = CampaignLiveConfig(**settings["live"]), TrainExitsConfig(**more.get("train_exits", {}))
    return CampaignPlan(CampaignConfig(**{**settings, "live": live, "train_exits": trained}))


def test_a_card_s_campaign_is_the_rehearsal_s_at_full_size() -> None:
    card, rehearsal = (
        [(one.name.replace("tiny-", ""), one.group) for one in plan.planned]
        for plan in (planned("card", text_model="smollm2-135m"), planned("rehearsal"))
    )
    assert card == rehearsal


def test_a_card_s_campaign_needs_no_text_model() -> None:
    weights = {model: f"random:{model}" for model in planned("card").config.models}
    plan = planned("card", device="cpu", weights=weights, last_model=None)
    assert [stage.name for stage in plan.stages] == [one.name for one in plan.planned]
    assert not {"adapters", "traces", "train_exits"} & plan.groups.keys()


def test_exits_are_trained_after_the_second_model_and_before_energy() -> None:
    plan = planned("card", text_model="smollm2-135m", train_exits={"rank": 4})
    names = [one.name for one in plan.planned]
    at = names.index("train_exits")
    assert (names[at - 1], names[at + 1]) == ("profile-llama-2-7b", "energy")
    assert plan.config.train_exits.rank == 4
    times = {one.name: lasts_s for one, _, lasts_s in plan.timetable(1_200.0)}
    assert times["train_exits"] >= 60  # what a dry run prints


def test_energy_is_measured_once_for_the_card_and_late() -> None:
    plan = planned("rehearsal")
    assert not any(inputs.config.energy for inputs in plan._inputs.values())
    names = [one.name for one in plan.planned]
    assert names.index("energy") > names.index("live-tiny-opt-6.7b")


CLAIM = ("ceilings", "profile-opt-6.7b", "live-steady-opt-6.7b", "live-loads-opt-6.7b")
PAIR = ("profile-opt-1.3b", "headline-opt-6.7b", "live-headline-opt-6.7b", "live-opt-6.7b")
CALL_S, PAGE_S, FILES = 540.0, 20.0, 8  # seconds of a call and of its last page, files that come back


@pytest.mark.parametrize("slower", [0.5, 1.0, 1.5])
def test_a_call_on_a_card_does_what_is_worth_most_within_its_time(slower: float, tmp_path) -> None:
    """On a clock on which every stage takes as long as was estimated, or that many times as long."""
    from calibrate.stages import Stage, run_stages

    now_s, plan = [0.0], planned("card")
    began_s: dict[str, float] = {}

    def stage(one, number: int) -> Stage:
        def run(given):
            began_s[one.name] = now_s[0]
            now_s[0] += min(slower * one.estimate_s, given.allowance_s)  # a stage keeps what it is allowed
            return {}

        return Stage(one.name, run, one.estimate_s, -number, one.shortest_s, one.needs)

    stages = [stage(one, number) for number, one in enumerate(plan.planned)]
    outcomes = run_stages(stages, tmp_path, CALL_S - PAGE_S, clock=lambda: now_s[0], by_worth=True)
    done = [outcome.stage for outcome in outcomes if outcome.status == "done"]
    assert now_s[0] <= CALL_S - PAGE_S
    assert tuple(done[:8]) == CLAIM + PAIR
    assert began_s["live-steady-opt-6.7b"] <= 105  # the claim does not wait for other models
    if slower == 1.0:
        assert began_s["live-steady-opt-6.7b"] == 105  # each takes what was estimated, and no share of it
        assert [(one.name, at_s) for one, at_s, lasts_s in plan.timetable(CALL_S - PAGE_S) if lasts_s is not None] == [
            (name, pytest.approx(at_s)) for name, at_s in began_s.items()
        ]
        later = run_stages(stages, tmp_path, CALL_S - PAGE_S, clock=lambda: now_s[0], began=now_s[0], by_worth=True)
        assert [outcome.status for outcome in later] == ["kept"] * len(done) + ["done"] * (len(stages) - len(done))


def test_what_a_campaign_writes_fits_into_what_comes_back() -> None:
    for plan in (planned("card", text_model="smollm2-135m"), planned("rehearsal")):
        archives = {*plan.groups.values(), "f-unfinished"}
        assert len({*archives, "summary.json", "report.md", "transcript.jsonl"}) <= FILES
    assert MAX_BYTES <= 16 << 20


def test_a_dry_run_prints_the_plan_and_measures_nothing(tmp_path, monkeypatch, capsys) -> None:
    said = calibrate(monkeypatch, capsys, tmp_path, "+campaign=card", "budget_s=540", "dry_run=true", "out=out")
    assert said.status == 0, said.err
    for words in ("live-steady-opt-6.7b", "105 s", "not begun", "520 s of the budget", "nothing was measured"):
        assert words in said.out
    assert not (tmp_path / "out").exists()
