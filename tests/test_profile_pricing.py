"""What an iteration costs: closed forms for groups, padding and skipped bands; the same bits in a leap."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.profile import Profile
from helios_sim.profile.runtimes import preset
from helios_sim.profile.spec import Runtime
from helios_sim.profile.store import load_profile
from helios_sim.profile.synthetic import flat_profile
from helios_sim.profile.tables import GridTable, LayerTables, RowsTable, UnequalTable

ROWS = np.array([1, 101], dtype=np.int64)
NO_HOST = Runtime(0.0, 0.0, 0.0, 0.0, None)
# seconds of one layer, exact in binary: dense 1 + rows/64, KV projection rows/256, head rows/8, check rows/4,
# decode attention batch x mean KV / 1024, prefill attention 1/4 + tokens x context / 1024
DENSE, KV_PROJECTION, HEAD, CHECK = (1.0, 1 / 64), (0.0, 1 / 256), (0.0, 1 / 8), (0.0, 1 / 4)


def line(fixed_and_slope: tuple[float, float]) -> RowsTable:
    return RowsTable(ROWS, fixed_and_slope[0] + fixed_and_slope[1] * ROWS)


def simple_profile(runtime: Runtime = NO_HOST, *, check: bool = True, n_layers: int = 8, **changes: object) -> Profile:
    batch, kv = np.array([1, 100]), np.array([1, 1001])
    tokens, context = np.array([1, 101]), np.array([0, 1000])
    tables = LayerTables(
        dense=line(DENSE),
        kv_projection=line(KV_PROJECTION),
        decode_attention=GridTable(batch, kv, np.outer(batch, kv) / 1024),
        prefill_attention=GridTable(tokens, context, 0.25 + np.outer(tokens, context) / 1024),
    )
    return dataclasses.replace(
        flat_profile(0.0, n_layers=n_layers), layer_tables=(tables,), head=line(HEAD),
        check=line(CHECK) if check else None, runtime=runtime, **changes,
    )  # fmt: skip


def composition(
    bounds: tuple[int, ...], decode: list[int], kv: list[int], sampled: int, **changes: object
) -> Composition:
    for key in ("check_tokens", "classifier_tokens", "propagated_tokens"):
        if key in changes:
            changes[key] = np.array([changes[key]])
    return Composition(bounds, np.array([decode]), np.array([kv]), np.array([sampled]), **changes)  # type: ignore[arg-type]


def time_s(profile: Profile, c: Composition) -> float:
    return float(profile.iteration_time_s(c)[0])


def test_decode_iteration_is_layers_times_their_kernels_plus_head() -> None:
    c = composition((8,), [10], [500], 10)
    assert time_s(simple_profile(), c) == 8 * (1 + 10 / 64 + 10 * 50 / 1024) + 10 / 8


def test_prefill_chunks_share_the_fixed_part_of_their_kernel() -> None:
    chunks = (PrefillChunk(tokens=16, context_tokens=64, layers=8), PrefillChunk(tokens=32, context_tokens=0, layers=8))
    c = composition((8,), [10], [500], 11, prefill=chunks)
    attention = 10 * 50 / 1024 + 0.25 + 16 * 64 / 1024
    assert time_s(simple_profile(), c) == 8 * (1 + 58 / 64 + attention) + 11 / 8


def test_prefill_to_a_depth_runs_only_bands_up_to_it() -> None:
    c = composition((2, 8), [1, 1], [1, 1], 1, prefill=(PrefillChunk(16, 0, layers=2),))
    shallow, deep = 1 + 17 / 64 + 1 / 1024 + 0.25, 1 + 1 / 64 + 1 / 1024
    assert time_s(simple_profile(), c) == 2 * shallow + 6 * deep + 1 / 8


def test_mixed_and_unequal_factors_act_where_they_are_given() -> None:
    mixed = composition((8,), [10], [500], 0, prefill=(PrefillChunk(16, 0, 8),))
    decode = composition((8,), [10], [500], 0)
    plain, factors = simple_profile(), simple_profile(mixed_factor=1.5, unequal_kv_factor=2.0)
    more_attention = 8 * 10 * 50 / 1024
    assert time_s(factors, decode) == time_s(plain, decode) + more_attention
    assert time_s(factors, mixed) == 1.5 * (time_s(plain, mixed) + more_attention)


def test_padded_contexts_cost_what_the_longest_would_in_all_of_them() -> None:
    uneven = composition((8,), [10], [500], 10, decode_kv_least=np.array([20]), decode_kv_most=np.array([90]))
    even = composition((8,), [10], [900], 10, decode_kv_least=np.array([90]), decode_kv_most=np.array([90]))
    padded = simple_profile(padded_kv=True)
    assert time_s(padded, uneven) == time_s(padded, even) == time_s(simple_profile(), even)
    assert time_s(simple_profile(), uneven) < time_s(padded, uneven)
    assert padded.prices_spread
    assert not simple_profile().prices_spread
    ends = np.array([2, 99])
    table = UnequalTable(np.array([0]), ends, ends, np.array([0.0, 1.0]), np.zeros((1, 2, 2, 2)))
    twice = dataclasses.replace(padded.layer_tables[0], unequal_kv=table)
    with pytest.raises(UserError, match="padded_kv"):
        dataclasses.replace(padded, layer_tables=(twice,))


def test_propagation_costs_kv_projection_only_and_an_empty_band_nothing() -> None:
    profile = simple_profile(dataclasses.replace(NO_HOST, launch_s_per_layer=1 / 64))
    tokens = composition((2, 4, 8), [4, 0, 0], [40, 0, 0], 0, propagated_tokens=[0, 4, 0])
    layers = composition((2,), [4], [40], 0)
    assert time_s(profile, tokens) == time_s(profile, layers) + 2 * 4 / 256
    slow_host = profile.with_runtime(dataclasses.replace(NO_HOST, launch_s_per_layer=16.0))
    assert time_s(slow_host, tokens) == 4 * 16.0  # the last band has no rows: not launched
    assert time_s(slow_host, composition((8,), [0], [0], 0)) == 0.0


def test_device_and_host_overlap_within_a_group_and_the_slower_counts() -> None:
    c = composition((2, 8), [10, 6], [100, 60], 6, check_tokens=[10, 0])
    first = 2 * (1 + 10 / 64 + 100 / 1024) + 10 / 4
    rest = 6 * (1 + 6 / 64 + 60 / 1024) + 6 / 8
    for launch_s in (0.0, 0.5, 2.0, 8.0):
        runtime = Runtime(launch_s, 0.25, sync_s=0.125, host_overhead_s=3.0, graph_batch_sizes=None)
        profile = simple_profile(runtime)
        separate = max(first, 2 * launch_s + 0.25) + 0.125 + max(rest, 6 * launch_s + 0.25) + 3.0
        assert time_s(profile, c) == separate
        joined = dataclasses.replace(c, host_sync_at_checks=False)
        assert time_s(profile, joined) == max(first + rest, 8 * launch_s + 0.25) + 3.0


def test_where_only_decodes_are_captured_prompts_are_launched_layer_by_layer() -> None:
    """The host may take longer to issue the operations of a prompt's layers than the device to compute them."""
    host = dataclasses.replace(NO_HOST, launch_s_per_graph=1.0, prefill_launch_s_per_layer=300.0)
    decode = composition((8,), [2], [20], 2)
    assert time_s(simple_profile(host), decode) == time_s(simple_profile(), decode)
    prompt = dataclasses.replace(decode, prefill=(PrefillChunk(8, 0, 8),))
    assert time_s(simple_profile(host), prompt) == 8 * 300.0 + 1.0
    quick = dataclasses.replace(host, prefill_launch_s_per_layer=1e-3)
    assert time_s(simple_profile(quick), prompt) == time_s(simple_profile(), prompt)


