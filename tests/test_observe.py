"""`python -m helios_sim.observe` against a server of the tests: what it sends, times, counts and writes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from command_line import Said
from helios_sim.logs import read_tool
from helios_sim.logs.tools import opened
from helios_sim.observe.__main__ import main
from helios_sim.observe.client import Answer, Client
from helios_sim.observe.run import Observed
from sse_server import MODEL, endpoint

FEW = ("workload.n_requests=12", "workload.arrivals.rate_per_s=60", "workload.lengths.output.maximum=8")


@dataclass
class Observer:
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *words: str) -> Said:
        status = main(list(words))
        captured = self.capsys.readouterr()
        return Said(status, captured.out, captured.err)


@pytest.fixture
def observe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Observer:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return Observer(capsys)


def lines(path: str = "log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_an_open_loop_writes_a_log_that_is_read_again(observe: Observer) -> None:
    with endpoint(ttft_s=0.03, gap_s=0.004) as server:
        said = observe(f"url={server.url}/v1", *FEW)
    assert said.status == 0, said.err
    header, *requests = lines()
    assert header["model"] == MODEL
    assert header["loop"] == "open"
    assert len(requests) == 12 == said.summary["answered"]
    drift = [line["arrival_s"] - line["planned_s"] for line in requests]
    assert min(drift) >= 0
    assert said.summary["send_drift_s"]["max"] == pytest.approx(max(drift))
    assert said.summary["send_drift_s"]["p50"] < 0.02
    for line in requests:
        assert line["output_tokens"] == line["asked_tokens"] == len(line["token_times_s"])
        assert line["ttft_s"] >= 0.03
        assert line["e2e_s"] == line["token_times_s"][-1]
        assert line["finish_reason"] == "length"
    by_index = sorted(requests, key=lambda line: line["index"])
    sent = sorted(server.bodies, key=lambda body: len(body["prompt"]))
    assert sorted(line["prompt_tokens"] for line in by_index) == [len(body["prompt"]) for body in sent]
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in server.bodies)
    log = read_tool(opened(Path("log.jsonl")))
    assert log is not None
    assert log.format == "helios-sim observe"
    assert not log.missing
    assert not log.notices
    assert log.task is not None
    tpot = log.tpot_s()
    assert tpot is not None
    assert 0.004 <= np.nanmedian(tpot) < 0.02
    text = " ".join(said.out.split())
    assert "sent late by" in text
    assert "+experiment=from_log log=log.jsonl" in text
    assert max(len(line) for line in said.out.splitlines()[:8]) <= 80


def test_a_closed_loop_keeps_so_many_in_flight(observe: Observer) -> None:
    with endpoint(ttft_s=0.01) as server:
        said = observe(
            f"url={server.url}", "workload.n_requests=10", "workload.arrivals.kind=closed_loop",
            "workload.arrivals.users=3", "workload.lengths.output.maximum=5", "api=chat", "out=chat.jsonl",
        )  # fmt: skip
    assert said.status == 0, said.err
    assert server.most_running == 3
    header, *requests = lines("chat.jsonl")
    assert header["users"] == 3
    assert len(requests) == 10
    assert all("planned_s" not in line for line in requests)
    assert said.summary["send_drift_s"] is None
    assert all(body["messages"][0]["role"] == "user" for body in server.bodies)
    log = read_tool(opened(Path("chat.jsonl")))
    assert log is not None
    assert log.stated["in_flight_at_most"] == 3


def test_no_error_is_lost(observe: Observer) -> None:
    broken = {1: "refuse", 3: "cut", 5: "silent", 7: "slow"}
    with endpoint(broken=broken) as server:
        said = observe(
            f"url={server.url}", "workload.n_requests=10", "workload.arrivals.rate_per_s=50",
            "workload.lengths.output.minimum=4", "workload.lengths.output.maximum=6", "observe.timeout_s=1",
        )  # fmt: skip
    assert said.status == 2
    assert said.summary["answered"] == 6
    assert said.summary["failed"] == {
        "HTTP 429: too many requests": 1, "the connection ended in the middle of an answer": 1, "no token came": 1,
        "no answer within 1 s": 1,
    }  # fmt: skip
    assert all("ttft_s" not in line for line in lines()[1:] if line["status"] != "ok")
    log = read_tool(opened(Path("log.jsonl")))
    assert log is not None
    assert log.failed == 4
    for reason in said.summary["failed"]:
        assert reason in said.out


CHUNK = 'data: {"choices": [{"text": "a"}]}'
ODD_BODIES = {
    "<html>busy</html>": "no stream of events: <html>busy</html>",
    '{"error": {"message": "no"}}': 'no stream of events: {"error"',
    "": "the stream ended before it was done",
    "data: hello\n\ndata: [DONE]\n\n": "an event that is no JSON: hello",
    'data: {"choices": {"a": 1}}\n\n': "an event of another form",
    'data: {"choices": [], "usage": [1]}\n\n': "an event of another form",
    f'{CHUNK}\n\ndata: {{"usage": {{"prompt_tokens": "7"}}}}\n\ndata: [DONE]\n\n': "usage.prompt_tokens is no",
    f'{CHUNK}\n\ndata: {{"usage": {{"completion_tokens": -2}}}}\n\ndata: [DONE]\n\n': "usage.completion_tokens is no",
    f"{CHUNK}\n\ndata: [DONE]\n": None,  # without the line that ends an event
    f": ping\r\n\r\nevent: x\r\n{CHUNK}\r\n\r\ndata:[DONE]\r\n\r\n": None,
}


def test_odd_answers_are_told_as_what_they_are() -> None:
    async def ask_all() -> list[Answer]:
        bodies = iter(ODD_BODIES)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + next(bodies).encode())
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            address = urlsplit(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            client = Client(address, None, 5.0)
            return [await client.ask("/v1/completions", {}) for _ in ODD_BODIES]

    for (body, told), answer in zip(ODD_BODIES.items(), asyncio.run(ask_all()), strict=True):
        assert (answer.error or "").startswith(told or ""), body
        assert (answer.error is None) == (told is None), body
        assert isinstance(answer.output_tokens, int | None)


def test_failures_that_differ_in_numbers_alone_are_counted_together() -> None:
    lines = [{"status": f"HTTP 400: knows the token ids 0 to 99, and not {n}"} for n in (100, 101)] + [{"status": "ok"}]
    assert Observed(3, lines).failures() == {"HTTP 400: knows the token ids 0 to 99, and not 100": 2}


@pytest.mark.slow
def test_what_has_ended_is_kept_when_it_is_stopped(observe: Observer) -> None:
    def stop() -> None:
        """Once some have ended, however slow this machine is."""
        while len(server.bodies) < 10 or Path("log.jsonl").read_text().count("\n") < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with endpoint() as server:
        threading.Thread(target=stop, daemon=True).start()
        said = observe(f"url={server.url}", "workload.n_requests=200", "workload.arrivals.rate_per_s=40",
                       "workload.lengths.output.maximum=4")  # fmt: skip
    assert said.status == 2
    assert said.summary["stopped"]
    assert 0 < said.summary["sent"] < 200
    assert len(lines()) == 1 + said.summary["sent"]
    assert "of 200 requests have ended and are in the log" in said.out


def test_a_server_that_tells_no_usage_is_counted_by_chunks(observe: Observer) -> None:
    with endpoint(usage=False, merged=True) as server:
        said = observe(f"url={server.url}", "workload.n_requests=4", "workload.arrivals.rate_per_s=50",
                       "workload.lengths.output.minimum=4", "workload.lengths.output.maximum=4")  # fmt: skip
    assert said.status == 0
    assert [line["output_tokens"] for line in lines()[1:]] == [2] * 4
    assert "The server told no usage" in said.out


def test_answers_that_end_before_they_should_are_counted(observe: Observer) -> None:
    with endpoint(longest=3) as server:
        said = observe(f"url={server.url}", "workload.n_requests=4", "workload.arrivals.rate_per_s=50",
                       "workload.lengths.output.minimum=4", "workload.lengths.output.maximum=4")  # fmt: skip
    assert "4 answers are shorter than was asked: the load was lighter than the workload says" in said.out


@pytest.mark.slow
def test_a_log_is_driven_again(observe: Observer, tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,20,3\n0.05,30,4\n0.1,10,2\n")
    told = ("kind=trace", "trace=trace.csv")
    words = [f"workload.{part}.{name}" for part in ("arrivals", "lengths") for name in told]
    with endpoint() as server:
        said = observe(f"url={server.url}", *words, "workload.n_requests=null", "observe.ignore_eos=false",
                       "observe.lowest_id=7", "observe.highest_id=8")  # fmt: skip
    assert said.status == 0, said.err
    assert [len(body["prompt"]) for body in server.bodies] == [20, 30, 10]
    assert [body["max_tokens"] for body in server.bodies] == [3, 4, 2]
    assert "ignore_eos" not in server.bodies[0]
    assert {token for body in server.bodies for token in body["prompt"]} == {7, 8}


def test_a_key_goes_with_every_request(observe: Observer, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\nother\n")
    with endpoint() as server:
        assert observe(f"url={server.url}", *FEW, "observe.api_key_file=key", "workload.n_requests=2").status == 0
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}
    assert "secret" not in Path("log.jsonl").read_text()
    with endpoint(key="secret") as server:
        said = observe(f"url={server.url}", *FEW, "observe.out=other.jsonl")
    assert "Unauthorized" in said.err
    assert "give its key: the variable OPENAI_API_KEY, or observe.api_key_file" in said.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "url=None"),
        (("url=ftp://host",), "url='ftp://host'"),
        (("url=http://127.0.0.1:1",), "a server that lists its models"),
        (("url=SERVER", "model=gpt-9"), "one that the server lists: tiny"),
        (("url=SERVER", "out=there.jsonl"), "logs are not overwritten"),
        (("url=SERVER", "out=no/such/folder.jsonl"), "a file that can be written"),
        (("url=SERVER", "hardware=h100-80gb"), "hardware='h100-80gb': does nothing here"),
        (("url=SERVER", "workload.sessions.users=2", "workload.sessions.turns.value=2"), "workload.sessions.users"),
        (("url=SERVER", "api=chat", "observe.prompts=ids"), "observe.prompts"),
        (("url=SERVER", "api=chat", "observe.lowest_id=5"), "observe.lowest_id='5': does nothing here"),
        (("url=SERVER", "observe.prompts=words", "observe.highest_id=5000"), "only with token ids as prompts"),
        (("url=SERVER", "observe.timeout_s=0"), "observe.timeout_s"),
        (("url=SERVER", "observe.timeouts=1"), "no such setting"),
        (("url=SERVER", "seeds=[0,1]"), "one seed"),
    ],
)  # fmt: skip
def test_mistakes_are_named(observe: Observer, tmp_path: Path, words: tuple[str, ...], named: str) -> None:
    (tmp_path / "there.jsonl").write_text("")
    with endpoint() as server:
        said = observe(*(word.replace("SERVER", server.url) for word in words))
        assert not server.bodies
    assert said.status == 1
    assert named in said.err
    assert not (tmp_path / "log.jsonl").exists()


def test_help(observe: Observer) -> None:
    said = observe("--help")
    assert said.status == 0
    assert "python -m helios_sim.observe url=ADDRESS" in said.out
