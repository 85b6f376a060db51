"""Low-rank changes of a tiny random model's trunk, and checks by a shortlist of its vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from calibrate.exits.low_rank import (  # noqa: E402
    LowRankPlan,
    changed,
    exit_losses,
    first_factors,
    frequent_tokens,
    in_layers,
    shortlist_logit,
    through,
    train_low_rank,
)
from calibrate.exits.training import choices, first_adapter  # noqa: E402
from helios_sim.live.checkpoint.source import find_checkpoint  # noqa: E402
from helios_sim.live.model.decoder import SegmentedModel  # noqa: E402
from tests.tiny_models import write_tiny  # noqa: E402

PLAN = LowRankPlan(
    (2, 4), before=2, rank=8, vocabulary=64, drawn=64, learning_rate=2e-2, adapter_learning_rate=1e-3, batch_texts=8
)
START = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return SegmentedModel.load(find_checkpoint(str(write_tiny("llama", tmp_path_factory.mktemp("tiny")))))


@pytest.fixture(scope="module")
def texts():
    return torch.randint(3, 320, (96, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def adapters(model, texts):
    with torch.no_grad():
        *early, last = through(model, texts, None, 0, (*PLAN.exits, 6))
    return {d: first_adapter(h, last, 8, 0) for d, h in zip(PLAN.exits, early, strict=True)}


@pytest.fixture(scope="module")
def originals(model):
    return {(layer, part): getattr(model.layers[layer], part) for layer, part in PLAN.places}


def test_the_last_layers_before_each_exit_are_changed_and_no_other() -> None:
    assert LowRankPlan((8, 24), before=3).layers == (5, 6, 7, 21, 22, 23)
    assert LowRankPlan((2, 3), before=3).layers == (0, 1, 2)
    assert LowRankPlan((8,), rank=0).places == ()


def test_changes_that_are_not_trained_change_nothing(model, texts, originals) -> None:
    factors = first_factors(originals, PLAN.places, PLAN.rank, 0)
    found = through(changed(model, originals, factors), texts, None, 0, (6,))
    assert torch.equal(found[0], through(model, texts, None, 0, (6,))[0])


def test_a_change_is_w_plus_b_a_and_leaves_the_model_alone(model, originals) -> None:
    factors = first_factors(originals, PLAN.places, PLAN.rank, 0)
    of = factors[3, "mlp_out"]
    of.up.normal_()
    other = changed(model, originals, factors)
    assert torch.allclose(other.layers[3].mlp_out, model.layers[3].mlp_out + of.up @ of.down)
    assert other.layers[4].mlp_out is model.layers[4].mlp_out
    assert originals[3, "mlp_out"] is model.layers[3].mlp_out


def test_training_brings_exits_nearer_than_adapters_alone(model, texts, adapters, originals) -> None:
    def exits_and_full(rank: int) -> tuple[float, float]:
        plan = LowRankPlan(**{f: getattr(PLAN, f) for f in PLAN.__slots__} | {"rank": rank})
        seen = texts.repeat(2, 1)
        factors, tensors, read = train_low_rank(model, originals, adapters, seen, START, plan, say=lambda _: None)
        assert read == seen.numel()
        every = torch.arange(320)
        other, drawn = changed(model, originals, factors), torch.Generator().manual_seed(1)
        with torch.no_grad():
            losses = exit_losses(model, other, tensors, texts, START, PLAN, every, drawn)
        return float(losses[:-1].mean()), float(losses[-1])

    inside, full = exits_and_full(8)
    alone, same = exits_and_full(0)
    assert same == pytest.approx(0, abs=1e-5)  # the trunk is the original's
    assert full > 0
    assert inside < 0.95 * alone


def test_frequent_tokens_come_by_their_number_of_occurrences() -> None:
    assert frequent_tokens([np.array([5, 3, 3]), np.array([9, 9, 9])], 3, 12).tolist() == [9, 3, 5]


def test_a_shortlist_of_all_tokens_is_the_whole_head_and_a_short_one_is_surer(model, texts, adapters) -> None:
    hidden = through(model, texts[:4], None, 0, (4,))[0].detach()
    whole = choices(model, adapters[4], hidden)[1].double().numpy()
    every = shortlist_logit(model, adapters[4], hidden, torch.arange(320))
    assert 1 / (1 + np.exp(-every)) == pytest.approx(whole, rel=1e-4)
    words = torch.unique(torch.cat((torch.arange(20), choices(model, adapters[4], hidden)[0])))
    assert (shortlist_logit(model, adapters[4], hidden, words) > every).all()


def test_a_layer_weighs_one_layer(model) -> None:
    layer = model.layers[0]
    weights = sum(t.numel() for t in (getattr(layer, name) for name in layer.__slots__) if t is not None)
    assert in_layers(weights, model.architecture) == 1
