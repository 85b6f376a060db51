"""Policies by name, from plain settings, and a user's own from a module outside the project."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from helios_sim.errors import OwnCodeError, UserError
from helios_sim.exits.rule import Confidence
from helios_sim.policy.deployment import BatchingRule, Deployment
from helios_sim.policy.helios import HeliosPolicy
from helios_sim.policy.helios_parameters import Evaluation
from helios_sim.policy.registry import POLICIES, make_policy, parameters_of, policy_config
from policy_example import large, situation, small

NEEDED = {"early_exit": {"threshold": 0.8}, "static_cap": {"threshold": 0.8}, "helios": {"threshold": 0.8}}
NEEDED["helios_probe"] = NEEDED["helios_next"] = NEEDED["helios"]


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("custom", "oracle")])
def test_every_policy_is_made_from_plain_settings_and_starts(name: str) -> None:
    policy = make_policy(name, NEEDED.get(name))
    both = name == "draft_model"  # the small one drafts
    deployment = policy.start(situation(small(), large()) if both else situation(small()))
    assert isinstance(deployment, Deployment)
    assert deployment.active.model == ("large" if both else "small")
    assert deployment.reason


def test_each_call_makes_its_own_state() -> None:
    assert make_policy("helios", NEEDED["helios"]) is not make_policy("helios", NEEDED["helios"])


def test_plain_values_become_the_declared_kinds() -> None:
    settings = {"threshold": 1, "confidence": "margin", "batching": "lazy", "batch_limit": None, "model": "small"}
    parameters = policy_config("early_exit", settings).parameters
    assert parameters.threshold == 1.0
    assert isinstance(parameters.threshold, float)
    assert parameters.confidence is Confidence.MARGIN
    assert parameters.batching is BatchingRule.LAZY


def test_probing_is_helios_with_its_evaluation_fixed() -> None:
    policy = make_policy("helios_probe", {"threshold": 0.8, "prompts_per_candidate": 7})
    assert isinstance(policy, HeliosPolicy)
    assert policy.parameters.evaluation is Evaluation.PROBE
    assert policy.parameters.prompts_per_candidate == 7
    with pytest.raises(UserError, match=r"policy.evaluation='serve'"):
        make_policy("helios_probe", {"threshold": 0.8, "evaluation": "serve"})


@pytest.mark.parametrize(
    ("name", "settings", "key", "allowed"),
    [
        ("helius", {}, "policy", "full_depth"),
        ("full_depth", {"modell": "a"}, "policy.modell", "model, batch_limit"),
        ("early_exit", {}, "policy.threshold", "needs a value"),
        ("early_exit", {"threshold": "high"}, "policy.threshold", "a number"),
        ("early_exit", {"threshold": True}, "policy.threshold", "a number"),
        ("early_exit", {"threshold": 0.5, "batching": "eager"}, "policy.batching", "each_token, lazy"),
        ("full_depth", {"batch_limit": 1.5}, "policy.batch_limit", "a whole number or null"),
        ("full_depth", {"batch_limit": -1}, "policy.batch_limit", "above 0"),
        ("helios", {"threshold": 0.5, "limit": 100}, "policy.limit", "below the window"),
        ("helios", {"threshold": 0.5, "shortlist": 0}, "policy.shortlist", "above 0"),
        ("helios", {"threshold": 0.5, "cooldown_s": -1.0}, "policy.cooldown_s", "0 or more"),
        ("oracle", {"epoch_requests": 0}, "policy.epoch_requests", "above 0"),
    ],
)
def test_wrong_settings_get_one_message_with_the_fix(name: str, settings: dict, key: str, allowed: str) -> None:
    with pytest.raises(UserError) as caught:
        make_policy(name, settings)
    assert caught.value.key == key
    assert allowed in caught.value.allowed
    assert caught.value.fix


def test_every_field_of_every_policy_has_a_kind_that_settings_can_give() -> None:
    for name in POLICIES:
        given = {key: object() for key in parameters_of(name)}
        with pytest.raises(UserError):
            policy_config(name, given)


OWN = """
from helios_sim.exits.rule import FullDepth
from helios_sim.policy.deployment import Deployment, Placement

class Mine:
    def __init__(self, layers=4):
        self.layers = layers
    def start(self, situation):
        return Deployment(Placement(next(iter(situation.candidates)), self.layers), FullDepth())
    def decide(self, cause, telemetry):
        return None

class Half:
    def start(self, situation):
        return None

