"""Published measurements beside their predictions: rows, the study of each, gates, and the command."""

from __future__ import annotations

import csv
from dataclasses import astuple, fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from command_line import CommandLine
from helios_sim import UserError, study_config
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.importers.aiconfigurator import TIME_BAND
from helios_sim.profile.runtimes import PRESETS
from helios_sim.study.build import build_profile
from helios_sim.study.jobs import Job
from helios_sim.study.presets import preset_names, preset_of, preset_settings
from helios_sim.validate.silicon import SHIPPED, Prediction, Row, job_of, not_read, predict, read_rows, settings_of
from helios_sim.validate.silicon_gates import OTHERS, name_of, result_of
from helios_sim.vary.settings import with_settings

ROW = Row(
    "one", "NVIDIA gap analysis", "vllm", "0.12.0", "Qwen/Qwen3-32B", "h100_sxm", "bf16", 1024, 40, 1, 4, 80.0, 10.0
)  # fmt: skip
NAMES = [f.name for f in fields(Row)]


def written(path: Path, *rows: Row, **changed: str) -> Path:
    """A file of rows, with some values of the last one changed."""
    lines = [dict(zip(NAMES, map(str, astuple(row)), strict=True)) for row in rows]
    lines[-1] |= changed
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, NAMES)
        writer.writeheader()
        writer.writerows(lines)
    return path


def job(row: Row = ROW) -> Job:
    return job_of(row, study_config("fidelity_silicon"))


@pytest.mark.slow
def test_the_shipped_rows_are_read_and_each_has_a_study() -> None:
    rows = read_rows(SHIPPED)
    assert len(rows) == 387
    assert {name_of(row) for row in rows} == set(OTHERS)
    assert 0.45 < np.mean([row.is_fitted for row in rows]) < 0.55
    for row in rows[::40]:
        assert job(row).config.workload.n_requests == 10 * row.concurrency


