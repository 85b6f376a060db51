"""`+experiment=from_log`: a log replayed, fitted and asked, its mistakes, and what made a log found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import log_samples as samples
from command_line import CommandLine
from helios_sim.config import compose_config
from helios_sim.logs import own, read_folder
from helios_sim.study.build import build_profile
from helios_sim.study.inputs import inputs_of
from helios_sim.study.schema import Config
from helios_sim.validate.fit import Quantities, Replayed, estimate, replayed
from helios_sim.validate.from_log import AS_LOGGED, _of_percentiles
from helios_sim.validate.opened import answered, open_log, prepared
from helios_sim.vary.settings import with_settings
from vllm_log import change_meta, write_log

SMALL = ("+experiment=from_log", "pictures=false")


def requests(n: int = 40, gap_s: float = 0.08) -> list[dict]:
    """Lines of observe: one of them failed. Times as a server of nothing but waiting would have."""
    rng = np.random.default_rng(1)
    lines = []
    for i in range(n):
        prompt, output = int(rng.integers(50, 400)), int(rng.integers(5, 60))
        ttft = 0.02 + prompt * 5e-5
        lines.append({"arrival_s": i * gap_s, "prompt_tokens": prompt, "output_tokens": output, "ttft_s": ttft,
                      "e2e_s": ttft + 0.012 * (output - 1), "status": "ok"})  # fmt: skip
    lines[3] = {"arrival_s": 3 * gap_s, "prompt_tokens": 10, "status": "HTTP 429: too many requests"}
    return lines


def write(path: Path, lines: list[dict], **about: object) -> Path:
    path.write_text("\n".join([own.header(**about), *map(own.line, lines)]) + "\n")
    return path


@pytest.mark.slow
def test_the_folder_of_a_vllm_run_says_everything(command: CommandLine, tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", requests=40, output=20)
    said = command(*SMALL, f"log={folder}")
    assert said.status == 0, said.err
    parts = said.summary["fidelity"]["parts"]
    assert list(parts) == ["requests 21 to 40, predicted", "requests 1 to 20, fitted", "all 40 requests"]
    (rows, *_) = parts.values()
    assert {(row["group"], row["statistic"]) for row in rows} == {
        (group, statistic) for group in ("TTFT", "TPOT", "E2E") for statistic in ("mean", "p50", "p90", "p99")
    }
    assert all(row["band"][0] <= row["band"][1] for row in rows)
    assert list(said.summary["arms"]) == [AS_LOGGED]
    assert "price of decodes" in said.summary["fidelity"]["terms"]
    assert (tmp_path / "out" / "replayed.jsonl").is_file()
    table = [line for line in said.out.splitlines() if line.startswith(("TTFT", "TPOT", "E2E", "figure"))]
    assert len(table) == 13
    assert max(map(len, table)) <= 80


@pytest.mark.slow
def test_nothing_estimated_is_what_the_comparison_of_a_vllm_log_gives(command: CommandLine, tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", requests=24, output=20)
    ours = command(*SMALL, f"log={folder}", "from_log.estimate=false").summary["fidelity"]["parts"]["all 24 requests"]
    theirs = command(
        "+experiment=fidelity_vllm", f"fidelity.folder={folder}", "fidelity.estimate=false", "fidelity.load_factors=[]",
        "pictures=false", into="theirs",
    ).summary["fidelity"]["parts"]["all 24 requests"]  # fmt: skip
    named = {(row["group"], row["statistic"].replace("median", "p50")): row for row in theirs}
    for row in ours:
        other = named[row["group"], row["statistic"]]
        assert row["measured"] == pytest.approx(other["measured"])
        assert row["simulated"] == pytest.approx(other["simulated"])


@pytest.mark.slow
def test_a_log_of_clients_and_what_else_would_have_done(command: CommandLine, tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", requests(), model="facebook/opt-1.3b", users=8)
    said = command(
        "+experiment=from_log", "log=log.jsonl", "hardware=a100-40gb", "model=opt-1.3b", "from_log.cards=[h100-80gb]",
        "from_log.models=[opt-6.7b]", "exits.source=published", "policy=early_exit", "policy.model=opt-1.3b",
        "workload.mix.tasks={sharegpt: 1}",
    )  # fmt: skip
    assert said.status == 0, said.err
    assert list(said.summary["arms"]) == [AS_LOGGED, "on_h100-80gb", "with_opt-6.7b", "early_exit_opt-1.3b"]
    metrics = {name: arm["metrics"] for name, arm in said.summary["arms"].items()}
    assert metrics["on_h100-80gb"]["tpot_s_mean"] < metrics[AS_LOGGED]["tpot_s_mean"]
    assert metrics["with_opt-6.7b"]["tpot_s_mean"] > metrics[AS_LOGGED]["tpot_s_mean"]
    assert metrics["early_exit_opt-1.3b"]["layers_per_token"] < 24
    assert metrics[AS_LOGGED]["requests_completed"] == 39
    about = said.summary["provenance"]["log"]
    assert about["failed"] == {"HTTP 429: too many requests": 1}
    assert about["times_begin_when"] == "the client has sent the request"
    text = " ".join(said.out.split())
    assert "1 of 40 requests failed and are left out: 1 x HTTP 429: too many requests." in text
    assert "its client kept at most 8 requests in flight" in text
    assert "log.jsonl does not say: times of single tokens" in text
    (test, *_) = said.summary["fidelity"]["parts"].values()
    off = {f"{row['group']} {row['statistic']}": row["difference"] for row in test}
    assert abs(off["TPOT mean"]) < 0.03
    assert abs(off["TTFT mean"]) < 0.06
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Measured beside simulated" in page
    assert "95 %" in page
    assert log.is_file()


@pytest.mark.slow
def test_a_table_without_times_is_asked_and_not_compared(command: CommandLine, tmp_path: Path) -> None:
    rows = "".join(f"2023-11-16 18:15:{20 + i // 4:02d}.{i % 4}800000,{100 + i},{20 + i}\n" for i in range(40))
    (tmp_path / "azure.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    said = command(*SMALL, "log=azure.csv", "model=opt-1.3b", "hardware=a100-40gb", "from_log.cards=[h100-80gb]",
                   "workload.n_requests=20")  # fmt: skip
    assert said.status == 0, said.err
    assert "fidelity" not in said.summary
    assert said.summary["verdict"][0].startswith("azure.csv has no times: nothing was estimated or compared")
    assert said.summary["arms"]["on_h100-80gb"]["metrics"]["requests_completed"] == 20


@pytest.mark.slow
def test_quantities_that_made_a_log_are_found_again(tmp_path: Path) -> None:
    """A log written by the simulation itself tells what it was made with, and the second half follows."""
    rng = np.random.default_rng(2)
    lines = [
        {"arrival_s": float(at), "prompt_tokens": int(rng.integers(30, 900)), "output_tokens": int(rng.integers(5, 90)),
         "status": "ok"}
        for at in np.cumsum(rng.exponential(0.05, 100))
    ]  # fmt: skip
    write(tmp_path / "log.jsonl", lines)
    words = (f"log={tmp_path / 'log.jsonl'}", "model=opt-1.3b", "hardware=a100-40gb", "pictures=false")
    config = compose_config("from_log", words)
    opened = open_log(config)
    config, _ = prepared(opened, config, tmp_path)
    log = answered(opened.log, None)
    base = build_profile(config, "opt-1.3b").runtime
    true = Quantities(host=2.0, prefill_gap_s=0.003, decode_factor=1.15, prompt_factor=1.0)
    made = replayed(log, with_settings(config, true.settings(base, config)), AS_LOGGED)
    measured = replace(log, ttft_s=made.ttft_s, e2e_s=made.e2e_s)
    found = estimate(measured, config, AS_LOGGED, 50)
    run = replayed(log, with_settings(config, found.settings(base, config)), AS_LOGGED, found.warm_up_s)
    second = slice(50, None)
    assert run.e2e_s[second].mean() == pytest.approx(made.e2e_s[second].mean(), rel=0.02)
    assert run.ttft_s[second].mean() == pytest.approx(made.ttft_s[second].mean(), rel=0.03)
    tpot_s = [np.nanmean(times.tpot_s(log.output_tokens)[second]) for times in (run, made)]
    assert tpot_s[0] == pytest.approx(tpot_s[1], rel=0.02)
    plain = replayed(log, config, AS_LOGGED)
    assert plain.e2e_s[second].mean() < 0.8 * made.e2e_s[second].mean()


def test_what_is_at_its_limit_is_named() -> None:
    assert Quantities().at_limits() == ()
    assert Quantities(host=-1.0).at_limits() == ()  # an engine without any host time is one
    assert Quantities(host=50.0, decode_factor=4.0, prompt_factor=0.25).at_limits() == (
        "host time", "price of decodes", "price of prompts",
    )  # fmt: skip


def lengths_only(folder: Path) -> None:
    (folder / "lengths.csv").write_text("prompt_tokens,output_tokens\n" + "10,5\n" * 20)


def few(folder: Path) -> None:
    write(folder / "few.jsonl", requests(6))


def nothing(folder: Path) -> None:
    (folder / "empty").mkdir()


def whole(folder: Path) -> None:
    write(folder / "log.jsonl", requests(), model="facebook/opt-1.3b")


@pytest.mark.slow
def test_scrapes_of_metrics_are_replayed_and_their_buckets_compared(command: CommandLine, tmp_path: Path) -> None:
    samples.write_scrapes(tmp_path / "pages")
    said = command(*SMALL, "log=pages", "model=opt-1.3b", "hardware=a100-40gb")
    assert said.status == 0, said.err
    (compared,) = (line for line in said.summary["verdict"] if "simulated percentiles lie in the buckets" in line)
    assert "TTFT p50 0.0" in compared
    assert "(0 to 0.05)" in compared
    assert "pages does not say what its engine's limits were: server.max_batch_tokens=8192" in said.out
    assert "102 requests are drawn with seed 0" in " ".join(said.summary["provenance"]["log"]["notices"])
    assert len((tmp_path / "out" / "replayed.jsonl").read_text().splitlines()) == 1 + 102


@pytest.mark.slow
def test_a_percentile_lies_in_its_bucket_or_outside(tmp_path: Path) -> None:
    log = read_folder(samples.write_scrapes(tmp_path / "pages"))  # p50 up to 50 ms, p90 and p99 from 50 to 100 ms
    n = len(log)
    for ttft_s, inside in ((0.03, 1), (0.07, 2), (0.2, 0)):
        run = Replayed(np.full(n, ttft_s), np.full(n, ttft_s + 1), np.full(n, ttft_s), 0)
        (said,) = _of_percentiles(log, run)
        assert f"{inside} of 3 simulated percentiles lie in the buckets of pages" in said
    assert _of_percentiles(replace(log, percentiles={}), run) == []


@pytest.mark.parametrize(
    ("prepare", "words", "named"),
    [
        (whole, (), "log=None: a file or folder"),
        (whole, ("log=gone.json",), "log='gone.json'"),
        (whole, ("log=log.jsonl",), "hardware=None: which card served log.jsonl"),
        (whole, ("log=log.jsonl", "hardware=a100-40gb", "workload.arrivals.rate_scale=2"), "does nothing here"),
        (whole, ("log=log.jsonl", "hardware=a100-40gb", "from_log.part=2"), "from_log.part"),
        (whole, ("log=log.jsonl", "hardware=a100-40gb", "from_log.span_s=[0,9]"), "from_log.span_s"),
        (whole, ("log=log.jsonl", "hardware=a100-40gb", "from_log.kv_blocks=99999999"), "from_log.kv_blocks"),
        (whole, ("log=log.jsonl", "hardware=a100-40gb", "models=[opt-1.3b,opt-6.7b]"), "models"),
        (whole, ("log=log.jsonl", "hardware=a100-40gb", "server.max_batch_tokens=64", "from_log.kv_blocks=20"), "log="),
        (whole, ("log=log.jsonl", "hardware=a100-40gb", "model=llama-2-13b"), "log.jsonl on a100-40gb': a log of this"),
        (lengths_only, ("log=lengths.csv", "model=opt-1.3b", "hardware=a100-40gb"), "times at which requests came"),
        (few, ("log=few.jsonl", "model=opt-1.3b", "hardware=a100-40gb"), "at least 8"),
        (nothing, ("log=empty", "model=opt-1.3b", "hardware=a100-40gb"), "name the log's file itself"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_leave_nothing(
    command: CommandLine, tmp_path: Path, prepare: object, words: tuple[str, ...], named: str
) -> None:
    prepare(tmp_path)
    said = command(*SMALL, *words)
    assert said.status == 1
    assert named in said.err, said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_too_few_to_fit_are_replayed_alone(command: CommandLine, tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", requests(9), model="facebook/opt-1.3b")
    said = command(*SMALL, "log=log.jsonl", "hardware=a100-40gb")
    assert said.status == 0, said.err
    assert said.summary["fidelity"]["terms"] == {}
    assert "with nothing estimated" in said.summary["verdict"][0]


@pytest.mark.slow
def test_log_alone_makes_a_study_of_a_log(command: CommandLine, tmp_path: Path) -> None:
    whole(tmp_path)
    said = command("+experiment=own", "log=log.jsonl", "model=opt-1.3b", "hardware=a100-40gb", "pictures=false",
                   "from_log.estimate=false")  # fmt: skip
    assert said.status == 0, said.err
    assert AS_LOGGED in said.summary["arms"]
    assert json.dumps(said.summary["fidelity"]["terms"]) == "{}"


def test_what_the_log_states_of_its_engine_counts_without_its_kernels(tmp_path: Path) -> None:
    """Of a vLLM run whose times are priced by another card's kernels, and of the header of BLIS."""
    folder = write_log(tmp_path / "run", requests=24, tensor_parallel=2, blocks=900)
    engine = {"kv_cache_dtype": "fp8", "enforce_eager": True, "gpu_memory_utilization": 0.8, "dtype": "float32"}
    change_meta(folder, engine)

    def prepared_on(hardware: str, log: Path) -> tuple[Config, str]:
        config = compose_config("from_log", [f"log={log}", f"hardware={hardware}", "model=Qwen/Qwen2.5-0.5B"])
        changed, told = prepared(open_log(config), config, tmp_path)
        return changed, " ".join((*open_log(config).notices, *told))

    changed, told = prepared_on("l40s", folder)
    assert (changed.server.tensor_parallel, changed.server.kv_cache_dtype) == (2, "fp8")
    assert changed.runtime.preset == "eager"
    assert open_log(compose_config("from_log", [f"log={folder}", "hardware=l40s"])).kv_blocks == 899
    for said in ("server.tensor_parallel is 2, as the log states", "was in float32", "Prefix caching was on"):
        assert said in told
    changed, told = prepared_on("2xl40s", write_log(tmp_path / "alone"))
    assert changed.server.tensor_parallel == 1
    assert "hardware=2xl40s, and the log states tensor parallelism of 1" in told
    table = samples.write_blis(tmp_path / "blis", header={"server": {"model": "m", "tensor_parallel": 4}})
    assert prepared_on("l40s", table)[0].server.tensor_parallel == 4


def test_the_log_is_among_what_a_study_was_made_of(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", requests(), model="facebook/opt-1.3b")
    before = inputs_of(compose_config("from_log", [f"log={log}"]))[f"log {log}"]
    write(log, requests(30))
    assert inputs_of(compose_config("from_log", [f"log={log}"]))[f"log {log}"] != before
    folder = write_log(tmp_path / "run")
    assert f"log folder {folder}" in inputs_of(compose_config("fidelity_vllm", [f"fidelity.folder={folder}"]))
