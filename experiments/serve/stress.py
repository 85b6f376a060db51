"""A thousand streams at once, and ten thousand requests that mean no good: python experiments/serve/stress.py

Against the simulated engine, in processes of its own. Afterwards the server must have lost no request, its books must
balance with what clients saw, and connections, KV blocks and memory must be back to where they were.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from helios_sim.entry import script

HERE = Path(__file__).parent
KEY = "stress-" + "k" * 20
MODEL = "meta-llama/Llama-3.3-70B-Instruct"
WORDS = (
    "+experiment=own", f"models=[{MODEL}]", "hardware=4xh100", "exits.source=none", f"policy.model={MODEL}",
    "server.max_running_requests=256", "serve.max_queue=2048", "serve.streams_per_client=4096", "serve.port=0",
    "serve.max_model_len=4096", "serve.max_body_bytes=200000", "serve.body_timeout_s=5",
)  # fmt: skip
GOOD = {"prompt": "The river ran high in March, and", "ignore_eos": True, "stream": True}


class Server:
    def __init__(self, *words: str) -> None:
        self.said = HERE / "said.tmp"
        command = [sys.executable, "-m", "helios_sim.serve", *WORDS, *words]
        with self.said.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "HELIOS_API_KEY": KEY})
        while not (found := re.search(r"http://127.0.0.1:(\d+)", self.said.read_text())):
            assert self.process.poll() is None, self.said.read_text()
            time.sleep(0.1)
        self.port = int(found[1])
        self.front = next(pid for pid in _children(self.process.pid) if "resource_tracker" not in _command(pid))

    def memory_mib(self) -> dict[str, float]:
        return {"engine": _rss_mib(self.process.pid), "front": _rss_mib(self.front)}

    def connections(self) -> int:
        """Sockets of the front, the listening one included."""
        links = []
        for link in Path(f"/proc/{self.front}/fd").iterdir():
            with suppress(OSError):
                links.append(os.readlink(link))
        return sum(link.startswith("socket:") for link in links)

    def stop(self) -> str:
        self.process.terminate()
        self.process.wait(120)
        said = self.said.read_text()
        self.said.unlink()
        return said.strip().splitlines()[-1]


def _children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def _rss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def request(body: bytes, *, key: str = KEY, path: str = "/v1/completions", length: int | None = None) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body) if length is None else length}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


async def talk(
    port: int, message: bytes, leave_after: int | None = None, half_close: bool = False
) -> tuple[int, bytes]:
    """The status and the answer; status 0: none came. `leave_after`: closes after so many bytes of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(message)
        await writer.drain()
        if half_close:
            writer.write_eof()
        found = b""
        while leave_after is None or len(found) < leave_after:
            more = await asyncio.wait_for(reader.read(1 << 16), 300)
            if not more:
                break
            found += more
        status = int(found.split(b" ", 2)[1]) if found.startswith(b"HTTP/1.1 ") else 0
        return status, found
    except (ConnectionError, BrokenPipeError):
        return 0, b""
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def state(port: int) -> dict[str, Any]:
    head = ("GET /helios/state HTTP/1.1", "host: 127.0.0.1", f"authorization: Bearer {KEY}", "connection: close")
    _, answer = await talk(port, "".join(f"{line}\r\n" for line in (*head, "")).encode())
    found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return found


async def settled(port: int) -> dict[str, Any]:
    """The state when nothing is open any more."""
    while True:
        found = await state(port)
        if not found["books"]["open"] and not found["queue"]["in_engine"]:
            return found
        await asyncio.sleep(0.2)


