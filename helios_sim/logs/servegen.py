"""ServeGen's clients (chunk-N-trace.csv and chunk-N-dataset.json): requests drawn as ServeGen draws them.

They are not a log: each client has a rate and a distribution of gaps for windows of ten minutes, and distributions of
lengths for six hours. As in servegen/construct.py, the gaps of a window are drawn and scaled to fill it, and lengths
are drawn one by one.
"""

from __future__ import annotations

import ast
import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.logs.record import FIX, Begins, RequestLog, Row, gathered, not_read
from helios_sim.request import LONGEST
from helios_sim.untrusted import MIB, parse_json, read_text, reading, shortened

NAME = "ServeGen clients"
_TRACE = re.compile(r"chunk-(\d+)-trace\.csv(\.gz)?$")
_MOST_CLIENTS, _MOST_REQUESTS, _WINDOW_S = 20_000, 5_000_000, 600
_PROMPTS = ("input_tokens", "text_tokens")  # of language and reasoning models, and of multimodal ones
_OF_NO_MATTER = ("reason_ratio",)  # the part of an answer that is reasoning: tokens all the same
_EFFECTS = dict.fromkeys(
    ("image_tokens", "audio_tokens", "video_tokens"), "prompts had more than text, which is left out of their lengths"
)
_COUNTS = ("image_count", "audio_count", "video_count")
_Pdf = tuple[NDArray[np.int64], NDArray[np.float64]]  # lengths, and the share up to each


def of_folder(folder: Path) -> list[Path]:
    """The traces of clients in a folder; empty if it is not ServeGen's."""
    found = sorted((p for p in folder.iterdir() if _TRACE.search(p.name)), key=_number)[:_MOST_CLIENTS]
    for before, after in pairwise(found):
        if _number(before) == _number(after):
            told = f"{before.name} and {after.name}"
            raise UserError(f"{folder.name}: client {_number(after)}", told, "one file of each client", "remove one")
    return found


def _number(path: Path) -> int:
    found = _TRACE.search(path.name)
    return int(found[1]) if found else 0


@dataclass(frozen=True, slots=True)
class _Window:
    """The requests of a client in one window of time."""

    start_s: int
    rate_per_s: float
    pattern: str
    shape: float


def read_folder(folder: Path, span_s: tuple[float, float] | None, seed: int) -> RequestLog:
    """The requests of these seconds of the folder's time. Raises UserError if there are none."""
    if span_s is None:
        allowed = "the seconds to draw requests for: the folder holds days"
        raise UserError("from_log.span_s", None, allowed, "set from_log.span_s=[BEGIN,END], such as [64800,65400]")
    rng, rows, left = np.random.default_rng(seed), list[Row](), dict[str, None]()
    expected = 0.0
    for path in of_folder(folder):
        windows = [w for w in _windows(path) if w.start_s < span_s[1] and w.start_s + _WINDOW_S > span_s[0]]
        expected += sum(window.rate_per_s for window in windows) * _WINDOW_S
        if expected > _MOST_REQUESTS:
            told = f"about {expected:.3g} requests in these {span_s[1] - span_s[0]:g} s"
            raise UserError("from_log.span_s", list(span_s), f"fewer seconds: {told}", "draw a shorter time")
        if windows:
            plain = path.with_name(path.name.split("-trace")[0] + "-dataset.json")
            packed = plain.with_name(f"{plain.name}.gz")
            if packed.is_file() and plain.exists():
                told = f"{plain.name} and {packed.name}"
                raise UserError(f"{folder.name}: client {_number(path)}", told, "one of them", "remove one")
            lengths, others = _lengths(packed if packed.is_file() else plain)
            left |= dict.fromkeys(others)
            rows += _drawn(path, windows, lengths, span_s, rng)
    if not rows:
        raise UserError("from_log.span_s", list(span_s), "seconds in which its clients sent requests", "choose others")
    notices = [
        f"{folder.name}: arrivals and lengths are drawn from distributions of {len(of_folder(folder))} clients with "
        f"seed {seed}, as ServeGen does; no request of a real user is among them.",
        *not_read(folder.name, list(left), _EFFECTS),
    ]
    return gathered(folder.name, NAME, rows, Begins.SENT, {}, notices)


