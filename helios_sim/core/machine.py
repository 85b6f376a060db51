"""Machine code of the serving loop: the same functions, compiled if a run is long enough to pay for it.

Compiling takes seconds, so the object code is kept on disk (`native`). The folder's name depends on the text of all
compiled files and on Numba's version. A folder that is damaged, or was made for another kind of processor, is made
anew; if it cannot be written, the code is not kept. Whether code is compiled never changes a result.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import getmembers, isfunction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.core import native, passes, places
from helios_sim.core.layout import CHUNK, WORK, Storage, Tables
from helios_sim.shared_data import cache_folder

_STORAGE = Storage(compiled=True)
_PACKAGE = Path(__file__).parent
_MODULES = (
    "advance", "arrive", "blocks", "commit", "depths", "line", "power", "prefix", "price", "schedule", "triggers",
    "route", "operate", "evidence",
)  # fmt: skip
_LISTED = "digests.json"  # written last: a folder that has it is complete
_PROCESSOR = "processor"  # key among the digests: the processor that the code is for
_LOOP, _ESTIMATE, _WEIGH = "route.o", "estimate.o", "weigh.o"
_OTHERS = {_ESTIMATE: ("operate", "estimate"), _WEIGH: ("evidence", "weigh")}  # module, function
_TYPES = "types.txt"  # types of the tables that the loop was compiled for
_CALLED = (  # functions that are not inlined: called from several places, or seldom
    "settle", "find", "hold", "extend", "release", "leave_blocks", "by_prefix", "blocks_to_draft", "keep_accepted",
    "lay_out_pass", "give_blocks", "drawn_since", "blocks_to_regroup", "split_at", "hold_back",
    "gather", "lay_out_releases", "note_releases", "_with_late_layers_s", "note_unread", "arrive", "occupy",
    "_unequal_plane", "_mixed_s", "_drop", "price_one",
)  # fmt: skip
WORTH_COMPILING = 2000  # requests that take about as long to interpret as the loop takes to compile


class Machine:
    """The compiled functions of one process. The first call of each compiles it, unless its code is on disk.

    `own` is the folder into which this process compiles; it is renamed to `common` when it is complete.
    """

    def __init__(self, folder: Path | None, own: Path | None = None, common: Path | None = None) -> None:
        self._folder, self._own, self._common = folder if own is None else None, own, common
        self._loop = self._kept(_LOOP)
        self._others: dict[str, native.Native] = {}  # that have been asked for
        self._types: list[tuple[Any, int]] | None = None
        self._tables: Tables | None = None

    def _kept(self, name: str) -> native.Native | None:
        return None if self._folder is None else native.Native((self._folder / name).read_bytes())

    def loop(self) -> Callable[..., int]:
        """`route` for one caller, which must call `require_types` for its tables first."""
        return _Lazy(self.compile_loop)

    def estimate(self) -> Callable[..., int]:
        """`estimate` for one caller."""
        return _Lazy(lambda args: self._compile_other(_ESTIMATE, args))

    def weigh(self) -> Callable[..., int]:
        """`weigh` for one caller."""
        return _Lazy(lambda args: self._compile_other(_WEIGH, args))

    def compile_loop(self, args: Sequence[Any]) -> native.Native:
        """Compile `route` for arrays like those of `args`, and for the types of the replicas' tables."""
        if self._loop is None:
            from helios_sim.core.route import route

            assert self._tables is not None
            replicas = places.array_type(places.type_of(self._tables))
            self._loop = self._compile(_LOOP, route, [replicas, *map(places.type_of, args[1:])])
            if self._own is not None:
                self._keep(self._tables)
        return self._loop

    def _compile_other(self, name: str, args: Sequence[Any]) -> native.Native:
        found = self._others.get(name) or self._kept(name)
        if found is None:
            module, function = _OTHERS[name]
            of_module = getattr(import_module(f"helios_sim.core.{module}"), function)
            found = self._compile(name, of_module, list(map(places.type_of, args)))
        self._others[name] = found
        return found

    def _compile(self, name: str, function: Callable[..., int], kinds: Sequence[Any]) -> native.Native:
        import numba
        from numba.extending import register_jitable

        _register_all(register_jitable)
        with _quickly_compiled():
            # Nothing here allocates arrays, so none has its references counted.
            jit: Any = numba.njit
            of_plain = jit(error_model="numpy", _nrt=False, pipeline_class=passes.compiler_class())
            code = native.compiled(of_plain(function), kinds)
        if self._own is not None:
            with suppress(OSError):
                (self._own / name).write_bytes(code)
        return native.Native(code)

    def require_types(self, tables: Tables) -> None:
        """Raise TypeError unless these tables have the types that the loop is compiled for: it does not check them."""
        types = [(array.dtype, array.ndim) for array in places.arrays_of(tables)]
        if self._types is None:
            self._types, self._tables = types, tables
            if self._folder is not None and (self._folder / _TYPES).read_text() != _text(types):
                self._loop = self._folder = None
        if types != self._types:
            raise TypeError(f"tables of another kind than the compiled loop reads: {types}, not {self._types}")

    def require_type(self, place: int, array: NDArray[Any]) -> None:
        """Raise TypeError unless the array at this place has the compiled type and is contiguous."""
        assert self._types is not None
        if (array.dtype, array.ndim) != self._types[place] or not array.flags.c_contiguous:
            raise TypeError(f"an array of another kind than the compiled loop reads: {array.dtype}, {array.ndim} axes")

    def _keep(self, of: Tables) -> None:
        """Make the code that this process has compiled the common folder, completely or not at all."""
        numbers = _STORAGE.numbers
        self._compile_other(_ESTIMATE, (
            of.prices, of.scalars, of.iterations, of.uniform, of.uniform_layers, _STORAGE.rows(WORK, 1),
            _STORAGE.rows(CHUNK, 1), numbers(0, 9), numbers(4), np.zeros((0, 3)), numbers(0), np.zeros(0),
        ))  # fmt: skip
        counts = numbers(0, 0)
        self._compile_other(_WEIGH, (numbers(0), numbers(0), counts, np.zeros(0), counts, counts, np.zeros((0, 0))))
        own, common = self._own, self._common
        self._own = None
        assert own is not None
        assert common is not None
        with suppress(OSError):
            (own / _TYPES).write_text(_text(self._types))
            listed = {path.name: _digest(path) for path in sorted(own.iterdir())}
            (own / _LISTED).write_text(json.dumps({_PROCESSOR: native.processor(), **listed}))
            own.rename(common)  # fails if another process was quicker
        shutil.rmtree(own, ignore_errors=True)


