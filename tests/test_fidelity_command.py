"""`+experiment=fidelity_vllm` on a folder made by the test: the whole command, its mistakes, and a real log's gates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from command_line import CommandLine
from helios_sim.errors import UserError
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.study.modes import FidelityConfig, LinkConfig
from helios_sim.validate.logs import read_log
from helios_sim.validate.replay import Quantities, Shared, estimate, run_once
from helios_sim.validate.setup import set_up
from helios_sim.workload.prefixes import SharedPrefixes
from vllm_log import read_requests, write_log, write_requests

EXPERIMENT = ("+experiment=fidelity_vllm", "fidelity.load_factors=[0.5,1.0]")
REAL = "serving_logs/rtxpro6000_llama31_8b_vllm019"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one_card", {}),
        ("two_cards", {"tensor_parallel": 2, "suffix": ".csv.gz"}),
        ("starved", {"blocks": 40, "output": 90, "requests": 30}),
    ],
)
def test_the_whole_command(
    command: CommandLine, tmp_path: Path, name: str, options: dict, request: pytest.FixtureRequest
) -> None:
    if name != "one_card":  # figures are drawn once
        request.getfixturevalue("sketched")
    folder = write_log(tmp_path / name, **options)
    said = command(*EXPERIMENT, f"fidelity.folder={folder}")
    assert said.status in (0, 2)
    assert said.err == ""
    summary = said.summary
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["arms"]) == ["measured", "simulated"]
    parts = summary["fidelity"]["parts"]
    half = len(read_requests(folder)) // 2
    assert list(parts)[1:] == [f"requests 1 to {half}", f"requests {half + 1} to {2 * half}"]
    rows = {(row["group"], row["statistic"], row["unit"]): row for row in next(iter(parts.values()))}
    for group in ("TTFT", "TPOT", "E2E"):
        for statistic in ("mean", "median", "p90", "p95", "p99"):
            row = rows[group, statistic, "ms"]
            assert row["difference"] == pytest.approx(row["simulated"] / row["measured"] - 1)
    assert rows["ITL", "mean", "ms"]["measured"] is None
    assert rows["system", "makespan", "s"]["simulated"] > 0
    assert {count["name"] for count in summary["fidelity"]["counts"]} == {"running", "waiting"}
    assert [point["load"] for point in summary["fidelity"]["load_errors"]] == [0.5, 1.0]
    assert len(summary["gates"]) == 7
    assert said.status == (0 if all(gate["passed"] for gate in summary["gates"]) else 2)
    assert ("FAILED" in said.out) == (said.status == 2)
    preempted = summary["arms"]["simulated"]["metrics"]["preemptions"]
    assert preempted > 0 if name == "starved" else preempted == 0
    requests = pq.read_table(tmp_path / "out" / "requests.parquet")
    assert requests.num_rows == 4 * half
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Measured beside simulated" in page
    for figure in ("running_and_waiting", "error_against_load"):
        assert (tmp_path / "out" / "figures" / f"{figure}.png").stat().st_size > 0


@pytest.mark.slow
def test_without_pictures_there_are_only_data(command: CommandLine, tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", requests=40, output=30)
    command("+experiment=fidelity_vllm", f"fidelity.folder={folder}", "pictures=false")
    assert (tmp_path / "out" / "summary.json").exists()
    assert not (tmp_path / "out" / "report.html").exists()


def test_quantities_that_made_a_log_are_found_again(tmp_path: Path) -> None:
    """A log written by the simulation itself, with a gap, a prefill gap and a warm-up, tells what they were."""
    folder = write_log(tmp_path / "log", requests=40, output=30)
    log = read_log(folder)
    setup = set_up(log, FidelityConfig())
    true = Quantities(warm_up_s=0.05, prefill_gap_s=0.004, gap_s=0.0005)
    made = run_once(log, true.applied(setup), true.warm_up_s).times
    found = estimate(replace(log, measured=made), setup, 20)
    assert found.warm_up_s == pytest.approx(0.055, abs=0.002)  # the first iteration's own gaps are in it
    assert found.prefill_gap_s == pytest.approx(0.004, rel=0.15)
    assert found.gap_s == pytest.approx(0.0005, rel=0.3)
    assert found.unequal_kv_part == 1.0


def test_what_is_queued_is_stamped_when_the_engine_looks(tmp_path: Path) -> None:
    log = read_log(write_log(tmp_path / "log"))
    times = run_once(log, set_up(log, FidelityConfig())).times
    assert times.queued_ns.min() == 0
    assert np.all(times.queued_ns >= log.arrival_ns)
    assert np.any(times.queued_ns > log.arrival_ns)
    assert np.all(times.queued_ns <= times.scheduled_ns)
    assert np.all(times.scheduled_ns < times.first_ns)


def test_prompts_of_a_log_that_are_told_to_begin_alike_find_each_other(tmp_path: Path) -> None:
    log = read_log(write_log(tmp_path / "log"))
    setup = set_up(log, FidelityConfig())
    alone = run_once(log, setup)
    long = np.flatnonzero(log.prompt_tokens > 64)
    rows = np.full(len(log), -1)
    rows[long] = 0
    together = run_once(log, setup, shared=Shared(SharedPrefixes.of([[(0, 64)]]), rows))
    assert together.stats.prefix_cache_hits == 64 * (len(long) - 1)
    assert alone.stats.prefix_cache_queries == 0
    ttft_ns = [run.times.first_ns - run.times.queued_ns for run in (alone, together)]
    assert ttft_ns[1].mean() < 0.95 * ttft_ns[0].mean()


def test_terms_change_what_they_are_about(tmp_path: Path) -> None:
    log = read_log(write_log(tmp_path / "log"))
    layers = (24,)

    def time_s(config: FidelityConfig, prefill: bool, least: int, most: int) -> float:
        profile = set_up(log, config).profile
        decode = Composition(
            layers, np.array([[4]]), np.array([[4 * 128]]), np.array([4]),
            prefill=(PrefillChunk(64, 0, 24),) if prefill else (),
            decode_kv_least=np.array([least]), decode_kv_most=np.array([most]),
        )  # fmt: skip
        return float(profile.iteration_time_s(decode)[0])

    plain = FidelityConfig(mixed_term=False, unequal_kv_term=False)
    both = FidelityConfig()
    assert time_s(both, False, 128, 128) == pytest.approx(time_s(plain, False, 128, 128))
    assert time_s(both, False, 32, 416) > 1.005 * time_s(plain, False, 32, 416)
    added_us = (time_s(both, True, 128, 128) - time_s(plain, True, 128, 128)) / 24 * 1e6
    assert added_us == pytest.approx(0.5 * 4 * (1 + 0.01 * 127), rel=0.01)  # half as much again, by the test's formula


def test_all_reduces_of_two_cards(tmp_path: Path) -> None:
    log = read_log(write_log(tmp_path / "log", tensor_parallel=2))
    step = Composition((24,), np.array([[8]]), np.array([[800]]), np.array([8]))
    times = []
    for latency_s in (20e-6, 120e-6):
        config = FidelityConfig(link=LinkConfig(latency_s=latency_s))
        times.append(float(set_up(log, config).profile.iteration_time_s(step)[0]))
    assert times[1] - times[0] == pytest.approx(2 * 24 * 100e-6)


def broken(folder: Path, change: str) -> FidelityConfig:
    meta = json.loads((folder / "meta.json").read_text())
    rows = read_requests(folder)
    match change:
        case "no meta":
            (folder / "meta.json").unlink()
        case "no engine":
            del meta["engine_kwargs"]
            (folder / "meta.json").write_text(json.dumps(meta))
        case "no limit":
            del meta["engine_kwargs"]["max_num_seqs"]
            (folder / "meta.json").write_text(json.dumps(meta))
        case "model":
            meta["model"] = "nobody/Unknown-9B"
            (folder / "meta.json").write_text(json.dumps(meta))
        case "data parallel":
            meta["engine_kwargs"]["data_parallel_size"] = 2
            (folder / "meta.json").write_text(json.dumps(meta))
        case "card":
            text = (folder / "profile" / "meta.yaml").read_text()
            (folder / "profile" / "meta.yaml").write_text(text.replace("RTX4090", "RTX1"))
        case "no requests":
            (folder / "requests.jsonl").unlink()
        case "no time":
            rows[3]["first_token_ts"] = None
            write_requests(folder, rows)
        case "times":
            rows[3]["last_token_ts"] = 0.0
            write_requests(folder, rows)
        case "no profile":
            (folder / "profile").rename(folder / "elsewhere")
        case "no dense" | "no attention" | "no per_sequence":
            (folder / "profile" / f"{change.split()[1]}.csv").unlink()
        case "column":
            table = folder / "profile" / "attention.csv"
            table.write_text(table.read_text().replace("n_decode", "decodes", 1))
        case "workload":
            (folder / "workload.csv").write_text("idx,arrival_ns,input_toks,output_toks\n0,0,5,5\n")
        case "skew":
            table = folder / "profile" / "meta.yaml"
            table.write_text(table.read_text().replace("measurement_iterations: 3", "measurement_iterations: 7"))
        case "memory":
            return FidelityConfig(folder=str(folder), memory_bytes=10**9)
    return FidelityConfig(folder=str(folder))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("no meta", "meta.json"), ("no engine", "engine_kwargs"), ("no limit", "max_num_seqs"),
        ("model", "fidelity.model"), ("data parallel", "data_parallel_size"), ("card", "fidelity.memory_bytes"),
        ("no requests", "requests.jsonl"), ("no time", "line 4: first_token_ts"), ("times", "requests.jsonl"),
        ("no profile", "profile"), ("no dense", "dense.csv"), ("no attention", "attention.csv"),
        ("no per_sequence", "per_sequence.csv"), ("column", "n_decode"), ("workload", "workload.csv"),
        ("skew", "measurement_iterations"), ("memory", "fidelity.kv_blocks"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path: Path, change: str, named: str) -> None:
    config = broken(write_log(tmp_path / "log"), change)
    with pytest.raises(UserError) as caught:
        set_up(read_log(Path(str(config.folder))), config)
    assert named in str(caught.value)


def test_parameters_give_what_is_missing(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", model="nobody/Unknown-9B", hardware="RTX1")
    config = FidelityConfig(model="Qwen/Qwen2.5-0.5B", kv_blocks=77, hardware="L4")
    setup = set_up(read_log(folder), config)
    assert (setup.kv_blocks, setup.profile.name) == (77, "qwen2.5-0.5b@L4")
    unnamed = set_up(read_log(folder), replace(config, hardware=None, kv_blocks=None, memory_bytes=24 * 2**30))
    assert unnamed.kv_blocks > 10_000


@pytest.mark.slow
def test_a_mistake_leaves_nothing_behind(command: CommandLine, tmp_path: Path) -> None:
    said = command(*EXPERIMENT, "fidelity.folder=nowhere")
    assert said.status == 1
    assert "fidelity.folder" in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "out").exists()
    without = command(*EXPERIMENT)
    assert without.status == 1
    assert "set fidelity.folder" in without.err


def test_a_logged_number_of_blocks_wins(tmp_path: Path) -> None:
    log = read_log(write_log(tmp_path / "log", blocks=40))
    assert set_up(log, FidelityConfig()).kv_blocks == 39  # the engine keeps one for itself


@pytest.mark.slow
@pytest.mark.usefixtures("sketched")
def test_the_real_log_within_its_gates(command: CommandLine, shared_data: Path) -> None:
    said = command("+experiment=fidelity_vllm", f"fidelity.folder={shared_data / REAL}", "fidelity.load_factors=[1.0]")
    assert {gate["name"]: gate["passed"] for gate in said.summary["gates"]} == dict.fromkeys(
        ("TTFT mean", "TTFT median", "TTFT p90", "TTFT p99", "TPOT mean", "E2E mean", "E2E p99"), True
    )
    assert said.status == 0
