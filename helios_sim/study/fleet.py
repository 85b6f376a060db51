"""The replicas of a run: what each is made of, and which requests it is meant for.

Without `cluster.kinds` all replicas are alike. A kind says how its replicas differ from the study and the arm."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from helios_sim.engine.simulated import ModelData
from helios_sim.errors import UserError, require_one_of
from helios_sim.exits.trace import MICROBITS
from helios_sim.policy.draft_model import DraftModelParameters
from helios_sim.policy.registry import PolicyConfig
from helios_sim.policy.telemetry import Candidate
from helios_sim.profile.spec import HardwareSpec
from helios_sim.request import to_ns
from helios_sim.routing import AnswerRouter, Router, Routing
from helios_sim.serving.autoscale import Scaling
from helios_sim.study.answer_routers import ROUTERS, OfKind, answer_router, check_cluster
from helios_sim.study.build import Parts, build, known_offline, objective_of, policy_of
from helios_sim.study.inputs import made_of
from helios_sim.study.limits import check_host_costs, check_size
from helios_sim.study.schema import PRESENTATION, ClusterConfig, Config
from helios_sim.study.workload import build_faults, expected_load, task_names
from helios_sim.workload.faults import FaultPlan

WHERE_REPLICAS_GO = (Router.ROUND_ROBIN, Router.LEAST_LOADED, Router.POWER_OF_TWO)
ALIKE = ""  # name of the only kind if all replicas are alike
OF_ONE_SERVER = (
    "max_running_requests", "max_batch_tokens", "memory_utilisation", "schedule_ahead", "scheduler", "order",
    "batch_wait_iterations", "batch_wait_tokens", "tensor_parallel", "quantization", "kv_cache_dtype",
    "kernels",
)  # fmt: skip
OWN = ("count", "hardware", "models", "server", "policy")  # keys of a kind; with a policy, its settings too
MOST_KEPT = 4  # fleets that are kept at a time, such as one for each seed
MOST_USES = 200  # of a kept fleet: its traces remember their replays, one for every threshold


@dataclass(frozen=True, slots=True)
class Kind:
    """Replicas that are alike."""

    name: str
    numbers: range  # of its replicas in the run
    parts: Parts
    tasks: tuple[str, ...]  # tasks of the workload that the replicas are meant for
    policy: PolicyConfig | None  # the kind's own policy; None for the arm's

    @property
    def card(self) -> HardwareSpec:
        return next(iter(self.parts.models.values())).profile.hardware


@dataclass(frozen=True, slots=True)
class Fleet:
    """The replicas that serve a run, by kind, and how requests are shared between them."""

    kinds: tuple[Kind, ...]
    routing: Routing
    faults: FaultPlan | None = None  # None without faults
    scaling: Scaling | None = None  # None if all replicas are always on

    @property
    def parts(self) -> Parts:
        """Parts of the first kind; all kinds have the same workload."""
        return self.kinds[0].parts

    @property
    def models(self) -> dict[str, ModelData]:
        """Models of all kinds; if several kinds have a model, with the data of the first kind."""
        return {name: data for kind in reversed(self.kinds) for name, data in kind.parts.models.items()}

    @property
    def replicas(self) -> int:
        return self.kinds[-1].numbers.stop

    def kind_of(self, number: int) -> Kind:
        return next(kind for kind in self.kinds if number in kind.numbers)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A kind before its parts are built."""

    name: str
    numbers: range
    config: Config
    policy: PolicyConfig | None


