"""Public traces are read as they are, and a damaged file is refused by file, line and column."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helios_sim.errors import UserError
from helios_sim.shared_data import VARIABLE
from helios_sim.workload import (
    RequestTrace,
    TaskMix,
    TraceArrivals,
    TraceLengths,
    Workload,
    describe,
    generate,
    read_trace,
)


def written(folder: Path, name: str, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    file = folder / name
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return file


def arrivals_of(trace: RequestTrace) -> np.ndarray:
    assert trace.arrival_ns is not None
    return trace.arrival_ns


# Counts, rates and CVs as the data's own README states them; the rest counted in the files with awk.
@pytest.mark.parametrize(
    ("path", "requests", "rate_per_s", "cv", "prompt_mean", "output_mean"),
    [
        ("traces/azure2023_conv.csv", 19_366, 5.5, 1.1, 1154.70, 211.13),
        ("traces/azure2023_code.csv", 8_819, 2.6, 13, 2047.85, 27.88),
        ("traces/mooncake_conversation.jsonl.gz", 12_031, 3.4, None, 12_035.06, 342.62),
    ],
)
def test_production_traces_have_their_published_size_and_rate(
    shared_data: Path,
    path: str,
    requests: int,
    rate_per_s: float,
    cv: float | None,
    prompt_mean: float,
    output_mean: float,
) -> None:
    trace = read_trace(shared_data / path)
    workload = Workload(TraceArrivals(trace), TraceLengths(trace), TaskMix.single("text"))
    figures = describe(generate(workload, 0), ("text",), 4.0)
    assert figures.requests == requests
    assert all("hash_ids" in notice for notice in trace.notices)  # of Mooncake alone
    assert arrivals_of(trace)[0] == 0
    assert figures.arrival_rate_per_s == pytest.approx(rate_per_s, rel=0.02)
    assert cv is None or figures.arrival_cv == pytest.approx(cv, rel=0.02)
    assert figures.prompt_tokens.mean == pytest.approx(prompt_mean, abs=0.005)
    assert figures.output_tokens.mean == pytest.approx(output_mean, abs=0.005)


def test_azure_timestamps_keep_their_hundred_nanoseconds(shared_data: Path) -> None:
    trace = read_trace(shared_data / "traces/azure2023_conv.csv", limit=2)
    assert arrivals_of(trace).tolist() == [0, 4_314_579_000]
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([374, 396], [44, 109])


def test_vidur_lengths_have_no_arrivals(shared_data: Path) -> None:
    trace = read_trace(shared_data / "traces/vidur_arxiv_summarization.csv")
    assert (len(trace), trace.arrival_ns) == (28_257, None)
    assert (trace.prompt_tokens[0], trace.output_tokens[0]) == (3772, 54)
    assert "lengths only" in trace.notices[0]


def test_peer_workloads_and_serving_logs_are_read_by_their_own_names(shared_data: Path) -> None:
    w1 = read_trace(shared_data / "peers/w1_conv_poisson6_16000.csv.gz")
    assert (len(w1), arrivals_of(w1)[1], w1.prompt_tokens[1]) == (16_000, 4_221_000, 1030)
    w2 = read_trace(shared_data / "peers/w2_fixed512x128_16000.csv.gz", limit=1000)
    assert (len(w2), set(w2.prompt_tokens.tolist()), set(w2.output_tokens.tolist())) == (1000, {512}, {128})
    log = read_trace(shared_data / "serving_logs/rtxpro6000_llama31_8b_vllm019/workload.csv")
    assert (len(log), arrivals_of(log)[1]) == (300, 347_938_951 - 46_926_808)


JSON = '{"timestamp": 0, "input_length": 1, "output_length": 1}\n'
HEADER = "arrival_s,prompt_tokens,output_tokens\n"
# With a cell beyond what the csv module takes by itself
LONG = "arrival_s,prompt_tokens,output_tokens,prompt\n0,5,5," + "x" * 200_000 + "\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", HEADER + "1.5,10,3\n2.0,20,1\n"),
        ("a.csv.gz", HEADER + "1.5,10,3\n2.0,20,1\n"),
        ("crlf.csv", (HEADER + "1.5,10,3\n2.0,20,1\n").replace("\n", "\r\n")),
        ("bom.csv", "\ufeff" + HEADER + "1.5,10,3\n2.0,20,1"),
        ("floats.csv", HEADER + "1.5,10.0,3.0\n\n2.0,20.0,1.0\n"),
        ("order.csv", "output_toks,note,arrival_ns,input_toks\n3,x,1500000000,10\n1,y,2000000000,20\n"),
        ("vidur.csv", "arrival_s,prefill_tokens,decode_tokens\n1.5,10,3\n2.0,20,1\n"),
        ("burst.csv", "Timestamp,Model,Request tokens,Response tokens,Total tokens\n5,a,10,3,13\n5.5,a,20,1,21\n"),
        ("vidur2.tsv", "arrived_at\tnum_prefill_tokens\tnum_decode_tokens\n1.5\t10\t3\n2.0\t20\t1\n"),
        ("peer.csv", "arrival_time_ns,input_tokens,completion_tokens\n1500000000,10,3\n2000000000,20,1\n"),
        ("lines.json", '{"arrival_ms": 1500, "prompt_len": 10, "output_len": 3}\n' * 1
         + '{"arrival_ms": 2000, "prompt_len": 20, "output_len": 1}\n'),
        ("array.json", '[{"arrival_s": 1.5, "prompt_tokens": 10, "output_tokens": 3},\n'
         ' {"arrival_s": 2.0, "prompt_tokens": 20, "output_tokens": 1}]'),
        *(
            (f"epoch{p}.csv", f"arrival_time,input_len,output_len\n{1_777_142_838_500 * p // 1000},10,3\n"
             f"{1_777_142_839_000 * p // 1000},20,1\n") for p in (10**3, 10**6, 10**9)
        ),
        *(
            (f"azure2024{i}.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n"
             f"2024-05-10{t}23:59:59.700{z},10,3\n2024-05-11{t}00:00:00.2000000{z},20,1\n")
            for i, (t, z) in enumerate(((" ", "+00:00"), ("T", "Z"), ("T", "+02:00"), ("T", "")))
        ),
        (
            "azure.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59.7,10,3\n2023-11-17 00:00:00.2000000,20,1\n",
        ),
        (
            "m.jsonl",
            '{"timestamp": 1500, "input_length": 10, "output_length": 3, "hash_ids": [1]}\n'
            '{"output_length": 1, "input_length": 20, "timestamp": 2000.0}\n',
        ),
    ],
)
def test_all_formats_of_the_same_two_requests_agree(tmp_path: Path, name: str, text: str) -> None:
    trace = read_trace(written(tmp_path, name, text))
    assert arrivals_of(trace).tolist() == [0, 500_000_000]
    assert trace.prompt_tokens.tolist() == [10, 20]
    assert trace.output_tokens.tolist() == [3, 1]
    unread = {"burst.csv": "not read: Model", "order.csv": "not read: note", "m.jsonl": "column hash_ids is not read"}
    assert [notice.split(": ", 1)[1].startswith(unread[name]) for notice in trace.notices] == [True] * (name in unread)


DATED = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    ("name", "text", "unit", "said"),
    [
        ("s.jsonl", "".join(JSON.replace("0", f"{i / 7}", 1) for i in range(9)), None, "timestamp.*in ms.*fraction"),
        ("t.csv", "timestamp,prompt_tokens,output_tokens\n1,1,1\n2,1,1\n", None, "the unit of timestamp is not known"),
        ("s.jsonl", "".join(JSON.replace("0", str(i), 1) for i in range(9)), None, "1e.03 requests/s are not between"),
        ("s.csv", "arrival_time,input_len,output_len\n0,1,1\n9e8,1,1\n1e9,1,1\n", None, "2e-09 requests/s"),
        ("s.csv", "timestamp_of_end,input_len,output_len\n1,1,1\n2,1,1\n", None, "timestamp_of_end.*arrived_at"),
    ],
)
def test_a_unit_in_doubt_is_asked_for_with_its_reason(
    tmp_path: Path, name: str, text: str, unit: str | None, said: str
) -> None:
    """Lengths can be used all the same."""
    trace = read_trace(written(tmp_path, name, text))
    assert trace.arrival_ns is None
    with pytest.raises(UserError, match=said):
        TraceArrivals(trace)
    assert any("lengths only" in notice for notice in trace.notices)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"priority": 3}, "line 1, column priority=None"), ({"hash_ids": [1]}, "column hash_ids=None"),
        ({"note": "x"}, None), ({"note": [1, {"a": 2}]}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("between", ["", '{"arrival_s": 1, "prompt_tokens": 5, "output_tokens": 4, "note": 7}\n'])
def test_what_only_later_lines_hold_is_read_or_named(
    tmp_path: Path, between: str, more: dict, said: str | None
) -> None:
    """`between`: a cell of another type, so that no reader of tables infers its column."""
    row = {"arrival_s": 1, "prompt_tokens": 5, "output_tokens": 4}
    text = f"{json.dumps(row)}\n{between}{json.dumps(row | more)}\n"
    path = written(tmp_path, "t.jsonl", text)
    if said is None:
        assert "t.jsonl: not read: note" in read_trace(path, texts=True).notices
        return
    with pytest.raises(UserError, match=said):
        read_trace(path, texts=True)


@pytest.mark.parametrize(("unit", "ns"), [("s", 10**9), ("ms", 10**6), ("us", 1000), ("ns", 1)])
def test_a_setting_says_the_unit(tmp_path: Path, unit: str, ns: int) -> None:
    file = written(tmp_path, "t.jsonl", "".join(JSON.replace("0", str(i), 1) for i in range(9)))
    assert arrivals_of(read_trace(file, time_unit=unit)).tolist() == [i * ns for i in range(9)]


@pytest.mark.parametrize(
    ("text", "unit", "said"),
    [
        (HEADER + "0,1,1\n", "ms", r"time_unit='ms': arrival_s is in s"),
        (DATED + "2024-05-10 00:00:00,1,1\n", "s", r"column TIMESTAMP='2024-05-10 00:00:00': numbers in s"),
        (HEADER + "0,1,1\n", "minutes", "time_unit='minutes': null or one of s, ms, us, ns"),
        (DATED + "2024-05-10T00:00:00Z,1,1\n2024-05-10T00:00:01,1,1\n", None, "line 3.*with an offset"),
        (DATED + "2024-05-10 00:00:00.1234567891,1,1\n", None, "line 2.*a date and time"),
        ("timestamp,prompt_tokens,output_tokens\n1700000000,1,1\n1700000001000,1,1\n", None, "line 3.*first line's"),
        ("arrival_s,prompt_tokens,output_tokens,total_tokens\n0,5,5,10\n1,5,5,11\n", None, r"request 2, .*=11.*5 \+ 5"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, text: str, unit: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_trace(written(tmp_path, "t.csv", text), time_unit=unit)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("arrays.jsonl", "[0.1, 5, 6]\n[0.2, 5, 6]\n", "its lines are arrays such as .0.1, 5, 6."),
        ("t.json", '{"prompt_tokens": {"0": 5}, "output_len": {"0": 6}}', "one object that holds all of prompt_tokens"),
        ("texts.jsonl", '{"timestamp": 0, "text_input": "Hi", "output_length": 5}', "text_input holds texts"),
        ("usage.csv", "start,total_input_tokens,total_output_tokens\n1,2,3\n", "a row for each request"),
        ("t.yml", "- {arrival_s: 0}\n- {arrival_s: 1}\n", "YAML that none of the tools wrote"),
        ("server.log", "slot print_timing: id 0 | task 0 |\n", "take a file with a row for each request"),
        ("sg.json", '[{"id": "x", "conversations": [{"from": "human", "value": "hi"}]}]', "as in ShareGPT"),
        ("p.jsonl", '{"prompt": "Tell me", "response": "No"}\n', "prompt holds texts"),
        ("bomb.csv.gz", HEADER.encode() + b"0" * (200 << 20), "at most 64 MiB of text in a packed file"),
        ("l.csv", HEADER.encode("utf-16"), "UTF-8"),
        ("d.jsonl", "[" * 100_000, "RecursionError|cannot be read"),
        ("none.jsonl", "\n", "it is empty"), ("none.json", "[]", "it is empty"),
        ("e.json", "{}", "prompt length column is called"),
        ("lfs.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_what_is_no_trace_is_said_in_one_message(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_trace(written(tmp_path, name, content))


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, "mine.csv", HEADER + "0,1,1\n")
    assert len(read_trace("~/mine.csv")) == 1


def test_seconds_since_1970_keep_their_microseconds(tmp_path: Path) -> None:
    file = written(tmp_path, "epoch.csv", HEADER + "1777142838.338653,1,1\n1777142838.623712,1,1\n")
    assert arrivals_of(read_trace(file))[1] == pytest.approx(285_059_000, abs=500)


def test_rows_out_of_order_are_sorted_stably_and_said(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "late.csv", HEADER + "5,1,1\n3,2,1\n5,3,1\n4,4,1\n"), limit=3)
    assert arrivals_of(trace).tolist() == [0, 1_000_000_000, 2_000_000_000]
    assert trace.prompt_tokens.tolist() == [2, 4, 1]
    assert trace.notices == ("late.csv: 2 of 4 rows arrive before the row above; sorted by arrival",)


def test_rows_that_arrive_together_keep_their_order(tmp_path: Path) -> None:
    rows = "".join(f"{second},{row + 1},1\n" for row, second in enumerate([9] + [5] * 100))
    trace = read_trace(written(tmp_path, "ties.csv", HEADER + rows))
    assert trace.prompt_tokens.tolist() == [*range(2, 102), 1]


def test_a_trace_cannot_be_changed_by_its_users(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "a.csv", HEADER + "0,1,1\n"))
    with pytest.raises(ValueError, match="read-only"):
        trace.prompt_tokens[0] = 2



@pytest.mark.parametrize(
    ("name", "text", "place", "part"),
    [
        ("t.csv", HEADER + "0,5,5\n1,-3,5\n", "t.csv, line 3, column prompt_tokens='-3'", "at least 1|from 1"),
        ("t.csv", HEADER + "0,5,0\n", "t.csv, line 2, column output_tokens='0'", "from 1"),
        ("t.csv", HEADER + "0,5,2.5\n", "line 2, column output_tokens='2.5'", "whole number"),
        ("t.csv", HEADER + "0,5,5\n\n1,,5\n", "line 4, column prompt_tokens=''", "whole number"),
        ("t.csv", HEADER + "0,5,5\nsoon,5,5\n", "line 3, column arrival_s='soon'", "seconds"),
        ("t.csv", HEADER + "-1,5,5\n", "line 2, column arrival_s='-1'", "at least 0"),
        ("t.csv", HEADER + "nan,5,5\n", "line 2, column arrival_s='nan'", "seconds"),
        ("t.csv", HEADER + "0,5,99999999999\n", "line 2, column output_tokens='99999999999'", "to 2147483647"),
        ("t.csv.gz", HEADER + "0,5,5\n1,5\n", "t.csv.gz, line 3='1,5'", "3 cells"),
        ("t.csv", HEADER + "0,5,5\n1,3000000000,5\n", "line 3, column prompt_tokens='3000000000'", "to 2147483647"),
        ("t.csv", LONG + "1,x,5,y\n", "line 3, column prompt_tokens='x'", "to 2147483647"),
        ("t.jsonl", JSON.replace(": 0,", ': "1753780607550317897",'), "column timestamp=", "without quotes"),
        ("t.csv", HEADER, "t.csv", "at least one request"),
        ("t.csv", "", "t.csv", "at least one request"),
        ("t.csv", "arrival_s,tokens\n0,1\n", "t.csv, columns", "prefill_tokens"),
        ("t.csv", "prompt_tokens,input_toks,output_toks\n1,1,1\n", "prompt length column", "there must be one"),
        ("t.csv", "arrival_ns,input_toks,output_toks\n1.5,1,1\n", "column arrival_ns='1.5'", "nanoseconds"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n", "column TIMESTAMP='noon'", "2023-11-16"),
        ("t.jsonl", JSON + '{"timestamp": 1, "input_length": 1}\n', "line 2, column output_length=None", "whole"),
        ("t.jsonl", JSON + JSON.replace(": 1,", ': "1",'), "line 2, column input_length='\"1\"'", "whole"),
        ("t.jsonl.gz", JSON + "{oops\n", "t.jsonl.gz, line 2='{oops'", "JSON object"),
        ("t.jsonl", JSON + "[1, 2]\n", "line 2=", "JSON object"),
        ("t.jsonl", "oops\n", "t.jsonl", "first line"),
    ],
)
def test_a_bad_file_is_refused_where_it_is_bad(tmp_path: Path, name: str, text: str, place: str, part: str) -> None:
    with pytest.raises(UserError, match=place) as caught:
        read_trace(written(tmp_path, name, text))
    assert any(word in str(caught.value) for word in part.split("|"))
    assert "Fix: " in str(caught.value)


def test_a_gzip_file_cut_short_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress((HEADER + "".join(f"{i},{i * 7919 % 1000 + 1},5\n" for i in range(5000))).encode())
    file = tmp_path / "cut.csv.gz"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.csv.gz.*ended before the end"):
        read_trace(file)


def test_a_missing_file_names_both_places_and_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}.*{VARIABLE}"):
        read_trace("nowhere.csv")
    written(tmp_path, "somewhere.csv", HEADER + "0,1,1\n")
    assert len(read_trace("somewhere.csv")) == 1


@pytest.mark.parametrize("limit", [0, -5])
def test_a_limit_below_one_is_refused(tmp_path: Path, limit: int) -> None:
    with pytest.raises(UserError, match="limit"):
        read_trace(written(tmp_path, "a.csv", HEADER + "0,1,1\n"), limit=limit)


def test_importing_the_package_loads_no_table_library() -> None:
    heavy = ("torch", "pandas", "pyarrow", "scipy")
    code = f"import sys, helios_sim.workload; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "first", "step", "said"),
    [
        ("timestamp_ms", 1_700_000_000, 1, "these are s since 1970"),
        ("arrival_s", 1_700_000_000_000, 400, "these are ms since 1970"),
        ("arrival_ns", 1_700_000_000_000, 400, "these are ms since 1970"),
        ("arrival_ms", 1_700_000_000, 400, None),  # a clock that began 20 days before
        ("arrival_us", 1_700_000_000_000_000, 400_000, None), ("arrival_s", 0, 500, None),
    ],
)  # fmt: skip
def test_a_unit_in_a_name_is_compared_with_the_numbers(
    name: str, first: int, step: int, said: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{name},prompt_tokens,output_tokens\n" + "".join(f"{first + i * step},9,9\n" for i in range(9)))
    if said is None:
        assert read_trace(path).arrival_ns is not None
    else:
        with pytest.raises(UserError, match=said):
            read_trace(path)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("arrival_s;prompt_tokens;output_tokens\n0;9;9\n", "separate the cells by commas"),
        ("0.5,9,9\n1.5,9,9\n", "write a first line with the names"),
        ("# of May\narrival_s,prompt_tokens,output_tokens\n0,9,9\n", "remove what stands before"),
        ("arrival_s,prompt_size,token_size\n0,9,9\n", "rename a column"),
    ],
)
def test_the_fix_says_what_is_wrong_with_a_header(text: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=fix):
        read_trace(tmp_path / "t.csv")


def test_what_failed_is_said_to_be_replayed(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens,status\n0,9,9,ok\n1,9,9,failed\n")
    assert any("a request that failed is replayed" in notice for notice in read_trace(tmp_path / "t.csv").notices)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PAR1abcPAR1", "a Parquet file"), (b"PK\x03\x04abc", "a ZIP archive"), (b"BZh91AY", "packed by bzip2"),
        (b"\xfd7zXZ\x00", "packed by xz"), (b"(\xb5/\xfdabc", "packed by zstd"), (b"\x1f\x8babc", "packed by gzip"),
        ("arrival_s,prompt_tokens\n".encode("utf-16"), "text in UTF-16"),
    ],
)  # fmt: skip
def test_whole_files_of_another_kind_are_not_called_damaged(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"{what}.*text in UTF-8"):
        read_trace(tmp_path / "t.csv")


@pytest.mark.parametrize("text", ["INFO 05-01 10:00:00 server started", "Timestamp,User Count,Requests/s"])
def test_what_is_no_table_of_requests_has_no_column_to_rename(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"{text}\n1,2,3\n")
    with pytest.raises(UserError, match="take a file with a row for each request"):
        read_trace(tmp_path / "t.csv")


def test_dates_that_are_too_coarse(tmp_path: Path) -> None:
    def trace(*cells: str) -> RequestTrace:
        rows = "".join(f'"{cell}",5,6\n' for cell in cells)
        (tmp_path / "t.csv").write_text(f"timestamp,prompt_tokens,output_tokens\n{rows}")
        return read_trace(tmp_path / "t.csv")

    assert trace("2024-05-01 10:00:30", "2024-05-01 10:00:30", "2024-05-01 10:01:00").notices == ()
    (said,) = trace("2024-05-01 10:00", "2024-05-01 10:00", "2024-05-01 10:01").notices
    assert said.endswith("timestamp is in whole minutes: requests of one minute come at once")
    with pytest.raises(UserError, match="all requests of a day would come at once"):
        trace("2024-05-01", "2024-05-01", "2024-05-02")
    with pytest.raises(UserError, match=r"line 2, column timestamp='2024-05-01 10:00:00,123'"):
        trace("2024-05-01 10:00:00,123", "2024-05-01 10:00:01,123")


def test_hashes_of_both_signs_are_named_with_their_lines(tmp_path: Path) -> None:
    """Neither signed nor unsigned numbers of 64 bits hold both."""
    rows = [{"timestamp": 1000 * i, "input_length": 600, "output_length": 5, "hash_ids": [hashed]}
            for i, hashed in enumerate((-5, 7, (1 << 64) - 1))]  # fmt: skip
    path = written(tmp_path, "m.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(UserError, match=r"line 3, column hash_ids=.*line 1 has some of the other. Fix: write them all"):
        read_trace(path, texts=True)


@pytest.mark.parametrize("name", ["arrival_\u00b5s", "timestamp (\u03bcs)", "arrival_us"])
def test_the_sign_of_micro_is_no_second(tmp_path: Path, name: str) -> None:
    trace = read_trace(written(tmp_path, "t.csv", f"{name},prompt_tokens,output_tokens\n0,5,5\n1000000,6,7\n"))
    assert trace.arrival_ns is not None
    assert trace.arrival_ns.tolist() == [0, 10**9]


@pytest.mark.parametrize(
    ("cell", "is_read"),
    [
        ("2024-05-10 00:00", True), ("2024-05-10T00:00:00.123456789Z", True), ("2024-05-10 00:00:00+0530", True),
        ("20240510T000000Z", False), ("0001-01-01 00:00:00", False), ("2300-01-01 00:00:00", False),
        ("2024-W19-5T00:00", False), ("2024-02-30 00:00:00", False), ("2024-05-10 24:00:00", False),
        (" 2024-05-10 00:00:00", False),
    ],
)  # fmt: skip
def test_dates_are_those_that_tables_have_or_named(tmp_path: Path, cell: str, is_read: bool) -> None:
    """Python's parser reads more, and then no line could be named."""
    path = written(tmp_path, "t.csv", f"timestamp,prompt_tokens,output_tokens\n{cell},5,5\n")
    if is_read:
        assert len(read_trace(path)) == 1
        return
    with pytest.raises(UserError, match="line 2, column timestamp="):
        read_trace(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv.gz", gzip.compress(gzip.compress(b"a,b\n", mtime=0), mtime=0), "packed twice"),
        ("t.tgz", b"\x1f\x8b", "tar xf"),
        ("t.csv", "prompt_tokens,output_tokens\n5,5\n".encode("utf-16-le"), "this is UTF-16, or no text"),
        ("t.jsonl", b'{"prompt_tokens": [17, 4], "output_tokens": 5}\n', "a number of tokens, not a list"),
    ],
)  # fmt: skip
def test_other_kinds_of_files_and_cells_are_told(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_trace(tmp_path / name)


def test_a_day_alone_among_times_is_named(tmp_path: Path) -> None:
    rows = ["2024-05-10 00:00:00", "2024-05-10 00:00:02", "2024-05-11"]
    head = "timestamp,prompt_tokens,output_tokens\n"
    with pytest.raises(UserError, match="line 4, column timestamp='2024-05-11': must be a date and time"):
        read_trace(written(tmp_path, "t.csv", head + "".join(f"{row},5,5\n" for row in rows)))
    assert len(read_trace(written(tmp_path, "u.csv", head + "".join(f"{row},5,5\n" for row in rows[:2])))) == 2


def test_half_a_sign_has_its_line(tmp_path: Path) -> None:
    """JSON may escape it, and no text has it."""
    row = '{"arrival_s": 1, "prompt_tokens": 5, "output_tokens": 4, "note": "%s"}\n'
    with pytest.raises(UserError, match="line 2='half of a sign'"):
        read_trace(written(tmp_path, "t.jsonl", row % "x" + row % r"\ud800"))
