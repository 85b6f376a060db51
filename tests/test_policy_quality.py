"""Floors in bits per character that follow the text, and the objective of quality: by hand and as properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from helios_sim.errors import UserError
from helios_sim.exits.rule import FixedCap
from helios_sim.policy.deployment import Completed, Placement, Probed
from helios_sim.policy.helios import HeliosPolicy
from helios_sim.policy.helios_parameters import Evaluation, HeliosParameters
from helios_sim.policy.options import bits_floor
from helios_sim.policy.static_cap import StaticCapParameters, StaticCapPolicy
from helios_sim.policy.telemetry import Goal, Objective, Observation, Situation
from policy_example import observed, seen, situation, small


def here(**floors: object) -> Situation:
    """`small` has 1.1 bits per character whole and 1.2 at its exit, `large` 0.9 and 1.0, twice as slow a layer."""
    found = situation(epsilon=1.0)
    return replace(found, objective=replace(found.objective, **floors))


def scored(model: str, bits_per_token: float, tokens: int = 1000) -> Observation:
    """One character a token; each exit of the model agrees and costs the same."""
    seen_at = observed(model, {2: 0.0, (4 if model == "small" else 8): 0.0}, tokens=tokens)
    return replace(seen_at, bits=seen_at.agrees.astype("float32") * bits_per_token)


def static(of: Situation) -> Placement:
    return StaticCapPolicy(StaticCapParameters(0.7)).start(of).active


def test_without_a_floor_the_fastest_serves_and_with_one_the_fastest_within_it() -> None:
    assert static(here()) == Placement("small", 2)
    assert static(here(max_bits_ratio=1.0)) == Placement("large", 8)
    assert static(here(max_bits_ratio=1.12)) == Placement("large", 2)  # 1.0 is within 1.12 x 0.9
    assert static(here(max_bits_ratio=1.23)) == Placement("small", 4)  # 1.1 is within 1.23 x 0.9, 1.2 is not
    assert static(here(max_bits_ratio=1.0, bits_reference="small")) == Placement("small", 4)
    assert static(here(max_bits_ratio=1.0, bits_reference="large")) == Placement("large", 8)


def test_quality_takes_the_fewest_bits_of_what_answers_in_time() -> None:
    """A token takes 2 ms a layer with `large`, so 8 layers and 21 tokens are 0.336 s, and 2 layers a quarter."""
    assert static(here(goal=Goal.QUALITY, max_disagreement=0.0)) == Placement("large", 8)
    assert static(here(goal=Goal.QUALITY, max_disagreement=0.0, max_response_time_s=0.3)) == Placement("small", 4)
    assert static(here(goal=Goal.QUALITY, max_response_time_s=0.001)) == Placement("small", 2)  # none is: the quickest


def test_quality_needs_to_know_bits() -> None:
    unknown = replace(small(), offline=replace(small().offline, bits_per_char=None))
    blind = situation(unknown, goal=Goal.QUALITY)
    with pytest.raises(UserError, match=r"objective\.goal='quality'.*small"):
        static(blind)


def test_a_reference_nobody_knows_does_not_bind() -> None:
    objective = Objective(Goal.THROUGHPUT, 0.05, max_bits_ratio=1.0)
    assert bits_floor(objective, {"a": None, "b": None}) is None
    assert bits_floor(replace(objective, bits_reference="a"), {"a": None, "b": 1.0}) is None
    assert bits_floor(objective, {"a": None, "b": 1.0}) == 1.0
    assert bits_floor(replace(objective, max_bits_per_char=0.8), {"a": 0.9, "b": 1.0}) == 0.8


@given(
    bits=st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 9.0), min_size=1),
    ratio=st.floats(1.0, 3.0),
    scale=st.floats(0.1, 10.0),
)
def test_some_candidate_is_always_within_a_floor_that_follows_the_best_whatever_the_text(bits, ratio, scale) -> None:
    objective = Objective(Goal.THROUGHPUT, 0.05, max_bits_ratio=ratio)
    floor = bits_floor(objective, bits)
    harder = bits_floor(objective, {model: scale * value for model, value in bits.items()})
    assert min(bits.values()) <= floor
    assert harder == pytest.approx(scale * floor)


def test_helios_follows_the_text_to_the_better_model_and_back() -> None:
    """Beforehand only `large` is within 5 % of the best; then both are, then `large` alone again, and at last both.

    While `small` is above the floor it is still evaluated: otherwise nobody would find out that it may come back.
    """
    policy = HeliosPolicy(HeliosParameters(0.7, evaluation=Evaluation.PROBE, half_life_requests=1.0))

    def after(completed: int, small_bits: float, large_bits: float) -> Placement:
        asked = policy.decide(Completed(150), seen(completed))
        assert asked is not None
        assert asked.probe is not None
        assert set(asked.probe.models) == {"small", "large"}
        chosen = policy.decide(Probed(), seen(completed, [scored("small", small_bits), scored("large", large_bits)]))
        assert chosen is not None
        assert chosen.exit_rule == FixedCap(0.7)
        return chosen.active

    assert policy.start(here(max_bits_ratio=1.05)).active.model == "large"
    assert after(150, 1.0, 1.0).model == "small"  # as good, and faster
    assert after(300, 1.0, 0.5).model == "large"
    assert after(450, 1.0, 0.5).model == "large"
    assert after(600, 1.0, 0.98).model == "small"
