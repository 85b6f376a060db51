"""Profiles on disk: what is read equals what was written, and damage gets one message that names the fix."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helios_sim.errors import UserError
from helios_sim.profile.catalog import HARDWARE, MODELS
from helios_sim.profile.profile import Profile
from helios_sim.profile.roofline import roofline_profile
from helios_sim.profile.spec import Anchor, Anchors
from helios_sim.profile.store import PROFILES_FOLDER, known_profiles, load_profile, read_profile, write_profile
from helios_sim.profile.synthetic import flat_profile
from helios_sim.profile.tables import GridTable, LayerTables, RowsTable


def same(a: Any, b: Any) -> bool:
    """Equal in every field, arrays to the last bit."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (Profile, LayerTables, RowsTable, GridTable)):
        names = (f.name for f in dataclasses.fields(a) if f.init)
        return all(same(getattr(a, n), getattr(b, n)) for n in names)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def rich_profile() -> Profile:
    """Two layer classes, a cheap check, spread and sample counts: everything that the format can hold."""
    profile = roofline_profile(MODELS["llama-3-8b"], HARDWARE["h100-80gb"])
    first = profile.layer_tables[0]
    measured = dataclasses.replace(
        first.dense, iqr_s=first.dense.time_s / 10, samples=np.full(len(first.dense.rows), 50, dtype=np.int64)
    )
    grid = dataclasses.replace(first.decode_attention, iqr_s=first.decode_attention.time_s / 20)
    second = dataclasses.replace(first, dense=measured, decode_attention=grid)
    return dataclasses.replace(
        profile, layer_tables=(first, second), layer_class=(0, 1) * 16, check=first.kv_projection, mixed_factor=1.1,
        check_classifier=measured,
    )  # fmt: skip


@pytest.mark.parametrize("make", [rich_profile, lambda: flat_profile(0.25)])
def test_what_is_read_equals_what_was_written(make: Callable[[], Profile], tmp_path: Path) -> None:
    profile = make()
    write_profile(profile, tmp_path / "here")
    assert same(profile, read_profile(tmp_path / "here"))
    assert same(profile, load_profile(str(tmp_path / "here")))


def test_anchors_are_kept_and_read_from_older_files(tmp_path: Path) -> None:
    known = dataclasses.replace(flat_profile(0.01), anchors=Anchors(Anchor(4, 1e-3, 128), Anchor(64, 2e-3)))
    write_profile(known, tmp_path)
    assert read_profile(tmp_path).anchors == known.anchors
    header = json.loads((tmp_path / "profile.json").read_text())
    header["provenance"]["details"]["pace"] = header.pop("anchors")
    (tmp_path / "profile.json").write_text(json.dumps(header))
    assert read_profile(tmp_path).anchors == known.anchors
    header["provenance"]["details"]["pace"] = {"rows": 4, "layer_s": 1e-3}  # of one step, without its name
    (tmp_path / "profile.json").write_text(json.dumps(header))
    assert read_profile(tmp_path).anchors is None


def test_profiles_travel_between_processes() -> None:
    for profile in (rich_profile(), load_profile("opt-1.3b@a100-40gb").scaled(1.05)):
        assert same(profile, pickle.loads(pickle.dumps(profile)))
        assert same(profile, copy.deepcopy(profile))


def test_shipped_profiles_are_found_by_name_and_read_once() -> None:
    models = ("opt-1.3b", "opt-6.7b", "llama-2-7b", "llama-2-13b", "llama-3-8b")
    assert set(known_profiles()) >= {f"{m}@{h}" for m in models for h in ("a100-40gb", "h100-80gb")}
    for name in known_profiles():
        assert load_profile(name).name == name
    assert load_profile("opt-1.3b@a100-40gb") is load_profile("opt-1.3b@a100-40gb")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"opt-9b@a100-40gb.*opt-1\.3b@a100-40gb.*Fix"):
        load_profile("opt-9b@a100-40gb")
    with pytest.raises(UserError, match="profile"):
        load_profile("./nowhere/at-all")


def change_header(path: Path, **changes: Any) -> None:
    header = json.loads((path / "profile.json").read_text())
    (path / "profile.json").write_text(json.dumps({k: v for k, v in {**header, **changes}.items() if v is not ...}))


