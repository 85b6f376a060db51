"""What a user's policy returns is checked at the door: one message that names the field, and never a traceback."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from command_line import CommandLine
from helios_sim import (
    AtTime,
    BatchingRule,
    BreachLimit,
    Completed,
    Deployment,
    FixedCap,
    FullDepth,
    InFlight,
    KvRule,
    PerToken,
    Placement,
    PowerAbove,
    Probe,
    Probed,
    QueueAbove,
    SloBelow,
    UserError,
)
from helios_sim.policy.answers import fault_of
from helios_sim.policy.custom import CustomParameters, load_custom
from helios_sim.request import Slo
from policy_example import situation

SITUATION = replace(situation(), slo=Slo(ttft_s=1.0), power_w=(60.0, 400.0))
FULL = Deployment(Placement("small", 4), FullDepth(), kv_rule=KvRule.NONE)


class Own:
    """No rule of ours, however much it looks like one."""

    threshold = 0.5

    def __repr__(self) -> str:
        raise ValueError("no text")


JUNK = (None, 0, -1, 10**20, 3.5, float("nan"), "x", b"x", (), [], {}, object(), Own(), True, Own, (1, 2), [None])
# Where a value of the list above is what the field may hold.
FITS: dict[str, tuple[Any, ...]] = {
    "standby": ((),), "batch_limit": (None,), "admit_limit": (None, 0), "observe_tokens": (None, 0),
    "run_layers": (None,), "probe": (None,), "plan": (None,), "triggers": ((),), "reason": ("x",), "evidence": ({},),
    "instant": (), "active": (), "exit_rule": (), "batching": (), "kv_rule": (), "in_flight": (),
}  # fmt: skip


class Answers:
    def __init__(self, start: object = FULL, decide: object = None) -> None:
        self.answers = start, decide

    def start(self, situation: Any) -> Any:
        return self.answers[0]

    def decide(self, cause: Any, telemetry: Any) -> Any:
        return self.answers[1]


def wrapped(monkeypatch: pytest.MonkeyPatch, **answers: object) -> Any:
    monkeypatch.setattr(f"{__name__}.made", Answers(**answers), raising=False)
    return load_custom(CustomParameters(f"{__name__}:made"))


@pytest.mark.parametrize("name", sorted(FITS))
def test_every_field_is_checked(name: str) -> None:
    """16 fields and 17 values: 272 deployments."""
    for value in JUNK:
        found = fault_of(replace(FULL, **{name: value}), SITUATION)
        if any(value is fit or (type(value) is type(fit) and value == fit) for fit in FITS[name]):
            assert found is None, (name, value)
        else:
            assert found is not None, (name, value)
            assert found[0] == name


def nested(value: Any) -> list[tuple[str, Deployment]]:
    return [
        ("active", replace(FULL, active=Placement(value, 4))),
        ("active", replace(FULL, active=Placement("small", value))),
        ("standby", replace(FULL, standby=(value,))),
        ("standby", replace(FULL, standby=(Placement("large", value),))),
        ("exit_rule", replace(FULL, exit_rule=FixedCap(value))),
        ("exit_rule", replace(FULL, exit_rule=PerToken(0.5, value), kv_rule=KvRule.PROPAGATE)),
        ("probe", replace(FULL, probe=Probe(value, 3))),
        ("probe", replace(FULL, probe=Probe((value,), 3))),
        ("probe", replace(FULL, probe=Probe(("small",), value))),
        ("triggers", replace(FULL, triggers=(value,))),
        ("triggers", replace(FULL, triggers=(BreachLimit(value, 3),))),
        ("triggers", replace(FULL, triggers=(Completed(3), QueueAbove(value)))),
        ("triggers", replace(FULL, triggers=(AtTime(value),))),
        ("triggers", replace(FULL, triggers=(SloBelow(value),))),
        ("triggers", replace(FULL, triggers=(SloBelow(0.9, value),))),
        ("triggers", replace(FULL, triggers=(PowerAbove(value),))),
        ("triggers", replace(FULL, triggers=(PowerAbove(100.0, value),))),
        ("evidence", replace(FULL, evidence={"a": value})),
    ]


@pytest.mark.parametrize("place", range(len(nested(None))))
def test_so_is_what_the_fields_hold(place: int) -> None:
    """18 places and 17 values: 306 deployments, of which a few are right."""
    right = 0
    for value in JUNK:
        name, deployment = nested(value)[place]
        found = fault_of(deployment, SITUATION)
        right += found is None
        assert found is None or found[0] == name
    assert right <= (12 if nested(None)[place][0] == "evidence" else 1)  # 0 waiting, from time 0, a threshold of 0


triggers = st.lists(
    st.one_of(
        st.builds(Completed, st.integers(1, 9)), st.builds(AtTime, st.integers(0, 10**12)),
        st.builds(QueueAbove, st.integers(0, 9)), st.builds(BreachLimit, st.integers(1, 99), st.integers(0, 99)),
        st.builds(SloBelow, st.floats(0, 1), st.integers(1, 99)),
        st.builds(PowerAbove, st.floats(60, 399), st.floats(0.1, 50)),
    ),
    max_size=3,
).map(tuple)  # fmt: skip
placements = st.sampled_from([Placement("small", 2), Placement("small", 4), Placement("large", 8)])
right = st.builds(
    Deployment,
    placements,
    st.one_of(st.just(FullDepth()), st.builds(FixedCap, st.floats(0, 1)), st.builds(PerToken, st.floats(0, 2))),
    standby=st.lists(placements, max_size=1).map(tuple),
    batching=st.sampled_from([BatchingRule.EACH_TOKEN, BatchingRule.LAZY]),
    kv_rule=st.sampled_from([KvRule.PROPAGATE, KvRule.RECOMPUTE]),
    batch_limit=st.none() | st.integers(1, 99),
    in_flight=st.sampled_from(InFlight),
    admit_limit=st.none() | st.integers(0, 99),
    observe_tokens=st.none() | st.integers(0, 99),
    triggers=triggers,
    evidence=st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False, allow_infinity=False), max_size=2),
)


@pytest.mark.slow
@settings(max_examples=200)
@given(right)
def test_whatever_the_server_can_carry_out_passes(deployment: Deployment) -> None:
    assert fault_of(deployment, SITUATION) is None


def test_probed_needs_a_probe() -> None:
    assert fault_of(replace(FULL, triggers=(Probed(),)), SITUATION) is not None
    assert fault_of(replace(FULL, triggers=(Probed(),), probe=Probe(("large",), 2)), SITUATION) is None


@pytest.mark.parametrize("answer", [None, 5, "opt", Own(), Deployment])
def test_start_returns_a_deployment(monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    with pytest.raises(UserError, match=r"start\(\) returned .* Fix: return one from start"):
        wrapped(monkeypatch, start=answer).start(SITUATION)


def test_decide_returns_one_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = wrapped(monkeypatch, decide=replace(FULL, exit_rule=Own()))
    assert policy.start(SITUATION) is FULL
    with pytest.raises(UserError, match=r"decide\(\) returned .* exit_rule=a Own, which must be FullDepth"):
        policy.decide(None, None)


def test_numbers_of_numpy_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    active = replace(FULL.active, layers=np.int64(FULL.active.layers))
    with pytest.raises(UserError, match=r"Fix: correct active, with int\(\) or float\(\) around what NumPy gives"):
        wrapped(monkeypatch, start=replace(FULL, active=active)).start(SITUATION)


def test_what_is_drawn_follows_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(seed: int) -> tuple[float, float]:
        wrapped(monkeypatch, start=FULL).start(replace(SITUATION, seed=seed))
        return random.random(), float(np.random.rand())  # noqa: NPY002 - as policies do

    assert drawn(3) == drawn(3) != drawn(4)


POLICY = """
from helios_sim import *
class Rule:
    def __init__(self): self.threshold = 0.5
