"""A finished campaign put where the project keeps such things: whole, over what was there, or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from calibrate.campaigns.archives import write_archive
from calibrate.campaigns.land import FROM, PAGE, PAGES, PROFILES, TO, land, main
from calibrate.stages import RECORD, STAGES
from campaign_checkout import checkout
from helios_sim.errors import UserError
from helios_sim.profile.store import read_profile, write_profile
from helios_sim.profile.synthetic import flat_profile

CARD = "h200"
GAIN = {"throughput_requests_per_s": 1.5, "e2e_s_mean": 0.5, "energy_wh_per_request": None, "batch_mean": 4.0}
CEILINGS = {"ceilings": {"read_bytes_per_s": 4.5e12, "flops_per_s": 7.9e14}}


def campaign(
    folder: Path, iteration_s: float = 0.001, *, worthless: bool = False, more: dict[str, dict] | None = None
) -> Path:
    """The output of one with two profiles and a headline; its archives are those of a real one."""
    pair = ["opt-1.3b", "opt-6.7b"]
    results = {"ceilings": CEILINGS} | {f"profile-{model}": {"name": f"{model}@{CARD}"} for model in pair}
    gains = [{"mode": "simulate", "load": "one user", "over": "early_exit", **GAIN}]
    results["headline-opt-6.7b"] = {"models": pair, "gains": gains}
    results["live-headline-opt-6.7b"] = {"models": pair, "gains": [*gains, {**gains[0], "mode": "live"}]}
    results |= more or {}
    state = folder / "state"
    for name, result in results.items():
        place = state / STAGES / name
        place.mkdir(parents=True)
        record = {"stage": name, "settings": {}, "needs": {}, "result": result, "wall_s": 1, "finished_at": "2027"}
        (place / RECORD).write_text(json.dumps(record))
        if name.startswith("profile-"):
            model = name.removeprefix("profile-")
            flat = flat_profile(iteration_s, n_layers=4, name=model)
            profile = replace(flat, hardware=replace(flat.hardware, name=CARD))
            write_profile(profile, place / "profile" / f"{model}@{CARD}")
    (state / STAGES / "ceilings" / "device.jsonl").write_text("[]\n")
    (state / STAGES / "headline-opt-6.7b" / "report.html").write_text("<p>a page</p>")
    write_archive(folder / "out" / "all.tar.gz", "card", state, list(results))
    stages = {name: {"result": result, "finished_at": "2027-01-02T03:04"} for name, result in results.items()}
    summary = {"campaign": "card", "worthless": worthless, "stages": {**stages, "live-x": {"result": None}}}
    summary["provenance"] = {"configuration": {"live": {"pair": pair}}}
    (folder / "out" / "summary.json").write_text(json.dumps(summary))
    (folder / "out" / "report.md").write_text("the report\n")
    shutil.rmtree(state)
    return folder / "out"


def test_everything_lies_where_the_project_looks_for_it(tmp_path, repository) -> None:
    into = checkout(tmp_path / "checkout", repository)
    written = land(campaign(tmp_path), into)
    assert {path.relative_to(into).as_posix() for path in written} == {
        "helios_sim/data/profiles/opt-1.3b@h200", "helios_sim/data/profiles/opt-6.7b@h200",
        "experiments/card_campaign/h200", "conf/experiment/measured_h200.yaml", "experiments/card_campaign/README.md",
    }  # fmt: skip
    assert {path.name for path in (into / PAGES / CARD).iterdir()} == {
        "summary.json", "report.md", "device.jsonl", "headline-opt-6.7b.html",
    }  # fmt: skip
    text = (into / PAGES / PAGE).read_text()
    part = text[text.index(FROM) : text.index(TO)]
    assert "| [h200](h200/report.md) | 2027-01-02 | 5 of 6 | 4500 | 790.0 |" in part
    assert "| opt-1.3b, opt-6.7b | live, one user | early_exit | 1.5 | 0.5 |  | 4 |" in part
    assert part.count("simulate, one user") == 1  # the headline that was also served live is not told twice
    assert "No card was at hand" not in text


def test_idle_power_that_was_measured_last_is_in_the_profiles(tmp_path, repository) -> None:
    into = checkout(tmp_path / "checkout", repository)
    land(campaign(tmp_path, more={"energy": {"found": {"opt-1.3b": {"idle_w": 0.5}}}}), into)
    for model in ("opt-1.3b", "opt-6.7b"):
        assert read_profile(into / PROFILES / f"{model}@{CARD}").hardware.idle_w == 0.5


def test_a_later_campaign_takes_the_place_of_the_same_card_and_the_rest_of_the_page_stays(tmp_path, repository) -> None:
    into = checkout(tmp_path / "checkout", repository)
    land(campaign(tmp_path / "first"), into)
    once = (into / PAGES / PAGE).read_text()
    stale = into / PROFILES / f"opt-1.3b@{CARD}" / "stale.parquet"
    stale.touch()
    land(campaign(tmp_path / "second", iteration_s=0.002), into)
    assert (into / PAGES / PAGE).read_text() == once
    assert not stale.exists()
    profile = read_profile(into / PROFILES / f"opt-1.3b@{CARD}")
    expected = flat_profile(0.002, n_layers=4, name="opt-1.3b")
    assert (profile.layer_tables[0].dense.time_s == expected.layer_tables[0].dense.time_s).all()


def test_the_experiment_that_it_writes_is_a_study_on_the_card(tmp_path, repository, capsys, monkeypatch) -> None:
    from command_line import CommandLine

    into = checkout(tmp_path / "checkout", repository)
    land(campaign(tmp_path), into)
    said = CommandLine(capsys, monkeypatch, tmp_path)(
        "--config-dir", str(into / "conf"), "+experiment=measured_h200", f"profile_folder={into / PROFILES}",
        "--cfg", "job",
    )  # fmt: skip
    assert said.status == 0, said.err
    assert "hardware: h200" in said.out
    assert "early_exit_opt-1.3b_batched" in said.out


@pytest.mark.parametrize(
    ("harm", "part"),
    [
        ("rehearsal", "this one is a rehearsal"),
        ("no summary", "with its summary.json"),
        ("no checkout", "a checkout of this project"),
        ("no marks", "a page with"),
        ("no profiles", "a device report and a profile"),
    ],
)
def test_what_cannot_land_leaves_everything_as_it_was(tmp_path, repository, harm: str, part: str) -> None:
    into = checkout(tmp_path / "checkout", repository)
    out = campaign(tmp_path, worthless=harm == "rehearsal")
    if harm == "no summary":
        (out / "summary.json").write_text("[]")
    elif harm == "no checkout":
        shutil.rmtree(into / PROFILES)
    elif harm == "no marks":
        (into / PAGES / PAGE).write_text("# a page\n")
    elif harm == "no profiles":
        (out / "all.tar.gz").unlink()
    before = {path: path.stat().st_mtime_ns for path in into.rglob("*")}
    with pytest.raises(UserError, match=part):
        land(out, into)
    assert {path: path.stat().st_mtime_ns for path in into.rglob("*")} == before


def test_the_command_prints_what_it_wrote_or_one_message(tmp_path, repository, capsys) -> None:
    into = checkout(tmp_path / "checkout", repository)
    assert main([str(campaign(tmp_path)), f"into={into}"]) == 0
    assert str(into / PROFILES / f"opt-6.7b@{CARD}") in capsys.readouterr().out
    assert main([f"into={into}"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
