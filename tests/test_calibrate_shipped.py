"""The shipped profiles that were measured: where, how well, and that nothing in them is faster than its device."""

from __future__ import annotations

import numpy as np
import pytest

from calibrate.measure.ceilings import Ceilings, below_floor, over_floor
from calibrate.measure.profile import TOLERATED
from helios_sim.profile.composition import Composition
from helios_sim.profile.store import known_profiles, load_profile
from helios_sim.provenance import ProvenanceClass

NAMES = [n for n in known_profiles() if load_profile(n).provenance.provenance_class is ProvenanceClass.MEASURED]


def test_the_small_models_are_there_on_one_device() -> None:
    models = {"smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b"}
    assert models <= {name.split("@")[0] for name in NAMES}
    here = [load_profile(name) for name in NAMES if name.split("@")[0] in models]
    assert len({(p.hardware.name, p.hardware.hbm_bytes) for p in here}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_provenance_says_where_when_by_what_and_how_well(name: str) -> None:
    provenance = load_profile(name).provenance
    assert provenance.command.startswith("python -m calibrate ")
    assert {"ceilings", "host", "memory", "loads", "limits", "interpolation", "whole_iterations", "samples"} <= set(
        provenance.details
    )
    assert "torch" in provenance.source
    assert provenance.details["whole_iterations"]["all"]["iterations"] >= 20
    assert provenance.details["energy"] is not None or provenance.details["energy_absent"]


@pytest.mark.parametrize("name", NAMES)
def test_no_part_is_faster_than_the_measured_ceilings_allow(name: str) -> None:
    profile = load_profile(name)
    details = profile.provenance.details
    ceilings = Ceilings.from_json(details["ceilings"])
    assert below_floor(over_floor(profile, ceilings)) == []
    assert details["below_floor"] == []
    limits = details["limits"]
    batch = np.array([1, 2, limits["max_batch"] // 2, limits["max_batch"]])
    for kv_tokens in (1, limits["max_kv_tokens"] // 3, limits["max_kv_tokens"]):
        c = Composition((profile.model.n_layers,), batch[:, None], batch[:, None] * kv_tokens, batch)
        share = profile.iteration_floor_s(c) / profile.iteration_time_s(c)
        assert ((share > 0) & (share < 1)).all()
        assert not profile.outside_grid(c).any()


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_its_spread_and_count(name: str) -> None:
    profile = load_profile(name)
    for table in (profile.head, profile.embedding, profile.check, profile.layer_tables[0].dense):
        assert table is not None
        assert table.iqr_s is not None
        assert table.samples is not None
        assert (table.samples >= 1).all()
        assert np.median(table.samples) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_a_price_that_is_off_says_so_where_reports_print_it(name: str) -> None:
    provenance = load_profile(name).provenance
    off = abs(provenance.details["whole_iterations"]["all"]["median"]) > TOLERATED
    assert off == ("whole_iteration_error" in {a.name for a in provenance.assumptions})
