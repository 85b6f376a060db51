"""A decision is told beside what the next best option would have given until the next decision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helios_sim.api import simulate, study_config
from helios_sim.errors import UserError
from helios_sim.report.records import Records
from helios_sim.report.result import ArmResult, ExperimentResult, Over, comparisons
from helios_sim.report.write import summarise_result, write_result
from helios_sim.request import RequestRecord
from helios_sim.study import instead
from helios_sim.study.instead import _Branching, branches, over, run_instead
from helios_sim.study.jobs import Job, JobResult, run_job, serve
from helios_sim.study.plan import plan_study
from test_report_metrics import dropped, record

WORDS = ("workload.n_requests=250", "~arms.full_depth_opt-6.7b", "profile_band=none", "pictures=false")
S = 10**9


@pytest.fixture(scope="module")
def study() -> ExperimentResult:
    return simulate("quickstart", *WORDS, "next_best=all")


@pytest.fixture(scope="module")
def job() -> Job:
    return plan_study(study_config("quickstart", *WORDS, "next_best=all")).headline.jobs["helios"][0]


@pytest.fixture(scope="module")
def ran(job: Job) -> JobResult:
    return run_job(job)


def test_of_a_window_are_told_what_was_done_in_it_and_what_was_left_at_its_end() -> None:
    records = Records.of([done(0, 1), done(0, 3), done(2, 4), done(3, 7), done(5, 6), dropped(1)])
    assert over(records, 1 * S, 4 * S) == Over(completed=2, e2e_s_mean=2.5, unfinished=1)
    assert over(records, 4 * S, 6 * S) == Over(completed=1, e2e_s_mean=1.0, unfinished=1)
    assert over(records, 8 * S, 9 * S) == Over(completed=0, e2e_s_mean=None, unfinished=0)


def done(arrival_s: float, end_s: float) -> RequestRecord:
    return record(0, arrival_s, end_s, end_s, 1)


def served(job: Job, branch: instead.Branch) -> Records:
    found = instead._served(job, branch)
    assert found is not None
    return found


@pytest.mark.slow
def test_the_same_option_gives_the_same(job: Job, ran: JobResult) -> None:
    """A branch differs from the run by the other option alone."""
    found = list(branches(ran))
    assert found
    for branch in found[:3]:
        same = replace(branch, option=branch.decision.deployment)
        told = instead._instead(same, ran.replicate.records, served(job, same))
        assert told.chosen == told.other
        assert told.window_s == (branch.until_ns - branch.decision.time_ns) / S


def test_a_decision_that_does_not_come_again_is_left_out(job: Job, ran: JobResult) -> None:
    """As of a policy that draws: a branch that was never taken would look like an option that changes nothing."""
    branch = next(branches(ran))
    never = replace(branch, decision=replace(branch.decision, time_ns=branch.decision.time_ns + 1))
    assert instead._served(job, never) is None
    assert instead._served(job, branch) is not None


def test_what_comes_after_the_window_changes_nothing_in_it(
    job: Job, ran: JobResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch is served as far as it is looked at."""
    found = list(branches(ran))[:2]
    short = [served(job, branch) for branch in found]
    monkeypatch.setattr(instead, "serve", lambda *given, until_ns, **how: serve(*given, **how))
    for branch, records in zip(found, short, strict=True):
        whole = served(job, branch)
        window_ns = branch.decision.time_ns, branch.until_ns
        assert over(records, *window_ns) == over(whole, *window_ns)
        assert len(records) < len(whole) == len(ran.replicate.records)


def test_nothing_is_changed_before_the_decision(job: Job, ran: JobResult) -> None:
    branch = list(branches(ran))[-1]
    records, other = ran.replicate.records, served(job, branch)
    at_ns = branch.decision.time_ns
    ours, theirs = (np.sort(it.last_token_ns.values[it.last_token_ns.values <= at_ns]) for it in (records, other))
    assert len(ours)
    np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(np.sort(records.last_token_ns.values), np.sort(other.last_token_ns.values))