number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_policy.py").write_text(OWN)
    (tmp_path / "broken_policy.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_policy"
    for name in ("own_policy", "broken_policy"):
        sys.modules.pop(name, None)


def test_a_users_class_is_loaded_with_its_settings(own_module: str) -> None:
    policy = make_policy("custom", {"object": f"{own_module}:Mine", "settings": {"layers": 2}})
    assert policy.start(situation(small())).active.layers == 2


@pytest.mark.parametrize(
    ("value", "settings", "allowed"),
    [
        ("own_policy", {}, "module:Name"),
        ("own_policy:", {}, "module:Name"),
        ("own policy:Mine", {}, "module:Name"),
        ("own_policy:Mine()", {}, "module:Name"),
        ("no_such_module:Mine", {}, "no module no_such_module"),
        ("own_policy.inner:Mine", {}, "no module own_policy.inner"),
        ("own_policy:Yours", {}, "Half, Mine"),
        ("own_policy:Half", {}, "decide(cause, telemetry)"),
        ("own_policy:number", {}, "start(situation)"),
        ("own_policy:Mine", {"depth": 3}, "does not take the settings"),
    ],
)
def test_a_wrong_object_gets_one_message_with_the_fix(
    own_module: str, value: str, settings: dict, allowed: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_policy("custom", {"object": value, "settings": settings})
    assert caught.value.key == "policy.object"
    assert allowed in caught.value.allowed


BROKEN = {
    "import": ("import not_there_at_all", "importing broken_policy raised ModuleNotFoundError: No module named", 1),
    "syntax": ("class Mine:\n    def start(self, situation)\n", "raised SyntaxError: expected ':'", 2),
    "arithmetic": ("\nx = 1 / 0\n", "raised ZeroDivisionError: division by zero", 2),
    "the end of the program": ("import sys\nsys.exit(0)\n", "raised SystemExit: 0", 2),
    "constructor": ("class Mine:\n def __init__(self):\n  raise OSError('no')", "Mine() raised OSError: no", 3),
    "recursion": ("def f():\n    f()\nf()\n", "raised RecursionError", 2),
}


@pytest.mark.parametrize(("text", "said", "line"), BROKEN.values(), ids=BROKEN)
def test_what_a_users_module_raises_is_named_with_its_place(
    own_module: str, tmp_path: Path, text: str, said: str, line: int
) -> None:
    (tmp_path / "broken_policy.py").write_text(text)
    with pytest.raises(OwnCodeError) as caught:
        make_policy("custom", {"object": "broken_policy:Mine"})
    assert said in caught.value.allowed
    assert f"broken_policy.py, line {line}" in caught.value.allowed
    assert "\n" not in str(caught.value)
    assert type(caught.value.__cause__).__name__ in caught.value.allowed


@pytest.mark.parametrize(
    ("method", "body", "said"),
    [
        ("start", "return situation.candidates['nope']", "start() raised KeyError: 'nope'"),
        ("decide", "raise ValueError('one\\ntwo')", "decide() raised ValueError: one two"),
        ("decide", "assert False", "decide() raised AssertionError ("),
        ("decide", "import sys; sys.exit()", "decide() raised SystemExit ("),
        ("decide", "telemetry.running_requests = 3", "decide() raised FrozenInstanceError"),
    ],
)
def test_what_a_users_methods_raise_is_named_with_its_place(
    own_module: str, tmp_path: Path, method: str, body: str, said: str
) -> None:
    arguments = {"start": "self, situation", "decide": "self, cause, telemetry"}
    mine = [f"    def {name}({given}): {body if name == method else 'pass'}" for name, given in arguments.items()]
    (tmp_path / "broken_policy.py").write_text("\n".join(["class Mine:", *mine, ""]))
    policy = make_policy("custom", {"object": "broken_policy:Mine"})
    with pytest.raises(OwnCodeError) as caught:
        policy.start(situation(small())) if method == "start" else policy.decide(None, Frozen(1))
    assert said in caught.value.allowed
    assert f"broken_policy.py, line {2 if method == 'start' else 3}, in {method})" in caught.value.allowed


@dataclass(frozen=True)
class Frozen:
    running_requests: int


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, BrokenPipeError])
def test_signals_and_what_the_machine_does_not_give_pass(own_module: str, tmp_path: Path, kind: type) -> None:
    (tmp_path / "broken_policy.py").write_text(f"raise {kind.__name__}")
    with pytest.raises(kind):
        make_policy("custom", {"object": "broken_policy:Mine"})
