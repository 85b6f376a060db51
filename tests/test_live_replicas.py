"""Several replicas served live at once: kinds, routers and cascades, each engine in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from helios_sim.api import study_config  # noqa: E402
from helios_sim.errors import UserError  # noqa: E402
from helios_sim.live.clock import WallClock  # noqa: E402
from helios_sim.live.threads import ToServer  # noqa: E402
from helios_sim.report.records import RecordLog, Records  # noqa: E402
from helios_sim.serve.settings import ServeConfig, served_job  # noqa: E402
from helios_sim.serving.iteration import OutOfMemory, Plan  # noqa: E402
from helios_sim.simulation import Run  # noqa: E402
from helios_sim.study.fleet import build_fleet  # noqa: E402
from helios_sim.study.jobs import make_job, run_job, serve  # noqa: E402
from helios_sim.study.live import LiveRun  # noqa: E402
from helios_sim.study.plan import check_study, plan_study  # noqa: E402
from helios_sim.study.schema import CascadeConfig, ClusterConfig, Config  # noqa: E402
from live_study import write_live_study  # noqa: E402
from tiny_models import tiny_tokenizer  # noqa: E402

FULL_DEPTH = {"policy": "full_depth"}
KINDS: dict[str, Any] = {"small": {"count": 2, "models": ["tiny"]}, "large": {"models": ["other"]}}
N = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that read text differently."""
    folder = tmp_path_factory.mktemp("replicas")
    write_live_study(folder)
    tiny_tokenizer(vocab_size=280).save_pretrained(folder / "other")
    return folder


def config(folder: Path, *words: str, **server: Any) -> Config:
    base = study_config("tiny_live", "mode=live", *words, config_dir=folder / "conf")
    return replace(base, server=replace(base.server, **server))


def cascade(folder: Path, below: float, kinds: dict[str, Any] = KINDS, **settings: Any) -> Config:
    cluster = ClusterConfig(dict(kinds), cascade=CascadeConfig(list(kinds), below))
    return replace(config(folder, router="cascade"), cluster=cluster, **settings)


@dataclass
class Ran:
    records: Records
    run: Run
    live: LiveRun

    @property
    def models(self) -> list[str]:
        """The model of each request's answer, by its number."""
        return [model for _, model in sorted(zip(self.records.request_id.tolist(), self.records.model, strict=True))]

    def answer(self, replica: int, request_id: int) -> Any:
        return self.live.replicas[replica].device_engine.answers[request_id]

    def answers(self) -> dict[int, Any]:
        """The one that counts of each request."""
        served = zip(self.records.replica.tolist(), self.records.request_id.tolist(), strict=True)
        return {request_id: self.answer(replica, request_id) for replica, request_id in served}


def serve_live(config: Config, entry: Any = FULL_DEPTH, act: Callable[[LiveRun], None] = lambda live: None) -> Ran:
    fleet, log = build_fleet(config, 0), RecordLog()
    live = LiveRun(config, fleet, 0)
    try:
        act(live)
        run = serve(make_job("arm", entry, config, 0), fleet, log.add, live)
        live.end()
    finally:
        live.close()
    return Ran(log.records(), run, live)


# --- cascades


