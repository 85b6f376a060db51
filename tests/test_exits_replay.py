"""Replay against a slow reference that follows one token at a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.published import THRESHOLD, published_trace
from helios_sim.exits.replay import offline_exits, replay
from helios_sim.exits.rule import Clairvoyant, Confidence, ExitRule, FixedCap, FullDepth, PerToken
from helios_sim.exits.trace import ExitTrace

EXITS = (3, 6, 9, 12)
RULES = (FullDepth(), FixedCap(0.5), PerToken(0.5), PerToken(0.5, Confidence.MARGIN), PerToken(1.1), Clairvoyant())


def any_trace(tokens: int = 24) -> st.SearchStrategy[ExitTrace]:
    """Confidence and agreement without any order between exits, as a measurement may have them."""
    shape = (tokens, len(EXITS))
    numbers = arrays(np.float32, shape, elements=st.floats(0, 1, width=32))

    def build(confidence: np.ndarray, margin: np.ndarray, agree: np.ndarray) -> ExitTrace:
        agree = agree.copy()
        agree[:, -1] = True
        base = synthetic_trace(exits=EXITS, tasks=("a", "b"), tokens=tokens // 2)
        return replace(
            base, confidences={Confidence.MAX_PROBABILITY: confidence, Confidence.MARGIN: margin}, agree=agree
        )

    return st.builds(build, numbers, numbers, arrays(np.bool_, shape))


def one_token(trace: ExitTrace, t: int, rule: ExitRule, layers: int) -> tuple[int, bool]:
    """Depth at which token t leaves, and whether that is a breach."""
    loaded = [(depth, e) for e, depth in enumerate(trace.exits) if depth <= layers]
    if isinstance(rule, FullDepth):
        return layers, False
    if isinstance(rule, Clairvoyant):
        return next((depth for depth, e in loaded if trace.agree[t, e]), layers), False
    record = trace.recorded(getattr(rule, "confidence", Confidence.MAX_PROBABILITY))
    assert record is not None
    confident = {depth: bool(record[t, e] >= np.float32(rule.threshold)) for depth, e in loaded}
    if isinstance(rule, FixedCap):
        return layers, layers < trace.n_layers and not confident[layers]
    for depth, _ in loaded:
        if confident[depth]:
            return depth, False
    return layers, layers < trace.n_layers


@pytest.mark.slow
@given(any_trace(), st.sampled_from(RULES), st.sampled_from(EXITS))
def test_replay_equals_the_rules_one_token_at_a_time(trace: ExitTrace, rule: ExitRule, layers: int) -> None:
    result = replay(trace, rule, layers)
    assert result.exits == EXITS[: EXITS.index(layers) + 1]
    for t in range(trace.n_tokens):
        depth, breach = one_token(trace, t, rule, layers)
        assert result.exits[result.exit_index[t]] == depth
        assert result.breach[t] == breach
        assert result.agreed[t] == trace.agree[t, EXITS.index(depth)]
    assert np.array_equal(result.agree, trace.agree[:, : len(result.exits)])


@pytest.mark.slow
@given(any_trace(), st.floats(0, 1), st.sampled_from(EXITS))
def test_clairvoyant_saves_the_most_layers_that_its_budget_allows(trace: ExitTrace, budget: float, layers: int) -> None:
    free, spent = (replay(trace, Clairvoyant(b), layers) for b in (0.0, budget))
    depth = np.asarray(free.exits)
    for task in range(2):
        rows = trace.task == task
        allowed = int(np.floor(budget * rows.sum() + 1e-9))
        savings = np.sort(depth[free.exit_index[rows]] - depth[0])[::-1]
        # Tokens that agree at no loaded exit are the first to be given up, and save as much as any.
        assert depth[spent.exit_index[rows]].sum() == depth[free.exit_index[rows]].sum() - savings[:allowed].sum()
        moved = spent.exit_index[rows] != free.exit_index[rows]
        assert moved.sum() <= allowed
        if layers == 12:
            assert (~spent.agreed[rows]).sum() == min(allowed, (free.exit_index[rows] > 0).sum())


def test_clairvoyant_budget_is_spread_over_the_text() -> None:
    trace = published_trace("opt-1.3b", unchanged=0.7, prompts_per_task=20)
    result, deepest = replay(trace, Clairvoyant(0.02), 24), replay(trace, Clairvoyant(), 24).exit_index == 2
    for first, end in pairwise(trace.task_first.tolist()):
        changed = ~result.agreed[first:end]
        assert changed.sum() == 80  # 2 % of 4,000
        half = 80 * deepest[first : first + 2000].sum() / deepest[first:end].sum()
        assert abs(changed[:2000].sum() - half) <= 1


@pytest.mark.parametrize("trace", [synthetic_trace(exits=EXITS), published_trace("opt-1.3b", prompts_per_task=10)])
def test_a_deeper_cap_never_changes_more_tokens_when_agreement_is_nested(trace: ExitTrace) -> None:
    threshold = trace.published_threshold or 0.6
    changed = [np.flatnonzero(~replay(trace, FixedCap(threshold), layers).agreed) for layers in trace.exits]
    for shallow, deep in pairwise(changed):
        assert set(deep) < set(shallow)
    assert len(changed[-1]) == 0


def test_a_cap_at_the_whole_model_is_full_depth() -> None:
    trace = synthetic_trace(exits=EXITS)
    capped, full = replay(trace, FixedCap(2.0), 12), replay(trace, FullDepth(), 12)
    for name in ("exit_index", "breach", "agreed"):
        assert np.array_equal(getattr(capped, name), getattr(full, name))
    assert full.agreed.all()
    assert not full.breach.any()


def test_layers_must_be_an_exit() -> None:
    with pytest.raises(UserError, match=r"opt-6\.7b has no exit at layer 10; exits: 9, 32"):
        replay(published_trace("opt-6.7b", prompts_per_task=1), FullDepth(), 10)


@pytest.mark.parametrize("rule", [PerToken(0.8), FixedCap(0.8), PerToken(THRESHOLD, Confidence.MARGIN), PerToken(2.0)])
def test_published_exits_answer_only_their_threshold(rule: ExitRule) -> None:
    trace = published_trace("opt-1.3b", prompts_per_task=1)
    with pytest.raises(UserError, match=r"answers only max_probability 0\.9"):
        replay(trace, rule, 6)
    assert replay(trace, PerToken(THRESHOLD), 6).breach.any()


def test_a_replay_is_made_once_for_a_trace() -> None:
    trace = synthetic_trace()
    assert replay(trace, PerToken(0.5), 8) is replay(trace, PerToken(0.5), 8)
    assert replay(trace, PerToken(0.5), 8) is not replay(synthetic_trace(), PerToken(0.5), 8)


@pytest.mark.slow
@given(any_trace(), st.sampled_from([None, ("a",), ("b", "a")]))
def test_offline_sums_equal_what_replay_gives(trace: ExitTrace, tasks: tuple[str, ...] | None) -> None:
    offline = offline_exits(trace, 0.5, Confidence.MAX_PROBABILITY, tasks)
    rows = np.isin(trace.task, [trace.tasks.index(name) for name in tasks or trace.tasks])
    for e, layers in enumerate(EXITS[:-1]):
        capped = replay(trace, FixedCap(0.5), layers)
        assert offline.confident_share[e] == pytest.approx(1 - capped.breach[rows].mean())
        assert offline.disagreement[e] == pytest.approx(1 - capped.agreed[rows].mean())
    leaves = replay(trace, PerToken(0.5), 12).exit_index[rows]
    assert offline.exit_share.tolist() == pytest.approx([(leaves == e).mean() for e in range(4)])
    assert offline.prompt_tokens.sum() == rows.sum()
    assert offline.prompt_disagreements.sum(axis=0).tolist() == (~trace.agree[rows]).sum(axis=0).tolist()
    assert trace.bits is not None
    assert offline.bits_per_char is not None
    assert offline.bits_per_char[1] == pytest.approx(trace.bits[rows, 1].sum() / trace.chars[rows].sum(), rel=1e-5)


def test_offline_keeps_prompts_apart_and_bits_to_human_text() -> None:
    trace = synthetic_trace(tokens=100, prompt_tokens=30, human_text=False)
    offline = offline_exits(trace, 0.5, Confidence.MARGIN)
    assert offline.prompt_tokens.tolist() == [30, 30, 30, 10]
    assert offline.prompt_disagreements[3].tolist() == (~trace.agree[90:]).sum(axis=0).tolist()
    assert offline.bits_per_char is None
    assert offline.chars_per_token == 4
    with pytest.raises(UserError, match="poems"):
        offline_exits(synthetic_trace(tasks=("a",)), 0.5, Confidence.MARGIN, ("poems",))
