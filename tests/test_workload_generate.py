"""A workload is its specification and a seed: counts, order, block size, components and text lengths."""

from __future__ import annotations

import dataclasses
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from helios_sim.errors import UserError
from helios_sim.profile.spec import ModelSpec
from helios_sim.request import NS_PER_S, RequestBlock
from helios_sim.workload import (
    AllAtOnce,
    Arrivals,
    ClosedLoop,
    Constant,
    DrawnLengths,
    Drift,
    Exponential,
    Fixed,
    Gamma,
    LinearDrift,
    Lognormal,
    Per,
    PeriodicDrift,
    Poisson,
    RequestTrace,
    StepDrift,
    TaskMix,
    TraceArrivals,
    TraceLengths,
    Workload,
    generate,
    up_to,
)

MODEL = ModelSpec(
    name="tiny",
    family="opt",
    n_layers=2,
    d_model=8,
    n_heads=2,
    n_kv_heads=2,
    head_dim=4,
    d_ff=32,
    gated_mlp=False,
    vocab_size=16,
    tied_embeddings=True,
    max_context_tokens=64,
    learned_positions=True,
    bias=True,
    weight_bytes_per_value=2,
    kv_bytes_per_value=2,
    chars_per_token=4.0,
)
TRACE = RequestTrace(
    "hand-made",
    np.cumsum(np.arange(300, dtype=np.int64) % 7) * 1_000_003,
    np.arange(300, dtype=np.int64) % 91 + 1,
    np.arange(300, dtype=np.int64) % 17 + 1,
)
LENGTHS = DrawnLengths(Lognormal.from_percentiles(100, 400, maximum=2000), Exponential(50))
ONE_TASK = TaskMix.single("text")
COLUMNS = [field.name for field in dataclasses.fields(RequestBlock)]

rates = st.floats(0.01, 1e4)
open_arrivals = st.one_of(
    st.builds(Poisson, rates),
    st.builds(Gamma, rates, st.floats(0.1, 15.0)),
    st.builds(Constant, rates),
    st.builds(TraceArrivals, st.just(TRACE), st.floats(0.1, 10.0)),
)
any_arrivals = open_arrivals | st.just(AllAtOnce()) | st.builds(ClosedLoop, st.integers(1, 8))
one_length = st.one_of(
    st.builds(Fixed, st.integers(1, 5000)),
    st.builds(Lognormal, st.floats(1.0, 5000.0), st.floats(0.01, 4.0)),
    st.builds(Exponential, st.floats(0.1, 5000.0)),
)
any_lengths = st.builds(DrawnLengths, one_length, one_length) | st.builds(
    TraceLengths, st.just(TRACE), resample=st.booleans()
)
drifts = st.one_of(
    st.builds(StepDrift, st.floats(0, 1)),
    st.builds(LinearDrift, st.floats(0, 0.5), st.floats(0.6, 1)),
    st.builds(PeriodicDrift, st.floats(0.05, 5)),
)


def joined(workload: Workload, seed: int, block_requests: int = 4096) -> RequestBlock:
    blocks = list(generate(workload, seed, block_requests))
    return RequestBlock(*(np.concatenate([getattr(block, name) for block in blocks]) for name in COLUMNS))


def same(a: RequestBlock, b: RequestBlock, names: list[str] = COLUMNS) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    arrivals=any_arrivals,
    lengths=any_lengths,
    drift=drifts,
    n=st.integers(1, 300),
    block=st.integers(1, 400),
    seed=st.integers(0, 2**64),
)
def test_requests_are_complete_ordered_and_the_same_in_any_block_size(
    arrivals: Arrivals, lengths: DrawnLengths | TraceLengths, drift: Drift, n: int, block: int, seed: int
) -> None:
    per = Per.REQUESTS if isinstance(arrivals, AllAtOnce | ClosedLoop) else Per.SECONDS
    mix = TaskMix(("a", "b", "c"), (0.5, 0.5, 0.0), (0.0, 0.2, 0.8), drift, per)
    workload = Workload(arrivals, lengths, mix, n)
    whole = joined(workload, seed)
    assert same(whole, joined(workload, seed, block))
    assert np.array_equal(whole.request_id, np.arange(n))
    assert all(getattr(whole, name).dtype == np.int64 for name in COLUMNS)
    assert whole.arrival_ns[0] >= 0
    assert (np.diff(whole.arrival_ns) >= 0).all()
    assert whole.prompt_chars.min() >= 1
    assert whole.output_chars.min() >= 1
    assert whole.task.min() >= 0
    assert whole.task.max() <= 2
    assert whole.text_start.min() >= 0
    assert whole.text_start.max() < 2**62


