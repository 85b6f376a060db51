"""The batch of the paper's large pair: the experiment's figures follow from bytes, which are written out here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir

from helios_sim import study_config
from helios_sim.config import register, to_config
from helios_sim.errors import UserError
from helios_sim.exits.artificial import stated_exits
from helios_sim.exits.replay import replay
from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.help import conf_folder
from helios_sim.profile.resolve import find_profile
from helios_sim.study.build import build
from helios_sim.study.command import run_study


@dataclass(frozen=True)
class Bytes:
    """A model of the Llama family with 64 heads and 8 KV heads of 128 and a vocabulary of 32,000, all in bf16."""

    layers: int
    d_ff: int
    d: int = 8192
    kv: int = 8 * 128
    words: int = 32_000

    def weights(self, depth: int, cards: int) -> int:
        """Q and output, K and V, gate, up and down; two norms a layer, which each card has, and a final one."""
        layer = 2 * self.d * self.d + 2 * self.d * self.kv + 3 * self.d * self.d_ff + cards * 2 * self.d
        return 2 * (depth * layer + 2 * self.words * self.d + self.d)

    def kv_token(self, depth: int) -> int:
        return depth * 2 * self.kv * 2

    def reserve(self, cards: int) -> int:
        """Activations of 8,192 tokens and logits of 1,024 rows, on each card."""
        mlp, attention = 3 * self.d_ff // cards, 2 * self.d // cards + 2 * self.kv // cards
        one = 8192 * 2 * (2 * self.d + max(mlp, attention)) + 1024 * self.words // cards * (2 + 4)
        return cards * one

    def capacity(self, depth: int, cards: int, mean_tokens: float) -> int:
        pool = int(0.9 * cards * 40 * 2**30) - self.weights(depth, cards) - self.reserve(cards)
        return pool // (16 * self.kv_token(depth)) // ceil(mean_tokens / 16)


PAIR = {"codellama-34b": Bytes(48, 22_016), "llama-2-70b": Bytes(80, 28_672)}


@pytest.mark.slow
def test_large_pair_follows_from_bytes(tmp_path: Path) -> None:
    register()
    with initialize_config_dir(conf_folder(), version_base=None):
        changes = ["+experiment=paper_batch_large", "workload.n_requests=30", "jobs=1", "pictures=false"]
        settings = compose("config", overrides=changes)
    assert run_study(to_config(settings), tmp_path) == 0
    arms = json.loads((tmp_path / "summary.json").read_text())["arms"]
    requests = pq.read_table(tmp_path / "requests.parquet").to_pandas().groupby("arm")
    assert len(arms) == 11
    for name, arm in arms.items():
        model, cards, *cap = name.split("_")
        form = PAIR[model]
        depth = form.layers if cap == ["whole"] else int(cap[1])
        of_arm = requests.get_group(name)
        mean = float((of_arm.prompt_tokens + of_arm.output_tokens).mean())
        assert arm["metrics"]["batch_capacity"] == form.capacity(depth, int(cards), mean)


@pytest.mark.parametrize("model", PAIR)
@pytest.mark.parametrize("cards", [2, 4])
def test_bytes_are_those_of_the_profile(model: str, cards: int) -> None:
    form, profile = PAIR[model], find_profile(model, f"{cards}xa100-40gb")
    for depth in (1, 16, form.layers):
        assert profile.weight_bytes(depth) == form.weights(depth, cards)
        assert profile.kv_bytes_per_token(depth) == form.kv_token(depth)
    assert profile.activation_reserve_bytes == form.reserve(cards)


def test_stated_exits_leave_the_stated_shares_unchanged() -> None:
    model = find_profile("codellama-34b", "2xa100-40gb").model
    trace = stated_exits(model, [16, 28], [0.9, 0.95])
    assert trace.exits == (16, 28, 48)
    assert trace.agree.mean(0).tolist() == [0.9, 0.95, 1.0]
    assert not (trace.agree[:, 0] & ~trace.agree[:, 1]).any()


def test_stated_exits_are_confident_of_tokens_that_stay_unchanged() -> None:
    model = find_profile("codellama-34b", "2xa100-40gb").model
    trace = stated_exits(model, [16, 28], [0.9, 0.95], confident=[0.7, 0.8])
    sure = trace.confident_at(0.9, Confidence.MAX_PROBABILITY)
    assert sure.mean(0).tolist() == [0.7, 0.8, 1.0]
    assert (trace.agree | ~sure).all()
    leaves = replay(trace, PerToken(0.9), 48)
    assert np.bincount(leaves.exit_index).tolist() == [700, 100, 200]
    for wrong in ([0.7], [0.8, 0.7], [0.7, 0.96], "all"):
        with pytest.raises(UserError, match=r"exits\.parameters\.confident"):
            stated_exits(model, [16, 28], [0.9, 0.95], confident=wrong)


def test_each_model_has_its_own_stated_exits() -> None:
    parts = build(study_config("large"), 0)
    exits = {name: data.trace.trace.exits for name, data in parts.models.items()}
    assert exits == {"codellama-34b": (16, 28, 48), "llama-2-70b": (20, 27, 80)}
    with pytest.raises(UserError, match="a group for each model"):
        build(study_config("large", "~exits.parameters.codellama-34b", "sweeps=[]", "figures=[]"), 0)


@pytest.mark.parametrize(
    ("layers", "unchanged", "key"),
    [
        ([], [0.9], "layers"), ([48], [0.9], "layers"), ([28, 16], [0.9, 0.9], "layers"), ([1.5], [0.9], "layers"),
        (16, [0.9], "layers"), ([16], [], "unchanged"), ([16], [1.1], "unchanged"), ([16], [0.9, 0.9], "unchanged"),
        ([16, 28], [0.9, 0.8], "unchanged"), ([16], ["much"], "unchanged"),
    ],
)  # fmt: skip
def test_stated_exits_that_do_not_fit_are_refused(layers: list[int], unchanged: list[float], key: str) -> None:
    model = find_profile("codellama-34b", "2xa100-40gb").model
    with pytest.raises(UserError, match=f"exits.parameters.{key}"):
        stated_exits(model, layers, unchanged)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, r"exits\.parameters=\[\]: layers and unchanged missing"),
        ({"confident": [0.5], "drafted": 0.7}, r"exits\.parameters=\['confident', 'drafted'\]: layers and unchanged"),
        ({"layers": [16]}, r"exits\.parameters\.unchanged=\[\]: unchanged missing"),
        ({"unchanged": [0.9], "drafted": 0.7}, r"exits\.parameters\.layers=\[\]: layers missing"),
    ],
)
def test_what_is_missing_of_stated_exits_is_named_at_once(given: dict, said: str) -> None:
    model = find_profile("codellama-34b", "2xa100-40gb").model
    with pytest.raises(UserError, match=rf"{said}.*another model drafts.*Fix: .*layers=\[16\].*drafted=0\.7"):
        stated_exits(model, **{"layers": (), "unchanged": (), **given})
