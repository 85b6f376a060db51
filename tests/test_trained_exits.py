"""What training for early exit did: figures of made-up traces, and the command on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calibrate.exits.before_after import AFTER, BEFORE, compared, sure_of, verdict
from calibrate.schema import CalibrateConfig, TrainExitsConfig
from calibrate_line import calibrate
from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence
from helios_sim.exits.store import load_trace
from helios_sim.exits.trace import ExitTrace
from helios_sim.provenance import Provenance, ProvenanceClass

EXITS = (6, 12, 24)
PASSAGES, TOKENS = 40, 50  # of each passage


def trace(agree: NDArray[np.bool_], sure: NDArray[np.float64], bits: NDArray[np.float64] | float = 4.0) -> ExitTrace:
    n = len(agree)
    whole = np.column_stack([agree, np.ones(n, bool)])
    confidence = np.column_stack([sure, np.ones(n)]).astype(np.float32)
    return ExitTrace(
        model="made-up", exits=EXITS, tasks=("text",), task=np.zeros(n, np.int32),
        prompt=np.repeat(np.arange(PASSAGES, dtype=np.int32), TOKENS), chars=np.full(n, 2, np.int32), agree=whole,
        provenance=Provenance(ProvenanceClass.MEASURED, "made up", "none"), human_text=True,
        bits=np.broadcast_to(np.asarray(bits, np.float32), (n, 3)).copy(),
        confidences={Confidence.CLASSIFIER: confidence, Confidence.MAX_PROBABILITY: confidence},
    )  # fmt: skip


def drawn(share: float, seed: int = 0) -> ExitTrace:
    """Exits that know of a share of the tokens that they are right, and are right of few others."""
    rng = np.random.default_rng(seed)
    known = rng.random((PASSAGES * TOKENS, 2)) < share
    return trace(known | (rng.random(known.shape) < 0.1), np.where(known, 0.95, 0.2))


ALL_KEPT = np.ones((PASSAGES * TOKENS, 3), bool)


def test_a_trace_compared_with_itself_shows_no_change() -> None:
    one = drawn(0.4)
    found = compared(one, one, ALL_KEPT)
    assert found["tokens"] == PASSAGES * TOKENS
    assert found["passages"] == PASSAGES
    for figures in (found["change"]["agreement"], found["change"]["bits_per_char"]):
        for value, low, high in figures:
            assert value == 0
            assert low == pytest.approx(0, abs=1e-9)
            assert high == pytest.approx(0, abs=1e-9)
    assert found[BEFORE]["bits_per_char"] == [[2.0, 2.0, 2.0]] * 3  # 4 bits of every token, 2 characters each
    assert found[AFTER]["kept"][-1][0] == 1.0
    assert "made no difference" in verdict(found)[-1]


def test_exits_that_know_more_let_tokens_leave_earlier() -> None:
    before, after = drawn(0.2), drawn(0.6, seed=1)
    found = compared(before, after, ALL_KEPT)
    for e, (value, low, high) in enumerate(found["change"]["agreement"]):
        assert value == pytest.approx(float(after.agree[:, e].mean() - before.agree[:, e].mean()))
        assert low < value < high
        assert low > 0
    for confidence in ("classifier", "max_probability"):
        for side, known in ((BEFORE, 0.2), (AFTER, 0.6)):
            at = found[side]["at"][confidence]["0.95"]
            left = (1 - at["left"][-1], at["agreement"][0], at["layers_per_token"][0])
            assert left[0] >= 1 - (1 - known) ** 2 - 0.05  # what is known to be right leaves, and some more
            assert left[1] >= 0.93  # with a threshold from other passages
            assert left[2] == pytest.approx(float(np.dot(at["left"], EXITS)))
        value, low, high = found["change"]["layers_per_token"][confidence]["0.95"]
        assert low < value < high < 0
    assert "earlier" in verdict(found)[-1]
    assert "later" in verdict(compared(after, before, ALL_KEPT))[-1]


def test_a_confidence_that_is_no_check_is_calibrated_and_weighs_risk_by_what_leaving_saves() -> None:
    one = drawn(0.5)
    sure = sure_of(one, Confidence.MAX_PROBABILITY, np.ones(one.n_tokens, bool))
    assert np.array_equal(sure[:, -1], np.ones(one.n_tokens))
    for e, scale in enumerate((1.0, (24 - 6) / (24 - 12))):
        p = 1 - (1 - sure[:, e]) / scale
        assert p.mean() == pytest.approx(float(one.agree[:, e].mean()), abs=0.01)
    assert np.array_equal(sure_of(one, Confidence.CLASSIFIER, np.ones(1, bool))[:, 0], one.recorded("classifier")[:, 0])


def test_traces_of_different_texts_are_not_compared() -> None:
    one = drawn(0.5)
    with pytest.raises(UserError, match="the same exits and passages"):
        compared(one, replace(one, chars=one.chars + 1), ALL_KEPT)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rank": 0}, "rank"), ({"drop_most": 1.0}, "drop_most"), ({"loss_scale": 0.0}, "loss_scale"),
        ({"curriculum": "steep"}, "rotational, gradual"), ({"curriculum": "gradual", "every": 3}, "every"),
        ({"steps": 0}, "steps"), ({"batch_texts": 0}, "batch_texts"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        TrainExitsConfig(**settings)


def test_the_recipe_counts_for_its_own_task_alone() -> None:
    with pytest.raises(UserError, match="train_exits"):
        CalibrateConfig(task="adapters", train_exits=TrainExitsConfig(rank=2))
    assert CalibrateConfig(task="train_exits", train_exits=TrainExitsConfig(rank=2)).tokens_to_train == 2_000_000
    assert CalibrateConfig(task="adapters").tokens_to_train == 200_000


@pytest.mark.slow
def test_the_command_trains_a_tiny_model_and_what_it_leaves_can_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from helios_sim.live.checkpoint.source import find_checkpoint
    from helios_sim.live.model.heads import ExitHeads
    from tiny_models import write_tiny

    weights = write_tiny("llama", tmp_path / "tiny-llama", max_position_embeddings=2048)
    words = (
        f"model={weights}", "+task=train_exits", "quick=true", "threads=1", "tasks=[code]", "trace_tokens=700",
        "train_tokens=3000", "train_exits.check_tokens=500", "train_exits.text_tokens=64", "adapter_width=8",
        "check_width=8", "out=out",
    )  # fmt: skip
    done = calibrate(monkeypatch, capsys, tmp_path, *words)
    assert done.status == 0, done.err
    assert done.summary["trained"]["steps"] == 4
    place = tmp_path / "out" / "trained"
    changed = find_checkpoint(str(place))
    heads = ExitHeads.load(place, changed.architecture)
    traced = load_trace("tiny-llama", str(place / "trace"))
    assert traced.exits == (*heads.exits, 6)
    assert heads.has_check
    assert traced.provenance.details["weights_sha256"] == changed.sha256
    assert "What training the model for early exit did" in (tmp_path / "out" / "report.html").read_text()
    again = calibrate(monkeypatch, capsys, tmp_path, *words)
    assert again.summary["stages"]["train_exits"]["status"] == "kept"

SHIPPED = Path(__file__).parents[1] / "experiments" / "trained_exits"


def test_the_page_s_tables_are_those_of_what_lies_beside_it() -> None:
    from calibrate.report.trained import by_agreement, by_exit

    found = json.loads((SHIPPED / "smollm2-135m" / "stage.json").read_text(encoding="utf-8"))["compared"]
    page = (SHIPPED / "results.md").read_text(encoding="utf-8")
    for table in (by_exit(found), by_agreement(found)):
        assert table.rows
        assert all(f"| {' | '.join(row)} |" in page for row in table.rows)
    for sentence in verdict(found):
        assert f"- {sentence}" in page
    places = (str(SHIPPED / "smollm2-135m" / name) for name in ("trace-before", "trace"))
    before, after = (load_trace("smollm2-135m", place) for place in places)
    again = compared(before, after, np.ones(after.agree.shape, bool))  # what was kept is in no trace
    assert again["change"] == found["change"]


def test_the_shipped_change_and_heads_fit_the_model() -> None:
    pytest.importorskip("torch")
    from helios_sim.live.checkpoint.source import find_checkpoint
    from helios_sim.live.model.delta import WeightsDelta
    from helios_sim.live.model.heads import ExitHeads

    architecture = find_checkpoint("random:smollm2-135m").architecture
    delta = WeightsDelta.load(SHIPPED / "smollm2-135m", architecture)
    assert len(delta.factors) == 30 * 4
    heads = ExitHeads.load(SHIPPED / "smollm2-135m", architecture)
    assert heads.exits == tuple(delta.header["training"]["plan"]["exits"])
