"""What settings become: runtimes, objectives and each arm's own exit rule, without running a study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helios_sim import simulate, study_config
from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.exits.store import write_trace
from helios_sim.policy.early_exit import EarlyExitParameters
from helios_sim.policy.telemetry import Goal
from helios_sim.profile.spec import RuntimeConfig
from helios_sim.profile.store import read_profile, write_profile
from helios_sim.provenance import ProvenanceClass
from helios_sim.study.assemble import assemble
from helios_sim.study.build import build
from helios_sim.study.command import run, run_study
from helios_sim.study.fleet import build_fleet
from helios_sim.study.jobs import run_job
from helios_sim.study.plan import check_study, plan_study
from helios_sim.study.schema import (
    ArrivalsConfig,
    ClusterConfig,
    Config,
    ExitsConfig,
    LengthConfig,
    LengthsConfig,
    MixConfig,
    ObjectiveConfig,
    WorkloadConfig,
)
from helios_sim.study.seeds import Settled
from helios_sim.workload import generate
from priced import priced_profile

NO_EXIT = "no model has an exit before its last layer, so all tokens run all layers here"
EXITS = {"small": (2, 4), "large": (4, 8)}


def measured(folder: Path, *, classifier: bool = True, bits: bool = True) -> Config:
    """A study of two models from files like those that a calibration writes."""
    for seed, (name, exits) in enumerate(EXITS.items()):
        profile = priced_profile(
            name, n_layers=exits[-1], layer_s=1e-3, head_s=2e-3, host_s=1e-3, sync_s=1e-4,
            classifier_s=1e-4 if classifier else None, chars_per_token=4.0,
        )  # fmt: skip
        hardware = replace(profile.hardware, name="box")
        write_profile(replace(profile, hardware=hardware), folder / "profiles" / f"{name}@box")
        trace = synthetic_trace(name, exits, ("prose", "code"), tokens=400, seed=seed)
        write_trace(trace if bits else replace(trace, bits=None), folder / "exits" / name)
    return Config(
        hardware="box",
        models=list(EXITS),
        profile_folder=str(folder / "profiles"),
        runtime=RuntimeConfig(preset="profile"),
        exits=ExitsConfig(source=str(folder / "exits" / "{model}")),
        workload=WorkloadConfig(
            n_requests=24,
            chars_per_token=None,
            arrivals=ArrivalsConfig("all_at_once"),
            lengths=LengthsConfig(prompt=LengthConfig(value=80), output=LengthConfig(value=40)),
            mix=MixConfig({"prose": 0.5, "code": 0.5}),
        ),
        arms={"full": {"policy": "full_depth", "model": "small"}},
    )


def test_host_costs_may_be_those_of_the_profile(tmp_path: Path) -> None:
    config = measured(tmp_path)
    assert build(config, 0).models["small"].profile.runtime.sync_s == 1e-4
    assert (
        build(replace(config, runtime=RuntimeConfig("profile", sync_s=0.5)), 0).models["small"].profile.runtime.sync_s
        == 0.5
    )
    assert build(replace(config, runtime=RuntimeConfig("eager")), 0).models["small"].profile.runtime.sync_s == 20e-6


def test_an_arms_own_rule_is_what_policies_are_told_of_the_exits_too(tmp_path: Path) -> None:
    """Otherwise it would predict by one rule and serve by another."""
    arms = {
        "head": {"policy": "early_exit", "model": "small"},
        "classifier": {"policy": "early_exit", "model": "small", "confidence": "classifier", "threshold": 0.6},
    }
    config = replace(measured(tmp_path), arms=arms)
    plan = plan_study(config)
    head, classifier = (plan.headline.jobs[arm][0] for arm in arms)
    assert head.config.exits == config.exits
    assert (classifier.config.exits.threshold, classifier.config.exits.confidence) == (0.6, "classifier")
    offline = build(classifier.config, 0).situation.candidates["small"].offline
    trace = synthetic_trace("small", EXITS["small"], ("prose", "code"), tokens=400, seed=0)
    assert offline.confident_share == pytest.approx((trace.recorded(Confidence.CLASSIFIER) >= 0.6).mean(axis=0))
    assert offline.confidence is Confidence.CLASSIFIER
    deployed = classifier.arm.policy.make().start(build(classifier.config, 0).situation)
    assert deployed.exit_rule == PerToken(0.6, Confidence.CLASSIFIER)
    check_study(plan)


def test_a_classifier_without_a_measured_cost_is_refused_before_anything_runs(tmp_path: Path) -> None:
    arms = {"classifier": {"policy": "early_exit", "model": "small", "confidence": "classifier"}}
    config = replace(measured(tmp_path, classifier=False), arms=arms)
    with pytest.raises(UserError, match=r"small@box has no cost of a check on the hidden state"):
        check_study(plan_study(config))


def test_prompts_count_in_tokens_as_long_as_a_measured_trace_found_them(tmp_path: Path) -> None:
    """Otherwise models whose tokenizers differ would be given prompts of the wrong lengths."""
    config = measured(tmp_path)
    made = synthetic_trace("small", EXITS["small"], ("prose", "code"), tokens=400, chars_per_token=5)
    for provenance_class, expected in ((ProvenanceClass.MEASURED, 5.0), (ProvenanceClass.PUBLISHED, 4.0)):
        provenance = replace(made.provenance, provenance_class=provenance_class)
        write_trace(replace(made, provenance=provenance), tmp_path / "exits" / "small")
        parts = build(config, 0)
        assert parts.models["small"].profile.model.chars_per_token == expected
        assert parts.situation.candidates["small"].profile.model.chars_per_token == expected


def test_floors_in_bits_need_traces_that_have_them(tmp_path: Path) -> None:
    config = measured(tmp_path)
    floors = ObjectiveConfig("quality", 0.1, max_bits_ratio=1.1, bits_reference="large", max_response_time_s=2.0)
    objective = build(replace(config, objective=floors), 0).situation.objective
    assert (objective.goal, objective.max_bits_ratio, objective.bits_reference) == (Goal.QUALITY, 1.1, "large")
    assert objective.max_response_time_s == 2.0
    with pytest.raises(UserError, match=r"objective\.bits_reference='huge'.*one of small, large"):
        build(replace(config, objective=ObjectiveConfig(bits_reference="huge")), 0)
    blind = measured(tmp_path / "blind", bits=False)
    for key, changed in (("goal", {"goal": "quality"}), ("max_bits_ratio", {"max_bits_ratio": 1.0})):
        with pytest.raises(UserError, match=rf"objective\.{key}=.*which small, large lacks"):
            build(replace(blind, objective=ObjectiveConfig(**changed)), 0)


@pytest.mark.slow
def test_every_arm_says_what_the_text_cost_it_in_all_and_by_task(tmp_path: Path) -> None:
    arms = {name: {"policy": "full_depth", "model": name} for name in EXITS}
    result = run(replace(measured(tmp_path), arms=arms))
    for seed, name in enumerate(EXITS):
        trace = synthetic_trace(name, EXITS[name], ("prose", "code"), tokens=400, seed=seed)
        records = result.arms[name].replicates[0].records
        by_task = result.by_task(name)
        assert list(by_task) == ["prose", "code"]
        bits = 0.0
        for task in (0, 1):  # 40 characters are exactly ten tokens, wherever they begin in a text of whole ones
            rows = records.task == task
            share = by_task[("prose", "code")[task]].bits_per_char
            assert share == pytest.approx(records.part(rows).bits_per_char())
            bits += share * int(records.output_chars[rows].sum())
        assert result.arms[name].metrics["bits_per_char"] == pytest.approx(bits / (24 * 40))
        assert 0.5 < result.arms[name].metrics["bits_per_char"] / (trace.bits[:, -1].mean() / 4) < 2
    speed, bits_of = (
        {name: result.arms[name].metrics[metric] for name in EXITS}
        for metric in ("throughput_requests_per_s", "bits_per_char")
    )
    assert speed["small"] > speed["large"]
    told = next(sentence for sentence in result.verdict if sentence.startswith("Unbeaten"))
    assert "small (" in told
    assert ("large (" in told) == (bits_of["large"] < bits_of["small"])
    without = run(replace(measured(tmp_path / "blind", bits=False), arms=arms))
    assert without.arms["small"].metrics["bits_per_char"] is None
    assert not any(sentence.startswith("Unbeaten") for sentence in without.verdict)


def test_what_an_arm_aims_at_is_no_other_condition_but_its_load_is(tmp_path: Path) -> None:
    arms = {
        "full": {"policy": "full_depth", "model": "small"},
        "aims": {"policy": "full_depth", "model": "large", "overrides": {"objective.goal": "quality"}},
        "alone": {"policy": "full_depth", "model": "large", "overrides": {"workload.chars_per_token": 1.0}},
    }
    config = replace(measured(tmp_path), arms=arms, subject="full", headline_metrics=["bits_per_char"])

    plan = plan_study(config)
    result = assemble(Settled(plan, {job.key: run_job(job) for job in plan.jobs}), {})
    best = next(sentence for sentence in result.verdict if sentence.startswith("Best of the arms"))
    fewest = min(("full", "aims"), key=lambda arm: result.arms[arm].metrics["bits_per_char"])
    assert f"Bits/char: {fewest} with" in best


@pytest.mark.parametrize("threshold", [90, -0.1, float("nan"), 1.01])
def test_a_threshold_that_is_no_share_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match=r"exits.threshold=.*from 0 to 1"):
        ExitsConfig(threshold=threshold)


@pytest.mark.parametrize(("threshold", "fits"), [(0.0, True), (1.0, True), (1.5, True), (90.0, False), (-1.0, False)])
def test_a_policys_threshold_may_let_no_token_leave(threshold: float, fits: bool) -> None:
    if fits:
        assert EarlyExitParameters(threshold).threshold == threshold
    else:
        with pytest.raises(UserError, match=r"policy.threshold.*neither per cent"):
            EarlyExitParameters(threshold)


def traced(folder: Path, **settings: Any) -> Config:
    """Both models, without exits, under a trace of five requests."""
    row = '{"timestamp": %d, "prompt_tokens": 1000, "output_tokens": 100, "hash_ids": [1]}\n'
    (folder / "t.jsonl").write_text("".join(row % i for i in range(5)))
    config, file = measured(folder), str(folder / "t.jsonl")
    workload = WorkloadConfig(
        arrivals=ArrivalsConfig("trace", trace=file, time_unit="s"), lengths=LengthsConfig("trace", trace=file),
        mix=MixConfig({"prose": 1.0}), **settings,
    )  # fmt: skip
    return replace(config, exits=ExitsConfig("none", 0.9), workload=workload)


def test_a_trace_counts_tokens_of_the_model_served_unless_a_number_says_otherwise(tmp_path: Path) -> None:
    parts = build(traced(tmp_path), 0)
    (block,) = generate(parts.workload, 0)
    assert parts.workload.chars_per_token == 4.0 == parts.models["small"].profile.model.chars_per_token
    assert parts.models["small"].profile.model.tokens_of_many(block.prompt_chars).tolist() == [1000] * 5
    assert parts.models["small"].profile.model.tokens_of_many(block.output_chars).tolist() == [100] * 5
    assert block.arrival_ns.tolist() == [i * 10**9 for i in range(5)]
    told = build(traced(tmp_path, chars_per_token=3), 0)
    assert [b.prompt_chars.tolist() for b in generate(told.workload, 0)] == [[3000] * 5]
    with pytest.raises(UserError, match=r"chars_per_token='tokens'.*a number, null or model"):
        build(traced(tmp_path, chars_per_token="tokens"), 0)


def test_kinds_of_replicas_get_the_same_requests(tmp_path: Path) -> None:
    folder = tmp_path / "profiles" / "large@box"
    config = traced(tmp_path)
    profile = read_profile(folder)
    write_profile(replace(profile, model=replace(profile.model, chars_per_token=2.0)), folder)
    kinds = {"a": {"models": ["small"], "policy": "full_depth"}, "b": {"models": ["large"], "policy": "full_depth"}}
    fleet = build_fleet(replace(config, cluster=ClusterConfig(kinds=kinds)), 0)
    assert [kind.parts.workload.chars_per_token for kind in fleet.kinds] == [4.0, 4.0]


@pytest.mark.slow
def test_what_a_trace_holds_and_is_not_read_is_said_on_the_terminal(tmp_path: Path, capsys) -> None:
    run_study(traced(tmp_path), tmp_path / "out")
    assert "t.jsonl: column hash_ids is not read: prefixes" in capsys.readouterr().out.replace("\n", " ")


def test_exits_of_another_depth_than_the_profile_are_refused(tmp_path: Path) -> None:
    config = measured(tmp_path)
    write_trace(synthetic_trace("small", (2, 4, 8), ("prose", "code"), tokens=400), tmp_path / "exits" / "small")
    with pytest.raises(UserError, match="end at layer 8, its last is 4"):
        build(config, 0)


def test_a_load_takes_its_fixed_part_and_its_bytes_at_the_rate_that_is_set() -> None:
    """vLLM 0.11 wakes models of 1.19 and 8.30 GB in 0.26 and 0.82 s on an A100."""
    said = ("runtime.load_fixed_s=0.17", "runtime.load_gb_per_s=12.7")
    profile = build(study_config("quickstart", *said), 0).models["opt-1.3b"].profile
    assert [round(profile.load_time_s(round(n * 1e9)), 2) for n in (1.19, 8.30)] == [0.26, 0.82]
    before = build(study_config("quickstart"), 0).models["opt-1.3b"].profile
    share, known = (1 - 1 / p.load_slowdown for p in (profile, before))
    assert share / known == pytest.approx(profile.load_bytes_per_s / before.load_bytes_per_s)
    assert "load_bytes_per_s" in {a.name for a in before.provenance.assumptions}
    assert "load_bytes_per_s" not in {a.name for a in profile.provenance.assumptions}
    with pytest.raises(UserError, match=r"runtime\.load_gb_per_s"):
        build(study_config("quickstart", "runtime.load_gb_per_s=50000"), 0)


def test_a_run_waits_for_the_fixed_part_of_each_load() -> None:
    words = ("workload.n_requests=120", "profile_band=none", "next_best=none", "runtime.load_gb_per_s=1000")
    slow, quick = (
        simulate("quickstart", *words, f"runtime.load_fixed_s={fixed_s}").arms["helios"].metrics for fixed_s in (0.5, 0)
    )
    assert slow["loads"] == quick["loads"] == 2
    assert slow["load_time_s"] - quick["load_time_s"] == pytest.approx(1.0, rel=0.1)


def test_early_exits_that_find_no_exit_are_told() -> None:
    words = ("models=[opt-1.3b]", "exits.source=none", "workload.n_requests=3", "profile_band=none")
    arms = ("+arms.early={policy: early_exit}", "+arms.full={policy: full_depth}", "policy=none")
    config = study_config("own", *words, *arms)
    found = {name: run_job(jobs[0]).notices for name, jobs in plan_study(config).headline.jobs.items()}
    assert found == {"early": (f"arms.early: {NO_EXIT}",), "full": ()}