def test_blocks_have_the_size_asked_for() -> None:
    workload = Workload(Poisson(1.0), LENGTHS, ONE_TASK, 10)
    assert [len(block) for block in generate(workload, 0, 4)] == [4, 4, 2]


def test_the_seed_decides() -> None:
    workload = Workload(Poisson(1.0), LENGTHS, TaskMix(("a", "b"), (1, 1)), 500)
    assert same(joined(workload, 3), joined(workload, 3))
    for name in ("arrival_ns", "prompt_chars", "output_chars", "task", "text_start"):
        assert not same(joined(workload, 3), joined(workload, 4), [name])


def test_a_workload_survives_the_way_to_another_process() -> None:
    workload = Workload(TraceArrivals(TRACE, 2.0), TraceLengths(TRACE, resample=True), ONE_TASK, 100)
    assert same(joined(workload, 1), joined(pickle.loads(pickle.dumps(workload)), 1))


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ({"arrivals": Gamma(3.0, 5.0)}, {"arrival_ns"}),
        ({"lengths": DrawnLengths(Exponential(100), LENGTHS.output)}, {"prompt_chars"}),
        ({"lengths": DrawnLengths(LENGTHS.prompt, Lognormal(20, 1.0))}, {"output_chars"}),
        ({"mix": TaskMix(("a", "b", "c"), (1, 8, 1))}, {"task"}),
    ],
)
def test_changing_one_component_leaves_the_others_where_they_were(change: dict[str, object], moved: set[str]) -> None:
    workload = Workload(Poisson(1.0), LENGTHS, TaskMix(("a", "b", "c"), (1, 1, 1)), 2000)
    before, after = joined(workload, 5), joined(dataclasses.replace(workload, **change), 5)  # type: ignore[arg-type]
    assert {name for name in COLUMNS if not same(before, after, [name])} == moved


def test_more_requests_begin_with_the_same_requests() -> None:
    few, many = (joined(Workload(Poisson(1.0), LENGTHS, ONE_TASK, n), 2) for n in (100, 5000))
    assert all(np.array_equal(getattr(few, name), getattr(many, name)[:100]) for name in COLUMNS)


@pytest.mark.slow
@given(slow=rates, factor=st.floats(0.01, 100.0), cv=st.floats(0.2, 5.0))
def test_a_rate_scales_the_same_gaps(slow: float, factor: float, cv: float) -> None:
    at_rate = joined(Workload(Gamma(slow, cv), LENGTHS, ONE_TASK, 200), 9).arrival_ns
    faster = joined(Workload(Gamma(slow * factor, cv), LENGTHS, ONE_TASK, 200), 9).arrival_ns
    # Both are rounded to whole ns, and scaling multiplies the rounding of one by the factor.
    assert np.allclose(faster * factor, at_rate, rtol=1e-12, atol=0.5 + 0.5 * factor)


def test_gamma_gaps_with_cv_1_are_poisson_gaps() -> None:
    poisson, gamma = (joined(Workload(a, LENGTHS, ONE_TASK, 1000), 0) for a in (Poisson(2.0), Gamma(2.0, 1.0)))
    assert same(poisson, gamma)


def test_constant_arrivals_do_not_drift_from_their_rate() -> None:
    arrival_ns = joined(Workload(Constant(3.0), LENGTHS, ONE_TASK, 30_001), 0).arrival_ns
    assert arrival_ns[0] == 0
    assert arrival_ns[-1] == 10_000 * NS_PER_S
    assert np.ptp(np.diff(arrival_ns)) <= 1


def test_closed_loop_and_full_queue_arrive_at_zero() -> None:
    closed, queue = Workload(ClosedLoop(7), LENGTHS, ONE_TASK, 50), Workload(AllAtOnce(), LENGTHS, ONE_TASK, 50)
    assert (closed.users, queue.users) == (7, None)
    assert not joined(closed, 0).arrival_ns.any()
    assert same(joined(closed, 0), joined(queue, 0))


