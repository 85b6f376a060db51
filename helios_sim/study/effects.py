"""Which settings have an effect under which other settings. A given setting that would do nothing is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import yaml

from helios_sim.errors import UserError
from helios_sim.routing import Router
from helios_sim.study.modes import BY_REQUESTS, LIVE, FidelityConfig
from helios_sim.study.schema import (
    AUTO,
    DISCARDED,
    AutoscaleConfig,
    Config,
    FaultsConfig,
    GuaranteeConfig,
    LastingFaultConfig,
    LengthConfig,
)
from helios_sim.workload.faults import LOSING

ARRIVALS = ("poisson", "gamma", "constant", "all_at_once", "closed_loop", "trace")
DRAWN_LENGTHS = ("fixed", "lognormal", "exponential", "uniform")
DRIFTS = ("step", "linear", "periodic")
_Counts = Callable[[Config], bool]


def _is_live(c: Config) -> bool:
    return c.mode == LIVE or bool(c.fidelity_live.loads)


def _is_compared(c: Config) -> bool:
    return c.fidelity.compare or c.fidelity.folder is not None or c.fidelity.silicon


def _is_simulated(c: Config) -> bool:
    return not _is_live(c) and not _is_compared(c)


def _is_from_log(c: Config) -> bool:
    return c.from_log.replay or c.from_log.log is not None


def _is_capacity(c: Config) -> bool:
    return bool(c.capacity.cards)


def _regroups(c: Config) -> bool:
    """Whether an arm splits batches at exits, or may, since its policy is the user's own."""
    own = [c.policy, *c.arms.values()]
    told = [(each.get("policy", each.get("name")), each.get("batching")) for each in own if isinstance(each, Mapping)]
    return any(batching == "rebatch" or name in ("early_exit_rebatch", "custom") for name, batching in told)


def _has_replicas(c: Config) -> bool:
    """Whether any run of the study may have several replicas, as by a sweep or an arm's own settings."""
    varied = (c.sweeps, c.sweep.parameters, c.arms)
    if c.server.router not in tuple(Router):
        return True  # an unknown router has a message of its own
    named = any(name in repr(varied) for name in ("server.replicas", "cluster.kinds", "'replicas'", "'kinds'"))
    return c.server.replicas > 1 or bool(c.cluster.kinds) or _is_capacity(c) or named


_SERVED = "where requests are served, not beside a log of a real engine"


def _arrivals(*kinds: str) -> tuple[_Counts, str]:
    return lambda c: c.workload.arrivals.kind in kinds, f"only with workload.arrivals.kind={' or '.join(kinds)}"


_DRAWN: tuple[_Counts, str] = (
    lambda c: not _is_from_log(c), "where requests are drawn; those of a log are replayed",
)  # fmt: skip
_LENGTHS_OF_TRACE: tuple[_Counts, str] = (
    lambda c: c.workload.lengths.kind == "trace", "only with workload.lengths.kind=trace",
)  # fmt: skip


def _of_trace(given: tuple[_Counts, str]) -> tuple[_Counts, str]:
    """Return the rule with a further condition: a log is not the trace."""
    counts, where = given
    return lambda c: counts(c) and not _is_from_log(c), f"{where}, and not with log=FILE"


def _drift(*kinds: str) -> tuple[_Counts, str]:
    return lambda c: c.workload.mix.drift in kinds, f"only with workload.mix.drift={' or '.join(kinds)}"


def _router(name: str) -> tuple[_Counts, str]:
    def holds(c: Config) -> bool:
        of_arms = [arm.get("overrides") or {} for arm in c.arms.values() if isinstance(arm, Mapping)]
        return name in (c.server.router, *(own.get("server.router") for own in of_arms))

    return holds, f"only with server.router={name}"


def _length(of: str, counts: Callable[[LengthConfig], bool], text: str) -> tuple[_Counts, str]:
    def holds(c: Config) -> bool:
        if of == "turns":
            return c.workload.sessions.users is not None and counts(c.workload.sessions.turns)
        return c.workload.lengths.kind == "drawn" and counts(getattr(c.workload.lengths, of))

    where = "workload.sessions.users" if of == "turns" else "workload.lengths.kind=drawn"
    return holds, f"only with {where} and {text}"


