"""Arms under other conditions are compared with a baseline under the same ones."""

from __future__ import annotations

import io

import pytest

from helios_sim.errors import UserError
from helios_sim.report.page import render
from helios_sim.report.result import comparisons
from helios_sim.report.tables import print_table
from helios_sim.report.write import summarise_result
from helios_sim.study.command import run
from helios_sim.study.schema import ArrivalsConfig, Config, LengthConfig, LengthsConfig, MixConfig, WorkloadConfig

OWN = "early_2"


def study(**arms: dict) -> Config:
    length = LengthConfig(kind="fixed", value=20)
    return Config(
        models=["opt-1.3b"],
        workload=WorkloadConfig(
            n_requests=6,
            arrivals=ArrivalsConfig(kind="constant", rate_per_s=5.0),
            lengths=LengthsConfig(prompt=length, output=length),
            mix=MixConfig(tasks={"gsm8k": 1.0}),
        ),
        arms=arms,
        baseline="full",
        subject="full",
        headline_metrics=["tpot_s_mean"],
    )


def test_an_arm_is_compared_with_its_own_baseline() -> None:
    result = run(
        study(
            full={"policy": "full_depth"},
            early={"policy": "early_exit"},
            early_2={"policy": "early_exit", "baseline": OWN},
            cap={"policy": "static_cap", "baseline": OWN},
        )
    )
    ratios = comparisons(result)
    assert list(ratios) == ["early", "cap"]  # baselines are compared with nothing
    tpot = {name: arm.metrics["tpot_s_mean"] for name, arm in result.arms.items()}
    assert ratios["early"]["tpot_s_mean"].ratio == pytest.approx(tpot["early"] / tpot["full"])
    assert ratios["cap"]["tpot_s_mean"].ratio == pytest.approx(tpot["cap"] / tpot[OWN])
    summary = summarise_result(result, ratios)
    assert [arm.get("baseline") for arm in summary["arms"].values()] == [None, None, OWN, OWN]
    printed = io.StringIO()
    print_table(result, ratios, printed)
    assert f"† against {OWN}" in printed.getvalue()
    assert "baseline †" in printed.getvalue()
    page = render(result, ratios, [])
    assert f"† against {OWN}" in page
    assert f"{ratios['cap']['tpot_s_mean'].ratio:.2f}× †" in page


def test_a_baseline_that_is_no_arm_is_refused() -> None:
    with pytest.raises(UserError, match=r"arms\.cap\.baseline"):
        run(study(full={"policy": "full_depth"}, cap={"policy": "static_cap", "baseline": "nobody"}))
