"""Each setting of a policy in conf/policy changes a result at test size, or is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from helios_sim import UserError, study_config
from helios_sim.help import conf_folder
from helios_sim.study.effects import OF_POLICIES, check_effect
from helios_sim.study.schema import Config
from test_settings_count import outcome

pytestmark = pytest.mark.slow
POLICIES = Path(conf_folder(), "policy")
OF_ALL = {"threshold": 0.6, "confidence": "margin", "batch_limit": 2}  # in a study with measured exits
OF_ONE_MODEL = {**OF_ALL, "model": "gemma3-270m"}
LATE = {"resident_layers": 20}
CHECKS = {"checkpoints": [8, 24], "most_checks": 1}
NEAR = {"near_tokens": 3, "near_layers": 16}
OF_SPLITS = {"flush_requests": 1, "flush_s": 1e-6, "review_requests": 10}
OF_HELIOS = {
    "threshold": 0.6, "confidence": "margin", "constants": "batch_scaled", "on_breach": "load_only", "standby": "caps",
    "raised": "early_exit", "in_flight": "migrate", "shortlist": 1, "prompts_per_candidate": 2, "evaluated_tokens": 5,
    "round_requests": 40, "window_tokens": 60, "limit": 5, "cooldown_s": 20.0, "half_life_requests": 20.0,
    "cap_layers": 24, "batch_limit": 2, "evaluation": "off", "raised_kv_rule": "recompute",
}  # fmt: skip
VALUES: dict[str, dict[str, Any]] = {
    "full_depth": {"model": "gemma3-270m", "batch_limit": 2, **LATE},
    "early_exit": {**OF_ONE_MODEL, **LATE, **CHECKS, **NEAR, "batching": "lazy", "kv_rule": "recompute", **OF_SPLITS},
    "early_exit_lazy": {**OF_ONE_MODEL, **LATE, **CHECKS, "batching": "each_token", "kv_rule": "recompute"},
    "early_exit_rebatch": {**OF_ONE_MODEL, **LATE, **CHECKS, "batching": "lazy", "kv_rule": "recompute", **OF_SPLITS},
    "static_cap": {**OF_ONE_MODEL, "cap_layers": 24},
    "release_early": {
        "max_disagreement": 0.2, "ramps": 1, "review_requests": 7, "window_tokens": 400, "fixed_threshold": 0.6,
        "confidence": "margin", "batch_limit": 2, "model": "gemma3-270m",
    },
    "self_speculation": {
        "draft_tokens": 2, "exit_layer": 24, "largest_batch": 1, "review_requests": 10, "batch_limit": 2,
        "model": "gemma3-270m", **LATE,
    },
    "draft_model": {
        "draft_tokens": 2, "largest_batch": 1, "batch_limit": 2, "drafter": "opt-6.7b", "model": "opt-1.3b",
        "review_requests": 10, "drafter_on": "pipelined", "exchange_s": 0.01, "fused_with": "[opt-1.3b]",
    },
    "oracle": {"batch_limit": 1, "epoch_requests": 200},
    "helios": OF_HELIOS,
    "helios_probe": {key: value for key, value in OF_HELIOS.items() if key != "evaluation"},
    "helios_next": {
        **OF_ALL, "failure": 0.9, "probe_share": 0.2, "review_requests": 20, "horizon_requests": 1,
        "least_gain": 0.9, "draft_tokens": 2, "half_life_requests": 20.0, "in_flight": "migrate",
    },
}  # fmt: skip
REFUSED = {
    ("draft_model", "drafter"), ("draft_model", "model"),  # the same model, and a smaller one than the drafter
    ("draft_model", "fused_with"),  # on the model's card: test_draft_fusion
    ("early_exit_lazy", "kv_rule"), ("helios", "raised_kv_rule"), ("helios_probe", "raised_kv_rule"),
    ("helios_probe", "evaluated_tokens"),
    ("early_exit", "near_layers"), ("early_exit", "near_tokens"),  # without exits that always check: test_predictors
    *(("early_exit", setting) for setting in OF_SPLITS),
}  # fmt: skip
# Probes that are often enough to hear and to change something within few requests.
NEXT = ("objective.max_disagreement=0.3", "policy.probe_share=0.1", "policy.review_requests=10")
_AT_THE_LIMIT = ("objective.max_disagreement=0.04", "policy.probe_share=0.3", "policy.review_requests=4")
NEXT_AT = {
    "draft_tokens": ("quickstart", ("objective.max_disagreement=0.02",)),
    "failure": ("quickstart", _AT_THE_LIMIT),
    "least_gain": (
        "real_models", ("policy.probe_share=0.1", "policy.review_requests=10", "policy.half_life_requests=20"),
    ),
}  # fmt: skip
MEASURED = ("threshold", "confidence")  # published exits have one of each
ELSEWHERE = {("oracle", "epoch_requests")}  # where models share the requests: test_policy_oracle


@dataclass(frozen=True)
class Study:
    policy: str
    experiment: str
    words: tuple[str, ...] = ()

    def config(self, *more: str) -> Config:
        requests = 200 if self.experiment == "real_models" else 300
        words = (f"workload.n_requests={requests}", f"policy={self.policy}", *self.words, *more)
        empty: dict[str, Any] = {"sweeps": [], "figures": [], "published": [], "gates": [], "arms": {}, "subject": None}
        return replace(study_config(self.experiment, *words), **empty, baseline="", seeds=[0])


def study(policy: str, setting: str) -> Study:
    if policy == "helios_next":
        return Study(policy, *NEXT_AT.get(setting, ("real_models", NEXT)))
    if policy == "draft_model":
        stated = "+exits.parameters.drafted=0.7"
        pair = ("policy.drafter=opt-1.3b", "policy.model=opt-6.7b")
        if setting in ("drafter_on", "exchange_s"):
            pair = (*pair, "policy.drafter_on=own", "policy.exchange_s=0.0001")
        return Study(policy, "quickstart", ("exits.source=stated", stated, *pair))
    if policy.startswith("helios") and setting == "cap_layers":
        return Study(policy, "real_models", ("models=[smollm2-135m]",))
    if policy.startswith("helios"):
        return Study(policy, "real_models" if setting in MEASURED else "quickstart")
    one_model = () if policy == "oracle" else ("policy.model=smollm2-135m",)
    return Study(policy, "real_models", one_model)


@cache
def before(of: Study) -> str:
    return outcome(of.config())


def cases() -> list[tuple[str, str]]:
    return [(policy, setting) for policy, of in VALUES.items() for setting in of if (policy, setting) not in ELSEWHERE]


def test_every_setting_of_every_policy_is_tried() -> None:
    """Variants of HELIOS have its settings, with one that says which they are."""
    files = {path.stem: yaml.safe_load(path.read_text()) for path in POLICIES.glob("*.yaml")}
    variants = {name for name, settings in files.items() if "helios" in settings.get("defaults", [])}
    assert set(files) - variants - {"custom", "none"} == set(VALUES)
    for name, values in VALUES.items():
        if "defaults" not in files[name]:
            assert set(values) == set(files[name]) - {"name", "arm"}
    shared = yaml.safe_load(Path(conf_folder(), "helios", "settings.yaml").read_text())
    assert set(OF_HELIOS) == {*shared, "evaluation"}


@pytest.mark.parametrize(("policy", "setting"), cases())
def test_it_changes_a_result_or_is_refused(policy: str, setting: str) -> None:
    of, word = study(policy, setting), f"policy.{setting}={VALUES[policy][setting]}"
    if (policy, setting) in REFUSED:
        with pytest.raises(UserError):
            served(of, word)
    else:
        assert served(of, word) != before(of)


def served(of: Study, word: str) -> str:
    config = of.config(word)
    check_effect(config, [word])
    return outcome(config)


@pytest.mark.parametrize(
    "words",
    [
        ("policy=helios", "policy.evaluation=off", "policy.half_life_requests=9"),
        ("policy=helios", "policy.evaluation=off", "policy.prompts_per_candidate=9"),
        ("arms.helios.raised_kv_rule=recompute",), ("arms.helios.evaluation=off", "arms.helios.evaluated_tokens=3"),
    ],
)
def test_what_does_nothing_is_refused_in_arms_too(words: tuple[str, ...]) -> None:
    added = tuple(word if word.startswith("policy") else f"+{word}" for word in words)
    with pytest.raises(UserError, match="does nothing here"):
        check_effect(study_config("quickstart", *added), added)
    assert {word.split("=")[0].split(".")[-1] for word in words} & set(OF_POLICIES)
