"""Each setting of the schema changes a result at test size, or is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from helios_sim import UserError, study_config
from helios_sim.study.effects import COUNTS, check_effect
from helios_sim.study.fleet import in_json
from helios_sim.study.jobs import Job, run_job
from helios_sim.study.plan import plan_study
from helios_sim.study.schema import PRESENTATION, Config
from helios_sim.vary.columns import to_bytes
from helios_sim.vary.settings import known_settings, with_settings

pytestmark = pytest.mark.slow
GROUPS = ("live", "fidelity", "fidelity_live", "from_log", "sweep")  # each as a whole, in a study of its kind


@dataclass(frozen=True)
class Case:
    """A value that differs from the one there, and what else is set in both runs."""

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)
    experiment: str = "quickstart"


def arrivals(kind: str, **others: Any) -> dict[str, Any]:
    return {"workload.arrivals.kind": kind, **{f"workload.arrivals.{key}": value for key, value in others.items()}}


EVEN = {"small": 0.5, "prose": 0.5}
ASKED = {"cascade.kinds": ["small", "prose"]}


def routed(router: str, **cluster: Any) -> dict[str, Any]:
    """Two kinds of replicas that run every token whole, behind a router that goes by answers."""
    models = {"small": "smollm2-135m", "prose": "gemma3-270m"}
    kinds = {name: {"models": [model], "policy": "full_depth"} for name, model in models.items()}
    return {"cluster.kinds": kinds, "server.router": router, **{f"cluster.{key}": it for key, it in cluster.items()}}


def turns() -> dict[str, Case]:
    """Of sessions of two users, with the lengths of drawn texts."""
    path, users = "workload.sessions.turns", {"workload.sessions.users": 2}
    fixed = users | {f"{path}.value": 3}
    drawn = users | {f"{path}.kind": "lognormal", f"{path}.sigma": 0.5, f"{path}.mean": 4.0}
    median = users | {f"{path}.kind": "lognormal", f"{path}.sigma": 0.5, f"{path}.median": 4.0}
    percentiles = users | {f"{path}.kind": "lognormal", f"{path}.p50": 3.0, f"{path}.p95": 8.0}
    return {
        f"{path}.kind": Case("exponential", fixed | {f"{path}.mean": 6.0}),
        f"{path}.value": Case(5, fixed),
        f"{path}.mean": Case(7.0, drawn),
        f"{path}.sigma": Case(0.1, drawn),
        f"{path}.median": Case(7.0, median),
        f"{path}.p50": Case(6.0, percentiles),
        f"{path}.p95": Case(20.0, percentiles),
        f"{path}.minimum": Case(6, drawn),
        f"{path}.maximum": Case(2, drawn),
        "workload.sessions.users": Case(2, {f"{path}.value": 3}),
        "workload.sessions.max_tokens": Case(900, fixed),
    }


def autoscale() -> dict[str, Case]:
    beside = {
        "server.replicas": 3, "autoscale.least": 1, "autoscale.requests_per_replica": 2.0, "autoscale.start_s": 1.0,
        "autoscale.every_s": 1.0, "autoscale.down_after_s": 2.0,
    }  # fmt: skip
    other = {"least": 2, "requests_per_replica": 5.0, "start_s": 3.0, "every_s": 0.5, "down_after_s": 9.0, "first": 3}
    return {f"autoscale.{name}": Case(value, beside) for name, value in other.items()}


def lengths(of: str) -> dict[str, Case]:
    path = f"workload.lengths.{of}"
    fixed = {f"{path}.kind": "fixed", f"{path}.value": 50}
    percentiles = {f"{path}.p50": 60.0, f"{path}.p95": 200.0}
    return {
        f"{path}.kind": Case("fixed", {f"{path}.value": 50}),
        f"{path}.value": Case(60, fixed),
        f"{path}.mean": Case(90.0),
        f"{path}.sigma": Case(0.2),
        f"{path}.median": Case(90.0),
        f"{path}.p50": Case(70.0, percentiles),
        f"{path}.p95": Case(300.0, percentiles),
        f"{path}.minimum": Case(400),
        f"{path}.maximum": Case(100),
    }


PRIORITY = {"server.order": "priority", "workload.mix.priorities": {"gsm8k": 1}, "workload.arrivals.rate_per_s": 400.0,
            "server.max_running_requests": 2}  # fmt: skip
DRIFT = {"workload.mix.after": {"gsm8k": 1.0}, "workload.mix.drift": "step", "workload.mix.at": 0.5}
LINEAR = DRIFT | {"workload.mix.drift": "linear", "workload.mix.start": 0.2, "workload.mix.end": 0.6}
PERIODIC = DRIFT | {"workload.mix.drift": "periodic", "workload.mix.period": 0.5}
TRACE = {"workload.lengths.kind": "trace", "workload.lengths.trace": "TRACE", "workload.n_requests": 20}
TRACED = {**arrivals("trace", trace="TRACE"), **TRACE}
SHARED = {"server.enable_prefix_caching": True}
BY_TASK = {"server.router": "by_task", "cluster.kinds": {"a": {}, "b": {"server": {"max_running_requests": 1}}}}
HALVES = {"sharegpt": "a", "cnn_dailymail": "a", "gsm8k": "b", "codexglue": "b", "hellaswag": "b"}
WAITS = {"server.batch_wait_iterations": 3, "server.batch_wait_tokens": 9000, "workload.arrivals.rate_per_s": 400.0}
BUSY = {"workload.arrivals.rate_per_s": 400.0}
FAULTS = "workload.faults"
AT_S = {  # when each kind finds something to strike in the arms that are tried
    "replica_dies": 1.0, "iteration_fails": 1.0, "out_of_memory": 1.0, "load_fails": 0.1, "transfer_stalls": 0.1,
    "slow_card": 1.0,
}  # fmt: skip


def faults() -> dict[str, Case]:
    found = {f"{FAULTS}.retries": Case(0, {f"{FAULTS}.replica_dies.at_s": [1.0, 15.0]})}
    for kind, time_s in AT_S.items():
        path = f"{FAULTS}.{kind}"
        found[f"{path}.at_s"] = Case([time_s])
        found[f"{path}.rate_per_hour"] = Case(7200.0)
        found[f"{path}.replicas"] = Case([1], {f"{path}.at_s": [time_s], "server.replicas": 2})
        if kind in ("replica_dies", "transfer_stalls", "slow_card"):
            found[f"{path}.lasts_s"] = Case(3.0, {f"{path}.at_s": [time_s]})
    found[f"{FAULTS}.slow_card.factor"] = Case(5.0, {f"{FAULTS}.slow_card.at_s": [1.0]})
    return found


CASES: dict[str, Case] = {
    **faults(),
    "mode": Case("live", {"server.replicas": 2}),
    "hardware": Case("h100-80gb"),
    "models": Case(["opt-1.3b"], {"policy": {"name": "helios", "arm": "own"}}),
    "profile_time_factor": Case(1.1),
    "profile_prompt_time_factor": Case(1.1),
    "profile_folder": Case("nowhere"),
    "workload.n_requests": Case(59),
    "workload.chars_per_token": Case(3.0),
    "workload.arrivals.kind": Case("constant"),
    "workload.arrivals.rate_per_s": Case(5.0),
    "workload.arrivals.cv": Case(2.0, arrivals("gamma", cv=1.5)),
    "workload.arrivals.users": Case(3, arrivals("closed_loop", users=2)),
    "workload.arrivals.trace": Case("OTHER", TRACED),
    "workload.arrivals.time_unit": Case("ms", TRACED),
    "workload.arrivals.rate_scale": Case(2.0, TRACED),
    "workload.lengths.kind": Case("trace", {"workload.lengths.trace": "TRACE", "workload.n_requests": 20}),
    **lengths("prompt"),
    **lengths("output"),
    **turns(),
    "workload.system_prompts": Case({"gsm8k": 100}),
    "workload.lengths.id_tokens": Case(96, {**TRACE, "workload.lengths.trace": "TEXTS", **SHARED}),
    "workload.lengths.trace": Case("OTHER", TRACE),
    "workload.lengths.resample": Case(True, TRACE),
    "workload.mix.tasks": Case({"gsm8k": 3.0}),
    "workload.mix.after": Case({"codexglue": 1.0}, DRIFT),
    "workload.mix.drift": Case("linear", LINEAR | {"workload.mix.drift": "step"}),
    "workload.mix.at": Case(0.2, DRIFT),
    "workload.mix.start": Case(0.5, LINEAR),
    "workload.mix.end": Case(0.9, LINEAR),
    "workload.mix.period": Case(0.2, PERIODIC),
    "workload.mix.per": Case("seconds", PERIODIC),
    "workload.mix.priorities": Case({"codexglue": -1}, PRIORITY),
    "server.max_running_requests": Case(2, BUSY),
    "server.max_batch_tokens": Case(256),
    "server.memory_utilisation": Case(0.8),
    "server.block_tokens": Case(32),
    "server.enable_prefix_caching": Case(True, {"workload.system_prompts": {"gsm8k": 100}}),
    "server.replicas": Case(2),
    "server.schedule_ahead": Case(1),
    "server.tensor_parallel": Case(2),
    "server.quantization": Case("awq"),
    "server.kv_cache_dtype": Case("fp8", {"hardware": "h100-80gb"}),
    "server.kernels": Case("trtllm", {"hardware": "h100"}),
    "server.scheduler": Case("vllm_v1", BUSY | {"server.max_running_requests": 4, "server.schedule_ahead": 1}),
    "server.batch_wait_iterations": Case(9, WAITS),
    "server.batch_wait_tokens": Case(9000, WAITS | {"server.batch_wait_tokens": 200}),
    "server.order": Case("shortest_prompt", BUSY | {"server.max_running_requests": 2}),
    "server.router": Case("least_loaded", {"server.replicas": 3}),
    "cluster.kinds": Case({"a": {"count": 2}}),
    **autoscale(),
    "cluster.tasks": Case(HALVES, BY_TASK | {"cluster.tasks": {**HALVES, "sharegpt": "b"}}),
    "cluster.shares": Case({"small": 0.9, "prose": 0.1}, routed("mixed", shares=EVEN), "real_models"),
    "cluster.cascade.kinds": Case(["prose", "small"], routed("cascade", **ASKED), "real_models"),
    "cluster.cascade.escalate_below": Case(0.3, routed("cascade", **ASKED), "real_models"),
    "cluster.bandit.by_task": Case(False, routed("thompson"), "real_models"),
    "cluster.bandit.spread": Case(3.0, routed("thompson"), "real_models"),
    "cluster.bandit.costs": Case({"prose": 0.5}, routed("thompson"), "real_models"),
    "runtime.preset": Case("eager"),
    **{f"runtime.{name}": Case(0.001) for name in ("launch_s_per_layer", "sync_s", "host_overhead_s")},
    **{
        f"runtime.{name}": Case(0.001) for name in ("host_s_per_request", "gap_s", "gap_s_per_request", "prefill_gap_s")
    },
    "runtime.launch_s_per_graph": Case(0.001),
    "runtime.load_fixed_s": Case(0.5),
    "runtime.regroup_s": Case(0.001, {"arms.early_exit_opt-1.3b.batching": "rebatch"}),
    "runtime.load_gb_per_s": Case(1.0),
    "runtime.disk_gb_per_s": Case(0.5, {"server.sleep_level": 2, "runtime.disk_gb_per_s": 1.0}),
    "server.sleep_level": Case(2, {"runtime.disk_gb_per_s": 1.0}),
    "exits.source": Case("none"),
    "exits.threshold": Case(0.7, experiment="real_models"),
    "exits.confidence": Case("margin", experiment="real_models"),
    "exits.parameters": Case({"unchanged": 0.7}),
    "exits.guarantee.max_disagreement": Case(0.3, experiment="guarantee"),
    "exits.guarantee.failure": Case(0.9, experiment="guarantee"),
    "exits.guarantee.calibration_share": Case(0.8, experiment="guarantee"),
    "exits.guarantee.seed": Case(1, experiment="guarantee"),
    "objective.goal": Case("energy", {"workload.n_requests": 200}, experiment="real_models"),
    "objective.max_disagreement": Case(0.5, experiment="real_models"),
    "objective.max_bits_per_char": Case(1.0, experiment="real_models"),
    "objective.max_bits_ratio": Case(1.5, experiment="real_models"),
    "objective.bits_reference": Case("qwen2.5-coder-0.5b", experiment="real_models"),
    "objective.max_response_time_s": Case(
        0.5, {"objective.goal": "quality", "objective.max_bits_ratio": None}, experiment="real_models"
    ),
    "cost.usd_per_card_hour": Case(2.5),
    "cost.gco2e_per_kwh": Case(300.0),
    **{f"slo.{name}": Case(0.05) for name in ("ttft_s", "tpot_s", "e2e_s")},
}


REFUSED = ("mode", "profile_folder")  # at these values


def leaves() -> list[str]:
    known = known_settings(Config)
    return [name for name, kind in known.items() if not is_dataclass(kind) and name.split(".")[0] not in GROUPS]


def test_every_setting_is_tried_or_said_to_be_of_presentation() -> None:
    shown = {name for name in leaves() if name.split(".")[0] in PRESENTATION} | {"workload.statement"}
    assert set(leaves()) - shown == set(CASES)
    assert set(COUNTS) - set(GROUPS) <= {*known_settings(Config)}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("traces")
    found = {}
    for name, step in (("TRACE", 0.11), ("OTHER", 0.07)):
        rows = "".join(f"{n * step:.2f},{100 + n * 3},{20 + n + len(found)}\n" for n in range(30))
        (folder / f"{name}.csv").write_text(f"arrived_at,num_prefill_tokens,num_decode_tokens\n{rows}")
        found[name] = str(folder / f"{name}.csv")
    one = {"output_length": 20, "hash_ids": [0]}
    rows = [{"timestamp": 110 * n, "input_length": 100 + n * 3, **one} for n in range(30)]
    (folder / "TEXTS.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return found | {"TEXTS": str(folder / "TEXTS.jsonl")}


def made(case: Case, traces: Mapping[str, str]) -> Config:
    return with_settings(_base(case.experiment), {key: _named(value, traces) for key, value in case.beside.items()})


def _named(value: Any, traces: Mapping[str, str]) -> Any:
    return traces.get(value, value) if isinstance(value, str) else value


@cache
def _base(experiment: str) -> Config:
    config = study_config(experiment, "workload.n_requests=60")
    wanted = {"early_exit_opt-1.3b", "helios", "helios_probe", "static_choice", "early_exit_smollm2-135m"}
    arms = {name: entry for name, entry in config.arms.items() if name in wanted}
    empty: dict[str, Any] = {"sweeps": [], "figures": [], "published": [], "gates": [], "baseline": "", "subject": None}
    return replace(config, arms=arms, seeds=[0], **empty)


def outcome(config: Config) -> str:
    return " ".join(outcomes(config))


def outcomes(config: Config) -> Iterator[str]:
    """A digest of each arm's result; arms that nobody asks for are not run."""
    for job in plan_study(config).headline.jobs.values():
        yield _outcome(job[0])


