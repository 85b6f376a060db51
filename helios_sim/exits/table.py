"""An exit trace from a table of one's own, in CSV or Parquet.

One row a token, those of a prompt in reading order, with a column for each exit depth D:

- agree_D: 1 or true where the exit predicts the token that the whole model predicts; for every exit but the deepest,
  which is the whole model, where it may be left out.
- confidence_D (the largest probability), margin_D, entropy_D, classifier_D, hidden_similarity_D, predictor_D: at least
  one of them, as `rule` defines them. The deepest may be left out, if its agree is there: a token has nowhere else to
  leave.
- log_prob_D, optional: the natural logarithm of the probability of the text's own token; for all exits.

or one row a token and exit, with columns `token` (its number in the prompt), `layer`, and the same names without depth.
Besides: prompt (a number or a name), chars (characters that the token covers; else `chars_per_token` says so of all),
and, where there are several, task. One row a token, a column `token` must rise within a prompt. Other columns are not
read, and named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim import files
from helios_sim.contents import sha256_of
from helios_sim.errors import UserError
from helios_sim.exits.rule import BY_COLUMN
from helios_sim.exits.trace import ANY_TASK, MOST_BITS, ExitTrace
from helios_sim.provenance import NOT_READ, Provenance, ProvenanceClass
from helios_sim.untrusted import MIB, check_quotes, read_bytes, read_parquet, read_text, reading

SUFFIXES = (".csv", ".csv.gz", ".parquet")
MOST_TOKENS, MOST_EXITS, _MOST_BYTES = 20_000_000, 127, 256 * MIB
_ROUNDED = 0.01  # rounded figures of one token may contradict each other by this much
_PER_EXIT = ("agree", *BY_COLUMN, "log_prob")
_DEPTH = re.compile(rf"({'|'.join(_PER_EXIT)})_([1-9]\d{{0,4}})")
_LONG = ("token", "layer")
_PER_TOKEN = ("task", "prompt", "chars")
_FIX = "see python -m helios_sim.exits.import --help"

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Told:
    """Facts that a table does not hold, told by the user."""

    chars_per_token: float | None = None  # of all tokens; None if the column chars gives it
    human_text: bool | None = None  # whether people wrote the text; required with log-probabilities
    source: str | None = None  # on what and how it was recorded


def is_table(source: str | Path) -> bool:
    """Whether the name is one of a table; the file is not opened."""
    return str(source).endswith(SUFFIXES)


def read_table(
    path: Path, model: str, told: Told | None = None, is_named: bool = True
) -> tuple[ExitTrace, list[str]]:
    """Reads the trace, with the names of unread columns. UserError if the table does not hold a trace.

    With `is_named` the user has named the model, and a column that names another model is refused.
    """
    told = Told() if told is None else told
    content = _as_parquet(path)
    kinds = _kinds(path, content)
    found = read_parquet(path, kinds, _FIX, MOST_TOKENS * (MOST_EXITS if "layer" in kinds else 1), content)
    if "layer" in found:
        found = _wide(path, found)
    else:
        _check_order(path, found)
    ignored = [name for name in _names(path, content) if name not in kinds]
    _check_one_model(path, content, ignored, model if is_named else None)
    return _trace(path, model, found, told, ignored), ignored


def _as_parquet(path: Path) -> bytes:
    if path.suffix == ".parquet":
        return read_bytes(path, _MOST_BYTES, _FIX)
    import pyarrow as pa
    from pyarrow import csv

    text = read_text(path, _MOST_BYTES, _FIX)
    header = text.partition(b"\n")[0]
    if b"," not in header and (b"\t" in header or b";" in header or header[:1] in (b"{", b"[")):
        told = header[:60].decode(errors="replace").strip()
        raise UserError(str(path), told, "comma-separated values with a header", "write it as CSV or Parquet")
    check_quotes(path.name, text, "correct the line")
    with reading(str(path), "damaged", "comma-separated values with a header", _FIX):
        return files.parquet(csv.read_csv(pa.BufferReader(text)))


def _schema(path: Path, content: bytes) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(str(path), "damaged", "a Parquet file", _FIX):
        return pq.read_schema(pa.BufferReader(content))


def _names(path: Path, content: bytes) -> list[str]:
    return list(_schema(path, content).names)


def _kinds(path: Path, content: bytes) -> dict[str, str]:
    """The columns to read, each with its kind as `read_parquet` names them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(path, content)
    if not pq.read_metadata(pa.BufferReader(content)).num_rows:
        raise UserError(str(path), "no rows", "a row for each token", _FIX)
    names = Counter(schema.names)
    is_long = "layer" in names
    kinds: dict[str, str] = {}
    for field in schema:
        name = field.name
        kind = field.type if names[name] == 1 else None
        per_exit = name if is_long and name in _PER_EXIT else _depth(name)[0] if not is_long else ""
        whole = "flag" if kind is not None and pa.types.is_boolean(kind) else "whole"
        if kind is not None and pa.types.is_floating(kind):
            whole = "number"  # pandas writes 1.0 and 0.0 in columns with gaps; other values are refused later
        if per_exit:
            kinds[name] = whole if per_exit == "agree" else "number"
        elif name in ("task", "prompt"):
            kinds[name] = "whole" if kind is not None and pa.types.is_integer(kind) else "text"
        elif name in ("chars", "token") or (is_long and name in _LONG):
            kinds[name] = "whole"
        elif not is_long and re.fullmatch(rf"({'|'.join(_PER_EXIT)})_\d+", name):
            raise UserError(f"{path}: {name}", name, "depths from 1, 01 is none: so many layers have run", "rename it")
    for name in ("prompt", *(_LONG if is_long else ())):
        if name not in kinds:
            raise UserError(str(path), ", ".join(list(names)[:12]), f"a column {name} is missing", _FIX)
    return kinds