def test_a_check_after_which_nothing_runs_opens_no_new_group() -> None:
    profile = simple_profile(Runtime(0.0, 0.25, sync_s=0.125, host_overhead_s=0.0, graph_batch_sizes=None))
    c = composition((2, 8), [4, 0], [40, 0], 0, check_tokens=[4, 0])
    assert time_s(profile, c) == 2 * (1 + 4 / 64 + 40 / 1024) + 4 / 4 + 0.125


def test_checks_go_through_the_head_unless_a_cheaper_table_is_given() -> None:
    c = composition((2, 8), [8, 8], [8, 8], 8, check_tokens=[8, 0], host_sync_at_checks=False)
    cheap, through_head = simple_profile(), simple_profile(check=False)
    assert time_s(cheap, c) - time_s(through_head, c) == 8 / 4 - 8 / 8


def test_a_classifier_has_a_price_of_its_own_beside_the_heads() -> None:
    profile = simple_profile(check_classifier=line((0.0, 1 / 32)))
    checks = {"check_tokens": [8, 0], "classifier_tokens": [16, 0]}
    none = composition((2, 8), [16, 8], [16, 8], 8)
    head, classifier = (
        time_s(profile, composition((2, 8), [16, 8], [16, 8], 8, host_sync_at_checks=False, **{key: rows}))
        for key, rows in checks.items()
    )
    both = composition((2, 8), [16, 8], [16, 8], 8, host_sync_at_checks=False, **checks)
    assert head - time_s(profile, none) == 8 / 4
    assert classifier - time_s(profile, none) == 16 / 32
    assert time_s(profile, both) - time_s(profile, none) == 8 / 4 + 16 / 32
    assert profile.check_table(Confidence.CLASSIFIER) is profile.check_classifier
    assert profile.check_table(Confidence.MARGIN) is profile.check
    assert simple_profile(check=False).check_table(Confidence.MARGIN).time_s.tolist() == line(HEAD).time_s.tolist()


