"""What iterations computed ahead stand on, against its definition: prices, and spans of tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings, strategies as st

from helios_sim.exits.artificial import no_exits, synthetic_trace
from helios_sim.profile import compiled_prices
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.price_tables import CHUNK_ROWS, WORK_ROWS, band_table
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import load_profile


def two_classes() -> Profile:
    """Layers of two classes, checks by head and classifier, host costs of its own, no terms beyond the means."""
    profile = load_profile("gemma3-270m@epyc-2core")
    return replace(profile, layer_tables=tuple(replace(t, unequal_kv=None) for t in profile.layer_tables))


PROFILES = {"one class": load_profile("llama-2-7b@a100-40gb"), "two classes": two_classes()}
counts = st.integers(0, 1500)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(PROFILES)), syncs=st.booleans())
def test_a_compiled_price_is_the_price_to_the_last_bit(data, name, syncs) -> None:
    """Inside the grids and beyond them, with chunks of several depths."""
    profile = PROFILES[name]
    bounds = tuple(sorted(data.draw(st.sets(st.integers(1, profile.model.n_layers), min_size=1, max_size=4))))
    decode = sorted((data.draw(counts) for _ in bounds), reverse=True)
    kv = [rows * data.draw(st.integers(1, 6000)) for rows in decode]
    checked, classified, moved = ([data.draw(st.sampled_from([0, 1, 40])) for _ in bounds] for _ in range(3))
    if profile.check_classifier is None:
        classified = [0] * len(bounds)
    chunks = data.draw(
        st.lists(
            st.builds(PrefillChunk, st.integers(1, 4000), st.integers(0, 9000), st.sampled_from(bounds)), max_size=3
        )
    )
    sampled = data.draw(counts)
    composition = Composition(
        bounds, np.array([decode]), np.array([kv]), np.array([sampled]), np.array([checked]),
        None if profile.check_classifier is None else np.array([classified]),
        propagated_tokens=np.array([moved]), prefill=tuple(chunks), host_sync_at_checks=syncs,
    )  # fmt: skip

    tables, scalars = profile.price_tables
    bands = band_table(profile.pricing.bands(bounds))
    work = np.zeros((WORK_ROWS, len(bounds)), np.int64)
    work[:] = decode, kv, checked, classified, moved
    laid = np.zeros((CHUNK_ROWS, 4), np.int64)
    for i, chunk in enumerate(chunks):
        laid[:, i] = chunk.tokens, chunk.context_tokens, chunk.layers
    run = bands, work, laid, len(chunks), sampled
    assert compiled_prices.time_s(tables, scalars, *run, int(syncs), 0) == profile.iteration_time_s(composition)[0]
    assert compiled_prices.floor_s(scalars, *run) == profile.iteration_floor_s(composition)[0]
    assert compiled_prices.outside_grid(tables, *run) == profile.outside_grid(composition)[0]


@given(
    task=st.lists(st.integers(0, 1), min_size=1, max_size=20),
    seed=st.integers(0, 99),
    exits=st.booleans(),
)
def test_spans_of_many_answers_are_those_of_each(task, seed, exits) -> None:
    rng = np.random.default_rng(seed)
    trace = synthetic_trace("m", (2, 4), tokens=50, seed=seed) if exits else no_exits(PROFILES["one class"].model)
    bound = trace.bind(("a", "b"))
    starts, chars = rng.integers(0, 2**62, len(task)), rng.integers(1, 500, len(task))
    spans = bound.locate_many(np.array(task), starts, chars)
    for row, one_task, start, n in zip(spans.tolist(), task, starts.tolist(), chars.tolist(), strict=True):
        span = bound.locate(one_task, start, n)
        assert row == [span.first, span.start, span.length, span.n_tokens]
