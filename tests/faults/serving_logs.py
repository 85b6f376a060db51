"""Mutants of a serving log: keys and values of its settings and requests, rows of its tables, bytes of any file."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from faults import ODD, Mutant, changed_bytes, changed_json, main
from faults.text_tables import changed_table, packed

_SETTINGS = (
    "dtype", "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size",
    "kv_cache_memory_bytes", "num_gpu_blocks_override", "gpu_memory_utilization", "tensor_parallel_size",
    "enable_prefix_caching", "scheduling_policy", "cudagraph_capture_sizes", "async_scheduling", "enforce_eager",
    "cudagraph_mode", "compilation_config", "speculative_config", "quantization", "unheard_of",
)  # fmt: skip
_SECTIONS = ("cache_config", "model_config", "scheduler_config", "parallel_config", "compilation_config", "new_config")
_SMALL = ("meta.json", "requests.jsonl", "timeseries.csv", "workload.csv")


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield _written("unchanged", dict(_files()))
    while True:
        files = dict(_files())
        kind = rng.choice(("meta", "meta", "setting", "setting", "request", "request", "line", "table", "bytes", "no"))
        name = {"request": "requests.jsonl", "line": "requests.jsonl"}.get(kind, "meta.json")
        if kind == "meta":
            what, changed = changed_json(json.loads(files[name]), rng)
            files[name] = _json(changed)
        elif kind == "setting":
            meta, setting, value = json.loads(files[name]), rng.choice(_SETTINGS), rng.choice(ODD)
            place = rng.choice(("engine_kwargs", "kv_cache", "resolved_config"))
            section = {rng.choice(_SECTIONS): {setting: value}} if place == "resolved_config" else {setting: value}
            meta[place] = {**(meta.get(place) or {}), **section}
            what, files[name] = f"{place} {section}", _json(meta)
        elif kind == "request":
            lines = files[name].splitlines()
            at = rng.randrange(len(lines))
            what, changed = changed_json(json.loads(lines[at]), rng)
            lines[at] = _json(changed)
            files[name] = b"\n".join(lines)
        elif kind == "line":
            what, files[name] = changed_table(files[name].decode(), rng, separator=", ")
        elif kind == "table":
            name = rng.choice(("timeseries.csv", "workload.csv"))
            what, files[name] = changed_table(files[name].decode(), rng)
            if rng.random() < 0.1:
                how, files[f"{name}.gz"] = packed(files.pop(name), rng)
                what += f", {how}"
        elif kind == "bytes":
            name = rng.choice(_SMALL)
            what, files[name] = changed_bytes(files[name], rng)
        else:
            name, what = rng.choice(_SMALL), ""
            del files[name]
        yield _written(f"{kind}, {name}: {what[:100]!r}", files)


def read(path: Path) -> None:
    """Read the log, set up the engine and simulate the run, whose times must be in order."""
    import numpy as np

    from helios_sim.study.modes import FidelityConfig
    from helios_sim.validate.logs import read_log
    from helios_sim.validate.replay import run_once
    from helios_sim.validate.setup import set_up

    log = read_log(path)
    setup = set_up(log, FidelityConfig())
    assert 1 <= setup.kv_blocks < 2**40
    if len(log) <= 50 and int(log.output_tokens.sum()) <= 5_000:
        times = run_once(log, setup).times
        assert bool(np.all(times.queued_ns <= times.scheduled_ns))
        assert bool(np.all(times.scheduled_ns < times.first_ns))
        assert bool(np.all(times.first_ns <= times.last_ns))


def _json(value: object) -> bytes:
    return json.dumps(value).encode(errors="surrogatepass")


@cache
def _files() -> dict[str, bytes]:
    """By path relative to the folder."""
    from vllm_log import write_log

    with TemporaryDirectory() as folder:
        log = write_log(Path(folder) / "log", requests=8, output=12, blocks=4000)
        rows = [json.loads(line) for line in (log / "requests.jsonl").read_text().splitlines()]
        lines = ["idx,arrival_ns,input_toks,output_toks"]
        for i, row in enumerate(rows):
            arrival_ns = round((row["arrival_time"] - 1e9) * 1e9)
            lines.append(f"{i},{arrival_ns},{row['input_toks']},{row['output_toks']}")
        (log / "workload.csv").write_text("\n".join(lines) + "\n")
        return {str(p.relative_to(log)): p.read_bytes() for p in sorted(log.rglob("*")) if p.is_file()}


def _written(what: str, files: dict[str, bytes]) -> Mutant:
    def write(folder: Path) -> Path:
        for name, content in files.items():
            (folder / "log" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "log" / name).write_bytes(content)
        return folder / "log"

    return Mutant(what, write)


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
