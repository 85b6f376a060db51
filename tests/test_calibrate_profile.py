"""A campaign on a virtual clock gives back the costs it was made of; on a real tiny model it gives a whole profile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from calibrate.measure.ceilings import Ceilings  # noqa: E402
from calibrate.measure.devices import TimedCpu  # noqa: E402
from calibrate.measure.host import ServingCosts  # noqa: E402
from calibrate.measure.latency import CHECK_CLASSIFIER, CLASSIFIER_ALONE, WHOLE_MODEL, Latency  # noqa: E402
from calibrate.measure.memory import Loads, grown  # noqa: E402
from calibrate.measure.profile import MeasurePlan, ProfileOrigin, in_words, measure_profile  # noqa: E402
from calibrate.measure.sampling import Clock, Points, Sampler, TimingPoint  # noqa: E402
from calibrate.measure.subject import Subject, TableLimits  # noqa: E402
from helios_sim.errors import UserError  # noqa: E402
from helios_sim.live.model.architecture import model_spec  # noqa: E402
from helios_sim.profile.composition import Composition  # noqa: E402
from helios_sim.profile.profile import Profile  # noqa: E402
from helios_sim.profile.store import read_profile, write_profile  # noqa: E402
from helios_sim.provenance import ProvenanceClass  # noqa: E402
from tiny_models import write_tiny  # noqa: E402
from virtual_subject import ARCHITECTURE, LIMITS, Costs, VirtualSubject  # noqa: E402

CEILINGS = Ceilings("float32", 1e12, 1e12, 1e15, 1, 1)
LOADS = Loads({"host": 1e9}, {"host": 0.0}, 100, 1.5, 0.5e9, None)
SERVING = ServingCosts({1: 4e-4}, {1: 1e-5}, {1: 1e-2}, 24)
ABOUT = ProfileOrigin(
    model_spec(ARCHITECTURE, "virtual", 4.0), "a test", "2026-01-01", "weights", {"note": "of a test"}
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take ten times as long where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def campaign(subject: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, plan: MeasurePlan | None = None) -> Profile:
    """On the subject's own clock; ceilings, loads and serving as given: those are measured by the wall's clock."""
    folder.mkdir(exist_ok=True)
    (folder / "ceilings.json").write_text(json.dumps(CEILINGS.to_json()))
    (folder / "load.json").write_text(json.dumps(LOADS.to_json()))
    (folder / "serving.json").write_text(json.dumps(SERVING.to_json()))
    monkeypatch.setattr("calibrate.measure.profile.Clock", lambda budget_s: Clock(budget_s, subject.clock))
    return measure_profile(subject, ABOUT, folder, plan or MeasurePlan())


def test_the_tables_are_the_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = VirtualSubject()
    profile = campaign(subject, tmp_path, monkeypatch)
    costs = subject.costs
    for table, cost in (
        (profile.head, costs.head),
        (profile.check, costs.head),
        (profile.check_classifier, costs.classifier),
        (profile.check_predictor, costs.predictor),
        (profile.embedding, costs.embedding),
        (profile.layer_tables[0].dense, costs.dense),
        (profile.layer_tables[1].kv_projection, costs.kv_projection),
    ):
        assert table is not None
        np.testing.assert_allclose(table.time_s, [cost(int(r)) for r in table.rows], rtol=1e-9)
        assert table.rows[0] == 1
        assert table.samples is not None
        assert (table.samples >= 5).all()
    assert profile.layer_class == (0, 0, 1, 0, 0, 1)
    for layer_class, slides in enumerate((True, False)):
        decode = profile.layer_tables[layer_class].decode_attention
        expected = [[costs.decode(slides, [int(kv)] * int(b)) for kv in decode.second] for b in decode.first]
        np.testing.assert_allclose(decode.time_s, expected, rtol=1e-6)
        assert (decode.first[-1], decode.second[-1]) == (LIMITS.max_batch, LIMITS.max_kv_tokens)
        prefill = profile.layer_tables[layer_class].prefill_attention
        expected = [[costs.prefill(slides, int(t), int(c)) for c in prefill.second] for t in prefill.first]
        np.testing.assert_allclose(prefill.time_s, expected, rtol=1e-6)


def test_the_head_has_samples_of_its_own_at_the_batches_that_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside those that the rest of a step of so many rows has."""
    head = campaign(VirtualSubject(), tmp_path, monkeypatch).head
    assert head.samples is not None
    served = head.rows <= LIMITS.max_batch
    assert head.samples[served].min() > head.samples[~served].max()


