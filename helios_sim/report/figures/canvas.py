"""What figures are drawn on: an <svg> element for a page, or the pixels of a PNG file. Lengths are in points.

Both take the same calls: lines, areas, marks and texts, each clipped to a panel or not. Neutral colours become CSS
variables in an <svg>, so that it follows the page's light and dark themes; a PNG is on white.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from html import escape
from math import cos, pi, sin
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.format import visible

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

INK = "#1b1f26"
MUTED = "#5e6673"
RULE = "#d4d8df"
PAPER = "#fefefd"
_CSS = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--card)"}

Points = NDArray[np.float64]  # (n, 2): x to the right, y down
Box = tuple[float, float, float, float]  # left, top, right, bottom

_FONTS = Path(__file__).parent / "fonts"
_MEASURED_AT = 100  # points, at which widths of texts are measured
_PIXELS_PER_POINT = 150 / 72
_FINER = 2  # times as many pixels each way, before they are averaged
_DENSE = 1000  # points of a line, from which its corners lie so close together that gaps at them do not show
_ANCHORS = {"left": "start", "center": "middle", "right": "end"}


class Canvas(Protocol):
    """`alpha` is 1 where nothing shines through; `dash` alternates lengths drawn and left out."""

    def line(self, points: Points, color: str, width: float, dash: Sequence[float] = (), alpha: float = 1) -> None: ...

    def area(
        self, points: Points, fill: str | None, alpha: float = 1, edge: str = "", width: float = 0,
        hatched: bool = False,
    ) -> None: ...

    def text(
        self, text: str, x: float, y: float, size: float, color: str, ha: str = "left", bold: bool = False,
        upright: bool = False,
    ) -> None:  # fmt: skip
        """`y` is that of the baseline; `upright` reads from the bottom to the top."""

    def clipped(self, box: Box) -> Any:
        """A context in which nothing is drawn outside the box."""


@cache
def font(bold: bool, pixels: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(str(_FONTS / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")), pixels)


def text_width(text: str, size: float, bold: bool = False) -> float:
    return float(font(bold, _MEASURED_AT).getlength(" ".join(visible(text).split()))) * size / _MEASURED_AT


def mark_points(marker: str, x: float, y: float, size: float) -> Points:
    """The outline of a mark, which is about `size` points wide."""
    half = size / 2
    if marker == "o":
        return np.array([(x + half * cos(a * pi / 12), y + half * sin(a * pi / 12)) for a in range(24)])
    if marker in "sD":
        reach = half if marker == "s" else half * 1.3
        corners = ((-1, -1), (1, -1), (1, 1), (-1, 1)) if marker == "s" else ((0, -1), (1, 0), (0, 1), (-1, 0))
        return np.array([(x + reach * dx, y + reach * dy) for dx, dy in corners])
    if marker in "^v<>":
        turned = {"^": 0, ">": 1, "v": 2, "<": 3}[marker] * pi / 2
        tips = ((0, -1.15), (1.05, 0.85), (-1.05, 0.85))
        return np.array([
            (x + half * (dx * cos(turned) - dy * sin(turned)), y + half * (dx * sin(turned) + dy * cos(turned)))
            for dx, dy in tips
        ])  # fmt: skip
    if marker == "*":
        radii = ((1.3 if point % 2 == 0 else 0.55) * half for point in range(10))
        return np.array([(x + r * sin(k * pi / 5), y - r * cos(k * pi / 5)) for k, r in enumerate(radii)])
    third = half / 3  # a cross: "P" upright, "X" turned
    quarter = [(-third, -half), (third, -half), (third, -third)]
    arm = [*quarter, *((-y, x) for x, y in quarter), *((-x, -y) for x, y in quarter), *((y, -x) for x, y in quarter)]
    turn = pi / 4 if marker == "X" else 0.0
    return np.array([(x + dx * cos(turn) - dy * sin(turn), y + dx * sin(turn) + dy * cos(turn)) for dx, dy in arm])


class Svg:
    """Collects the elements of one <svg>; `name` keeps its ids apart from those of others on the page."""

    def __init__(self, width: float, height: float, name: str) -> None:
        self._size, self._name = (width, height), name
        self._parts: list[str] = []
        self._ids = 0

    def line(self, points: Points, color: str, width: float, dash: Sequence[float] = (), alpha: float = 1) -> None:
        dashes = f";stroke-dasharray:{' '.join(f'{d:g}' for d in dash)}" if dash else ""
        self._path(points, f"fill:none;stroke:{_css(color)};stroke-width:{width:g};stroke-linejoin:round"
                   f"{dashes}{_opacity(alpha)}")  # fmt: skip

    def area(
        self, points: Points, fill: str | None, alpha: float = 1, edge: str = "", width: float = 0,
        hatched: bool = False,
    ) -> None:
        stroke = f";stroke:{_css(edge)};stroke-width:{width:g}" if edge else ""
        self._path(points, f"fill:{'none' if fill is None else _css(fill)}{stroke}{_opacity(alpha)}", closed=True)
        if hatched:
            with self.clipped(_box_of(points)):
                for stripe in _stripes(points):
                    self.line(stripe, edge, 0.8)

    def text(
        self, text: str, x: float, y: float, size: float, color: str, ha: str = "left", bold: bool = False,
        upright: bool = False,
    ) -> None:  # fmt: skip
        place = f'transform="translate({x:.2f} {y:.2f}) rotate(-90)"' if upright else f'x="{x:.2f}" y="{y:.2f}"'
        weight = ";font-weight:bold" if bold else ""
        style = f"font-size:{size:g}px;fill:{_css(color)};text-anchor:{_ANCHORS[ha]}{weight}"
        self._parts.append(f'<text {place} style="{style}">{_shown(text)}</text>')

    @contextmanager
    def clipped(self, box: Box) -> Iterator[None]:
        self._ids += 1
        name = f"{escape(self._name)}-{self._ids}"
        left, top, right, bottom = box
        self._parts.append(
            f'<clipPath id="{name}"><rect x="{left:.2f}" y="{top:.2f}" width="{right - left:.2f}" '
            f'height="{bottom - top:.2f}"/></clipPath><g clip-path="url(#{name})">'
        )
        yield
        self._parts.append("</g>")

    def element(self, title: str) -> str:
        """The element, without a title of its own to be seen."""
        width, height = self._size
        head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_shown(title)}" '
        return f'{head}xmlns="http://www.w3.org/2000/svg">\n' + "\n".join(self._parts) + "\n</svg>"

    def _path(self, points: Points, style: str, closed: bool = False) -> None:
        numbers = np.round(points, 2).tolist()
        path = "L".join(f"{x:g} {y:g}" for x, y in numbers)
        self._parts.append(f'<path d="M{path}{"z" if closed else ""}" style="{style}"/>')


class Png:
    """Draws shapes on twice as many pixels each way, averages them, and then sets the texts."""

    def __init__(self, width: float, height: float) -> None:
        from PIL import Image, ImageDraw

        self._draw_on = ImageDraw.Draw
        self._size = round(width * _PIXELS_PER_POINT), round(height * _PIXELS_PER_POINT)
        self._image = Image.new("RGB", (self._size[0] * _FINER, self._size[1] * _FINER), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._scale = _PIXELS_PER_POINT * _FINER
        self._origin = (0.0, 0.0)
        self._texts: list[tuple[str, float, float, float, str, str, bool, bool]] = []

    def line(self, points: Points, color: str, width: float, dash: Sequence[float] = (), alpha: float = 1) -> None:
        fill, wide = _mixed(color, alpha), max(1, round(width * self._scale))
        for part in _dashed(points, dash) if dash else [points]:
            pixels = self._pixels(part)
            self._draw.line(pixels, fill, wide)
            for corner in _corners_of(part) if wide > 2 and len(part) < _DENSE else ():
                self._draw.circle(pixels[corner], wide / 2, fill)

    def area(
        self, points: Points, fill: str | None, alpha: float = 1, edge: str = "", width: float = 0,
        hatched: bool = False,
    ) -> None:
        if fill is not None:
            draw = self._draw if alpha == 1 else self._draw_on(self._image, "RGBA")  # which mixes, and takes longer
            draw.polygon(self._pixels(points), fill=(*_rgb(fill), round(255 * alpha)))
        if hatched:
            with self.clipped(_box_of(points)):
                for stripe in _stripes(points):
                    self.line(stripe, edge, 0.8)
        if edge:
            self.line(np.concatenate([points, points[:2]]), edge, width)

    def text(
        self, text: str, x: float, y: float, size: float, color: str, ha: str = "left", bold: bool = False,
        upright: bool = False,
    ) -> None:  # fmt: skip
        self._texts.append((" ".join(visible(text).split()), x, y, size, color, ha, bold, upright))

    @contextmanager
    def clipped(self, box: Box) -> Iterator[None]:
        scale, (left0, top0) = self._scale, self._origin
        left, top, right, bottom = (round(value * scale) for value in box)
        whole, draw, origin = self._image, self._draw, self._origin
        place = (left - round(left0), top - round(top0))
        self._image = whole.crop((*place, place[0] + max(right - left, 1), place[1] + max(bottom - top, 1)))
        self._draw, self._origin = self._draw_on(self._image), (float(left), float(top))
        yield
        whole.paste(self._image, place)
        self._image, self._draw, self._origin = whole, draw, origin

    def content(self) -> bytes:
        """The PNG file."""
        image = self._image.reduce(_FINER)
        for text, x, y, size, color, ha, bold, upright in self._texts:
            self._set(image, text, x * _PIXELS_PER_POINT, y * _PIXELS_PER_POINT, size, color, ha, bold, upright)
        return _png(np.asarray(image))

    def _set(
        self, image: Any, text: str, x: float, y: float, size: float, color: str, ha: str, bold: bool, upright: bool
    ) -> None:
        from PIL import Image

        used = font(bold, round(size * _PIXELS_PER_POINT))
        anchor = {"left": "ls", "center": "ms", "right": "rs"}[ha]
        if not upright:
            self._draw_on(image).text((x, y), text, fill=color, font=used, anchor=anchor)
            return
        width, up = round(used.getlength(text)) + 2, sum(used.getmetrics())
        mask = Image.new("L", (width, up))
        self._draw_on(mask).text((1, used.getmetrics()[0]), text, fill=255, font=used, anchor="ls")
        turned = mask.rotate(90, expand=True)
        below = {"left": 0, "center": width // 2, "right": width}[ha]
        image.paste(Image.new("RGB", turned.size, color), (round(x) - used.getmetrics()[0], round(y) + below - width),
                    turned)  # fmt: skip

    def _pixels(self, points: Points) -> list[tuple[float, ...]]:
        return [tuple(point) for point in (points * self._scale - np.array(self._origin)).tolist()]


def _shown(text: str) -> str:
    return escape(" ".join(visible(text).split()))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of pixels (height, width, 3), each row as its difference from the row above."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = 2
    flat = pixels.reshape(height, -1)
    rows[0, 1:], rows[1:, 1:] = flat[0], flat[1:] - flat[:-1]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 2)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _css(color: str) -> str:
    return _CSS.get(color, color)


def _opacity(alpha: float) -> str:
    return f";opacity:{alpha:g}" if alpha < 1 else ""


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def _mixed(color: str, alpha: float) -> tuple[int, ...]:
    """The colour on white: where a see-through line crosses itself it would be darker."""
    return tuple(round(255 - (255 - part) * alpha) for part in _rgb(color))


def _box_of(points: Points) -> Box:
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def _stripes(points: Points) -> Iterator[Points]:
    """Slanted lines across the box of an area."""
    left, top, right, bottom = _box_of(points)
    rise = bottom - top
    for start in np.arange(left - rise, right, 4.5):
        yield np.array([(start, bottom), (start + rise, top)])


def _corners_of(points: Points) -> list[int]:
    """Indices of the points at which a line turns so much that its parts leave a gap."""
    steps = np.diff(points, axis=0)
    turn = np.abs(steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0])
    lengths = np.hypot(steps[:-1, 0], steps[:-1, 1]) * np.hypot(steps[1:, 0], steps[1:, 1])
    return (np.flatnonzero(turn > 0.2 * lengths) + 1).tolist()


def _dashed(points: Points, dash: Sequence[float]) -> Iterator[Points]:
    """The parts of a line that are drawn."""
    steps = np.hypot(*np.diff(points, axis=0).T)
    at = np.concatenate([[0.0], np.cumsum(steps)])
    start = 0.0
    while start < at[-1]:
        end = min(start + dash[0], at[-1])
        inner = (at > start) & (at < end)
        ends = [[np.interp(place, at, points[:, axis]) for axis in (0, 1)] for place in (start, end)]
        yield np.array([ends[0], *points[inner].tolist(), ends[1]])
        start = end + dash[1]