def _lengths(of: str) -> dict[str, tuple[_Counts, str]]:
    path = f"workload.sessions.{of}" if of == "turns" else f"workload.lengths.{of}"
    by_percentiles = "a lognormal without p50"
    return {
        f"{path}.kind": _length(of, lambda c: True, "nothing else"),
        f"{path}.value": _length(of, lambda c: c.kind == "fixed", f"{path}.kind=fixed"),
        f"{path}.mean": _length(
            of, lambda c: c.kind == "exponential" or (c.kind == "lognormal" and c.p50 is None and c.median is None),
            "an exponential, or a lognormal without p50 and median",
        ),
        f"{path}.sigma": _length(of, lambda c: c.kind == "lognormal" and c.p50 is None, by_percentiles),
        f"{path}.median": _length(of, lambda c: c.kind == "lognormal" and c.p50 is None, by_percentiles),
        f"{path}.p50": _length(of, lambda c: c.kind == "lognormal", f"{path}.kind=lognormal"),
        f"{path}.p95": _length(of, lambda c: c.kind == "lognormal" and c.p50 is not None, "a lognormal with p50"),
        f"{path}.minimum": _length(of, lambda c: c.kind != "fixed", f"{path}.kind other than fixed"),
        f"{path}.maximum": _length(of, lambda c: c.kind != "fixed", f"{path}.kind other than fixed"),
    }  # fmt: skip


def _fault(kind: str) -> tuple[_Counts, str]:
    path = f"workload.faults.{kind}"
    return lambda c: kind in c.workload.faults.strikes, f"only with {path}.at_s or {path}.rate_per_hour"


_OF_ARMS: tuple[_Counts, str] = (
    lambda c: _is_simulated(c) and not c.sweep.parameters and not _is_capacity(c),
    "in a simulation of arms, not for designs or a capacity plan",
)
# Lists and mappings that ask for a kind of study unless they are empty.
ASKING = {
    "sweep.parameters": "parameters, such as {limit: {settings: [arms.helios.limit], values: [40, 80]}}: without any "
    "there are no designs",
    "capacity.cards": "cards, such as [l40s,2xh100-80gb]: without any there is no capacity plan",
    "fidelity_live.loads": "loads, such as [0.5,0.9]: without any nothing is served and compared",
}
BY_MODEL = ("live.weights", "live.heads")  # settings for each model by its name
_OF_LOG: tuple[_Counts, str] = (lambda c: not c.fidelity.silicon, "only beside a log: fidelity.folder")
# Settings that count in a comparison with published measurements, where the rows say everything else.
OF_SILICON = ("fidelity", "jobs", "pictures", "report", "name", "title", "question", "hydra", "experiment")


