"""The field's clients against both engines: python experiments/serve/clients.py

`--clients FOLDER` holds an environment for each client, as `make clients` makes them (.venv-clients). For each client:
how many of its requests failed, how far its times are from the server's own records of the same requests, and how far
mode=simulate is from mode=live. A profile of this machine is measured just before (`--calibrate_s`), and the live
engine serves before and after the simulated one: what its two turns differ by is the machine's own noise. The engine
has a core for itself, as it had when it was measured; the front process and the client share the others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from helios_sim.entry import script

HERE = Path(__file__).parent
TOKENS, PROMPT, REQUESTS, AT_ONCE = 24, 64, 32, 2
NEAR_MS, NEAR = 2.0, 0.02
TURNS = ("live", "simulate", "live again")
Times = list[tuple[float, float]]  # TTFT and mean time between tokens of each request, in ms


def cores() -> tuple[set[int], set[int]]:
    """The core of the engine, and those of everything else. A machine with one has it for both."""
    first, *others = sorted(os.sched_getaffinity(0))
    return {first}, set(others) or {first}


CORES = cores()


def stay_on(process: int, allowed: set[int]) -> None:
    """Keep all threads of a process on these cores."""
    for thread in os.listdir(f"/proc/{process}/task"):
        os.sched_setaffinity(int(thread), allowed)


def children(process: int) -> list[int]:
    lists = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for one in lists for child in one.read_text().split()]


def serve(words: Sequence[str], folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    said = folder / "said.txt"
    command = [sys.executable, "-m", "helios_sim.serve", "serve.port=0", *words]
    command.append(f"serve.records={folder}/records.jsonl")
    engine, others = CORES
    with said.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    stay_on(process.pid, engine)
    while not (found := re.search(r"http://[\d.]+:\d+", said.read_text())):
        assert process.poll() is None, said.read_text()
        time.sleep(0.1)
    import httpx

    while httpx.get(f"{found[0]}/health", timeout=120).status_code != 200:
        time.sleep(0.1)
    stay_on(process.pid, engine)
    for child in children(process.pid):  # the front
        stay_on(child, others)
    return process, found[0]


def run(command: Sequence[str | Path], folder: Path) -> int:
    """The client's exit status; what it says is kept in the folder. A session of its own ends with it."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "client.txt").open("w") as out:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=out, env=env, cwd=folder,
                                   start_new_session=True)  # fmt: skip
        try:
            return process.wait(180)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return -1


def guidellm(at: Path, address: str, tokenizer: Path, folder: Path) -> tuple[int, Times]:
    run([
        at / "guidellm/bin/guidellm", "run", "--backend", f"kind=openai_http,target={address},model=helios",
        "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={TOKENS}",
        "--profile", f"kind=concurrent,streams={AT_ONCE}", "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--output", f"kind=json,path={folder}/out.json", "--disable-progress",
    ], folder)  # fmt: skip
    requests = json.loads((folder / "out.json").read_text())["benchmarks"][0]["requests"]
    good = requests["successful"]
    failed = len(requests["errored"]) + len(requests["incomplete"])
    return failed, [(one["time_to_first_token_ms"], one["inter_token_latency_ms"]) for one in good]


