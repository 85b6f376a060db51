"""A small folder with a serving log and kernel tables, written by the tests. Its kernels follow a simple formula."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np

CHUNKS, CONTEXTS, BATCHES, KVS = (16, 64, 256), (0, 64, 256), (1, 4, 16), (16, 128, 1024)
REPETITIONS = 3
LAYER_US = {
    "layernorm": 2,
    "qkv_proj": 30,
    "rotary_emb": 3,
    "o_proj": 20,
    "gate_up_proj": 60,
    "act_fn": 3,
    "down_proj": 40,
}


def attention_us(chunk: int, context: int, batch: int, kv: float) -> float:
    """Decodes cost half as much again beside a chunk."""
    prompt = 5 + 0.02 * chunk + 1e-4 * chunk * (context + chunk / 2) if chunk else 0.0
    decode = batch * (1 + 0.01 * kv) if batch else 0.0
    return prompt + decode * (1.5 if chunk else 1.0)


def write_profile(folder: Path, model: str, hardware: str, suffix: str = ".csv") -> None:
    folder.mkdir(parents=True)
    tokens = (1, 8, 64, 256, 512)
    dense = [(name, n, us + 0.05 * us * n / 8) for name, us in LAYER_US.items() for n in tokens]
    dense += [(name, n, 3 + 0.001 * n) for name in ("embedding", "final_layernorm") for n in tokens]
    _table(folder / f"dense{suffix}", ("layer", "tokens", "time_us"), dense)
    sequences = [(name, n, us + n) for name, us in (("lm_head", 200), ("sampler", 20)) for n in (1, 16, 64)]
    _table(folder / f"per_sequence{suffix}", ("layer", "sequences", "time_us"), sequences)
    grid = [(c, x, 0, 0, attention_us(c, x, 0, 0)) for c in CHUNKS for x in CONTEXTS]
    grid += [(0, 0, b, v, attention_us(0, 0, b, v)) for b in BATCHES for v in KVS]
    # as in real tables, the largest batch was not measured beside every chunk
    grid += [(c, x, b, v, attention_us(c, x, b, v)) for c in CHUNKS for x in CONTEXTS for b in BATCHES for v in KVS
             if (c, b) != (256, 16)]  # fmt: skip
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    _table(folder / f"attention{suffix}", names, grid)
    skew = []
    for n in (4, 16):
        for nb in (1, n // 2):
            for pc in (0, 64):
                for kvs in (32, 128):
                    big, mean = 4 * kvs, (nb * 4 * kvs + (n - nb) * kvs) / n
                    chunk = attention_us(pc, 0, 0, 0)
                    mean_us = attention_us(pc, 0, n, mean)
                    slower = mean_us + 0.2 * (mean_us - chunk)
                    times = [REPETITIONS * t for t in (mean_us, attention_us(pc, 0, n, big), slower)]
                    skew.append(("pure", n, nb, nb / n, 4.0, pc, 0, kvs, big, int(mean), *times))
    columns = ("regime", "n", "nb", "ratio", "skew", "pc", "kp", "kvs", "kv_big", "kv_mean",
               "t_mean_us", "t_max_us", "t_skew_us")  # fmt: skip
    _table(folder / f"skew{suffix}", columns, skew)
    meta = f"gpu: a card\nhardware: {hardware}\nmodel: {model}\nmeasurement_iterations: {REPETITIONS}\n"
    (folder / "meta.yaml").write_text(meta)


def write_log(
    folder: Path, *, model: str = "Qwen/Qwen2.5-0.5B", hardware: str = "RTX4090", requests: int = 24,
    tensor_parallel: int = 1, blocks: int | None = None, output: int = 40, suffix: str = ".csv",
) -> Path:  # fmt: skip
    """A log whose times are those of no real engine, but in a possible order."""
    rng = np.random.default_rng(0)
    write_profile(folder / "profile", model, hardware, suffix)
    meta = {
        "model": model, "vllm_version": "0.19.0",
        "engine_kwargs": {"tensor_parallel_size": tensor_parallel, "data_parallel_size": 1, "max_num_seqs": 8,
                          "max_num_batched_tokens": 256, "max_model_len": None, "kv_cache_dtype": "auto"},
    }  # fmt: skip
    if blocks is not None:
        meta["kv_cache"] = {"num_gpu_blocks": blocks, "block_size": 16}
    (folder / "meta.json").write_text(json.dumps(meta))
    at, rows = 0.0, []
    for i in range(requests):
        at += float(rng.exponential(0.02))
        prompt, answer = int(rng.integers(20, 300)), int(rng.integers(2, output))
        first = at + 0.02 + 0.001 * i
        rows.append({"request_id": f"bench-{i}", "input_toks": prompt, "output_toks": answer, "arrival_time": 1e9 + at,
                     "queued_ts": 50.0 + at, "scheduled_ts": 50.0 + at + 1e-5, "first_token_ts": 50.0 + first,
                     "last_token_ts": 50.0 + first + 0.008 * (answer - 1)})  # fmt: skip
    write_requests(folder, rows)
    ticks = [(t / 10, 100.0, 50.0, 3, 1, 0.0) for t in range(1, 12)]
    names = ("t", "prompt_throughput", "gen_throughput", "running", "waiting", "kv_cache_pct")
    _table(folder / "timeseries.csv", names, ticks)
    return folder


def change_meta(folder: Path, engine: dict | None = None, **others: object) -> Path:
    """Write further engine_kwargs, and other keys, into meta.json."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["engine_kwargs"].update(engine or {})
    (folder / "meta.json").write_text(json.dumps({**meta, **others}))
    return folder


def change_request(folder: Path, number: int, **values: object) -> Path:
    """Write other values into the line with this number, from 1. None: the key goes."""
    rows = read_requests(folder)
    row = {**rows[number - 1], **values}
    rows[number - 1] = {key: value for key, value in row.items() if value is not None}
    write_requests(folder, rows)
    return folder


def write_requests(folder: Path, rows: list[dict]) -> None:
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_requests(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def _table(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
