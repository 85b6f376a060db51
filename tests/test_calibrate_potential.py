"""Whether a model exits at all: shares that keep what they promise, bounds that closed forms give, and the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from calibrate.exits.potential import (
    ALLOWED,
    CONTEXT_TOKENS,
    Potential,
    alike,
    full_queue,
    halves,
    potential,
    sentences,
    threshold,
)
from calibrate.schema import CalibrateConfig
from calibrate_line import calibrate
from command_line import Said
from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.prediction import decode_time_s, fixed_depth
from helios_sim.profile.resolve import find_profile
from helios_sim.provenance import Provenance, ProvenanceClass

PROFILE = find_profile("opt-1.3b", "h100-80gb")  # 24 layers
EXITS = (6, 12, 18, 24)


def trace(agree: NDArray[np.bool_], confidence: NDArray[np.float64], texts: int = 20) -> ExitTrace:
    """Texts of equal length, one task."""
    n = len(agree)
    whole = np.column_stack([agree, np.ones(n, bool)])
    sure = np.column_stack([confidence, np.ones(n)]).astype(np.float32)
    return ExitTrace(
        model="made-up", exits=EXITS, tasks=("text",), task=np.zeros(n, np.int32),
        prompt=(np.arange(n) * texts // n).astype(np.int32), chars=np.ones(n, np.int32), agree=whole,
        provenance=Provenance(ProvenanceClass.MEASURED, "made up", "none"),
        confidences={Confidence.MAX_PROBABILITY: sure},
    )  # fmt: skip


def drawn(n: int = 4000, seed: int = 0) -> ExitTrace:
    """Confidences that are what they say: a token is unchanged with that probability."""
    rng = np.random.default_rng(seed)
    confidence = np.sort(rng.beta(2, 1, (n, 3)), axis=1)
    return trace(rng.random((n, 3)) < confidence, confidence)


def seconds(layers: int, batch: int) -> float:
    return float(decode_time_s(PROFILE, fixed_depth(layers), np.array([batch]), float(CONTEXT_TOKENS))[0])


def test_exits_that_are_always_right_are_worth_what_the_layers_above_cost() -> None:
    n = 400
    found = potential(trace(np.ones((n, 3), bool), np.full((n, 3), 0.9)), PROFILE)
    assert [it.unchanged for it in found.exits] == [1.0] * 3
    assert all(it.leave == (1.0,) * 3 and it.changed == (0.0,) * 3 for it in found.exits)
    assert found.mean_layers == (6.0,) * 3
    for speed in found.speeds:
        assert speed.at_most == pytest.approx(seconds(24, speed.batch) / seconds(6, speed.batch), rel=0.02)
        assert all(1 < checked < speed.at_most for checked in speed.checked)
        assert speed.at == (6,) * 3
    assert sentences(found, "it")[-1].startswith("it exits")


def test_exits_that_are_never_right_are_worth_nothing() -> None:
    n = 400
    rng = np.random.default_rng(1)
    found = potential(trace(np.zeros((n, 3), bool), rng.random((n, 3))), PROFILE)
    assert all(speed.at_most == pytest.approx(1.0, rel=0.02) for speed in found.speeds)
    assert all(max(speed.checked) < 1.0 for speed in found.speeds)
    assert "does not exit" in sentences(found, "it")[-1]
    for it in found.exits:  # all that leave are changed, which is allowed up to that share
        assert it.leave == it.changed


@pytest.mark.slow
def test_what_may_change_changes_and_no_more_on_text_that_was_not_fitted() -> None:
    found = potential(drawn(40_000), PROFILE)
    for it in found.exits:
        assert list(it.leave) == sorted(it.leave)
        for changed, most in zip(it.changed, ALLOWED, strict=True):
            assert changed == pytest.approx(most, abs=0.006)
    for changed, most in zip(found.changed, ALLOWED, strict=True):
        assert changed == pytest.approx(most, abs=0.006)
    assert list(found.mean_layers) == sorted(found.mean_layers, reverse=True)


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.booleans()), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.01, 0.05, 0.3]),
)
def test_a_threshold_is_the_lowest_that_keeps_the_promise(tokens: list[tuple[float, bool]], most: float) -> None:
    scores, agree = np.array([s for s, _ in tokens]), np.array([a for _, a in tokens])
    at = threshold(scores, agree, most)

    def changed(value: float) -> float:
        return float(((scores >= value) & ~agree).sum() / len(scores))

    assert changed(at) <= most
    lower = scores[scores < at]
    if len(lower):
        assert changed(float(lower.max())) > most


def test_texts_stay_together() -> None:
    made = drawn(100)
    half = halves(made)
    for text in np.unique(made.prompt):
        assert len(set(half[made.prompt == text].tolist())) == 1
    assert 0.4 < half.mean() < 0.6


def test_alike_is_a_correlation() -> None:
    a = np.array([True, True, False, False])
    assert alike(a, a) == pytest.approx(1.0)
    assert alike(a, ~a) == pytest.approx(-1.0)
    assert alike(a, np.array([True, False, True, False])) == pytest.approx(0.0)
    assert alike(a, np.ones(4, bool)) is None


def test_a_single_text_is_cut_and_a_single_token_is_refused() -> None:
    one = trace(np.ones((9, 3), bool), np.full((9, 3), 0.5), texts=1)
    assert halves(one).tolist() == [True] * 4 + [False] * 5
    assert potential(one, PROFILE).tokens == 9
    with pytest.raises(UserError, match="at least two tokens"):
        potential(trace(np.ones((1, 3), bool), np.full((1, 3), 0.5), texts=1), PROFILE)


def test_a_card_needs_room_for_one_request() -> None:
    assert full_queue(PROFILE) == 256
    with pytest.raises(UserError, match="a card with room"):
        full_queue(find_profile("meta-llama/Llama-3.1-70B-Instruct", "h100-80gb"))


@pytest.mark.parametrize("value", ["all", "traces", "latency"])
def test_the_card_counts_for_this_task_alone(value: str) -> None:
    with pytest.raises(UserError, match="card"):
        CalibrateConfig(task=value, card="l40s")
    assert CalibrateConfig(task="potential", card="l40s").priced_for == "l40s"
    assert CalibrateConfig(task="potential").tokens_to_trace < CalibrateConfig(task=value).tokens_to_trace


@pytest.mark.slow
def test_the_command_says_whether_a_model_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from tiny_models import write_tiny

    weights = write_tiny("llama", tmp_path / "tiny-llama", max_position_embeddings=2048)
    words = (f"model={weights}", "+task=potential", "quick=true", "threads=1", "tasks=[code]", "trace_tokens=900")

    def line(*more: str) -> Said:
        return calibrate(monkeypatch, capsys, tmp_path, *words, *more)

    done = line("out=out")
    assert done.status == 0, done.err
    told = done.summary["potential"]
    assert [it["depth"] for it in told["exits"]] == [1, 2, 3, 4, 5]
    assert [speed["batch"] for speed in told["speeds"]] == [1, 256]
    assert "exit" in done.summary["verdict"][-1]
    assert "Does it exit at all?" in (tmp_path / "out" / "report.html").read_text()
    again = line("card=l40s", "out=out")  # priced anew, traced once
    assert (again.summary["stages"]["potential"]["status"], again.summary["potential"]["card"]) == ("kept", "l40s")
    wrong = line("card=tpu", "out=other")
    assert wrong.status == 1
    assert "tpu" in wrong.err
    assert not (tmp_path / "other" / "stages").exists()


def test_figures_go_to_json() -> None:
    found = potential(drawn(400), PROFILE)
    told = found.to_json()
    assert told["allowed"] == list(ALLOWED)
    assert isinstance(found, Potential)