def _check_one_model(path: Path, content: bytes, ignored: list[str], model: str | None) -> None:
    """Raises UserError if the rows are of several models, or of another model than `model`.

    Removes columns that name this `model` from `ignored`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in [*ignored]:
        if name.lower() in ("model", "model_name", "model_id"):
            found = pq.read_table(pa.BufferReader(content), columns=[name])[name].unique().to_pylist()
            if len(found) > 1:
                allowed = "one model in all rows: a trace is of one"
                raise UserError(f"{path}: {name}", found[:5], allowed, "keep the rows of one of them in each file")
            if model is not None and found[0] is not None and _plain(str(found[0])) != _plain(model):
                fix = "name the model that it was recorded with, or take the column out"
                raise UserError(f"{path}: {name}", found[0], f"{model}, for which the table is named", fix)
            if model is not None:
                ignored.remove(name)


def _plain(model: str) -> str:
    """The name of a model in a form to compare: facebook/opt-1.3b and OPT_1.3B are opt-1.3b."""
    return model.rstrip("/").rpartition("/")[2].lower().replace("_", "-")


def _depth(name: str) -> tuple[str, int]:
    """Splits the name of an exit's column: "agree_6" gives ("agree", 6), any other name ("", 0)."""
    found = _DEPTH.fullmatch(name)
    return (found[1], int(found[2])) if found else ("", 0)


def _wide(path: Path, found: Mapping[str, Array]) -> dict[str, Array]:
    """Turns a table with one row per token and exit into one with one row per token."""
    layers = np.unique(found["layer"])
    if len(layers) > MOST_EXITS or layers[0] < 1:
        raise UserError(f"{path}: layer", layers.tolist()[:5], f"1 to {MOST_EXITS} depths, each at least 1", _FIX)
    # Tokens stay in the file's order of prompts; within a prompt they go by their number.
    keys = [np.unique(found[name], return_inverse=True)[1].ravel() for name in ("task", "prompt") if name in found]
    order = np.lexsort((found["layer"], found["token"], *reversed(keys)))
    n, rest = divmod(len(order), len(layers))
    tokens = order.reshape(n, -1) if not rest else order[: n * len(layers)].reshape(n, -1)
    alike = [np.all(found[name][tokens] == found[name][tokens[:, :1]], axis=1) for name in found if name in
             ("task", "prompt", "token", "chars")]  # fmt: skip
    bad = np.flatnonzero(~(np.all(found["layer"][tokens] == layers, axis=1) & np.all(alike, axis=0)))
    if rest or len(bad):
        row = int(tokens[bad[0], 0]) + 2 if len(bad) else len(order) + 1
        allowed = f"each token once at each of the layers {', '.join(map(str, layers))}, with the same chars"
        raise UserError(f"{path}: row {row}", "not so", allowed, "complete the table")
    first = tokens[:, 0]
    wide = {name: found[name][first] for name in _PER_TOKEN if name in found}
    for name in _PER_EXIT:
        if name in found:
            wide |= {f"{name}_{layer}": found[name][tokens[:, e]] for e, layer in enumerate(layers)}
    return wide


