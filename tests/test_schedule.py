"""How the tests are run: what conftest.py and schedule.py do to them."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import given, settings, strategies as st

from schedule import LONGEST, TESTS

tried: list[int] = []


def test_files_that_take_long_are_there() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []


@pytest.mark.parametrize("n", [0, 1])
@settings(max_examples=60)
@given(st.integers())
def test_a_property_tries_a_share_of_its_examples(n: int, drawn: int) -> None:
    tried.append(n)


@pytest.mark.skipif("HYPOTHESIS_PROFILE" in os.environ, reason="all examples are tried")
def test_the_share_is_a_half() -> None:
    assert {tried.count(n) for n in (0, 1)} <= {0, 30}  # 0: this test was asked for alone


@pytest.mark.live
@pytest.mark.parametrize("n", [2, 3])
def test_another_number_of_threads_is_gone_after_the_test_that_set_it(n: int) -> None:
    torch = pytest.importorskip("torch")
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(n)
    assert "torch" in sys.modules