@pytest.mark.slow
def test_each_choice_of_helios_stands_beside_its_second(study: ExperimentResult) -> None:
    arm = study.arms["helios"]
    chosen = [n for n, decision in enumerate(arm.decisions) if decision.deployment.next_best is not None]
    assert list(arm.instead) == chosen != []
    for place, found in arm.instead.items():
        decision = arm.decisions[place]
        assert found.option == decision.deployment.next_best.active != decision.deployment.active
        costs = decision.deployment.evidence["cost_until_next_round"]
        ranked = sorted(costs, key=costs.__getitem__)
        assert f"{found.option.model}@{found.option.layers}" in ranked[:2]
        served = found.chosen.completed + found.chosen.unfinished
        assert served >= found.other.completed
    told = summarise_result(study, comparisons(study))["arms"]["helios"]["next_best"]
    assert [row["window_s"] for row in told] == [it.window_s for it in arm.instead.values()]


@pytest.mark.slow
def test_the_page_shows_it(study: ExperimentResult, tmp_path: Path) -> None:
    write_result(study, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<th>next best instead</th>" in page
    (_, found), *_ = study.arms["helios"].instead.items()
    assert f"{found.other.completed:,} done" in page


OWN = """
from helios_sim import Deployment, FixedCap, KvRule, Placement, QueueAbove

class Mine:
    def start(self, situation):
        return self._at(24)
    def decide(self, cause, telemetry):
        return self._at(6) if telemetry.queued_requests > 3 else None
    def _at(self, layers):
        triggers = (QueueAbove(3),) if layers == 24 else ()
        return Deployment(Placement("opt-1.3b", layers), FixedCap(0.9), kv_rule=KvRule.NONE, triggers=triggers)
"""


@pytest.mark.slow
def test_a_policy_that_names_no_second_choice_stands_beside_going_on_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "falls_back.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    policy = "+arms.mine={policy: custom, object: 'falls_back:Mine'}"
    words = ("workload.arrivals={kind: all_at_once}", "workload.n_requests=300", "subject=mine")
    found = simulate("quickstart", *WORDS, *words, policy)
    arm: ArmResult = found.arms["mine"]
    assert len(arm.decisions) == 2
    ((place, told),) = arm.instead.items()
    assert place == 1
    assert (told.option.model, told.option.layers) == ("opt-1.3b", 24)
    assert told.other.e2e_s_mean > told.chosen.e2e_s_mean  # deeper is slower


def test_auto_stops_where_it_would_take_long(job: Job, ran: JobResult, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = replace(job, config=replace(job.config, next_best="auto"))
    all_of_them = len(list(branches(ran)))
    assert all_of_them > 1
    monkeypatch.setattr(instead, "MOST_REQUESTS", 250)
    assert len(run_instead({"helios": auto}, {auto.key: ran}, "helios")["helios"]) == 1
    none = replace(job, config=replace(job.config, next_best="none"))
    assert run_instead({"helios": none}, {none.key: ran}, "helios") == {"helios": {}}


def test_a_branch_asks_its_policy_no_more(ran: JobResult) -> None:
    class Asked:
        def start(self, situation: Any) -> Any:
            return ran.decisions[0].deployment

        def decide(self, cause: Any, telemetry: Any) -> Any:
            raise AssertionError("asked")

    first = next(branches(ran))
    at_start = replace(first, decision=ran.decisions[0])
    policy = _Branching(Asked(), at_start)
    taken = policy.start(None)  # type: ignore[arg-type]
    assert (taken.active, taken.triggers) == (first.option.active, ())
    assert policy.decide(None, None) is None  # type: ignore[arg-type]


def test_another_word_is_refused() -> None:
    with pytest.raises(UserError, match="auto, all or none"):
        study_config("quickstart", "next_best=some")
