"""Promises of exits: the bound, the split, what is chosen by it, and what a study says of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from command_line import CommandLine
from helios_sim import UserError, study_config
from helios_sim.exits.guarantee import NO_TOKEN, Promise, certify, p_value, split
from helios_sim.exits.rule import Confidence
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.assess import Assessor
from helios_sim.provenance import Provenance, ProvenanceClass
from helios_sim.report.result import KeptPromise
from helios_sim.study.build import build
from helios_sim.study.promise import told

HEAD = Confidence.MAX_PROBABILITY
MADE = Provenance(ProvenanceClass.DERIVED, "drawn for a test", "test")


def drawn(rng: np.random.Generator, prompts: int, tokens: int = 40, tasks: int = 2) -> ExitTrace:
    """Exits at 4, 8 and 12 layers; texts differ in how often an exit is wrong, and sure exits are wrong less often."""
    n = prompts * tokens
    of_text = np.repeat(rng.beta(1.0, 3.0, prompts), tokens)
    sure = rng.random((n, 2))
    wrong = rng.random((n, 2)) < (1 - sure) * of_text[:, None] * np.array([1.0, 0.6])
    return ExitTrace(
        model="m", exits=(4, 8, 12), tasks=tuple(f"task{k}" for k in range(tasks)),
        task=np.repeat(np.arange(prompts) * tasks // prompts, tokens).astype(np.int32),
        prompt=np.repeat(np.arange(prompts), tokens).astype(np.int32), chars=np.full(n, 4, np.int32),
        agree=np.column_stack([~wrong, np.ones(n, bool)]), provenance=MADE,
        confidences={HEAD: np.column_stack([sure, np.ones(n)]).astype(np.float32)},
    )  # fmt: skip


def risk(trace: ExitTrace, threshold: float) -> float:
    """Of the mean prompt, with tokens that leave at the first confident exit: token by token."""
    losses = []
    for prompt in np.unique(trace.prompt):
        rows = np.flatnonzero(trace.prompt == prompt)
        changed = 0
        for row in rows:
            sure = trace.confidences[HEAD][row] >= np.float32(threshold)
            changed += not trace.agree[row, int(sure.argmax()) if sure.any() else 2]
        losses.append(changed / len(rows))
    return float(np.mean(losses))


def test_without_losses_the_bound_is_that_of_the_stakes() -> None:
    n, limit = 50, 0.1
    capital = np.mean([(1 + share / (1 - limit) * limit) ** n for share in (0.95, 0.75, 0.5, 0.25)])
    assert p_value(np.zeros(n), np.ones(n), limit) == pytest.approx(1 / capital)
    assert (1 - limit) ** n < 1 / capital < 6 * (1 - limit) ** n  # the exact one of a yes or no


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 0.9))
def test_more_losses_never_make_it_surer(losses: list[float], limit: float) -> None:
    some, more = np.array(losses), np.minimum(1.0, np.array(losses) + 0.1)
    weights = np.ones(len(some))
    assert 0 < p_value(some, weights, limit) <= p_value(more, weights, limit) <= 1
    if some.mean() >= limit:
        assert p_value(some, weights, limit) == 1.0


def test_it_says_too_little_no_more_often_than_it_may() -> None:
    """Risks right at the limit, of two kinds of prompts with weights: refuted in at most 5 of 100 draws."""
    rng, limit = np.random.default_rng(0), 0.1
    weights = np.repeat([1.5, 0.5], 40)
    means = np.repeat([0.05, 0.25], 40)  # (1.5 x 0.05 + 0.5 x 0.25) / 2 = 0.1
    losses = [(rng.random(80) < means) * 1.0 for _ in range(2000)]
    assert np.mean([p_value(one, weights, limit) <= 0.05 for one in losses]) <= 0.05
    losses = [rng.beta(20 * means, 20 * (1 - means)) for _ in range(2000)]
    assert np.mean([p_value(one, weights, limit) <= 0.05 for one in losses]) <= 0.05


def test_a_promise_is_kept_in_95_of_100_resamples() -> None:
    """Calibrated on 150 prompts of 1,500; the risk of all is known, for the threshold and for every cap."""
    rng = np.random.default_rng(1)
    population, promise = drawn(rng, 1500, tokens=12, tasks=1), Promise(0.08, 0.05)
    known: dict[float, float] = {NO_TOKEN: 0.0}
    caps = [float((~population.agree[:, e]).mean()) for e in range(3)]
    broken, bold = 0, 0
    for seed in range(100):
        apart, _ = split(population, 0.1, seed)
        found = certify(apart, HEAD, promise, [{"task0": 1.0}])
        if found.threshold not in known:
            known[found.threshold] = risk(population, found.threshold)
        of_caps = [r for cut, r in zip(found.caps, caps, strict=True) if cut]
        broken += max(known[found.threshold], *of_caps, 0.0) > 0.08
        bold += found.threshold < 1.0
    assert broken <= 5
    assert bold >= 95  # and yet tokens leave


def test_parts_share_no_prompt_and_models_are_cut_alike() -> None:
    trace, other = drawn(np.random.default_rng(2), 41), drawn(np.random.default_rng(3), 41, tokens=9)
    apart, served = split(trace, 0.5, seed=7)
    assert set(apart.prompt) | set(served.prompt) == set(trace.prompt)
    assert not set(apart.prompt) & set(served.prompt)
    for k in range(2):
        counts = [len(np.unique(part.prompt[part.task == k])) for part in (apart, served)]
        assert abs(counts[0] - counts[1]) <= 1
    assert set(split(other, 0.5, seed=7)[0].prompt) == set(apart.prompt)
    assert set(split(trace, 0.5, seed=8)[0].prompt) != set(apart.prompt)
    drafted = np.random.default_rng(5).random(trace.n_tokens) < 0.5
    parts = split(replace(trace, drafters={"small": drafted}), 0.5, seed=7)
    assert sum(int(part.drafted_by("small").sum()) for part in parts) == int(drafted.sum())
    with pytest.raises(UserError, match="at least 2 prompts of each task"):
        split(drawn(np.random.default_rng(4), 3), 0.5, seed=0)


def test_a_task_that_no_request_has_does_not_count() -> None:
    trace = drawn(np.random.default_rng(5), 60)
    agree = trace.agree.copy()
    agree[trace.task == 1, :2] = False  # all wrong there
    spoiled = ExitTrace(**{name: getattr(trace, name) for name in (
        "model", "exits", "tasks", "task", "prompt", "chars", "provenance", "confidences")}, agree=agree)  # fmt: skip
    found = [certify(spoiled, HEAD, Promise(0.3, 0.1), mixes) for mixes in (
        [{"task0": 1.0}], [{"task0": 0.5, "task1": 0.5}], [{"task1": 1.0}], [{"task0": 1.0}, {"task1": 1.0}],
    )]  # fmt: skip
    assert found[0].threshold < found[1].threshold < found[2].threshold
    assert [one.prompts for one in found] == [30, 60, 30, 30]
    assert found[3] == found[2]  # where the mix drifts, what is promised holds at both ends


WORDS = ("exits.guarantee.max_disagreement=0.2", "workload.n_requests=60", "sweeps=[]", "figures=[]", "seeds=[0]")


def test_policies_know_the_prompts_apart_and_requests_are_the_others() -> None:
    parts = build(study_config("guarantee", *WORDS), 0)
    recorded, served = parts.recorded["smollm2-135m"], parts.models["smollm2-135m"].trace.trace
    assert not set(recorded.prompt) & set(served.prompt)
    candidate = parts.situation.candidates["smollm2-135m"]
    assert candidate.offline.prompt_tokens.sum() == recorded.n_tokens
    assert candidate.offline.certified_caps == (False, False, False, True)
    assert Assessor(parts.situation, half_life_requests=1.0).cap("smollm2-135m").layers == 30


def test_the_cap_rule_cuts_nowhere_but_where_the_promise_is_kept() -> None:
    """The objective would allow any cut."""
    situation = build(study_config("guarantee", *WORDS, "objective.max_disagreement=1"), 0).situation
    assert Assessor(situation, half_life_requests=1.0).cap("smollm2-135m").layers == 30
    bold = build(study_config("guarantee", *WORDS, "objective.max_disagreement=1",
                              "exits.guarantee.max_disagreement=0.6"), 0).situation  # fmt: skip
    certified = bold.candidates["smollm2-135m"].offline.certified_caps
    assert certified == (False, False, True, True)
    assert Assessor(bold, half_life_requests=1.0).cap("smollm2-135m").layers == 24


def promise(held: float | None, bounds: tuple[float, float] | None) -> KeptPromise:
    return KeptPromise("cap", 0.2, 0.95, 50, 0.9, held, bounds)


def test_a_promise_is_broken_only_where_the_noise_does_not_explain_it() -> None:
    assert promise(0.1, (0.05, 0.3)).kept is True
    assert promise(0.3, (0.25, 0.35)).kept is False
    assert promise(0.3, (0.15, 0.45)).kept is None
    assert promise(0.3, None).kept is None
    assert promise(None, None).kept is None
    (said,) = told([promise(0.3, (0.25, 0.35))])
    assert said.endswith("On the others cap 30 % [25.0, 35.0]: broken by cap.")
    (said,) = told([promise(0.3, (0.15, 0.45))])
    assert said.endswith("open for cap.")


@pytest.mark.slow
def test_a_study_says_what_was_promised_and_whether_it_was_kept(command: CommandLine) -> None:
    short = ("+experiment=guarantee", "sweeps=[]", "figures=[]", "seeds=[0]", "pictures=false", "profile_band=none")
    said = command(*short, "workload.n_requests=60", "+arms.own={policy: static_cap, cap_layers: 24}")
    assert said.status == 0, said.err
    rows = {row["arm"]: row for row in said.summary["confidence"]["promises"]}
    assert set(rows) == {"full_depth", "early_exit", "classifier", "static_cap", "helios"}  # not one of its own
    for name in ("early_exit", "classifier"):
        held = 1 - said.summary["arms"][name]["metrics"]["agreement"]
        assert rows[name]["held_out"] == pytest.approx(held)
        assert 0 < held <= rows[name]["max_disagreement"] == 0.1
        assert rows[name]["kept"] is True
    assert rows["full_depth"]["held_out"] == 0
    assert any("Promised with 95 %: at most 10 % of the tokens change" in line for line in said.summary["verdict"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("exits.threshold=0.9",), "exits.threshold=0.9"),
        (("exits.guarantee.max_disagreement=5",), "between 0 and 1"),
        (("exits.guarantee.failure=0",), "exits.guarantee.failure"),
    ],
)
def test_mistakes(command: CommandLine, words: tuple[str, ...], named: str) -> None:
    said = command("+experiment=guarantee", *words)
    assert said.status == 1
    assert named in said.err


def test_a_task_that_was_not_recorded_is_named(command: CommandLine) -> None:
    said = command("+experiment=guarantee", "+workload.mix.tasks.poetry=1")
    assert said.status == 1
    assert "workload.mix.tasks='poetry'" in said.err


def test_published_exits_have_one_threshold(command: CommandLine) -> None:
    said = command("+experiment=quickstart", "exits.guarantee.max_disagreement=0.001")
    assert said.status == 1
    assert "the only one that is published" in said.err