_outcomes: dict[str, str] = {}  # many settings are changed from the same ones


def _outcome(job: Job) -> str:
    key = repr(job)
    if key not in _outcomes:
        kept = replace(run_job(job), wall_s=0.0, inputs={}, assumptions=(), notices=())
        _outcomes[key] = hashlib.sha256(to_bytes(kept)).hexdigest()
    return _outcomes[key]


@pytest.mark.parametrize("name", CASES)
def test_it_changes_a_result_or_is_refused(traces: dict[str, str], name: str) -> None:
    case = CASES[name]
    before = made(case, traces)
    value = _named(case.value, traces)
    if name in REFUSED:
        with pytest.raises(UserError):
            outcome(with_settings(before, {name: value}))
        return
    after = with_settings(before, {name: value})
    if name != "models":  # it is tried on an arm of its own
        check_effect(after, [f"{name}={in_json(value)}"])
    assert any(one != other for one, other in zip_longest(outcomes(after), outcomes(before)))


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_where_it_does_not_count_it_is_refused(command: CommandLine, tmp_path: Path, name: str) -> None:
    config = _base("quickstart")
    elsewhere = {
        "exits.": {"exits.source": "none"}, "workload.lengths": {"workload.lengths.kind": "trace"},
        "workload.arrivals.rate_per_s": arrivals("all_at_once"), "server.tensor_parallel": {"mode": "live"},
        "server.quantization": {"mode": "live"}, "server.kv_cache_dtype": {"mode": "live"},
        "server.sleep_level": {"mode": "live"},
        "cost": {"fidelity.folder": "log"},
        "server.kernels": {"mode": "live"}, "profile_band": {"mode": "live"}, "trace": {"mode": "live"},
            "next_best": {"mode": "live"},
        "report.style": {"pictures": False},
        "hardware": {"capacity.cards": ["l40s"]},
        "server.replicas": {"capacity.cards": ["l40s"]}, "workload.n_requests": {"capacity.cards": ["l40s"]},
    }  # fmt: skip
    of_a_log = ("workload.arrivals.kind", "workload.lengths.kind", "workload.sessions", "workload.system_prompts")
    if name in of_a_log:
        config = with_settings(config, {"from_log.log": "log.json"})
    for prefix, settings in elsewhere.items():
        config = with_settings(config, settings) if name.startswith(prefix) else config
    if name in ("workload.lengths.trace", "workload.lengths.resample"):
        config = _base("quickstart")
    word = f"{name}.device=cpu" if name == "live" else f"{name}.x=1" if name in GROUPS else f"{name}=1"
    if name == "workload.mix.drift":
        config = with_settings(config, {name: "step"})
    with pytest.raises(UserError, match="does nothing here"):
        check_effect(config, [word])