class Mine:
    def start(self, situation):
        return {answer}
    def decide(self, cause, telemetry):
        return None
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("None", "start() returned None"),
        ("Deployment(Placement('opt-1.3b', 24), Rule())", "the server knows no other exit rule"),
        ("Deployment(Placement('opt-1.3b', 7), FullDepth())", "layers 6, 12, 24 of opt-1.3b"),
        ("Deployment(Placement('opt-2', 24), FullDepth())", "a model among opt-1.3b, opt-6.7b"),
    ],
)
def test_the_command_line_says_it_in_one_line(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch, answer: str, words: str
) -> None:
    monkeypatch.syspath_prepend(command.folder)
    name = f"policy_{abs(hash(answer))}"
    Path(command.folder / f"{name}.py").write_text(POLICY.format(answer=answer))
    said = command("policy=custom", f"policy.object={name}:Mine", "workload.n_requests=4", "pictures=false")
    assert said.status == 1
    assert words in said.err.splitlines()[-1]
    assert "Traceback" not in said.err


class Unspeakable:
    def __str__(self) -> str:
        raise ValueError("no text")


def raising(error: BaseException) -> Any:
    def method(self: Any, *given: Any) -> Any:
        raise error

    return method


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (raising(Exception(Unspeakable())), "start() raised Exception"),
        (raising(GeneratorExit()), "start() raised GeneratorExit"),
        (property(raising(ZeroDivisionError())), "P.start or P.decide raised ZeroDivisionError"),
        (lambda self, one, more: FULL, "test_policy_answers.py, line "),
        (lambda self, one: object.__new__(Deployment), "active=None"),
    ],
)
def test_what_cannot_even_be_told_is_one_message(start: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.P", type("P", (), {"start": start, "decide": print}), raising=False)
    with pytest.raises(UserError) as error:
        load_custom(CustomParameters(f"{__name__}:P")).start(SITUATION)
    assert part in str(error.value)
    assert "custom.py" not in str(error.value)
