"""End-to-end measurements of served models that others published, and what the simulator predicts for each row.

A row is a closed loop of clients on an engine's version, a model, cards and lengths. It becomes a study like any other:
the preset of the engine's version (conf/engine), the row's own sizes, and what its harness is known to have set.
Nothing belongs to a single row or group. What is fitted is host time, by engine version: an iteration's in
profile/runtimes.py, and here what lies between a client and the engine's loop.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError
from helios_sim.profile.devices import DEGREES
from helios_sim.profile.formats import named_format
from helios_sim.profile.resolve import VLLM
from helios_sim.study.jobs import Job, make_job, make_ready, run_job
from helios_sim.study.presets import preset_of, preset_settings
from helios_sim.study.runner import task_of
from helios_sim.study.schema import Config
from helios_sim.untrusted import MIB, read_text, shortened
from helios_sim.vary.runner import Journal, run_tasks
from helios_sim.vary.settings import with_settings
from helios_sim.vary.workers import Place, Workers

SHIPPED = Path(__file__).parents[1] / "data" / "silicon" / "handed.csv"
MOST_ROWS = 100_000
ROWS_WORTH_A_POOL = 16  # fewer are done before the processes have started
TURNS = 10  # requests of each client
LEAST_SHARE = 0.8  # of a length that InferenceMAX draws
INFERENCEMAX = "InferenceMAX"
HOPPER = ("h100_sxm", "h200_sxm")
CARDS = {
    "a100_sxm": "a100-80gb", "h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200", "b300_sxm": "b300",
    "gb200": "gb200", "gb300": "b300", "gh200": "gh200", "l40s": "l40s", "rtx_pro_6000_server": "rtxpro6000",
    "a100_pcie": "a100-80gb", "h100_pcie": "h100-pcie", "a30": "a30", "l4": "l4",
}  # fmt: skip
# By engine: seconds from a client to the waiting line and back with its first token, and what each client adds. Fitted
# to TTFT of one half of the rows with a known harness (of vLLM 0.10 and TensorRT-LLM 1.1); none are of SGLang.
FRONT_S: Mapping[str, tuple[float, float]] = {"vllm": (12.8e-3, 0.0), "trtllm": (20.1e-3, 0.34e-3)}
_FIX = "correct the file"
_ROW = "fidelity.rows"


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    source: str
    backend: str
    backend_version: str
    model: str
    system: str
    precision: str  # bf16, fp8, nvfp4
    isl: int  # tokens of a prompt
    osl: int  # of an answer
    concurrency: int  # clients
    tp: int  # cards of the group
    ttft_ms: float  # means over the run
    tpot_ms: float

    @property
    def is_fitted(self) -> bool:
        """Whether it is of the half by which host times were fitted."""
        return hashlib.sha256(self.id.encode()).digest()[0] % 2 == 0


@dataclass(frozen=True, slots=True)
class Prediction:
    ttft_ms: float
    tpot_ms: float
    preemptions: int


def read_rows(path: Path) -> list[Row]:
    """UserError with the row and the column where a value is missing or is none that can be."""
    text = read_text(path, 64 * MIB, f"set {_ROW} to a file of rows").decode("utf-8", errors="replace")
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    names = [f.name for f in fields(Row)]
    rows: list[Row] = []
    try:
        missing = [name for name in names if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: columns", ", ".join(missing), "all of " + ", ".join(names), "add them")
        for number, values in enumerate(reader, 2):  # lines of the file, of which the first has the names
            rows.append(_row(path, number, values))
            if number > MOST_ROWS:
                raise UserError(f"{path}: rows", number, f"at most {MOST_ROWS:,}", "split the file")
    except csv.Error as error:
        raise UserError(str(path), shortened(str(error)), "a CSV file", _FIX) from error
    if not rows:
        raise UserError(str(path), 0, "at least one row", _FIX)
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 2):
        first = seen.setdefault(row.id, number)
        if first != number:
            raise UserError(f"{path}: row {number}: id", shortened(row.id), f"not that of row {first}", "drop one")
    return rows


def not_read(path: Path) -> list[str]:
    """A sentence about columns of which nothing is made; none where there are none."""
    text = read_text(path, 64 * MIB, f"set {_ROW} to a file of rows").decode("utf-8", errors="replace")
    known = {f.name for f in fields(Row)}
    left = [name for name in next(csv.reader(StringIO(text, newline=""))) if name.strip() and name not in known]
    return [f"{path.name}: not read: {', '.join(left[:12])}"] if left else []


def _row(path: Path, number: int, values: Mapping[str, Any]) -> Row:
    def wrong(column: str, allowed: str) -> UserError:
        return UserError(f"{path}: row {number}: {column}", shortened(values.get(column)), allowed, _FIX)

    found: dict[str, Any] = {}
    for f in fields(Row):
        text = (values.get(f.name) or "").strip()
        if f.type == "str":
            if not 0 < len(text) <= 500:
                raise wrong(f.name, "a text of 1 to 500 characters")
            found[f.name] = text
            continue
        whole = f.type == "int"
        low, high = (1, 1 << 20) if whole else (1e-6, 1e12)
        try:
            number_of = int(text) if whole else float(text)
        except ValueError:
            number_of = -1
        if not low <= number_of <= high:
            kind = "a whole number" if whole else "a number"
            raise wrong(f.name, f"{kind} from {low} to {high:,}")
        found[f.name] = number_of
    if None in values:
        raise wrong("columns", "as many values as names")
    return Row(**found)


def preset_for(row: Row) -> str:
    """Raise UserError for an engine of which there is no preset."""
    found = preset_of(row.backend.lower(), row.backend_version)
    if found is None:
        raise UserError("backend", row.backend, "vllm, trtllm or sglang", "leave the row out")
    return found


def settings_of(row: Row) -> dict[str, Any]:
    """The study of a row. Raises UserError for a card, a precision or a number of cards that cannot be priced."""
    if row.system not in CARDS:
        raise UserError("system", row.system, f"one of {', '.join(CARDS)}", "leave the row out")
    if row.tp not in DEGREES:
        raise UserError("tp", row.tp, f"one of {', '.join(map(str, DEGREES))}", "leave the row out")
    found = {
        **preset_settings(preset_for(row)), **_precision(row),
        "models": [named_format(row.model)[0]], "hardware": CARDS[row.system], "server.tensor_parallel": row.tp,
        "workload.n_requests": TURNS * row.concurrency, "workload.arrivals.users": row.concurrency,
    }  # fmt: skip
    for name, tokens in (("prompt", row.isl), ("output", row.osl)):
        length = f"workload.lengths.{name}"
        found |= {f"{length}.kind": "fixed", f"{length}.value": tokens}
        if row.source.startswith(INFERENCEMAX):
            least = max(1, int(LEAST_SHARE * tokens))
            found |= {f"{length}.kind": "uniform", f"{length}.minimum": least, f"{length}.maximum": tokens}
    if row.source.startswith(INFERENCEMAX):
        found |= _of_inferencemax(row)
    return found


def _precision(row: Row) -> dict[str, Any]:
    """Qwen3's checkpoints in fp8 are scaled by blocks, those of Llama that NVIDIA publishes by matrix."""
    known = {"bf16": None, "fp8": "fp8-block" if "qwen3" in row.model.lower() else "fp8", "nvfp4": "nvfp4"}
    if row.precision not in known:
        raise UserError("precision", row.precision, f"one of {', '.join(known)}", "leave the row out")
    form = known[row.precision]
    if form is None:
        return {}
    of_kv = {} if CARDS[row.system].startswith("a") else {"server.kv_cache_dtype": "fp8"}  # Ampere has no units for it
    return {"server.quantization": form, **of_kv}