def build_fleet(config: Config, seed: int) -> Fleet:
    """Build the replicas of a run. UserError for a wrong setting of the study or of a kind."""
    check_cluster(config)
    by_answer = config.server.router in ROUTERS
    if not by_answer:
        require_one_of("server.router", config.server.router, [*Router, *ROUTERS])
    router = Router.ROUND_ROBIN if by_answer else Router(config.server.router)
    if router is Router.SESSION and config.workload.sessions.users is None:
        allowed = "requests that belong to sessions"
        raise UserError("server.router", "session", allowed, "set workload.sessions.users and workload.sessions.turns")
    if router is Router.PREFIX_AWARE and not config.server.enable_prefix_caching:
        allowed = "replicas that keep prefixes"
        raise UserError("server.router", "prefix_aware", allowed, "set server.enable_prefix_caching=true")
    plans = _plans(config)
    faults = build_faults(config.workload.faults, plans[-1].numbers.stop, seed)
    scaling = _scaling(config, faults)
    check_size(config, plans[-1].numbers.stop)
    check_host_costs(config)
    if router is not Router.BY_TASK:
        alike: list[Kind] = []
        for plan in plans:
            alike.append(_kind(plan, seed, None, _share(config, plan, plans[-1].numbers.stop), alike))
        routing = Routing(router, seed)
        if by_answer:
            of_kinds = {kind.name: OfKind(tuple(kind.numbers), kind.parts.models) for kind in alike}
            routing = replace(routing, by_answer=answer_router(config, of_kinds))
        return Fleet(tuple(alike), routing, faults, scaling)
    tasks = task_names(config.workload.mix)
    if config.cluster.tasks:
        kinds_of_task = _by_map(config, tasks)
    elif all(plan.policy is not None and isinstance(plan.policy.parameters, DraftModelParameters) for plan in plans):
        kinds_of_task = _by_drafts(plans, seed, tasks)
    else:
        kinds_of_task = _by_bits(plans, seed, tasks)
    homes = tuple(
        tuple(number for plan in plans if plan.name in kinds_of_task[task] for number in plan.numbers) for task in tasks
    )
    kinds: list[Kind] = []
    for plan in plans:
        shares = [1 / len(home) if plan.numbers[0] in home else 0.0 for home in homes]
        own = tuple(task for task, share in zip(tasks, shares, strict=True) if share)
        kinds.append(_kind(plan, seed, own or None, shares if own else 1 / plans[-1].numbers.stop, kinds))
    return Fleet(tuple(kinds), Routing(router, seed, homes), faults)


def _share(config: Config, plan: _Plan, replicas: int) -> float:
    """Return the share of all requests that a replica of this kind is to expect; in a cascade, all may reach it."""
    share = config.cluster.shares.get(plan.name)
    if config.server.router == AnswerRouter.CASCADE or share:
        return (share or 1.0) / len(plan.numbers)
    return 1 / replicas


def _scaling(config: Config, faults: FaultPlan | None) -> Scaling | None:
    """Return how replicas come and go; None if all are always on. UserError for settings that do not allow it."""
    it, most = config.autoscale, config.server.replicas
    if it.least is None:
        return None
    assert it.start_s is not None
    if isinstance(it.requests_per_replica, list):
        allowed = "one number: a list is for autoscale of a whole capacity plan, which tries each"
        raise UserError("autoscale.requests_per_replica", it.requests_per_replica, allowed, "choose one")
    if it.least > most:
        raise UserError("autoscale.least", it.least, f"at most server.replicas={most}", "raise server.replicas")
    if faults is not None:
        allowed = "none: no replica that may be off is struck by faults"
        raise UserError("autoscale.least", it.least, allowed, "leave workload.faults out, or autoscale")
    if it.first is not None and not it.least <= it.first <= most:
        allowed = f"from autoscale.least={it.least} to server.replicas={most}"
        raise UserError("autoscale.first", it.first, allowed, "choose a number between")
    if config.server.router not in WHERE_REPLICAS_GO:
        allowed = f"{' or '.join(WHERE_REPLICAS_GO)} where replicas come and go"
        raise UserError("server.router", config.server.router, allowed, "choose one of these, or leave autoscale out")
    if config.workload.arrivals.kind == "closed_loop":
        allowed = "arrivals that do not wait for answers: fewer replicas would make fewer requests"
        raise UserError("autoscale.least", it.least, allowed, "set workload.arrivals.kind=poisson, or leave it out")
    return Scaling(
        least=it.least,
        requests_per_replica=it.requests_per_replica,
        every_ns=to_ns(it.every_s, "autoscale.every_s"),
        down_after_ns=to_ns(it.down_after_s, "autoscale.down_after_s"),
        start_ns=to_ns(it.start_s, "autoscale.start_s"),
        first=it.first,
    )