# By setting, or group of settings: where it counts, and how a message says that. All other settings always count.
COUNTS: Mapping[str, tuple[_Counts, str]] = {
    "auto_seeds": (lambda c: c.seeds == AUTO, "only with seeds=auto"),
    "trace": _OF_ARMS,
    "autoscale": (
        lambda c: _is_simulated(c) and not c.cluster.kinds and (c.server.replicas > 1 or _is_capacity(c)),
        "only in a simulation of equal replicas: server.replicas=2 or more, which is the most there are",
    ),
    **{
        f"autoscale.{f.name}": (lambda c: c.autoscale.least is not None, "only with autoscale.least")
        for f in fields(AutoscaleConfig) if f.name != "least"
    },
    "autoscale.first": (
        lambda c: c.autoscale.least is not None and not _is_capacity(c),
        "only with autoscale.least; a capacity plan begins with all replicas",
    ),
    **{
        f"exits.guarantee.{f.name}": (
            lambda c: c.exits.guarantee.max_disagreement is not None, "only with exits.guarantee.max_disagreement"
        )
        for f in fields(GuaranteeConfig) if f.name != "max_disagreement"
    },
    "next_best": _OF_ARMS,
    "report.style": (lambda c: c.pictures, "only with pictures=true"),
    "live": (_is_live, "only with mode=live"),
    "live.device": (lambda c: not c.live.devices, "only without live.devices, which says it of each replica"),
    "live.devices": (_has_replicas, "only with several replicas: server.replicas or cluster.kinds"),
    "live.threads": (lambda c: "cpu" in c.live.used, "only with live.device=cpu"),
    "profile_band": (
        lambda c: _is_simulated(c) and not c.sweep.parameters, "in a simulation of arms or a capacity plan",
    ),
    "fidelity": (_is_compared, "only with fidelity.folder, or in +experiment=fidelity_silicon"),
    **{f"fidelity.{f.name}": _OF_LOG for f in fields(FidelityConfig) if f.name not in ("compare", "silicon", "rows")},
    "fidelity.profile_error": (lambda c: bool(c.fidelity.load_factors), "only with fidelity.load_factors"),
    "fidelity.rows": (lambda c: c.fidelity.silicon, "only in +experiment=fidelity_silicon"),
    "from_log": (_is_from_log, "only in +experiment=from_log, or with log=FILE"),
    **{f"workload.{name}": _DRAWN for name in ("arrivals.kind", "lengths.kind", "sessions", "system_prompts")},
    "fidelity_live": (lambda c: bool(c.fidelity_live.loads), "only with fidelity_live.loads"),
    "sweep": (lambda c: bool(c.sweep.parameters), "only with sweep.parameters: +experiment=sweep_helios has some"),
    "sweep.sampler": (lambda c: c.sweep.method == "search", "only with sweep.method=search"),
    "sweep.seed": (lambda c: c.sweep.method == "search", "only with sweep.method=search"),
    "sweep.designs": (lambda c: c.sweep.method == "search", "only with sweep.method=search"),
    "sweep.generation": (lambda c: c.sweep.method == "search", "only with sweep.method=search"),
    "sweep.address": (lambda c: c.sweep.backend == "ray", "only with sweep.backend=ray"),
    "sweep.workers": (lambda c: c.sweep.backend != "serial", "only with sweep.backend=processes or ray"),
    "capacity": (_is_capacity, "only in a capacity plan: +experiment=capacity, or capacity.cards"),
    "capacity.attainment": (
        lambda c: _is_capacity(c) and c.capacity.by == BY_REQUESTS, "only in a capacity plan with capacity.by=requests",
    ),
    "capacity.seconds": (
        lambda c: _is_capacity(c) and c.workload.arrivals.kind != "trace",
        "only in a capacity plan with drawn arrivals: those of a trace last as long as they do",
    ),
    "capacity.beyond": (
        lambda c: _is_capacity(c) and c.capacity.search == "bisection",
        "only in a capacity plan with capacity.search=bisection",
    ),
    "hardware": (lambda c: not _is_capacity(c), "in a study; a capacity plan has capacity.cards=[...]"),
    "server.replicas": (lambda c: not _is_capacity(c), "in a study; a capacity plan finds their number"),
    "server.router": (_has_replicas, "only with several replicas: server.replicas, cluster.kinds or capacity.cards"),
    "workload.n_requests": (
        lambda c: not _is_capacity(c) or c.capacity.seconds is None or c.workload.arrivals.kind == "trace",
        "in a capacity plan with capacity.seconds=null, or with the arrivals of a trace",
    ),
    "server.batch_wait_iterations": (lambda c: c.server.batch_wait_tokens > 0, "only with server.batch_wait_tokens"),
    "server.batch_wait_tokens": (
        lambda c: c.server.batch_wait_iterations > 0, "only with server.batch_wait_iterations",
    ),
    "cluster.shares": _router("mixed"),
    "cluster.cascade": _router("cascade"),
    "cluster.bandit": _router("thompson"),
    "server.tensor_parallel": (lambda c: not _is_live(c), "only in a simulation: live, a replica runs on one device"),
    "server.quantization": (_is_simulated, "only in a simulation: weights of a device or of a log are as they are"),
    "server.kv_cache_dtype": (_is_simulated, "only in a simulation: K and V of a device or of a log are as they are"),
    "server.sleep_level": (_is_simulated, "only in a simulation: live, weights wait in host memory"),
    "runtime.disk_gb_per_s": (
        lambda c: c.server.sleep_level == DISCARDED, f"only with server.sleep_level={DISCARDED}",
    ),
    "cost": (lambda c: not _is_compared(c), _SERVED),
    "server.kernels": (
        lambda c: _is_simulated(c) and c.profile_folder is None, "only in a simulation, without profile_folder",
    ),
    "workload.arrivals.rate_per_s": _arrivals("poisson", "gamma", "constant"),
    "workload.arrivals.cv": _arrivals("gamma"),
    "workload.arrivals.users": _arrivals("closed_loop"),
    "workload.arrivals.trace": _of_trace(_arrivals("trace")),
    "workload.arrivals.rate_scale": _of_trace(_arrivals("trace")),
    "workload.arrivals.time_unit": _arrivals("trace"),
    **_lengths("prompt"),
    **_lengths("output"),
    **_lengths("turns"),
    "workload.lengths.trace": _of_trace(_LENGTHS_OF_TRACE),
    "workload.lengths.id_tokens": (
        lambda c: c.workload.lengths.kind == "trace" and c.server.enable_prefix_caching,
        "only with workload.lengths.kind=trace and server.enable_prefix_caching=true",
    ),
    "workload.sessions.max_tokens": (
        lambda c: c.workload.sessions.users is not None, "only with workload.sessions.users",
    ),
    "workload.lengths.resample": _of_trace(_LENGTHS_OF_TRACE),
    "workload.mix.drift": (
        lambda c: bool(c.workload.mix.after) or c.workload.mix.drift not in DRIFTS, "only with workload.mix.after",
    ),
    "workload.mix.after": _drift(*DRIFTS),
    "workload.mix.at": _drift("step"),
    "workload.mix.start": _drift("linear"),
    "workload.mix.end": _drift("linear"),
    "workload.mix.period": _drift("periodic"),
    "workload.mix.per": _drift(*DRIFTS),
    "workload.faults.retries": (
        lambda c: any(kind in c.workload.faults.strikes for kind in LOSING),
        f"only where requests are lost: with {' or '.join(f'workload.faults.{kind.value}' for kind in LOSING)}",
    ),
    **{f"workload.faults.{kind}.replicas": _fault(kind) for kind in FaultsConfig().by_kind},
    **{
        f"workload.faults.{kind}.lasts_s": _fault(kind)
        for kind, fault in FaultsConfig().by_kind.items()
        if isinstance(fault, LastingFaultConfig)
    },
    "workload.faults.slow_card.factor": _fault("slow_card"),
    "workload.mix.priorities": (lambda c: c.server.order == "priority", "only with server.order=priority"),
    "exits.parameters": (
        lambda c: c.exits.source in ("published", "stated"), "only with exits.source=published or stated",
    ),
    **{
        f"exits.{name}": (lambda c: c.exits.source != "none", "only with exits: exits.source other than none")
        for name in ("threshold", "confidence", "guarantee.max_disagreement")
    },
    "runtime.regroup_s": (_regroups, "only where batches are split: policy.batching=rebatch"),
    "objective.bits_reference": (lambda c: c.objective.max_bits_ratio is not None, "with objective.max_bits_ratio"),
}  # fmt: skip


