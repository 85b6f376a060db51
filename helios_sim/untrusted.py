"""Reading files that are not trusted: a size budget, values with types and ranges, and one message for every failure.

A reader opens a file by `read_bytes` or `read_json`, takes values from `Fields`, and does the rest inside `reading`,
which turns any foreign exception into a UserError. At its end `Fields.refuse_rest` names what it has not read.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError

MIB = 1 << 20
_LFS = b"version https://git-lfs.github.com/spec/"
_SHOWN = 80  # characters of a value in a message
_REQUIRED: Any = object()
_Part = TypeVar("_Part")
_OF_YAML_ALONE = re.compile(r"[-+]?(0[0-9]+|0[xob].*|.*[_:].*)")
csv.field_size_limit(2**31 - 1)  # files have limits of their own: a cell may hold a whole prompt
_PACKED = 100  # text that unpacks to more than this many times its size is no measurement
_MOST_PARQUET_BYTES = 256 * MIB


@contextmanager
def reading(key: str, value: object, allowed: str, fix: str, error: type[UserError] = UserError) -> Iterator[None]:
    """Turn every exception inside the `with` block into an `error` about `key`; a UserError passes through."""
    try:
        yield
    except UserError:
        raise
    except Exception as foreign:
        raise error(key, value, f"{allowed} ({in_short(foreign)})", fix) from foreign
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":  # a fault in a library written in Rust; Ctrl-C passes
            raise
        raise error(key, value, f"{allowed} ({in_short(panic)})", fix) from panic


def in_short(error: BaseException) -> str:
    """Return an exception in one line: its type, and the beginning of its text."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(str(error).split()))
    text = text if len(text) <= 2 * _SHOWN else f"{text[: 2 * _SHOWN]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_bytes(path: Path, most_bytes: int, fix: str, error: type[UserError] = UserError) -> bytes:
    """Return the content of a regular file of at most `most_bytes`. Raises `error` for a Git LFS pointer too."""
    with reading(str(path), "unreadable", "a file that can be read", fix, error):
        if not path.is_file():
            raise error(str(path), "no file", "a file: there is none, or it is a folder or a device", fix)
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise error(str(path), f"{path.stat().st_size} bytes", f"at most {most_bytes} bytes", fix)
    if content.startswith(_LFS):
        raise lfs_pointer(path, error)
    return content


def lfs_pointer(path: Path, error: type[UserError] = UserError) -> UserError:
    fix = "run `git lfs pull` in its folder, or download the file itself"
    return error(str(path), "a Git LFS pointer", "the file that the pointer stands for", fix)


