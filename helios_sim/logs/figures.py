"""Declares all names that a tool writes in one place: those that are read, that follow from others, or do not matter.

A reader has a `Known` for each kind of mapping in its files, and checks every mapping with a `Look`. A figure that
follows from others is compared with them. A figure that matters but is not used, and a name that is not declared, are
reported. So nothing in a file is ignored silently.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helios_sim.errors import UserError
from helios_sim.logs.record import FIX, close_to, not_read, number
from helios_sim.untrusted import shortened

Ours = float | tuple[float, float] | None  # the value by other figures, or its range; None if they do not give it
_NOTHING: tuple[Any, ...] = (None, False, 0, 1, "", [], {})  # values that mean off, none, or one
_MOST, _MOST_NAMES = 1e15, 10_000
TOTALS = "{count} requests have a total other than prompt and answer, such as {said} in place of {ours}: these count"
MORE_CHUNKS = ("{count} of {all} answers came in more chunks than tokens, such as {said} and not {ours}: a chunk holds "
               "at least one, so that their tokens are counted too few")  # fmt: skip
FEWER_CHUNKS = ("{count} of {all} answers came in fewer chunks than tokens, such as {said} and not {ours}: several at "
                "once, as with speculative decoding, which the simulation does not have")  # fmt: skip
_FAR, _FEW = 1 / 3, 32  # share, and tokens, by which two counts of a text may differ before it is reported
_SHARES = {"p001": 0.001, "p999": 0.999}  # names of percentiles that are not in hundredths


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that follows from other facts of one place: `ours` computes it from them.

    name: a pattern; names of mappings within mappings are joined by points. `ours` gets the facts and the match.
    share, slack: how far both may lie apart, relative and in the unit of the facts.
    told: a sentence with {count}, {all}, {said} and {ours}, where tools may rightly differ; else it is an error.
    zero: what is told is so of 0 too, which else is what was not counted.
    """

    name: str
    ours: Callable[[Any, re.Match[str]], Ours]
    share: float = 0.05
    slack: float = 0.1
    by: str = "as its other figures say"
    told: str | None = None
    zero: bool = False

    def differs(self, said: float, ours: float | tuple[float, float], unit: float) -> bool:
        low, high = ours if isinstance(ours, tuple) else (ours, ours)
        near = any(close_to(said, end, self.share, self.slack * unit) for end in (low, high) if math.isfinite(end))
        return not (low <= said <= high or near)


@dataclass(frozen=True, slots=True)
class _Kind:
    """The declaration of one name."""

    effect: str | None  # its pattern, if it matters and is not used
    figures: list[tuple[re.Match[str], Figure]]
    is_declared: bool  # it is read, or does not matter


@dataclass(frozen=True)
class Known:
    """All names that a tool writes in one mapping.

    `read` and `harmless` are patterns and hold for all within; `effects` are patterns of what matters and is not made
    anything of, each with the reason, which is told once with the first name of it.
    """

    read: str
    figures: Sequence[Figure] = ()
    effects: Mapping[str, str] = field(default_factory=dict)
    harmless: str = ""

    @cached_property
    def _patterns(self) -> tuple[
        re.Pattern[str], re.Pattern[str], list[tuple[re.Pattern[str], Figure]], list[tuple[str, re.Pattern[str]]]
    ]:  # fmt: skip
        figures = [(re.compile(figure.name), figure) for figure in self.figures]
        return re.compile(self.read), re.compile(self.harmless), figures, [(n, re.compile(n)) for n in self.effects]

    def is_harmless(self, name: str) -> bool:
        return self._patterns[1].fullmatch(name) is not None

    def is_declared(self, name: str) -> bool:
        """Whether a name is read or does not matter. Figures and effects are checked too."""
        return self._patterns[0].fullmatch(name) is not None or self.is_harmless(name)

    def of(self, name: str) -> _Kind:
        """The declaration of a name, looked up once for all files."""
        kept = self._kept
        if name not in kept:
            if len(kept) >= _MOST_NAMES:  # files may have any names
                kept.clear()
            effect = next((n for n, pattern in self._patterns[3] if pattern.fullmatch(name)), None)
            figures = [(match, one) for pattern, one in self._patterns[2] if (match := pattern.fullmatch(name))]
            kept[name] = _Kind(effect, figures, self.is_declared(name))
        return kept[name]

    @cached_property
    def _kept(self) -> dict[str, _Kind]:
        return {}


