"""Known shapes with random weights: the right sizes, the same values again, and exits as the trace has them."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

import torch

from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.store import write_trace
from helios_sim.live.checkpoint.random_weights import draw
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.memory.kv import Packed
from helios_sim.live.model.architecture import model_spec
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.profile.catalog import MODELS
from helios_sim.profile.spec import RuntimeConfig
from helios_sim.profile.store import load_profile, write_profile
from helios_sim.study.jobs import make_job, run_job
from helios_sim.study.modes import LiveConfig
from helios_sim.study.schema import (
    ArrivalsConfig,
    Config,
    ExitsConfig,
    LengthConfig,
    LengthsConfig,
    MixConfig,
    ServerConfig,
    WorkloadConfig,
)
from live_study import HARDWARE, tiny_profile
from tiny_models import TEXT

PAIR = ("opt-1.3b", "opt-6.7b")


@pytest.mark.parametrize("name", [*MODELS, "smollm2-135m"])
def test_a_shape_takes_as_many_bytes_as_the_model_of_that_name(name: str) -> None:
    wanted = MODELS[name] if name in MODELS else load_profile(f"{name}@epyc-2core").model
    found = model_spec(draw(f"random:{name}").architecture, name, wanted.chars_per_token, "bfloat16")
    for layers in (1, wanted.n_layers):
        assert found.weight_bytes(layers) == wanted.weight_bytes(layers)
    assert (found.family, found.n_layers, found.kv_width) == (wanted.family, wanted.n_layers, wanted.kv_width)


@pytest.mark.parametrize("weights", ["tiny:opt-6.7b", "tiny:llama-3-8b", "tiny:smollm2-135m"])
def test_it_computes_numbers_and_the_same_ones_again(weights: str) -> None:
    def logits() -> torch.Tensor:
        checkpoint = replace(find_checkpoint(weights), storage=draw(weights))
        model = SegmentedModel.load(checkpoint, dtype=torch.bfloat16)
        step = Packed(model.architecture, 1, 5, model.dtype, model.device)
        hidden = model.embed(torch.arange(5), step.positions)
        return model.logits(model.run(hidden, 0, model.n_loaded, step))

    once = logits()
    assert torch.isfinite(once).all()
    assert once.float().std() > 0
    assert torch.equal(once, logits())


def test_layers_differ_so_that_no_cache_serves_two() -> None:
    source = draw("tiny:llama-2-7b")
    assert not torch.equal(source.rows("0.qkv", 0, 8), source.rows("1.qkv", 0, 8))


def test_its_stand_in_for_a_tokenizer_covers_the_text() -> None:
    tokenizer = find_checkpoint("tiny:opt-1.3b").tokenizer()
    encoded = tokenizer(TEXT, return_offsets_mapping=True)
    starts, ends = zip(*encoded["offset_mapping"], strict=True)
    assert (starts[0], *ends) == (*starts, len(TEXT))
    assert min(encoded["input_ids"]) >= 3
    assert max(encoded["input_ids"]) < 320


def test_a_shape_that_is_not_known_is_one_message() -> None:
    with pytest.raises(UserError, match=r"random:gpt-5.*known shape: opt-1\.3b"):
        find_checkpoint("random:gpt-5")


@pytest.mark.parametrize("policy", [
    {"policy": "early_exit", "model": "opt-6.7b"},
    {"policy": "static_cap", "model": "opt-6.7b"},
    {"policy": "self_speculation", "model": "opt-1.3b", "exit_layer": 2, "draft_tokens": 3},
    {"policy": "release_early", "model": "opt-1.3b", "fixed_threshold": 0.6},
    {"policy": "helios", "prompts_per_candidate": 2, "round_requests": 6, "window_tokens": 12, "limit": 3},
])  # fmt: skip
def test_live_exits_are_those_of_the_trace_to_the_token(tmp_path, policy) -> None:
    exits = {"opt-1.3b": (1, 2, 4), "opt-6.7b": (2, 4)}
    for name in PAIR:
        write_profile(tiny_profile(f"tiny:{name}", name), tmp_path / "profiles" / f"{name}@{HARDWARE}")
        write_trace(synthetic_trace(name, exits[name], ("text",), chars_per_token=1), tmp_path / "traces" / name)
    (tmp_path / "words.txt").write_text(TEXT)
    config = Config(
        hardware=HARDWARE, models=list(PAIR), profile_folder=str(tmp_path / "profiles"),
        runtime=RuntimeConfig(preset="profile"), exits=ExitsConfig(f"{tmp_path}/traces/{{model}}", 0.6),
        server=ServerConfig(max_running_requests=4, max_batch_tokens=32, memory_utilisation=1.0, block_tokens=8),
        workload=WorkloadConfig(
            n_requests=14, chars_per_token=1.0, arrivals=ArrivalsConfig("closed_loop", users=1),
            lengths=LengthsConfig(prompt=LengthConfig(value=12), output=LengthConfig(value=8)),
            mix=MixConfig({"text": 1.0}),
        ),
        live=LiveConfig(weights={name: f"tiny:{name}" for name in PAIR}, texts=str(tmp_path / "words.txt"), warm_up=1),
    )  # fmt: skip
    config.objective.max_disagreement = 0.5
    runs = [run_job(make_job("arm", policy, replace(config, mode=mode), 0)) for mode in ("live", "simulate")]
    live, simulated = (run.exit_depths for run in runs)
    assert live == simulated
    for metric in ("breach_fraction", "accepted_per_pass", "draft_acceptance", "released_fraction"):
        assert runs[0].replicate.metrics[metric] == runs[1].replicate.metrics[metric]