def test_the_host_waits_for_a_classifier_as_for_the_head() -> None:
    profile = simple_profile(
        Runtime(0.0, 0.25, sync_s=0.125, host_overhead_s=0.0, graph_batch_sizes=None),
        check_classifier=line((0.0, 1 / 32)),
    )
    by_head = composition((2, 8), [4, 4], [40, 40], 4, check_tokens=[4, 0])
    by_classifier = composition((2, 8), [4, 4], [40, 40], 4, classifier_tokens=[4, 0])
    assert time_s(profile, by_head) - time_s(profile, by_classifier) == 4 / 4 - 4 / 32


def test_a_classifier_whose_cost_is_not_known_is_refused() -> None:
    c = composition((2, 8), [16, 8], [16, 8], 8, classifier_tokens=[16, 0])
    with pytest.raises(UserError, match=r"exits\.confidence='classifier'.*check_classifier"):
        time_s(simple_profile(), c)


def test_only_dense_rows_without_prefill_are_padded_and_only_up_to_the_largest_size() -> None:
    plain = simple_profile()
    padded = plain.with_runtime(dataclasses.replace(NO_HOST, graph_batch_sizes=(4, 16)))
    for rows, runs_as in ((1, 4), (4, 4), (5, 16), (16, 16), (17, 17)):
        c = composition((8,), [rows], [rows], rows)
        assert time_s(padded, c) == time_s(plain, c) + 8 * (runs_as - rows) / 64
    mixed = composition((8,), [5], [5], 5, prefill=(PrefillChunk(3, 0, 8),))
    assert time_s(padded, mixed) == time_s(plain, mixed)


def test_loading_slows_the_device_but_not_the_host() -> None:
    c = composition((8,), [10], [100], 10)
    runtime = dataclasses.replace(NO_HOST, host_overhead_s=1.0)
    profile = simple_profile(runtime, load_slowdown=1.5)
    loading = dataclasses.replace(c, loading=True)
    assert time_s(profile, loading) == 1.5 * (time_s(profile, c) - 1.0) + 1.0
    host_bound = profile.with_runtime(dataclasses.replace(NO_HOST, launch_s_per_layer=64.0))
    assert time_s(host_bound, loading) == time_s(host_bound, c) == 8 * 64.0