@pytest.mark.parametrize(
    ("column", "value", "allowed"),
    [
        ("isl", "1e3", "a whole number"), ("tp", "0", "a whole number"), ("ttft_ms", "nan", "a number"),
        ("tpot_ms", "-1", "a number"), ("tpot_ms", "inf", "a number"), ("model", "", "a text"),
        ("concurrency", "", "a whole number"), ("id", "one", "not that of row 2"),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_message_with_row_and_column(
    tmp_path: Path, column: str, value: str, allowed: str
) -> None:
    path = written(tmp_path / "rows.csv", ROW, replace(ROW, id="two"), **{column: value})
    with pytest.raises(UserError, match=rf"rows\.csv: row 3: {column}=.*{allowed}"):
        read_rows(path)


def test_a_file_without_rows_or_columns_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,source\n")
    with pytest.raises(UserError, match=r"columns=.*tpot_ms"):
        read_rows(path)
    path.write_text(",".join(NAMES) + "\n")
    with pytest.raises(UserError, match="at least one row"):
        read_rows(path)
    path.write_text(",".join(NAMES) + '\n"one')
    with pytest.raises(UserError, match=r"CSV|row 2"):
        read_rows(path)


def test_one_client_alone_is_the_sum_of_its_iterations() -> None:
    """Without a queue: the prompt's iteration, then one token an iteration, each with the host's time."""
    one = job()
    profile = build_profile(one.config, one.config.models[0])
    layers, none = profile.model.n_layers, np.zeros((1, 1), np.int64)
    chunk = (PrefillChunk(ROW.isl, 0, layers),)
    prompt_s = profile.iteration_time_s(Composition((layers,), none, none, np.array([1]), prefill=chunk))[0]
    rows = np.ones((ROW.osl - 1, 1), np.int64)
    context = ROW.isl + 1 + np.arange(ROW.osl - 1)[:, None]
    decodes_s = profile.iteration_time_s(Composition((layers,), rows, context, rows[:, 0]))
    found = predict(one)
    assert found.ttft_ms == pytest.approx(1e3 * prompt_s, rel=1e-6)
    assert found.tpot_ms == pytest.approx(1e3 * decodes_s.mean(), rel=1e-6)
    assert found.preemptions == 0
    assert profile.runtime.host_overhead_s == PRESETS["vllm-0.12"].host_overhead_s > 0


def test_what_a_harness_sets_is_in_the_study() -> None:
    of_vllm = settings_of(replace(ROW, source="InferenceMAX 2025-10-29", backend_version="0.10.2", precision="fp8"))
    assert of_vllm["server.max_running_requests"] == ROW.concurrency
    assert of_vllm["server.schedule_ahead"] == 1
    assert (of_vllm["workload.lengths.prompt.minimum"], of_vllm["workload.lengths.prompt.maximum"]) == (819, 1024)
    of_trtllm = replace(ROW, source="InferenceMAX 2025-10-29", backend="trtllm", backend_version="1.1.0rc2.post2")
    waits = settings_of(replace(of_trtllm, osl=1024))
    assert (waits["server.batch_wait_iterations"], waits["server.batch_wait_tokens"]) == (20, 14_745)
    assert settings_of(replace(of_trtllm, osl=1024, tp=8))["server.batch_wait_iterations"] == 0
    assert settings_of(ROW)["workload.lengths.output.value"] == ROW.osl


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"backend": "tgi"}, "trtllm or sglang"), ({"system": "tpu"}, "h100_sxm"), ({"precision": "int3"}, "nvfp4"),
        ({"tp": 3}, "1, 2, 4, 8"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_priced_is_not_left_out_of_a_gate(changed: dict[str, str], text: str) -> None:
    row = replace(ROW, id="odd", **changed)
    with pytest.raises(UserError, match=text):
        job(row)
    config = study_config("fidelity_silicon")
    good = [(ROW, Prediction(ROW.ttft_ms, ROW.tpot_ms, 0))]
    assert all(gate.passed for gate in result_of(good, {}, config, {}, shipped=False).gates)
    both = result_of([*good, (row, None)], {"odd": "why"}, config, {}, shipped=False)
    (mean,) = (gate for gate in both.gates if gate.name.startswith("TPOT of all, mean"))
    assert not mean.passed
    assert "1 rows not predicted" in mean.name
    assert both.not_predicted == [("odd", "why")]


def test_presets_are_found_by_version() -> None:
    assert preset_of("vllm", "0.12.0") == "vllm-0.12"
    assert preset_of("vllm", "0.11.2") == "vllm-0.10"
    assert preset_of("vllm", "0.5.3") == "vllm-0.6"
    assert preset_of("trtllm", "1.0.0rc3") == "trtllm-1.0"
    assert preset_of("sglang", "0.5.8.post1") == "sglang-0.5"
    assert preset_of("lmdeploy", "0.9") is None


def test_the_band_of_profiles_is_what_the_recorded_rows_say() -> None:
    recorded = (Path(__file__).parents[1] / "experiments" / "fidelity_silicon" / "results.md").read_text()
    assert f"lie from {TIME_BAND.low:.2f} to {TIME_BAND.high:.2f}." in recorded


@pytest.mark.slow
@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_a_word_of_the_command_line(name: str) -> None:
    """It sets what its file says, above the experiment; what is given beside it counts."""
    words = ("models=[llama-3.1-8b]", "hardware=h100", f"server.preset={name}")
    config = study_config("own", *words, "server.max_running_requests=7")
    expected = with_settings(study_config("own", *words[:2]), preset_settings(name))
    assert config.runtime.preset == name in PRESETS
    assert config.server == replace(expected.server, max_running_requests=7)
    with pytest.raises(UserError, match=r"runtime\.preset is set to"):
        study_config("own", *words, "runtime=eager")


def test_an_unknown_preset_is_one_message() -> None:
    with pytest.raises(UserError, match=r"server\.preset='vllm-0.13'.*Fix: the nearest: vllm-0.12 and vllm-0.19"):
        study_config("own", "server.preset=vllm-0.13")


@pytest.mark.slow
def test_the_command_predicts_rows_of_a_file(command: CommandLine, tmp_path: Path) -> None:
    found = predict(job())
    exact = replace(ROW, ttft_ms=found.ttft_ms + 12.8, tpot_ms=found.tpot_ms)
    written(tmp_path / "rows.csv", exact, replace(exact, id="moe", model="Qwen/Qwen3-235B-A22B"))
    said = command("+experiment=fidelity_silicon", "fidelity.rows=rows.csv", "pictures=false", "--json")
    assert said.status == 2, said.err
    assert "not predicted: moe" in said.out
    (first, *_) = said.summary["groups"]
    assert first["tpot"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert first["ttft"]["mean"] == pytest.approx(0.0, abs=1e-9)
    table = pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist()
    assert [row["predicted_tpot_ms"] for row in table] == [pytest.approx(found.tpot_ms), None]
    written(tmp_path / "rows.csv", exact)
    said = command("+experiment=fidelity_silicon", "fidelity.rows=rows.csv", into="again")
    assert said.status == 0, said.out + said.err
    assert (tmp_path / "again" / "report.html").read_text().count("<svg") == 1
    assert (tmp_path / "again" / "figures" / "silicon.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize(
    "word", ["server.max_batch_tokens=64", "hardware=h100", "fidelity.kv_blocks=9", "runtime=eager", "policy=helios"]
)
def test_what_does_nothing_is_refused(command: CommandLine, word: str) -> None:
    said = command("+experiment=fidelity_silicon", word)
    assert said.status == 1
    assert "does nothing here" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.slow
def test_rows_belong_to_their_experiment(command: CommandLine) -> None:
    said = command("fidelity.rows=rows.csv")
    assert said.status == 1
    assert "only" in said.err


@pytest.mark.slow
def test_a_study_with_fitted_host_times_says_so(command: CommandLine) -> None:
    """They are fitted to published runs, so the study's class is no better than that."""
    words = ("+experiment=own", "models=[qwen2.5-7b]", "hardware=h100", "exits.source=none", "policy=full_depth")
    for preset, found in (("vllm-0.12", "published"), ("vllm-0.24", "published"), (None, "derived")):
        given = () if preset is None else (f"server.preset={preset}",)
        said = command(*words, *given, "workload.n_requests=5", "pictures=false", into=str(preset))
        assert said.status == 0, said.err
        assert said.summary["provenance"]["class"] == found
        assert ("the engine's host time is fitted to published" in said.out) == (preset is not None)


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", ROW)
    assert not_read(path) == []
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([f"{header},spec,ep", *(f"{row},eagle,4" for row in rows)]) + "\n")
    assert not_read(path) == ["rows.csv: not read: spec, ep"]
