"""Answers are kept as long as somebody may ask for them: the memory of a long run does not grow with its requests."""

from __future__ import annotations

import pytest

from helios_sim.exits.rule import FullDepth
from helios_sim.live.answers import Answer, Answers
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Deployment, KvRule, Placement
from live_rig import LAYERS, live_model, request, requests, serve_live
from tiny_models import write_tiny

N, SLOTS, KEPT = 60, 4, 5
LENGTHS = [(3 + i % 7, 1 + i % 4) for i in range(N)]
FULL = Deployment(Placement("tiny", LAYERS), FullDepth(), kv_rule=KvRule.NONE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LiveModel]:
    return {"tiny": live_model(write_tiny("llama", tmp_path_factory.mktemp("tiny")))}


def answer_of(request_id: int, tokens: int, planned: int = 2) -> Answer:
    return Answer(request(request_id), "tiny", [1], planned, tokens=[5] * tokens)


def test_a_long_run_keeps_few_answers(tiny: dict[str, LiveModel]) -> None:
    known: list[int] = []

    def act(env, engine, server) -> None:
        execute = engine.execute

        def counted(plan, now_ns):
            outcome = execute(plan, now_ns)
            known.append(len(engine.answers))
            return outcome

        engine.execute = counted

    live = serve_live(tiny, FULL, requests(LENGTHS), N, slots=SLOTS, kept_answers=KEPT, act=act)
    assert [r.status.value for r in live.records] == ["completed"] * N
    assert max(known) == SLOTS + KEPT  # everybody who runs, and the latest who have left
    latest = sorted(live.records, key=lambda r: r.last_token_ns or 0)[-1]
    assert latest.request_id in live.engine.answers
    assert len(live.engine.answers) == KEPT
    assert len(live.engine.work.slots) == 0  # whoever leaves gives its place up at once


def test_who_was_cancelled_is_not_asked_for_again(tiny: dict[str, LiveModel]) -> None:
    seen: list[bool] = []

    def act(env, engine, server) -> None:
        execute = engine.execute

        def cancelling(plan, now_ns):
            if not seen:
                seen.append(True)
                for gone in (2, 7):  # one that runs, and one that waits
                    env.call(lambda gone=gone: server.cancel(gone))
            return execute(plan, now_ns)

        engine.execute = cancelling

    live = serve_live(tiny, FULL, requests(LENGTHS), N, slots=SLOTS, kept_answers=N, act=act)
    done = {r.request_id for r in live.records if r.status.value == "completed"}
    assert set(live.engine.answers) == done
    assert done == set(range(N)) - {2, 7}


def test_the_latest_complete_answers_stay() -> None:
    answers = Answers(kept=2)
    for number, tokens in enumerate((2, 1, 2, 2)):
        answers[number] = answer_of(number, tokens)
    for number in (0, 1, 2):
        answers.note_left(number)
    assert set(answers) == {0, 2, 3}  # 1 was never finished, 3 is still here
    answers.note_left(3)
    assert set(answers) == {2, 3}


def test_all_stay_where_they_are_read_again_afterwards() -> None:
    answers = Answers(kept=None)
    for number, tokens in enumerate((2, 1)):
        answers[number] = answer_of(number, tokens)
        answers.note_left(number)
    assert set(answers) == {0, 1}
