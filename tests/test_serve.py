"""`python -m helios_sim.serve mode=simulate`: what clients of OpenAI's API send, and what they get."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
import httpx

from helios_sim.logs import read_folder
from served import Served, contents, serving

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "Hello"}]
SETTINGS = (
    "+experiment=own", "policy.model=opt-1.3b",
    "server.max_running_requests=4", "server.max_batch_tokens=512", "serve.max_queue=12", "serve.max_model_len=600",
    "serve.streams_per_client=14", "serve.max_body_bytes=20000",
)  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with serving(folder, *SETTINGS, f"serve.records={folder / 'records.jsonl'}") as one:
        yield one


def test_a_stream_is_one_chunk_with_text_for_each_token(served: Served) -> None:
    chunks = served.chunks(CHAT, {
        "messages": HI, "max_completion_tokens": 9, "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    })  # fmt: skip
    *tokens, last = chunks
    assert len(tokens) == 9
    assert all(contents(tokens))
    assert tokens[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in tokens[1:])
    assert [chunk["choices"][0]["finish_reason"] for chunk in tokens] == [None] * 8 + ["length"]
    assert [chunk["usage"]["completion_tokens"] for chunk in tokens] == list(range(1, 10))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 9
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 9


def test_a_whole_answer_has_the_text_of_the_stream(served: Served) -> None:
    body = {"prompt": "Once", "max_tokens": 6, "ignore_eos": True}
    answer = served.post(TEXT, body, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    whole = answer.json()
    assert whole["usage"]["completion_tokens"] == 6
    assert whole["choices"][0]["finish_reason"] == "length"
    streamed = served.chunks(TEXT, body)
    assert len(contents(streamed)) == 6
    assert all("usage" not in chunk for chunk in streamed)


def test_prompts_may_be_texts_ids_or_lists_of_them(served: Served) -> None:
    ids = served.post("/tokenize", {"prompt": "The river ran high"}).json()
    assert ids["count"] == len(ids["tokens"]) == 4
    assert served.post("/detokenize", {"tokens": ids["tokens"]}).json() == {"prompt": "The river ran high"}
    for prompt, prompts, tokens in (
        ("The river", 1, 2), (ids["tokens"], 1, 4), (["The river", "ran"], 2, 3), ([ids["tokens"]] * 2, 2, 8),
    ):  # fmt: skip
        answer = served.post(TEXT, {"prompt": prompt, "max_tokens": 2, "ignore_eos": True}).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(prompts)), prompt
        assert answer["usage"] == {
            "prompt_tokens": tokens, "completion_tokens": 2 * prompts, "total_tokens": tokens + 2 * prompts,
        }  # fmt: skip
    of_opt = served.post(TEXT, {"prompt": [2, 50000, 50271], "max_tokens": 2})  # the tokenizer is not here
    assert of_opt.json()["usage"]["prompt_tokens"] == 3
    assert served.post(TEXT, {"prompt": [50272]}).json()["error"]["param"] == "prompt"
    both = served.chunks(TEXT, {"prompt": ["a", "b"], "max_tokens": 3, "ignore_eos": True})
    assert sorted(chunk["choices"][0]["index"] for chunk in both) == [0, 0, 0, 1, 1, 1]


def test_content_may_come_in_parts(served: Served) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    asked = {"max_tokens": 1}
    whole = served.post(CHAT, {"messages": HI, **asked}).json()["usage"]
    assert served.post(CHAT, {"messages": [{"role": "user", "content": parts}], **asked}).json()["usage"] == whole


def test_a_stop_ends_the_text_before_it(served: Served) -> None:
    body = {"prompt": "x", "max_tokens": 80, "ignore_eos": True}
    text = served.post(TEXT, body).json()["choices"][0]["text"]
    middle = text[len(text) // 2 :].split()[1] + " "
    for stream in (False, True):
        asked = {**body, "stop": [middle, "never said"]}
        if stream:
            chunks = served.chunks(TEXT, asked)
            found, reason = "".join(contents(chunks)), chunks[-1]["choices"][0]["finish_reason"]
        else:
            choice = served.post(TEXT, asked).json()["choices"][0]
            found, reason = choice["text"], choice["finish_reason"]
        assert reason == "stop"
        assert middle not in found
        assert found
    before = served.state()["books"]["cancelled"]
    assert served.settled()["books"]["cancelled"] == before  # they are complete, though some of a text was left


def test_models_are_the_candidates_and_whatever_is_loaded(served: Served) -> None:
    assert [model["id"] for model in served.get("/v1/models").json()["data"]] == ["helios", "opt-1.3b"]
    assert served.get("/v1/models/opt-1.3b").json()["id"] == "opt-1.3b"
    assert served.get("/v1/models/gpt-4").json()["error"]["code"] == "model_not_found"
    for name in ("helios", "opt-1.3b", None):
        answer = served.post(TEXT, {"model": name, "prompt": "x", "max_tokens": 1})
        assert answer.json()["model"] == "opt-1.3b"


REFUSED: list[tuple[str, dict[str, Any], int, str | None]] = [
    (TEXT, {"prompt": "x", "n": 2}, 400, "n"),
    (TEXT, {"prompt": "x", "echo": True}, 400, "echo"),
    (TEXT, {"prompt": "x", "frequency_penalty": 0.5}, 400, "frequency_penalty"),
    (TEXT, {"prompt": "x", "made_up": 1}, 400, "made_up"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": True}, 400, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 5, "min_tokens": 6}, 400, "min_tokens"),
    (TEXT, {"prompt": "x", "temperature": 3}, 400, "temperature"),
    (TEXT, {"prompt": "x", "top_p": 0}, 400, "top_p"),
    (TEXT, {"prompt": "x", "stop": [""]}, 400, "stop"),
    (TEXT, {"prompt": "x", "logprobs": 1}, 400, "logprobs"),  # a simulation computes none
    (TEXT, {"prompt": "x", "logprobs": 5}, 400, "logprobs"),
    (TEXT, {"prompt": "x", "priority": 1}, 400, "priority"),
    (TEXT, {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    (TEXT, {"prompt": ""}, 400, "prompt"),
    (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {"prompt": [1, "x"]}, 400, "prompt"),
    (TEXT, {"prompt": [10**9]}, 400, "prompt"),
    (TEXT, {"prompt": "word " * 700}, 400, "prompt"),
    (TEXT, {"prompt": "x", "max_tokens": 700}, 400, "prompt"),
    (TEXT, {"prompt": "x", "model": "gpt-4"}, 404, "model"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, 400, "response_format"),
    (CHAT, {"messages": HI, "prompt": "x"}, 400, "prompt"),
    (TEXT, {"prompt": "x", "stop": 0}, 400, "stop"),
    (TEXT, {"prompt": "x", "stop": ["\ud800"]}, 400, "stop"),
    (CHAT, {"messages": [{**HI[0], "name": 5}]}, 400, "messages[0].name"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}]}, 400,
     "messages[0].content.cache_control"),
    (CHAT, {"messages": HI, "reasoning_effort": "low"}, 400, "reasoning_effort"),
]  # fmt: skip
REFUSED_AS_TOKENS: list[tuple[str, dict[str, Any], int, str]] = [
    ("/tokenize", {"prompt": "\ud800"}, 400, "prompt"),
    ("/tokenize", {"prompt": "x", "model": "\ud800"}, 404, "model"),
    ("/tokenize", {"prompt": "x", "messages": HI}, 400, "prompt"),
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": "x", "made_up": 1}, 400, "made_up"),
    ("/tokenize", {"prompt": "x", "return_token_strs": True}, 400, "return_token_strs"),
    ("/tokenize", {"prompt": "x", "add_special_tokens": "no"}, 400, "add_special_tokens"),
    ("/tokenize", {"messages": HI, "add_generation_prompt": False}, 400, "add_generation_prompt"),
    ("/detokenize", {"tokens": "x"}, 400, "tokens"),
    ("/detokenize", {"tokens": [10**9]}, 400, "tokens"),
    ("/detokenize", {"tokens": [1], "skip_special_tokens": False}, 400, "skip_special_tokens"),
]


@pytest.mark.slow
def test_what_is_not_supported_is_refused_by_name(served: Served) -> None:
    before = served.state()["books"]
    for path, body, status, param in REFUSED:
        answer = served.post(path, body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), (body, error)
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
    for content, status in ((b"", 400), (b"{", 400), (b"[1]", 400), (b'{"prompt": NaN}', 400), (b"[" * 9999, 400),
                            (b"x" * 30000, 413), (b'{"prompt": "a", "prompt": "b"}', 400),
                            (b'{"prompt": "\\ud800"}', 400)):  # fmt: skip
        answer = served.post(TEXT, None, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status, content[:20]
        assert answer.json()["error"]["message"]
    books = served.state()["books"]
    assert books["refused"] - before["refused"] == len(REFUSED) + 8
    assert books["received"] - before["received"] == len(REFUSED) + 8


def test_what_is_not_tokenized_is_refused_by_name(served: Served) -> None:
    for path, body, status, param in REFUSED_AS_TOKENS:
        answer = served.post(path, body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), (body, answer.text)


def test_a_client_that_writes_its_whole_body_first_reads_why_it_is_refused(served: Served) -> None:
    """To close the connection while it writes would take the answer from it; what it writes is thrown away."""
    client = HTTPConnection(served.address.removeprefix("http://"), timeout=30)
    good, close = b'{"prompt": "x", "max_tokens": 1}', {"connection": "close"}
    for body, more, status in (
        (b"x" * 3_000_000, {}, 413), (good, {}, 200), (b"x" * 3_000_000, close, 413), (b"x" * 3_000_000, close, 413),
        (b"x" * 3_000_000, close | {"origin": "http://evil.example"}, 403), (good, close, 200),
    ):  # fmt: skip
        client.request("POST", TEXT, body, {"content-type": "application/json", **more})
        answer = client.getresponse()
        assert (answer.status, bool(answer.read())) == (status, True)
    client.close()


def test_values_that_change_nothing_are_taken(served: Served) -> None:
    neutral = {
        "n": 1, "presence_penalty": 0.0, "logit_bias": None, "top_k": -1, "user": "me", "response_format":
        {"type": "text"}, "reasoning_effort": "none", "prompt_cache_retention": "24h", "repetition_penalty": 1.0,
        "seed": 4, "stop": None, "logprobs": False, "tools": None,
    }  # fmt: skip
    assert served.post(CHAT, {"messages": HI, "max_tokens": 1, **neutral}).status_code == 200


def test_a_client_that_leaves_frees_its_memory(served: Served) -> None:
    before = served.state()["books"]["cancelled"]
    host, port = served.address.removeprefix("http://").split(":")
    body = b'{"prompt": "x", "max_tokens": 500, "ignore_eos": true, "stream": true}'
    head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    for leaves_early in (False, True):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head.replace("host: x", f"host: {host}").encode() + body[: 20 if leaves_early else None])
            if not leaves_early:
                assert b"200" in client.recv(1000)
                _until(lambda: served.state()["replicas"][0]["used_blocks"] > 0)
    _until(lambda: served.state()["books"]["cancelled"] == before + 2)
    served.settled()


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_first_token_does_not_wait_for_the_network(served: Served) -> None:
    """Nagle's algorithm would hold it back until the client has acknowledged the head: 40 ms on a kept connection."""
    body = {"prompt": "x", "max_tokens": 3, "ignore_eos": True, "stream": True}
    waits = []
    with httpx.Client(timeout=60) as client:
        for _ in range(10):
            with client.stream("POST", served.address + TEXT, json=body) as answer:
                began = time.perf_counter()
                lines = answer.iter_lines()
                next(lines)
                waits.append(time.perf_counter() - began)
                assert list(lines)
            time.sleep(0.02)
    assert sum(wait > 0.035 for wait in waits) < 3, waits