def change_column(path: Path, file: str, column: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    table = pq.read_table(path / file)
    values = change(table[column].to_numpy().copy())
    at = table.column_names.index(column)
    pq.write_table(table.set_column(at, column, pa.array(values)), path / file)


def put(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[index] = value
        return values

    return change


def with_model(path: Path, **changed: Any) -> dict[str, Any]:
    model: dict[str, Any] = json.loads((path / "profile.json").read_text())["model"]
    return {**model, **changed}


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no header": (lambda p: (p / "profile.json").unlink(), "profile"),
    "header is no JSON": (lambda p: (p / "profile.json").write_text("{"), "JSON"),
    "header is a list": (lambda p: (p / "profile.json").write_text("[]"), "JSON object"),
    "schema of another version": (lambda p: change_header(p, schema_version=99), "schema_version=99"),
    "no schema version": (lambda p: change_header(p, schema_version=...), "schema_version=None"),
    "header without hardware": (lambda p: change_header(p, hardware=...), "hardware"),
    "unknown model field": (lambda p: change_header(p, model={"name": "x"}), "family of model"),
    "layer class per layer": (lambda p: change_header(p, layer_class=[0]), "layer_class"),
    "impossible factor": (lambda p: change_header(p, mixed_factor=-1), "mixed_factor of .*=-1: a number"),
    "layers that take no time": (lambda p: change_header(p, mixed_factor=0), "mixed_factor of .*=0: a number"),
    "attention takes no time": (lambda p: change_header(p, unequal_kv_factor=0.0), "unequal_kv_factor of .*=0.0"),
    "a factor in words": (lambda p: change_header(p, mixed_factor="2"), "mixed_factor.*a number"),
    "an unknown key": (lambda p: change_header(p, padding=True), "padding.*no such key"),
    "no heads": (lambda p: change_header(p, model=with_model(p, n_heads=0)), "n_heads"),
    "KV heads that divide nothing": (lambda p: change_header(p, model=with_model(p, n_kv_heads=5)), "a divisor"),
    "a name with a path": (lambda p: change_header(p, model=with_model(p, name="../x")), "without /"),
    "an unknown table": (lambda p: change_column(p, "rows.parquet", "table", put(0, "tail")), "tail"),
    "a grid without end": (lambda p: change_column(p, "rows.parquet", "rows", put(13, 1 << 40)), "at most 4194304"),
    "negative load speed": (lambda p: change_header(p, load_bytes_per_s=-1.0), "load_bytes_per_s"),
    "no rows table": (lambda p: (p / "rows.parquet").unlink(), r"rows\.parquet"),
    "no Parquet": (lambda p: (p / "grids.parquet").write_bytes(b"PAR1 not really"), r"grids\.parquet"),
    "negative time": (lambda p: change_column(p, "rows.parquet", "time_s", put(3, -1e-6)), "not negative"),
    "NaN time": (lambda p: change_column(p, "rows.parquet", "time_s", put(0, np.nan)), "finite"),
    "infinite attention": (lambda p: change_column(p, "grids.parquet", "time_s", put(7, np.inf)), "finite"),
    "grid not ascending": (lambda p: change_column(p, "rows.parquet", "rows", put(2, 1)), "ascends"),
    "grid with a hole": (lambda p: change_column(p, "grids.parquet", "second", put(2, 5)), "every pair"),
    "table missing": (lambda p: change_column(p, "rows.parquet", "layer_class", lambda v: v + 1), "t: layer_class"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_with_the_place_and_the_fix(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(PROFILES_FOLDER / "opt-1.3b@a100-40gb", path)
    break_it, message = DAMAGES[damage]
    break_it(path)
    with pytest.raises(UserError, match=f"(?s){message}.*Fix"):
        load_profile(str(path))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(PROFILES_FOLDER / "opt-1.3b@a100-40gb", path)
    pq.write_table(pq.read_table(path / "rows.parquet").drop_columns(["time_s"]), path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet.*column time_s"):
        read_profile(path)


def test_a_folder_with_the_name_of_another_profile_is_refused(tmp_path: Path) -> None:
    shutil.copytree(PROFILES_FOLDER / "opt-1.3b@a100-40gb", tmp_path / "opt-6.7b@a100-40gb")
    with pytest.raises(UserError, match=r"which is opt-1\.3b@a100-40gb"):
        load_profile("opt-6.7b@a100-40gb", tmp_path)