@given(tokens=st.integers(1, 200_000), chars_per_token=st.floats(1.0, 20.0))
def test_a_model_with_the_reference_tokenizer_gets_its_token_counts_back(tokens: int, chars_per_token: float) -> None:
    lengths = DrawnLengths(Fixed(tokens), Fixed(1))
    workload = Workload(AllAtOnce(), lengths, ONE_TASK, 1, chars_per_token)
    model = dataclasses.replace(MODEL, chars_per_token=chars_per_token)
    (request,) = joined(workload, 0).rows()
    assert (model.tokens(request.prompt_chars), model.tokens(request.output_chars)) == (tokens, 1)


def test_lengths_may_be_given_in_characters() -> None:
    workload = Workload(AllAtOnce(), DrawnLengths(Fixed(17), Fixed(3)), ONE_TASK, 2, chars_per_token=None)
    block = joined(workload, 0)
    assert block.prompt_chars.tolist() == [17, 17]
    assert block.output_chars.tolist() == [3, 3]


def test_a_trace_is_replayed_as_it_is_and_at_another_speed() -> None:
    workload = Workload(TraceArrivals(TRACE), TraceLengths(TRACE), ONE_TASK, chars_per_token=2.0)
    replayed = joined(workload, 0)
    assert workload.requests == len(TRACE)
    assert TRACE.arrival_ns is not None
    assert np.array_equal(replayed.arrival_ns, TRACE.arrival_ns)
    assert np.array_equal(replayed.prompt_chars, 2 * TRACE.prompt_tokens)
    assert np.array_equal(replayed.output_chars, 2 * TRACE.output_tokens)
    double = joined(dataclasses.replace(workload, arrivals=TraceArrivals(TRACE, 2.0)), 0)
    assert (abs(2 * double.arrival_ns - replayed.arrival_ns) <= 1).all()


def test_resampled_lengths_keep_prompt_and_answer_together() -> None:
    block = joined(Workload(Poisson(1.0), TraceLengths(TRACE, resample=True), ONE_TASK, 5000, 1.0), 0)
    rows = set(zip(TRACE.prompt_tokens.tolist(), TRACE.output_tokens.tolist(), strict=True))
    drawn = set(zip(block.prompt_chars.tolist(), block.output_chars.tolist(), strict=True))
    assert drawn == rows  # 5,000 draws miss one of 300 rows with a chance of 2e-5


def test_a_block_does_not_share_memory_with_its_trace() -> None:
    workload = Workload(TraceArrivals(TRACE), TraceLengths(TRACE), ONE_TASK, chars_per_token=1.0)
    for block in generate(workload, 0):
        assert TRACE.arrival_ns is not None
        assert not np.shares_memory(block.arrival_ns, TRACE.arrival_ns)
        assert not np.shares_memory(block.prompt_chars, TRACE.prompt_tokens)


LENGTHS_ONLY = RequestTrace("lengths.csv", None, TRACE.prompt_tokens, TRACE.output_tokens)


