"""A tiny model trained for early exit: it learns, goes on after a kill to the same bits, and keeps its time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from calibrate.exits.layer_skip import Curriculum, LayerSkip  # noqa: E402
from calibrate.exits.low_rank import Factors, target_of, through  # noqa: E402
from calibrate.exits.skipping import with_changes, without_some  # noqa: E402
from calibrate.exits.trunk import STATE, TrainedTrunk, TrunkPlan, train_trunk  # noqa: E402
from helios_sim.live.checkpoint.source import changed_by, find_checkpoint  # noqa: E402
from helios_sim.live.memory.kv import Packed  # noqa: E402
from helios_sim.live.model.decoder import SegmentedModel  # noqa: E402
from helios_sim.live.model.delta import write_delta  # noqa: E402
from tests.tiny_models import write_tiny  # noqa: E402

PLAN = TrunkPlan(
    (2, 4), rank=4, skip=LayerSkip(drop_most=0.2), width=8, learning_rate=2e-3, adapter_learning_rate=3e-3,
    batch_texts=8, steps=24, vocabulary=64, drawn=64,
)  # fmt: skip
START = 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return find_checkpoint(str(write_tiny("llama", tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def model(checkpoint: Any) -> SegmentedModel:
    return SegmentedModel.load(checkpoint)


@pytest.fixture(scope="module")
def texts() -> Any:
    return torch.randint(3, 320, (64, 16), generator=torch.Generator().manual_seed(0))


def trained(model: SegmentedModel, texts: Any, folder: Path, plan: TrunkPlan = PLAN, **more: Any) -> TrainedTrunk:
    return train_trunk(model, texts, START, plan, folder, say=lambda _: None, **more)


@pytest.fixture(scope="module")
def found(model: SegmentedModel, texts: Any, tmp_path_factory: pytest.TempPathFactory) -> TrainedTrunk:
    return trained(model, texts, tmp_path_factory.mktemp("run"))


def tensors_of(found: TrainedTrunk) -> list[Any]:
    sides = (found.adapters, found.attached)
    factors = [t for of in found.factors.values() for t in (of.down, of.up)]
    return factors + [t for side in sides for of in side.values() for t in of.values()]


def test_training_brings_exits_nearer_to_full_depth_than_attached_ones(
    model: SegmentedModel, texts: Any, tmp_path: Path
) -> None:
    done = trained(model, texts, tmp_path, replace(PLAN, steps=40, skip=LayerSkip(drop_most=0.0), vocabulary=256))
    changed = with_changes(model, done.factors)
    with torch.no_grad():
        *frozen, last = through(model, texts[:16], None, 0, (*PLAN.exits, 6))
        *mine, full = through(changed, texts[:16], None, 0, (*PLAN.exits, 6))
        target = target_of(model, last, 8, torch.arange(320), torch.arange(1))
        for depth, before, after in zip(PLAN.exits, frozen, mine, strict=True):
            attached = target.divergence(model, done.attached[depth], before)
            assert target.divergence(changed, done.adapters[depth], after) < attached
        assert 0 < target.divergence(changed, None, full) < 0.01  # full depth stays what it was
    history = done.progress.history
    assert all(history[-1][name] < history[0][name] for name in ("2", "4", "attached 2", "attached 4"))
    assert done.short == ""


def test_a_killed_run_goes_on_to_the_same_bits(
    model: SegmentedModel, texts: Any, found: TrainedTrunk, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def until(step: int) -> Any:
        def say(text: str) -> None:
            if text.startswith(f"trunk: step {step},"):
                raise Killed

        return say

    for step in (10, 20):
        with pytest.raises(Killed):
            train_trunk(model, texts, START, PLAN, tmp_path, say=until(step), keep_every_s=0.0)
        assert (tmp_path / STATE).is_file()
    again = trained(model, texts, tmp_path)
    assert again.progress.tokens == found.progress.tokens == 24 * 8 * 16
    for ours, theirs in zip(tensors_of(again), tensors_of(found), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_of_another_run_is_not_taken_up(model: SegmentedModel, texts: Any, tmp_path: Path) -> None:
    few = replace(PLAN, steps=1)
    trained(model, texts, tmp_path, few)
    assert trained(model, texts, tmp_path, replace(few, steps=2)).progress.step == 2  # more of the same
    for plan, others in ((replace(few, seed=1), texts), (few, texts[:32])):
        assert trained(model, others, tmp_path, plan).progress.tokens == 8 * 16


def test_the_control_is_not_touched_by_what_the_trunk_learns(
    model: SegmentedModel, texts: Any, tmp_path: Path
) -> None:
    few = replace(PLAN, steps=4)
    one, other = (
        trained(model, texts, tmp_path / str(rate), replace(few, learning_rate=rate)) for rate in (2e-3, 1e-4)
    )
    for depth in PLAN.exits:
        for name, tensor in one.attached[depth].items():
            assert torch.equal(tensor, other.attached[depth][name])
    assert not torch.equal(one.factors[0, "qkv"].up, other.factors[0, "qkv"].up)


class Clock:
    """A second for every look at it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.mark.parametrize("curriculum", list(Curriculum))
