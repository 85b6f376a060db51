"""What a person sees on a terminal: lines that fit, no number cut, no wall of JSON; programs get it as before."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from helios_sim.report.terminal import JSON_ASKED, TextTable, say, without_json
from helios_sim.study.command import end


class Terminal(io.StringIO):
    """80 columns wide, as any terminal that does not say."""

    def isatty(self) -> bool:
        return True


def table(cells: list[list[str]]) -> TextTable:
    found = TextTable("title")
    for place in range(len(cells[0])):
        found.column(f"column\n{place}", number=place > 0)
    for row in cells:
        found.row(row)
    return found


texts = st.text("0123456789.×%[] ", min_size=1, max_size=18).map(lambda text: "-".join(text.split()) or "x")


@given(
    cells=st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(texts, min_size=n, max_size=n), min_size=1, max_size=5)
    ),
    width=st.integers(40, 140),
)
def test_a_table_is_as_wide_as_the_terminal_and_no_cell_is_cut(cells: list[list[str]], width: int) -> None:
    lines = table(cells).lines(width=width)
    assert max(map(len, lines)) <= width
    words = [word for line in lines for word in line.split()]
    for row in cells:
        assert all(words.count(cell) >= row.count(cell) for cell in row)
    blocks = sum(set(line) == {"─"} for line in lines)
    assert sum(line.startswith("column") for line in lines) == blocks  # the first column stands in each


def test_elsewhere_a_row_is_a_line_however_wide() -> None:
    stream = io.StringIO()
    table([["arm", *["1" * 20] * 9]]).show(stream)
    assert sum(line.startswith("arm ") for line in stream.getvalue().splitlines()) == 1


def test_sentences_break_between_words() -> None:
    terminal, file = Terminal(), io.StringIO()
    sentence = "word " * 30 + "/a/path/that/is/longer/than/a/line/of/eighty/cells/and/is/one/word/to/copy/from/here"
    for stream in (terminal, file):
        say(sentence, stream)
    assert file.getvalue() == f"{sentence}\n"
    *lines, path = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join([*lines, path]) == " ".join(sentence.split())
    assert path == sentence.split()[-1]


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_terminal_gets_json_only_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    (tmp_path / "report.html").write_text("page")
    token = JSON_ASKED.set(False)
    try:
        assert without_json([*words, "a=1"]) == ["a=1"]
        assert end(lambda: None, tmp_path, {"metric": 1.5}) == 0
    finally:
        JSON_ASKED.reset(token)
    said = terminal.getvalue()
    assert f"page: {tmp_path}" in said.replace("\n", " ")
    assert ('{"metric": 1.5}' in said) == bool(words)


def test_a_pipe_gets_it_last(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    end(lambda: None, tmp_path, {"metric": 1.5})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"metric": 1.5}


@pytest.mark.parametrize("program", ["calibrate", "helios_sim", "observe", "serve"])
@pytest.mark.parametrize("columns", [60, 80, 140])
def test_help_fits_the_terminal_and_loses_no_word(
    program: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helios_sim import help as pages

    whole = pages.help_text(program, [])
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 40)))
    shown = pages.help_text(program, [])
    assert max(len(line) for line in shown.splitlines()) <= max(columns, max(map(len, shown.split())) + 8)
    assert shown.split() == whole.split()


def test_a_long_text_goes_on_in_its_column() -> None:
    remark = "times within about 52 %, known at their ends alone: all tables; briefly measured or assumed: serving"
    table = TextTable("stages")
    for name in ("stage", "status", "time", "remark"):
        table.column(name, number=name == "time")
    table.row(["profile", "done", "53.6 s", remark])
    table.row(["traces", "done", "7 s", ""])
    for width in (80, 100):
        lines = table.lines(width=width)
        assert max(map(len, lines)) <= width
        column = lines[2].index("remark")
        below = [line[column:] for line in lines[4:] if line.strip()]
        assert " ".join(part for part in below if part) == remark
        assert sum("─" in line for line in lines) == 1
    assert any(remark in line for line in table.lines())  # as long as it is where there is no terminal
    assert max(map(len, table.lines(width=40))) <= 40
