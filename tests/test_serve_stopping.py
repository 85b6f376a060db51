"""How a server begins and ends: mistakes in its settings, keys, signals, and what becomes of open requests."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
import httpx

from helios_sim.errors import UserError
from helios_sim.serve.__main__ import main
from helios_sim.serve.front.limits import keys_of
from helios_sim.serve.settings import ServeConfig
from served import Served, serving

OWN = ("+experiment=own", "policy.model=opt-1.3b")
KEY = "k" * 20


def _long(served: Served, tokens: int, headers: dict[str, str]) -> list[str]:
    """Lines of a stream, read in a thread."""
    lines: list[str] = []
    body = {"prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}

    def read() -> None:
        with httpx.stream("POST", f"{served.address}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            lines.extend(line for line in answer.iter_lines() if line)

    threading.Thread(target=read).start()
    return lines


def _wait_for(lines: list[str], count: int) -> None:
    deadline = time.monotonic() + 20
    while len(lines) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_answers_what_is_open_and_a_second_one_aborts(tmp_path: Path) -> None:
    """One server for keys and for both: a key is needed for everything that tells something."""
    key = {"authorization": f"Bearer {KEY}"}
    with serving(tmp_path, *OWN, "serve.host=0.0.0.0", env={"HELIOS_API_KEY": KEY}) as served:
        served.address = served.address.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
            for path in ("/metrics", "/helios/state", "/v1/models", "/helios/events"):
                assert served.get(path, headers=headers).status_code == 401, path
            refused = served.post("/v1/completions", {"prompt": "x"}, headers=headers)
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert served.get("/v1/models", headers=key).status_code == 200
        assert served.get("/").status_code == 200
        short, long = _long(served, 60, key), _long(served, 1900, key)
        _wait_for(long, 3)
        _wait_for(short, 3)
        served.process.send_signal(signal.SIGTERM)
        _wait_for(short, 61)
        assert short[-1] == "data: [DONE]"
        assert not any('"error"' in line for line in short)
        refused = served.post("/v1/completions", {"prompt": "x"}, headers=key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert served.get("/health").status_code == 503
        served.process.send_signal(signal.SIGTERM)
        _wait_for(long, len(long))
        assert served.process.wait(20) == 0
        deadline = time.monotonic() + 5
        while long[-1] != "data: [DONE]" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads(long[-2].removeprefix("data: "))["error"]["code"] == "server_stopped"
        assert "2 requests came in, 2 left" in served.said.read_text()
        assert KEY not in served.said.read_text()


@pytest.mark.slow
def test_limits_of_time_and_of_answers_are_kept(tmp_path: Path) -> None:
    """A simulated token takes some 0.1 s."""
    limits = ("serve.body_timeout_s=0.5", "serve.request_timeout_s=1.5", "serve.drain_s=0.2", "serve.max_tokens=90")
    with serving(tmp_path, *OWN, *limits, "serve.speedup=0.05") as served:
        refused = served.post("/v1/completions", {"prompt": "x", "max_tokens": 91})
        assert "max_tokens is 91, and this server allows 90" in refused.json()["error"]["message"]
        late = served.post("/v1/completions", {"prompt": "x", "max_tokens": 90, "ignore_eos": True})
        assert (late.status_code, late.json()["error"]["message"]) == (504, "No answer within 1.5 s")
        host, port = served.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                         b"Content-Length: 9\r\n\r\n")  # fmt: skip
            assert b"408" in half.recv(4096)
        lines = _long(served, 90, {})
        _wait_for(lines, 1)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "server_stopped"


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("serve.host=0.0.0.0",), "serve.api_key_file"),
    (("serve.port=99999",), "serve.port"),
    (("serve.prot=1",), "serve.port"),
    (("mode=live", "serve.speedup=2", "exits.source=none"), "serve.speedup"),
    (("server.enable_prefix_caching=true",), "server.enable_prefix_caching"),
    (("serve.arm=none_such",), "serve.arm"),
    (("+serve.tokenizers={other: here}",), "serve.tokenizers.other"),
    (("+serve.tokenizers={opt-1.3b: here}",), "serve.tokenizers"),
    (("trace=true",), "trace"),
    (("next_best=all",), "next_best"),
    (("log=here.jsonl",), "log"),
    (("title=Mine",), "title"),
    (("serve.temperature=0.5",), "serve.temperature"),
    (("seeds=[0,1]",), "seeds"),
    (("serve.name=opt-1.3b",), "serve.name"),
    (("--cfg", "all"), "--cfg"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=lambda value: value if isinstance(value, str) else None)
def test_a_mistake_is_one_message(words: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve.port=0", *OWN, *words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
    assert "Fix: " in line


def test_keys_that_no_header_can_carry_are_refused(tmp_path: Path) -> None:
    """They would lock everyone out. A byte order mark before the first is no part of it."""
    file = tmp_path / "keys.txt"
    file.write_bytes(b"\xef\xbb\xbf" + KEY.encode() + b"\r\n\r\n")
    assert keys_of(ServeConfig(api_key_file=str(file))) == (KEY.encode(),)
    for key in ("cl\u00e9-" * 5, "two words and more", "k" * 8 + "\t" + "k" * 8):
        file.write_text(f"{KEY}\n{key}\n", encoding="utf-8")
        with pytest.raises(UserError, match="ASCII") as refused:
            keys_of(ServeConfig(api_key_file=str(file)))
        assert key not in str(refused.value)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is needed")
def test_a_full_disk_ends_the_records_and_nothing_else(tmp_path: Path) -> None:
    with serving(tmp_path, *OWN, "serve.records=/dev/full") as served:
        for _ in range(2):
            assert served.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200
    assert served.said.read_text().count("serve.records: no further lines") == 1


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from helios_sim.serve.__main__ import main; main(['--help']); "
        "print([m for m in ('fastapi', 'numpy', 'hydra', 'torch', 'uvicorn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "/v1/chat/completions" in done.stdout
