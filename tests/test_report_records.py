"""Records in columns: the same as the objects that they were made of, and no more memory than the columns need."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest

import helios_sim.study.jobs
from helios_sim.core import machine
from helios_sim.errors import UserError
from helios_sim.files import write_parquet_parts
from helios_sim.report import records as records_module
from helios_sim.report.columns import Labels, Maybe
from helios_sim.report.metrics import compute_metrics
from helios_sim.report.records import RecordLog, Records
from helios_sim.request import NS_PER_S, RecordBlock, RequestRecord, Slo, Status
from helios_sim.serving import stats
from helios_sim.serving.stats import RunStats
from helios_sim.study.fleet import build_fleet
from helios_sim.study.jobs import make_job, serve
from helios_sim.study.schema import (
    ArrivalsConfig,
    Config,
    ExitsConfig,
    LengthConfig,
    LengthsConfig,
    MixConfig,
    WorkloadConfig,
)
from helios_sim.workload import generate
from report_example import example_result

N = 1000


def some_records(n: int = N) -> list[RequestRecord]:
    """All kinds, in an order of leaving that is not the order of ids."""
    rng = np.random.default_rng(3)
    made = []
    for request_id in rng.permutation(n).tolist():
        done = rng.random() < 0.9
        arrival, queue, first, rest = (int(x) for x in rng.integers(1, 9 * NS_PER_S, 4))
        tokens = int(rng.integers(1, 400))
        made.append(
            RequestRecord(
                request_id=request_id,
                replica=int(rng.integers(5)),
                task=int(rng.integers(3)),
                model=str(rng.choice(["small", "large"])),
                status=Status.COMPLETED if done else Status(rng.choice(["dropped", "unfinished"])),
                drop_reason=None if done else str(rng.choice(["too long", "too large"])),
                arrival_ns=arrival,
                scheduled_ns=arrival + queue if done else None,
                first_token_ns=arrival + queue + first if done else None,
                last_token_ns=arrival + queue + first + (tokens - 1) * rest if done else None,
                prompt_tokens=int(rng.integers(1, 4000)),
                output_tokens=tokens if done else 0,
                prompt_chars=int(rng.integers(1, 9000)),
                output_chars=4 * tokens,
                layers_run=32 * tokens,
                early_tokens=tokens // 2,
                breach_tokens=tokens // 3,
                agreed_tokens=tokens - 1,
                evaluated_tokens=tokens // 7,
                preemptions=int(rng.integers(3)),
                microbits=None if rng.random() < 0.2 else int(rng.integers(0, 10**9)),
            )
        )
    return made


def plain(column: object) -> list[object]:
    if isinstance(column, Maybe):
        return [v if there else None for v, there in zip(column.values.tolist(), column.present.tolist(), strict=True)]
    return list(column) if isinstance(column, Labels) else column.tolist()


def kept_whole(rows: list[RequestRecord]) -> Records:
    """Every column from all objects at once, as wide as can be: slow, and plain to see."""
    rows = sorted(rows, key=lambda row: row.request_id)
    columns: dict[str, object] = {}
    for field in fields(Records):
        values = [getattr(row, field.name) for row in rows]
        kind = str(field.type)
        if kind == "Labels":
            names = tuple(dict.fromkeys(values))
            columns[field.name] = Labels(np.array([names.index(v) for v in values]), names)
        elif kind == "Maybe":
            there = np.array([v is not None for v in values])
            columns[field.name] = Maybe(np.array([v or 0 for v in values], np.int64), there)
        else:
            columns[field.name] = np.array(values, np.int64)
    return Records(**columns)


@pytest.mark.parametrize("block", [1, 7, N, 10 * N])
def test_records_from_a_stream_are_those_kept_whole_and_so_are_the_metrics(monkeypatch, block: int) -> None:
    monkeypatch.setattr(records_module, "BLOCK_RECORDS", block)
    rows = some_records()
    log = RecordLog()
    for row in rows:
        log.add(row)
    streamed, whole = log.records(), kept_whole(rows)
    for field in fields(Records):
        assert plain(getattr(streamed, field.name)) == plain(getattr(whole, field.name)), field.name
        by_id = sorted(rows, key=lambda row: row.request_id)
        assert plain(getattr(streamed, field.name)) == [getattr(row, field.name) for row in by_id], field.name
    stats = RunStats(transitions_ns=[5 * NS_PER_S], batch_capacity_blocks=900)
    slo = Slo(ttft_s=6.0, tpot_s=5.0)
    assert compute_metrics(streamed, stats, slo=slo) == compute_metrics(whole, stats, slo=slo)


def test_a_table_written_in_parts_is_the_whole_table(monkeypatch, tmp_path) -> None:
    from pyarrow import parquet

    rows = Records.of(some_records())
    whole = rows.to_table("arm", 3)
    monkeypatch.setattr(records_module, "BLOCK_ROWS", 300)
    path = tmp_path / "requests.parquet"
    write_parquet_parts(path, rows.tables("arm", 3))
    assert parquet.ParquetFile(path).num_row_groups == 4
    read = parquet.read_table(path)
    assert read.column_names == whole.column_names
    assert read.to_pylist() == whole.to_pylist()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_tables_are_made_without_pandas() -> None:
    """It takes a third of a second to load, and pyarrow does so where it is handed arrays or lists."""
    code = (
        "import sys; from helios_sim.report.decisions import decisions_table; "
        "from helios_sim.report.records import Records; "
        "Records.of([]).to_table('arm', 0); decisions_table({}); sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_request_gives_an_empty_table(tmp_path) -> None:
    from pyarrow import parquet

    write_parquet_parts(tmp_path / "none.parquet", Records.of([]).tables("arm", 0))
    assert parquet.read_table(tmp_path / "none.parquet").num_rows == 0


def test_a_number_that_does_not_fit_its_column_is_no_other_number() -> None:
    with pytest.raises(OverflowError):
        Records.of([replace(some_records(1)[0], output_chars=2**31)])


def peak_bytes(requests: int) -> int:
    """Most memory that a run of so many requests takes beyond what it was built from."""
    config = Config(
        models=["opt-1.3b"],
        exits=ExitsConfig(source="none"),
        workload=WorkloadConfig(
            n_requests=requests,
            arrivals=ArrivalsConfig("constant", rate_per_s=50.0),
            lengths=LengthsConfig(prompt=LengthConfig(value=20), output=LengthConfig(value=1)),
            mix=MixConfig({"text": 1.0}),
        ),
    )
    job = make_job("arm", {"policy": "full_depth"}, config, 0)
    fleet = build_fleet(config, 0)
    log = RecordLog()
    tracemalloc.start()
    try:
        serve(job, fleet, log.add)
        assert len(log.records()) == requests
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "few", "many"), [(False, 2000, 6000), (True, 20_000, 40_000)])
def test_memory_grows_with_the_columns_and_not_with_what_was_seen(compiled, few, many, monkeypatch) -> None:
    """A record alone, as an object with its numbers, takes more than 400 bytes; a row of all columns about 100."""
    monkeypatch.setattr(records_module, "BLOCK_RECORDS", 128)
    monkeypatch.setattr(helios_sim.study.jobs, "generate", partial(generate, block_requests=128))
    monkeypatch.setattr(stats, "SAMPLES", 100)
    monkeypatch.setattr("helios_sim.simulation.for_run", lambda requests, wanted: machine.load() if compiled else None)
    peak_bytes(300)  # what is loaded and remembered once
    assert (peak_bytes(many) - peak_bytes(few)) / (many - few) < 150


def test_blocks_and_single_records_make_the_same_columns() -> None:
    records = some_records()
    one, other = RecordLog(), RecordLog()
    for record in records:
        one.add(record)
    for part in (records[:3], records[3:4], records[10:]):  # between them single ones
        other.add_block(block_of(part))
        for record in records[4:10] if len(part) == 1 else ():
            other.add(record)
    ours, theirs = one.records(), other.records()
    assert ours.to_table("a", 0).equals(theirs.to_table("a", 0))


def test_a_number_that_does_not_fit_is_refused_in_blocks_too() -> None:
    with pytest.raises(OverflowError, match="does not fit 32 bits"):
        RecordLog().add_block(block_of([replace(some_records(1)[0], prompt_tokens=2**31)]))


def block_of(records: list[RequestRecord]) -> RecordBlock:
    maybe = ("scheduled_ns", "first_token_ns", "last_token_ns", "microbits", "cached_tokens")
    labels = ("model", "status", "drop_reason")
    columns = {f.name: [getattr(record, f.name) for record in records] for f in fields(RequestRecord)}
    names = {name: tuple(dict.fromkeys(reversed(columns[name]))) for name in labels}  # not in order of appearance
    return RecordBlock(
        {name: np.array(column) for name, column in columns.items() if name not in (*maybe, *labels)},
        {name: (np.array([v or 0 for v in columns[name]]), np.array([v is not None for v in columns[name]]))
         for name in maybe},
        {name: (np.array([names[name].index(v) for v in columns[name]]), names[name]) for name in labels},
    )  # fmt: skip


def test_a_table_has_the_seconds_that_metrics_are_made_of() -> None:
    rows = Records.of(some_records())
    table = rows.to_table("arm", 3, tasks=[f"task {i}" for i in range(1 + int(rows.task.max()))]).to_pydict()
    for row in range(len(rows)):
        arrival_ns, first_ns, last_ns = (table[name][row] for name in ("arrival_ns", "first_token_ns", "last_token_ns"))
        done, tokens = table["status"][row] == "completed", table["output_tokens"][row]
        assert table["task_name"][row] == f"task {table['task'][row]}"
        assert table["queue_s"][row] == ((table["scheduled_ns"][row] - arrival_ns) / NS_PER_S if done else None)
        assert table["ttft_s"][row] == ((first_ns - arrival_ns) / NS_PER_S if done else None)
        assert table["e2e_s"][row] == ((last_ns - arrival_ns) / NS_PER_S if done else None)
        tpot_s = (last_ns - first_ns) / (tokens - 1) / NS_PER_S if done and tokens > 1 else None
        assert table["tpot_s"][row] == (tpot_s if tpot_s is None else pytest.approx(tpot_s, rel=1e-15))
    assert np.mean([value for value in table["ttft_s"] if value is not None]) == pytest.approx(
        compute_metrics(rows, RunStats())["ttft_s_mean"]
    )


@pytest.mark.slow
def test_requests_come_as_a_data_frame(monkeypatch) -> None:
    from importlib.util import find_spec

    import helios_sim.report.result as result_module

    result = example_result((1, 2))
    frame = result.requests()
    assert len(frame) == sum(len(r.records) for arm in result.arms.values() for r in arm.replicates)
    assert {"arm", "seed", "ttft_s", "tpot_s", "e2e_s", "queue_s"} <= set(frame.columns)
    assert frame[frame["arm"] == "helios"]["ttft_s"].mean() > 0
    monkeypatch.setattr(result_module, "find_spec", lambda name: None if name == "pandas" else find_spec(name))
    with pytest.raises(UserError, match="pandas or polars"):
        result.requests()