async def until_healthy(port: int) -> None:
    while (await talk(port, b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"))[0] != 200:
        await asyncio.sleep(0.1)


# --- A thousand streams ----------------------------------------------------------------------------------------------


async def many(server: Server, streams: int, tokens: int, leaving: float, rng: random.Random) -> dict[str, Any]:
    """All at once. `leaving`: the share of clients that close somewhere in their answer."""
    began = time.monotonic()
    body = json.dumps({**GOOD, "max_tokens": tokens}).encode()
    leave = [rng.randrange(200, 150 * tokens) if rng.random() < leaving else None for _ in range(streams)]
    open_most = 0

    async def look() -> None:
        nonlocal open_most
        while True:
            open_most = max(open_most, (await state(server.port))["books"]["open"])
            await asyncio.sleep(0.3)

    looking = asyncio.create_task(look())
    answers = await asyncio.gather(*(talk(server.port, request(body), after) for after in leave))
    looking.cancel()
    whole = [answer for (_, answer), after in zip(answers, leave, strict=True) if after is None]
    good = sum(answer.count(b"\ndata: {") == tokens and b"data: [DONE]" in answer for answer in whole)
    chunks = [len(re.findall(rb"data: \{", answer)) for answer in whole]
    return {
        "streams": streams, "tokens": tokens, "left_on_purpose": sum(after is not None for after in leave),
        "whole": len(whole), "complete": sum(count == tokens for count in chunks), "done": sum(
            b"data: [DONE]" in answer for answer in whole
        ), "lines": good, "open_most": open_most, "seconds": time.monotonic() - began,
    }  # fmt: skip


# --- Ten thousand that mean no good -----------------------------------------------------------------------------------


def hostile(rng: random.Random) -> tuple[str, bytes, dict[str, Any], set[int]]:
    """A kind, its bytes, how the client behaves, and the statuses that are right."""
    good = json.dumps({**GOOD, "max_tokens": rng.randint(1, 12), "stream": rng.random() < 0.5}).encode()
    long = json.dumps({**GOOD, "max_tokens": 300}).encode()
    kind = rng.choice(KINDS)
    if kind == "well-behaved":
        return kind, request(good), {}, {200}
    if kind == "leaves in the middle":
        return kind, request(long), {"leave_after": rng.randint(1, 3000)}, {200}
    if kind == "leaves at once":
        return kind, request(long), {"leave_after": 0}, {0}
    if kind == "half-closed":
        return kind, request(long), {"half_close": True}, {0, 200}
    if kind == "half a body":
        return kind, request(good[: len(good) // 2], length=len(good)), {"half_close": True}, {0}
    if kind == "malformed":
        wrong = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            wrong[rng.randrange(len(wrong))] = rng.randrange(256)
        return kind, request(bytes(wrong)), {}, {200, 400, 404}
    if kind == "no JSON":
        return kind, request(rng.randbytes(rng.randint(0, 200))), {}, {400}
    if kind == "deep JSON":
        return kind, request(b'{"prompt":' + b"[" * 50_000), {}, {400}
    if kind == "oversized prompt":
        return kind, request(json.dumps({"prompt": "word " * 9000}).encode()), {}, {400}
    if kind == "oversized body":
        return kind, request(b"x" * 250_000), {}, {413}
    if kind == "wrong key":
        return kind, request(good, key="wrong"), {}, {401}
    if kind == "unknown model":
        return kind, request(json.dumps({"prompt": "x", "model": "gpt-4"}).encode()), {}, {404}
    if kind == "unsupported":
        return kind, request(json.dumps({"prompt": "x", "n": 7}).encode()), {}, {400}
    return kind, rng.randbytes(rng.randint(1, 300)) + b"\r\n\r\n", {}, {0, 400}


KINDS = (
    "well-behaved", "leaves in the middle", "leaves at once", "half-closed", "half a body", "malformed", "no JSON",
    "deep JSON", "oversized prompt", "oversized body", "wrong key", "unknown model", "unsupported", "no HTTP",
)  # fmt: skip


async def attack(server: Server, requests: int, at_once: int, seed: int) -> dict[str, Any]:
    rng, counts, wrong = random.Random(seed), Counter[str](), []
    work = iter([hostile(rng) for _ in range(requests)])
    sent = 0

    async def client() -> None:
        nonlocal sent
        for kind, message, how, right in work:
            status, answer = await talk(server.port, message, **how)
            counts[f"{kind}: {status}"] += 1
            sent += kind != "no HTTP"
            if status not in right and len(wrong) < 20:
                wrong.append([kind, status, answer[:300].decode(errors="replace")])
            if status >= 400 and kind != "no HTTP" and b'"error"' not in answer:
                wrong.append([kind, status, "no error body"])

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return {"requests": requests, "with_a_head": sent, "seconds": time.monotonic() - began, "wrong": wrong,
            "by_kind": dict(sorted(counts.items()))}  # fmt: skip


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(arguments.seed)
    server = Server(f"serve.speedup={arguments.speedup}")
    try:
        return await against(server, arguments, rng)
    finally:
        server.process.kill()


async def against(server: Server, arguments: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    await until_healthy(server.port)
    await many(server, 50, 4, 0.0, rng)  # warm
    found: dict[str, Any] = {"seed": arguments.seed, "speedup": arguments.speedup, "rounds": []}
    first = await settled(server.port)
    await asyncio.sleep(1.0)
    found["before"] = {"memory_mib": server.memory_mib(), "connections": server.connections()}
    for leaving in (0.0, 0.5, 0.5):
        one = await many(server, arguments.streams, arguments.tokens, leaving, rng)
        after = await settled(server.port)
        one["used_blocks"] = sum(replica["used_blocks"] for replica in after["replicas"])
        await asyncio.sleep(1.0)
        one["memory_mib"], one["connections"] = server.memory_mib(), server.connections()
        found["rounds"].append(one)
        print(one, file=sys.stderr)
    before = (await settled(server.port))["books"]
    found["attack"] = await attack(server, arguments.hostile, 64, arguments.seed)
    after = await settled(server.port)
    await asyncio.sleep(1.0)
    books = {name: after["books"][name] - before[name] for name in before}
    found["attack"] |= {
        "books": books, "used_blocks": sum(replica["used_blocks"] for replica in after["replicas"]),
        "memory_mib": server.memory_mib(), "connections": server.connections(),
        "balances": books["received"] == sum(books[n] for n in ("answered", "refused", "cancelled", "failed")),
    }  # fmt: skip
    found["total_books"] = {name: after["books"][name] - first["books"][name] for name in before}
    found["said"] = server.stop()
    return found


def table(found: dict[str, Any]) -> str:
    lines = [
        f"Seed {found['seed']}, the simulated clock {found['speedup']:g} times as fast as the wall clock.", "",
        "| | streams | left on purpose | complete of the others | most seen open | s | KV blocks after | "
        "connections | MiB engine / front |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| before | | | | | | | {found['before']['connections']} | {_mib(found['before'])} |",
    ]  # fmt: skip
    for number, one in enumerate(found["rounds"], 1):
        lines.append(
            f"| round {number} | {one['streams']} | {one['left_on_purpose']} | {one['complete']} of {one['whole']} | "
            f"{one['open_most']} | {one['seconds']:.0f} | {one['used_blocks']} | {one['connections']} | {_mib(one)} |"
        )
    hit = found["attack"]
    lines.append(f"| {hit['requests']} hostile | | | | | {hit['seconds']:.0f} | {hit['used_blocks']} | "
                 f"{hit['connections']} | {_mib(hit)} |")  # fmt: skip
    books = hit["books"]
    lines += [
        "", "Books of the hostile requests: " + ", ".join(f"{n} {name}" for name, n in books.items())
        + f"; {hit['with_a_head']} were HTTP at all. "
        + ("They balance." if hit["balances"] else "THEY DO NOT BALANCE."),
        f"Answers that were not what they should be: {len(hit['wrong'])}.",
        f"The server when it was stopped: `{found['said']}`", "",
        "| kind: status (0: the client got none) | requests |", "| --- | --- |",
        *(f"| {kind} | {n} |" for kind, n in hit["by_kind"].items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _mib(one: dict[str, Any]) -> str:
    return " / ".join(f"{one['memory_mib'][name]:.0f}" for name in ("engine", "front"))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--hostile", type=int, default=10_000)
    parser.add_argument("--speedup", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep the result beside this script")
    arguments = parser.parse_args(words)
    found = asyncio.run(run(arguments))
    if arguments.write:
        (HERE / "stress.json").write_text(json.dumps(found, indent=1) + "\n")
        (HERE / "stress.md").write_text(table(found))
    print(table(found))
    lost = [one for one in found["rounds"] if one["complete"] < one["whole"] or one["used_blocks"]]
    return 1 if lost or found["attack"]["wrong"] or not found["attack"]["balances"] else 0


if __name__ == "__main__":
    socket.setdefaulttimeout(300)
    script(__file__, main)
