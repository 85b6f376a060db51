"""Every number of a log is used, compared, told, or declared not to matter: none is passed over in silence.

In a log of each tool each number is changed by itself. Then the requests that are read must be others, or a sentence
must be said, or the log is refused; else the reader has declared the name harmless.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import log_samples as samples
from helios_sim.errors import UserError
from helios_sim.logs import aiperf, guidellm, inference_perf, own, read_tool, vllm_bench
from helios_sim.logs.figures import Known, statistic
from helios_sim.logs.tools import opened


def observed() -> list[dict[str, Any]]:
    row = {"prompt_tokens": 100, "output_tokens": 3, "asked_tokens": 3, "status": "ok", "ttft_s": 0.05, "e2e_s": 0.07,
           "token_times_s": [0.05, 0.06, 0.07], "finish_reason": "length", "planned_s": 0.0}  # fmt: skip
    return [{"helios_log": 1, "model": "m", "users": 2}, *({"index": i, "arrival_s": i / 2, **row} for i in range(3))]


LOGS = {
    "vllm": (samples.vllm_bench, vllm_bench), "guidellm": (samples.guidellm, guidellm),
    "observe": (observed, own), "aiperf": (samples.aiperf, aiperf),
    "inference-perf": (samples.inference_perf, inference_perf),
}  # fmt: skip
# of requests that failed nothing but their arrival and the reason counts
SKIPPED = {"guidellm": "benchmarks.*.requests.errored"}


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inside:
        yield from numbers(below, (*path, key))
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def named(path: tuple[Any, ...]) -> str:
    return ".".join("*" if isinstance(key, int) else key for key in path)


def outcome(path: Path, value: Any) -> tuple[Any, ...]:
    in_lines = path.suffix == ".jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in (value if in_lines else [value])))
    try:
        log = read_tool(opened(path))
    except UserError as refused:
        return ("refused", str(refused))
    assert log is not None
    columns = (log.arrival_s, log.prompt_tokens, log.output_tokens, log.ttft_s, log.e2e_s)
    times = None if log.token_times is None else log.token_times.time_s.tolist()
    lists = tuple(str(None if column is None else column.tolist()) for column in columns)
    return (*lists, str(times), log.status, log.notices, log.missing, str(log.stated))


def is_harmless(module: ModuleType, name: str) -> bool:
    declared: tuple[tuple[str, Known], ...] = module.DECLARED
    parts = name.split(".")
    for prefix, known in declared:
        above = prefix.split(".")[:-1]
        if len(above) < len(parts) and all(a in ("*", b) for a, b in zip(above, parts, strict=False)):
            inside = parts[len(above) :]
            return any(known.is_harmless(".".join(inside[:n])) for n in range(1, len(inside) + 1))
    return False


@pytest.mark.parametrize("tool", LOGS)
def test_every_number_counts(tmp_path: Path, tool: str) -> None:
    make, module = LOGS[tool]
    path = tmp_path / ("log.jsonl" if tool in ("aiperf", "observe") else "log.json")
    whole, seen, silent = make(), set[str](), list[str]()
    before = outcome(path, whole)
    assert before[0] != "refused"
    for place in numbers(whole):
        name = named(place)
        if name in seen or is_harmless(module, name) or name.startswith(SKIPPED.get(tool, "-")):
            continue
        if ".percentiles." in name and not name.endswith("p99"):
            continue  # all are compared alike
        seen.add(name)
        changed = make()
        within = changed
        for key in place[:-1]:
            within = within[key]
        within[place[-1]] = 1000 * within[place[-1]] + 3
        if outcome(path, changed) == before:
            silent.append(name)
    assert silent == []
    assert len(seen) > 5


def test_statistics_are_those_of_numpy_and_of_guidellm() -> None:
    values, weights = [3.0, 1.0, 2.0, 2.0], [1.0, 0.0, 4.0, 5.0]
    assert statistic("p90", values) == pytest.approx(np.percentile(values, 90))
    assert statistic("std", values) == pytest.approx(np.std(values))
    assert statistic("mean", values, weights) == pytest.approx(2.1)
    assert statistic("count", values, weights) == 10
    assert statistic("min", values, weights) == 2.0  # what weighs nothing is not there
    assert statistic("p90", values, weights) == (2.0, 3.0)  # rounding decides
    assert statistic("p95", values, weights) == (3.0, 3.0)
    assert statistic("median", [], weights) is None
    assert statistic("median", values, [0.0] * 4) is None
