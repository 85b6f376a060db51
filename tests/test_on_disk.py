"""Runs too long for memory: the same figures to the bit as in memory, and no more memory however many requests."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from helios_sim import on_disk
from helios_sim.errors import UserError
from helios_sim.files import write_parts
from helios_sim.report.breakdown import by_priority, by_prompt_length, by_task, replica_figures, waits
from helios_sim.report.cautions import served_per_s, slows_down
from helios_sim.report.compare import attainment_of, compare, intervals_of
from helios_sim.report.figures.arms import bits_over_run
from helios_sim.report.metrics import compute_metrics
from helios_sim.report.percentiles import Ranked, Sifted
from helios_sim.report.records import RecordLog, Records
from helios_sim.report.series import Series
from helios_sim.report.sieve import Sieve
from helios_sim.request import NS_PER_S, RequestRecord, Slo
from helios_sim.serving.stats import RunStats
from helios_sim.study.instead import over
from helios_sim.study.limits import REQUEST_BYTES, check_size
from helios_sim.study.schema import Config, WorkloadConfig
from helios_sim.study.verdict import workload_facts
from helios_sim.vary.columns import from_bytes, from_file, in_parts, to_bytes
from test_report_records import block_of, plain, some_records

QUANTILES = [50, 90, 95, 99]
SLO = Slo(ttft_s=6.0, tpot_s=5.0)


@pytest.fixture
def short_spans(monkeypatch) -> None:
    """Few rows are too many for memory, and spans are short."""
    monkeypatch.setattr(on_disk, "WORTH_A_FILE", 100)
    monkeypatch.setattr(on_disk, "SPAN_ROWS", 64)


def kept(rows: list[RequestRecord], requests: int | None) -> Records:
    log = RecordLog(requests)
    log.add_block(block_of(rows[:700]))
    for row in rows[700:]:
        log.add(row)
    return log.records()


def figures(ours: Records, theirs: Records) -> dict[str, Any]:
    """All that is made of the requests of two runs, as text, in which every bit of a float shows."""
    stats = RunStats(transitions_ns=[5 * NS_PER_S], batch_capacity_blocks=900)
    runs = [(it, compute_metrics(it, stats, slo=SLO, transitions=transitions))
            for it, transitions in ((ours, None), (theirs, {1: [3 * NS_PER_S], 2: []}))]  # fmt: skip
    found = {
        "metrics": [metrics for _, metrics in runs],
        "intervals": [intervals_of([run]) for run in runs],
        "over seeds": intervals_of(runs),
        "ratios": compare(runs[:1], runs[1:]),
        "attainment": attainment_of(ours, SLO),
        "tasks": by_task([ours, theirs], ["a", "b", "c", "d"]),
        "replicas": [replica_figures(ours, number, stats, 7) for number in range(3)],
        "facts": workload_facts(Config(), ours),
        "slows down": (slows_down(ours), served_per_s(ours)),
        "waits": waits(
            [ours, theirs],
            [*by_prompt_length([ours, theirs]), *by_priority([ours, theirs], [lambda part: part.task] * 2)],
        ),
        "over": over(ours, NS_PER_S, 9 * NS_PER_S),
        "bits": bits_over_run(ours, 7),
        "rows": [row for table in ours.tables("arm", 3, ["a", "b", "c"], cached=True) for row in table.to_pylist()],
    }
    return {name: repr(value) for name, value in found.items()}


def test_figures_and_rows_are_those_of_memory(short_spans) -> None:
    ours, theirs = some_records(), some_records()
    theirs = [replace(row, output_tokens=row.output_tokens + 3, replica=1) for row in theirs]
    in_memory, kept_on_disk = ([kept(rows, n) for rows in (ours, theirs)] for n in (None, len(ours)))
    assert [it.on_disk for it in (*in_memory, *kept_on_disk)] == [False, False, True, True]
    expected, found = figures(*in_memory), figures(*kept_on_disk)
    for name in expected:
        assert found[name] == expected[name], name
    assert figures(kept_on_disk[0], in_memory[1]) == expected


def test_columns_are_kept_and_read_again_as_those_of_memory(short_spans, tmp_path: Path) -> None:
    rows = some_records()
    in_memory, found = kept(rows, None), kept(rows, len(rows))
    assert to_bytes(found) == to_bytes(in_memory)
    write_parts(tmp_path / "columns", in_parts(found))
    again = [from_bytes(Records, to_bytes(found)), from_file(Records, tmp_path / "columns")]
    (tmp_path / "columns").unlink()  # as a study does with what it has read
    for it in again:
        assert it.on_disk
        assert all(plain(getattr(it, f.name)) == plain(getattr(in_memory, f.name)) for f in fields(Records))


@pytest.mark.parametrize("requests", [99, 1000])
def test_records_come_from_another_process_as_they_are(short_spans, requests: int) -> None:
    rows = some_records(requests)
    found = pickle.loads(pickle.dumps(kept(rows, requests)))
    assert found.on_disk == (requests == 1000)
    assert to_bytes(found) == to_bytes(kept(rows, None))


def test_a_run_that_ends_before_its_last_request_has_the_others(short_spans) -> None:
    rows = some_records()
    left = [row for row in rows if row.request_id % 3]
    found, expected = kept(left, len(rows)), kept(left, None)
    assert to_bytes(found) == to_bytes(expected)
    others = kept(rows, len(rows))
    assert figures(others, from_bytes(Records, to_bytes(found))) == figures(kept(rows, None), expected)


@pytest.mark.parametrize("requests", [99, 100])
def test_few_requests_stay_in_memory(short_spans, requests: int) -> None:
    log = RecordLog(requests)
    for row in some_records(requests):
        log.add(row)
    assert log.records().on_disk == (requests == 100)


@pytest.mark.parametrize("no_folder", [False, True])
def test_without_room_records_stay_in_memory_and_a_line_says_so(no_folder, short_spans, monkeypatch, capsys) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if no_folder:
        monkeypatch.setenv("TMPDIR", "/nowhere")
        monkeypatch.setattr("tempfile.gettempdir", full)
    else:
        monkeypatch.setattr(os, "posix_fallocate", full)
    rows = some_records()
    found = kept(rows, len(rows))
    assert not found.on_disk
    assert to_bytes(found) == to_bytes(kept(rows, None))
    said = capsys.readouterr().err
    assert "records of 1,000 requests stay in memory" in said
    assert "No space left" in said
    assert "TMPDIR" in said


def test_a_run_that_fits_on_the_disk_need_not_fit_into_memory(monkeypatch) -> None:
    many = 10 + os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // REQUEST_BYTES
    config = Config(workload=WorkloadConfig(n_requests=many))
    monkeypatch.setattr(on_disk, "free_bytes", lambda: 111 * many)
    check_size(config, 1)
    monkeypatch.setattr(on_disk, "free_bytes", lambda: 111 * many - 1)
    with pytest.raises(UserError, match="one run would take about"):
        check_size(config, 1)


def test_room_is_reserved_by_writing_where_the_file_system_cannot_do_it(monkeypatch) -> None:
    def cannot(*arguments: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    columns = on_disk.zeros({"a": np.int64}, 300_000)
    assert (columns["a"].size, columns["a"].any()) == (300_000, False)
    columns["a"][-1] = 7
    on_disk.let_go(columns["a"])
    assert columns["a"][-1] == 7


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not tell what it maps")
def test_the_file_has_no_name_and_lies_in_the_folder_for_temporary_files(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    columns = on_disk.zeros({"a": np.int32, "b": np.int64}, 100_000)
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    columns["b"][:] = np.arange(100_000)
    on_disk.let_go(columns["a"])
    assert columns["b"].tolist() == list(range(100_000))
    assert not columns["a"].any()


def numbers(seed: int, n: int, kind: str) -> np.ndarray:
    """Times as they come: widely spread, many alike, or all the same."""
    rng = np.random.default_rng(seed)
    values = {
        "spread": rng.lognormal(18, 3, n),
        "alike": np.where(rng.random(n) < 0.7, 0.0, rng.integers(0, 5, n) * 1e9),
        "same": np.full(n, 12345.678),
        "narrow": 1e9 + rng.random(n) * 1e4,
    }[kind]
    return values if seed % 2 else values.astype(np.int64)


def in_blocks(values: np.ndarray, rows: int) -> Callable[[], Any]:
    return lambda: (values[first : first + rows] for first in range(0, len(values), rows))


@settings(max_examples=30)
@given(
    st.integers(0, 1000), st.integers(130_000, 400_000), st.sampled_from(["spread", "alike", "same", "narrow"]),
    st.integers(20_000, 70_000),
)  # fmt: skip
def test_numbers_in_blocks_have_the_figures_that_numpy_gives(seed: int, n: int, kind: str, rows: int) -> None:
    values = numbers(seed, n, kind)
    series, ends = Series(in_blocks(values, rows)), np.linspace(0, n, 11).astype(np.int64)
    assert len(series) == n
    assert series.mean() == float(np.mean(values))
    assert series.total() == values.sum()
    assert series.by_stretch(ends).tolist() == np.add.reduceat(values, ends[:-1]).tolist()
    assert series.median() == float(np.median(values))
    assert series.percentiles([0, *QUANTILES, 100]) == np.percentile(values, [0, *QUANTILES, 100]).tolist()
    assert series.between(n // 3, n - 5).mean() == float(np.mean(values[n // 3 : n - 5]))
    assert series.ascends() == bool((np.diff(values) >= 0).all())


@settings(max_examples=60)
@given(
    st.integers(0, 1000), st.integers(20, 3000), st.sampled_from(["spread", "alike", "same", "narrow"]),
    st.integers(1, 700), st.floats(0.0, 1.0),
)  # fmt: skip
def test_percentiles_and_those_without_a_stretch_are_those_of_sorted_values(
    seed: int, n: int, kind: str, rows: int, share: float
) -> None:
    values, counted = numbers(seed, n, kind), np.random.default_rng(seed).random(n) <= share
    blocks = lambda: zip(in_blocks(values, rows)(), in_blocks(counted, rows)(), strict=True)  # noqa: E731
    sifted = Sifted(blocks, n, QUANTILES)
    assert sifted.counted == counted.sum()
    if not counted.any():
        return
    ranked = Ranked(values, counted)
    for q in QUANTILES:
        (whole, without), (expected, others) = sifted.percentile_and_without(q), ranked.percentile_and_without(q)
        assert whole == expected
        assert (without is None) == (others is None)
        if without is not None:
            np.testing.assert_array_equal(without, others)


def test_more_ranks_than_fit_into_one_pass_are_found_in_several(monkeypatch) -> None:
    monkeypatch.setattr("helios_sim.report.sieve._MOST_KEPT", 50)
    values = numbers(1, 5000, "spread")
    sieve = Sieve(lambda: ((block, None) for block in in_blocks(values, 700)()))
    ranks = np.random.default_rng(0).integers(0, 5000, 300).tolist()
    assert sieve.at([(None, rank) for rank in ranks]) == np.sort(values)[ranks].tolist()


MEASURED = """
import json, resource, sys
from pathlib import Path
import numpy as np
from helios_sim.files import write_parquet_parts, write_parts
from helios_sim.report.compare import intervals_of
from helios_sim.report.metrics import compute_metrics
from helios_sim.report.records import INTEGERS, LABELS, MOMENTS, RecordLog, _MAYBE
from helios_sim.request import RecordBlock
from helios_sim.serving.stats import RunStats
from helios_sim.vary.columns import from_file, in_parts

