"""Provenance: the source of a number. Every input has a class; a result takes the weakest class of its inputs."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any


class ProvenanceClass(StrEnum):
    """Kinds of sources, ordered from strong to weak."""

    MEASURED = "measured"  # on a named device, at a time, by a command
    DERIVED = "derived"  # computed from measured kernels or a roofline
    PUBLISHED = "published"  # taken from, or fitted to, figures of a publication


_STRONG_TO_WEAK = tuple(ProvenanceClass)


def weakest(classes: Iterable[ProvenanceClass]) -> ProvenanceClass:
    """Return the class of a result computed from inputs of these classes (at least one)."""
    return max(classes, key=_STRONG_TO_WEAK.index)


NOT_READ = "not_read"  # key among a provenance's details: a sentence on what an input holds but nothing uses


@dataclass(frozen=True, slots=True)
class Assumption:
    """A quantity without a source: its value here, why it is that, and how a user changes it."""

    name: str  # of the quantity, the same wherever it is assumed
    value: float | str | None
    why: str
    change: str  # a setting such as "runtime.sync_s", an entry of profile.json such as "model.chars_per_token"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Source of one input file or of one result."""

    provenance_class: ProvenanceClass
    source: str  # what it was measured on or computed from
    command: str  # the command that made it
    scaled: tuple[str, ...] = ()  # what was scaled or interpolated on the way, and by what
    assumptions: tuple[Assumption, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def without(self, names: Iterable[str]) -> Provenance:
        """Return the provenance without the assumptions of these names."""
        dropped = set(names)
        return replace(self, assumptions=tuple(a for a in self.assumptions if a.name not in dropped))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Provenance:
        """Make a provenance from its JSON. Raises KeyError, TypeError or ValueError if the data are not of one."""
        if unknown := sorted({*data} - {f.name for f in fields(cls)}):
            raise ValueError(f"a provenance has no {', '.join(map(repr, unknown))}")
        assumptions = tuple(Assumption(**a) for a in data.get("assumptions", ()))
        texts = (data["source"], data["command"], *data.get("scaled", ()))
        texts += tuple(text for a in assumptions for text in (a.name, a.why, a.change))
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a provenance says in texts where a number comes from")
        if not all(a.value is None or isinstance(a.value, float | int | str) for a in assumptions):
            raise TypeError("what is assumed is a number or a text")
        return cls(
            provenance_class=ProvenanceClass(data["provenance_class"]),
            source=data["source"],
            command=data["command"],
            scaled=tuple(data.get("scaled", ())),
            assumptions=assumptions,
            details=dict(data.get("details", {})),
        )


class Sourced:
    """A result that says what it was computed from."""

    __slots__ = ()
    inputs: Mapping[str, Provenance]  # by name: profiles, exit traces, request traces
    assumptions: tuple[Assumption, ...]  # besides those of the inputs

    @property
    def provenance_class(self) -> ProvenanceClass | None:
        """The weakest class of the inputs; None without inputs."""
        classes = [source.provenance_class for source in self.inputs.values()]
        return weakest(classes) if classes else None

    @property
    def all_assumptions(self) -> tuple[Assumption, ...]:
        """Assumptions of the result and of every input, each once."""
        of_inputs = (a for source in self.inputs.values() for a in source.assumptions)
        return tuple(dict.fromkeys((*self.assumptions, *of_inputs)))


def command_given(module: str) -> str:
    """Return the command line as given to `python -m MODULE`; arguments of another program, as a notebook's, are not
    part of it.
    """
    program = Path(sys.argv[0])
    if program.name == module.replace("_", "-"):  # the module installed as a program
        return shlex.join([program.name, *sys.argv[1:]])
    if module not in (program.name, program.parent.name):  # python runs MODULE/__main__.py
        return f"{module}, called from Python"
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def commit(folder: Path) -> str | None:
    """Return the git commit of a folder's checkout, with "-dirty" if it was changed; None outside a checkout."""
    git = shutil.which("git")
    if git is None or not any((above / ".git").exists() for above in folder.parents[:1]):
        return None
    asked = "status --porcelain=v2 --branch --untracked-files=no --no-ahead-behind"  # takes half as long as `describe`
    command = [git, "-C", str(folder), *asked.split()]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603 - no words of others
        lines = said.stdout.splitlines()
        found = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "(initial)")
        return None if found == "(initial)" else found + ("-dirty" if any(line[0] != "#" for line in lines) else "")
    return None