def _plans(config: Config) -> list[_Plan]:
    kinds, replicas = config.cluster.kinds, config.server.replicas
    if not kinds:
        if config.server.router == Router.BY_TASK:
            allowed = "replicas that are alike suit every task alike"
            raise UserError("server.router", "by_task", allowed, "name kinds of replicas in cluster.kinds")
        return [_Plan(ALIKE, range(replicas), config, None)]
    plans: list[_Plan] = []
    for name, entry in kinds.items():
        if not isinstance(entry, Mapping):
            allowed = f"a mapping of {', '.join(OWN)} and the policy's settings"
            raise UserError(f"cluster.kinds.{name}", entry, allowed, "write {count: 2, models: [...]}")
        with of_kind(name):
            first = plans[-1].numbers.stop if plans else 0
            plans.append(_plan(name, first, entry, config))
    total = plans[-1].numbers.stop
    if replicas not in (1, total):
        fix = f"correct the counts, set server.replicas={total}, or leave it out"
        raise UserError("server.replicas", replicas, f"the counts of cluster.kinds add up to {total}", fix)
    return plans


def _plan(name: str, first: int, entry: Mapping[str, Any], config: Config) -> _Plan:
    count = entry.get("count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError("count", count, "a whole number of at least 1", "say how many replicas are of this kind")
    settings = {key: value for key, value in entry.items() if key not in OWN}
    if settings and "policy" not in entry:
        key = next(iter(settings))
        allowed = f"a kind knows {', '.join(OWN)}; settings of a policy need a policy"
        raise UserError(key, settings[key], allowed, "correct the name, or name the kind's own policy too")
    own = policy_of({"policy": entry["policy"], **settings}, config) if "policy" in entry else None
    server = entry.get("server", {})
    if not isinstance(server, Mapping) or not set(server) <= set(OF_ONE_SERVER):
        raise UserError("server", server, f"a mapping of {', '.join(OF_ONE_SERVER)}", "leave the others to the study")
    models = entry.get("models", config.models)
    if isinstance(models, str) or not isinstance(models, Sequence) or not all(isinstance(m, str) for m in models):
        raise UserError("models", models, "a list of names", "write [opt-1.3b]")
    changed = replace(
        config,
        hardware=str(entry.get("hardware", config.hardware)),
        models=list(models),
        server=replace(config.server, replicas=count, **server),
        cluster=ClusterConfig(),
    )
    return _Plan(name, range(first, first + count), changed, own)


def _kind(
    plan: _Plan, seed: int, tasks: tuple[str, ...] | None, share: float | list[float], before: list[Kind]
) -> Kind:
    """Build a kind. `share`: the share of requests that one of its replicas gets, of all or of each task.

    Requests are those of the kinds `before` it, whichever models it serves.
    """
    config = plan.config
    if before:
        workload = replace(config.workload, chars_per_token=before[0].parts.workload.chars_per_token)
        config = replace(config, workload=workload)
    with of_kind(plan.name):
        parts = build(config, seed, tasks)
    if share != 1:
        situation = replace(parts.situation, expected=expected_load(parts.workload, seed, share))
        parts = replace(parts, situation=situation)
    return Kind(plan.name, plan.numbers, parts, tasks or parts.workload.mix.tasks, plan.policy)


def _by_map(config: Config, tasks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the kind of each task by `cluster.tasks`. UserError for a task without kind, or a kind without task."""
    meant, kinds = config.cluster.tasks, config.cluster.kinds
    for task, kind in meant.items():
        if task not in tasks:
            raise UserError(f"cluster.tasks.{task}", kind, f"tasks of the workload: {', '.join(tasks)}", "correct it")
        if kind not in kinds:
            allowed = f"one of the kinds {', '.join(map(str, kinds))}"
            raise UserError(f"cluster.tasks.{task}", kind, allowed, "name one of these")
    missing = [task for task in tasks if task not in meant]
    if missing:
        allowed = f"every task has a kind; without one: {', '.join(missing)}"
        raise UserError("cluster.tasks", dict(meant), allowed, f"add {missing[0]}: {next(iter(kinds))}")
    idle = [str(kind) for kind in kinds if kind not in meant.values()]
    if idle:
        allowed = f"every kind has a task; without one: {', '.join(idle)}"
        raise UserError("cluster.tasks", dict(meant), allowed, "give it a task, or leave the kind out")
    return {task: (meant[task],) for task in tasks}


def _by_bits(plans: list[_Plan], seed: int, tasks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return by task the kinds with the fewest bits per character of its text, by each kind's best model at full depth.
    """
    best: dict[str, list[float]] = {}
    for plan in plans:
        with of_kind(plan.name):
            models = build(plan.config, seed).models
        of_models = []
        for model, data in models.items():
            trace = data.trace.trace
            if trace.microbits is None:
                allowed = f"exits of {model} know no bits of human text, so its best tasks are not known"
                raise UserError("cluster.tasks", {}, allowed, "say which kind serves each task, such as {code: coder}")
            rows = [slice(trace.task_first[k], trace.task_first[k + 1]) for k in data.trace.task_index]
            of_models.append([trace.microbits[r, -1].sum() / MICROBITS / trace.chars[r].sum() for r in rows])
        best[plan.name] = np.min(of_models, axis=0).tolist()
    return _least(best, tasks)


def _by_drafts(plans: list[_Plan], seed: int, tasks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return by task the kinds with the drafter that predicts most tokens of its text as the verifying model does.

    CoSine (arXiv 2503.10325) routes requests so, to a drafter for each task. UserError if drafts were not recorded.
    """
    missed: dict[str, list[float]] = {}
    for plan in plans:
        assert plan.policy is not None
        assert isinstance(plan.policy.parameters, DraftModelParameters)
        with of_kind(plan.name):
            models = build(plan.config, seed).models
            model, drafter = plan.policy.parameters.roles({n: d.profile.model.n_layers for n, d in models.items()})
            bound = models[model].trace
            drafters = (drafter, *(plan.policy.parameters.fused_with or ()))
            drafted, first = bound.trace.drafted_by_all(drafters), bound.trace.task_first
        missed[plan.name] = [1 - float(drafted[first[k] : first[k + 1]].mean()) for k in bound.task_index]
    return _least(missed, tasks)


def _least(found: Mapping[str, list[float]], tasks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return by task the kinds with the least figure; several if they are equal."""
    return {
        task: tuple(name for name, each in found.items() if each[place] == min(e[place] for e in found.values()))
        for place, task in enumerate(tasks)
    }


@contextmanager
def of_kind(name: str) -> Iterator[None]:
    """Name the kind of replicas in a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        if name == ALIKE:
            raise
        raise error.about(f"cluster.kinds.{name}.{error.key}") from error


@dataclass(slots=True)
class _Kept:
    """A fleet that further runs may use."""

    fleet: Fleet
    uses: int = 0


_kept: OrderedDict[str, _Kept] = OrderedDict()


def shared_fleet(config: Config, seed: int) -> Fleet:
    """Return what `build_fleet` returns, to the last bit, from parts that were built before if possible."""
    key = _key(config, seed)
    kept = _kept.pop(key, None)
    if kept is None or kept.uses >= MOST_USES:
        kept = _Kept(build_fleet(config, seed))
    _kept[key] = kept
    while len(_kept) > MOST_KEPT:
        _kept.popitem(last=False)
    kept.uses += 1
    return replace(kept.fleet, kinds=tuple(_as_set(kind, config) for kind in kept.fleet.kinds))


def _as_set(kind: Kind, config: Config) -> Kind:
    """Return the kind with its policy's inputs set anew: the objective, and sums over exits at the threshold."""
    parts = kind.parts
    with of_kind(kind.name):
        candidates = {
            name: Candidate(data.profile, known_offline(config, parts.recorded[name], kind.tasks))
            for name, data in parts.models.items()
        }
        situation = replace(parts.situation, objective=objective_of(config, candidates), candidates=candidates)
    return replace(kind, parts=replace(parts, situation=situation))


def what_counts(config: Config) -> dict[str, Any]:
    """Return the settings that change the result of a single run, by name; groups are not copied."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in PRESENTATION}


def in_json(settings: Any) -> str:
    """Return settings as JSON; equal settings give equal texts, whatever their order."""
    return json.dumps(settings, sort_keys=True, default=_plain)


def digest(settings: Any) -> str:
    """Return a short text that is equal for equal settings only."""
    return hashlib.sha256(in_json(settings).encode()).hexdigest()[:24]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return str(value)


def _key(config: Config, seed: int) -> str:
    """Return a text of all settings and files of which parts are made, except settings that `_as_set` sets anew."""
    settings = what_counts(config)
    del settings["objective"]
    if not any("policy" in kind for kind in config.cluster.kinds.values()):  # a kind's policy may use the threshold
        settings["exits"] = {name: value for name, value in vars(config.exits).items() if name != "threshold"}
    return in_json([seed, settings, made_of(config)])
