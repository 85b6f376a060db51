"""Mutants of real files, one module per loader, and the judge of what a loader makes of them.

Each module has `mutants(seed)`, an endless iterator over `Mutant`s of which the first is the file unchanged, and
`read(path)`, which reads one of them in full.
A mutant is good if `read` returns or raises one UserError, within `SECONDS` and `BYTES` of memory (`judge`).
"""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from helios_sim.errors import UserError

SECONDS, BYTES = 10.0, 500 << 20
MOST_BYTES = 8 << 30  # the address space that a reader gets on top of what it has, so that a fault cannot stop the host
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 60, -(1 << 63), (1 << 64) - 1, 10**30)
ODD: tuple[object, ...] = (
    None, True, False, "", "0", "abc", "NaN", "\x1b[31m", "../../etc/passwd", "[/]", [], [1, 2], [[1]], {}, {"a": 1},
    0.5, 1e308, -0.0, float("nan"), float("inf"), *NUMBERS,
)  # fmt: skip
NAMES = ("", ".", "..", "../escape", "/etc/passwd", "a\0b", "x" * 300, "ü", "\x1b[2J", "blk.9999999999.x", "a" * 70_000)


@dataclass(frozen=True)
class Mutant:
    """One changed file. `write(folder)` writes it (with what lies beside it) and returns the path to be read."""

    what: str
    write: Callable[[Path], Path]


def one_file(what: str, name: str, content: bytes) -> Mutant:
    """A mutant that is one file of this name."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return Mutant(what, write)


@dataclass(frozen=True)
class Verdict:
    """What a reader made of a mutant: `outcome` is "read", "refused", or what is bad about it."""

    what: str
    outcome: str
    said: str

    @property
    def good(self) -> bool:
        return self.outcome in ("read", "refused")


def judge(mutant: Mutant, read: Callable[[Path], object], folder: Path) -> Verdict:
    """Read the mutant in a process of its own, with the judge's limits."""
    path = mutant.write(folder)
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        _serve(path, read, into)
    os.close(into)
    try:
        said, late = _all_of(out, time.monotonic() + SECONDS)
    finally:
        os.close(out)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if late:
        return Verdict(mutant.what, "hangs", f"more than {SECONDS:g} s")
    outcome, _, text = said.decode(errors="replace").partition("\n")
    return Verdict(mutant.what, outcome or "crash", text or f"status {status}")


def campaign(
    mutants: Iterator[Mutant],
    read: Callable[[Path], object],
    count: int,
    tell: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Judge `count` mutants. The unchanged file is read first, in this process, which must succeed."""
    with TemporaryDirectory() as folder:
        read(next(mutants).write(Path(folder)))
    found = []
    for mutant in islice(mutants, count):
        with TemporaryDirectory() as folder:
            found.append(judge(mutant, read, Path(folder)))
        tell(found[-1])
    return found


def bad(verdicts: Iterable[Verdict]) -> list[str]:
    return [f"{v.what}: {v.outcome}: {v.said}" for v in verdicts if not v.good]


def changed_bytes(content: bytes, rng: random.Random, within: int | None = None) -> tuple[str, bytes]:
    """One change that knows nothing of the format, within the first `within` bytes: cut, flip, insert, repeat, zero."""
    n = min(len(content), within or len(content))
    at, length = rng.randrange(n), rng.choice((1, 2, 4, 8, 64, 1024))
    kind = rng.choice(("cut", "flip", "insert", "drop", "repeat", "zero", "ones"))
    some = bytes(rng.randrange(256) for _ in range(length))
    changed = {
        "cut": content[:at],
        "flip": content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :],
        "insert": content[:at] + some + content[at:],
        "drop": content[:at] + content[at + length :],
        "repeat": content[:at] + content[at : at + length] * 2 + content[at + length :],
        "zero": content[:at] + b"\0" * length + content[at + length :],
        "ones": content[:at] + b"\xff" * length + content[at + length :],
    }[kind]
    return f"{kind} {length} bytes at {at}", changed


def changed_json(value: object, rng: random.Random) -> tuple[str, object]:
    """One change inside a JSON value: a value replaced, dropped, doubled or moved to another name."""
    place = rng.choice([place for place in _places(value) if place])
    kind = rng.choice(("replace", "replace", "replace", "drop", "rename", "list"))
    new: object = rng.choice(ODD)
    name = rng.choice((*NAMES, "extra"))

    def at(node: object, rest: tuple[object, ...]) -> object:
        if not rest:
            return [node, node] if kind == "list" else new
        key, last = rest[0], len(rest) == 1
        if isinstance(node, dict):
            changed = {}
            for k, v in node.items():
                if k != key:
                    changed[k] = v
                elif last and kind == "rename":
                    changed[name] = v
                elif not (last and kind == "drop"):
                    changed[k] = at(v, rest[1:])
            return changed
        assert isinstance(node, list)
        dropped = key if last and kind == "drop" else None
        return [at(v, rest[1:]) if i == key else v for i, v in enumerate(node) if i != dropped]

    what = {"replace": f"to {str(new)[:40]!r}", "rename": f"to the name {name[:40]!r}"}.get(kind, "")
    return f"{kind} {'.'.join(map(str, place))} {what}", at(value, place)


def _places(value: object, here: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:50]:
        yield from _places(inner, (*here, key))


def _serve(path: Path, read: Callable[[Path], object], into: int) -> None:
    """The child: read, say what came of it, and leave without a trace."""
    said = "crash\n"
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        pages = resource.getpagesize()
        size = int(Path("/proc/self/statm").read_text().split()[0]) * pages
        resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, size + MOST_BYTES))
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_bytes()
        try:
            read(path)
            said = "read\n"
        except UserError as error:
            said = f"refused\n{error}"
        grown = _peak_bytes() - before
        if grown > BYTES:
            said = f"memory\n{grown >> 20} MiB; {said}"
        if "\n" in said.partition("\n")[2].strip():
            said = f"several lines\n{said}"
    except BaseException:
        said = f"traceback\n{traceback.format_exc()[-1500:]}"
    finally:
        os.write(into, said.encode(errors="replace")[:60_000])
        os._exit(0)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _all_of(pipe: int, until_s: float) -> tuple[bytes, bool]:
    """What comes out of the pipe until its end, and whether that was too late."""
    said = b""
    while (left_s := until_s - time.monotonic()) > 0:
        if not select.select([pipe], [], [], left_s)[0]:
            break
        part = os.read(pipe, 1 << 16)
        if not part:
            return said, False
        said += part
    return said, True


def main(mutants: Callable[[int], Iterator[Mutant]], read: Callable[[Path], object], arguments: list[str]) -> int:
    """`python -m faults.LOADER [COUNT [SEED]]` in the folder tests: judge so many mutants, and print the bad ones."""
    count, seed = (int(arguments[0]) if arguments else 1000), (int(arguments[1]) if len(arguments) > 1 else 0)

    def tell(verdict: Verdict) -> None:
        if not verdict.good:
            print(f"{verdict.what}: {verdict.outcome}: {verdict.said}", flush=True)

    found = campaign(mutants(seed), read, count, tell)
    outcomes = Counter(verdict.outcome for verdict in found)
    print(f"seed {seed}: {len(found)} tried, {', '.join(f'{n} {outcome}' for outcome, n in sorted(outcomes.items()))}")
    return 1 if bad(found) else 0


