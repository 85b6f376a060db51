"""Heads trained on a tiny random model: they learn, resume, load again, and refuse another model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from calibrate.exits.adapters import AdapterConfig, train_heads  # noqa: E402
from calibrate.exits.training import Recipe  # noqa: E402
from calibrate.schema import CalibrateConfig  # noqa: E402
from calibrate.work import _candidates  # noqa: E402
from helios_sim.errors import UserError  # noqa: E402
from helios_sim.live.checkpoint.source import find_checkpoint  # noqa: E402
from helios_sim.live.model.decoder import SegmentedModel  # noqa: E402
from helios_sim.live.model.heads import HEADER, TENSORS, ExitHeads  # noqa: E402
from tests.tiny_models import write_tiny  # noqa: E402

RECIPE = Recipe(width=8, check_width=8, vocabulary=64, drawn=16, epochs=1, check_epochs=2, batch=64)
CONFIG = AdapterConfig(
    "tiny", (2, 4), train_chars=9_000, calibration_chars=2_000, passage_chars=60, shares={"code": 1000}, recipe=RECIPE
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    checkpoint = find_checkpoint(str(write_tiny("llama", tmp_path_factory.mktemp("tiny"))))
    return SegmentedModel.load(checkpoint), checkpoint.tokenizer()


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder, scratch = tmp_path_factory.mktemp("heads"), tmp_path_factory.mktemp("scratch")
    return train_heads(*tiny, CONFIG, folder, scratch, lambda _: None), folder, scratch


def test_a_resumed_run_trains_nothing_again_and_ends_with_the_same_heads(tiny, trained, tmp_path: Path) -> None:
    _, folder, scratch = trained
    before = {p: p.stat().st_mtime_ns for p in scratch.iterdir()}
    train_heads(*tiny, CONFIG, tmp_path, scratch, lambda _: None)
    assert {p: p.stat().st_mtime_ns for p in scratch.iterdir()} == before
    assert (tmp_path / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
    damaged = min(scratch.glob("0*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train_heads(*tiny, CONFIG, tmp_path, scratch, lambda _: None)
    assert damaged.stat().st_mtime_ns != before[damaged]
    assert (tmp_path / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()


def test_adapters_bring_the_exit_nearer_to_full_depth(tiny, trained) -> None:
    model, _ = tiny
    heads, _, scratch = trained
    from safetensors.torch import load_file

    shard = load_file(sorted(scratch.glob("0*.safetensors"))[0])["hidden"]
    e = len(heads.exits) - 1
    column = (*CONFIG.candidates, 6).index(heads.exits[e])
    full = torch.log_softmax(model.logits(shard[:, -1]), -1)

    def divergence(state: torch.Tensor) -> float:
        return float(
            torch.nn.functional.kl_div(
                torch.log_softmax(model.logits(state), -1), full, reduction="batchmean", log_target=True
            )
        )

    assert divergence(heads.adapt(e, shard[:, column])) < 0.8 * divergence(shard[:, column])


def test_full_depth_is_left_alone_and_checks_are_probabilities(trained) -> None:
    heads = trained[0]
    hidden = torch.randn(7, 48)
    assert torch.equal(heads.adapt(len(heads.exits), hidden), hidden)
    assert torch.equal(heads.classify(len(heads.exits), hidden), torch.ones(7))
    p = heads.classify(0, hidden)
    assert p.shape == (7,)
    assert bool(((p >= 0) & (p <= 1)).all())


def test_an_adapter_does_not_see_the_length_of_a_hidden_state(trained) -> None:
    heads = trained[0]
    hidden = torch.randn(5, 48)
    assert torch.allclose(heads.adapt(0, hidden), heads.adapt(0, 7 * hidden), atol=1e-5)


def test_the_header_says_what_was_trained_on_what(trained) -> None:
    header = json.loads((trained[1] / HEADER).read_text())
    tokens = header["training"]["train_tokens"], header["training"]["check_tokens"]
    assert sum(tokens) > 1_000
    assert tokens[0] / sum(tokens) == pytest.approx(RECIPE.adapter_share, abs=1e-3)
    assert set(header["curves"]) >= {"code", "check_layers", "leave_layers"}
    for exit_ in header["calibration"].values():
        assert 0 <= exit_["check_after"] <= 1


@pytest.mark.parametrize(("name", "value"), [("n_layers", 7), ("d_model", 64), ("vocab_size", 100)])
def test_heads_of_another_model_are_refused(tiny, trained, name: str, value: int) -> None:
    other = replace(tiny[0].architecture, **{name: value})
    with pytest.raises(UserError, match=name):
        ExitHeads.load(trained[1], other)


def test_damaged_and_missing_files_give_one_message(tiny, trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        ExitHeads.load(tmp_path, tiny[0].architecture)
    (tmp_path / HEADER).write_bytes((trained[1] / HEADER).read_bytes())
    (tmp_path / TENSORS).write_bytes((trained[1] / TENSORS).read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="sha256"):
        ExitHeads.load(tmp_path, tiny[0].architecture)


def test_own_heads_have_no_check() -> None:
    heads = ExitHeads.own((2, 4))
    hidden = torch.randn(3, 48)
    assert torch.equal(heads.adapt(0, hidden), hidden)
    assert heads.temperature == (1.0, 1.0, 1.0)
    with pytest.raises(UserError, match="no check"):
        heads.classify(0, hidden)


def test_the_largest_logits_are_those_of_topk() -> None:
    from helios_sim.live.model.predictors import largest

    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 1_001)))
    values, places = largest(logits, 6, run=64)
    wanted = logits.topk(6)
    assert torch.equal(values, wanted.values)
    assert torch.equal(places, wanted.indices)


@pytest.mark.parametrize(
    ("layers", "depths"), [(30, (6, 8, 12, 18, 24)), (18, (4, 5, 7, 11, 14)), (6, (1, 2, 4, 5)), (2, (1,))]
)
def test_exits_are_first_tried_at_a_fifth_of_the_layers(layers: int, depths: tuple[int, ...]) -> None:
    inputs = SimpleNamespace(config=CalibrateConfig(), layers=layers)
    assert _candidates(inputs) == depths
