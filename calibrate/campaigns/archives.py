"""Writes finished stages into archives and reads them back.

An archive holds one group of stages: `manifest.json` first (the campaign, the stages, a sha256 of every file), then the
stages' folders. It is written atomically, and again whenever a stage of its group is finished. Drafts of interrupted
stages are in a separate archive, so that a later call continues from their samples.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.progress import now
from calibrate.stages import DRAFTS, RECORD, STAGES, drafts_in, read_finished
from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.untrusted import parse_json, reading

FORMAT, SCHEMA_VERSION = "helios-sim campaign", 1
MANIFEST, SUFFIX = "manifest.json", ".tar.gz"
MAX_BYTES = 16 << 20  # largest archive
MAX_UNPACKED = 128 << 20
_STAGE = re.compile(r"\w[\w.-]{0,200}")
PASSING = {"scratch", "batches", "finished", ".hydra"}  # folders that a finished stage does not need any more
_LEAVE_OUT = "leave it out (its stages are measured anew), or copy it again"


@dataclass(frozen=True, slots=True)
class Written:
    """A written archive."""

    path: Path
    n_bytes: int
    left_out: tuple[str, ...]  # the largest files, if the archive would be too large


def write_archive(path: Path, campaign: str, state: Path, stages: Sequence[str], max_bytes: int = MAX_BYTES) -> Written:
    """Archive the stages' folders in `state`. If it is too large, the largest files are left out and listed."""
    chosen = [file for stage in stages for file in _files(state / STAGES / stage)]
    return _write(path, campaign, state, stages, chosen, max_bytes)


def write_drafts(path: Path, campaign: str, state: Path) -> None:
    """Archive the drafts of interrupted stages in `state`; write no archive if there are no drafts."""
    drafts = drafts_in(state)
    path.unlink(missing_ok=True)
    if drafts:
        place = state / DRAFTS
        chosen = [file for draft in drafts for file in (place / f"{draft}.json", *_files(place / draft))]
        _write(path, campaign, state, drafts, chosen, MAX_BYTES)


def _write(
    path: Path, campaign: str, state: Path, stages: Sequence[str], chosen: list[Path], max_bytes: int
) -> Written:
    left_out: list[Path] = []
    while True:
        content = _packed(campaign, state, stages, chosen, left_out)
        if len(content) <= max_bytes or not chosen:
            break
        described = {RECORD, *(f"{stage}.json" for stage in stages)}
        largest = max((f for f in chosen if f.name not in described), key=lambda f: f.stat().st_size)
        chosen.remove(largest)
        left_out.append(largest)
    files.write_bytes(path, content)
    return Written(path, len(content), tuple(str(f.relative_to(state)) for f in left_out))


def campaign_of(path: Path) -> str:
    """The name of the archive's campaign. Raises UserError if the archive is damaged."""
    return str(_checked(path)[0]["campaign"])


def read_archive(path: Path, campaign: str, state: Path) -> list[str]:
    """Unpack the archive's stages into `state` and return their names. Stages that lack a left-out file are skipped.

    If `state` has a stage already, the one that was finished later is kept. Raises UserError for a damaged archive or
    one of another campaign, before anything is written.
    """
    manifest, content = _checked(path)
    if manifest["campaign"] != campaign:
        allowed = f"it belongs to the campaign {manifest['campaign']}"
        raise UserError(
            "resume", str(path), allowed, f"name archives of {campaign}, or +campaign={manifest['campaign']}"
        )
    missing = {name.split("/")[1] for name in manifest["left_out"]}
    drafts = {_draft_of(name) for name in content if name.startswith(f"{DRAFTS}/")}
    found = [stage for stage in manifest["stages"] if stage not in {*missing, *drafts}]
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in content.items():
            files.write_bytes(Path(scratch) / name, data)
        theirs, ours = read_finished(Path(scratch)), read_finished(state)
        for stage in found:
            if stage not in theirs:
                raise UserError("resume", str(path), f"damaged: the record of {stage}", _LEAVE_OUT)
        for stage in found:
            if stage not in ours or ours[stage].finished_at < theirs[stage].finished_at:
                for name, data in content.items():
                    if name.startswith(f"{STAGES}/{stage}/"):
                        files.write_bytes(state / name, data)
    goes_on = drafts - {*drafts_in(state), *(name for name, stage in ours.items() if not stage.short)}
    for name, data in content.items():
        if name.startswith(f"{DRAFTS}/") and _draft_of(name) in goes_on:
            files.write_bytes(state / name, data)
    return found


