"""Iterations beyond the measured grid and their floor are counted alike, whatever a composition says."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from helios_sim.exits.rule import Confidence, FixedCap, FullDepth, PerToken
from helios_sim.policy.deployment import Deployment, KvRule, Placement
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.profile.tables import RowsTable
from helios_sim.serving import utilisation
from helios_sim.serving.stats import RunStats
from helios_sim.workload import AllAtOnce, Exponential
from priced import priced_profile
from rig import serve, workload

SMALL = np.array([1, 2], dtype=np.int64)


def with_small_classifier_table() -> Profile:
    """The classifier was measured up to two rows."""
    return replace(priced_profile("flat"), check_classifier=RowsTable(SMALL, np.array([1e-5, 2e-5])))


def with_small_padded_attention() -> Profile:
    """Decode attention was measured up to 30 tokens of context, and every context counts like the longest."""
    profile = priced_profile("flat", kv_token_s=1e-6)
    tables = profile.layer_tables[0]
    attention = replace(
        tables.decode_attention, second=np.array([0, 30]), time_s=tables.decode_attention.time_s[:, :2] * [1.0, 1e-3]
    )
    return replace(profile, layer_tables=(replace(tables, decode_attention=attention),), padded_kv=True)


CLASSIFIED = FixedCap(0.7, Confidence.CLASSIFIER)
CASES = {
    "a classifier at the cap": (with_small_classifier_table(), CLASSIFIED, KvRule.NONE, 2),
    "a classifier at every exit": (
        with_small_classifier_table(), PerToken(0.7, Confidence.CLASSIFIER), KvRule.PROPAGATE, 4,
    ),
    "contexts that are padded": (with_small_padded_attention(), FullDepth(), KvRule.NONE, 4),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_leaps_and_single_steps_count_what_each_iteration_says(case: str, monkeypatch) -> None:
    profile, rule, kv_rule, layers = CASES[case]
    deployment = Deployment(Placement("flat", layers), rule, kv_rule=kv_rule)
    alone = RunStats(block_tokens=16)
    add = utilisation.Utilisation.add

    def each(self, profile: Profile, composition: Composition, iterations: int) -> None:
        outside = profile.outside_grid(composition)[:iterations]
        alone.outside_grid_iterations += int(np.count_nonzero(outside))
        add(self, profile, composition, iterations)

    monkeypatch.setattr(utilisation.Utilisation, "add", each)
    unequal = workload(12, Exponential(10), Exponential(20), AllAtOnce())
    counted = []
    for ahead, leap in ((False, False), (False, True), (True, True)):
        stats = serve(unequal, deployment, {"flat": profile}, max_running_requests=5, leap=leap, ahead=ahead).run.stats
        counted.append(asdict(replace(stats, itl=None)))
        if not leap:
            assert 0 < stats.outside_grid_iterations == alone.outside_grid_iterations < stats.iterations
    assert counted[0] == counted[1] == counted[2]


def test_a_column_that_a_composition_gains_is_not_left_out() -> None:
    by_iteration = {f.name for f in fields(Composition) if "IntArray" in str(f.type)}
    assert set(utilisation._COLUMNS) == by_iteration