@pytest.fixture(scope="module")
def cascaded(folder: Path) -> tuple[float, Ran]:
    """A cascade at the threshold that lies in the middle of what the small model says of its answers."""
    everything = serve_live(cascade(folder, 1.01))
    assert everything.models == ["other"] * N
    small = [replica.device_engine.answers for replica in everything.live.replicas[:2]]
    sure = sorted(fmean(answers[n].sure) for n in range(N) for answers in small if n in answers)
    assert len(sure) == N
    below = (sure[N // 2 - 1] + sure[N // 2]) / 2
    return below, serve_live(cascade(folder, below))


def greedy(weights: Path, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
    """transformers' answer, and the largest probability of each token."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    ids, sure = list(prompt), []
    for _ in range(tokens):
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].softmax(-1).max(-1)
        ids.append(int(best.indices))
        sure.append(float(best.values))
    return ids[len(prompt) :], sure


def test_an_escalated_answer_is_the_larger_models_token_by_token(cascaded: tuple[float, Ran], folder: Path) -> None:
    """It reads the prompt as its own tokenizer has it, nothing of the first answer, and writes what it would alone."""
    _, found = cascaded
    answers = found.answers()
    assert [answer.model for _, answer in sorted(answers.items())] == found.models
    assert found.models.count("other") == found.run.answered.escalated == N // 2
    first = [found.live.replicas[n].device_engine.answers for n in (0, 1)]
    for number, answer in answers.items():
        if answer.model == "other":
            small = next(of[number] for of in first if number in of)
            assert small.prompt != answer.prompt
            assert answer.tokens == greedy(folder / "other", answer.prompt, len(answer.tokens))[0]


def test_the_confidence_is_what_the_last_layer_says_of_the_models_own_words(
    cascaded: tuple[float, Ran], folder: Path
) -> None:
    below, found = cascaded
    for number in range(N):
        small = next(
            of.device_engine.answers[number] for of in found.live.replicas[:2] if number in of.device_engine.answers
        )
        tokens, sure = greedy(folder / "tiny", small.prompt, len(small.tokens))
        assert small.tokens == tokens
        assert small.sure == pytest.approx(sure, abs=1e-5)
        assert (fmean(sure) < below) == (found.models[number] == "other")
    assert not any(answer.sure for answer in found.live.replicas[2].device_engine.answers.values())  # nobody asks


def test_who_escalates_is_who_escalates_in_a_simulation_that_is_told_the_confidences(
    cascaded: tuple[float, Ran], folder: Path
) -> None:
    below, found = cascaded
    known = {
        number: fmean(answer.sure)
        for replica in found.live.replicas[:2]
        for number, answer in replica.device_engine.answers.items() if number >= 0
    }  # fmt: skip
    simulated = replace(cascade(folder, below), mode="simulate")
    fleet, log = build_fleet(simulated, 0), RecordLog()
    router = replace(fleet.routing.by_answer, confidence=lambda request, record: known[request.request_id])
    fleet = replace(fleet, routing=replace(fleet.routing, by_answer=router))
    run = serve(make_job("arm", FULL_DEPTH, simulated, 0), fleet, log.add)
    records = log.records()
    models = [model for _, model in sorted(zip(records.request_id.tolist(), records.model, strict=True))]
    assert models == found.models
    assert run.answered.replaced_tokens == found.run.answered.replaced_tokens
    both = (records, found.records)
    outputs = [sorted(zip(r.request_id.tolist(), r.output_tokens.tolist(), strict=True)) for r in both]
    assert outputs[0] == outputs[1]


def test_drafts_are_judged_as_what_they_become(cascaded: tuple[float, Ran], folder: Path) -> None:
    """Self-speculation gives full depth's tokens, and what the last layer says of them."""
    below, plain = cascaded
    drafting = KINDS | {"small": KINDS["small"] | {"policy": "self_speculation", "exit_layer": 4, "draft_tokens": 2}}
    found = serve_live(cascade(folder, below, drafting))
    assert found.models == plain.models
    small = [{n: a for n, a in r.device_engine.answers.items() if n >= 0} for r in found.live.replicas[:2]]
    for answers in small:
        for number, answer in answers.items():
            before = next(of.device_engine.answers.get(number) for of in plain.live.replicas[:2]
                          if number in of.device_engine.answers)  # fmt: skip
            assert answer.tokens == before.tokens
            assert answer.sure == pytest.approx(before.sure, abs=1e-5)


def test_a_study_of_a_cascade_is_served_and_reported(folder: Path) -> None:
    found = run_job(make_job("arm", FULL_DEPTH, cascade(folder, 1.01), 0))
    metrics = found.replicate.metrics
    assert metrics["requests_completed"] == metrics["escalations"] == N
    assert metrics["bits_per_char"] is None
    assert [replica.kind for replica in found.replicas] == ["small", "small", "large"]
    assert any("3 replicas shared cpu" in notice for notice in found.notices)
    assert found.live.iterations == found.replicate.stats.iterations


# --- replicas that are alike


def test_replicas_write_what_one_writes_and_compute_at_the_same_time(folder: Path) -> None:
    """Each replica's first iteration waits, in its thread, for that of the other."""
    alone = serve_live(config(folder))
    met = threading.Barrier(2, timeout=30)

    def act(live: LiveRun) -> None:
        for replica in live.replicas:
            first = replica.device_engine.execute

            def execute(plan: Plan, now_ns: int, first=first, waits=[True]) -> Any:  # noqa: B006
                if plan.members[0].request.request_id >= 0 and waits:
                    waits.pop()
                    met.wait()
                return first(plan, now_ns)

            replica.device_engine.execute = execute

    both = serve_live(config(folder, replicas=2), act=act)
    assert sorted(set(both.records.replica.tolist())) == [0, 1]
    assert not met.broken
    texts = [{number: answer.tokens for number, answer in ran.answers().items()} for ran in (alone, both)]
    assert texts[0] == texts[1]
    assert [server.used_blocks for server in both.run.servers] == [0, 0]


def test_requests_go_where_they_go_in_a_simulation(folder: Path) -> None:
    """Where that does not hang on load."""
    kinds = ClusterConfig(dict(KINDS), shares={"small": 0.5, "large": 0.5})
    for settings in (
        {"router": "round_robin"}, {"router": "mixed", "cluster": kinds},
        {"router": "by_task", "cluster": ClusterConfig({"large": KINDS["large"]}, tasks={"text": "large"})},
    ):  # fmt: skip
        cluster = settings.get("cluster", ClusterConfig(dict(KINDS)))
        live = replace(config(folder, router=settings["router"]), cluster=cluster)
        found = [
            run_job(make_job("arm", FULL_DEPTH, replace(live, mode=mode), 0)).replicate.records
            for mode in ("live", "simulate")
        ]
        models = [sorted(zip(r.request_id.tolist(), r.model, strict=True)) for r in found]
        assert models[0] == models[1], settings


def test_a_bandit_hears_of_live_answers_what_it_hears_of_simulated_ones(folder: Path) -> None:
    """One request at a time, so that answers end in the same order."""
    words = ("workload.arrivals={kind: closed_loop, users: 1}", "workload.n_requests=30")
    live = replace(config(folder, *words, router="thompson"), cluster=ClusterConfig(dict(KINDS)))
    found = [run_job(make_job("arm", FULL_DEPTH, replace(live, mode=mode), 0)) for mode in ("live", "simulate")]
    sent = [one.replicate.records.replica.tolist() for one in found]
    assert sent[0] == sent[1]
    assert len(set(sent[0])) > 1
    favoured = [[d.deployment.evidence for d in one.decisions if "bandit" in d.deployment.reason] for one in found]
    assert favoured[0] == favoured[1] != []
    assert found[0].replicate.metrics["bits_per_char"] is None


def test_a_closed_loop_of_users_and_a_router_by_load(folder: Path) -> None:
    words = ("workload.arrivals={kind: closed_loop, users: 4}",)
    found = serve_live(config(folder, *words, replicas=2, router="least_loaded"))
    assert found.records.completed.all()
    assert sorted(set(found.records.replica.tolist())) == [0, 1]


def test_engines_share_weights_in_host_memory_and_the_processors(folder: Path) -> None:
    before = torch.get_num_threads()
    three = replace(config(folder), cluster=ClusterConfig({"a": {"count": 2}, "b": {}}))
    torch.set_num_threads(6)
    try:
        live = LiveRun(three, build_fleet(three, 0), 0)
        checkpoints = [replica.device_engine.residents._models["tiny"].checkpoint for replica in live.replicas]
        assert len(set(map(id, checkpoints))) == 1
        assert torch.get_num_threads() == 2
        live.close()
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


def test_models_are_probed_loaded_and_switched_in_each_replicas_thread(folder: Path) -> None:
    words = ("models=[tiny,other]", "workload.n_requests=24")
    entry = {"policy": "helios_probe", "prompts_per_candidate": 2, "round_requests": 6, "window_tokens": 12, "limit": 3}
    found = serve_live(config(folder, *words, replicas=2), entry)
    assert found.records.completed.all()
    for server in found.run.servers:
        told = [decision.deployment for decision in server.decisions]
        assert any(deployment.probe is not None for deployment in told)
        assert told[-1].probe is None  # all candidates have been scored
        assert server.used_blocks == 0


# --- what goes wrong in a thread


def failing(at: int, error: Callable[[Plan, int], Exception]) -> Callable[[LiveRun], None]:
    """The second replica's iteration of this number fails."""

    def act(live: LiveRun) -> None:
        engine, count = live.replicas[1].device_engine, []
        execute = engine.execute

        def run(plan: Plan, now_ns: int) -> Any:
            if plan.members[0].request.request_id >= 0:
                count.append(plan)
                if len(count) == at:
                    raise error(plan, now_ns)
            return execute(plan, now_ns)

        engine.execute = run

    return act


def test_an_error_in_an_engines_thread_ends_the_run(folder: Path) -> None:
    with pytest.raises(ValueError, match="broken kernel"):
        serve_live(config(folder, replicas=2), act=failing(3, lambda plan, now_ns: ValueError("broken kernel")))


def test_an_iteration_that_runs_out_of_memory_is_tried_again(folder: Path) -> None:
    found = serve_live(config(folder, replicas=2), act=failing(3, lambda plan, now_ns: OutOfMemory("full", now_ns)))
    assert found.records.completed.all()
    assert [answer.tokens for _, answer in sorted(found.answers().items())] == [
        answer.tokens for _, answer in sorted(serve_live(config(folder)).answers().items())
    ]


def test_a_request_that_fails_on_a_device_is_dropped_in_the_servers_own_thread() -> None:
    told: list[tuple[int, str, str]] = []

    class Served:
        def request_failed(self, request_id: int, reason: str) -> None:
            told.append((request_id, reason, threading.current_thread().name))

    clock = WallClock()
    clock.sync()
    thread = threading.Thread(target=ToServer(Served(), clock).request_failed, args=(3, "no number"))  # type: ignore[arg-type]
    thread.start()
    thread.join()
    assert not told
    clock.run()
    assert told == [(3, "no number", threading.current_thread().name)]


@pytest.mark.parametrize(
    "words",
    [
        ("workload.faults.replica_dies.at_s=[0.01,0.03]", "workload.faults.replica_dies.lasts_s=0.05"),
        ("workload.faults.iteration_fails.at_s=[0.01,0.02,0.03]",),
        ("workload.faults.slow_card.at_s=[0.001]", "workload.faults.slow_card.lasts_s=5.0"),
    ],
    ids=["dies", "fails", "slow"],
)  # fmt: skip
def test_faults_strike_one_replica_while_others_serve_on(folder: Path, words: tuple[str, ...]) -> None:
    retries = ("workload.faults.retries=50",) if "slow" not in words[0] else ()
    found = run_job(make_job("arm", FULL_DEPTH, config(folder, *words, *retries, replicas=2), 0))
    assert found.replicate.metrics["requests_completed"] == N
    assert any(struck.hit for struck in found.faults)
    assert sorted(set(found.replicate.records.replica.tolist())) == [0, 1]


# --- what cannot be


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("server.replicas=2", "live.devices=[cpu]"), r"live\.devices.*one for each replica, of which there are 2"),
        (("server.replicas=2", "live.devices=[cuda:0,cuda]"), r"live\.devices.*a card for each replica"),
        (("server.replicas=2", "live.device=cuda:1"), r"live\.device.*a card for each replica.*live\.devices"),
        (("server.replicas=2", "live.pace_every_s=1.0"), r"live\.pace_every_s.*leave it out"),
        (("server.replicas=2", "server.schedule_ahead=1"), r"server\.schedule_ahead"),
        (("server.replicas=2", "fidelity_live.loads=[0.5]"), r"fidelity_live\.loads.*several replicas"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_told_with_their_fix(folder: Path, words: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_study(plan_study(config(folder, *words)))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ({"policy": "early_exit"}, r"policy.*PerToken.*serve the kinds before the last with full_depth"),
        ({"server": {"kernels": "trtllm"}}, r"cluster\.kinds\.small\.server\.kernels.*leave it out"),
    ],
)
def test_kinds_that_cannot_be_are_told_with_their_fix(folder: Path, kind: dict[str, Any], told: str) -> None:
    changed = cascade(folder, 0.5, KINDS | {"small": KINDS["small"] | kind}, arms={"full": FULL_DEPTH})
    with pytest.raises(UserError, match=told):
        check_study(plan_study(changed))


@pytest.mark.parametrize(("settings", "key"), [({"replicas": 2}, r"server\.replicas"), ({}, r"cluster\.kinds")])
def test_clients_are_served_by_one_engine(folder: Path, settings: dict[str, int], key: str) -> None:
    several = replace(config(folder, **settings), arms={"full": FULL_DEPTH})
    if not settings:
        several = replace(several, cluster=ClusterConfig(dict(KINDS)))
    with pytest.raises(UserError, match=key + r".*one engine serves all clients.*leave it out"):
        served_job(several, ServeConfig())
    assert served_job(replace(several, mode="simulate"), ServeConfig())


def test_a_router_that_knows_what_will_come_is_refused(folder: Path) -> None:
    live = replace(config(folder, router="best_answer"), cluster=ClusterConfig(dict(KINDS)))
    with pytest.raises(UserError, match=r"server\.router.*set server\.router=thompson, cascade or"):
        run_job(make_job("arm", FULL_DEPTH, live, 0))