def test_whole_iterations_are_priced_to_the_last_digit_where_costs_are_straight_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compositions of every kind: equal and unequal lengths, prompts, mixed, exits with checks and propagation."""
    profile = campaign(VirtualSubject(), tmp_path, monkeypatch)
    whole = profile.provenance.details["whole_iterations"]
    assert set(whole) == {"equal", "unequal", "prefill", "mixed", "exits", "all"}
    assert all(abs(whole[kind]["largest"]) < 1e-6 for kind in ("equal", "unequal", "prefill", "mixed"))
    assert 0 <= whole["exits"]["largest"] < 0.02  # priced by the longest of the batch, and that one may have left
    assert profile.padded_kv
    assert profile.mixed_factor is None or profile.mixed_factor == pytest.approx(1.0)  # nothing, to the last digits
    assert profile.provenance.details["fitted_mixed_factor"] == pytest.approx(1.0)
    for table in profile.provenance.details["interpolation"].values():
        assert table is None or table["largest"] < 1e-6


def test_a_knee_in_rows_is_measured_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = VirtualSubject(Costs(knee=45))
    subject.costs.dense = lambda rows: 1e-5 * max(rows, 45)  # type: ignore[method-assign]
    profile = campaign(subject, tmp_path, monkeypatch)
    rows = profile.layer_tables[0].dense.rows
    assert len(rows[(rows > 32) & (rows < 64)]) >= 1
    dense = profile.provenance.details["interpolation"]["dense"]
    assert dense["held_out"] > 0
    assert dense["largest"] <= 0.03


def test_the_factor_is_what_iterations_of_its_kind_cost_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = campaign(VirtualSubject(Costs(mixed=1.2)), tmp_path / "mixed", monkeypatch)
    assert mixed.mixed_factor == pytest.approx(1.2, rel=1e-6)


def test_a_finished_campaign_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = campaign(VirtualSubject(), tmp_path, monkeypatch)
    again_on = VirtualSubject()
    again = campaign(again_on, tmp_path, monkeypatch)
    assert again_on.clock.now_s == 0.0
    assert again.layer_tables[0].dense.time_s.tolist() == first.layer_tables[0].dense.time_s.tolist()


def test_a_small_budget_is_an_error_that_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="ends of the tables"):
        campaign(VirtualSubject(), tmp_path, monkeypatch, MeasurePlan(budget_s=0.5))
    budgets = 1
    while True:
        subject = VirtualSubject()
        try:
            profile = campaign(subject, tmp_path, monkeypatch, MeasurePlan(budget_s=2.0))
            break
        except UserError:
            budgets += 1
            assert budgets < 20
    assert subject.clock.now_s < 2.0 + 0.5  # one visit to the dearest place
    assert profile.layer_tables[0].dense.samples is not None
    whole = campaign(VirtualSubject(), tmp_path, monkeypatch)  # and goes on to the end
    assert whole.provenance.details["short"] is None


def test_the_ends_of_the_tables_are_measured_first_and_say_how_far_times_may_be_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry = MeasurePlan(budget_s=0.01, most_s=100.0)  # no more than a profile cannot be made without
    subject = VirtualSubject()
    profile = campaign(subject, tmp_path, monkeypatch, hurry)
    short = profile.provenance.details["short"]
    assert short["by_ends_alone"] == ["all tables"]
    assert short["within"] == profile.times_within == 0.15  # what was measured between agrees
    assert profile.layer_tables[0].dense.rows.tolist() == [1, LIMITS.max_rows]
    assert profile.head.time_s[-1] == pytest.approx(subject.costs.head(LIMITS.max_head_rows))
    assert [a.value for a in profile.provenance.assumptions if a.name == "times_within"] == [0.15]
    whole = campaign(VirtualSubject(), tmp_path, monkeypatch)
    assert whole.provenance.details["short"] is None
    assert whole.times_within is None
    assert len(whole.layer_tables[0].dense.rows) > 2


def test_a_folder_holds_one_model_on_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign(VirtualSubject(), tmp_path, monkeypatch)
    other = TableLimits(4, 64, 64, 256, 16)
    with pytest.raises(UserError, match="limits"):
        campaign(VirtualSubject(limits=other), tmp_path, monkeypatch)


def test_free_memory_is_no_part_of_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = campaign(VirtualSubject(), tmp_path, monkeypatch)
    subject = VirtualSubject()
    subject.device.facts = replace(subject.device.facts, memory_bytes=subject.device.facts.memory_bytes // 2)
    again = campaign(subject, tmp_path, monkeypatch)
    assert np.array_equal(again.layer_tables[0].dense.time_s, first.layer_tables[0].dense.time_s)


def test_a_folder_of_samples_that_were_taken_in_another_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an earlier version, which knew one pace, measured in it."""
    campaign(VirtualSubject(), tmp_path, monkeypatch)
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"samples": "at one pace"}))
    with pytest.raises(UserError, match="under another samples"):
        campaign(VirtualSubject(), tmp_path, monkeypatch)