def _of_inferencemax(row: Row) -> dict[str, Any]:
    """What its scripts set (benchmarks/70b_*).

    On Blackwell they have vLLM run FlashInfer's products, attention and all-reduces, which are TensorRT-LLM's kernels.
    """
    if row.backend == "vllm":
        hopper = row.system in HOPPER
        return {
            "server.max_batch_tokens": 8192, "server.max_running_requests": row.concurrency if hopper else 512,
            "server.schedule_ahead": 1, "server.kernels": VLLM if hopper else "trtllm",
        }  # fmt: skip
    if row.backend != "trtllm":
        return {}
    budget = 16_384
    waits = (row.isl, row.osl) == (1024, 1024) and row.tp < 8
    return {
        "server.max_batch_tokens": budget, "server.batch_wait_iterations": 20 if waits else 0,
        "server.batch_wait_tokens": int(0.9 * budget) if waits else 0,
    }  # fmt: skip


def job_of(row: Row, base: Config) -> Job:
    """UserError, with the column, for a row that cannot be predicted."""
    return make_job("full_depth", {"policy": "full_depth"}, with_settings(base, settings_of(row)), 0)


def jobs_of(rows: Sequence[Row], base: Config) -> tuple[dict[str, Job], dict[str, str]]:
    """The job of each row by id, and the reason if there is none."""
    jobs, why_not = {}, {}
    for row in rows:
        try:
            jobs[row.id] = job_of(row, base)
        except UserError as error:
            why_not[row.id] = str(error)
    return jobs, why_not


