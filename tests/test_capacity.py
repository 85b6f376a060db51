"""A capacity plan: its answers are those of ordinary studies of every fleet, and what it cannot answer it says."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from capacity_example import CAPACITY, example
from command_line import write_study
from helios_sim.errors import UserError
from helios_sim.report.capacity import CapacityResult, plan_table
from helios_sim.report.metrics import Band
from helios_sim.study.capacity import STEP, capacity, run_plan
from helios_sim.study.capacity_plan import plan_capacity
from helios_sim.study.command import run
from helios_sim.study.modes import CapacityConfig
from helios_sim.study.schema import Config, CostConfig, SloConfig
from helios_sim.vary.settings import with_settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def planned() -> CapacityResult:
    return capacity(example(jobs=1))


def attainments(config: Config, **settings: object) -> list[float]:
    """Of every arm in turn, in an ordinary study of one fleet."""
    study = with_settings(replace(config, capacity=CapacityConfig(), profile_band="none"), settings)
    return [float(arm.metrics["slo_attainment"]) for arm in run(study).arms.values()]


def test_it_finds_what_studies_of_every_number_of_replicas_find(planned: CapacityResult) -> None:
    config = example(seeds=[0, 1])
    for card in planned.cards:
        kept = [
            [share >= 0.99 for share in attainments(config, **{"hardware": card, "server.replicas": n})]
            for n in range(1, 13)
        ]
        for plan, answers in zip((p for p in planned.plans if p.card == card), zip(*kept, strict=True), strict=True):
            assert plan.replicas == 1 + max((n for n, holds in enumerate(answers, 1) if not holds), default=0)
    assert {plan.replicas for plan in planned.plans} > {1}


def test_bisection_finds_what_trying_all_numbers_finds_for_each_seed_too(planned: CapacityResult) -> None:
    every = capacity(example(jobs=1, capacity={"search": "every"}))
    answers = [[(p.card, p.arm, p.replicas, p.by_seed) for p in result.plans] for result in (planned, every)]
    assert answers[0] == answers[1]
    assert len(planned.tried) < len(every.tried)


def test_the_advised_fleet_keeps_the_slos_up_to_the_load_that_is_named(planned: CapacityResult) -> None:
    advice, config = planned.advice[0], example()
    place = [plan.arm for plan in planned.plans if plan.card == advice.plan.card].index(advice.plan.arm)
    for step, holds in ((1.0, True), (STEP, False)):
        rate = advice.valid_up_to_rps * step
        settings = {
            "hardware": advice.plan.card, "server.replicas": advice.plan.replicas,
            "workload.arrivals.rate_per_s": rate, "workload.n_requests": round(rate * 3.0),
        }  # fmt: skip
        assert (attainments(config, **settings)[place] >= 0.99) is holds
    assert advice.valid_up_to_rps >= advice.plan.requests_per_s
    assert f"up to {advice.valid_up_to_rps:.0f} requests/s" in planned.verdict[0]


def test_where_the_profile_is_off_it_names_what_a_plan_with_such_times_finds(planned: CapacityResult) -> None:
    (advice,) = planned.advice
    assert advice.band is not None
    assert advice.band.low < 1 < advice.band.high
    for factor, number in advice.at_ends:
        other = capacity(example(jobs=1, profile_time_factor=factor, profile_band="none"))
        (found,) = (p for p in other.plans if (p.card, p.arm) == (advice.plan.card, advice.plan.arm))
        assert found.replicas == number
    assert advice.survives is all(number == advice.plan.replicas for _, number in advice.at_ends)
    assert any("times as long as the profile says" in sentence for sentence in planned.verdict)


def test_the_band_is_a_setting_of_the_command_line(command, tmp_path) -> None:
    plan = ("+experiment=capacity", "capacity.cards=[h100-80gb]", "~arms.helios")
    words = (*plan, "seeds=[0]", "pictures=false", "jobs=1")
    given = command(*words, "profile_band=[0.95,1.05]", into="given").summary
    assert given["capacity"]["loads"][0]["recommended"]["profile_band"]["source"] == "profile_band"
    assert [end["time_factor"] for end in given["capacity"]["loads"][0]["recommended"]["at_ends"]] == [0.95, 1.05]
    left_out = command(*words, "profile_band=none", into="none").summary
    assert left_out["capacity"]["loads"][0]["recommended"]["at_ends"] == []


def test_the_number_of_processes_does_not_change_a_bit(planned: CapacityResult) -> None:
    two = capacity(example(jobs=2))
    assert [plan.at for plan in two.plans] == [plan.at for plan in planned.plans]
    assert two.advice == planned.advice


def test_what_is_finished_is_kept(planned: CapacityResult, tmp_path) -> None:
    plan, seen = plan_capacity(example(jobs=1)), []

    def stop_early(task, outcome, kept) -> None:
        seen.append(kept)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path, {}, stop_early)
    again: list[bool] = []
    resumed = run_plan(plan, tmp_path, {}, lambda task, outcome, kept: again.append(kept))
    assert again.count(True) == 9
    assert resumed.plans == planned.plans
    assert resumed.verdict == planned.verdict


def test_what_is_said_and_written(command, tmp_path) -> None:
    said = command(*write_study(tmp_path, CAPACITY), "jobs=1")
    folder = tmp_path / "out"
    assert said.status == 0, said.err
    assert said.summary == json.loads((folder / "summary.json").read_text())
    assert {path.name for path in folder.iterdir()} == {
        ".hydra", "fleets.parquet", "figures", "report.html", "summary.json", "provenance.json", "finished.jsonl",
    }  # fmt: skip
    assert {path.name for path in (folder / "figures").iterdir()} == {"replicas.png", "load.png"}
    (load,) = said.summary["capacity"]["loads"]
    assert [(plan["card"], plan["policy"]) for plan in load["plans"]] == [
        (card, arm) for card in ("a100-40gb", "h100-80gb") for arm in ("full_depth", "static_cap")
    ]
    table = [row for row in pq.read_table(folder / "fleets.parquet").to_pylist() if row["time_factor"] == 1]
    for plan in load["plans"]:
        rows = [row for row in table if (row["load"], row["card"], row["arm"]) == (1, plan["card"], plan["policy"])]
        (row,) = (row for row in rows if row["replicas"] == plan["replicas"])
        assert row["kept"]
        assert row["slo_attainment"] == plan["metrics"]["slo_attainment"] >= 0.99
        assert not any(row["kept"] for row in rows if row["replicas"] == plan["replicas"] - 1)
        interval = plan["intervals"]["slo_attainment"]
        assert interval["low"] <= plan["metrics"]["slo_attainment"] <= interval["high"]
    recommended = load["recommended"]
    assert said.summary["confidence"]["survives"] is recommended["survives"]
    assert recommended["usd_per_hour"] is None  # no price is assumed
    assert recommended["valid_up_to_rps"] >= load["requests_per_s"] == 120.0
    page = (folder / "report.html").read_text()
    for sentence in said.summary["verdict"]:
        assert sentence in said.out
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://github.com", "")
    assert page.count("<svg ") == 2
    assert "USD" not in said.out.splitlines()[2]
    again = command("repro", str(folder))
    assert (again.status, again.out.splitlines()[-1]) == (0, f"the same to the last bit: {folder}")


def test_prices_decide_and_dollars_are_told() -> None:
    prices = {"a100-40gb": 1.0, "h100-80gb": 30.0}
    result = capacity(example(jobs=1, cost=CostConfig(usd_per_card_hour=prices)))
    (advice,) = result.advice
    assert advice.plan.card == "a100-40gb"  # that it is cheaper counts for more than how many there are
    for plan in result.plans:
        assert plan.cards is not None
        assert plan.usd_per_hour == pytest.approx(plan.cards * prices[plan.card])
    assert f"USD {advice.plan.usd_per_hour:,.2f} an hour" in result.verdict[0]
    energy = result.plans[0].at.metrics["energy_j_per_char"]
    assert isinstance(energy, Band)
    lines = plan_table(result, 1.0).lines(width=80)
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("fleet") for line in lines) == 1  # all columns side by side


def test_a_policy_that_changes_too_many_tokens_is_not_advised() -> None:
    config = example(jobs=1)
    careful = capacity(with_settings(config, {"objective.max_disagreement": 0.0}))
    assert careful.advice[0].plan.arm == "full_depth"


@pytest.mark.usefixtures("sketched")
def test_without_exits_full_depth_is_planned_and_what_is_missing_is_said(command, tmp_path) -> None:
    arguments = write_study(tmp_path, CAPACITY)
    words = ("models=[meta-llama/Llama-3.1-8B-Instruct]", "capacity.cards=[l40s]", "seeds=[0]", "slo.tpot_s=0.05")
    said = command(*arguments, *words)
    assert said.status == 0, said.err
    plans = said.summary["capacity"]["loads"][0]["plans"]
    assert [plan["policy"] for plan in plans] == ["full_depth"]
    missing = [sentence for sentence in said.summary["verdict"] if "static_cap is not planned" in sentence]
    assert "python -m calibrate model=meta-llama/Llama-3.1-8B-Instruct +task=potential" in missing[0]
    assert "idle power is not known" in said.out


def test_several_models_each_have_their_own_arms() -> None:
    result = capacity(example(jobs=1, models=["opt-1.3b", "llama-3-8b"], seeds=[0]))
    assert result.arms == ("full_depth_opt-1.3b", "full_depth_llama-3-8b", "static_cap")
    assert any("Several models" in warning for warning in result.warnings)
    assert any("knows no exits of llama-3-8b" in sentence for sentence in result.verdict)


def test_a_card_on_which_the_model_does_not_fit_is_told_beside_the_others() -> None:
    settings = {"models": ["llama-3.3-70b"], "seeds": [0], "slo": SloConfig(ttft_s=1.0, tpot_s=0.1)}
    result = capacity(example(jobs=1, capacity={"cards": ["l40s", "4xh100"]}, **settings))
    by_card = {plan.card: plan for plan in result.plans}
    assert "must fit" in str(by_card["l40s"].why_not)
    assert by_card["l40s"].replicas is None
    assert by_card["4xh100"].cards == 4 * by_card["4xh100"].replicas
    assert result.advice[0].plan.card == "4xh100"


def test_levels_that_no_number_keeps_are_told() -> None:
    result = capacity(example(jobs=1, slo=SloConfig(ttft_s=0.2, tpot_s=0.001), capacity={"most_replicas": 3}))
    assert [plan.replicas for plan in result.plans] == [None] * 4
    assert result.advice == ()
    assert "No fleet of up to 3 replicas" in result.verdict[0]
    assert "TPOT p99 is" in result.verdict[0]


@pytest.mark.parametrize(
    ("by", "least"), [("requests", 100), ("p90", 10), ({"ttft_s": "mean", "tpot_s": "p95"}, 20), ("mean", None)]
)
def test_an_answer_from_few_requests_is_said_to_be_one(by: object, least: int | None) -> None:
    result = capacity(example(jobs=1, seeds=[0], capacity={"by": by, "cards": ["a100-40gb"], "seconds": 0.05}))
    few = [said for said in result.warnings if said.startswith("Few requests")]
    assert len(few) == (least is not None)
    assert least is None or f"says nothing of fewer than {least}." in few[0]


@pytest.mark.parametrize("by", ["p95", "mean", {"ttft_s": "p95", "tpot_s": "mean"}])
def test_statistics_of_times_can_be_what_is_kept(by: object) -> None:
    result = capacity(example(jobs=1, seeds=[0], capacity={"by": by, "cards": ["a100-40gb"]}))
    each = by if isinstance(by, dict) else dict.fromkeys(("ttft_s", "tpot_s"), by)
    bounds = {f"ttft_s_{each['ttft_s']}": 0.2, f"tpot_s_{each['tpot_s']}": 0.02}
    for tried in result.tried:
        assert tried.kept == all(tried.metrics[name] <= bound for name, bound in bounds.items())
    assert {tried.kept for tried in result.tried} == {True, False}


@pytest.mark.usefixtures("sketched")
def test_a_trace_is_planned_at_its_own_pace_and_faster(shared_data, command, tmp_path) -> None:
    said = command(
        "+experiment=capacity", "workload=azure_conversation", "workload.n_requests=300", "models=[llama-3.1-8b]",
        "capacity.cards=[l40s]", "capacity.loads=[1,8]", "capacity.by=p95", "seeds=[0]", "jobs=1",
    )  # fmt: skip
    assert said.status == 0, said.err
    one, eight = said.summary["capacity"]["loads"]
    assert eight["requests_per_s"] == pytest.approx(8 * one["requests_per_s"])
    assert one["plans"][0]["replicas"] < eight["plans"][0]["replicas"]


MISTAKES = [
    ("slo.ttft_s=0", ["slo.ttft_s=0.0", "above 0"]),
    ("slo.ttft_s=null slo.tpot_s=null", ["slo=None", "set slo.ttft_s"]),
    ("slo.ttft_s=null", ["slo.tpot_s=0.05", "wait for ever"]),
    ("capacity.cards=[tpu]", ["capacity.cards='tpu'", "a card of the catalogue"]),
    ("capacity.cards=[l40s,L40S]", ["capacity.cards", "different cards"]),
    ("capacity.cards=[h100,h100-80gb]", ["capacity.cards", "different cards"]),
    ("workload.faults.load_fails.at_s=[3000]", ["load_fails.at_s=[3000.0]", "within the 120 s"]),
    ("capacity.cards=[l40s,l40s]", ["capacity.cards", "each once"]),
    ("models=[llama-3.3-70b]", ["a100-40gb", "llama-3.3-70b", "must fit"]),
    ("capacity.loads=[0]", ["capacity.loads=[0.0]", "above 0"]),
    ("capacity.attainment=2", ["capacity.attainment=2.0", "at most 1"]),
    ("capacity.by=p42", ["capacity.by='p42'", "p95"]),
    ("capacity.by={ttft_s:p95}", ["capacity.by", "ttft_s, tpot_s"]),
    ("capacity.by=p95 capacity.attainment=0.9", ["capacity.attainment='0.9'", "does nothing here"]),
    ("trace=true", ["does nothing here", "capacity plan"]),
    ("capacity.most_replicas=0", ["capacity.most_replicas=0", "from 1"]),
    ("capacity.search=random", ["capacity.search='random'", "bisection"]),
    ("models=[smollm2-360m] capacity.cards=[4xh100]", ["capacity.cards='4 cards'", "that divide n_heads"]),
    ("hardware=l40s", ["hardware='l40s'", "capacity.cards"]),
    ("server.replicas=2", ["server.replicas='2'", "finds their number"]),
    ("workload.n_requests=9", ["workload.n_requests='9'", "capacity.seconds=null"]),
    ("workload.arrivals.kind=all_at_once", ["workload.arrivals.kind='all_at_once'", "poisson"]),
    ("seeds=auto", ["seeds='auto'", "capacity"]),
    ("mode=live", ["mode='live'", "simulation"]),
    ("cost.usd_per_card_hour={h100-80gb:2}", ["cost.usd_per_card_hour", "a100-40gb, h100-80gb"]),
    ("baseline=full_depth", ["baseline='full_depth'", "capacity.cards"]),
    ("exits.source=none ~arms.full_depth", ["arms", "policy=full_depth"]),
]


@pytest.mark.parametrize(("words", "parts"), MISTAKES)
def test_a_mistake_is_one_message(command, tmp_path, words: str, parts: list[str]) -> None:
    said = command("+experiment=capacity", *words.split(" "))
    assert said.status == 1
    assert said.out == ""
    assert all(part in said.err for part in parts), said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


def test_a_plan_is_asked_for_by_its_experiment(command) -> None:
    said = command("capacity.loads=[2]")
    assert said.status == 1
    assert "+experiment=capacity" in said.err


def test_requests_that_are_the_same_under_every_seed_are_told(tmp_path) -> None:
    rows = "".join(f"{n * 0.05:.2f},{100 + n % 7},{20 + n % 5}\n" for n in range(60))
    (tmp_path / "rows.csv").write_text(f"arrived_at,num_prefill_tokens,num_decode_tokens\n{rows}")
    trace = str(tmp_path / "rows.csv")
    settings = {
        "workload.arrivals.kind": "trace", "workload.arrivals.trace": trace, "workload.lengths.kind": "trace",
        "workload.lengths.trace": trace, "workload.n_requests": 60,
    }  # fmt: skip
    result = capacity(with_settings(example(jobs=1, seeds=[0], capacity={"cards": ["h100-80gb"]}), settings))
    assert any("those of the trace under every seed" in warning for warning in result.warnings)
    assert not any("One seed" in warning for warning in result.warnings)


def test_lengths_of_a_trace_must_last_for_every_load() -> None:
    config = with_settings(example(), {"workload.lengths.kind": "trace", "workload.lengths.trace": "rows.csv"})
    with pytest.raises(UserError, match="resample"):
        plan_capacity(config)