def test_batches_that_no_memory_holds_go_by_proportion_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = VirtualSubject()
    subject.pool_tokens = 4 * LIMITS.max_kv_tokens
    profile = campaign(subject, tmp_path, monkeypatch)
    decode = profile.layer_tables[0].decode_attention
    assert decode.samples is not None
    assert decode.samples[-1, -1] == 0
    assert (decode.samples[0] > 0).all()
    assert decode.time_s[-1, -1] == pytest.approx(subject.costs.decode(True, [256] * 8), rel=1e-6)
    assert "in proportion" in profile.provenance.scaled[0]


def test_a_failed_measurement_is_named_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is faster than the ceilings allow."""
    honest = campaign(VirtualSubject(), tmp_path / "a", monkeypatch)
    assert honest.provenance.details["below_floor"] == []
    too_fast = campaign(VirtualSubject(Costs(speed=1e-9)), tmp_path / "b", monkeypatch)
    assert any("head" in entry for entry in too_fast.provenance.details["below_floor"])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_real_model_gives_a_profile_that_prices_and_comes_back(family: str, tmp_path: Path) -> None:
    from helios_sim.live.checkpoint.source import find_checkpoint
    from helios_sim.live.model.decoder import SegmentedModel

    checkpoint = find_checkpoint(str(write_tiny(family, tmp_path / "model", layers=3)))
    device = TimedCpu.open(memory_bytes=1 << 30, threads=1)
    model, loaded_bytes = grown(device, lambda: SegmentedModel.load(checkpoint))
    subject = Subject(model, device, TableLimits(2, 8, 8, 32, 4))
    about = ProfileOrigin(model_spec(checkpoint.architecture, "tiny", 4.0), "a test", "2026-01-01", "weights", {})
    work = tmp_path / "work"
    work.mkdir()
    (work / "ceilings.json").write_text(json.dumps(CEILINGS.to_json()))
    profile = measure_profile(subject, about, work, MeasurePlan(samples=2, tolerance=10.0), loaded_bytes=loaded_bytes)
    write_profile(profile, tmp_path / "profile")
    again = read_profile(tmp_path / "profile")
    assert again.padded_kv
    assert again.provenance.provenance_class is ProvenanceClass.MEASURED
    batch = np.array([1, 2])
    compositions = Composition((1, 3), np.stack([batch, batch], 1), np.stack([batch, batch], 1) * 20, batch)
    priced = again.iteration_time_s(compositions)
    np.testing.assert_array_equal(priced, profile.iteration_time_s(compositions))
    assert (priced > again.iteration_floor_s(compositions)).all()
    assert not again.outside_grid(compositions).any()
    assert again.hardware.tdp_w is None  # a CPU does not say
    details = again.provenance.details
    assert details["energy"] is not None or "RAPL" in details["energy_absent"]
    assert details["memory"]["kv"]["predicted"] == 32 * 3 * again.model.kv_bytes_per_token_layer
    assert details["loads"]["slowdown"] >= 1.0
    assert again.runtime.launch_s_per_layer == 0.0
    around, inside = details["serving"]["host_s"], details["host"]["overhead_s"]
    assert again.runtime.host_overhead_s == pytest.approx(around["2"] + inside["2"])
    assert min(around.values()) > 0


def test_a_check_that_noise_hides_is_charged_what_it_takes_alone(tmp_path: Path) -> None:
    subject = VirtualSubject()
    points = Points(tmp_path / "points.parquet")
    latency = Latency(subject, Sampler(subject.device, points, Clock(1e9, subject.clock)))
    points.add(
        {TimingPoint(CHECK_CLASSIFIER, WHOLE_MODEL, 1): -2e-6, TimingPoint(CLASSIFIER_ALONE, WHOLE_MODEL, 1): 9e-6}
    )
    points.add(
        {TimingPoint(CHECK_CLASSIFIER, WHOLE_MODEL, 8): 5e-6, TimingPoint(CLASSIFIER_ALONE, WHOLE_MODEL, 8): 9e-6}
    )
    assert [latency.rows_figure(CHECK_CLASSIFIER, rows).median_s for rows in (1, 8)] == [9e-6, 5e-6]


@pytest.mark.parametrize(
    ("short", "said"),
    [
        ({"disturbed": 12}, "12 of 80 samples were disturbed by other processes"),
        ({"brief": ["host", "load"]}, "briefly measured or assumed: host, load"),
        ({"by_ends_alone": ["dense"], "disturbed": 80},
         "known at their ends alone: dense; 80 of 80 samples were disturbed by other processes"),
    ],
)  # fmt: skip
def test_what_a_short_measurement_lacks_is_said(short: dict[str, Any], said: str) -> None:
    nothing = {"by_ends_alone": [], "brief": [], "disturbed": 0, "samples": 80, "within": 0.07, "judged_by": "a guess"}
    assert in_words(nothing | short) == f"times within about 7 % (a guess); {said}"
