"""The scripts of experiments/: each begins and ends as commands do."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from helios_sim.entry import script
from helios_sim.errors import UserError

SCRIPTS = sorted((Path(__file__).parents[1] / "experiments").rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_script_ends_in_a_message_and_takes_its_words_from_the_command_line(path: Path) -> None:
    last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    *_, ends = map(ast.unparse, last.body)
    assert ends in ("script(__file__, main)", "script(__file__, command)")


def absent(words: list[str]) -> None:
    Path(words[0]).read_bytes()


def refuses(words: list[str]) -> None:
    raise UserError("weights", words[0], "must be there", "run make models")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (absent, "measure: file='/nowhere/log': must be there. Fix: name one that is there; the head of the script"),
        (refuses, "measure: weights='/nowhere/log': must be there. Fix: run make models."),
    ],
)
def test_what_is_missing_is_one_message(work, said, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["measure.py", "/nowhere/log"])
    with pytest.raises(SystemExit) as ended:
        script("experiments/live_speed/measure.py", work)
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(said)


def test_a_script_that_says_nothing_of_its_status_has_ended_well(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["measure.py"])
    with pytest.raises(SystemExit) as ended:
        script("experiments/live_speed/measure.py", lambda words: None)
    assert ended.value.code == 0
