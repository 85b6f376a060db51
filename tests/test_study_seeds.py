"""seeds=auto: as many seeds as the answer needs, the same on any number of cores and after a kill."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from command_line import CommandLine
from helios_sim.api import simulate, study_config
from helios_sim.errors import UserError
from helios_sim.report.intervals import Method
from helios_sim.study.schema import AutoSeedsConfig, Config
from helios_sim.study.seeds import looks

STUDY = ("workload.n_requests=40", "seeds=auto", "auto_seeds.first=2", "auto_seeds.at_most=8", "subject=static_cap")


@pytest.mark.parametrize(
    ("first", "at_most", "expected"), [(10, 40, [10, 20, 40]), (10, 35, [10, 20, 35]), (3, 3, [3]), (4, 7, [4, 7])]
)
def test_seeds_double_up_to_the_most(first: int, at_most: int, expected: list[int]) -> None:
    assert looks(Config(auto_seeds=AutoSeedsConfig(first=first, at_most=at_most))) == expected


@pytest.mark.slow
def test_a_narrow_interval_is_enough() -> None:
    result = simulate("quickstart", *STUDY, "auto_seeds.relative_width=1.5")
    assert all(len(arm.replicates) == 2 for arm in result.arms.values())
    assert any(said.startswith("2 seeds: the subject's interval is ") for said in result.verdict)


@pytest.mark.slow
def test_a_difference_that_stands_ends_it() -> None:
    result = simulate("quickstart", *STUDY, "auto_seeds.relative_width=1e-6")
    assert len(result.arms["helios"].replicates) in (4, 8)
    assert any("more would not change on which side of 1" in said for said in result.verdict)
    assert result.verdict[0].startswith("static_cap helps")


@pytest.mark.slow
def test_the_most_end_it() -> None:
    words = (*STUDY[:2], "auto_seeds.first=2", "auto_seeds.at_most=3", "auto_seeds.relative_width=1e-6")
    result = simulate("quickstart", *words)
    assert "3 seeds: auto_seeds.at_most allows no more." in result.verdict
    again = simulate("quickstart", words[0], "seeds=[0,1,2]")
    assert {n: a.metrics for n, a in again.arms.items()} == {n: a.metrics for n, a in result.arms.items()}
    assert again.verdict == tuple(said for said in result.verdict if not said.startswith("3 seeds"))


@pytest.mark.slow
def test_lost_requests_are_not_mended_by_seeds() -> None:
    result = simulate("quickstart", *STUDY, "workload.lengths.prompt={kind: fixed, value: 5000}")
    assert all(len(arm.replicates) == 2 for arm in result.arms.values())
    assert any("requests were lost, and more do not mend that" in said for said in result.verdict)


@pytest.mark.slow
def test_a_subject_that_is_its_own_baseline_goes_by_its_figure() -> None:
    words = (*STUDY[:4], "subject=full_depth_opt-1.3b", "auto_seeds.relative_width=5")
    result = simulate("quickstart", *words)
    assert any(said.startswith("2 seeds: the subject's interval") for said in result.verdict)
    assert result.arms["full_depth_opt-1.3b"].intervals["e2e_s_mean"].method is Method.OVER_SEEDS


@pytest.mark.slow
def test_cores_and_kills_change_nothing(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = ("auto_seeds.at_most=4", "auto_seeds.relative_width=1e-6")
    words = ("+experiment=quickstart", *STUDY, *narrow, "pictures=false")
    one, two = (command(*words, f"jobs={jobs}", into=str(jobs)) for jobs in (1, 2))
    assert (one.status, two.status) == (0, 0)
    assert _figures(one.summary) == _figures(two.summary)
    assert isinstance(one.summary["provenance"]["seeds"], list)
    assert one.summary["provenance"]["configuration"]["seeds"] == "auto"
    with monkeypatch.context() as killed:  # before the results of its first look are put together
        killed.setattr("helios_sim.study.command.forget_jobs", lambda folder: None)
        command("+experiment=quickstart", STUDY[0], "seeds=[0,1]", "pictures=false", into="stopped")
    on = command(*words, "jobs=1", into="stopped")
    assert "kept from before" in on.err
    assert _figures(on.summary) == _figures(one.summary)


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "provenance"}


@pytest.mark.slow
def test_it_is_for_studies_of_arms() -> None:
    with pytest.raises(UserError, match="auto is for studies of arms"):
        study_config("sweep_helios", "seeds=auto")
    with pytest.raises(UserError, match="auto is for studies of arms"):
        replace(study_config("sweep_grid"), seeds="auto")


def test_a_users_own_policy_runs_first(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an answer that cannot be carried out is told before the other arms have run."""
    text = "class P:\n    def start(self, situation): return 3\n    def decide(self, cause, telemetry): return None\n"
    (command.folder / "late_fault.py").write_text(text)
    monkeypatch.syspath_prepend(command.folder)
    said = command("workload.n_requests=5", "pictures=false", "policy=custom", "policy.object=late_fault:P")
    assert said.status == 1
    assert "custom, seed 0: policy.object='late_fault:P': start() returned 3" in said.err
    assert len(said.err.splitlines()) == 1
