"""What is asked of the server, in characters and requests. Knows no model's cost."""

from __future__ import annotations

from dataclasses import dataclass

from helios_sim.policy.telemetry import Candidate, Situation, Telemetry


@dataclass(frozen=True, slots=True)
class Load:
    """Mean lengths, and one of three regimes: open arrivals at a rate, a closed loop of users, or a full queue."""

    prompt_chars: float
    output_chars: float
    arrival_rate_per_s: float | None = None
    users: int | None = None
    queued_requests: int = 0  # waiting now; counts under open arrivals

    def prompt_tokens(self, candidate: Candidate) -> float:
        """Mean prompt length in the candidate's tokens, at least 1."""
        return max(1.0, self.prompt_chars / candidate.profile.model.chars_per_token)

    def output_tokens(self, candidate: Candidate) -> float:
        """Mean answer length in the candidate's tokens, at least 1: the trace that replays answers counts them."""
        return max(1.0, self.output_chars / candidate.offline.chars_per_token)


def expected_load(situation: Situation) -> Load:
    """Before anything was seen: what the operator expects.

    Without an expectation, prompts and answers are as long as the recorded prompts' answers are on average, and the
    queue is full: lengths then matter only in so far as they rank candidates.
    """
    expected = situation.expected
    if expected is None:
        offline = next(iter(situation.candidates.values())).offline
        chars = float(offline.prompt_tokens.mean()) * offline.chars_per_token
        return Load(chars, chars)
    return Load(expected.prompt_chars, expected.output_chars, expected.arrival_rate_per_s, expected.closed_loop_users)


def seen_load(situation: Situation, telemetry: Telemetry, active_model: str) -> Load:
    """From telemetry; what it has not seen yet is as expected."""
    expected = expected_load(situation)
    active = situation.candidates[active_model]
    prompt, output = telemetry.prompt_tokens_mean, telemetry.output_tokens_mean
    rate = telemetry.arrival_rate_per_s
    return Load(
        prompt_chars=expected.prompt_chars if prompt is None else prompt * active.profile.model.chars_per_token,
        output_chars=expected.output_chars if output is None else output * active.offline.chars_per_token,
        arrival_rate_per_s=None if expected.users is not None else rate or expected.arrival_rate_per_s,
        users=expected.users,
        queued_requests=telemetry.queued_requests,
    )
