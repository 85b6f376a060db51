"""Predictors of a tiny model: what they read is what the head says, and what is recorded is what they say of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from calibrate.exits import predictors as words_of, traces  # noqa: E402
from calibrate.exits.hidden import start_token, states, tokenized, tokenized_passages  # noqa: E402
from calibrate.exits.predictors import PredictorPlan, proposed, train_predictors  # noqa: E402
from calibrate.exits.texts import Split, passages  # noqa: E402
from calibrate_line import calibrate  # noqa: E402
from helios_sim.errors import UserError  # noqa: E402
from helios_sim.exits.rule import WORDS, Confidence  # noqa: E402
from helios_sim.exits.store import read_trace  # noqa: E402
from helios_sim.live.checkpoint.source import find_checkpoint  # noqa: E402
from helios_sim.live.model.decoder import SegmentedModel  # noqa: E402
from helios_sim.live.model.heads import ExitHeads  # noqa: E402
from helios_sim.live.model.predictors import (  # noqa: E402
    FILE,
    Predictors,
    drawn_predictors,
    features,
    read_predictors,
)
from tests.tiny_models import write_tiny  # noqa: E402

EXITS = (1, 3, 4)
CHARS = {"code": 400}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_tiny("llama", tmp_path_factory.mktemp("tiny"))
    checkpoint = find_checkpoint(str(folder))
    return SegmentedModel.load(checkpoint), checkpoint.tokenizer(), ExitHeads.own(EXITS)


def read(model, tokenizer, text: str, depths):
    tokens, _ = tokenized(tokenizer, text)
    with torch.inference_mode():
        return states(model, start_token(tokenizer, model.architecture.vocab_size), [tokens], depths)


def test_a_predictor_reads_what_the_whole_head_says_of_these_words(tiny) -> None:
    model, tokenizer, heads = tiny
    hidden = read(model, tokenizer, "for i in range(10):\n    print(i)\n", EXITS)
    logits = [model.logits(state).float() for state in hidden]
    words = proposed(model, heads, hidden[0])
    assert torch.equal(words, logits[0].topk(WORDS).indices)
    for e, before in ((0, None), (1, hidden[0]), (2, hidden[1])):
        seen = features(model, heads, e, hidden[e], before, words)
        its = logits[e].gather(1, words)
        share = its.softmax(-1)
        change = share if e == 0 else share - logits[e - 1].gather(1, words).softmax(-1)
        assert torch.allclose(seen, torch.cat((its, share, change), -1), atol=1e-4)


def test_a_trace_records_what_predictors_say_and_heads_asked_in_vain(tiny, tmp_path: Path, monkeypatch) -> None:
    model, tokenizer, heads = tiny
    monkeypatch.setattr(traces, "PASSAGE_CHARS", 60)
    drawn = drawn_predictors(EXITS, "cpu", 1, width=8)
    origin = traces.TraceOrigin("tiny", "0" * 64, "a test")
    trace, _ = traces.reference_trace(model, tokenizer, heads, origin, tmp_path, CHARS, predictors=drawn)
    hidden = read(model, tokenizer, passages("code", Split.HELDOUT, CHARS["code"], 60)[1], EXITS)
    words = proposed(model, heads, hidden[0])
    recorded = trace.recorded(Confidence.PREDICTOR)[trace.prompt == 1]
    for e, state in enumerate(hidden):
        weights = {name: tensor.double() for name, tensor in drawn.tensors[e].items()}
        seen = features(model, heads, e, state, hidden[e - 1] if e else None, words).double()
        inside = torch.clamp(seen @ weights["weight"].T + weights["bias"], min=0)
        p = 1 / (1 + torch.exp(-(inside @ weights["out"] + weights["offset"])))
        among = (words == model.logits(state).argmax(-1)[:, None]).any(1)
        assert np.allclose(recorded[:, e], torch.where(among, p, -p).numpy(), atol=2e-3)
    assert (recorded[:, 0] >= 0).all()
    assert (recorded[:, -1] == 1).all()
    without, _ = traces.reference_trace(model, tokenizer, heads, origin, tmp_path, CHARS)
    assert Confidence.PREDICTOR not in without.confidences
    assert np.array_equal(without.agree, trace.agree)


def test_predictors_learn_from_their_texts_and_are_read_as_they_were_written(tiny, tmp_path: Path, monkeypatch) -> None:
    model, tokenizer, heads = tiny
    texts = tokenized_passages(tokenizer, {"code": 2_400}, Split.TRAIN, 60)
    monkeypatch.setattr(words_of, "batches", lambda passages: [[i] for i in range(len(passages))])

    def trained() -> tuple[Predictors, dict]:
        return train_predictors(
            model, tokenizer, heads, texts, PredictorPlan(width=16), lambda text, share: None, lambda: 0.0
        )

    found, reached = trained()
    assert set(reached) == {"1", "3", "4"}
    for at in reached.values():
        assert at["leaves"] == pytest.approx(at["asks_the_head"] - at["in_vain"])
        assert at["changed"] <= min(at["leaves"], 1 - at["agree"]) + 1e-9
    assert reached["1"]["in_vain"] == 0  # its own word is among those that it proposes
    found.write(tmp_path)
    back = read_predictors(tmp_path)
    assert (back.exits, back.width, back.digest()) == (EXITS, 16, found.digest())
    assert trained()[0].digest() == found.digest()
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:50])
    with pytest.raises(UserError, match=r"predictors.*\+task=predictors"):
        read_predictors(tmp_path)


@pytest.mark.slow
def test_the_command_writes_predictors_beside_their_trace(tmp_path: Path, monkeypatch, capsys) -> None:
    weights = write_tiny("llama", tmp_path / "tiny-llama", max_position_embeddings=2048)
    words = (f"model={weights}", "+task=predictors", "quick=true", "threads=1", "tasks=[code]", "trace_tokens=900",
             "train_tokens=3000", "model.exits=[2,4]", "check_width=16", "out=out")  # fmt: skip
    done = calibrate(monkeypatch, capsys, tmp_path, *words)
    assert done.status == 0, done.err
    trace = read_trace(tmp_path / "out" / "trace")
    assert trace.exits[:2] == (2, 4)
    assert Confidence.PREDICTOR in trace.confidences
    assert read_predictors(tmp_path / "out" / "trace").width == 16
    assert set(done.summary["predictors"]) == {"2", "4"}
    assert any("predictor at layer 4" in sentence for sentence in done.summary["verdict"])
    again = calibrate(monkeypatch, capsys, tmp_path, *words)
    assert {stage["status"] for stage in again.summary["stages"].values()} == {"kept"}
