"""Archives of finished stages: whole or refused, and never more than they may be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibrate.campaigns.archives import archives_in, read_archive, write_archive, write_drafts
from calibrate.stages import DRAFTS, RECORD, STAGES, drafts_in, read_finished
from helios_sim.errors import UserError


def stage(state: Path, name: str, finished_at: str = "2026-01-01", **contents: bytes) -> None:
    folder = state / STAGES / name
    (folder / "scratch").mkdir(parents=True)
    (folder / "scratch" / "large.bin").write_bytes(b"x" * 1000)
    record = {"stage": name, "settings": {}, "needs": {}, "result": {"a": 1}, "wall_s": 1.5, "finished_at": finished_at}
    (folder / RECORD).write_text(json.dumps(record))
    for file, content in contents.items():
        (folder / file).write_bytes(content)


@pytest.fixture
def archive(tmp_path) -> Path:
    state = tmp_path / "state"
    stage(state, "one", data=b"first")
    stage(state, "two", data=b"second")
    return write_archive(tmp_path / "a.tar.gz", "mine", state, ["one", "two"]).path


def test_what_was_written_is_read_and_what_only_passes_is_not_kept(archive, tmp_path) -> None:
    assert read_archive(archive, "mine", tmp_path / "later") == ["one", "two"]
    found = read_finished(tmp_path / "later")
    assert found["two"].part("data").read_bytes() == b"second"
    assert found["one"].result == {"a": 1}
    assert not list((tmp_path / "later").rglob("large.bin"))


def test_the_same_stages_give_the_same_files_and_a_later_stage_wins(archive, tmp_path) -> None:
    newer = tmp_path / "newer"
    stage(newer, "two", finished_at="2026-02-01", data=b"again")
    write_archive(tmp_path / "b.tar.gz", "mine", newer, ["two"])
    for order in (("a", "b"), ("b", "a")):
        into = tmp_path / "".join(order)
        for name in order:
            read_archive(tmp_path / f"{name}.tar.gz", "mine", into)
        assert read_finished(into)["two"].part("data").read_bytes() == b"again"
        assert read_finished(into)["one"].part("data").read_bytes() == b"first"


def test_what_interrupted_stages_have_left_goes_on_unless_they_are_finished(tmp_path) -> None:
    def interrupted(state: Path, name: str, samples: str) -> None:
        (state / DRAFTS / name).mkdir(parents=True)
        (state / DRAFTS / name / "samples").write_text(samples)
        (state / DRAFTS / f"{name}.json").write_text('{"settings": {}, "needs": {}}')

    state, later, path = tmp_path / "state", tmp_path / "later", tmp_path / "f.tar.gz"
    write_drafts(path, "mine", state)
    assert not path.exists()
    for name in ("profile-opt-1.3b", "two", "three"):
        interrupted(state, name, "samples")
    write_drafts(path, "mine", state)
    stage(later, "two")
    interrupted(later, "three", "its own")
    assert read_archive(path, "mine", later) == []
    assert drafts_in(later) == ["profile-opt-1.3b", "three"]
    assert (later / DRAFTS / "profile-opt-1.3b" / "samples").read_text() == "samples"
    assert (later / DRAFTS / "three" / "samples").read_text() == "its own"
    write_drafts(path, "mine", tmp_path / "nothing")
    assert not path.exists()


def test_what_does_not_fit_is_left_out_and_its_stage_is_not_taken_for_finished(tmp_path) -> None:
    import random

    state, noise = tmp_path / "state", random.Random(0).randbytes(50_000)
    stage(state, "small", data=b"s")
    stage(state, "big", raw=noise)
    written = write_archive(tmp_path / "a.tar.gz", "mine", state, ["small", "big"], max_bytes=20_000)
    assert written.left_out == ("stages/big/raw",)
    assert written.path.stat().st_size <= 20_000
    assert read_archive(written.path, "mine", tmp_path / "later") == ["small"]


def test_an_archive_of_another_campaign_is_refused(archive, tmp_path) -> None:
    with pytest.raises(UserError, match=r"resume=.*belongs to the campaign mine.*other"):
        read_archive(archive, "other", tmp_path / "later")
    assert not (tmp_path / "later").exists()


@pytest.mark.parametrize("harm", ["cut", "flipped", "not one", "empty"])
def test_a_damaged_archive_is_refused_and_nothing_of_it_is_used(archive, tmp_path, harm) -> None:
    content = bytearray(archive.read_bytes())
    if harm == "cut":
        content = content[: len(content) // 2]
    elif harm == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        content = bytearray(b"no archive" if harm == "not one" else b"")
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"resume=.*damaged"):
        read_archive(archive, "mine", tmp_path / "later")
    assert not (tmp_path / "later").exists()


def test_archives_are_named_one_by_one_or_by_their_folder(archive, tmp_path) -> None:
    assert archives_in([str(tmp_path)]) == archives_in([str(archive)]) == [archive]
    with pytest.raises(UserError, match="gone"):
        archives_in([str(tmp_path / "gone")])