def test_a_budget_is_kept_and_the_rate_has_fallen_by_then(
    curriculum: Curriculum, model: SegmentedModel, texts: Any, tmp_path: Path
) -> None:
    plan = replace(PLAN, steps=None, batch_texts=2, skip=LayerSkip(curriculum=curriculum))
    clock = Clock()
    done = trained(model, texts[:8], tmp_path, plan, budget_s=60.0, clock=clock, keep_every_s=1e9)
    progress = done.progress
    assert progress.spent_s <= 60.0
    assert progress.over
    assert progress.falls_from is not None
    assert progress.ends_at is not None
    assert 0.7 < progress.falls_from / progress.ends_at < 0.8  # plan.fall is 0.25
    longer = trained(model, texts[:8], tmp_path, plan, budget_s=60.0, clock=clock)
    assert longer.progress.step == progress.step  # it is over


def test_a_run_that_time_cuts_short_says_so(model: SegmentedModel, texts: Any, tmp_path: Path) -> None:
    done = trained(model, texts, tmp_path, PLAN, budget_s=10.0, clock=Clock())
    assert 0 < done.progress.step < 24
    assert "learning rate" in done.short


def test_without_steps_and_without_a_budget_nothing_ends_a_run(
    model: SegmentedModel, texts: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="a number of steps or a budget"):
        trained(model, texts, tmp_path, replace(PLAN, steps=None))


def test_a_text_that_leaves_a_layer_out_keeps_its_state(model: SegmentedModel, texts: Any) -> None:
    rows = texts[:3]
    left_in = np.ones((6, 3), dtype=bool)
    left_in[4, 1] = left_in[2] = False

    def attend(n: int, tokens: int) -> Packed:
        return Packed(model.architecture, n, tokens)

    with torch.no_grad():
        found = without_some(model, rows, (2, 3, 5, 6), left_in, attend)
        assert torch.equal(found[0], found[1])  # nobody runs layer 2
        for text in range(3):
            state = model.embed(rows[text], attend(1, 16).positions)
            for layer in range(6):
                if left_in[layer, text]:
                    state = model.run(state, layer, layer + 1, attend(1, 16))
            assert torch.allclose(found[-1].view(3, 16, -1)[text], state, atol=1e-5)


def test_a_change_that_is_merged_on_loading_gives_what_the_trained_model_gave(
    checkpoint: Any, model: SegmentedModel, texts: Any, found: TrainedTrunk, tmp_path: Path
) -> None:
    pairs = {place: (of.down, of.up) for place, of in found.factors.items()}
    header = {"weights": checkpoint.source, "weights_sha256": checkpoint.sha256, "training": {}}
    write_delta(tmp_path / "change", header, pairs)
    stored = {place: Factors(down.half().float(), up.half().float()) for place, (down, up) in pairs.items()}
    merged = SegmentedModel.load(changed_by(tmp_path / "change", checkpoint))
    with torch.no_grad():
        ours, theirs, before = (
            of.logits(through(of, texts[:16], None, 0, (6,))[0]) for of in (with_changes(model, stored), merged, model)
        )
    assert torch.allclose(ours, theirs, atol=2e-4)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))  # token by token
    assert not torch.equal(ours.argmax(-1), before.argmax(-1))