def test_limits_say_when_to_come_again(served: Served) -> None:
    many = served.post(TEXT, {"prompt": ["x"] * 15, "max_tokens": 1})  # of one client
    assert (many.status_code, many.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(many.headers["retry-after"]) >= 1


@pytest.mark.slow
def test_other_pages_and_other_hosts_are_not_answered(served: Served) -> None:
    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
        assert served.get("/helios/state", headers=headers).status_code == 403
        assert served.post(TEXT, {"prompt": "x"}, headers=headers).status_code == 403
    assert served.post(TEXT, None, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert served.get("/nowhere").json()["error"]["code"] == "not_found"
    wrong_method = served.get(TEXT)
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
    assert wrong_method.json()["error"]["code"] == "method_not_allowed"
    as_gzip = {"content-type": "application/json", "content-encoding": "gzip"}
    packed = served.post(TEXT, None, content=b"x", headers=as_gzip)
    assert (packed.status_code, "gzip" in packed.text) == (415, True)
    for path, param in (("/sleep?level=x", "level"), ("/sleep?mode=abort", "mode"), ("/wake_up?tags=weights", "tags")):
        assert served.post(path, None).json()["error"]["param"] == param
    assert "access-control-allow-origin" not in served.get("/v1/models").headers


def test_metrics_have_the_names_of_vllm_and_count(served: Served) -> None:
    label = '{engine="0",model_name="opt-1.3b"}'
    before = served.metrics()
    served.post(TEXT, {"prompt": "The river ran high", "max_tokens": 5, "ignore_eos": True})
    served.settled()
    now = served.metrics()

    def more(name: str, labels: str = label) -> float:
        return now[name + labels] - before.get(name + labels, 0.0)

    assert more("vllm:prompt_tokens_total") == 4
    assert more("vllm:generation_tokens_total") == 5
    assert more("vllm:request_success_total", '{engine="0",finished_reason="length",model_name="opt-1.3b"}') == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
                 "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
                 "request_generation_tokens"):  # fmt: skip
        assert more(f"vllm:{name}_count") == 1, name
    assert more("vllm:inter_token_latency_seconds_count") == 4
    assert more("vllm:iteration_tokens_total_sum") == 4 + 5
    assert more("helios:exit_layer_count", '{engine="0",model_name="opt-1.3b"}') == 5
    assert now[f"vllm:num_requests_running{label}"] == now[f"vllm:kv_cache_usage_perc{label}"] == 0
    assert now[f"helios:loaded_layers{label}"] == 24
    assert now["helios:energy_joules_total"] > 0
    for name in ("vllm:num_requests_waiting", "vllm:num_preemptions_total", "vllm:prefix_cache_queries_total",
                 "vllm:prefix_cache_hits_total"):  # fmt: skip
        assert now[name + label] == 0


def test_its_pages_of_metrics_are_a_log_of_its_requests(served: Served, tmp_path: Path) -> None:
    """Two scrapes, and between them three requests: as many are drawn, as long together as they were."""
    names = (tmp_path / "metrics_1796029855.prom", tmp_path / "metrics_1796029865.prom")
    body = {"prompt": [3, 4, 5, 6, 7], "max_tokens": 9, "ignore_eos": True}
    assert served.post(TEXT, body).status_code == 200  # a name has no sample before its first request
    for name, requests in zip(names, (0, 3), strict=True):
        assert all(served.post(TEXT, body).status_code == 200 for _ in range(requests))
        served.settled()
        name.write_text(served.get("/metrics").text)
    log = read_folder(tmp_path)
    assert log.prompt_tokens.tolist() == [5, 5, 5]
    assert log.output_tokens.sum() == 27
    assert all(5 < length <= 10 for length in log.output_tokens)  # its bucket
    assert {"TTFT", "TPOT", "E2E"} <= set(log.percentiles)


def test_records_have_times_of_each_answer_and_no_text(served: Served) -> None:
    body = {"prompt": "a secret of mine", "max_tokens": 4, "ignore_eos": True}
    served.post(TEXT, body, headers={"x-request-id": "this one"})
    served.settled()
    records = served.said.with_name("records.jsonl")
    _until(lambda: "this one" in records.read_text())
    assert "secret" not in records.read_text()
    (record,) = [one for one in map(json.loads, records.read_text().splitlines()) if one["request"] == "this one"]
    assert (record["output_tokens"], len(record["gaps_s"]), record["reason"]) == (4, 3, "length")
    assert record["e2e_s"] == pytest.approx(record["ttft_s"] + sum(record["gaps_s"]))
    engine = record["engine"]
    assert (engine["first_token_ns"] - engine["arrival_ns"]) / 1e9 <= record["ttft_s"]


def test_the_dashboard_asks_for_metrics_that_are_there(served: Served) -> None:
    served.post(TEXT, {"prompt": "x", "max_tokens": 3, "ignore_eos": True})
    served.settled()
    declared = {line.split()[2] for line in served.get("/metrics").text.splitlines() if line.startswith("# TYPE")}
    dashboard = json.loads(Path(__file__).parents[1].joinpath("helios_sim/serve/grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for text in asked for name in re.findall(r"\w+:\w+", text)}
    assert len(names) > 15
    assert names <= declared


def test_it_sleeps_and_wakes(served: Served) -> None:
    assert served.post("/sleep?level=1", None).status_code == 200
    assert served.get("/is_sleeping").json() == {"is_sleeping": True}
    assert served.post(TEXT, {"prompt": "x"}).json()["error"]["code"] == "asleep"
    assert served.state()["replicas"][0]["resident"] == {}
    assert served.get("/health").status_code == 200
    assert served.post("/wake_up", None).status_code == 200
    assert served.get("/is_sleeping").json() == {"is_sleeping": False}
    assert served.post(TEXT, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_the_page_stands_by_itself(served: Served) -> None:
    page = served.get("/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http://www.w3.org/2000/svg", "")


def test_no_prompt_is_in_the_log(served: Served) -> None:
    served.post(TEXT, {"prompt": "a secret of mine", "n": 3})
    served.post(TEXT, {"prompt": "a secret of mine", "max_tokens": 2})
    assert "secret" not in served.said.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_what_vllm_s_own_benchmark_sends_and_reads(served: Served, chat: bool) -> None:
    """As vllm/benchmarks/lib/endpoint_request_func.py has it; vLLM is too large to be installed for a test."""
    body: dict[str, Any] = {
        "model": "opt-1.3b", "repetition_penalty": 1.0, "logprobs": None, "temperature": 0.0, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if chat:
        content = [{"type": "text", "text": "The river ran high"}]
        body |= {"messages": [{"role": "user", "content": content}], "max_completion_tokens": 7}
    else:
        body |= {"prompt": "The river ran high", "max_tokens": 7}
    texts, output_tokens = [], 0
    for data in served.chunks(CHAT if chat else TEXT, body):
        if choices := data.get("choices"):
            texts.append(choices[0]["delta"].get("content") if chat else choices[0].get("text"))
        elif usage := data.get("usage"):
            output_tokens = usage.get("completion_tokens")
    # it takes each chunk for a token: the first one's time is TTFT, the gaps of the others are ITL
    assert len(texts) == output_tokens == 7
    assert all(texts)


@pytest.mark.slow
def test_openai_s_own_client(served: Served) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0)
    whole = client.chat.completions.create(model="helios", messages=HI, max_tokens=3, extra_body={"ignore_eos": True})
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 3
    stream = client.completions.create(
        model="opt-1.3b", prompt="x", max_tokens=4, stream=True, stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    chunks = list(stream)
    assert [bool(chunk.choices) for chunk in chunks] == [True] * 4 + [False]
    assert chunks[-1].usage.completion_tokens == 4
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="helios", prompt="x", n=2)
    assert refused.value.param == "n"
    assert len(client.models.list().data) == 2


