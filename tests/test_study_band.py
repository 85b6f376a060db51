"""An answer is told with what becomes of it where the profiles are off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from helios_sim.api import simulate, study_config
from helios_sim.errors import UserError
from helios_sim.profile.resolve import find_profile
from helios_sim.profile.roofline import FITTED_BANDS
from helios_sim.profile.spec import TimeBand
from helios_sim.profile.store import PROFILES_FOLDER, known_profiles, load_profile, read_profile, write_profile
from helios_sim.report.compare import Ratio
from helios_sim.report.intervals import Method
from helios_sim.report.result import ExperimentResult, comparisons
from helios_sim.report.write import summarise_result
from helios_sim.study.band import MOST_REQUESTS, Ends, run_ends
from helios_sim.study.plan import plan_study
from helios_sim.study.verdict import survives

SMALL = ("workload.n_requests=40", "subject=static_cap")
METRIC = "e2e_s_mean"


@pytest.fixture(scope="module")
def study() -> ExperimentResult:
    return simulate("quickstart", *SMALL)


@pytest.mark.slow
def test_each_end_is_the_study_at_that_factor(study: ExperimentResult) -> None:
    band = study.trust.band
    assert band is not None
    assert [end.time_factor for end in study.trust.at_ends] == [band.low, band.high]
    for end in study.trust.at_ends:
        factor = f"profile_time_factor={end.time_factor!r}"
        alone = simulate("quickstart", *SMALL, factor, "profile_band=none")
        assert end.ratio == comparisons(alone)["static_cap"][METRIC]
        assert end.value == alone.arms["static_cap"].metrics[METRIC]
        assert alone.trust.at_ends == ()


def test_what_holds_is_said_and_written(study: ExperimentResult) -> None:
    said = [sentence for sentence in study.verdict if "times as long as the profiles say" in sentence]
    assert len(said) == 1
    assert said[0].startswith("The same holds with iterations 0.89 and 1.17 times")
    confidence = summarise_result(study)["confidence"]
    assert confidence["survives"] is True
    assert (confidence["profile_band"]["low"], confidence["profile_band"]["high"]) == (0.89, 1.17)
    assert confidence["inputs"]["exits of opt-1.3b"] == "published"
    assert confidence["valid_up_to_rps"] == 4.0


@pytest.mark.slow
def test_a_given_band_takes_the_profiles_place_and_multiplies_their_factor() -> None:
    words = ("profile_band=[0.8,1.5]", "profile_time_factor=1.1")
    found = simulate("quickstart", *SMALL, *words).trust
    assert found.band == TimeBand(0.8, 1.5, "profile_band")
    alone = simulate("quickstart", *SMALL, f"profile_time_factor={1.1 * 1.5!r}", "profile_band=none")
    assert found.at_ends[1].value == alone.arms["static_cap"].metrics[METRIC]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [((0.8, 0.95), True), ((0.8, 1.2), False), ((0.8, 0.995), False), ((0.8, None), False)],
)
def test_it_survives_where_the_same_would_be_said(
    study: ExperimentResult, ends: tuple[float | None, ...], expected: bool
) -> None:
    def ratio(value: float) -> Ratio:
        return Ratio(value, value - 0.02, value + 0.02, Method.WITHIN_RUN, 40)

    given = [None if value is None else ratio(value) for value in ends]
    assert survives(study, "static_cap", METRIC, ratio(0.9), given) is expected
    assert survives(study, "static_cap", METRIC, None, given) is None


@pytest.mark.slow
def test_a_subject_without_a_rival_is_told_with_its_figures() -> None:
    found = simulate("quickstart", SMALL[0], "subject=full_depth_opt-1.3b")
    assert found.trust.survives is None
    first, last = (end.value for end in found.trust.at_ends)
    assert isinstance(first, float)
    assert isinstance(last, float)
    assert first < last
    assert any(said.startswith("With iterations 0.89 and 1.17 times") and "E2E mean" in said for said in found.verdict)


@pytest.mark.slow
def test_no_end_is_quicker_than_the_card() -> None:
    words = (SMALL[0], "subject=full_depth_opt-6.7b", "baseline=full_depth_opt-6.7b")
    share: Any = simulate("quickstart", *words).arms["full_depth_opt-6.7b"].metrics["roofline_fraction"]
    found = simulate("quickstart", *words, f"profile_time_factor={share / 0.95!r}")
    assert 0.94 < found.trust.at_ends[0].time_factor < 0.97
    assert not any("correct the profile" in said for said in found.verdict)


@pytest.mark.slow
def test_where_nothing_is_known_it_says_so(tmp_path: Path) -> None:
    for name in ("opt-1.3b@a100-40gb", "opt-6.7b@a100-40gb"):
        write_profile(replace(load_profile(name), time_band=None), tmp_path / name)
    words = (*SMALL, f"profile_folder={tmp_path}")
    found = simulate("quickstart", *words)
    assert found.trust.at_ends == ()
    assert any("how far the profiles' times may be off is not known" in said for said in found.verdict)
    assert simulate("quickstart", *words, "profile_band=[0.9,1.1]").trust.survives is True


@pytest.mark.slow
def test_many_requests_are_run_again_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios_sim.study.band.MOST_REQUESTS", 79)
    found = simulate("quickstart", *SMALL)
    assert found.trust.at_ends == ()
    assert any("80 requests are many (profile_band=[0.89,1.17] runs them again" in said for said in found.verdict)
    assert len(simulate("quickstart", *SMALL, "profile_band=[0.89,1.17]").trust.at_ends) == 2
    assert MOST_REQUESTS > 79


@pytest.mark.slow
@pytest.mark.parametrize("value", ["[0.9]", "[1.1,1.2]", "[0.9,0.95]", "always", "[a,b]", "0.9", "[0.001,1]"])
def test_bands_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(UserError, match="two factors around 1"):
        simulate("quickstart", *SMALL, f"profile_band={value}")


@pytest.mark.slow
def test_it_is_refused_where_nothing_is_run_again(command: CommandLine) -> None:
    done = command("+experiment=sweep_helios", "profile_band=none")
    assert done.status == 1
    assert "profile_band" in done.err


def test_what_a_device_serves_is_not_served_again() -> None:
    config = study_config("quickstart", *SMALL, "+arms.live={policy: full_depth, model: opt-1.3b}")
    config.arms["live"]["overrides"] = {"mode": "live"}
    arms = plan_study(config).headline.jobs
    for pair in ((arms["live"], arms["helios"]), (arms["helios"], arms["live"])):
        assert run_ends(plan_study(config), pair, {}, pytest.fail) == Ends()


@pytest.mark.slow
def test_cores_change_nothing(command: CommandLine) -> None:
    one, two = (command("+experiment=quickstart", *SMALL, "pictures=false", f"jobs={n}", into=str(n)) for n in (1, 2))
    assert one.summary["confidence"] == two.summary["confidence"]
    assert one.summary["confidence"]["at_ends"]


@pytest.mark.parametrize("name", known_profiles())
def test_every_shipped_profile_knows_its_band_and_keeps_it(name: str, tmp_path: Path) -> None:
    profile = read_profile(PROFILES_FOLDER / name)
    assert profile.time_band is not None
    write_profile(profile, tmp_path / name)
    assert read_profile(tmp_path / name).time_band == profile.time_band


def test_a_card_without_kernels_has_the_band_of_the_fit() -> None:
    band: Any = find_profile("meta-llama/Llama-3.1-8B", "rtx4090").time_band
    assert (band.low, band.high) == FITTED_BANDS[None]
