"""`mode=live` behind the same endpoints: real tokens of tiny random models, sampled, and a policy that changes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")

from browser import CHROMIUM, browser
from live_study import write_live_study
from served import Served, contents, serving

TEXT = "/v1/completions"
ARMS = (
    "arms:\n  helios: {policy: helios, prompts_per_candidate: 2, evaluated_tokens: 4, round_requests: 4, "
    "window_tokens: 12, limit: 3}\n"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("live")
    write_live_study(folder, ARMS)
    words = ("--config-dir", str(folder / "conf"), "+experiment=tiny_live", "mode=live", "models=[tiny,other]")
    with serving(folder, *words, "serve.max_model_len=96", "live.threads=1") as one:
        yield one


def test_real_tokens_make_the_same_text_in_every_way(served: Served) -> None:
    body = {"prompt": "The river ran", "max_tokens": 12, "ignore_eos": True, "return_depths": True}
    whole = served.post(TEXT, body).json()
    chunks = served.chunks(TEXT, {**body, "stream_options": {"include_usage": True}})
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 12
    assert len(whole["choices"][0]["helios"]) == 12
    assert all(1 <= token["layers"] <= 6 for token in whole["choices"][0]["helios"])
    text = "".join(contents(chunks))
    assert text
    assert sum(len(chunk["choices"][0]["helios"]) for chunk in chunks[:-1]) == 12
    # A character may be spread over tokens: then its chunk has several, and no chunk is empty.
    assert all(contents(chunks[:-1])[:-1])


def test_sampling_is_the_seed_s_and_logprobs_are_those_of_the_tokens(served: Served) -> None:
    def answer(**more: Any) -> dict[str, Any]:
        body = {"prompt": "What did you say?", "max_tokens": 8, "ignore_eos": True, "logprobs": 1, **more}
        found: dict[str, Any] = served.post(TEXT, body).json()["choices"][0]
        return found

    greedy = answer()
    for chosen, best in zip(greedy["logprobs"]["token_logprobs"], greedy["logprobs"]["top_logprobs"], strict=True):
        assert chosen == max(best.values()) <= 0
    drawn = [answer(temperature=1.5, seed=seed)["logprobs"] for seed in (1, 1, 2)]
    # the model that is loaded may change between two requests, but the first token's draw is the seed's
    assert all(math.isfinite(value) for one in drawn for value in one["token_logprobs"])
    assert drawn[0]["tokens"] != drawn[2]["tokens"]
    narrow = answer(temperature=1.5, top_p=1e-6)["logprobs"]
    assert narrow["token_logprobs"] == [max(best.values()) for best in narrow["top_logprobs"]]


def test_a_helios_policy_switches_under_a_running_client(served: Served) -> None:
    """Requests go on while models are loaded and changed; each is answered by the model that it names."""
    seen = set()
    for number in range(60):
        prompt = ["The river", "def area(", "What did"][number % 3]
        answer = served.post(TEXT, {"model": "helios", "prompt": prompt, "max_tokens": 6, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 6
        seen.add(answer.json()["model"])
        if len(seen) == 2 and number > 8:
            break
    assert seen == {"tiny", "other"}
    switches = {name: value for name, value in served.metrics().items() if name.startswith("helios:switches_total")}
    assert sum(switches.values()) >= 1
    decisions = served.settled()["decisions"]
    assert len(decisions) >= 3
    assert all(decision["reason"] for decision in decisions)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_shows_depths_and_decisions_as_they_fall(served: Served, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.open(f"{served.address}/")
        page.wait("document.getElementById('link').textContent === 'live'")
        page.wait("document.querySelectorAll('#decisions tr').length >= 1")
        before = page.ask("document.querySelectorAll('#decisions tr').length")
        for number in range(80):
            body = {"prompt": ["The river", "def area("][number % 2], "max_tokens": 6, "ignore_eos": True}
            assert served.post(TEXT, body).status_code == 200
            if page.ask("document.querySelectorAll('#decisions tr').length") > before:
                break
        assert page.ask("document.querySelectorAll('#decisions tr').length") > before
        rows = "[...document.querySelectorAll('#decisions tr')].map((row) => row.textContent)"
        assert page.ask(f"new Set({rows}).size === {rows}.length")
        page.ask("document.getElementById('tokens').value = 12; document.getElementById('send').click()")
        assert "layers a token" in page.wait("document.getElementById('told').textContent")
        spans = "[...document.querySelectorAll('#answer span')]"
        assert page.ask(f"{spans}.length") > 0
        assert page.ask(f"{spans}.every((span) => span.style.background && span.title.startsWith('left at layer'))")
        assert "answered" in page.ask("document.getElementById('books').textContent")
        for width in (400, 1300):
            page.open(f"{served.address}/", width, dark=width == 400)
            page.wait("document.getElementById('link').textContent === 'live'")
            assert page.ask("document.documentElement.scrollWidth") <= width
        assert len(page.printed()) > 1000
        assert page.errors == []


def test_a_candidate_that_is_not_loaded_is_said_to_be(served: Served) -> None:
    loaded = served.settled()["replicas"][0]["model"]
    other = {"tiny": "other", "other": "tiny"}[loaded]
    assert served.post(TEXT, {"model": loaded, "prompt": "x", "max_tokens": 2}).status_code in (200, 503)
    answer = served.post(TEXT, {"model": other, "prompt": "x", "max_tokens": 2})
    assert answer.status_code in (200, 503)  # the policy may have changed its mind just now
    if answer.status_code == 503:
        assert answer.json()["error"]["code"] == "model_not_loaded"


def test_weights_are_freed_and_read_again(served: Served) -> None:
    body = {"prompt": "The bridge keeper", "max_tokens": 4, "ignore_eos": True}
    assert served.post("/sleep", None).status_code == 200
    assert served.get("/is_sleeping").json()["is_sleeping"]
    assert served.post("/wake_up", None).status_code == 200
    assert served.post(TEXT, body).status_code == 200
    assert served.settled()["books"]["failed"] == 0
