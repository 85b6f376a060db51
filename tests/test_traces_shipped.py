"""The shipped traces and heads of real models: large enough, of the same texts, with what others rely on."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest

from helios_sim.errors import UserError
from helios_sim.exits.replay import joint_exits
from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.exits.store import SHIPPED, load_trace
from helios_sim.provenance import ProvenanceClass

MODELS = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b")
HEADS = SHIPPED.parent / "exit_heads"


@pytest.mark.parametrize("model", MODELS)
def test_a_reference_trace_is_measured_on_human_text_of_many_tasks(model: str) -> None:
    trace = load_trace(model, "reference")
    assert trace.n_tokens >= 50_000
    assert len(trace.tasks) >= 10
    assert trace.human_text
    assert trace.provenance.provenance_class is ProvenanceClass.MEASURED
    assert trace.bits is not None
    assert trace.agree[:, -1].all()
    assert (np.diff(trace.agree.mean(axis=0)) > 0).all()  # deeper exits agree more often


@pytest.mark.parametrize("confidence", list(Confidence))
def test_surer_tokens_agree_more_often_by_every_measure(confidence: Confidence) -> None:
    """The states of neighbouring layers tell nothing at the first two exits."""
    trace = load_trace("smollm2-135m", "predictors" if confidence is Confidence.PREDICTOR else "reference")
    for e in range(2 if confidence is Confidence.HIDDEN_SIMILARITY else 0, len(trace.exits) - 1):
        order = np.argsort(trace.recorded(confidence)[:, e], kind="stable")
        unsure, sure = trace.agree[order[: trace.n_tokens // 4], e], trace.agree[order[-trace.n_tokens // 4 :], e]
        assert sure.mean() > unsure.mean()


def test_heads_are_asked_in_vain_only_after_the_exit_that_proposes_the_words() -> None:
    trace = load_trace("smollm2-135m", "predictors")
    assert trace.exits == load_trace("smollm2-135m", "reference").exits
    in_vain = (trace.recorded(Confidence.PREDICTOR) <= -0.5).mean(axis=0)
    assert in_vain[0] == 0
    assert in_vain[1] < in_vain[2] < 0.1
    assert in_vain[-1] == 0


def test_a_trace_without_a_measure_names_those_that_it_holds() -> None:
    with pytest.raises(UserError, match=r"exits.confidence='entropy': .*recorded: max_probability, margin, classifier"):
        load_trace("gemma3-270m", "reference").confident_at(0.9, Confidence.ENTROPY)


@pytest.mark.parametrize(("first", "second"), list(combinations(MODELS, 2)))
def test_reference_traces_line_up_by_characters(first: str, second: str) -> None:
    a, b = load_trace(first, "reference"), load_trace(second, "reference")
    for trace in (a, b):
        assert trace.prompt[-1] + 1 == len(np.unique(trace.prompt))
    chars = [np.bincount(t.prompt, weights=t.chars) for t in (a, b)]
    assert np.array_equal(*chars)  # passage by passage
    rule = PerToken(0.6, Confidence.CLASSIFIER)
    assert joint_exits(a, rule, b, rule).share.sum() == pytest.approx(1)


@pytest.mark.parametrize("model", MODELS)
def test_a_generated_trace_is_no_human_text_and_has_the_same_exits(model: str) -> None:
    trace = load_trace(model, "generated")
    assert not trace.human_text
    assert trace.n_tokens >= 1_000
    assert trace.exits == load_trace(model, "reference").exits


def test_a_joint_trace_of_a_measured_pair_is_shipped() -> None:
    large, small = "qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"
    trace = load_trace(large, "generated")
    assert trace.provenance.provenance_class is ProvenanceClass.MEASURED
    assert trace.n_tokens >= 5_000
    assert set(trace.drafters) == set(trace.drafters_sure) == {small}
    assert set(trace.tasks) <= set(load_trace(small, "generated").tasks)
    assert sum(path.stat().st_size for path in (SHIPPED / f"{large}@generated").iterdir()) < 1_000_000
    quarters = np.array_split(np.argsort(trace.drafters_sure[small], kind="stable"), 4)
    right = [trace.drafted_by(small)[rows].mean() for rows in quarters]
    assert right == sorted(right)  # the surer, the more often right
    assert right[3] > 0.95 > 0.7 > right[0]


@pytest.mark.parametrize("model", MODELS)
def test_shipped_heads_are_small_and_belong_to_the_traces(model: str) -> None:
    header = json.loads((HEADS / model / "heads.json").read_text())
    assert sum(path.stat().st_size for path in (HEADS / model).iterdir()) < 10_000_000
    trace = load_trace(model, "reference")
    assert trace.exits == (*header["exits"], header["architecture"]["n_layers"])
    for exit_ in header["calibration"].values():
        assert exit_["check_after"] < 0.05
    assert {"command", "data", "licence"} <= header["training"].keys()


def test_smollm2_saves_more_than_it_asks_on_every_kind_of_text() -> None:
    from calibrate.exits.reliability import at_agreement
    from calibrate.exits.texts import domain_of

    trace = load_trace("smollm2-135m", "reference")
    costs = json.loads((HEADS / "smollm2-135m" / "heads.json").read_text())["curves"]
    domain = np.array([domain_of(task) for task in trace.tasks])[trace.task]
    gross_of_plain_heads = {"prose": 2.43, "code": 3.07, "dialogue": 3.19}  # experiments/exit_heads/trial.json
    for name, plain in gross_of_plain_heads.items():
        mine = domain == name
        sure = trace.recorded(Confidence.CLASSIFIER)[mine]
        at = at_agreement(sure, trace.agree[mine], trace.exits, 0.95, costs["check_layers"], costs["leave_layers"])
        assert at.saved_net > 1.6 * plain
