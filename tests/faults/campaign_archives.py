"""Mutants of an archive of a campaign's stages: bytes, members, manifest and checksums, bombs, traversal."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import sys
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from faults import NAMES, Mutant, changed_bytes, changed_json, main

MANIFEST, STAGES = "manifest.json", ("ceilings", "profile-tiny")


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield Mutant("unchanged", lambda folder: _written(folder, _content()))
    while True:
        kind = rng.choice(("bytes", "tar", "manifest", "manifest", "record", "record", "member", "bomb"))
        members = _members()
        if kind == "bytes":
            what, content = changed_bytes(_content(), rng)
        elif kind == "tar":
            what, unpacked = changed_bytes(gzip.decompress(_content()), rng, rng.choice((512, 2048, None)))
            content = gzip.compress(unpacked, mtime=0)
        elif kind == "manifest":
            what, changed = changed_json(json.loads(members[MANIFEST]), rng)
            content = _packed([*{**members, MANIFEST: json.dumps(changed).encode()}.items()])
        elif kind == "record":
            name = rng.choice([n for n in members if n.endswith("stage.json")])
            what, changed = changed_json(json.loads(members[name]), rng)
            content = _packed(_summed({**members, name: json.dumps(changed).encode()}))
        elif kind == "member":
            what, content = _changed_member(members, rng)
        else:
            size = rng.choice((1 << 28, 1 << 30))
            what, content = f"{size} zeros", _bomb(size)
        yield Mutant(f"archive {kind}: {what}", lambda folder, content=content: _written(folder, content))


def read(path: Path) -> None:
    """Unpack the archive's stages and read them; nothing may appear outside the folder that is given."""
    from calibrate.campaigns.archives import read_archive
    from calibrate.stages import read_finished

    state = path.parent / "inside" / "state"
    before = {p for p in path.parent.rglob("*") if "inside" not in p.parts}
    try:
        found = read_archive(path, "mine", state)
        assert set(found) <= set(read_finished(state))
    finally:
        assert {p for p in path.parent.rglob("*") if "inside" not in p.parts} == before, "a file left the folder"
        assert set(path.parent.joinpath("inside").glob("*")) <= {state}, "a file left the folder"


def _changed_member(members: dict[str, bytes], rng: random.Random) -> tuple[str, bytes]:
    """A member that is renamed (with its checksum), doubled, a link, a device, or of a wrong size."""
    name = rng.choice([n for n in members if n != MANIFEST])
    kind = rng.choice(("rename", "rename", "double", "drop", "link", "device"))
    new = rng.choice((*NAMES, f"../{name}", f"stages/{STAGES[0]}/../../../escape", f"/{name}", f"stages/../{name}"))
    if kind == "rename":
        renamed = {new if n == name else n: data for n, data in members.items()}
        return f"{name} is named {new[:40]!r}", _packed(_summed(renamed))
    if kind == "drop":
        return f"without {name}", _packed([(n, data) for n, data in members.items() if n != name])
    if kind == "double":
        return f"{name} twice", _packed([*members.items(), (name, b"other")])
    what = tarfile.SYMTYPE if kind == "link" else tarfile.CHRTYPE
    return f"{name} is a {kind}", _packed([(n, what if n == name else data) for n, data in members.items()])


def _summed(members: dict[str, bytes]) -> list[tuple[str, bytes]]:
    manifest = json.loads(members[MANIFEST])
    manifest["files"] = {n: hashlib.sha256(d).hexdigest() for n, d in members.items() if n != MANIFEST}
    return [(MANIFEST, json.dumps(manifest).encode()), *((n, d) for n, d in members.items() if n != MANIFEST)]


def _packed(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w|") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data in (tarfile.SYMTYPE, tarfile.CHRTYPE):
                info.type, info.linkname = data, "../../../etc/passwd"
            else:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _bomb(size: int) -> bytes:
    info = tarfile.TarInfo(f"stages/{STAGES[0]}/zeros")
    info.size = size
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as zipped:
        zipped.write(info.tobuf())
        for _ in range(size >> 24):
            zipped.write(bytes(1 << 24))
    return out.getvalue()


@cache
def _content() -> bytes:
    from calibrate.campaigns.archives import write_archive

    with TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        for name in STAGES:
            place = state / "stages" / name
            place.mkdir(parents=True)
            record = {
                "stage": name, "settings": {"quick": True}, "needs": {}, "result": {"name": "x"}, "wall_s": 1.5,
                "finished_at": "2026-01-01T00:00:00",
            }  # fmt: skip
            (place / "stage.json").write_text(json.dumps(record))
            (place / "data.bin").write_bytes(bytes(range(256)))
        return write_archive(Path(folder) / "a.tar.gz", "mine", state, STAGES).path.read_bytes()


@cache
def _unpacked() -> tuple[tuple[str, bytes], ...]:
    with tarfile.open(fileobj=io.BytesIO(_content()), mode="r:gz") as archive:
        return tuple((m.name, file.read()) for m in archive if (file := archive.extractfile(m)) is not None)


def _members() -> dict[str, bytes]:
    return dict(_unpacked())


def _written(folder: Path, content: bytes) -> Path:
    (folder / "inside").mkdir(exist_ok=True)
    path = folder / "mutant.tar.gz"
    path.write_bytes(content)
    return path


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