def _trace(path: Path, model: str, found: Mapping[str, Array], told: Told, ignored: list[str]) -> ExitTrace:
    depths = {name: _depth(name) for name in found if _depth(name)[0]}
    exits = tuple(sorted({depth for _, depth in depths.values()}))
    if not exits or len(exits) > MOST_EXITS:
        raise UserError(str(path), ", ".join(found), f"agree_D and a confidence for 1 to {MOST_EXITS} depths D", _FIX)
    n = len(found["prompt"])
    for name in ("task", "prompt"):
        empty = np.flatnonzero(found[name].astype(str) == "") if name in found else np.zeros(0, np.int64)
        if len(empty):
            raise UserError(f"{path}: row {int(empty[0]) + 2}: {name}", "", "a name in every row, or no column", _FIX)
    task = found.get("task", np.full(n, ANY_TASK, dtype=object))
    names, number = np.unique(task.astype(str), return_inverse=True)
    of_prompt = np.char.add(np.char.add(names[number], "\n"), found["prompt"].astype(str))
    _, first, prompts = np.unique(of_prompt, return_index=True, return_inverse=True)
    order = np.lexsort((first[prompts.ravel()], number))  # rows of a prompt together, as they stand
    filled: list[str] = []

    def column(name: str, at_the_end: float | None) -> Array | None:
        """The values (T, E) at all exits; None if there are none. `at_the_end` stands for a missing deepest column."""
        held = [found.get(f"{name}_{depth}") for depth in exits]
        if all(values is None for values in held):
            return None
        if held[-1] is None and at_the_end is not None:
            held[-1] = np.full(n, at_the_end)
            filled.append(f"{name}_{exits[-1]}")
        missing = [depth for depth, values in zip(exits, held, strict=True) if values is None]
        if missing:
            raise UserError(str(path), f"no {name}_{missing[0]}", f"{name} at every exit", "add it, or leave all out")
        return np.column_stack([np.asarray(values, np.float64) for values in held])[order]

    agree = column("agree", 1.0)
    if agree is None:
        raise UserError(str(path), ", ".join(found), "columns agree_D are missing", _FIX)
    if not np.isin(agree, (0.0, 1.0)).all():
        raise UserError(f"{path}: agree", float(agree[~np.isin(agree, (0, 1))][0]), "0 or 1, true or false", _FIX)
    by_name = {name: values for name in BY_COLUMN if (values := column(name, 1.0)) is not None}
    recorded = {BY_COLUMN[name]: values for name, values in by_name.items()}
    _check_shares(path, exits, order, by_name | {"log_prob": column("log_prob", None)})
    if not recorded:
        raise UserError(str(path), ", ".join(found), f"one of {', '.join(f'{name}_D' for name in BY_COLUMN)}", _FIX)
    source = told.source or f"{path.name}, a table of tokens and exits"
    return ExitTrace(
        model=model,
        exits=exits,
        tasks=tuple(map(str, names)),
        task=number[order].astype(np.int32),
        prompt=prompts.ravel()[order].astype(np.int32),
        chars=_chars(path, found, told, n)[order],
        agree=agree.astype(np.bool_),
        provenance=Provenance(
            ProvenanceClass.MEASURED,
            f"{source} (sha256 {sha256_of(path)[:16]})",
            "python -m helios_sim.exits.import",
            scaled=tuple(f"{name}: 1, since no token can leave elsewhere" for name in filled),
            details={NOT_READ: f"{path.name}: not read: {', '.join(ignored[:12])}"} if ignored else {},
        ),
        confidences={c: values.astype(np.float32) for c, values in recorded.items()},
        bits=_bits(path, column("log_prob", None), told),
        human_text=bool(told.human_text),
    )


