"""The policies' files in conf/policy: complete, true to the code's defaults, and ready to be added as an arm."""

from __future__ import annotations

from dataclasses import MISSING, fields
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from helios_sim.config import register
from helios_sim.errors import UserError
from helios_sim.help import conf_folder
from helios_sim.policy.registry import POLICIES, VARIANTS, policy_config
from helios_sim.policy.telemetry import Goal
from helios_sim.profile.runtimes import PRESETS
from helios_sim.study.build import PROFILE_RUNTIME
from helios_sim.study.plan import entries_of, jobs_of
from helios_sim.study.schema import Config

CONF = Path(conf_folder())
FILES = sorted(path.stem for path in (CONF / "policy").glob("*.yaml"))


@cache
def composed(name: str) -> dict[str, Any]:
    """With what the file builds on."""
    register()
    with initialize_config_dir(str(CONF), version_base=None):
        settings = OmegaConf.to_container(compose("config", overrides=[f"policy={name}"]).policy)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


SHIPPED = [name for name in FILES if name != "none"]


_NEAR = {"near_tokens", "near_layers"}  # which need batching=each_token
REFUSED = {  # the others of early_exit_lazy need batching=rebatch
    "early_exit_lazy": {"flush_requests", "flush_s", "review_requests", *_NEAR}, "early_exit_rebatch": _NEAR,
}  # fmt: skip


def test_every_policy_has_a_file():
    assert set(SHIPPED) == set(POLICIES) | set(VARIANTS)


@pytest.mark.parametrize("file", SHIPPED)
def test_a_file_lists_the_policys_parameters_with_their_defaults(file):
    settings = {key: value for key, value in composed(file).items() if key not in ("name", "arm")}
    kind = POLICIES[composed(file)["name"]]
    parameters = {f.name: f for f in fields(kind.parameters) if f.name not in kind.fixed}
    assert set(settings) == set(parameters) - REFUSED.get(file, set())
    variant = VARIANTS[file][1] if file in VARIANTS else {}
    for key, f in parameters.items():
        if key in REFUSED.get(file, ()):
            continue
        if key in ("threshold", "confidence"):
            assert settings[key] is None
        elif key in variant:
            assert settings[key] == variant[key]
        elif f.default is MISSING and f.default_factory is MISSING:
            assert settings[key] == "???"
        else:
            default = f.default if f.default is not MISSING else f.default_factory()
            assert settings[key] == (default.value if isinstance(default, Enum) else default)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_an_arm_may_name_a_variant(name):
    base, own = VARIANTS[name]
    same = policy_config(base, {"threshold": 0.9, **own})
    assert policy_config(name, {"threshold": 0.9}) == same
    assert policy_config(name, {"threshold": 0.9, **own}) == same
    (key,) = own
    with pytest.raises(UserError, match=f"{name} is {base} with {key}"):
        policy_config(name, {"threshold": 0.9, key: "cheaper"})
    jobs = [jobs_of(Config(arms={"mine": entry}), "mine") for entry in ({"policy": name}, {"policy": base, **own})]
    assert jobs[0][0].arm == jobs[1][0].arm


@pytest.mark.parametrize("file", sorted(set(SHIPPED) - {"custom"}))
def test_a_file_makes_an_arm_of_its_own_name_that_the_policy_accepts(file):
    config = Config(policy=composed(file))
    assert list(entries_of(config)) == [file]
    (job,) = jobs_of(config, file)
    assert (job.arm.name, job.arm.policy.name) == (file, composed(file)["name"])
    told = {"threshold", *(VARIANTS[file][1] if file in VARIANTS else [])}
    assert set(job.arm.policy.told()) <= told


@pytest.mark.parametrize("group", ["policy", "objective", "runtime", "engine", "workload", "experiment"])
def test_every_file_says_what_it_is(group):
    for path in (CONF / group).glob("*.yaml"):
        assert path.read_text().startswith("# "), path


def test_objectives_and_runtimes_have_a_file_each():
    assert {path.stem for path in (CONF / "objective").glob("*.yaml")} == {goal.value for goal in Goal}
    runtimes = {path.stem for path in (CONF / "runtime").glob("*.yaml")}
    engines = {path.stem for path in (CONF / "engine").glob("*.yaml")}  # with the settings of the server
    assert runtimes | engines == {*PRESETS, PROFILE_RUNTIME}


def test_an_added_arm_is_called_by_its_model_and_leaves_others_alone():
    settings = {"name": "full_depth", "model": "opt-1.3b"}
    assert list(entries_of(Config(policy=settings))) == ["full_depth_opt-1.3b"]
    own = {"policy": "helios", "constants": "batch_scaled"}
    arms = entries_of(Config(arms={"helios": own}, policy={"name": "helios", "round_requests": 50}))
    assert arms == {"helios": own, "helios_added": {"policy": "helios", "round_requests": 50}}


def test_settings_without_a_policys_name_are_no_arm():
    with pytest.raises(UserError, match="must have a name"):
        entries_of(Config(policy={"round_requests": 50}))