def _evaluates(*how: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a policy with these settings evaluates candidates in one of these ways."""
    return lambda own: own.get("evaluation", "probe" if "probe" in own["name"] else "serve") in how


# By setting of a policy: where it counts, judged by the policy's settings and its name, and how a message says that.
OF_POLICIES: Mapping[str, tuple[Callable[[Mapping[str, Any]], bool], str]] = {
    "raised_kv_rule": (lambda own: own.get("raised", "full_depth") == "early_exit", "only with raised=early_exit"),
    **{
        name: (lambda own: "rebatch" in (own.get("batching"), *own["name"].split("_")), "only with batching=rebatch")
        for name in ("flush_requests", "flush_s")
    },
    "evaluated_tokens": (_evaluates("serve"), "only with evaluation=serve"),
    "prompts_per_candidate": (_evaluates("serve", "probe"), "only with evaluation=serve or probe"),
    "half_life_requests": (_evaluates("serve", "probe"), "only with evaluation=serve or probe"),
}


def _of_policy(config: Config, parts: Sequence[str]) -> Mapping[str, Any] | None:
    """Return settings and name of the policy to which the setting at this path belongs; None if it belongs to none."""
    if len(parts) == 2 and parts[0] == "policy" and isinstance(config.policy, Mapping):
        return config.policy
    if len(parts) == 3 and parts[0] == "arms" and isinstance(own := config.arms.get(parts[1]), Mapping):
        return {**own, "name": own.get("policy", "")}
    return None


def _of_no_model(config: Config, name: str, value: str) -> str | None:
    """Return the study's models if a setting by model names a model that is none of them; else None."""
    group = next((key for key in BY_MODEL if name == key or name.startswith(f"{key}.")), None)
    if group is None:
        return None
    names = [name.removeprefix(f"{group}.")] if name != group else _keys_of(value)
    elsewhere = repr((config.arms, config.sweeps, config.sweep.parameters, config.cluster.kinds))
    others = [model for model in names if model not in config.models and model not in elsewhere]
    return ", ".join(config.models) if others else None


def _keys_of(value: str) -> list[str]:
    """Return the keys of a mapping that is written as on the command line; none if it is no mapping."""
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        return []
    return [str(key) for key in found] if isinstance(found, dict) else []


def check_effect(config: Config, words: Sequence[str]) -> None:
    """Raise UserError for a word of the command line that has no effect under the study's other settings."""
    for word in words:
        key, equals, value = word.partition("=")
        name = key.lstrip("+")
        parts = name.split(".")
        if not equals or name.startswith("~") or value in ("null", ""):
            continue
        if config.fidelity.silicon and parts[0] not in OF_SILICON:
            allowed = "does nothing here: each row says it; fidelity.rows=FILE takes other rows"
            raise UserError(name, value, allowed, "leave it out")
        if name in ASKING and value.strip() in ("[]", "{}"):
            raise UserError(name, value, ASKING[name], "name some, or leave it out")
        if (known := _of_no_model(config, name, value)) is not None:
            allowed = f"a name of the study's models, {known}: of others it does nothing here"
            raise UserError(name, value, allowed, "correct the name")
        counts_for, where = OF_POLICIES.get(parts[-1], (None, ""))
        own = _of_policy(config, parts) if counts_for is not None else None
        if own is not None and counts_for is not None and not counts_for(own):
            raise UserError(name, value, f"does nothing here: it counts {where}", "leave it out, or set that too")
        for above in (".".join(parts[: i + 1]) for i in range(len(parts))):
            counts, where = COUNTS.get(above, (None, ""))
            if counts is not None and not counts(config) and _is_known(config, parts):
                raise UserError(name, value, f"does nothing here: it counts {where}", "leave it out, or set that too")


# Groups that a user's file may hold for command lines that ask for them: seeds=auto, mode=live, trace=true, ...
FOR_COMMANDS = ("auto_seeds", "live", "fidelity_live", "report", "trace", "next_best", "profile_band")
# By group: groups that decide whether its settings count. A change of one of them may be why a setting does not count.
_WITH = {"cluster": ("server", "cluster"), "server": ("server", "cluster"), "runtime": ("runtime", "arms", "policy")}


def check_written(
    config: Config, written: Mapping[str, Any], changed: Collection[str], place: str, is_last: bool = True
) -> None:
    """Raise UserError for a setting of a user's file that has no effect under the study's other settings.

    `written`: what the file says. `is_last`: it is the experiment's file, which comes after all others, so arms, axes
    and the mix of the study are checked with it. `changed`: paths of settings that words of the command line change.
    A setting is not refused if the command line, an arm or an axis changes one on which its effect may depend.
    """
    given = [arm.get("overrides") for arm in config.arms.values() if isinstance(arm, Mapping)]
    of_arms = [path for own in given if isinstance(own, Mapping) for path, _ in _single(own)]
    axes = [*(axis for sweep in config.sweeps for axis in sweep.axes), *config.sweep.parameters.values()]
    varied = [str(path) for path in (*of_arms, *(path for axis in axes for path in axis.settings))]
    others = [*changed, *varied]
    usual = asdict(Config())
    for path, (counts, where) in COUNTS.items():
        parts = path.split(".")
        value = _at(written, parts)
        if parts[0] in FOR_COMMANDS or value in (None, {}, []) or value == _at(usual, parts) or counts(config):
            continue
        if _is_from_log(config) and value == "trace":  # a log is a trace anyway
            continue
        if _is_known(config, parts) and not _varies(parts, others):
            allowed = f"does nothing here: it counts {where}"
            raise UserError(f"{place}: {path}", value, allowed, "leave it out, or set that too")
    if not is_last:
        return
    for path in (path for axis in axes for path in axis.settings):
        where = _in_vain(config, path.split("."), [other for other in varied if other != path])
        if where:
            allowed = f"does nothing here: it counts {where}"
            raise UserError(f"{place}: {path}", "an axis", allowed, "leave the axis out, or set that too")
    for name, mix in (("tasks", config.workload.mix.tasks), ("after", config.workload.mix.after)):
        own = _at(written, ["workload", "mix", name])
        joined = {task: share for task, share in (mix or {}).items() if share and task not in (own or mix)}
        if joined and not any(path.startswith("workload") for path in changed):
            others_of = ", ".join(f"{task}: {share:g}" for task, share in joined.items())
            allowed = f"also {others_of}, of the workload's own file"
            fix = "name these too, with 0 for a task to be left out"
            raise UserError(f"{place}: workload.mix.{name}", ", ".join(map(str, own or ())), allowed, fix)
    for name, arm in config.arms.items():
        overrides = (arm.get("overrides") or {}) if isinstance(arm, Mapping) else {}
        single = dict(_single(overrides)) if isinstance(overrides, Mapping) else {}
        for path, value in single.items():
            with_it = [*changed, *(other for other in single if other != path)]
            where = _in_vain(config, path.split("."), with_it)
            if where and value not in (None, {}, []):
                key, allowed = f"arms.{name}.overrides.{path}", f"does nothing here: it counts {where}"
                raise UserError(f"{place}: {key}", value, allowed, "leave it out, or set that too")
        for key in arm if isinstance(arm, Mapping) else ():
            counts_for, where = OF_POLICIES.get(key, (None, ""))
            if counts_for is not None and not counts_for({**arm, "name": str(arm.get("policy"))}):
                allowed = f"does nothing here: it counts {where}"
                raise UserError(f"{place}: arms.{name}.{key}", arm[key], allowed, "leave it out, or set that too")


def _single(overrides: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the overrides of an arm one by one, with groups taken apart."""
    for key, value in overrides.items():
        path = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            yield from _single(value, f"{path}.")
        else:
            yield path, value


def _in_vain(config: Config, parts: Sequence[str], others: Collection[str]) -> str:
    """Return where this path would count, if it does not; empty if it counts, or one of `others` may be the reason."""
    for above in (".".join(parts[: i + 1]) for i in range(len(parts))):
        counts, where = COUNTS.get(above, (None, ""))
        if counts is not None and not counts(config) and not _varies(parts, others) and _is_known(config, parts):
            return where
    return ""


def _varies(parts: Sequence[str], others: Collection[str]) -> bool:
    """Whether one of the other paths changes the group of this one (in workload, the group within it)."""
    if parts[0] == "workload":
        return any(tuple(parts[:2])[: len(other)] == other for path in others if (other := tuple(path.split(".")[:2])))
    groups = _WITH.get(parts[0], (parts[0],))
    return any(path == "mode" or path.partition(".")[0] in groups for path in others)


def _is_known(config: Config, parts: Sequence[str]) -> bool:
    """Whether the kinds of arrivals and lengths that decide are known; unknown ones are refused elsewhere."""
    workload = config.workload
    if parts[:2] == ["workload", "arrivals"]:
        return workload.arrivals.kind in ARRIVALS
    drawn = [workload.lengths.prompt.kind, workload.lengths.output.kind] if parts[1:2] == ["lengths"] else []
    return all(kind in DRAWN_LENGTHS for kind in drawn)


def _at(settings: Any, parts: Sequence[str]) -> Any:
    for name in parts:
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings
