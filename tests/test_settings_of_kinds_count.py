"""Each setting of a capacity plan, of designs, logs, live serving and presentation changes something, or is refused.

What is compared is what the setting is for: a plan, what a log becomes, the engine that a comparison sets up, a written
answer. `test_settings_count` has the settings of the simulation itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import capacity_example
import log_samples
import sweep_example
from command_line import CommandLine
from helios_sim import UserError, study_config
from helios_sim.config import kind_of
from helios_sim.exits.rule import FullDepth
from helios_sim.observe.settings import ObserveConfig
from helios_sim.profile.devices import device_of
from helios_sim.report.write import summarise_capacity, summarise_designs
from helios_sim.serve.settings import ServeConfig
from helios_sim.study import sweep as sweeps
from helios_sim.study.capacity import capacity
from helios_sim.study.command import processes, run, run_study
from helios_sim.study.designs import search
from helios_sim.study.effects import check_effect
from helios_sim.study.fleet import in_json
from helios_sim.study.jobs import run_job
from helios_sim.study.plan import plan_study
from helios_sim.study.schema import PRESENTATION, Config, FigureConfig, GateConfig, PublishedConfig, SweepConfig
from helios_sim.validate import live as live_runs
from helios_sim.validate.command import compare
from helios_sim.validate.from_log import asked
from helios_sim.validate.logs import read_log
from helios_sim.validate.opened import open_log, prepared
from helios_sim.validate.setup import set_up
from helios_sim.vary.axis import AxisConfig, axes_of
from helios_sim.vary.settings import known_settings, with_settings
from test_settings_count import GROUPS
from vllm_log import write_log

pytestmark = pytest.mark.slow
NOT_SUMMARISED = ("wall_s", "provenance", "configuration", "schema_version")


@dataclass(frozen=True)
class Case:
    """A value that differs from the one there, and what else is set in both."""

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)
    log: str = ""
    is_refused: bool = False


def leaves(*groups: str) -> set[str]:
    known = known_settings(Config)
    return {name for name, kind in known.items() if not is_dataclass(kind) and name.split(".")[0] in groups}


def plain(value: Any) -> str:
    """All of a value as text, arrays in full, without times that a run took and paths of a test."""
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()
    if is_dataclass(value):
        return plain({f.name: getattr(value, f.name, None) for f in fields(value)})
    if isinstance(value, Mapping):
        return json.dumps({str(key): plain(v) for key, v in value.items() if key not in NOT_SUMMARISED})
    if isinstance(value, tuple | list):
        return json.dumps([plain(v) for v in value])
    return repr(value)


def shown(case: Case, name: str, base: Config, answer: Callable[[Config], str]) -> None:
    """The setting changes the answer, or UserError."""
    before = with_settings(base, case.beside)
    if case.is_refused:
        with pytest.raises(UserError):
            answer(with_settings(before, {name: case.value}))
        return
    changed = with_settings(before, {name: case.value})
    check_effect(changed, [f"{name}=1"])
    assert answer(changed) != answer(before)


ANSWERS: dict[tuple[str, str], str] = {}


def once(answer: Callable[[Config], str], config: Config, kind: str = "plan") -> str:
    """Many cases begin at the same settings."""
    key = kind, in_json(asdict(config))
    if key not in ANSWERS:
        ANSWERS[key] = answer(config)
    return ANSWERS[key]


# --- a capacity plan


CAPACITY = {
    "cards": Case(["h100-80gb"]), "loads": Case([2.0]), "by": Case("p50"), "attainment": Case(0.5),
    "seconds": Case(1.5), "most_replicas": Case(1), "search": Case("every", {"capacity.most_replicas": 4}),
    "beyond": Case(0),
}  # fmt: skip


@cache
def _planned() -> Config:
    arms = {"full_depth": {"policy": "full_depth"}}
    return capacity_example.example(capacity={"cards": ["a100-40gb"], "seconds": 1.0}, arms=arms, seeds=[0])


@pytest.mark.parametrize("name", CAPACITY)
def test_of_a_capacity_plan(name: str) -> None:
    shown(CAPACITY[name], f"capacity.{name}", _planned(), lambda c: once(_plan_of, c))


def _plan_of(config: Config) -> str:
    """With how many fleets it took."""
    found = capacity(config)
    return plain(summarise_capacity(found)) + str(len(found.tried))


# --- designs


SEARCH = {"sweep.method": "search", "sweep.designs": 40, "sweep.generation": 5}
DESIGNS = {
    "parameters": Case({"limit": sweep_example.FREE["limit"]}, SEARCH), "method": Case("search", {"sweep.designs": 3}),
    "arm": Case("full_depth"), "objectives": Case(["throughput_requests_per_s"]), "designs": Case(4, SEARCH),
    "generation": Case(2, SEARCH), "sampler": Case("tpe", SEARCH), "seed": Case(1, SEARCH),
    "backend": Case("processes"), "workers": Case(1, {"sweep.backend": "processes"}),
    "address": Case("local", {"sweep.backend": "ray"}),
}  # fmt: skip


@pytest.mark.parametrize("name", DESIGNS)
def test_of_designs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they run is said by the place that workers are asked for, which run here all the same."""
    places = []

    class Here(sweeps.Workers):
        def __init__(self, place: sweeps.Place) -> None:
            places.append(place)
            super().__init__(sweeps.Place())

    monkeypatch.setattr(sweeps, "Workers", Here)
    base = sweep_example.example(parameters={"cap_bound": sweep_example.FREE["cap_bound"]})
    if DESIGNS[name].beside.get("sweep.method") != "search" and name != "method":
        bound = replace(sweep_example.FREE["cap_bound"], low=None, high=None, values=[0.02, 0.2])
        base = replace(base, sweep=replace(base.sweep, parameters={"cap_bound": bound}))
    if name == "method":
        bound = replace(sweep_example.FREE["cap_bound"], step=0.1)
        base = replace(base, sweep=replace(base.sweep, parameters={"cap_bound": bound}))

    def answer(config: Config) -> str:
        if name in ("designs", "generation", "sampler", "seed"):  # what is asked for, of a cost in closed form
            asked: list[Any] = []
            objectives = len(config.sweep.objectives)

            def costs(choices: list[Any]) -> list[list[float]]:
                asked.append([choice.shown for choice in choices])
                return [[choice.shown["cap_bound"] * (-1) ** n for n in range(objectives)] for choice in choices]

            search(axes_of("sweep.parameters", config.sweep.parameters), config.sweep, costs)
            return plain(asked)
        return plain(summarise_designs(sweeps.sweep(config))) + repr(places.pop())

    shown(DESIGNS[name], f"sweep.{name}", base, answer)


# --- logs


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("logs")
    made = {
        "plain": write_log(folder / "plain", requests=12, output=10),
        "other": write_log(folder / "other", requests=10, output=10),
        "two": write_log(folder / "two", requests=12, output=10, tensor_parallel=2),
        "counted": write_log(folder / "counted", requests=12, output=10, blocks=400),
        "servegen": log_samples.write_servegen(folder / "servegen"),
    }
    report = log_samples.guidellm()
    report["benchmarks"] = [*report["benchmarks"], json.loads(json.dumps(report["benchmarks"][0]))]
    report["benchmarks"][1]["requests"]["successful"].pop()
    totals = report["benchmarks"][1]["metrics"]["request_totals"] | {"successful": 3, "total": 4}
    report["benchmarks"][1]["metrics"] = {"request_totals": totals}  # the others would be of four requests
    (folder / "two.json").write_text(json.dumps(report))
    bare = folder / "bare"
    shutil.copytree(made["plain"], bare)
    return made | {"runs": folder / "two.json", "bare": bare}


NO_BLOCKS = {"fidelity.kv_blocks": None}
FIDELITY = {
    "compare": Case(True, {"fidelity.folder": None}), "folder": Case("other"), "model": Case("Qwen/Qwen2.5-1.5B"),
    "hardware": Case("H100"), "memory_bytes": Case(2**34), "memory_utilisation": Case(0.5), "kv_blocks": Case(77),
    "tensor_parallel": Case(1, log="two"), "schedule_ahead": Case(0),
    "link.latency_s": Case(1e-3, log="two"), "link.bytes_per_s": Case(1e9, log="two"), "estimate": Case(False),
    "estimate_from": Case(3, {"fidelity.estimate": False}), "mixed_term": Case(False),
    "unequal_kv_term": Case(False), "scheduler": Case("plain"),
    "load_factors": Case([0.5], {"fidelity.estimate": False}),
    "profile_error": Case(0.5, {"fidelity.estimate": False, "fidelity.load_factors": [1.0]}),
    "silicon": Case(True, {"fidelity.folder": None}), "rows": Case("other.csv", {"fidelity.silicon": True}),
}  # fmt: skip
COMPARED = ("estimate", "estimate_from", "load_factors", "profile_error")


@pytest.mark.parametrize("name", FIDELITY)
def test_of_a_comparison_with_a_log(name: str, logs: dict[str, Path], tmp_path: Path) -> None:
    case = FIDELITY[name]
    base = study_config("fidelity_vllm", f"fidelity.folder={logs[case.log or 'plain']}", "fidelity.load_factors=[]")

    def answer(config: Config) -> str:
        if name in ("compare", "silicon"):
            bare = with_settings(config, {"fidelity.compare": config.fidelity.compare and name == "compare"})
            return kind_of(bare)
        if name in COMPARED:
            return plain(compare(config).fidelity)
        if name == "rows":
            return str(config.fidelity.rows)
        log = read_log(Path(config.fidelity.folder or ""))
        return plain(set_up(log, config.fidelity)) + plain(log.prompt_tokens)

    if name == "compare":
        base = with_settings(base, {"fidelity.compare": False})
    value = str(logs["other"]) if name == "folder" else case.value
    shown(replace(case, value=value), f"fidelity.{name}", base, answer)


def test_rows_of_silicon_are_those_of_the_file(command: CommandLine) -> None:
    said = command("+experiment=fidelity_silicon", "fidelity.rows=gone.csv")
    assert (said.status, "gone.csv" in said.err) == (1, True)


@pytest.mark.parametrize(
    ("log", "settings"),
    [
        ("plain", {"link.latency_s": 1e-3}), ("plain", {"link.bytes_per_s": 1e9}),
        ("plain", {"kv_blocks": 9, "memory_utilisation": 0.5}), ("plain", {"kv_blocks": 9, "memory_bytes": 2**34}),
        ("counted", {"memory_utilisation": 0.5}), ("counted", {"memory_bytes": 2**34}),
    ],
)  # fmt: skip
def test_what_a_comparison_would_not_look_at_is_refused(logs: dict[str, Path], log: str, settings: dict) -> None:
    config = with_settings(Config(), {f"fidelity.{key}": value for key, value in settings.items()})
    with pytest.raises(UserError, match=r"does nothing here|null: the log gives"):
        set_up(read_log(logs[log]), config.fidelity)


def test_a_term_that_tables_lack_is_not_left_out(logs: dict[str, Path]) -> None:
    (logs["bare"] / "profile" / "skew.csv").unlink(missing_ok=True)
    config = with_settings(Config(), {"fidelity.unequal_kv_term": False})
    with pytest.raises(UserError, match="no such term"):
        set_up(read_log(logs["bare"]), config.fidelity)


FROM_LOG = {
    "replay": Case(True, {"from_log.log": None}), "log": Case("other"), "part": Case(2, {"from_log.part": 1}, "runs"),
    "span_s": Case([0.0, 30.0], {"from_log.span_s": [0.0, 60.0]}, "servegen"), "kernels": Case(False),
    "engine_of_log": Case(False, {"from_log.kernels": False}), "kv_blocks": Case(99), "estimate": Case(False),
    "share": Case(0.8), "models": Case(["opt-1.3b"]), "cards": Case(["h100-80gb"]),
}  # fmt: skip
OF_KNOWN_CARD = {"models": ["Qwen/Qwen2.5-0.5B"], "hardware": "rtx4090"}


@pytest.mark.parametrize("name", FROM_LOG)
def test_of_a_study_of_a_log(name: str, logs: dict[str, Path], tmp_path: Path, command: CommandLine) -> None:
    case = FROM_LOG[name]
    base = with_settings(study_config("from_log"), {"from_log.log": str(logs[case.log or "plain"])} | OF_KNOWN_CARD)
    value = str(logs["other"]) if name == "log" else case.value

    def answer(config: Config) -> str:
        if name == "replay":
            return kind_of(config)
        opened = open_log(config)
        if name in ("part", "span_s"):
            return plain(opened.log)
        changed, told = prepared(opened, config, tmp_path)
        return plain(asked(changed, config, None)) + plain(opened.log) + plain(told)

    if name in ("estimate", "share"):
        parts = []
        for word in (f"from_log.{name}={str(value).lower()}", "from_log.share=0.5"):
            said = command("+experiment=from_log", f"log={logs['plain']}", "pictures=false", "next_best=none",
                           "profile_band=none", word, into=f"out{len(parts)}")  # fmt: skip
            parts.append(said.summary["fidelity"])
        assert parts[0] != parts[1]
        return
    if name == "replay":
        base = with_settings(base, {"from_log.replay": False})
    shown(replace(case, value=value), f"from_log.{name}", base, answer)


@pytest.mark.parametrize(
    ("log", "settings"),
    [
        ("plain", {"part": 1}), ("plain", {"span_s": [0.0, 9.0]}), ("runs", {"part": 1, "span_s": [0.0, 9.0]}),
        ("runs", {"part": 1, "kernels": False}), ("runs", {"part": 1, "engine_of_log": False}),
    ],
)  # fmt: skip
def test_what_a_log_does_not_have_is_refused(logs: dict[str, Path], log: str, settings: dict) -> None:
    changes = {f"from_log.{key}": value for key, value in settings.items()}
    config = with_settings(study_config("from_log"), {"from_log.log": str(logs[log]), **OF_KNOWN_CARD, **changes})
    with pytest.raises(UserError, match="does nothing here"):
        open_log(config)


# --- live serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Config:
    pytest.importorskip("torch")
    from live_study import write_live_study

    folder = tmp_path_factory.mktemp("live")
    write_live_study(folder)
    words = ("mode=live", "~arms.early_exit", "workload.n_requests=3")
    return study_config("tiny_live", *words, config_dir=folder / "conf")


LIVE = {
    "device": Case("cuda:99", is_refused=True), "devices": Case(["cuda:99"], is_refused=True),
    "dtype": Case("bfloat16", is_refused=True), "threads": Case(3),
    "kernels": Case("triton", is_refused=True), "weights": Case("other"),
    "heads": Case({"tiny": "gone"}, is_refused=True), "texts": Case("texts"),
    "warm_up": Case(2), "score": Case(True), "run": Case(1), "pace_every_s": Case(1e-6),
}  # fmt: skip


