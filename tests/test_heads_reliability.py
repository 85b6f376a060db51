"""Calibration of probabilities and what exits save, against cases that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from calibrate.exits.reliability import at_agreement, expected_calibration_error, fit_logistic, fit_temperature, point


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    correct = np.array([True] * 6 + [False] * 4)
    assert expected_calibration_error(np.full(10, 0.6), correct) == pytest.approx(0.0)
    assert expected_calibration_error(np.full(10, 0.9), correct) == pytest.approx(0.3)


def test_a_logistic_fit_finds_slope_and_offset() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 40_000)
    correct = rng.random(40_000) < 1 / (1 + np.exp(-(0.5 * logit - 1)))
    slope, offset = fit_logistic(logit, correct)
    assert slope == pytest.approx(0.5, abs=0.03)
    assert offset == pytest.approx(-1, abs=0.05)


def test_a_logistic_fit_keeps_the_order_and_stays_finite() -> None:
    logit = np.linspace(-3, 3, 200)
    assert fit_logistic(logit, logit < 0)[0] > 0
    assert np.isfinite(fit_logistic(logit, np.ones(200, dtype=bool))).all()


def test_a_temperature_undoes_overconfidence() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    drawn = (p.cumsum(1) > rng.random((20_000, 1))).argmax(1)

    def confidence(t: float) -> np.ndarray:
        sharp = np.exp(2 * logits / t)  # twice too sure
        return (sharp / sharp.sum(1, keepdims=True)).max(1)

    assert fit_temperature(confidence, drawn == p.argmax(1)) == pytest.approx(2, rel=0.06)


CONFIDENCE = np.array([[0.9, 0.0, 1], [0.2, 0.8, 1], [0.1, 0.3, 1], [0.95, 0.1, 1]])
AGREE = np.array([[True, True, True], [False, True, True], [False, False, True], [False, True, True]])


def test_a_point_counts_layers_checks_and_agreement() -> None:
    at = point(CONFIDENCE, AGREE, (2, 4, 8), 0.7, check_layers=0.5, leave_layers=0.1)
    assert at.left == (0.5, 0.25, 0.25)
    assert at.layers_per_token == (2 + 4 + 8 + 2) / 4
    assert at.checks_per_token == (1 + 2 + 2 + 1) / 4
    assert at.agreement == 0.75
    assert at.saved_net == pytest.approx(8 - 4 - 1.5 * 0.5 - 0.75 * 0.1)


def test_the_threshold_is_the_lowest_that_keeps_the_agreement() -> None:
    assert at_agreement(CONFIDENCE, AGREE, (2, 4, 8), 0.75, 0.0).agreement >= 0.75
    assert at_agreement(CONFIDENCE, AGREE, (2, 4, 8), 1.0, 0.0).left[-1] == 1.0  # the surest token is wrong