def peak_bytes(n):
    rng, log = np.random.default_rng(0), RecordLog(n)
    for first in range(0, n, 4096):
        ids = np.arange(first, min(first + 4096, n))
        ones = np.ones(len(ids), np.int64)
        times = {name: ids * 10**6 + rng.integers(1, 10**9, len(ids)) for name in MOMENTS}
        log.add_block(RecordBlock(
            {name: ids if name in ("request_id", "arrival_ns") else ones for name in INTEGERS},
            {name: (times.get(name, ones), np.full(len(ids), name in MOMENTS)) for name in _MAYBE},
            {name: (ones * 0, ("completed",)) for name in LABELS},
        ))
    records = log.records()
    intervals_of([(records, compute_metrics(records, RunStats()))])
    write_parts(Path(sys.argv[1]) / "columns", in_parts(records))
    records = from_file(type(records), Path(sys.argv[1]) / "columns")
    write_parquet_parts(Path(sys.argv[1]) / "rows.parquet", records.tables("arm", 0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

print(json.dumps([peak_bytes(n) for n in (150_000, 550_000)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is told in other units")
def test_memory_does_not_grow_with_the_number_of_requests(tmp_path: Path) -> None:
    """From 150,000 requests on, all that becomes of records takes the same; their rows alone would be 37 MB more."""
    out = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True)
    few, many = json.loads(out.stdout)
    assert (many - few) / 400_000 < 8  # bytes a request
