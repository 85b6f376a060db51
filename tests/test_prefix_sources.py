"""Where equal beginnings of prompts come from: a trace's hash_ids, system prompts of tasks, and sessions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from helios_sim import UserError, simulate
from helios_sim.report.metrics import OF_PREFIXES
from helios_sim.workload import AllAtOnce, DrawnLengths, Fixed, TaskMix, TraceLengths, Workload, generate, read_trace
from helios_sim.workload.prefixes import Sessions

OWN = {"exits.source": "none", "models": ["opt-1.3b"], "workload.n_requests": 30, "jobs": 1}


def requests(**more):
    mix = more.pop("mix", TaskMix.single("text"))
    lengths = more.pop("lengths", DrawnLengths(Fixed(10), Fixed(5)))
    (block,) = generate(Workload(AllAtOnce(), lengths, mix, more.pop("n", 8), 1.0, **more), 0)
    return block


def test_each_turn_of_a_session_begins_with_all_that_was_said() -> None:
    block = requests(sessions=Sessions(2, Fixed(3)))
    assert block.stream.tolist() == [0, 1, 0, 1, 0, 1, 2, 3]
    assert block.prompt_chars.tolist() == [10, 10, 25, 25, 40, 40, 10, 10]
    assert requests().stream.tolist() == [-1] * 8


def test_a_session_ends_before_it_is_too_long() -> None:
    block = requests(sessions=Sessions(1, Fixed(100), 31))
    assert block.prompt_chars.tolist() == [10, 25, 10, 25, 10, 25, 10, 25]


def test_the_size_of_a_block_changes_no_session() -> None:
    workload = Workload(AllAtOnce(), DrawnLengths(Fixed(10), Fixed(5)), TaskMix.single("text"), 50, 1.0,
                        sessions=Sessions(3, Fixed(4)))  # fmt: skip
    whole, parts = (np.concatenate([b.prompt_chars for b in generate(workload, 1, n)]) for n in (50, 7))
    assert whole.tolist() == parts.tolist()


def test_a_system_prompt_stands_before_every_prompt_of_its_task() -> None:
    mix = TaskMix(("a", "b"), (0.5, 0.5))
    block = requests(mix=mix, system_prompts=(0, 100), n=40)
    assert (block.prompt_chars == np.where(block.task == 1, 110, 10)).all()
    assert (block.shared == block.task).all()
    workload = Workload(AllAtOnce(), DrawnLengths(Fixed(10), Fixed(5)), mix, 4, 4.0, system_prompts=(0, 100))
    assert workload.prefixes is not None
    assert workload.prefixes.starts.tolist() == [0, 0, 1]
    assert workload.prefixes.end_chars.tolist() == [400]


def trace_of(folder: Path, rows: list[dict]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


ROWS = [
    {"timestamp": 2000, "input_length": 1100, "output_length": 4, "hash_ids": [900, 7, 8]},
    {"timestamp": 0, "input_length": 1024, "output_length": 4, "hash_ids": [900, 7]},
]


def test_ids_of_a_trace_follow_its_rows_when_they_are_sorted(tmp_path: Path) -> None:
    trace = read_trace(trace_of(tmp_path, ROWS), texts=True)
    assert trace.texts is not None
    assert trace.texts.starts.tolist() == [0, 2, 5]
    assert trace.texts.ids.tolist() == [2, 0, 2, 0, 1]
    assert trace.notices[0].endswith("sorted by arrival")
    workload = Workload(AllAtOnce(), TraceLengths(trace), TaskMix.single("text"), None, 1.0)
    assert workload.prefixes.end_chars.tolist() == [512, 1024, 512, 1024, 1100]
    (block,) = generate(workload, 0)
    assert block.shared.tolist() == [0, 1]
    assert read_trace(trace_of(tmp_path, ROWS)).texts is None


def test_ids_may_be_hashes_of_64_bits(tmp_path: Path) -> None:
    hashed = [{**ROWS[0], "hash_ids": [2**64 - 1, 7, 8]}, {**ROWS[1], "hash_ids": [2**64 - 1, 7]}]
    trace = read_trace(trace_of(tmp_path, hashed), texts=True)
    assert trace.texts is not None
    assert trace.texts.ids.tolist() == [2, 0, 2, 0, 1]
    with pytest.raises(UserError, match=r"line 1, column hash_ids.*below 2\^64"):
        read_trace(trace_of(tmp_path, [{**ROWS[0], "hash_ids": [2**64]}]), texts=True)


@pytest.mark.parametrize("ids", ["x", 3, [1, None], ["a"]])
def test_ids_that_are_none_are_refused(tmp_path: Path, ids) -> None:
    with pytest.raises(UserError):
        read_trace(trace_of(tmp_path, [{**ROWS[0], "hash_ids": ids}]), texts=True)


@pytest.mark.parametrize("ids", [None, "missing", [900, None], "x", [1.5], 7])
def test_the_line_is_named_whose_hash_ids_are_none(ids: object, tmp_path: Path) -> None:
    bad = {key: value for key, value in ROWS[0].items() if key != "hash_ids" or ids != "missing"}
    bad |= {} if ids == "missing" else {"hash_ids": ids}
    with pytest.raises(UserError, match="line 2, column hash_ids"):
        read_trace(trace_of(tmp_path, [ROWS[1], bad]), texts=True)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [(16, "about 4% of a usual prompt"), (1024, "request 1 of .* has 2 hash_ids for 1024 tokens"), (512, None)],
)
def test_ids_are_as_many_as_prompts_have_parts(tmp_path: Path, tokens: int, said: str | None) -> None:
    trace = read_trace(trace_of(tmp_path, ROWS), texts=True)
    workload = Workload(AllAtOnce(), TraceLengths(trace), TaskMix.single("text"), None, 1.0, id_tokens=tokens)
    if said is None:
        assert workload.prefixes is not None
        return
    with pytest.raises(UserError, match=said) as caught:
        _ = workload.prefixes
    assert caught.value.key == "workload.lengths.id_tokens"


def run(**settings):
    return simulate("own", "policy=full_depth", settings={**OWN, **settings})


@pytest.mark.slow
def test_the_report_says_what_was_found_and_nothing_where_it_is_off() -> None:
    shared = {"workload.system_prompts": {"gsm8k": 200}}
    on, off = (run(**{"server.enable_prefix_caching": on, **shared}).arms["full_depth"].metrics for on in (True, False))
    assert on["prefix_cache_queries"] >= on["prefix_cache_hits"] > 0
    assert on["prefix_cache_hit_rate"] == on["prefix_cache_hits"] / on["prefix_cache_queries"]
    assert on["prefill_tokens_saved"] >= on["prefix_cache_hits"]
    assert [off[name] for name in OF_PREFIXES] == [None] * 4
    assert on["ttft_s_mean"] <= off["ttft_s_mean"]


@pytest.mark.slow
def test_sessions_hit_and_a_workload_without_common_beginnings_is_noted() -> None:
    sessions = {"workload.sessions.users": 3, "workload.sessions.turns.value": 3, "workload.sessions.max_tokens": 2000}
    on = {"server.enable_prefix_caching": True}
    assert run(**on, **sessions).arms["full_depth"].metrics["prefix_cache_hits"] > 0
    alone = run(**on)
    assert alone.arms["full_depth"].metrics["prefix_cache_hits"] == 0
    assert any("no two prompts begin alike" in warning for warning in alone.warnings)


@pytest.mark.slow
def test_mistakes_get_one_message() -> None:
    with pytest.raises(UserError, match="tasks of the mix"):
        run(**{"workload.system_prompts": {"nothing": 5}})
    with pytest.raises(UserError, match=r"turns"):
        run(**{"workload.sessions.users": 3})


@pytest.mark.slow
def test_all_turns_of_a_session_go_to_one_replica_and_find_more_there() -> None:
    """Three users on two replicas in turn: round robin sends every second turn elsewhere."""
    sessions = {
        "workload.sessions.users": 3, "workload.sessions.turns.value": 5, "workload.sessions.max_tokens": 2000,
        "workload.n_requests": 60, "server.replicas": 2, "server.enable_prefix_caching": True,
    }  # fmt: skip
    hits = {}
    for router in ("session", "round_robin"):
        arm = run(**sessions, **{"server.router": router}).arms["full_depth"]
        hits[router] = arm.metrics["prefix_cache_hits"]
    assert hits["session"] > hits["round_robin"]
    with pytest.raises(UserError, match="sessions"):
        run(**{"server.replicas": 2, "server.router": "session"})
