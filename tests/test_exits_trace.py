"""Where an answer lies in a trace, and what a trace refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.exits.trace import ExitTrace


def tokens_one_character_at_a_time(trace: ExitTrace, task: int, text_start: int, output_chars: int) -> list[int]:
    """Walks the answer's characters and collects the tokens that begin there; the covering one if none does."""
    rows = np.flatnonzero(trace.task == task)
    begins: dict[int, list[int]] = {}
    owner: list[int] = []
    for row in rows.tolist():
        begins.setdefault(len(owner), []).append(row)
        owner += [row] * int(trace.chars[row])
    # A token without characters at the very end of the text begins where the text begins anew: beyond any answer.
    found = [row for c in range(text_start, text_start + output_chars) for row in begins.get(c % len(owner), ())]
    return found or [owner[text_start % len(owner)]]


def with_lengths(chars: list[int]) -> ExitTrace:
    trace = synthetic_trace(tokens=len(chars))
    return replace(trace, chars=np.array(chars, dtype=np.int32))


# The last token covers something, so that no token begins at the text's very end.
lengths = st.lists(st.integers(0, 6), max_size=12).flatmap(lambda a: st.integers(1, 6).map(lambda last: [*a, last]))


@given(lengths, st.integers(0, 200), st.integers(1, 150))
def test_locate_finds_the_tokens_that_begin_in_the_answer(chars: list[int], text_start: int, output_chars: int) -> None:
    trace = with_lengths(chars)
    span = trace.bind(("any",)).locate(0, text_start, output_chars)
    assert span.indices().tolist() == tokens_one_character_at_a_time(trace, 0, text_start, output_chars)
    assert span.n_tokens >= 1
    assert 0 <= span.start < span.length
    everything = np.arange(trace.n_tokens)
    for n in range(span.n_tokens + 2):
        assert everything[span.rows(n)].tolist() == span.indices()[:n].tolist()


@pytest.mark.slow
@given(st.integers(0, 10**6), st.integers(20, 3_000), st.integers(0, 1), st.integers(0, 50))
def test_models_with_other_tokenizers_read_the_same_text(start: int, chars: int, task: int, seed: int) -> None:
    spans = []
    for tokens, chars_per_token in ((300, 4), (240, 5)):
        trace = synthetic_trace(
            tasks=("a", "b"), tokens=tokens, chars_per_token=chars_per_token, uneven=True, seed=seed
        )
        span = trace.bind(("b", "a")).locate(task, start, chars)
        text = 1 - task  # bound in the other order
        assert span.first == trace.task_first[text]
        rows = span.indices()
        begin = trace.char_start[rows[0]] - trace.char_start[span.first]
        longest = int(trace.chars.max())
        late = (begin - start) % 1200
        within_one = span.n_tokens == 1 and 1200 - late <= longest  # then the token begins before the answer
        assert late <= longest or within_one
        assert abs(int(trace.chars[rows].sum()) - chars) <= longest
        spans.append(trace.chars[rows].sum())
    assert abs(int(spans[0]) - int(spans[1])) <= 2 * longest + 60


@given(st.integers(0, 5_000), st.integers(100, 900), st.integers(100, 900))
def test_neighbouring_answers_share_no_token_and_leave_none_out(start: int, left: int, right: int) -> None:
    bound = synthetic_trace(tokens=300, uneven=True, seed=3).bind(("any",))
    parts = [bound.locate(0, start, left), bound.locate(0, start + left, right)]
    whole = bound.locate(0, start, left + right)
    assert np.concatenate([p.indices() for p in parts]).tolist() == whole.indices().tolist()


def test_an_answer_as_long_as_the_text_has_all_its_tokens() -> None:
    trace = synthetic_trace(tokens=300, uneven=True)
    span = trace.bind(("any",)).locate(0, 777, 1200)
    assert sorted(span.indices()) == list(range(300))


def test_even_tokens_give_a_fixed_length_wherever_the_answer_starts() -> None:
    bound = synthetic_trace(tokens=100, chars_per_token=4).bind(("any",))
    assert {bound.locate(0, start, 40).n_tokens for start in range(400)} == {10}


def test_bind_names_the_missing_task() -> None:
    trace = synthetic_trace(tasks=("prose", "code"))
    assert trace.bind(("code",)).task_index == (1,)
    with pytest.raises(UserError, match=r"sums.*prose, code"):
        trace.bind(("code", "sums"))


def test_a_trace_with_one_unnamed_task_serves_all() -> None:
    assert synthetic_trace().bind(("x", "y", "z")).task_index == (0, 0, 0)


def test_thresholds_compare_in_the_precision_of_the_record() -> None:
    trace = synthetic_trace(tokens=2, exits=(1, 2))
    trace = replace(trace, confidences={Confidence.MAX_PROBABILITY: np.full((2, 2), 0.9, dtype=np.float32)})
    assert trace.confident_at(0.9, Confidence.MAX_PROBABILITY).all()


def test_a_measure_that_was_not_recorded_is_refused() -> None:
    trace = synthetic_trace()
    kept = {c: trace.recorded(c) for c in Confidence if c is not Confidence.MARGIN}
    trace = replace(trace, confidences=kept)
    with pytest.raises(UserError, match=r"exits.confidence='margin'.*recorded: max_probability, classifier, entropy"):
        trace.confident_at(0.5, Confidence.MARGIN)


def test_each_measure_reads_its_own_record() -> None:
    trace = synthetic_trace(tokens=40)
    for measure in Confidence:
        assert np.array_equal(trace.confident_at(0.5, measure), trace.recorded(measure) >= 0.5)
    assert len({trace.recorded(measure).tobytes() for measure in Confidence}) == len(Confidence)


@pytest.mark.parametrize(
    "damage",
    [
        {"exits": (8, 4, 12)},
        {"exits": (4, 8)},
        {"tasks": ("a", "a")},
        {"tasks": ("a", "b")},
        {"chars": np.full(20, -1)},
        {"chars": np.zeros(20, dtype=int)},
        {"chars": np.full(20, 1.5)},
        {"prompt": np.zeros(19, dtype=int)},
        {"agree": np.zeros((20, 3), dtype=bool)},
        {"confidences": {Confidence.ENTROPY: np.full((20, 3), np.nan)}},
        {"confidences": {}},
        {"confident": np.ones((20, 3), dtype=bool)},
        {"published_threshold": 0.5},
    ],
    ids=str,
)
def test_columns_that_do_not_fit_together_are_refused(damage: dict[str, object]) -> None:
    trace = synthetic_trace(tokens=20)
    with pytest.raises(UserError, match="exit trace of synthetic"):
        replace(trace, **damage)  # type: ignore[arg-type]


def test_columns_are_read_only() -> None:
    trace = synthetic_trace(tokens=5)
    with pytest.raises(ValueError, match="read-only"):
        trace.agree[0, 0] = True


def test_rules_are_hashable_data() -> None:
    assert PerToken(0.5) == PerToken(0.5)
    assert len({PerToken(0.5), PerToken(0.5), PerToken(0.6)}) == 2
