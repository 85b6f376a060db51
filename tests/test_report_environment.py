"""Templates of pages are compiled once on a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import Environment

from helios_sim.report.environment import page_environment

NAME = "report.html.j2"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HELIOS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def loaded(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many templates a new process compiles for a page."""
    compiled = []
    whole = Environment.compile

    def compile(environment: Environment, source: str, *arguments: object) -> object:
        compiled.append(source)
        return whole(environment, source, *arguments)

    page_environment.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Environment, "compile", compile)
        page_environment().get_template(NAME)
    page_environment.cache_clear()
    return len(compiled)


def kept(cache: Path) -> list[Path]:
    return [path for path in (cache / "templates").rglob("*") if path.is_file()]


def test_what_was_compiled_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(monkeypatch) == 1
    assert len(kept(cache)) == 1
    assert loaded(monkeypatch) == 0


@pytest.mark.parametrize("damage", ["empty", "cut off", "another text"])
def test_what_is_damaged_is_made_anew(cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    loaded(monkeypatch)
    (file,) = kept(cache)
    whole = file.read_bytes()
    damaged = {"empty": b"", "cut off": whole[:-1], "another text": whole.replace(b"<html", b"<hTml")}[damage]
    assert damaged != whole
    file.write_bytes(damaged)
    assert loaded(monkeypatch) == 1
    assert loaded(monkeypatch) == 0


def test_a_folder_that_cannot_be_written_is_done_without(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.joinpath("cache").write_text("a file, where a folder is to be")
    assert loaded(monkeypatch) == 1
    assert loaded(monkeypatch) == 1