def _draft_of(name: str) -> str:
    """The stage that a file of a draft belongs to: one of its outputs, or the record of its settings."""
    parts = name.split("/")
    return parts[1].removesuffix(".json") if len(parts) == 2 else parts[1]


def archives_in(places: Iterable[str]) -> list[Path]:
    """Archives named one by one or by their folder. Raises UserError for a path that does not exist."""
    found: list[Path] = []
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            found += sorted(path.glob(f"*{SUFFIX}"))
        elif path.is_file():
            found.append(path)
        else:
            raise UserError("resume", place, "archives of an earlier call, or a folder with them", "correct the path")
    return found


def _files(folder: Path) -> list[Path]:
    return [
        path for path in sorted(folder.rglob("*"))
        if path.is_file() and not PASSING & set(path.relative_to(folder).parts)
    ]  # fmt: skip


def _packed(
    campaign: str, state: Path, stages: Sequence[str], chosen: Sequence[Path], left_out: Sequence[Path]
) -> bytes:
    named = {str(path.relative_to(state)): path.read_bytes() for path in chosen}
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "campaign": campaign,
        "written_at": now(),
        "stages": list(stages),
        "left_out": [str(path.relative_to(state)) for path in left_out],
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in named.items()},
    }
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|") as archive,
    ):
        for name, data in {MANIFEST: files.to_json(manifest, indent=1).encode(), **named}.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return packed.getvalue()


def _checked(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the files, after checking every name and sha256. At most `MAX_UNPACKED` bytes are unpacked."""
    content: dict[str, bytes] = {}
    with reading("resume", str(path), "damaged, or no archive of a campaign", _LEAVE_OUT):
        with gzip.open(path) as zipped:
            limited: Any = _Limited(zipped, MAX_UNPACKED)
            with tarfile.open(fileobj=limited, mode="r|") as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isreg() else None
                    if file is None or member.name in content:
                        raise ValueError(f"{member.name[:80]!r} stands there twice, or is no file")
                    content[member.name] = file.read()
        manifest = parse_json(content.pop(MANIFEST))
        if (manifest["format"], manifest["schema_version"]) != (FORMAT, SCHEMA_VERSION):
            raise UserError("resume", str(path), f"this version reads version {SCHEMA_VERSION}", _LEAVE_OUT)
        wanted, stages, left_out = manifest["files"], manifest["stages"], manifest["left_out"]
        for stage in stages:
            if not _STAGE.fullmatch(stage):
                raise ValueError(f"{stage[:80]!r} is no name of a stage")
        for name in (*wanted, *left_out):
            parts = name.split("/")
            inside = (parts[0] == STAGES and parts[1] in stages) or (parts[0] == DRAFTS and _draft_of(name) in stages)
            if not inside or any(part in ("", ".", "..") for part in parts[2:]):
                raise ValueError(f"{name[:80]!r} is no file of a stage")
        campaign = manifest["campaign"]
        if not isinstance(campaign, str) or not isinstance(wanted, dict) or not isinstance(left_out, list):
            raise TypeError("its manifest is not one of a campaign")
    wrong = [name for name, digest in wanted.items() if hashlib.sha256(content.get(name, b"")).hexdigest() != digest]
    if wrong or set(content) != set(wanted):
        raise UserError("resume", str(path), f"damaged: {(wrong or ['its list of files'])[0]}", _LEAVE_OUT)
    return manifest, content


class _Limited:
    """A stream that gives a limited number of bytes, then raises an error."""

    def __init__(self, file: gzip.GzipFile, most_bytes: int) -> None:
        self._file, self._left = file, most_bytes

    def read(self, n_bytes: int = -1) -> bytes:
        data = self._file.read(self._left + 1 if n_bytes < 0 else min(n_bytes, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {MAX_UNPACKED} bytes")
        return data