def aiperf(at: Path, address: str, tokenizer: Path, folder: Path) -> tuple[int, Times]:
    run([
        at / "aiperf/bin/aiperf", "profile", "-m", "helios", "-u", address, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", tokenizer, "--concurrency", AT_ONCE, "--request-count", REQUESTS,
        "--prompt-input-tokens-mean", PROMPT, "--prompt-output-tokens-mean", TOKENS, "--extra-inputs",
        "ignore_eos:true", "--output-artifact-dir", folder / "out", "--ui", "none",
    ], folder)  # fmt: skip
    lines = (folder / "out/profile_export.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    good = [one["metrics"] for one in records if not one.get("error")]
    return len(records) - len(good), [
        (one["time_to_first_token"]["value"], one["inter_token_latency"]["value"]) for one in good
    ]


def inference_perf(at: Path, address: str, tokenizer: Path, folder: Path) -> tuple[int, Times]:
    lengths = "{min: %d, max: %d, mean: %d, std_dev: 0, total_count: %d}"
    rate = 1.0
    (folder / "in.yaml").write_text(f"""
load: {{type: constant, stages: [{{rate: {rate}, duration: {REQUESTS}}}], num_workers: 1, worker_max_concurrency: 4}}
api: {{type: completion, streaming: true}}
server: {{type: vllm, model_name: helios, base_url: "{address}", ignore_eos: true}}
tokenizer: {{pretrained_model_name_or_path: "{tokenizer}"}}
data:
  type: random
  input_distribution: {lengths % (PROMPT, PROMPT, PROMPT, REQUESTS)}
  output_distribution: {lengths % (TOKENS, TOKENS, TOKENS, REQUESTS)}
report: {{request_lifecycle: {{summary: true, per_stage: true, per_request: true}}}}
storage: {{local_storage: {{path: "{folder}/out"}}}}
""")
    run([at / "inference-perf/bin/inference-perf", "-c", folder / "in.yaml"], folder)
    records = json.loads((folder / "out/per_request_lifecycle_metrics.json").read_text())
    good = [one for one in records if not one.get("error")]
    found: Times = []
    for one in good:
        times = _token_times(one)
        found.append(((times[0] - one["start_time"]) * 1e3, (times[-1] - times[0]) / (len(times) - 1) * 1e3))
    return len(records) - len(good), found


def _token_times(record: dict[str, Any]) -> list[float]:
    for place in (record, record.get("info") or {}, (record.get("info") or {}).get("response_metrics") or {}):
        for name in ("output_token_times", "response_chunk_times", "chunk_times"):
            if place.get(name):
                return [float(value) for value in place[name]][:TOKENS]
    raise KeyError(f"no times of tokens in {list(record)}, {list(record.get('info') or {})}")


def genai_bench(at: Path, address: str, tokenizer: Path, folder: Path) -> tuple[int, Times]:
    run([
        at / "genai-bench/bin/genai-bench", "benchmark", "--api-backend", "vllm", "--api-base", address, "--api-key",
        "none", "--task", "text-to-text", "--api-model-name", "helios", "--model", "helios", "--model-tokenizer",
        tokenizer, "--traffic-scenario", f"D({PROMPT},{TOKENS})", "--num-concurrency", AT_ONCE, "--max-time-per-run",
        "1", "--max-requests-per-run", REQUESTS, "--experiment-base-dir", folder / "out",
        "--experiment-folder-name", "run",
    ], folder)  # fmt: skip
    (path,) = (folder / "out/run").glob("D*_text-to-text_*.json")
    found = json.loads(path.read_text())
    records = found["individual_request_metrics"]
    good = [one for one in records if one["error_code"] is None]
    failed = len(records) - len(good)
    return failed, [(one["ttft"] * 1e3, one["tpot"] * 1e3) for one in good]


def openai(at: Path, address: str, tokenizer: Path, folder: Path, at_once: int = 1) -> tuple[int, Times]:
    with ThreadPoolExecutor(at_once) as threads:
        parts = list(threads.map(lambda number: _one_by_one(address, number, REQUESTS // at_once), range(at_once)))
    return sum(failed for failed, _ in parts), [times for _, found in parts for times in found]


def _one_by_one(address: str, stream_number: int, requests: int) -> tuple[int, Times]:
    from openai import OpenAI

    client, found, failed = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), [], 0
    client.models.list()  # the connection is there
    for number in range(requests):
        text = f"{stream_number}, {number}: " + "word " * PROMPT
        began, times = time.perf_counter(), []
        stream = client.chat.completions.create(
            model="helios", messages=[{"role": "user", "content": text}], max_tokens=TOKENS, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                times.append(time.perf_counter())
        failed += len(times) != TOKENS
        found.append(((times[0] - began) * 1e3, (times[-1] - times[0]) / (len(times) - 1) * 1e3))
    return failed, found


def for_clients(tokenizer: Path, into: Path) -> Path:
    """A copy that older versions of transformers read too."""
    shutil.copytree(tokenizer, into)
    settings = json.loads((into / "tokenizer_config.json").read_text())
    (into / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (into / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return into


CLIENTS: dict[str, Callable[[Path, str, Path, Path], tuple[int, Times]]] = {
    "openai": openai, "openai, 2 at once": partial(openai, at_once=2), "guidellm": guidellm, "aiperf": aiperf,
    "inference-perf": inference_perf, "genai-bench": genai_bench,
}  # fmt: skip


def against(mode: str, words: Sequence[str], arguments: argparse.Namespace, client: str) -> dict[str, Any]:
    """What a client saw of a server in this mode, beside what the server has of the same requests."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "records.jsonl").touch()
        process, address = serve([f"mode={mode}", *words], folder)
        try:
            began = time.monotonic()
            failed, times = CLIENTS[client](arguments.clients, address, arguments.tokenizer, folder)
            time.sleep(0.5)
            lines = (folder / "records.jsonl").read_text().splitlines()
            ours = [one for one in map(json.loads, lines) if one["output_tokens"] == TOKENS][-len(times) :]
            found = compared(failed, times, ours) | {"seconds": time.monotonic() - began}
        except Exception as error:
            said = folder / "client.txt"
            told = said.read_text()[-1500:] if said.exists() else ""
            print(f"{mode} {client}: {error!r}\n{told}", file=sys.stderr)
            found = {"error": repr(error)}
        finally:
            process.terminate()
            process.wait(60)
        print(mode, client, found, file=sys.stderr)
    return found


def compared(failed: int, times: Times, ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    theirs_ms = [median(column) for column in zip(*times, strict=True)]
    gaps = [sum(one["gaps_s"]) / len(one["gaps_s"]) * 1e3 for one in ours]
    ours_ms = [median(one["ttft_s"] * 1e3 for one in ours), median(gaps)]
    engine_ms = [median((one["engine"][f"{name}_token_ns"] - one["engine"]["arrival_ns"]) / 1e6 for one in ours)
                 for name in ("first", "last")]  # fmt: skip
    spans_ns = [(one["engine"]["last_token_ns"] - one["engine"]["first_token_ns"]) for one in ours]
    tpot_ms = median(span_ns / (TOKENS - 1) / 1e6 for span_ns in spans_ns)
    return {
        "requests": len(times), "failed": failed, "records": len(ours), "ttft_ms": theirs_ms[0], "itl_ms": theirs_ms[1],
        "server_ttft_ms": ours_ms[0], "server_itl_ms": ours_ms[1], "engine_ttft_ms": engine_ms[0],
        "engine_tpot_ms": tpot_ms, "near": all(
            abs(a - b) <= NEAR_MS + NEAR * b for a, b in zip(theirs_ms, ours_ms, strict=True)
        ),
    }  # fmt: skip


def profiled(seconds: float, folder: Path) -> list[str]:
    """The words that name a profile of this machine, measured now. Its pace changes within minutes."""
    words = ["model=smollm2", "device=cpu", "threads=1", f"budget_s={seconds:g}", f"out={folder}", "+task=latency",
             "max_batch=8", "max_batch_tokens=256", "max_context_tokens=512"]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "calibrate", *words], stdout=subprocess.DEVNULL)
    stay_on(process.pid, CORES[0])
    assert process.wait() == 0
    (profile,) = (folder / "profile").glob("*@*")
    return [f"profile_folder={folder / 'profile'}", f"hardware={profile.name.partition('@')[2]}"]


def table(found: dict[str, Any]) -> str:
    lines = [
        "| engine | client | requests | failed | TTFT client / server, ms | between tokens client / server, ms | "
        "within 2 ms + 2 % |", "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for mode in TURNS:
        for name, one in found[mode].items():
            if "error" in one:
                lines.append(f"| {mode} | {name} | | | {one['error']} | | |")
                continue
            lines.append(
                f"| {mode} | {name} | {one['requests']} | {one['failed']} | {one['ttft_ms']:.1f} / "
                f"{one['server_ttft_ms']:.1f} | {one['itl_ms']:.2f} / {one['server_itl_ms']:.2f} | "
                f"{'yes' if one['near'] else 'no'} |"
            )
    heads = ["client"]
    for name in ("TTFT", "TPOT"):
        heads += [f"{name} live, live again / simulated, ms", "simulated against live", "live again against live"]
    lines += ["", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for client in CLIENTS:
        turns = [found[turn].get(client, {"error": ""}) for turn in TURNS]
        if any("error" in one for one in turns):
            continue
        cells = [client]
        for key in ("engine_ttft_ms", "engine_tpot_ms"):
            live, simulated, again = (one[key] for one in turns)
            cells += [f"{live:.1f}, {again:.1f} / {simulated:.1f}", f"{simulated / ((live + again) / 2) - 1:+.1%}",
                      f"{again / live - 1:+.1%}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{found['about']}\n"


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=Path, default=Path(".venv-clients"))
    parser.add_argument("--tokenizer", type=Path, help="of SmolLM2; left out: the one that the cache holds")
    parser.add_argument("--calibrate_s", type=float, default=50.0, help="for each client; 0: the shipped profile")
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--write", action="store_true", help="keep the result beside this script")
    arguments = parser.parse_args(words)
    from helios_sim.live.checkpoint.known import KNOWN
    from helios_sim.shared_data import cache_folder

    known = cache_folder() / "tokenizers" / KNOWN["smollm2-135m"].sha256
    arguments.clients = arguments.clients.resolve()
    loads = [os.getloadavg()[0]]
    with TemporaryDirectory() as scratch:
        arguments.tokenizer = for_clients((arguments.tokenizer or known).resolve(), Path(scratch) / "tokenizer")
        found: dict[str, Any] = {turn: {} for turn in TURNS}
        for client in (name for name in CLIENTS if name not in arguments.without):
            words = ["model=smollm2", "serve.max_model_len=512"]
            with TemporaryDirectory() as calibrated:
                words += profiled(arguments.calibrate_s, Path(calibrated)) if arguments.calibrate_s else []
                for turn in TURNS:
                    mode = turn.split()[0]
                    threads = ["live.threads=1"] if mode == "live" else []
                    found[turn][client] = against(mode, [*words, *threads], arguments, client)
            loads.append(os.getloadavg()[0])
    found["about"] = (
        f"{REQUESTS} requests of {PROMPT} prompt tokens (as each client counts them) and {TOKENS} of the answer, "
        f"{AT_ONCE} at once (inference-perf: one a second; openai: one after the other, or 2 at once). Medians. "
        f"Load average of the machine with {os.cpu_count()} cores before, and after each client: "
        f"{', '.join(f'{load:.1f}' for load in loads)}."
    )  # fmt: skip
    if arguments.write:
        (HERE / "clients.json").write_text(json.dumps(found, indent=1) + "\n")
        (HERE / "clients.md").write_text(table(found))
    print(table(found))
    shutil.rmtree(HERE / "__pycache__", ignore_errors=True)
    return 0


if __name__ == "__main__":
    script(__file__, main)
