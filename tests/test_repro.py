"""`python -m helios_sim repro FOLDER`: a colleague runs a study once more, and is told whether it gives the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import CommandLine, write_study

POLICY = """
from helios_sim import Deployment, FullDepth, KvRule, Placement
class Mine:
    def start(self, situation):
        return Deployment(Placement("opt-1.3b", 24), FullDepth(), kv_rule=KvRule.NONE)
    def decide(self, cause, telemetry):
        return None
"""
OWN = "+arms.mine={policy: custom, object: 'mine:Mine'}"


@pytest.fixture(autouse=True)
def folders_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What differs stays among temporary files, which are the test's here."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def study(command: CommandLine, *words: str) -> None:
    assert command(*write_study(command.folder), "pictures=false", "jobs=1", *words).status == 0


def rewritten(folder: Path, name: str, before: str, after: str) -> None:
    text = (folder / name).read_text()
    assert before in text
    (folder / name).write_text(text.replace(before, after))


@pytest.mark.slow
def test_the_same_here_from_the_folder_alone(command: CommandLine) -> None:
    study(command, "seeds=[0,1]")
    made = json.loads((command.folder / "out/provenance.json").read_text())
    assert {"the program", "profile opt-1.3b@a100-40gb"} <= set(made["made_of"])
    (command.folder / "out").rename(command.folder / "from a colleague")
    said = command("repro", "from a colleague")
    assert (said.status, said.out) == (0, "the same to the last bit: from a colleague\n")


@pytest.mark.slow
def test_other_settings_are_other_results_and_both_are_kept(command: CommandLine) -> None:
    study(command)
    rewritten(command.folder / "out", "provenance.json", '"n_requests": 12', '"n_requests": 11')
    said = command("repro", "out")
    assert said.status == 2
    assert "requests.parquet: 24 rows of 28 columns before, 22 rows of 28 columns now" in said.out
    last = said.out.splitlines()[-1]
    assert last.startswith("NOT the same: out and what it gives here, ")
    assert (Path(last.rpartition(", ")[2]) / "summary.json").is_file()


@pytest.mark.slow
def test_one_number_that_differs_is_named(command: CommandLine) -> None:
    study(command)
    summary = json.loads((command.folder / "out/summary.json").read_text())
    summary["arms"]["early_exit"]["metrics"]["throughput_tokens_per_s"] = 1.0
    (command.folder / "out/summary.json").write_text(json.dumps(summary))
    said = command("repro", "out")
    assert said.status == 2
    assert "summary.json: arms.early_exit.metrics.throughput_tokens_per_s: 1.0 before, " in said.out.splitlines()[0]


@pytest.mark.slow
def test_an_input_that_changed_is_said_first(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(command.folder)
    policy = command.folder / "mine.py"
    policy.write_text(POLICY)
    study(command, OWN)
    policy.write_text(POLICY + "# a remark\n")
    said = command("repro", "out")
    assert said.status == 0
    assert said.out.splitlines()[0] == "policy file mine.py: another one"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        (("repro",), None, "name an output folder"),
        (("repro", "nowhere"), None, "name the output folder of a finished study"),
        (("repro", "out"), ('"n_requests"', '"n_requestz"'), "n_requestz"),
        (("repro", "out"), ('"configuration"', '"other"'), "the settings of a study"),
        (("repro", "out"), ('"mode": "simulate"', '"mode": "live"'), "is never twice the same"),
        (("repro", "out"), ('"n_requests": 12', '"n_requests": -1'), "n_requests"),
    ],
)
def test_what_cannot_be_run_is_one_message(
    command: CommandLine, words: tuple[str, ...], change: tuple[str, str] | None, message: str
) -> None:
    if change is not None:
        study(command)
        rewritten(command.folder / "out", "provenance.json", *change)
    said = command(*words)
    assert (said.status, said.out) == (1, "")
    assert message in said.err.splitlines()[-1]