@pytest.mark.parametrize(
    ("make", "key", "part"),
    [
        (lambda: Poisson(0.0), "workload.arrivals.rate_per_s", "above 0"),
        (lambda: Poisson(float("nan")), "workload.arrivals.rate_per_s", "finite"),
        (lambda: Constant(-1.0), "workload.arrivals.rate_per_s", "above 0"),
        (lambda: Gamma(1.0, 0.0), "workload.arrivals.cv", "constant"),
        (lambda: ClosedLoop(0), "workload.arrivals.users", "at least 1"),
        (lambda: TraceArrivals(TRACE, -2.0), "workload.arrivals.rate_scale", "above 0"),
        (lambda: TraceArrivals(LENGTHS_ONLY), "workload.arrivals.trace", "lengths only"),
        (lambda: Fixed(0), "workload.lengths.value", "at least 1"),
        (lambda: Lognormal(100, 0.0), "workload.lengths.sigma", "fixed"),
        (lambda: Lognormal(100, 1.0, 50, 40), "workload.lengths.maximum", "from the minimum, 50"),
        (lambda: Lognormal.from_percentiles(100, 100), "workload.lengths.p95", "above the median"),
        (lambda: Exponential(0.0), "workload.lengths.mean", "above 0"),
        (lambda: TaskMix((), ()), "workload.mix.tasks", "at least one"),
        (lambda: TaskMix(("a", "a"), (1, 1)), "workload.mix.tasks", "different"),
        (lambda: TaskMix(("a", "b"), (1,)), "workload.mix.tasks", "2 tasks"),
        (lambda: TaskMix(("a", "b"), (0, 0)), "workload.mix.tasks", "above 0"),
        (lambda: TaskMix(("a", "b"), (1, 1), (0, 1)), "workload.mix.drift", "go together"),
        (lambda: StepDrift(-0.1), "workload.mix.at", "at least 0"),
        (lambda: LinearDrift(0.5, 0.5), "workload.mix.end", "after the start"),
        (lambda: PeriodicDrift(0.0), "workload.mix.period", "above 0"),
        (lambda: Workload(Poisson(1.0), LENGTHS, ONE_TASK), "workload.n_requests", "give a number"),
        (lambda: Workload(Poisson(1.0), LENGTHS, ONE_TASK, 0), "workload.n_requests", "at least 1"),
        (lambda: Workload(TraceArrivals(TRACE), LENGTHS, ONE_TASK, 301), "workload.n_requests", "at most 300"),
        (lambda: Workload(Poisson(1.0), TraceLengths(TRACE), ONE_TASK, 301), "workload.n_requests", "resample"),
        (lambda: Workload(Poisson(1.0), LENGTHS, ONE_TASK, 1, 0.5), "workload.chars_per_token", "1 to 1000"),
        (lambda: Workload(Poisson(1.0), TraceLengths(TRACE), ONE_TASK, 1, None), "workload.chars_per_token", "tokens"),
        (
            lambda: Workload(
                ClosedLoop(1), LENGTHS, TaskMix(("a", "b"), (1, 0), (0, 1), StepDrift(10.0), Per.SECONDS), 10
            ),
            "workload.mix.per",
            "per=requests",
        ),
        (lambda: generate(Workload(Poisson(1.0), LENGTHS, ONE_TASK, 1), -1), "seed", "at least 0"),
        (lambda: generate(Workload(Poisson(1.0), LENGTHS, ONE_TASK, 1), 0, 0), "workload.block_requests", "1"),
        (lambda: joined(Workload(Constant(1e-9), LENGTHS, ONE_TASK, 100), 0), "workload.arrivals", "146 years"),
    ],
)
def test_what_cannot_be_is_refused_with_the_key_and_the_fix(make, key: str, part: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as caught:
        make()
    assert caught.value.key == key
    assert part in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_memory_is_that_of_a_block_not_of_the_workload() -> None:
    workload = Workload(Poisson(6.0), LENGTHS, TaskMix(("a", "b"), (1, 0), (0, 1), PeriodicDrift(0.1)), 300_000)
    tracemalloc.start()
    requests = sum(len(block) for block in generate(workload, 0))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert requests == 300_000
    assert peak_bytes < 2_000_000  # all six columns at once would be 14.4 MB


@pytest.mark.bench
def test_speed_of_a_million_requests(benchmark) -> None:  # type: ignore[no-untyped-def]
    workload = Workload(Poisson(6.0), LENGTHS, TaskMix(("a", "b"), (1, 0), (0, 1), PeriodicDrift(0.1)), 1_000_000)
    assert benchmark(lambda: sum(len(block) for block in generate(workload, 0))) == 1_000_000


@pytest.mark.parametrize("block_requests", [3, 100])
def test_up_to_a_moment_come_those_before_it_and_the_next(block_requests: int) -> None:
    work = Workload(Constant(10.0), DrawnLengths(Fixed(5), Fixed(5)), ONE_TASK, 10)
    whole = [request for block in generate(work, 0) for request in block.rows()]
    blocks, requests = up_to(generate(work, 0, block_requests), whole[4].arrival_ns)
    assert [request for block in blocks for request in block.rows()] == whole[:6]
    assert requests == 6
    assert up_to(generate(work, 0, block_requests), 10**15)[1] == 10
