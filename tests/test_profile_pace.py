"""A profile at another pace: what computes few tokens at once and what computes many, each by its own factor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.pace import DECODE_ROWS, PROMPT_ROWS, at_pace
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Anchor, Anchors
from helios_sim.profile.tables import RowsTable
from priced import priced_profile

PACES = st.floats(0.5, 2.0)
LAYERS = 4


def decodes(batch: int, kv_tokens: int) -> Composition:
    return Composition((LAYERS,), np.array([[batch]]), np.array([[batch * kv_tokens]]), np.array([batch]))


def prompt(tokens: int, context_tokens: int) -> Composition:
    chunk = PrefillChunk(tokens, context_tokens, LAYERS)
    return Composition((LAYERS,), np.array([[0]]), np.array([[0]]), np.array([0]), prefill=(chunk,))


def profile(anchors: Anchors | None = None) -> Profile:
    found = priced_profile(row_s=1e-5, kv_token_s=1e-7, prefill_token_s=1e-6, head_s=2e-3, kv_projection_s=1e-4)
    return replace(found, anchors=anchors)


def time_s(of: Profile, composition: Composition) -> float:
    return float(of.iteration_time_s(composition)[0])


@pytest.mark.slow
@given(PACES, PACES, st.integers(1, DECODE_ROWS), st.integers(PROMPT_ROWS, 512), st.integers(1, 500))
def test_few_rows_go_at_the_pace_of_decodes_and_many_at_that_of_prompts(
    decode: float, of_prompts: float, batch: int, tokens: int, kv_tokens: int
) -> None:
    known, paced = profile(), at_pace(profile(), decode, of_prompts)
    few, many = decodes(batch, kv_tokens), prompt(tokens, kv_tokens)
    assert time_s(paced, few) == pytest.approx(decode * time_s(known, few))
    # what chunks of one iteration share, the least time of the table, is of the fewest tokens
    assert time_s(paced, many) == pytest.approx(of_prompts * time_s(known, many), rel=1e-3)


@pytest.mark.slow
@given(PACES, PACES, st.floats(0.0, 1.0))
def test_between_the_two_the_pace_goes_by_the_logarithm_of_rows(decode: float, of_prompts: float, share: float) -> None:
    rows = round(DECODE_ROWS * (PROMPT_ROWS / DECODE_ROWS) ** share)
    exactly = np.log(rows / DECODE_ROWS) / np.log(PROMPT_ROWS / DECODE_ROWS)
    between = decode + (of_prompts - decode) * exactly
    known, paced = profile(), at_pace(profile(), decode, of_prompts)
    assert time_s(paced, decodes(rows, 9)) == pytest.approx(between * time_s(known, decodes(rows, 9)))


@pytest.mark.slow
@given(PACES)
def test_one_pace_for_both_scales_whole_iterations(pace: float) -> None:
    known, paced = profile(), at_pace(profile(), pace, pace)
    assert time_s(paced, decodes(8, 9)) == pytest.approx(pace * time_s(known, decodes(8, 9)))
    assert paced.load_time_s(10**9) == known.load_time_s(10**9)


def test_the_steps_that_a_calibration_timed_say_where_the_paces_meet() -> None:
    anchors = Anchors(Anchor(2, 1.0, kv_tokens=8), Anchor(8, 1.0))
    known, paced = profile(anchors), at_pace(profile(anchors), 1.0, 2.0)
    for rows, factor in ((2, 1.0), (4, 1.5), (8, 2.0)):
        assert time_s(paced, decodes(rows, 9)) == pytest.approx(factor * time_s(known, decodes(rows, 9)))


def test_where_a_calibration_timed_a_prompt_of_no_more_tokens_than_decodes_the_two_still_part() -> None:
    anchors = Anchors(Anchor(4, 1.0, kv_tokens=8), Anchor(4, 1.0))
    known, paced = profile(anchors), at_pace(profile(anchors), 1.0, 2.0)
    for rows, factor in ((4, 1.0), (5, 2.0)):
        assert time_s(paced, decodes(rows, 9)) == pytest.approx(factor * time_s(known, decodes(rows, 9)))


@pytest.mark.parametrize("end", [8, 64, 65, 200])
def test_beyond_the_rows_that_were_measured_prompts_keep_their_pace(end: int) -> None:
    """The last slope goes on, and it is that of the times, not that of the paces up to there."""
    rows = np.array([1, 2, 4, end])
    table = RowsTable(rows, 1e-3 + 1e-5 * rows)
    layer = replace(profile().layer_tables[0], dense=table)
    known = replace(profile(), layer_tables=(layer,))
    paced = at_pace(known, 1.0, 0.8)
    for tokens in (max(end, 64), 512, 4096):
        # what chunks of one iteration share, the least time of the table, is of the fewest tokens
        assert time_s(paced, prompt(tokens, 9)) == pytest.approx(0.8 * time_s(known, prompt(tokens, 9)), rel=1e-2)
