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


@pytest.mark.slow
def test_the_committed_tables_are_what_the_script_computes(tables: str, repository: Path) -> None:
    assert (repository / "experiments/profile_validation/tables.md").read_text(encoding="utf-8") == tables


def off(tables: str, row: str) -> tuple[float, float]:
    """Of rows that were left out: the median, and the median size of the error."""
    found = re.search(rf"^\| {re.escape(row)} \| \d+ \| ([\d.]+) \| ([\d.]+) % \|", tables, re.MULTILINE)
    assert found, row
    return float(found[1]), float(found[2]) / 100


@pytest.mark.slow
def test_rows_left_out_of_the_tables_are_within_3_percent_of_decodes_and_5_of_prompts(tables: str) -> None:
    for row, most in (
        ("products, up to 128 rows", 0.03), ("attention of decodes", 0.03), ("products, more rows", 0.05),
        ("attention of prompts", 0.05),
    ):  # fmt: skip
        middle, error = off(tables, f"six cards: {row}")
        assert abs(middle - 1) <= most
        assert error <= most
    for card in ("a100-80gb", "h100", "h200", "b200", "l40s", "rtxpro6000"):
        assert abs(off(tables, f"{card}: products, up to 128 rows")[0] - 1) < 0.04
        assert abs(off(tables, f"{card}: products, more rows")[0] - 1) < 0.02


def test_layers_that_vidur_measured_are_within_3_percent_of_decodes_and_5_of_prompts(tables: str) -> None:
    """The first table is priced as the card that Vidur's authors have, the second as one with more power."""
    assert abs(median(tables, "layer without attention, 1 to 128 tokens") - 1) <= 0.03
    assert abs(median(tables, "the four products, 129 to 4096 tokens") - 1) <= 0.05
    assert abs(median(tables, "layer without attention, with their small kernels, 129 to 4096 tokens") - 1) <= 0.05
    assert abs(median(tables, "layer without attention, 129 to 4096 tokens") - 1) <= 0.05
    assert abs(median(tables, "the same, if theirs also works above the diagonal") - 1) <= 0.05


def test_kernels_alone_are_faster_than_the_whole_system(tables: str) -> None:
    for row in re.findall(r"^\| ([ah]100-80gb, \d cards: (?:token|prompt) time[^|]*?) \|", tables, re.MULTILINE):
        assert median(tables, row) < 1