def is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def read_json(path: Path, fix: str, most_bytes: int = 16 * MIB, error: type[UserError] = UserError) -> dict[str, Any]:
    """Return the JSON object of a UTF-8 file. Raises `error` for other values and for what `parse_json` refuses."""
    content = read_bytes(path, most_bytes, fix, error)
    with reading(str(path), "damaged", "a JSON object", fix, error):
        found = parse_json(content.decode("utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    return found


def parse_json(text: str | bytes, plain_names: bool = False) -> Any:
    """Return the value of a JSON text.

    ValueError if a key stands twice in one object, and for NaN, infinity and numbers beyond float64; with `plain_names`
    also for a key with blanks around it, which no reader would find.
    """
    hook = _unique_and_plain if plain_names else _unique
    return json.loads(text, object_pairs_hook=hook, parse_constant=_no_number, parse_float=_finite)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def _unique_and_plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, _ in pairs:
        check_name(name)
    return _unique(pairs)


def check_name(name: str) -> None:
    """Raise ValueError for a name with blanks around it: it looks like another one, which would count as missing."""
    if name != name.strip():
        raise ValueError(f"the name {name!r} has blanks around it")


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond the range of numbers")
    return value


def parse_yaml(text: str | bytes) -> Any:
    """Return the value of a YAML text.

    yaml.YAMLError if it is no YAML, a key stands twice in one mapping, or a key has blanks around it.
    """
    import yaml

    return yaml.load(text, _unique_loader())  # noqa: S506 - a SafeLoader that refuses a key given twice


@cache
def _unique_loader() -> Any:
    import yaml

    class Unique(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            known: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if key.value != key.value.strip():
                        told = f"the key {key.value!r} has blanks around it"
                        raise yaml.constructor.ConstructorError(None, None, told)
                    if key.value in known:
                        raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands there twice")
                    known.add(key.value)
            return super().construct_mapping(node, deep)

    def number(loader: Any, node: yaml.ScalarNode) -> int | float:
        """Refuse what YAML 1.1 reads in its own way: 0700 as 448, 11:40 as 700, and 1_000 as 1000."""
        if _OF_YAML_ALONE.fullmatch(node.value):
            raise yaml.constructor.ConstructorError(None, None, f"{node.value} is no plain number")
        read = loader.construct_yaml_int if node.tag.endswith("int") else loader.construct_yaml_float
        plain: int | float = read(node)
        return plain

    for kind in ("int", "float"):
        Unique.add_constructor(f"tag:yaml.org,2002:{kind}", number)
    # 1e3 and 3.35e3 are numbers too, as in settings; YAML 1.1 wants a point and a sign in them.
    plain = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
    Unique.add_implicit_resolver("tag:yaml.org,2002:float", plain, list("-+0123456789"))
    return Unique


_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {}, ())


class Fields:
    """Values of a file's header by name. Each is taken with its type and range, and is then noted as read."""

    def __init__(
        self, values: Mapping[str, Any], where: str, fix: str, error: type[UserError] = UserError, prefix: str = ""
    ) -> None:
        """Hold the values of the file `where`. `prefix` precedes the names in the file and in messages."""
        self._values, self._where, self._fix, self._error, self._prefix = values, where, fix, error, prefix
        self._read: set[str] = set()
        self._inner: list[tuple[str, Fields]] = []

    @property
    def values(self) -> Mapping[str, Any]:
        """All values, as they are."""
        return self._values

    def has(self, name: str) -> bool:
        return self._values.get(self._prefix + name) is not None

    def value(self, name: str, default: Any = _REQUIRED) -> Any:
        """Take the value as it is. None counts as missing."""
        self._read.add(self._prefix + name)
        found = self._values.get(self._prefix + name)
        if found is not None:
            return found
        if (alike := self._padded.get(self._prefix + name)) is not None:
            raise self.wrong(name, alike, "this name without blanks around it, or not at all")
        if default is _REQUIRED:
            raise self.wrong(name, None, "a value: the key is missing")
        return default

    @cached_property
    def _padded(self) -> dict[str, str]:
        """Names with blanks around them, by the name without blanks: they look like other names and are not found."""
        return {name.strip(): name for name in self._values if isinstance(name, str) and name != name.strip()}

    def alike(self, name: str, low: int, high: int, default: Any = _REQUIRED) -> int:
        """Take a whole number that is given once, or as a list with the same value for each layer."""
        found = self.value(name, default)
        if not isinstance(found, list | tuple):
            return self.integer(name, low, high, default)
        if len(set(map(repr, found))) != 1:
            raise self.wrong(name, found, "one number: layers that differ are not read")
        return Fields({name: found[0]}, self._where, self._fix, self._error).integer(name, low, high)

    def integer(self, name: str, low: int, high: int, default: Any = _REQUIRED) -> int:
        """Take a whole number from `low` to `high`."""
        found = self.value(name, default)
        if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
            raise self.wrong(name, found, f"a whole number from {low} to {high}")
        return found

    def number(self, name: str, low: float, high: float, default: Any = _REQUIRED) -> float:
        """Take a finite number from `low` to `high`."""
        found = self.value(name, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not low <= found <= high:
            raise self.wrong(name, found, f"a number from {low:g} to {high:g}")
        return float(found)

    def maybe(self, name: str, low: float, high: float) -> float | None:
        """Take a finite number from `low` to `high`; None if there is none."""
        return None if self.value(name, None) is None else self.number(name, low, high)

    def numbers(self, name: str, low: float, high: float, count: int | None = None) -> tuple[float, ...]:
        """Take a list of finite numbers from `low` to `high`, `count` of them if that is given."""
        found = self.value(name)
        fits = isinstance(found, list | tuple) and all(
            isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and low <= x <= high
            for x in found
        )
        if not fits or (count is not None and len(found) != count):
            many = "numbers" if count is None else f"{count} numbers"
            raise self.wrong(name, found, f"a list of {many} from {low:g} to {high:g}")
        return tuple(float(x) for x in found)

    def text(self, name: str, one_of: Collection[str] | None = None, default: Any = _REQUIRED) -> str:
        found = self.value(name, default)
        if not isinstance(found, str) or (one_of is not None and found not in one_of):
            raise self.wrong(name, found, "a text" if one_of is None else f"one of {', '.join(one_of)}")
        return found

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        found = self.value(name, default)
        if not isinstance(found, bool):
            raise self.wrong(name, found, "true or false")
        return found

    def integers(self, name: str, low: int, high: int, most: int, default: Any = _REQUIRED) -> tuple[int, ...]:
        """Take a list of at most `most` whole numbers from `low` to `high`."""
        found = self.value(name, default)
        whole = isinstance(found, list | tuple) and all(type(x) is int and low <= x <= high for x in found)
        if not whole or len(found) > most:
            raise self.wrong(name, found, f"a list of at most {most} whole numbers from {low} to {high}")
        return tuple(found)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """Take a list of at most `most` texts."""
        found = self.value(name)
        if not isinstance(found, list | tuple) or len(found) > most or not all(isinstance(x, str) for x in found):
            raise self.wrong(name, found, f"a list of at most {most} texts")
        return tuple(found)

    def inner(self, name: str, default: Any = _REQUIRED) -> Fields:
        """Take a mapping inside this one, as fields of its own."""
        found = self.value(name, default)
        if not isinstance(found, Mapping):
            raise self.wrong(name, found, "a mapping of names to values")
        inner = Fields(found, f"{name} in {self._where}", self._fix, self._error)
        self._inner.append((name, inner))
        return inner

    def filled(self, kind: type[_Part], **given: Any) -> _Part:
        """Make a dataclass of the values here by name and type, and the fields `given`. No other key may be here."""
        for f in fields(kind):  # type: ignore[arg-type]
            default = _REQUIRED if f.default is MISSING else f.default
            if f.name in given:
                self.ignore([f.name])
            elif f.type == "int":
                given[f.name] = self.integer(f.name, -(1 << 62), 1 << 62, default)
            elif f.type == "bool":
                given[f.name] = self.flag(f.name)
            elif f.type == "str":
                given[f.name] = self.text(f.name, default=default)
            elif str(f.type).startswith("float"):
                optional, limits = "None" in str(f.type), (-1e300, 1e300)
                given[f.name] = self.maybe(f.name, *limits) if optional else self.number(f.name, *limits, default)
            else:
                raise TypeError(f"{f.name}: fields of type {f.type} must be given")
        self.refuse_rest("no such field is known")
        return kind(**given)

    def ignore(self, names: Sequence[str]) -> None:
        """Note keys that are known not to matter for what is computed."""
        self._read.update(self._prefix + name for name in names)

    @property
    def rest(self) -> list[str]:
        """Keys with the prefix that were neither read nor ignored, and that hold something."""
        return [name for name in self._unread if self._values[name] not in _NOTHING]

    @property
    def off(self) -> list[str]:
        """Keys with the prefix that were neither read nor ignored, and that are false, null, 0 or empty.

        They matter if the default is something else. Keys within mappings that were taken by `inner` are included, as
        OUTER.KEY.
        """
        own = [name for name in self._unread if self._values[name] in _NOTHING]
        return own + [f"{name}.{below}" for name, inner in self._inner for below in inner.off]

    @property
    def _unread(self) -> list[str]:
        return [name for name in self._values if str(name).startswith(self._prefix) and name not in self._read]

    def refuse_rest(self, why: str) -> None:
        """Raise an error for the first key with the prefix that was neither read nor ignored."""
        for name, value in self._values.items():
            if str(name).startswith(self._prefix) and name not in self._read:
                raise self._error(f"{name} of {self._where}", shortened(value), why, self._fix)

    def wrong(self, name: str, value: object, allowed: str) -> UserError:
        return self._error(f"{self._prefix}{name} of {self._where}", shortened(value), allowed, self._fix)


def shortened(value: object) -> object:
    """Return the value itself, or the beginning of its text if that is long."""
    if isinstance(value, bool | float) or value is None or (isinstance(value, int) and abs(value) < 1 << 256):
        return value
    if isinstance(value, str):
        return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    text = repr(value[:20]) if isinstance(value, list | tuple) else repr(value)[: 4 * _SHOWN]
    return value if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def is_there(path: Path, is_so: Callable[[Path], bool] = Path.is_file) -> bool:
    """Whether there is a file; False too for a path that is too long or has characters that no path can have."""
    with suppress(OSError, ValueError):
        return is_so(path)
    return False


_GZIP = b"\x1f\x8b"
_OTHER_KINDS = {  # first bytes of files that are intact, but not text
    b"PAR1": ("a Parquet file", "write its table as CSV or JSON lines"),
    b"ARROW1": ("an Arrow file", "write its table as CSV or JSON lines"),
    b"PK\x03\x04": ("a ZIP archive, as .zip and .xlsx are", "unpack it, or save the sheet as CSV in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("an .xls file", "save the sheet as CSV in UTF-8"),
    b"BZh": ("packed by bzip2", "unpack it"), b"\xfd7zXZ": ("packed by xz", "unpack it"),
    b"(\xb5/\xfd": ("packed by zstd", "unpack it"), _GZIP: ("packed by gzip", "let its name end in .gz"),
    b"\xff\xfe": ("text in UTF-16", "save it in UTF-8"), b"\xfe\xff": ("text in UTF-16", "save it in UTF-8"),
    b"SQLite format 3": ("an SQLite database", "write its table as CSV"),
    b"\x93NUMPY": ("an array of NumPy", "write it as CSV"), b"\x89HDF": ("an HDF5 file", "write its table as CSV"),
}  # fmt: skip


def read_text(path: Path, most_bytes: int, fix: str, error: type[UserError] = UserError) -> bytes:
    """Return the content of a text file in UTF-8, without its byte order mark; `.gz` is unpacked.

    Raises `error` if it is larger than `most_bytes`, or unpacks to a hundred times its size and more than 64 MiB.
    """
    content = read_bytes(path, most_bytes, fix, error)
    _check_kind(path, content, path.suffix == ".gz", error)
    if path.suffix == ".gz":
        limit = min(most_bytes, max(_PACKED * len(content), 64 * MIB))
        packed = io.BytesIO(content)
        with reading(str(path), "damaged", "a file that gzip unpacks", fix, error), gzip.open(packed) as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            allowed = f"at most {limit / MIB:.0f} MiB of text in a packed file of this size"
            raise error(str(path), "more than that", allowed, fix)
        _check_kind(path, content, False, error)
    with reading(str(path), "damaged", "text in UTF-8", fix, error):
        content.decode("utf-8")
    if b"\0" in content[: 2 * _SHOWN]:
        allowed = "text in UTF-8; this is UTF-16, or no text"
        raise error(str(path), "bytes of 0", allowed, "save it in UTF-8, or unpack it")
    return content.removeprefix(codecs.BOM_UTF8)


def _check_kind(path: Path, content: bytes, packed: bool, error: type[UserError]) -> None:
    """Raise `error` for a file that begins like another kind, and for an archive; `packed`: gzip is expected."""
    if path.name.endswith((".tgz", ".tar.gz", ".tar")) or content[257:262] == b"ustar":
        raise error(str(path), "an archive of files", "text in UTF-8, plain or in a .gz file", "unpack it: tar xf FILE")
    for begins, (what, instead) in _OTHER_KINDS.items():
        if content.startswith(begins) and (begins != _GZIP or not packed):
            twice = begins == _GZIP and path.suffix == ".gz"
            fix = "it is packed twice: unpack it once" if twice else instead
            raise error(str(path), what, "text in UTF-8, plain or in a .gz file", fix)


def lines_of(text: str) -> list[str]:
    """Split a text into lines as JSON lines and tables have them; str.splitlines also splits at signs within texts."""
    return re.split(r"\r\n|\n|\r", text)


def check_quotes(name: str, content: bytes, fix: str, separator: str = ",") -> None:
    """Raise UserError if a quote in CSV is never closed: all rows after it would be one cell."""
    if content.count(b'"') % 2 == 0:
        return
    rows, ended = csv.reader(io.StringIO(content.decode(), newline=""), delimiter=separator, strict=True), 0
    try:
        for _ in rows:
            ended = rows.line_num
    except csv.Error as error:
        if "unexpected end" in str(error):
            told = f"a quote that nothing closes, to line {rows.line_num}"
            raise UserError(f"{name}, line {ended + 1}", told, "quotes in pairs", fix) from error


def read_parquet(
    path: Path, columns: Mapping[str, str], fix: str, most_rows: int, content: bytes | None = None, exact: bool = False
) -> dict[str, NDArray[Any]]:
    """Read columns of a Parquet file by name, (rows,) each, of these kinds: whole, number, maybe, flag or text.

    "whole" gives int64 and "number" float64, both without gaps; "maybe" is a number with NaN for gaps; "flag" gives
    bool and "text" objects. `content`: the file's bytes, if they have been read already. `exact`: no other column may
    be there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if content is None:
        content = read_bytes(path, _MOST_PARQUET_BYTES, fix)
    with reading(str(path), "damaged", "a Parquet file", fix), pq.ParquetFile(pa.BufferReader(content)) as file:
        about = file.metadata
        held = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        if about.num_rows > most_rows or about.num_columns > 1_000 or held > _MOST_PARQUET_BYTES:
            allowed = f"at most {most_rows} rows, 1000 columns and {_MOST_PARQUET_BYTES // MIB} MiB"
            raise UserError(str(path), f"{about.num_rows} rows, {about.num_columns} columns", allowed, fix)
        names = file.schema_arrow.names
        for name in columns:
            if names.count(name) != 1:
                raise UserError(str(path), names[:20], f"one column {name}", fix)
        others = [name for name in names if name not in columns]
        if exact and others:
            raise UserError(str(path), others[:20], "no columns but those that its header names", fix)
        table = file.read(columns=list(columns), use_threads=False)
        return {name: _column(path, name, kind, table[name], fix) for name, kind in columns.items()}


def _column(path: Path, name: str, kind: str, column: Any, fix: str) -> NDArray[Any]:
    """Convert a column to NumPy. Its own to_numpy imports pandas, which takes each process a third of a second."""
    import pyarrow as pa

    wanted = {"whole": pa.int64(), "number": pa.float64(), "maybe": pa.float64(), "flag": pa.uint8()}.get(kind)
    with reading(f"{path}: {name}", str(column.type), f"a column of type {kind}", fix):
        is_number = pa.types.is_integer(column.type) or (kind != "whole" and pa.types.is_floating(column.type))
        fits = {
            "flag": pa.types.is_boolean(column.type),
            "text": pa.types.is_string(column.type) or pa.types.is_dictionary(column.type),
            "maybe": is_number or pa.types.is_null(column.type),
        }.get(kind, is_number)
        if not fits:
            raise ValueError("another type")
        if wanted is None and column.null_count:
            raise ValueError("cells are empty")
        if wanted is None:
            return np.array([str(value) for value in column.to_pylist()], dtype=object)
        if kind == "maybe" and column.null_count:
            return np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)
        if column.null_count:
            raise ValueError("cells are empty")
        # A cast imports pyarrow.compute, which takes 25 ms, so NumPy widens shorter whole numbers.
        is_exact = column.type == wanted or (pa.types.is_integer(column.type) and column.type.bit_width < 64)
        values = np.from_dlpack((column if is_exact else column.cast(wanted)).combine_chunks())
        return values.view(np.bool_) if kind == "flag" else values.astype(wanted.to_pandas_dtype(), copy=False)
