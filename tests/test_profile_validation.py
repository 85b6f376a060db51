"""The validation of derived profiles says what its script computes, and keeps within the errors that it reports."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tables(shared_data: Path, repository: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIOS_SHARED_DATA", str(shared_data))
        text: str = runpy.run_path(str(repository / "experiments/profile_validation/validate.py"))["tables"]()
    return text


def median(tables: str, row: str) -> float:
    found = re.search(rf"^\| {re.escape(row)} \| \d+ \| ([\d.]+) \|", tables, re.MULTILINE)
    assert found, row
    return float(found[1])


def test_the_committed_tables_are_what_the_script_computes(tables: str, repository: Path) -> None:
    assert (repository / "experiments/profile_validation/tables.md").read_text(encoding="utf-8") == tables


def test_decode_products_are_within_a_tenth_of_data_that_the_builder_did_not_use(tables: str) -> None:
    for rows in ("1 to 16", "17 to 128"):
        assert abs(median(tables, f"the four products, {rows} tokens") - 1) < 0.1
    assert 0.75 < median(tables, "layer without attention") < 1.1


def test_kernels_alone_are_faster_than_the_whole_system(tables: str) -> None:
    for row in re.findall(r"^\| ([ah]100-80gb, \d cards: (?:token|prompt) time[^|]*?) \|", tables, re.MULTILINE):
        assert median(tables, row) < 1