def _windows(path: Path) -> list[_Window]:
    """The windows of a client, without those in which it sent nothing."""
    found: list[_Window] = []
    text = read_text(path, 64 * MIB, FIX).decode()
    for number, cells in enumerate(csv.reader(io.StringIO(text)), 1):
        place = f"{path.name}, line {number}"
        if len(cells) != 6:
            allowed = "6 cells: time, rate, CV, pattern and its two arguments"
            raise UserError(place, f"{len(cells)} cells", allowed, "correct or remove the line")
        with reading(place, shortened(",".join(cells)), "numbers: time, rate, CV, then pattern and arguments", FIX):
            start_s, rate, pattern = int(cells[0]), float(cells[1]), cells[3]
            shape = float(cells[4])
            if not pattern or rate == 0.0:
                continue
            if found and start_s < found[-1].start_s + _WINDOW_S:
                raise ValueError(f"each {_WINDOW_S} s or more after the one before, which began at {found[-1].start_s}")
            if pattern not in ("Gamma", "Weibull") or not (0 < rate < 1e6 and 0 < shape < 1e6):
                raise ValueError("Gamma or Weibull, with a rate and a shape above 0")
        found.append(_Window(start_s, rate, pattern, shape))
    return found


def _lengths(path: Path) -> tuple[dict[int, Mapping[str, _Pdf]], list[str]]:
    """Distributions of prompt and output lengths by the time from which they hold, and names that are not read."""
    found: dict[int, Mapping[str, _Pdf]] = {}
    others: dict[str, None] = {}
    with reading(path.name, "damaged", "a JSON object of distributions by time", FIX):
        for time, fields in parse_json(read_text(path, 256 * MIB, FIX)).items():
            prompt = next((name for name in _PROMPTS if name in fields), "")
            if not prompt or "output_tokens" not in fields:
                raise ValueError(f"{_PROMPTS[0]} (or {_PROMPTS[1]}) and output_tokens at {time}")
            known = {"prompt": _pdf(fields[prompt]), "output": _pdf(fields["output_tokens"])}
            # if empty, the client sent nothing then
            if all(len(values) for values, _ in known.values()):
                found[int(time)] = known
            others |= dict.fromkeys(set(fields) - {prompt, "output_tokens", *_OF_NO_MATTER, *_COUNTS})
    return found, sorted(others)


def _pdf(text: Any) -> _Pdf:
    """Parse shares by length, such as {224: 0.0003, 225: 0.0008}. Raises ValueError for other texts."""
    shares = ast.literal_eval(text) if isinstance(text, str) else text
    for value in shares:
        if not isinstance(value, int | float) or not 0 <= value <= LONGEST or value != int(value):
            raise ValueError(f"lengths that are whole numbers from 0 to {LONGEST}, unlike {value}")
    values = np.array(sorted(shares), np.float64)
    weights = np.array([shares[int(value)] for value in values], np.float64)
    if len(values) and not ((values >= 0) & (values == np.floor(values)) & (weights >= 0)).all():
        raise ValueError("lengths and shares of at least 0")
    if len(values) and not abs(weights.sum() - 1.0) < 1e-3:
        raise ValueError(f"shares add up to {weights.sum():g}, not 1")
    return values.astype(np.int64), np.cumsum(weights)


def _drawn(
    path: Path, windows: list[_Window], lengths: Mapping[int, Mapping[str, _Pdf]], span_s: tuple[float, float],
    rng: np.random.Generator,
) -> list[Row]:  # fmt: skip
    rows = []
    for window in windows:
        held = [time for time in lengths if time <= window.start_s]
        if not held:
            continue
        count = int(np.ceil(window.rate_per_s * _WINDOW_S))
        gaps = rng.gamma(window.shape, size=count) if window.pattern == "Gamma" else rng.weibull(window.shape, count)
        total = gaps.sum()
        times = window.start_s + np.cumsum(gaps) * (_WINDOW_S / total if total > 0 else 0.0)
        drawn = {
            name: np.maximum(values[np.minimum(np.searchsorted(up_to, rng.random(count)), len(values) - 1)], 1)
            for name, (values, up_to) in lengths[max(held)].items()
        }
        rows += [
            Row(path.name, float(time), int(prompt), int(output))
            for time, prompt, output in zip(times, drawn["prompt"], drawn["output"], strict=True)
            if span_s[0] <= time < span_s[1] and time < window.start_s + _WINDOW_S
        ]
    return rows