def test_layer_classes_are_priced_by_the_layers_of_each_in_a_band() -> None:
    profile = simple_profile()
    dear = dataclasses.replace(profile.layer_tables[0], dense=line((4.0, 1 / 64)))
    both = dataclasses.replace(
        profile, layer_tables=(profile.layer_tables[0], dear), layer_class=(0, 0, 0, 1, 0, 0, 0, 1)
    )
    for bounds, of_dear in (((3,), 0), ((4,), 1), ((8,), 2)):
        c = composition(bounds, [4], [4], 0)
        assert time_s(both, c) == time_s(profile, c) + 3.0 * of_dear


def test_flat_profile_costs_the_same_whatever_runs() -> None:
    profile = flat_profile(0.125)
    busy = composition((4,), [300], [30_000], 300, prefill=(PrefillChunk(2000, 100, 4),))
    assert time_s(profile, busy) == time_s(profile, composition((1,), [1], [1], 0)) == 0.125
    assert not profile.outside_grid(busy)[0]


def test_scaling_multiplies_iterations_and_changes_no_load() -> None:
    profile = simple_profile(dataclasses.replace(NO_HOST, host_overhead_s=0.5))
    c = composition((8,), [10], [100], 10)
    assert time_s(profile.scaled(1.25).scaled(2.0), c) == 2.5 * time_s(profile, c)
    assert profile.scaled(2.0).load_time_s(10**9) == profile.load_time_s(10**9) == 10**9 / profile.load_bytes_per_s


def test_the_host_takes_its_time_for_each_request_of_an_iteration() -> None:
    """Decodes and chunks count alike; beside a device that is slower, a host that prepares ahead takes no time."""
    plain, slow = simple_profile(NO_HOST), simple_profile(dataclasses.replace(NO_HOST, host_s_per_request=0.5))
    decodes = composition((8,), [10], [100], 10)
    chunks = composition((8,), [10], [100], 10, prefill=(PrefillChunk(16, 0, 8), PrefillChunk(8, 0, 8)))
    assert time_s(slow, decodes) == time_s(plain, decodes) + 0.5 * 10
    assert time_s(slow, chunks) == time_s(plain, chunks) + 0.5 * 12
    ahead = dataclasses.replace(decodes, host_ahead=True)
    assert time_s(slow, ahead) == time_s(plain, ahead) > 0.5 * 10


def test_outside_the_grid_is_flagged_and_the_last_slope_goes_on() -> None:
    profile = simple_profile()
    inside, more_rows = composition((8,), [100], [100_100], 100), composition((8,), [1], [1], 201)
    long_kv, large_batch = composition((8,), [10], [20_000], 10), composition((8,), [200], [200], 1)
    chunk = composition((8,), [0], [0], 1, prefill=(PrefillChunk(50, 1001, 8),))
    flags = [bool(profile.outside_grid(c)[0]) for c in (inside, more_rows, long_kv, large_batch, chunk)]
    assert flags == [False, True, True, True, True]
    assert time_s(profile, more_rows) == 8 * (1 + 1 / 64 + 1 / 1024) + 201 / 8
    assert time_s(profile, long_kv) == 8 * (1 + 10 / 64 + 20_000 / 1024) + 10 / 8
    assert time_s(profile, large_batch) == pytest.approx(8 * (1 + 200 / 64 + 200 / 1024) + 1 / 8)


@pytest.mark.parametrize("bounds", [(4, 4), (5, 3), (0, 4), (9,), ()])
def test_bounds_must_ascend_within_the_model(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="bounds"):
        time_s(simple_profile(), composition(bounds, [1] * len(bounds), [1] * len(bounds), 1))


def test_prefill_depth_must_be_a_bound() -> None:
    with pytest.raises(ValueError, match="prefill depths"):
        time_s(simple_profile(), composition((2, 8), [1, 1], [1, 1], 1, prefill=(PrefillChunk(4, 0, 5),)))


