"""Changes of tables in text: rows, cells, names, separators and encodings, for the mutators of this package."""

from __future__ import annotations

import gzip
import random

from faults import NAMES, changed_bytes

CELLS = (
    "", " ", "nan", "NaN", "inf", "-inf", "-1", "0", "0.5", "1e400", "1e30", "1" * 400, "9223372036854775808", "0x10",
    "1_000", "１２", "true", "null", '"', '"a\nb"', "2024-13-01", "2024-01-01T00:00:00Z", "9999-12-31", "1,5", "\0",
    "\x1b[31m", "[/]", "../../etc/passwd", "=1+1", "ü", "-0.0", "1e-320", "None",
)  # fmt: skip
BOMBS = (b"0" * (96 << 20), b"1,1,1\n" * (12 << 20), b"[" * (70 << 20))


def changed_table(text: str, rng: random.Random, separator: str = ",") -> tuple[str, bytes]:
    """One change of a table with a header; most lines are far from its ends."""
    lines = text.splitlines()
    row = rng.choice((0, 1, len(lines) - 1, rng.randrange(len(lines))))
    cells = lines[row].split(separator)
    at = rng.randrange(len(cells))
    kind = rng.choice(
        ("cell", "cell", "cell", "name", "drop cell", "more cells", "drop row", "repeat row", "swap rows", "blank",
         "separator", "quote", "encoding", "bytes", "header only", "no header", "column", "double column", "constant",
         "nothing", "long line", "many columns", "crlf")
    )  # fmt: skip
    what = f"{kind}, line {row + 1}"
    if kind == "cell":
        cells[at] = rng.choice(CELLS)
        what += f", cell {at + 1} = {cells[at][:30]!r}"
        lines[row] = separator.join(cells)
    elif kind == "name":
        header = lines[0].split(separator)
        header[at % len(header)] = rng.choice((*NAMES[:-1], *CELLS, header[0]))
        lines[0] = separator.join(header)
    elif kind == "drop cell":
        lines[row] = separator.join(cells[:at] + cells[at + 1 :])
    elif kind == "more cells":
        lines[row] += separator + rng.choice(CELLS)
    elif kind == "drop row":
        del lines[row]
    elif kind == "repeat row":
        lines[row:row] = [lines[row]] * rng.choice((1, 2, 500))
    elif kind == "swap rows":
        other = rng.randrange(len(lines))
        lines[row], lines[other] = lines[other], lines[row]
    elif kind == "blank":
        lines[row:row] = [rng.choice(("", " ", separator * len(cells), "#comment"))]
    elif kind == "separator":
        new = rng.choice(("\t", ";", "|", " "))
        return f"separator {new!r}", "\n".join(lines).replace(separator, new).encode()
    elif kind == "quote":
        lines[row] = '"' + lines[row]
    elif kind == "encoding":
        code = rng.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig"))
        return f"encoding {code}", ("\n".join(lines) + "\nü").encode(code)
    elif kind == "header only":
        lines = lines[:1]
    elif kind == "no header":
        lines = lines[1:]
    elif kind in ("column", "constant", "double column"):
        table = [line.split(separator) for line in lines]
        value = rng.choice(CELLS)
        for i, line in enumerate(table):
            place = at % len(line)
            if kind == "column":
                del line[place]
            elif kind == "double column":
                line.append(line[place])
            elif i:
                line[place] = value
        lines = [separator.join(line) for line in table]
        what = f"{kind} {at + 1} {value[:30] if kind == 'constant' else ''!r}"
    elif kind == "nothing":
        return "nothing", rng.choice((b"", b"\n", b"\xef\xbb\xbf", b" "))
    elif kind == "long line":
        lines[row] += "9" * (4 << 20)
    elif kind == "many columns":
        lines = [line + separator.join(["", *(f"c{i}" for i in range(20_000))]) for line in lines[:3]]
    elif kind == "crlf":
        return what, "\r\n".join(lines).encode()
    else:
        what, content = changed_bytes("\n".join(lines).encode(), rng)
        return f"bytes: {what}", content
    return what, ("\n".join(lines) + "\n").encode(errors="surrogateescape")


def packed(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The content packed by gzip, often with a fault of its own."""
    whole = gzip.compress(content, 1, mtime=0)
    kind = rng.choice(("whole", "cut", "bytes", "twice", "bomb", "not packed"))
    if kind == "cut":
        return kind, whole[: rng.randrange(len(whole))]
    if kind == "bytes":
        what, damaged = changed_bytes(whole, rng)
        return what, damaged
    if kind == "twice":
        return kind, whole + whole
    if kind == "bomb":
        return kind, gzip.compress(content + rng.choice(BOMBS), 1, mtime=0)
    return kind, content if kind == "not packed" else whole
