"""HELIOS's constants: as published, and scaled with the batch that was seen."""

from __future__ import annotations

import pytest

from helios_sim.policy.deployment import BreachLimit, Completed, Drained
from helios_sim.policy.helios_parameters import BreachAction, Constants, Evaluation, HeliosParameters
from helios_sim.policy.telemetry import ExpectedLoad
from policy_example import helios, seen, situation


def test_the_published_constants() -> None:
    p = HeliosParameters(0.7)
    assert (p.shortlist, p.prompts_per_candidate, p.evaluated_tokens) == (3, 5, 20)
    at = p.at_batch(300.0)
    assert (at.round_requests, at.window_tokens, at.limit, at.cooldown_s) == (150, 100, 50, 0.0)


@pytest.mark.parametrize(
    ("batch", "expected"), [(0.3, (150, 100, 50)), (12.4, (150, 1200, 600)), (300, (3000, 30_000, 15_000))]
)
def test_scaled_constants_follow_the_batch(batch: float, expected: tuple) -> None:
    at = HeliosParameters(0.7, constants=Constants.BATCH_SCALED).at_batch(batch)
    assert (at.round_requests, at.window_tokens, at.limit) == expected
    assert at.cooldown_s == 5.0


def test_scaled_constants_use_the_batch_that_was_seen() -> None:
    policy = helios(evaluation=Evaluation.OFF, constants=Constants.BATCH_SCALED)
    first = policy.start(situation(expected=ExpectedLoad(10.0, 21.0, closed_loop_users=4)))
    assert first.triggers == (BreachLimit(400, 200), Completed(150))
    later = policy.decide(Completed(150), seen(150, batch=40.0))
    assert later is not None
    assert later.triggers == (BreachLimit(4000, 2000), Completed(400))


def test_scaled_constants_leave_out_the_small_batches_of_a_round() -> None:
    """A round of 5 prompts runs a batch of 5 or fewer, whatever the server will run afterwards."""
    policy = helios(constants=Constants.BATCH_SCALED)
    policy.start(situation(expected=ExpectedLoad(10.0, 21.0, closed_loop_users=40), max_running_requests=40))
    policy.decide(Drained(), seen(5, batch=3.0))
    first = policy.decide(Drained(), seen(10, batch=3.0))
    assert first is not None
    assert first.triggers == (BreachLimit(4000, 2000), Completed(400))
    policy.decide(Completed(400), seen(410, batch=30.0))
    policy.decide(Drained(), seen(440, batch=20.0))  # as the batch drained
    policy.decide(Drained(), seen(445, batch=3.0))
    second = policy.decide(Drained(), seen(450, batch=3.0))
    assert second is not None
    assert second.triggers == (BreachLimit(3000, 1500), Completed(300))


def test_the_log_of_a_breach_names_the_limit_that_was_exceeded() -> None:
    policy = helios(evaluation=Evaluation.OFF, constants=Constants.BATCH_SCALED, on_breach=BreachAction.LOAD_ONLY)
    policy.start(situation())
    raised = policy.decide(BreachLimit(300, 150), seen(50, now_s=1.0, running=2, batch=7.0))
    assert raised is not None
    assert raised.reason.startswith("more than 150 of 300 tokens")