@pytest.mark.parametrize(
    ("key", "value"), [("load_bytes_per_s", 0.0), ("load_slowdown", 0.5), ("time_factor", float("nan"))]
)
def test_impossible_figures_are_the_users_error(key: str, value: float) -> None:
    with pytest.raises(UserError, match=key):
        dataclasses.replace(simple_profile(), **{key: value})


@st.composite
def leaps(draw: st.DrawFn, n_layers: int) -> Composition:
    """Iterations of one model in which rows only leave from band to band; some beyond every grid."""
    n_bands = draw(st.integers(1, 4))
    bounds = sorted(draw(st.sets(st.integers(1, n_layers), min_size=n_bands, max_size=n_bands)))
    n = draw(st.integers(2, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    top = draw(st.sampled_from([3, 40, 1000, 20_000]))
    decode = -np.sort(-rng.integers(0, top, (n, n_bands)), axis=1)
    kv_tokens = decode * rng.integers(1, 5000, (n, 1)) + rng.integers(0, 9, (n, 1)) * (decode > 0)
    most = None
    if draw(st.booleans()):
        most = -(-kv_tokens[:, 0] // np.maximum(decode[:, 0], 1)) + rng.integers(0, 3000, n)
    return Composition(
        bounds=tuple(bounds),
        decode_tokens=decode,
        decode_kv_tokens=kv_tokens,
        decode_kv_least=None if most is None else np.ones(n, np.int64),
        decode_kv_most=most,
        sampled_tokens=rng.integers(0, top, n),
        check_tokens=draw(st.sampled_from([None, decode * rng.integers(0, 2, (n, n_bands))])),
        classifier_tokens=draw(st.sampled_from([None, decode * rng.integers(0, 2, (n, n_bands))])),
        propagated_tokens=draw(st.sampled_from([None, rng.integers(0, top, (n, n_bands))])),
        host_sync_at_checks=draw(st.booleans()),
        loading=draw(st.booleans()),
    )


def alone(c: Composition, k: int) -> Composition:
    def row(a: np.ndarray | None) -> np.ndarray | None:
        return None if a is None else a[k : k + 1]

    return dataclasses.replace(
        c, decode_tokens=c.decode_tokens[k : k + 1], decode_kv_tokens=c.decode_kv_tokens[k : k + 1],
        sampled_tokens=c.sampled_tokens[k : k + 1], check_tokens=row(c.check_tokens),
        classifier_tokens=row(c.classifier_tokens), propagated_tokens=row(c.propagated_tokens),
        decode_kv_least=row(c.decode_kv_least), decode_kv_most=row(c.decode_kv_most),
    )  # fmt: skip


@pytest.mark.slow
@settings(max_examples=150)
@given(data=st.data(), launch_s=st.sampled_from([0.0, 37e-6, 300e-6]), padded=st.booleans(), padded_kv=st.booleans())
def test_a_leap_costs_the_same_bits_as_its_iterations(
    data: st.DataObject, launch_s: float, padded: bool, padded_kv: bool
) -> None:
    profile = load_profile("opt-1.3b@a100-40gb")
    runtime = dataclasses.replace(profile.runtime, launch_s_per_layer=launch_s)
    runtime = runtime if padded else dataclasses.replace(runtime, graph_batch_sizes=None)
    classifier = RowsTable(np.array([1, 300]), np.array([7e-6, 31e-6]))
    profile = dataclasses.replace(
        profile, runtime=runtime, unequal_kv_factor=1.07, time_factor=1.05, check_classifier=classifier,
        padded_kv=padded_kv,
    )  # fmt: skip
    c = data.draw(leaps(24))
    together = profile.iteration_time_s(c)
    outside = profile.outside_grid(c)
    floor_s = profile.iteration_floor_s(c)
    assert np.all(together > 0)
    assert np.all(np.isfinite(together))
    for k in range(c.n_iterations):
        one = alone(c, k)
        assert profile.iteration_time_s(one)[0] == together[k]
        assert profile.outside_grid(one)[0] == outside[k]
        assert profile.iteration_floor_s(one)[0] == floor_s[k]


@settings(max_examples=60)
@given(batches=st.lists(st.integers(1, 400), min_size=1, max_size=5), context=st.integers(1, 3000), of=st.data())
def test_decodes_and_prompts_alone_cost_the_same_bits_as_their_compositions(
    batches: list[int], context: int, of: st.DataObject
) -> None:
    profile, layers = load_profile("opt-1.3b@a100-40gb"), of.draw(st.integers(1, 24))
    batch, none = np.array(batches), np.zeros((1, 1), np.int64)
    decodes = Composition((layers,), batch[:, None], batch[:, None] * context, batch)
    cached, prompt, budget = context - 1, context - 1 + of.draw(st.integers(1, 4096)), of.draw(st.integers(600, 5000))
    time_s = floor_s = 0.0
    for before in range(cached, prompt, budget):
        chunk, finishes = PrefillChunk(min(budget, prompt - before), before, layers), prompt - before <= budget
        of_chunk = Composition((layers,), none, none, np.array([int(finishes)]), prefill=(chunk,))
        time_s += float(profile.iteration_time_s(of_chunk)[0])
        floor_s += float(profile.iteration_floor_s(of_chunk)[0])
    for _ in range(2):  # one after the other, in the same room to work in
        np.testing.assert_array_equal(
            profile.decodes_time_s(layers, batch, batch * context), profile.iteration_time_s(decodes)
        )
        np.testing.assert_array_equal(
            profile.decodes_floor_s(layers, batch, batch * context), profile.iteration_floor_s(decodes)
        )
        assert profile.prompt_time_s(layers, prompt, budget, cached) == (time_s, floor_s)


@settings(max_examples=40)
@given(
    first=st.integers(1, 40), more=st.integers(0, 200), context=st.floats(1.0, 3000.0), further=st.floats(0.0, 900.0),
    arrivals=st.sampled_from([0.0, 0.5, 3.0, 40.0, np.inf]),
)  # fmt: skip
def test_an_operating_point_is_the_smallest_batch_that_keeps_up(
    first: int, more: int, context: float, further: float, arrivals: float
) -> None:
    profile, layers = load_profile("opt-1.3b@a100-40gb"), 12
    batch = np.arange(first, first + more + 1)
    kv_tokens = np.rint(batch * context).astype(np.int64)
    decode_s = profile.decodes_time_s(layers, batch, kv_tokens)
    prompt_s, prompt_floor_s = profile.prompt_time_s(layers, 700, 512, 30)
    rate = 1.0 / (prompt_s + further * decode_s / batch)
    at = int(np.argmax(rate >= arrivals)) if (rate >= arrivals).any() else more
    of = (700, 30, 512), (first, first + more), (context, further, arrivals)
    priced, known = profile.operating.of(layers, *of), profile.operating.of(layers, *of, decode_s)
    assert priced[:2] == (first + at, int((rate >= arrivals).any()))
    assert priced[2:7] == (prompt_s, prompt_floor_s, rate[at], rate.max(), decode_s[at])
    assert priced.decode_floor_s == profile.decodes_floor_s(layers, batch[at : at + 1], kv_tokens[at : at + 1])[0]
    assert known[:7] == priced[:7]


def test_another_runtime_takes_its_assumptions_along() -> None:
    shipped = load_profile("opt-1.3b@a100-40gb")
    assert any(a.change == "runtime.sync_s" for a in shipped.provenance.assumptions)
    eager = shipped.with_runtime(preset("eager"))
    assert not any(a.change.startswith("runtime.") for a in eager.provenance.assumptions)
    assert any(a.change == "model.chars_per_token" for a in eager.provenance.assumptions)
    assert "launch_s_per_layer" in {source.quantity for source in eager.runtime.sources}