def _check_order(path: Path, found: Mapping[str, Array]) -> None:
    """Raises UserError if the numbers of tokens do not rise in the order of rows."""
    if "token" not in found:
        return
    keys = [np.unique(found[name], return_inverse=True)[1].ravel() for name in ("prompt", "task") if name in found]
    order = np.lexsort(keys)  # which keeps the rows of a prompt as they stand
    number, of_prompt = found["token"][order], np.stack(keys)[:, order]
    bad = np.flatnonzero((np.diff(number) <= 0) & (np.diff(of_prompt) == 0).all(axis=0))
    if len(bad):
        at = int(bad[0])
        told = f"{number[at + 1]} after {number[at]}, in one prompt"
        place = f"{path}: row {int(order[at + 1]) + 2}: token"
        again = bool(number[at + 1] == number[at])
        fix = "remove the rows that are there twice" if again else "sort the rows, or leave the column out"
        raise UserError(place, told, "tokens in reading order, each once", fix)


def _check_shares(path: Path, exits: tuple[int, ...], order: Array, found: Mapping[str, Array | None]) -> None:
    """Raises UserError if a token's own probability, or the margin, exceeds the largest probability."""
    largest, own = found.get("confidence"), found.get("log_prob")
    if largest is None or (own is not None and own.max() > 0.1):  # not a logarithm: `_bits` refuses it
        return
    shares = {"margin": found.get("margin"), "log_prob": None if own is None else np.exp(np.minimum(own, 0.0))}
    for name, values in shares.items():
        if values is not None and (values > largest + _ROUNDED).any():
            at, e = (int(i[0]) for i in np.nonzero(values > largest + _ROUNDED))
            what = "a probability" if name == "log_prob" else "a margin"
            told = f"{what} of {values[at, e]:.3g}, confidence_{exits[e]} {largest[at, e]:.3g}"
            allowed = "no more than the largest probability; log_prob is a natural logarithm"
            raise UserError(f"{path}: row {int(order[at]) + 2}: {name}_{exits[e]}", told, allowed, _FIX)


def _chars(path: Path, found: Mapping[str, Array], told: Told, n: int) -> NDArray[np.int32]:
    if "chars" in found:
        if told.chars_per_token is not None:
            raise UserError("chars_per_token", told.chars_per_token, f"{path} has a column chars", "leave it out")
        if found["chars"].min() < 0 or found["chars"].max() > 10_000:
            bad = found["chars"][(found["chars"] < 0) | (found["chars"] > 10_000)]
            raise UserError(f"{path}: chars", int(bad[0]), "from 0 to 10000", _FIX)
        return np.asarray(found["chars"].astype(np.int32))
    if told.chars_per_token is None:
        allowed = "a column chars (characters that the token covers), or chars_per_token for all of them"
        fix = f"add the column, or python -m helios_sim.exits.import {path} chars_per_token=..."
        raise UserError(str(path), ", ".join(found), allowed, fix)
    ends = np.rint(np.arange(n + 1) * told.chars_per_token)
    return np.asarray(np.diff(ends), np.int32)


def _bits(path: Path, log_prob: Array | None, told: Told) -> NDArray[np.float32] | None:
    if log_prob is None:
        if told.human_text is not None:
            allowed = f"it counts with log_prob_D, which {path} lacks"
            raise UserError("human_text", told.human_text, allowed, "leave it out")
        return None
    if told.human_text is None:
        allowed = "whether people wrote the text must be said: only then do bits per character rank models"
        fix = f"python -m helios_sim.exits.import {path} human_text=true (or false)"
        raise UserError(str(path), "log_prob", allowed, fix)
    good = (log_prob <= 1e-3) & (log_prob >= -MOST_BITS * np.log(2))
    if not good.all():
        allowed = f"a natural logarithm, at most 0 and at least {-MOST_BITS * np.log(2):.3g}"
        raise UserError(f"{path}: log_prob", float(log_prob[~good][0]), allowed, _FIX)
    return np.asarray(np.maximum(0.0, -log_prob / np.log(2)), np.float32)
