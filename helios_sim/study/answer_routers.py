"""Makes routers that go by answers from settings: their kinds, and what they read from the exit traces."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np

from helios_sim.engine.simulated import ModelData
from helios_sim.errors import UserError
from helios_sim.exits.rule import OF_ANSWERS
from helios_sim.request import Request, RequestRecord
from helios_sim.routing import AnswerRouter
from helios_sim.study.schema import Config

if TYPE_CHECKING:
    from helios_sim.by_answer import ByAnswer, Judging

ROUTERS = tuple(router.value for router in AnswerRouter)


@dataclass(frozen=True, slots=True)
class OfKind:
    """What a router has to know of a kind of replicas."""

    replicas: tuple[int, ...]
    models: Mapping[str, ModelData]


def check_cluster(config: Config) -> None:
    """Raise UserError if settings of the cluster do not fit its router, or the router lacks one that it needs."""
    cluster, router = config.cluster, config.server.router
    for name, told, meant in (
        ("tasks", dict(cluster.tasks), "by_task"),
        ("shares", dict(cluster.shares), AnswerRouter.MIXED),
        ("cascade.kinds", list(cluster.cascade.kinds), AnswerRouter.CASCADE),
    ):
        if told and router != meant:
            allowed = f"only the router {meant} goes by it"
            raise UserError(f"cluster.{name}", told, allowed, f"set server.router={meant}, or leave it out")
    if router not in ROUTERS:
        return
    if not cluster.kinds:
        allowed = "replicas that are alike answer alike"
        raise UserError("server.router", router, allowed, "name kinds of replicas in cluster.kinds")
    if config.workload.faults.strikes:
        allowed = "none behind a router that goes by answers: what a fault has hit would need a place in its books"
        raise UserError("workload.faults", ", ".join(config.workload.faults.strikes), allowed, "leave faults out, or "
                        "set server.router=by_task")  # fmt: skip
    if router == AnswerRouter.CASCADE:
        _check_names("cluster.cascade.kinds", cluster.cascade.kinds, cluster.kinds)
        if len(cluster.cascade.kinds) < 2:
            allowed = "two kinds or more, in the order in which they are asked"
            raise UserError("cluster.cascade.kinds", cluster.cascade.kinds, allowed, "name them all")
    if router == AnswerRouter.MIXED:
        _check_names("cluster.shares", list(cluster.shares), cluster.kinds)
        _check_numbers("cluster.shares", cluster.shares)
        if abs(sum(cluster.shares.values()) - 1) > 1e-6:
            shown = ", ".join(f"{name}: {share:g}" for name, share in cluster.shares.items())
            raise UserError("cluster.shares", f"{{{shown}}}", "shares that sum to 1", "correct them")
    if router == AnswerRouter.THOMPSON:
        for kind, cost in cluster.bandit.costs.items():
            if kind not in cluster.kinds:
                allowed = f"one of the kinds {', '.join(map(str, cluster.kinds))}"
                raise UserError(f"cluster.bandit.costs.{kind}", cost, allowed, "name one of these")
        _check_numbers("cluster.bandit.costs", cluster.bandit.costs)


def _check_names(key: str, named: Sequence[str], kinds: Collection[str]) -> None:
    """Raise UserError unless every kind is named exactly once."""
    unknown = [name for name in named if name not in kinds]
    missing = [str(name) for name in kinds if name not in named]
    if unknown or missing or len(set(named)) < len(named):
        allowed = f"every kind of the cluster once: {', '.join(map(str, kinds))}"
        fix = f"add {missing[0]}" if missing else "correct the names"
        raise UserError(key, ", ".join(map(str, named)) or None, allowed, fix)


def _check_numbers(key: str, given: Mapping[str, float]) -> None:
    for kind, value in given.items():
        if not isfinite(value) or value < 0:
            raise UserError(f"{key}.{kind}", value, "a number of at least 0", "correct it")


def answer_router(config: Config, kinds: Mapping[str, OfKind]) -> ByAnswer:
    """Return the router of settings that passed `check_cluster`. UserError if a trace lacks what the router reads."""
    from helios_sim.by_answer import Bandit, BestAnswer, Cascade, Mixed

    cluster, members = config.cluster, tuple(kind.replicas for kind in kinds.values())
    match AnswerRouter(config.server.router):
        case AnswerRouter.CASCADE:
            asked = cluster.cascade.kinds
            models = {name: data for kind in asked[:-1] for name, data in kinds[kind].models.items()}
            stages = tuple(kinds[kind].replicas for kind in asked)
            return Cascade(stages, cluster.cascade.escalate_below, AnswerConfidence(models))
        case AnswerRouter.THOMPSON:
            _require_bits(config, kinds, "a verdict on an answer is its bits per character")
            replicas = {name: kind.replicas for name, kind in kinds.items()}
            own = cluster.bandit
            return Bandit(replicas, own.by_task, own.spread, dict(own.costs))
        case AnswerRouter.MIXED:
            return Mixed(members, tuple(cluster.shares[name] for name in kinds))
        case AnswerRouter.BEST_ANSWER:
            _require_bits(config, kinds, "which answer is best is told by its bits")
            return BestAnswer(members, _FewestBits(tuple(tuple(kind.models.values()) for kind in kinds.values())))


def _require_bits(config: Config, kinds: Mapping[str, OfKind], why: str) -> None:
    for kind in kinds.values():
        for model, data in kind.models.items():
            if data.trace.trace.microbits is None:
                allowed = f"{why}, and exits of {model} know none of human text"
                raise UserError("server.router", config.server.router, allowed, "choose exits.source=reference, or "
                                "another router")  # fmt: skip


class AnswerConfidence:
    """How sure a model was of an answer: the largest probability at its last layer, averaged over the tokens."""

    def __init__(self, models: Mapping[str, ModelData]) -> None:
        self._models = models
        self._of_tokens = {
            name: data.trace.trace.recorded(OF_ANSWERS)[:, -1] for name, data in models.items()
        }

    def __call__(self, request: Request, record: RequestRecord) -> float:
        require_whole(record)
        span = self._models[record.model].trace.locate(request.task, request.text_start, request.output_chars)
        return float(np.mean(self._of_tokens[record.model][span.indices()], dtype=np.float64))


def require_whole(record: RequestRecord) -> None:
    """Raise UserError for an answer with early tokens: the model's confidence is recorded at its last layer alone."""
    if record.early_tokens:
        raise UserError(
            "server.router", "cascade", f"whole answers of {record.model}: it left {record.early_tokens} tokens of "
            "one early, and how sure it was of them is recorded for its last layer",
            "serve the kinds before the last with policy=full_depth",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hears:
    """A router that judges each answer by the bits of the request's own text, as recorded of the model at full depth.

    They stand for the user's verdict, since a live answer is the model's own text, for which no bits are recorded.
    """

    router: ByAnswer
    models: Mapping[str, ModelData]

    def begin(self, requests_in: Sequence[int], seed: int) -> Judging:
        return _Hearing(self.router.begin(requests_in, seed), self.models)


class _Hearing:
    def __init__(self, judging: Judging, models: Mapping[str, ModelData]) -> None:
        self.answered, self._judging, self._models = judging.answered, judging, models
        self._asked: dict[int, Request] = {}

    def choose(self, request: Request) -> int:
        self._asked[request.request_id] = request
        return self._judging.choose(request)

    def judge(self, record: RequestRecord, left_ns: int) -> RequestRecord | Request:
        request = self._asked.pop(record.request_id)
        microbits = _recorded_microbits(self._models[record.model], request)
        return self._judging.judge(replace(record, microbits=microbits), left_ns)


def _recorded_microbits(data: ModelData, request: Request) -> int:
    """Return the cost of the request's text at full depth, in millionths of a bit."""
    microbits = data.trace.trace.microbits
    assert microbits is not None
    span = data.trace.locate(request.task, request.text_start, request.output_chars)
    return int(microbits[span.indices(), -1].sum())


class _FewestBits:
    """The cost of a request's text by the best model of a kind, at full depth, in millionths of a bit."""

    def __init__(self, kinds: tuple[tuple[ModelData, ...], ...]) -> None:
        self._kinds = kinds

    def __call__(self, kind: int, request: Request) -> int:
        return min(_recorded_microbits(data, request) for data in self._kinds[kind])
