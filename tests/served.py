"""A server as users start it, `python -m helios_sim.serve`, in a process of its own on a port of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

START_S = 90.0


@dataclass
class Served:
    process: subprocess.Popen[str]
    address: str
    said: Path

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        if body is not None:  # in ASCII, which says what is no text, too
            headers = {"content-type": "application/json", **more.pop("headers", {})}
            more |= {"content": json.dumps(body), "headers": headers}
        return httpx.post(self.address + path, timeout=60, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.address + path, timeout=60, **more)

    def chunks(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, without [DONE], which must be the last."""
        with httpx.stream("POST", self.address + path, json={**body, "stream": True}, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line for line in answer.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/helios/state").json()
        return found

    def settled(self) -> dict[str, Any]:
        """The state once nothing is open and all KV blocks are free again."""
        for _ in range(100):
            state = self.state()
            if not state["queue"]["in_engine"] and not state["books"]["open"] and not _used(state):
                return state
            time.sleep(0.05)
        raise AssertionError(f"it does not settle: {state}")

    def metrics(self) -> dict[str, float]:
        """By name and labels, as the page of /metrics has them."""
        lines = self.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def _used(state: dict[str, Any]) -> int:
    return sum(replica["used_blocks"] for replica in state["replicas"])


@contextmanager
def serving(folder: Path, *words: str, env: dict[str, str] | None = None, status: int | None = 0) -> Iterator[Served]:
    """A server with these settings, stopped at the end. `status`: with which it must stop; None: any."""
    said = folder / "said.txt"
    command = [sys.executable, "-m", "helios_sim.serve", "serve.port=0", *words]
    with said.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, text=True, env={**os.environ, **(env or {})})
    try:
        served = Served(process, _address(process, said), said)
        _await_health(served)
        yield served
        if process.poll() is None:
            found = served.stop()
            assert status is None or found == status, said.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[str], said: Path) -> str:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"^(http://\S+): ", said.read_text(), re.MULTILINE):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"no server: {said.read_text()}")


def _await_health(served: Served) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and served.process.poll() is None:
        try:
            if served.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"never healthy: {served.said.read_text()}")


def contents(chunks: Sequence[dict[str, Any]]) -> list[str]:
    """The texts of chunks that have a choice, of chats or of completions."""
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return [c["text"] if "text" in c else c["delta"].get("content", "") for c in choices]
