"""The field's own clients against a server: each finishes without a failed request, and its times are the server's.

Heavy, each in an environment of its own (`make clients`; HELIOS_CLIENTS names another folder): pytest -m exhaustive.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("fastapi")

from helios_sim.live.checkpoint.known import KNOWN
from helios_sim.shared_data import cache_folder
from served import serving

ROOT = Path(__file__).parents[1]
CLIENTS = Path(os.environ.get("HELIOS_CLIENTS", ROOT / ".venv-clients"))
NAMES = ("guidellm", "aiperf", "inference-perf", "genai-bench", "openai")
TOKENIZER = cache_folder() / "tokenizers" / KNOWN["smollm2-135m"].sha256


def experiment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clients", ROOT / "experiments" / "serve" / "clients.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["simulate", "live"])
def test_a_client_finishes_and_agrees_with_the_server(name: str, mode: str, tmp_path: Path) -> None:
    if name != "openai" and not (CLIENTS / name).is_dir():
        pytest.skip(f"{name} is not installed: make clients")
    if not (TOKENIZER / "tokenizer.json").is_file():
        pytest.skip("SmolLM2 is not here: make models")
    if mode == "live":
        pytest.importorskip("torch")
    clients: Any = experiment()
    tokenizer = clients.for_clients(TOKENIZER, tmp_path / "tokenizer")
    own = tmp_path / name
    own.mkdir()
    records = tmp_path / "records.jsonl"
    words = ("model=smollm2", f"mode={mode}", "serve.max_model_len=512", f"serve.records={records}")
    with serving(tmp_path, *words, *(["live.threads=1"] if mode == "live" else [])) as served:
        failed, times = clients.CLIENTS[name](CLIENTS, served.address, tokenizer, own)
        served.settled()
        ours = [one for one in clients.records_of(tmp_path, 0) if one["output_tokens"] == clients.TOKENS]
    found = clients.compared(failed, times, ours[-len(times) :])
    assert found["failed"] == 0
    assert found["requests"] >= clients.REQUESTS  # genai-bench sends some more, as it stops
    gap_ms = abs(found["itl_ms"] - found["server_itl_ms"])
    assert gap_ms <= clients.NEAR_MS + clients.NEAR * found["server_itl_ms"], found
    # A client that waits for a processor sees the first token later than it was sent.
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    assert found["near"] or (busy and found["ttft_ms"] > found["server_ttft_ms"]), found
