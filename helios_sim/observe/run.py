"""One observation: sends requests at their times (open loop) or by N users (closed loop), and logs each of them.

Open loop: each request is sent at its time in the workload, however many are in flight; its drift is how late it was
sent. Closed loop: each of N users sends its next request when its last one was answered or failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from helios_sim.errors import UserError
from helios_sim.logs import own
from helios_sim.logs.record import OK
from helios_sim.observe.client import Answer, AnswerError, Client
from helios_sim.observe.settings import KEY_VARIABLE, ObserveConfig, ObservedConfig
from helios_sim.report import format as fmt
from helios_sim.report.terminal import JSON_ASKED, TextTable, say
from helios_sim.request import NS_PER_S, token_counts
from helios_sim.study.workload import build_workload, task_names
from helios_sim.untrusted import read_text
from helios_sim.workload import Workload, generate

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
LATE_S = 0.01  # p99 of the drift from which the client counts as late
WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company",
    "system", "program", "question", "work", "government", "number", "night", "point", "home", "water", "room",
    "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word",
    "business", "issue", "side", "kind", "head", "house", "service", "friend",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """A request of the workload."""

    index: int
    at_s: float  # since the start of the run; not used in a closed loop
    prompt_tokens: int
    output_tokens: int
    task: str


@dataclass(slots=True)
class Observed:
    """The results of one run. Times are in s."""

    planned: int
    lines: list[dict[str, Any]] = field(default_factory=list)  # lines of the log
    stopped: bool = False
    counted: bool = True  # the server said how many output tokens there were

    def column(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if line.get(name) is not None and line["status"] == OK]

    @property
    def drift_s(self) -> list[float]:
        return [line["arrival_s"] - line["planned_s"] for line in self.lines if "planned_s" in line]

    def failures(self) -> dict[str, int]:
        """The number of failed requests by reason. Reasons that differ only in numbers count as one."""
        kinds: dict[str, tuple[str, int]] = {}
        for line in self.lines:
            if (reason := line["status"]) != OK:
                first, count = kinds.get(kind := re.sub(r"\d+", "0", reason), (reason, 0))
                kinds[kind] = first, count + 1
        return dict(kinds.values())

    def summary(self) -> dict[str, Any]:
        """Figures for programs."""
        failed = self.failures()
        tpot = [
            (line["e2e_s"] - line["ttft_s"]) / (line["output_tokens"] - 1)
            for line in self.lines
            if line["status"] == OK and line["output_tokens"] > 1
        ]
        times = {"ttft_s": self.column("ttft_s"), "tpot_s": tpot, "e2e_s": self.column("e2e_s")}
        return {
            "planned": self.planned, "sent": len(self.lines), "answered": len(self.lines) - sum(failed.values()),
            "failed": failed, "stopped": self.stopped,
            **{name: _percentiles(values) for name, values in times.items()},
            "send_drift_s": _percentiles(self.drift_s),
        }  # fmt: skip


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
    return {"p50": p50, "p90": p90, "p99": p99, "max": float(max(values))}


def observe(config: ObservedConfig) -> int:
    """Run an observation. Returns 0 if all requests were answered, 2 if some failed or it was stopped.

    Raises UserError before anything is sent."""
    settings = config.observe
    address = settings.address()
    workload = _workload(config)
    planned = _planned(workload, config)
    client = Client(address, _key(settings), settings.timeout_s)
    model = asyncio.run(_model(client, settings))
    out = Path(settings.out).expanduser()
    with _new(out) as file:
        users = workload.users
        header = own.header(
            model=model, url=address._replace(netloc=address.netloc.rpartition("@")[2]).geturl(),
            loop="open" if users is None else "closed", users=users, api=settings.api, ignore_eos=settings.ignore_eos,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"), seed=config.seeds[0],
        )  # fmt: skip
        print(header, file=file, flush=True)
        say(f"{len(planned)} requests to {address.geturl()} ({model}), "
            f"{'at their times' if users is None else f'by {users} users'} ...", sys.stderr)  # fmt: skip
        seen = asyncio.run(_run(client, settings, model, planned, users, config.seeds[0], file))
    summary = seen.summary() | {"log": str(out), "model": model}
    _show(seen, summary, out, settings)
    return 0 if not summary["failed"] and not seen.stopped else 2


def _workload(config: ObservedConfig) -> Workload:
    """The workload with lengths in tokens. Raises UserError for sessions, since their prompts depend on answers."""
    if config.workload.sessions.users is not None:
        allowed = "null: the prompts of a session hold its answers, which a server writes as it likes"
        raise UserError("workload.sessions.users", config.workload.sessions.users, allowed, "leave it out")
    if not isinstance(config.seeds, list) or len(config.seeds) != 1:
        raise UserError("seeds", config.seeds, "one seed: of one run", "set seeds=[0]")
    return build_workload(config.workload, of_model=1.0)


def _planned(workload: Workload, config: ObservedConfig) -> list[Planned]:
    names, found = task_names(config.workload.mix), []
    for block in generate(workload, config.seeds[0]):
        per_token = workload.chars_per_token or 4.0
        prompts, outputs = (token_counts(chars, per_token) for chars in (block.prompt_chars, block.output_chars))
        for i in range(len(block)):
            found.append(Planned(int(block.request_id[i]), int(block.arrival_ns[i]) / NS_PER_S, int(prompts[i]),
                                 int(outputs[i]), names[int(block.task[i])]))  # fmt: skip
    return found


def _key(settings: ObserveConfig) -> str | None:
    if settings.api_key_file is None:
        return os.environ.get(KEY_VARIABLE) or None
    path = Path(settings.api_key_file).expanduser()
    lines = read_text(path, 1 << 16, "name a file whose first line is the key").decode().split()
    if not lines:
        raise UserError("observe.api_key_file", str(path), "a file whose first line is the key", "write the key there")
    return lines[0]


async def _model(client: Client, settings: ObserveConfig) -> str:
    """The model name in requests. Raises UserError if the server cannot be reached or does not know it."""
    try:
        listed = await client.get("/v1/models")
        names = [str(one["id"]) for one in listed["data"]]
    except (AnswerError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
        told = str(error) or type(error).__name__
        allowed, fix = f"a server that lists its models ({told})", "start it, or correct the address"
        if told.startswith(("HTTP 401", "HTTP 403")):
            fix = f"give its key: the variable {KEY_VARIABLE}, or observe.api_key_file"
        raise UserError("url", settings.url, allowed, fix) from error
    if settings.model is None:
        if not names:
            raise UserError("model", None, "a model: the server lists none", "set model=NAME")
        return names[0]
    if settings.model not in names:
        allowed = f"one that the server lists: {', '.join(names[:8])}"
        raise UserError("model", settings.model, allowed, "name one of these")
    return settings.model


@contextmanager
def _new(path: Path) -> Iterator[TextIO]:
    """Create a new file. Raises UserError if it exists already or cannot be written."""
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise UserError("out", str(path), "a file that is not there yet: logs are not overwritten",
                        "name another, or move it away") from error  # fmt: skip
    except OSError as error:
        raise UserError("out", str(path), f"a file that can be written ({error.strerror})", "name another") from error
    with file:
        yield file


async def _run(
    client: Client,
    settings: ObserveConfig,
    model: str,
    planned: list[Planned],
    users: int | None,
    seed: int,
    file: TextIO,
) -> Observed:
    seen = Observed(len(planned))
    began = time.perf_counter()
    bodies = _bodies(settings, model, planned, seed)

    async def ask(request: Planned, body: dict[str, Any]) -> None:
        answer = await client.ask(PATHS[settings.api], body)
        line = _line(request, answer, began, users is None, seen)
        seen.lines.append(line)
        print(own.line(line), file=file, flush=True)

    async def at_their_times() -> None:
        async with asyncio.TaskGroup() as group:
            for request, body in bodies:
                await asyncio.sleep(max(began + request.at_s - time.perf_counter(), 0.0))
                group.create_task(ask(request, body))

    async def user() -> None:
        for request, body in bodies:  # one iterator for all users: the next free one takes the next request
            await ask(request, body)

    async def all_users() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(users or 1, len(planned))):
                group.create_task(user())

    work = asyncio.ensure_future(at_their_times() if users is None else all_users())
    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError):
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        seen.stopped = True
    return seen


def _bodies(
    settings: ObserveConfig, model: str, planned: list[Planned], seed: int
) -> Iterator[tuple[Planned, dict[str, Any]]]:
    """Yield requests with their bodies. Prompts are random, so two begin alike only by chance."""
    rng, low, high = np.random.default_rng(seed), settings.lowest_id, settings.highest_id
    for request in planned:
        body: dict[str, Any] = {
            "model": model, "stream": True, "stream_options": {"include_usage": True},
            "max_tokens": request.output_tokens,
        }  # fmt: skip
        if settings.ignore_eos:
            body["ignore_eos"] = True
        if settings.kind_of_prompts == "ids":
            prompt: Any = rng.integers(low, high, request.prompt_tokens, endpoint=True).tolist()
        else:
            prompt = " ".join(WORDS[place] for place in rng.integers(0, len(WORDS), request.prompt_tokens))
        if settings.api == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        yield request, body


def _line(request: Planned, answer: Answer, began: float, is_open: bool, seen: Observed) -> dict[str, Any]:
    sent = time.perf_counter() if answer.sent_at is None else answer.sent_at
    line: dict[str, Any] = {"index": request.index, "arrival_s": sent - began, "task": request.task}
    if is_open:
        line["planned_s"] = request.at_s
    line |= {
        "prompt_tokens": answer.prompt_tokens or request.prompt_tokens, "asked_tokens": request.output_tokens,
        "output_tokens": answer.output_tokens or len(answer.token_at), "status": answer.error or OK,
        "finish_reason": answer.finish_reason, "cached_tokens": answer.cached_tokens,
    }  # fmt: skip
    seen.counted = seen.counted and (answer.output_tokens is not None or answer.error is not None)
    if answer.error is None:
        times = [at - sent for at in answer.token_at]
        line |= {"ttft_s": times[0], "e2e_s": times[-1], "token_times_s": times}
    return line


def _show(seen: Observed, summary: dict[str, Any], out: Path, settings: ObserveConfig) -> None:
    table = TextTable(f"{summary['answered']} of {summary['sent']} requests answered by {summary['model']}")
    table.column("time", number=False)
    for name in ("p50", "p90", "p99", "max"):
        table.column(name)
    labels = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E", "send_drift_s": "sent late by"}
    for key, label in labels.items():
        if summary[key] is not None:
            table.row([label, *(fmt.seconds(value) for value in summary[key].values())])
    table.show()
    for reason, count in summary["failed"].items():
        say(f"failed: {count} x {reason}")
    if any("token id" in reason for reason in summary["failed"]):
        say(f"Prompts are token ids from observe.lowest_id={settings.lowest_id} to observe.highest_id="
            f"{settings.highest_id}: lower them, or set observe.prompts=words.")  # fmt: skip
    if seen.stopped:
        say(f"stopped: {summary['sent']} of {summary['planned']} requests have ended and are in the log")
    short = sum(line["status"] == OK and line["output_tokens"] < line["asked_tokens"] for line in seen.lines)
    if short and seen.counted:
        say(f"{short} answers are shorter than was asked: the load was lighter than the workload says. The log has the "
            "lengths that came.")  # fmt: skip
    if not seen.counted:
        say("The server told no usage: output tokens are counted by chunks, prompt tokens are those that were sent.")
    drift = summary["send_drift_s"]
    if drift is not None and drift["p99"] > LATE_S:
        say(f"Requests went up to {fmt.seconds(drift['max'])} later than planned: this client was the bottleneck, or "
            "the network. The log has the times at which they went.")  # fmt: skip
    say(f"log: {out}")
    if summary["answered"]:
        say(f"next: python -m helios_sim +experiment=from_log log={out} model=NAME hardware=CARD")
    if JSON_ASKED.get() or not sys.stdout.isatty():
        print(json.dumps(summary))
