"""Sentences of reports: each says what the figures beside it hold, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helios_sim.api import simulate, study_config
from helios_sim.report.cautions import NEAR_SATURATION, cautions, losses, lost_share, served_per_s, slows_down
from helios_sim.report.compare import Ratio
from helios_sim.report.figures.arms import timeline_drawings
from helios_sim.report.intervals import Method, mean_bounds
from helios_sim.report.page import render
from helios_sim.report.records import Records
from helios_sim.report.result import ArmResult, ExperimentResult, Replicate, comparisons
from helios_sim.request import Status
from helios_sim.study.verdict import FEWEST_REQUESTS, verdict
from helios_sim.study.workload import statement
from report_example import example_result


@pytest.fixture
def result() -> ExperimentResult:
    return example_result((1, 2))


def with_dropped(arm: ArmResult, kept: int, why: str = "no room") -> ArmResult:
    """The arm as if all but its first `kept` completed requests of each seed had been dropped."""
    replicates = []
    for replicate in arm.replicates:
        records = replicate.records
        gone = np.flatnonzero(records.completed)[kept:]
        status = np.array([str(name) for name in records.status], object)
        status[gone] = Status.DROPPED
        reason = np.array(list(records.drop_reason), object)
        reason[gone] = why
        changed = replace(records, status=labels(status), drop_reason=labels(reason))
        replicates.append(replace(replicate, records=changed))
    return replace(arm, replicates=tuple(replicates))


def labels(texts: np.ndarray[Any, Any]) -> Any:
    from helios_sim.report.columns import Labels

    names = tuple(dict.fromkeys(texts.tolist()))
    return Labels(np.array([names.index(text) for text in texts], np.int16), names)


def answer(result: ExperimentResult, subject: str = "helios") -> tuple[str, ...]:
    return verdict(result, subject, comparisons(result)[subject], list(result.arms))


@pytest.mark.slow
def test_an_arm_that_dropped_requests_neither_helps_nor_hurts(result: ExperimentResult) -> None:
    assert "helps" in answer(result)[0] or "hurts" in answer(result)[0] or "No" in answer(result)[0]
    lossy = replace(result, arms={**result.arms, "helios": with_dropped(result.arms["helios"], 14)})
    first = answer(lossy)[0]
    share = lost_share(lossy.arms["helios"])
    assert first.startswith("No verdict on")
    assert f"helios did not complete {share:.1%} of its requests" in first
    assert not any("helps" in sentence or "hurts" in sentence for sentence in answer(lossy))


@pytest.mark.slow
def test_the_best_arm_is_one_that_did_its_work(result: ExperimentResult) -> None:
    (best,) = [sentence for sentence in answer(result) if sentence.startswith("Best of")]
    name = best.split(": ")[1].split(" with")[0]
    lossy = replace(result, arms={**result.arms, name: with_dropped(result.arms[name], 5)})
    assert not any(f": {name} with" in sentence for sentence in answer(lossy))


@pytest.mark.slow
def test_few_requests_give_no_verdict(result: ExperimentResult) -> None:
    first = {name: replace(arm, replicates=(first_of(arm, 17),)) for name, arm in result.arms.items()}
    said = answer(replace(result, arms=first, headline_metrics=("ttft_s_mean",)))
    assert said[0].startswith("Too few requests for a verdict: over 17, ")
    assert FEWEST_REQUESTS > 17


def first_of(arm: ArmResult, n: int) -> Replicate:
    """The first seed as if only its first n requests had come."""
    return replace(arm.replicates[0], records=arm.replicates[0].records.part(slice(n)))


@pytest.mark.slow
def test_one_seed_claims_no_more_than_its_run(result: ExperimentResult) -> None:
    arms = {name: replace(arm, replicates=arm.replicates[:1]) for name, arm in result.arms.items()}
    one = replace(result, arms=arms, headline_metrics=("e2e_s_mean",))
    said = answer(one)
    assert said[0].startswith("In this run helios is better: ")
    assert "95 % interval within this run: " in said[0]
    assert "one seed: what others would give is not known" in said[1]
    assert not any("helps" in sentence or "hurts" in sentence for sentence in said)
    page = render(one, comparisons(one), [])
    assert "95 % within this run" in page
    several = replace(result, headline_metrics=("e2e_s_mean",))
    assert "(95 % interval over 2 seeds: " in answer(several)[0]
    assert "this run" not in " ".join(answer(several))
    assert "one seed" not in " ".join(answer(several))


@pytest.mark.slow
def test_without_an_interval_several_seeds_neither_help_nor_hurt(result: ExperimentResult) -> None:
    ratios = {"e2e_s_mean": Ratio(0.5, None, None, Method.NONE, 2)}
    said = verdict(replace(result, headline_metrics=("e2e_s_mean",)), "helios", ratios, list(result.arms))
    assert said[0].startswith("helios has 0.50 times the E2E mean")
    assert "(no interval over 2 seeds)" in said[0]


@pytest.mark.slow
def test_what_the_answer_hangs_on_is_part_of_the_verdict(result: ExperimentResult, monkeypatch) -> None:
    monkeypatch.setattr("helios_sim.report.cautions.slows_down", lambda records: True)
    arms = {**result.arms, "static_cap_opt-1.3b": with_dropped(result.arms["static_cap_opt-1.3b"], 2, "no room")}
    lossy = replace(result, arms=arms, workload=replace(result.workload, offered_requests_per_s=1e6))
    said = " ".join(answer(lossy))
    assert "dropped, most often: no room" in said
    assert "every arm is saturated, so their times grow" in said
    assert "fitted to published statistics" in said


@pytest.mark.slow
def test_losses_are_said_with_their_share_and_reason(result: ExperimentResult) -> None:
    arm = with_dropped(result.arms["helios"], 100, "context of opt-6.7b exceeded")
    lossy = replace(result, arms={"helios": arm}, baseline="helios")
    dropped = sum(int(r.records.has_status(Status.DROPPED).sum()) for r in arm.replicates)
    requests = sum(len(r.records) for r in arm.replicates)
    (said,) = losses(lossy)
    assert f"{dropped} of {requests} requests ({dropped / requests:.1%}) were dropped" in said
    assert "most often: context of opt-6.7b exceeded" in said
    assert said in cautions(lossy)


@pytest.mark.slow
def test_time_of_evaluation_never_exceeds_the_time(result: ExperimentResult) -> None:
    arm = result.arms["helios"]
    span = arm.metrics["span_s"]
    assert isinstance(span, float)
    for evaluated, said in ((0.25 * span, "25.0 % [–] of the time"), (1.471 * span, " s [–] (more than until its")):
        metrics = {**arm.replicates[0].metrics, "evaluation_time_s": evaluated, "span_s": span, "switches": 1}
        changed = replace(arm, replicates=(replace(arm.replicates[0], metrics=metrics),))
        alone = replace(result, arms={"helios": changed}, baseline="helios")
        told = " ".join(verdict(alone, "helios", {}, ["helios"]))
        assert said in told
        assert "147.1" not in told


@pytest.mark.slow
def test_the_subject_has_a_card_however_many_arms_there_are(result: ExperimentResult) -> None:
    arms = {**{f"arm_{n}": replace(result.arms["helios"], name=f"arm_{n}") for n in range(6)}, **result.arms}
    many = replace(result, arms=arms, subject="helios", published=())
    page = render(many, comparisons(many), [])
    cards = page[page.index('class="cards"') : page.index("</section>")]
    assert cards.index("helios") < cards.index("arm_0")


def test_a_short_run_that_keeps_up_is_not_called_saturated() -> None:
    """20 requests at 4/s that take 6 s each: the last ends 6 s after the last arrival."""
    records = Records.of(
        replace(record, arrival_ns=n * 250_000_000, scheduled_ns=n * 250_000_000, first_token_ns=n * 250_000_000 + 1,
                last_token_ns=n * 250_000_000 + 6_000_000_000, request_id=n)
        for n, record in enumerate(completed(20))
    )  # fmt: skip
    served = served_per_s(records)
    assert served is not None
    assert served >= NEAR_SATURATION * 4.0


@pytest.mark.parametrize("slower", [1.0, 1.05, 1.3])
def test_a_run_that_serves_less_than_comes_is_saturated_where_it_slows_down(slower: float) -> None:
    """One request a second, of which the last has thirty times as many tokens and takes as long for each."""
    tokens, pace_s = [10] * 11 + [300], [0.1] * 6 + [0.1 * slower] * 6
    records = Records.of(
        replace(record, arrival_ns=n * 10**9, scheduled_ns=n * 10**9, first_token_ns=n * 10**9 + 1,
                last_token_ns=n * 10**9 + int(tokens[n] * pace_s[n] * 1e9), output_tokens=tokens[n], request_id=n)
        for n, record in enumerate(completed(12))
    )  # fmt: skip
    served = served_per_s(records)
    assert served is not None
    assert served < NEAR_SATURATION * 1.0
    assert slows_down(records) is (slower > 1.1)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["workload.arrivals.kind=poisson", "workload.arrivals.kind=constant"])
def test_a_lightly_loaded_server_is_neither_saturated_nor_near_it(word: str) -> None:
    light = simulate(
        "own", "policy=full_depth", word,
        settings={"models": ["opt-1.3b"], "exits.source": "none", "workload.n_requests": 30, "profile_band": "none",
                  "server.kv_cache_dtype": "fp8", "hardware": "l40s"},
    )  # fmt: skip
    assert light.arms["full_depth"].metrics["ttft_s_p50"] < 0.03
    assert not any("satura" in text for text in (*light.verdict, *cautions(light)))


@pytest.mark.slow
def test_a_busy_server_whose_requests_do_not_wait_is_not_near_saturation(result: ExperimentResult) -> None:
    arm = result.arms["helios"]
    for queue_s, said in ((0.001, False), (0.2, True)):
        metrics = {"busy_fraction": 1.0, "queue_s_mean": queue_s, "e2e_s_mean": 1.0}
        runs = tuple(replace(run, metrics={**run.metrics, **metrics}) for run in arm.replicates)
        texts = cautions(replace(result, arms={"helios": replace(arm, replicates=runs)}, baseline="helios"))
        assert any("near saturation" in text for text in texts) is said


@pytest.mark.slow
def test_no_arm_is_the_best_over_a_few_requests_or_beside_its_twin() -> None:
    few = simulate("quickstart", settings={"workload.n_requests": 3})
    assert few.verdict[0].startswith("Too few requests")
    assert not any("Best of" in sentence for sentence in few.verdict)
    twins = simulate(
        "own", "+arms.a.policy=full_depth", "+arms.b.policy=full_depth", "subject=b",
        settings={"models": ["opt-1.3b"], "exits.source": "none", "workload.n_requests": 25},
    )  # fmt: skip
    (best,) = [sentence for sentence in twins.verdict if sentence.startswith("Best of")]
    assert best.endswith(", as b, full_depth.")


@pytest.mark.slow
def test_what_has_no_better_side_has_no_best_arm(result: ExperimentResult) -> None:
    for name in ("switches", "batch_mean", "busy_fraction"):
        plain = replace(result, headline_metrics=(name,))
        ratios = {name: Ratio(1.5, 1.2, 1.8, Method.OVER_SEEDS, 2)}
        said = verdict(plain, "helios", ratios, list(result.arms))
        assert said[0].startswith("helios has 1.50 times the")
        assert not any(text.startswith(("Best of", "Unbeaten")) for text in said)


def test_lengths_are_those_of_what_was_answered() -> None:
    dropped = simulate(
        "own", "policy=full_depth",
        settings={"models": ["opt-1.3b"], "exits.source": "none", "workload.n_requests": 9,
                  "workload.lengths.prompt.minimum": 3000, "workload.lengths.prompt.maximum": 4000},
    )  # fmt: skip
    facts = dict(dropped.workload.facts)
    assert facts["output tokens of the 0 completed"] == "none"
    assert facts["prompt tokens"].startswith("mean 3000")


def completed(n: int) -> list[Any]:
    from test_report_records import some_records

    return [record for record in some_records(10 * n) if record.status is Status.COMPLETED][:n]


@pytest.mark.slow
def test_new_placements_are_spoken_of_only_where_there_are_some(result: ExperimentResult) -> None:
    arm = replace(result.arms["helios"], timeline_transitions_ns=())
    (still,) = timeline_drawings(replace(result, arms={"helios": arm}))
    assert "placement" not in still.caption
    assert "new placement" not in [text.get_text() for text in still.figure.axes[0].get_legend().get_texts()]
    moved = replace(arm, timeline_transitions_ns=(10**9,))
    (drawing,) = timeline_drawings(replace(result, arms={"helios": moved}))
    assert "changed placement" in drawing.caption


@pytest.mark.slow
def test_a_files_sentence_is_kept_only_for_its_own_workload() -> None:
    own = study_config("quickstart").workload
    assert "the paper's five task types" in statement(own)
    other = study_config("quickstart", "workload.lengths.prompt.mean=100").workload
    assert "paper" not in statement(other)
    assert "Prompts of lognormal" in statement(other)
    assert "Poisson arrivals at 6" in statement(study_config("speed_w1").workload)


@pytest.mark.parametrize(
    ("values", "share"),
    [([0.99, 1.0], True), ([0.0, 0.02, 0.0], True), ([0.2, 0.9], True), ([506.0, 735.0], False),
     ([0.0, 0.0, 7.0], False), ([3.0, 3.0], False), ([1e-9, 4e9], False), ([1.0, 1.0], True)],
)  # fmt: skip
def test_an_interval_stays_where_the_quantity_can_be(values: list[float], share: bool) -> None:
    low, high = mean_bounds(np.array(values), share)
    assert 0 <= low <= np.mean(values) <= high
    assert high <= 1 or not share