@pytest.mark.parametrize("name", LIVE)
def test_of_live_serving(name: str, served: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from helios_sim.live import pace
    from helios_sim.live.served import open_models, read_texts
    from helios_sim.study import live
    from helios_sim.study.build import build_profile, exit_trace

    warm: list[int] = []

    def stop(*given: Any) -> None:
        warm.append(given[-1])
        raise UserError("warm", 0, "enough seen", "go on")

    monkeypatch.setattr(pace, "warm_up", stop)
    threads = torch.get_num_threads()
    (tmp_path / "texts").write_text("Other words than those. " * 40)

    def answer(config: Config) -> str:
        if name == "run":
            return plan_study(config).jobs[0].key
        if name == "warm_up":
            with pytest.raises(UserError, match="enough seen"):
                run_job(plan_study(config).jobs[0])
            return str(warm.pop())
        if name == "score":
            return plain(known_after_serving(config))
        if name == "pace_every_s":
            return plain(looked_at_pace(config, monkeypatch))
        profiles = {model: build_profile(config, model) for model in config.models}
        tasks = ("text",)
        traces = {model: exit_trace(config, model, profile).bind(tasks) for model, profile in profiles.items()}
        found = open_models(live.wanted(config), profiles, traces)
        texts = read_texts(tasks, config.live.texts).prompt(0, 0, 20)
        return f"{[one.checkpoint.source for one in found.values()]}, {texts}, {torch.get_num_threads()}"

    case = LIVE[name]
    other = str(Path(served.profile_folder or "").parent / "other")
    value = {"weights": {"tiny": other}, "texts": str(tmp_path / "texts")}.get(name, case.value)
    base = with_settings(served, {"live.threads": 2})
    try:
        shown(replace(case, value=value), f"live.{name}", base, answer)
    finally:
        torch.set_num_threads(threads)


def known_after_serving(config: Config) -> Mapping[str, Any]:
    from helios_sim.study.live import LiveRun

    served, nothing = LiveRun.__new__(LiveRun), np.zeros(1, np.int64)
    served._config, served.meters = config, {"cpu": SimpleNamespace(energy_j=None)}  # type: ignore[dict-item]
    at_full_depth = SimpleNamespace(deployment=SimpleNamespace(exit_rule=FullDepth()))
    served.replicas = [SimpleNamespace(server=SimpleNamespace(decisions=[at_full_depth]))]  # type: ignore[list-item]
    records = SimpleNamespace(completed=nothing > 0, output_chars=nothing, output_tokens=nothing)
    return served.measured({"agreement": 0.9, "bits_per_char": 1.0}, records)


def looked_at_pace(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The steps that are timed beside a run and within it."""
    from helios_sim.study.live_replica import Pace

    timed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Pace, "_note", lambda self, *step: timed.append(step))
    engine = SimpleNamespace(residents=SimpleNamespace(layers={"tiny": 6}))
    clock, meter = SimpleNamespace(wall_ns=1, stopped=nullcontext), SimpleNamespace(left_out=nullcontext)
    looks = Pace(engine, {}, clock, meter, config.live.pace_every_s)
    looks.look_beside()
    looks.look_within("tiny")
    return timed


def test_threads_of_a_card_are_refused() -> None:
    config = with_settings(study_config("quickstart"), {"mode": "live", "live.device": "cuda"})
    with pytest.raises(UserError, match=r"only with live\.device=cpu"):
        check_effect(config, ["live.threads=2"])


@pytest.mark.parametrize("word", ["live.weights.opt-13b=x", "+live.heads={opt-1.3b: x, other: y}"])
def test_what_is_said_of_other_models_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"of others it does nothing here"):
        check_effect(with_settings(study_config("quickstart"), {"mode": "live"}), [word])


FIDELITY_LIVE = {
    "loads": Case([0.5]), "seconds": Case(30.0), "least_requests": Case(900), "passes": Case(3),
    "calibrate_s": Case(60.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FIDELITY_LIVE)
def test_of_a_comparison_with_live_serving(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is served: what would be is noted. A calibration that fails leaves what it was asked for."""
    base = with_settings(study_config("fidelity_live"), {"fidelity_live.loads": [0.4, 0.8], "seeds": [0]})
    base = replace(base, arms=dict([next(iter(base.arms.items()))]))
    monkeypatch.setattr(live_runs.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1))
    monkeypatch.setattr(live_runs, "run_jobs", lambda jobs, *a: {job.key: None for job in jobs})
    monkeypatch.setattr(live_runs, "_capacity_per_s", lambda result: 2.0)
    served: list[str] = []

    def noted(config: Config, so_far: Any, turn: int, changes: Any, folder: Path) -> Any:
        pair = live_runs._pair(config, so_far.cell, turn, changes)
        served.append(f"{so_far.cell.load} {pair.live.config.workload.n_requests}")
        return so_far

    monkeypatch.setattr(live_runs, "_with_pass", noted)

    def answer(config: Config) -> str:
        served.clear()
        profiled = live_runs.measured_profiles(config, tmp_path)
        live_runs.compared_cells(config, {}, tmp_path)
        return plain(profiled) + plain(served)

    shown(FIDELITY_LIVE[name], f"fidelity_live.{name}", base, answer)


# --- what is shown


ARMS = {"full_depth": {"policy": "full_depth", "model": "opt-1.3b"}, "static_cap": {"policy": "static_cap"}}
SWEPT = SweepConfig([AxisConfig(name="most", settings=["server.max_running_requests"], values=[2])], ["full_depth"])
AUTO = {"seeds": "auto", "auto_seeds.first": 2, "auto_seeds.at_most": 4, "auto_seeds.relative_width": 1e-6}
GATE = GateConfig("quick", "static_cap", "e2e_s_mean", high=9.0)
CLAIM = PublishedConfig("w", 2.0, arm="static_cap")
FIGURE = FigureConfig(kind="arms", x="e2e_s_mean")
SHOWN = {
    "name": Case("other"), "title": Case("Other title"), "question": Case("Why?"), "profile_band": Case([0.5, 2.0]),
    "next_best": Case("none"), "policy": Case({"name": "early_exit", "model": "opt-1.3b"}),
    "arms": Case({"static_cap": None}), "baseline": Case("static_cap"), "subject": Case("full_depth"),
    "seeds": Case([1]), "auto_seeds.relative_width": Case(9.0, AUTO), "auto_seeds.first": Case(3, AUTO),
    "auto_seeds.at_most": Case(3, AUTO), "sweeps": Case([SWEPT]), "published": Case([CLAIM]), "gates": Case([GATE]),
    "headline_metrics": Case(["e2e_s_mean"]), "jobs": Case(1), "trace": Case(True), "pictures": Case(True),
    "figures": Case([FIGURE]),
    "report.style": Case("paper", {"pictures": True}), "workload.statement": Case("Other words."),
}  # fmt: skip
WRITTEN = ("trace", "pictures", "report.style")
HELIOS = {"policy": "helios", "round_requests": 10, "limit": 5}


def small() -> Config:
    words = ("workload.n_requests=30", "pictures=false", "profile_band=none", "workload.lengths.output.maximum=20")
    empty: dict[str, Any] = {"figures": [], "published": [], "gates": [], "sweeps": [], "subject": None}
    config = study_config("quickstart", *words)
    arms = {name: entry for name, entry in config.arms.items() if name == "static_cap"}
    full = {"policy": "full_depth", "model": "opt-1.3b"}
    return replace(config, arms={"full_depth": full, **arms}, baseline="", seeds=[0], **empty)


@pytest.mark.parametrize("name", SHOWN)
def test_of_presentation(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written(config: Config) -> str:
        folder = tmp_path / str(len(ANSWERS))
        folder.mkdir()
        run_study(config, folder)
        return plain(sorted(str(path.relative_to(folder)) for path in folder.rglob("*")))

    def answer(config: Config) -> str:
        if name == "jobs":
            return str(processes(config))
        return once(written, config, "files") if name in WRITTEN else once(lambda c: plain(run(c)), config, "result")

    base = small()
    if name == "next_best":
        base = replace(base, arms={**base.arms, "helios": HELIOS}, next_best="all")
    shown(SHOWN[name], name, base, answer)


# --- a card of one's own


CARD = {
    "name": "mine", "hbm_gib": 80, "hbm_gb_per_s": 3350, "tflops": 989, "tdp_w": 700, "idle_w": 70, "load_gb_per_s": 50,
    "link_gb_per_s": 400, "link_us": 5, "source": "its data sheet", "fp8_tflops": 1979, "int8_tflops": 1979,
    "fp4_tflops": 3958,
}  # fmt: skip
OTHER = {key: f"another {value}" if isinstance(value, str) else 1.2 * value for key, value in CARD.items()}
NEEDS = {"fp8_tflops": "fp8", "int8_tflops": "int8", "fp4_tflops": "nvfp4"}


@pytest.mark.parametrize("key", CARD)
def test_of_a_card_of_ones_own(key: str, tmp_path: Path) -> None:
    """As a group of two, whose link counts, and in a format whose rate counts."""
    from helios_sim.study.build import build_profile

    found = []
    for number, values in enumerate((CARD, CARD | {key: OTHER[key]})):
        path = tmp_path / f"{number}.yaml"
        path.write_text(json.dumps(values))
        words = [] if key not in NEEDS else [f"server.quantization={NEEDS[key]}"]
        config = study_config("own", "models=[Qwen/Qwen2.5-7B]", f"hardware=2x{path}", "exits.source=none", *words)
        profile = build_profile(config, config.models[0])
        assert device_of(config.hardware).cards == 2
        found.append(plain(profile).replace(path.name, "card.yaml"))
    assert found[0] != found[1]


# --- servers and clients


@pytest.mark.parametrize(("settings", "files"), [(ServeConfig, "serve*.py"), (ObserveConfig, "observe.py")])
def test_of_servers_and_their_clients(settings: type, files: str) -> None:
    """Each is set by a test in which it counts, of a server that runs or of the words that are sent."""
    here = Path(__file__).parent
    text = "".join(path.read_text() for path in (*here.glob(f"test_{files}"), here / "served.py"))
    group = settings.__name__.removesuffix("Config").lower()
    short = ("url", "out", "model", "api") if group == "observe" else ()
    for name in (f.name for f in fields(settings)):
        assert f"{group}.{name}" in text or f"Config({name}=" in text or (name in short and f'"{name}=' in text), name


# --- all of them


def test_every_setting_is_tried() -> None:
    tried = {
        "capacity": CAPACITY, "sweep": DESIGNS, "fidelity": FIDELITY, "from_log": FROM_LOG, "live": LIVE,
        "fidelity_live": FIDELITY_LIVE,
    }  # fmt: skip
    assert set(tried) == {*GROUPS, "capacity"}
    for group, cases in tried.items():
        assert {name.removeprefix(f"{group}.") for name in leaves(group)} == set(cases)
    assert leaves(*PRESENTATION) - leaves(*tried) == set(SHOWN) - {"workload.statement"}