class Look:
    """Findings in mappings of one kind, such as all requests of a file."""

    def __init__(self, source: str, known: Known, prefix: str = "") -> None:
        """`prefix` is put before names in messages."""
        self._source, self._known, self._prefix = source, known, prefix
        self._matter: dict[str, str] = {}  # the first name with each effect
        self._left: dict[str, None] = {}
        self._stated: Counter[str] = Counter()  # places where both figures are given, by sentence
        self._differ: dict[str, list[tuple[str, float, Ours]]] = {}

    def at(self, place: str, values: object, facts: Any = None, units: Mapping[str, float] | None = None) -> None:
        """Check one mapping. Raises UserError for a figure that contradicts its `facts`; None: there are no facts.

        `units`: by name, how many of a figure's unit make one unit of the facts.
        """
        if isinstance(values, Mapping):
            self._within(place, values, "", facts, units or {})

    def _within(self, place: str, values: Mapping[str, Any], path: str, facts: Any, units: Mapping[str, float]) -> None:
        for key, value in values.items():
            name = f"{path}{key}"
            kind = self._known.of(name)
            if kind.effect is not None:
                if value not in _NOTHING:
                    self._matter.setdefault(kind.effect, f"{self._prefix}{name}")
            elif kind.figures:
                for match, figure in kind.figures if facts is not None and value is not None else ():
                    if (ours := figure.ours(facts, match)) is not None:
                        self._compare(place, f"{self._prefix}{name}", value, figure, ours, units.get(name, 1.0))
            elif kind.is_declared or value in (None, "", [], {}):
                continue
            elif isinstance(value, Mapping):
                self._within(place, value, f"{name}.", facts, units)
            else:
                self._left[f"{self._prefix}{name}"] = None

    def _compare(
        self, place: str, name: str, value: object, figure: Figure, ours: float | tuple[float, float], unit: float
    ) -> None:
        said = number(place, name, value, -_MOST, _MOST)
        ours = (unit * ours[0], unit * ours[1]) if isinstance(ours, tuple) else unit * ours
        if figure.told is not None:
            if said == 0 and not figure.zero:
                return
            self._stated[figure.told] += 1
        if not figure.differs(said, ours, unit):
            return
        if figure.told is None:
            raise UserError(f"{place}: {name}", shortened(value), f"{_told(ours)}, {figure.by}", FIX)
        self._differ.setdefault(figure.told, []).append((name, said, ours))

    def notices(self) -> list[str]:
        """Sentences on figures that differ, and on names that are not read."""
        effects = {self._matter[effect]: why for effect, why in self._known.effects.items() if effect in self._matter}
        told = not_read(self._source, [*effects, *self._left], effects)
        for sentence, found in self._differ.items():
            (name, said, ours), *_ = found
            counts = {"count": len(found), "all": self._stated[sentence]}
            told.append(f"{self._source}: {sentence.format(said=_told(said), ours=_told(ours), **counts)} ({name}).")
        return told


def _told(ours: Any) -> str:
    if not isinstance(ours, tuple):
        whole = isinstance(ours, int) or (isinstance(ours, float) and ours == int(ours))
        return f"{int(ours):,}" if whole and abs(ours) < _MOST else _digits(ours)
    low, high = map(_digits, ours)
    if ours[1] == math.inf:
        return f"at least {low}"
    return f"at most {high}" if ours[0] <= 0 else low if low == high else f"{low} to {high}"


def _digits(number: float) -> str:
    """Times since 1970 with milliseconds, for which six digits are not enough."""
    return f"{number:.3f}" if 1e6 <= abs(number) < _MOST else f"{number:.6g}"


def exactly(name: str, ours: Callable[[Any, re.Match[str]], Ours], by: str = "as its other figures say") -> Figure:
    """A figure that must be equal, such as a count, or a time that is given twice."""
    return Figure(name, ours, share=0.0, slack=1e-3, by=by)


def server_counted(name: str, what: str, ours: Callable[[Any, re.Match[str]], Ours]) -> Figure:
    """The client's count of tokens against the server's `ours`. A chat template adds a few, which do not matter."""
    told = f"the server counted other {what} than the client in {{count}} of {{all}} requests, such as {{ours}} in "
    return Figure(name, ours, _FAR, _FEW, told=f"{told}place of {{said}}: the server's count")


def statistic(name: str, values: ArrayLike, weights: ArrayLike | None = None) -> Ours:
    """mean, median, std, variance, mode, min, max, count, total or a percentile (p99, p99.9), as numpy has them.

    With `weights` as guidellm has them: a percentile is one of the values, the first up to which that share of the
    weights lies; where rounding decides between two it lies between them. None: another name, or nothing to count.
    """
    found = np.asarray(values, np.float64)
    if not len(found) or (weights is not None and np.sum(weights) <= 0):
        return None
    if name in ("mean", "median", "std", "min", "max") and weights is None:
        return float(getattr(np, name)(found))
    if weights is None:
        return float(np.percentile(found, float(name[1:]))) if re.fullmatch(r"p\d+(\.\d+)?", name) else None
    return _weighted(name, found, np.asarray(weights, np.float64))


def _weighted(name: str, values: NDArray[np.float64], weights: NDArray[np.float64]) -> Ours:
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    shares = weights / weights.sum()
    mean = float((values * shares).sum())
    variance = float(((values - mean) ** 2 * shares).sum())
    there = values[weights > 0]
    plain = {"mean": mean, "variance": variance, "std_dev": math.sqrt(variance), "min": float(there[0]),
             "max": float(there[-1]), "total_sum": mean * round(float(weights.sum())),
             "count": float(round(float(weights.sum())))}  # fmt: skip
    if name in plain:
        return plain[name]
    if name == "median":
        share = 0.5
    elif re.fullmatch(r"p\d+", name):
        share = _SHARES.get(name, int(name[1:]) / 100)
    else:
        return None
    up_to = np.cumsum(shares)
    low, high = (min(int(np.searchsorted(up_to, share + nudge)), len(values) - 1) for nudge in (-1e-9, 1e-9))
    return float(values[low]), float(values[high])