def predictions(
    jobs: Mapping[str, Job], folder: Path, processes: int | None
) -> tuple[dict[str, Prediction], dict[str, str]]:
    """Predictions by row id, and reasons for rows without one. Predictions that `folder` holds are read, not run.

    `processes`: None for one a core, or none at all for a few rows.
    """
    tasks = [task_of((job,), {"arm": name, "seed": 0}, job) for name, job in jobs.items()]
    wanted = processes or ((os.cpu_count() or 1) if len(tasks) >= ROWS_WORTH_A_POOL else 1)
    if jobs:
        make_ready(next(iter(jobs.values())), sum(job.config.workload.n_requests or 0 for job in jobs.values()))
    with closing(Workers(Place("processes", wanted, setting="jobs"))) as workers:
        results = run_tasks(_try, tasks, Journal(folder, _Lines()), workers, lambda *_: None)
    by_id = {name: results[task.key] for name, task in zip(jobs, tasks, strict=True)}
    failed = {name: found for name, found in by_id.items() if isinstance(found, str)}
    return {name: found for name, found in by_id.items() if not isinstance(found, str)}, failed


class _Lines:
    """A prediction, or why there is none, in its line of the journal."""

    def save(self, folder: Path, key: str, result: Prediction | str) -> Mapping[str, Any]:
        return {"why_not": result} if isinstance(result, str) else {"prediction": asdict(result)}

    def load(self, folder: Path, key: str, line: Mapping[str, Any]) -> Prediction | str | None:
        return str(line["why_not"]) if "why_not" in line else Prediction(**line["prediction"])


def _try(job: Job) -> Prediction | str:
    """A row with a model that does not fit its cards is not predicted. The reader is told, and the run goes on."""
    try:
        return predict(job)
    except UserError as error:
        return str(error)


def predict(job: Job) -> Prediction:
    """The engine's part of a row: without what lies between a client and it."""
    metrics = run_job(job).replicate.metrics
    ttft_s, tpot_s, preemptions = (metrics[name] for name in ("ttft_s_mean", "tpot_s_mean", "preemptions"))
    if not isinstance(ttft_s, float) or not isinstance(preemptions, int | float):
        raise UserError("memory", job.config.device, "room for the requests: none was served", "leave the row out")
    return Prediction(ttft_s * 1e3, float(tpot_s or 0.0) * 1e3 if isinstance(tpot_s, float) else 0.0, int(preemptions))


def with_front(row: Row, found: Prediction) -> Prediction:
    """Add the time between a client and the engine's loop to a prediction."""
    base_s, each_s = FRONT_S.get(preset_for(row).split("-")[0], (0.0, 0.0))
    return Prediction(found.ttft_ms + 1e3 * (base_s + each_s * row.concurrency), found.tpot_ms, found.preemptions)


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The half that host times were fitted to, and the other one."""
    return [row for row in rows if row.is_fitted], [row for row in rows if not row.is_fitted]
