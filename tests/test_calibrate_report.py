"""The calibration's page: its numbers follow from the trace, and it stands alone."""

from __future__ import annotations

import re

import numpy as np
import pytest

from calibrate.exits.reliability import BINS, exit_statistics, joint_of_pairs, measures, probabilities, reliability
from calibrate.report.exits import exit_sections, exit_summary
from calibrate.report.page import Highlight, Page, Table, render
from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.rule import Confidence
from helios_sim.exits.trace import ExitTrace
from helios_sim.provenance import Provenance, ProvenanceClass
from helios_sim.report.figures.style import lay_out

MEASURED = Provenance(ProvenanceClass.MEASURED, "written by hand", "a test")


def trace_by_hand() -> ExitTrace:
    """Two tasks of four tokens, exits after layers 2 and 6."""
    confidence = [0.95, 0.95, 0.40, 0.40, 0.95, 0.95, 0.95, 0.20]
    agree = [True, True, False, True, True, False, True, False]
    return ExitTrace(
        model="hand",
        exits=(2, 6),
        tasks=("prose", "code"),
        task=np.array([0] * 4 + [1] * 4, dtype=np.int32),
        prompt=np.array([0] * 4 + [1] * 4, dtype=np.int32),
        chars=np.full(8, 5, dtype=np.int32),
        agree=np.array([[a, True] for a in agree]),
        provenance=MEASURED,
        confidences={Confidence.MAX_PROBABILITY: np.array([[c, 1.0] for c in confidence], dtype=np.float32)},
        bits=np.full((8, 2), 10.0, dtype=np.float32),
        human_text=True,
    )


def test_statistics_of_a_trace_that_can_be_counted_by_hand() -> None:
    s = exit_statistics(trace_by_hand(), 0.9, Confidence.MAX_PROBABILITY)
    assert s.tokens.tolist() == [4, 4]
    assert s.exit_share.tolist() == [[0.5, 0.5], [0.75, 0.25]]
    assert s.layers_per_token.tolist() == [4.0, 3.0]  # (2 + 2 + 6 + 6) / 4 and (2 + 2 + 2 + 6) / 4
    assert s.unchanged.tolist() == [[0.75, 1.0], [0.5, 1.0]]
    assert s.agreement.tolist() == [1.0, 0.75]  # of the five that leave, one differs: it is in code
    assert s.bits_per_char is not None
    assert s.bits_per_char.tolist() == [2.0, 2.0]
    (curve,) = s.reliability
    assert curve.tokens.tolist() == [1, 2, 5]
    assert curve.agreement.tolist() == [0.0, 0.5, 0.8]
    # gaps 0.20, 0.10 and 0.15, weighted with 1, 2 and 5 of 8 tokens
    assert curve.ece == pytest.approx((0.20 * 1 + 0.10 * 2 + 0.15 * 5) / 8)


def test_a_higher_threshold_never_lets_more_out() -> None:
    s = exit_statistics(synthetic_trace(tasks=("a", "b")), 0.9, Confidence.CLASSIFIER)
    left = [point.left_early for point in s.sweep]
    assert left == sorted(left, reverse=True)
    assert len({round(x, 3) for x in left}) > 3


def test_a_confidence_that_tells_the_truth_has_no_calibration_error() -> None:
    rng = np.random.default_rng(1)
    told = rng.uniform(size=200_000)
    truth = reliability(told.astype(np.float32), rng.uniform(size=told.size) < told)
    boast = reliability(np.full(1000, 0.9, dtype=np.float32), np.arange(1000) < 600)
    assert truth.ece < 0.01
    assert len(truth.tokens) == BINS
    assert boast.ece == pytest.approx(0.3)


def test_the_risk_scale_of_a_check_is_undone_before_it_is_compared_with_agreement() -> None:
    """Exits after 2 and 5 of 6 layers: leaving saves 4 and 1, so a risk at the second counts four times."""
    p = np.array([[0.9, 0.7], [0.5, 0.2]])
    check = np.column_stack((1 - (1 - p) * [1, 4], np.ones(2)))
    assert check.min() < 0
    trace = ExitTrace(
        model="hand",
        exits=(2, 5, 6),
        tasks=("prose",),
        task=np.zeros(2, dtype=np.int32),
        prompt=np.zeros(2, dtype=np.int32),
        chars=np.ones(2, dtype=np.int32),
        agree=np.ones((2, 3), dtype=np.bool_),
        provenance=MEASURED,
        confidences={Confidence.CLASSIFIER: check.astype(np.float32)},
    )
    assert probabilities(trace, Confidence.CLASSIFIER) == pytest.approx(p, abs=1e-6)
    errors = [curve.ece for curve in exit_statistics(trace, 0.9, Confidence.CLASSIFIER).reliability]
    assert errors == pytest.approx([0.3, 0.55])  # all agree: the mean of 1 - p


def test_only_pairs_on_the_same_text_are_joined() -> None:
    same = [synthetic_trace("a", tokens=300), synthetic_trace("b", (2, 4), tokens=600, chars_per_token=2)]
    joints = joint_of_pairs([*same, synthetic_trace("other", tokens=299)], 0.9)
    assert [joint.models for joint in joints] == [("a", "b")]
    assert joints[0].share.sum() == pytest.approx(1)


def test_a_measure_that_was_not_recorded_is_refused() -> None:
    assert measures(trace_by_hand()) == [Confidence.MAX_PROBABILITY]
    with pytest.raises(UserError, match="measures recorded: max_probability"):
        exit_statistics(trace_by_hand(), 0.9, Confidence.CLASSIFIER)


@pytest.fixture(scope="module")
def page() -> str:
    tasks = ("news", "code <and> more")
    trace = synthetic_trace("mine", (2, 4, 6), tasks, 400)
    sections, _ = exit_sections(trace, [synthetic_trace("theirs", (3, 6), tasks, 400, seed=1)], 0.9, None)
    shown = Page("Mine", "on this", "published", ["It works."], [Highlight("a", "1", "b")], ["a caution"], sections)
    for drawing in shown.drawings:
        lay_out(drawing)
    return render(shown)


@pytest.mark.slow
def test_the_page_stands_alone(page: str) -> None:
    assert page.count("<svg") == 6  # histograms, thresholds, unchanged, two reliabilities, pairs
    assert "<script src" not in page
    without_namespaces = page.replace("http://www.w3.org", "")
    assert "http" not in without_namespaces
    assert not re.search(r'(src|href)="(?!#|data:image)', page)


def test_the_page_names_classes_tasks_and_sections(page: str) -> None:
    for text in ("Where tokens leave", "Unchanged tokens", "How far confidences", "Pairs of models", "a caution"):
        assert text in page
    assert "code &lt;and&gt; more" in page
    assert "code <and>" not in page
    assert 'class="badge published"' in page


def test_the_summary_holds_what_the_page_shows() -> None:
    sections, found = exit_sections(trace_by_hand(), [], 0.9, None)
    summary = exit_summary(found)
    assert summary["unchanged"]["prose"] == [0.75, 1.0]
    by_task = next(t for s in sections for t in s.tables if isinstance(t, Table) and "left early" in t.columns)
    assert by_task.rows[0][:5] == ("prose", "4", "50.0 %", "4.00", "1.000")
    assert summary["confidences"]["max_probability"]["agreement"] == {"prose": 1.0, "code": 0.75}
