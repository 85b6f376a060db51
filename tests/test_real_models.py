"""The measured models as they are shipped: whole, measured, lined up by characters, and usable without torch."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from helios_sim.config import register
from helios_sim.exits.replay import joint_exits
from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.exits.store import load_trace
from helios_sim.exits.trace import ExitTrace
from helios_sim.help import conf_folder
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import load_profile
from helios_sim.provenance import ProvenanceClass


@cache
def settings() -> dict:
    register()
    with initialize_config_dir(conf_folder(), version_base=None):
        found = OmegaConf.to_container(compose("config", overrides=["+experiment=real_models"]))
    assert isinstance(found, dict)
    return found


MODELS = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b")


@cache
def trace(model: str) -> ExitTrace:
    return load_trace(model, "reference")


@cache
def profile(model: str) -> Profile:
    return load_profile(f"{model}@{settings()['hardware']}")


def test_the_experiment_is_about_these_models() -> None:
    assert tuple(settings()["models"]) == MODELS
    assert settings()["exits"]["source"] == "reference"


@pytest.mark.parametrize("model", MODELS)
def test_everything_was_measured_and_says_how(model: str) -> None:
    for provenance in (trace(model).provenance, profile(model).provenance):
        assert provenance.provenance_class is ProvenanceClass.MEASURED
        assert provenance.command


@pytest.mark.parametrize("model", MODELS)
def test_trace_and_profile_fit_together_and_have_what_the_arms_ask_for(model: str) -> None:
    assert trace(model).n_layers == profile(model).model.n_layers
    assert trace(model).n_tokens >= 50_000
    assert trace(model).human_text
    for confidence in (Confidence.MAX_PROBABILITY, Confidence.CLASSIFIER):
        leaves_early = trace(model).confident_at(0.6, confidence)[:, :-1].any(axis=1)
        assert 0 < leaves_early.mean() < 1
        table = profile(model).check_table(confidence)
        assert (table.time_s > 0).all()


@pytest.mark.parametrize("model", MODELS)
def test_full_depth_predicts_best_and_prose_is_harder_than_code(model: str) -> None:
    here = trace(model)
    by_exit = here.bits.sum(axis=0) / here.chars.sum()
    assert by_exit.argmin() == len(here.exits) - 1
    full = [
        here.bits[a:b, -1].sum() / here.chars[a:b].sum()
        for a, b in zip(here.task_first[:-1], here.task_first[1:], strict=True)
    ]
    per_task = dict(zip(here.tasks, full, strict=True))
    assert per_task["code"] < per_task["news"]


def test_the_same_characters_in_every_model() -> None:
    first = trace(MODELS[0])
    for model in MODELS[1:]:
        assert trace(model).tasks == first.tasks
        assert np.array_equal(trace(model).task_chars(), first.task_chars())
        joint = joint_exits(first, PerToken(0.9), trace(model), PerToken(0.9))
        assert joint.share.sum() == pytest.approx(1.0)
    assert {*settings()["workload"]["mix"]["tasks"], *settings()["workload"]["mix"]["after"]} <= set(first.tasks)


def test_the_coder_is_best_on_code_and_not_on_prose() -> None:
    """What could make switching worth while at all."""

    def bits(model: str, task: str) -> float:
        here = trace(model)
        rows = slice(*here.task_first[here.tasks.index(task) :][:2])
        return float(here.bits[rows, -1].sum() / here.chars[rows].sum())

    assert min(MODELS, key=lambda model: bits(model, "humaneval")) == "qwen2.5-coder-0.5b"
    assert max(MODELS, key=lambda model: bits(model, "news")) == "qwen2.5-coder-0.5b"


@pytest.mark.slow
def test_a_run_of_it_loads_no_torch() -> None:
    code = (
        "import sys; from helios_sim.study.build import build; from helios_sim.study.schema import *; "
        f"build(Config(hardware={settings()['hardware']!r}, models={list(MODELS)!r}, "
        "runtime=RuntimeConfig('profile'), exits=ExitsConfig('reference'), workload=WorkloadConfig(n_requests=3, "
        "arrivals=ArrivalsConfig('all_at_once'), lengths=LengthsConfig(prompt=LengthConfig(value=9), "
        "output=LengthConfig(value=9)), mix=MixConfig({'code': 1.0}))), 0); "
        "sys.exit(bool({'torch', 'transformers', 'gguf', 'safetensors'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