class _Lazy:
    """A function for one caller, loaded or compiled with the first call."""

    def __init__(self, make: Callable[[Sequence[Any]], native.Native]) -> None:
        self._make = make
        self._call: native.Call | None = None

    def __call__(self, *args: Any) -> int:
        if self._call is None:
            self._call = native.Call(self._make(args))
        return self._call(*args)


def for_run(requests: int, compiled: bool | None = None) -> Machine | None:
    """The machine code if so many requests are worth compiling, or if it is there already; None to interpret.

    `compiled` decides instead if given. The result of a run does not depend on it.
    """
    return load() if (runs_compiled(requests) if compiled is None else compiled) else None


def runs_compiled(requests: int) -> bool:
    """Whether a run of so many requests uses machine code, which is there or would be compiled for it."""
    return _can_compile() and (requests >= WORTH_COMPILING or loaded() is not None or is_made())


@cache
def load() -> Machine | None:
    """The compiled loop, read from disk or to be compiled now; None without Numba or with NUMBA_DISABLE_JIT."""
    if not _can_compile():
        return None
    folder = code_folder()
    if _is_whole(folder):
        return Machine(folder)
    own = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        own.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Machine(None)
    print("compiling the serving loop to machine code, once on this machine: some 8 s", file=sys.stderr, flush=True)
    return Machine(own, own, folder)


def loaded() -> Machine | None:
    """The compiled loop if this process has loaded it already."""
    return load() if load.cache_info().currsize else None


def is_made() -> bool:
    """Whether the machine code is on disk and complete, so that it need not be compiled."""
    return _can_compile() and _is_whole(code_folder())


@cache
def code_folder() -> Path:
    """Return the cache folder of the compiled sources, named by their content; it may not exist."""
    texts = [path.read_bytes() for path in sorted(_PACKAGE.glob("*.py"))]
    numba = find_spec("numba")
    version = "" if numba is None or numba.origin is None else _version("numba")
    key = "|".join([version, _version("numpy"), sys.version, str(_PACKAGE)]).encode()
    name = hashlib.sha256(b"".join([*texts, key])).hexdigest()[:16]
    return cache_folder() / "compiled" / name


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


@cache
def _can_compile() -> bool:
    return find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


def _is_whole(folder: Path) -> bool:
    """Whether every file is as it was written: damaged machine code would crash the interpreter."""
    try:
        digests: dict[str, str] = json.loads((folder / _LISTED).read_text())
        if digests.pop(_PROCESSOR) != native.processor() or not {_LOOP, *_OTHERS} <= digests.keys():
            return False
        return all(_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _quickly_compiled() -> Iterator[None]:
    """Compile without steps that take seconds and make the loop no faster.

    These are: compiling a function again for callers with other flags, writing out the fields of records in messages
    that are never shown, and garbage collections, which would visit Numba's many objects again and again.
    """
    import numba

    overloads: Any = import_module("numba.core.typing.templates")._OverloadFunctionTemplate
    by_flags = overloads._get_impl
    record: Any = numba.types.Record
    in_full = record.__repr__
    collects = gc.isenabled()
    gc.disable()
    overloads._get_impl, record.__repr__ = _implementation, lambda kind: kind.name
    try:
        yield
    finally:
        overloads._get_impl, record.__repr__ = by_flags, in_full
        if collects:
            if not gc.get_freeze_count():  # count all objects as old, so that the next collection does not visit them
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _implementation(template: Any, args: Sequence[Any], named: dict[str, Any]) -> Any:
    """Return the implementation for arguments of these types, in place of Numba's own look-up."""
    key = template.context, tuple(args), tuple(named.items())
    known = template._impl_cache.get(key)
    return template._build_impl(key, args, named) if known is None else known


def _text(types: Any) -> str:
    return "\n".join(map(str, types))


@cache
def _register_all(register_jitable: Callable[..., Any]) -> None:
    """Let compiled code call the loop's functions. For all other callers they stay plain Python."""
    plain = passes.compiler_class()
    for module in (import_module(f"helios_sim.core.{name}") for name in _MODULES):
        for name, function in getmembers(module, isfunction):
            if function.__module__ == module.__name__ and name != "route":
                register_jitable(
                    error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False,
                    forceinline=name not in _CALLED, pipeline_class=plain,
                )(function)  # fmt: skip
