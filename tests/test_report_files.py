"""Output files: whole or not at all, strict JSON, clear errors, and the same bytes for the same result."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.files import json_value
from helios_sim.report import FOR_PAPER
from helios_sim.report.figures.style import PAPER
from helios_sim.report.metrics import DEFINITIONS
from helios_sim.report.page import render
from helios_sim.report.result import Comparisons, ExperimentResult, comparisons
from helios_sim.report.tables import print_table
from helios_sim.report.write import write_result
from report_example import BASELINE, example_result

ARMS = (BASELINE, "static_cap_opt-1.3b", "helios")


@pytest.fixture(scope="module")
def result() -> ExperimentResult:
    return example_result((1, 2), names=ARMS)


@pytest.fixture(scope="module")
def ratios(result: ExperimentResult) -> Comparisons:
    return comparisons(result)


@pytest.fixture(scope="module")
def folder(result: ExperimentResult, ratios: Comparisons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("out") / "deep" / "er"
    write_result(result, path, ratios)
    return path


@pytest.mark.slow
def test_summary_has_the_promised_shape(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["schema_version"] == 1
    assert (summary["experiment"], summary["baseline"]) == ("example", BASELINE)
    assert list(summary["arms"]) == list(ARMS)
    for name, arm in summary["arms"].items():
        assert set(arm["metrics"]) == set(DEFINITIONS)
        assert ("throughput_requests_per_s" in arm["vs_baseline"]) == (name != BASELINE)
        assert set(arm["intervals"]) == {metric for metric, value in arm["metrics"].items() if value is not None}
    assert summary["gates"][0] == {
        "name": "throughput error against the step engine",
        "value": 0.0,
        "bound": "= 0",
        "passed": True,
        "low": None,
        "high": None,
    }
    told = summary["intervals"]
    assert (told["level"], told["scope"], told["seeds"]) == (0.95, "over_seeds", 2)
    assert summary["provenance"]["class"] == "published"
    assert summary["arms"]["helios"]["metrics"]["energy_j_per_char"].keys() == {"low", "high"}
    helios = summary["arms"]["helios"]["vs_baseline"]["ttft_s_mean"]
    assert helios["low"] <= helios["ratio"] <= helios["high"]
    assert len(summary["points"]) == 10


@pytest.mark.slow
def test_tasks_are_told_apart_in_the_summary_and_on_the_page(folder: Path) -> None:
    tasks = json.loads((folder / "summary.json").read_text())["arms"]["helios"]["tasks"]
    assert list(tasks) == ["stories", "sums", "code"]
    assert sum(task["requests"] for task in tasks.values()) == 2 * 199  # two seeds, one request dropped in each
    assert tasks["code"]["bits_per_char"] == pytest.approx(1.2 + 0.02 * 0.07)
    page = (folder / "report.html").read_text()
    assert "By task" in page
    assert "1.201 bits/char" in page


def test_all_promised_files_are_there_and_no_scrap(folder: Path) -> None:
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    expected = {"summary.json", "requests.parquet", "decisions.parquet", "provenance.json", "report.html"}
    assert expected <= found
    pictures = found - expected
    assert {
        f"figures/{name}.png" for name in ("published", "load_0", "arms_3", "quality_4", "timeline_helios")
    } <= pictures
    assert all(p.startswith("figures/") and p.endswith(".png") for p in pictures)


def test_tables_hold_every_request_and_decision(folder: Path, result: ExperimentResult) -> None:
    from pyarrow import parquet

    requests = parquet.read_table(folder / "requests.parquet")
    assert requests.num_rows == sum(len(r.records) for a in result.arms.values() for r in a.replicates)
    decisions = parquet.read_table(folder / "decisions.parquet").to_pylist()
    assert len(decisions) == sum(len(a.decisions) for a in result.arms.values())
    switch = next(d for d in decisions if d["arm"] == "helios" and d["model"] == "opt-6.7b")
    assert switch["cause"] == "breach limit (window tokens 100, limit 50)"
    assert json.loads(switch["evidence"])["disagreement_upper"] == 0.094


@pytest.mark.slow
def test_the_same_result_gives_the_same_bytes(folder: Path, ratios: Comparisons, tmp_path: Path) -> None:
    write_result(example_result((1, 2), names=ARMS), tmp_path, ratios)
    for name in ("summary.json", "requests.parquet", "decisions.parquet", "report.html", "figures/latency.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.slow
def test_papers_get_vector_figures_on_white_beside_the_same_page(
    result: ExperimentResult, ratios: Comparisons, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("one", "two"):
        write_result(result, tmp_path / name, ratios, FOR_PAPER)
    assert not caplog.records  # on the fonts that are put into a PDF
    assert (tmp_path / "one" / "report.html").read_bytes() == (folder / "report.html").read_bytes()
    figures = tmp_path / "one" / "figures"
    names = sorted(path.stem for path in figures.glob("*.png"))
    assert names
    for suffix in ("svg", "pdf"):
        assert sorted(path.stem for path in figures.glob(f"*.{suffix}")) == names
    for path in figures.iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "figures" / path.name).read_bytes(), path.name
    svg = (figures / "latency.svg").read_text()
    assert PAPER not in svg
    assert "var(--" not in svg
    assert "<text" not in svg  # outlines: the fonts are inside
    pdf = (figures / "latency.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"FontFile2" in pdf
    assert b"/Type3" not in pdf  # which publishers refuse



def test_without_a_style_there_is_no_picture(result: ExperimentResult, ratios: Comparisons, tmp_path: Path) -> None:
    write_result(result, tmp_path, ratios, None)
    assert not (tmp_path / "figures").exists()
    assert not (tmp_path / "report.html").exists()


def test_details_are_open_in_print(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "details::details-content { content-visibility: visible" in page[page.index("@media print") :]


def test_page_needs_no_network_and_shows_every_part(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    tags = re.findall(r"<script[^>]*>", page)
    of_data = '<script type="application/json" data-figure='
    assert {re.sub('"[^"]*"$', "", tag[:-1]) for tag in tags} == {"<script", of_data}
    assert not re.search(r"<link|<img|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page)
    linked = re.findall(r'(?:src|href)="([^"#][^"]*)"', page)
    assert linked == []
    for heading in ("Read with care", "Arms", "Beside the published figures", "Gates", "Figures", "Decision log",
                    "What was served", "Costs that were not measured", "Where the numbers come from"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page, heading
    for text in ("runtime.host_overhead_s", "requests (0.5%) were dropped", "priced outside", "1.48×", *ARMS):
        assert text in page, text
    shapes: list[str] = re.findall(r'<(?:path|clipPath|g|symbol) id="([^"]+)"', page)
    assert len(shapes) > 10
    assert len(shapes) == len(set(shapes))  # the drawings do not share ids
    figure_ids = re.findall(r'<figure id="([^"]+)"', page)
    assert len(figure_ids) == len(set(figure_ids)) == 10


def test_page_escapes_what_users_write(ratios: Comparisons, result: ExperimentResult) -> None:
    evil = "<script>alert(1)</script>"
    page = render(replace(result, title=evil, question=evil, verdict=(evil,), warnings=(evil,)), ratios, [])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_table_fits_120_columns_off_a_terminal(result: ExperimentResult, ratios: Comparisons) -> None:
    out = io.StringIO()
    print_table(result, ratios, out)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text
    for arm in ARMS:
        assert arm in text
    assert re.search(r"helios +\S+ +1\.4\d× \[", text)


@pytest.mark.slow
def test_one_arm_and_nothing_else_is_enough(tmp_path: Path) -> None:
    full = example_result((1,), points=False)
    arm = replace(full.arms["helios"], timeline=None, decisions=(), exit_depths=())
    bare = replace(full, arms={"helios": arm}, baseline="helios", published=(), gates=(), inputs={}, assumptions=(),
                   warnings=(), figures=())  # fmt: skip
    summary = write_result(bare, tmp_path)
    assert summary["arms"]["helios"]["vs_baseline"] == {}
    assert summary["provenance"]["class"] is None
    assert (tmp_path / "report.html").stat().st_size > 5000


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        _write_half(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


def _write_half(path: Path) -> None:
    with files.replacing(path) as file:
        file.write(b"half of the ne")
        raise KeyboardInterrupt


def test_json_is_strict() -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.to_json({"a": float("nan")})
    assert json_value({"a": float("inf"), "b": (1, None)}) == {"a": None, "b": [1, None]}


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"output folder.*Fix"):
        files.write_json(tmp_path / "file" / "out" / "a.json", {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full on this system")
def test_a_full_disk_is_the_users_error(tmp_path: Path) -> None:
    """The write goes to a device without space: the old file stays, the message names the fix."""
    code = (
        "import os, sys; from pathlib import Path; from helios_sim import files\n"
        "beside = files._beside\n"
        "def full(path):\n"
        "    draft = beside(path); draft.symlink_to('/dev/full'); return draft\n"
        "files._beside = full\n"
        "Path.open = lambda path, mode: open(path, mode.replace('x', 'w'))\n"
        "files.write_text(Path(sys.argv[1]), 'new')"
    )
    path = tmp_path / "a.json"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "UserError" in done.stderr
    assert "free space" in done.stderr
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


OLD = {"a": b"old a", "b": b"old b", "header": b"old"}
NEW = {"a": b"new a", "header": b"new"}


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("at", range(6))
def test_an_interruption_never_leaves_files_of_two_writes(tmp_path: Path, monkeypatch, at: int) -> None:
    """Ctrl-C at the n-th step on the disk: the old files, or the new ones, or no header."""
    for name, content in OLD.items():
        (tmp_path / name).write_bytes(content)
    steps = iter(range(100))

    def stopping(step):
        def stopped(*args, **options):
            if next(steps) == at:
                raise KeyboardInterrupt
            return step(*args, **options)

        return stopped

    monkeypatch.setattr(files, "_sync", stopping(files._sync))
    monkeypatch.setattr(os, "replace", stopping(os.replace))
    if at < 4:
        with pytest.raises(KeyboardInterrupt):
            files.write_together(tmp_path, {"a": b"new a", "b": None}, "header", b"new")
        found = held(tmp_path)
        assert found == OLD if at < 2 else "header" not in found
        assert set(found) <= set(OLD)
    else:
        files.write_together(tmp_path, {"a": b"new a", "b": None}, "header", b"new")
        assert held(tmp_path) == NEW


def test_files_have_the_rights_that_the_umask_allows(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            files.write_text(tmp_path / "a", "x")
            files.write_together(tmp_path, {"b": b""}, "header", b"")
        finally:
            os.umask(before)
        assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "b", "header")} == {mode}
