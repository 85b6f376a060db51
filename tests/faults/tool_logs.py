"""Mutants of the logs of benchmark tools, spans and scrapes: values, names, rows and bytes of a file of each tool."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from faults import Mutant, changed_bytes, changed_json, main
from faults.text_tables import changed_table, packed

_ODD_FILES = (b"", b"[" * 100_000, b"{}", b"[]", b"\xff\xfe", b"null", b'{"a": ' * 50_000, b"version https://git-lfs")


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    samples = _samples()
    yield _written("unchanged", "guidellm", samples["guidellm"])
    while True:
        tool = rng.choice(list(samples))
        files = dict(samples[tool])
        name = rng.choice(list(files))
        kind = rng.choice(("value", "value", "value", "row", "bytes", "file", "packed" if len(files) == 1 else "no"))
        if kind == "value" and name.endswith((".json", ".jsonl")):
            what, files[name] = _changed_value(files[name], name.endswith(".jsonl"), rng)
        elif kind in ("value", "row") and files[name].count(b"\n") > 1:
            separator = {".csv": ",", ".prom": " ", ".yaml": ": "}.get(Path(name).suffix, ", ")
            what, files[name] = changed_table(files[name].decode(), rng, separator)
        elif kind in ("value", "row", "bytes"):
            what, files[name] = changed_bytes(files[name], rng)
        elif kind == "file":
            files[name] = rng.choice(_ODD_FILES)
            what = str(files[name][:10])
        elif kind == "packed":
            what, files[f"{name}.gz"] = packed(files.pop(name), rng)
        else:
            what = "is not there"
            del files[name]
        yield _written(f"{tool}, {name}, {kind}: {what[:100]!r}", tool, files)


def read(path: Path) -> None:
    """Read the requests as `log=` does, and look at what must hold of any log."""
    import numpy as np

    from helios_sim.logs import read_folder, read_tool, tools
    from helios_sim.workload import read_trace

    log = read_folder(path) if path.is_dir() else read_tool(tools.opened(path))
    if log is None:  # no tool's: a table of requests, perhaps
        trace = read_trace(path, texts=True)
        assert len(trace) >= 1
        return
    done = log.completed
    assert done.any()
    assert log.prompt_tokens[done].min() >= 1
    assert log.output_tokens[done].min() >= 1
    assert len(log.status) == len(log)
    if log.arrival_s is not None:
        times = log.arrival_s[done]
        assert bool(np.all(np.isfinite(times)))
        assert bool(np.all(np.diff(times) >= 0))
        assert times.min() >= 0
    for column in (log.ttft_s, log.e2e_s, log.queue_s):
        assert column is None or not (column < 0).any()
    if log.ttft_s is not None and log.e2e_s is not None:
        assert not (log.ttft_s > log.e2e_s + 0.002).any()
    log.tpot_s()
    json.dumps([log.failures, log.missing, log.notices, log.stated], default=str)


def _changed_value(content: bytes, in_lines: bool, rng: random.Random) -> tuple[str, bytes]:
    """One value of a JSON text, or of one of its lines, changed."""
    if not in_lines:
        what, changed = changed_json(json.loads(content), rng)
        return what, _json(changed)
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    what, changed = changed_json(json.loads(lines[at]), rng)
    lines[at] = _json(changed)
    return what, b"\n".join(lines) + b"\n"


def _json(value: object) -> bytes:
    return json.dumps(value).encode(errors="surrogatepass")


@cache
def _samples() -> dict[str, dict[str, bytes]]:
    """By tool the files of a small log of its own, by name."""
    import log_samples as logs

    request = {"prompt_tokens": 100, "output_tokens": 3, "asked_tokens": 3, "status": "ok", "ttft_s": 0.05,
               "e2e_s": 0.07, "token_times_s": [0.05, 0.06, 0.07], "finish_reason": "length"}  # fmt: skip
    observed = [{"helios_log": 1, "model": "m"}, *({"index": i, "arrival_s": i / 2, **request} for i in range(4))]

    def lines(values: list[Any]) -> dict[str, bytes]:
        return {"log.jsonl": b"".join(_json(value) + b"\n" for value in values)}

    found = {
        "vllm": {"log.json": _json(logs.vllm_bench())}, "guidellm": {"log.json": _json(logs.guidellm())},
        "inference-perf": {"log.json": _json(logs.inference_perf())}, "aiperf": lines(logs.aiperf()),
        "observe": lines(observed), "spans": lines(logs.spans()),
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        for tool, write in (("blis", logs.write_blis), ("servegen", logs.write_servegen),
                            ("scrapes", logs.write_scrapes)):  # fmt: skip
            place = Path(folder) / tool
            write(place)
            found[tool] = {path.name: path.read_bytes() for path in sorted(place.iterdir())}
    return found


def _written(what: str, tool: str, files: dict[str, bytes]) -> Mutant:
    def write(folder: Path) -> Path:
        place = folder / "log"
        place.mkdir()
        for name, content in files.items():
            (place / name).write_bytes(content)
        if tool == "blis":
            return place / "trace.csv" if "trace.csv" in files else place
        return place if tool in ("servegen", "scrapes") else place / next(iter(files))

    return Mutant(what, write)


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
