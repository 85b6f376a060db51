"""Mutants of folders of measured tables: kernel times by layer with their meta.yaml, and Vidur's two tables."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from faults import Mutant, changed_bytes, main
from faults.text_tables import changed_table, packed

MODEL, HARDWARE = "Qwen/Qwen2.5-0.5B", "RTX4090"
META = (
    f"model: {MODEL}\nhardware: {HARDWARE}\nmeasurement_iterations: 3\nengine_effective: {{tensor_parallel_size: 1}}\n"
)
METAS = (
    "", "[]", "1", "model", "model: [", "a: &a [1, 1]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n", "[" * 20_000,
    "{a: " * 9_000,
    "!!python/object/apply:os.system [ls]", "model: 7\n", "hardware: {a: 1}\n", "measurement_iterations: -3\n",
    "measurement_iterations: 1e30\n", "tp_degrees: 1\n", "tp_degrees: [a]\n", "engine_effective: x\n", "\0",
    "model: ../x\n",
    "engine_effective: {tensor_parallel_size: x}\n", "? {a: 1}\n: 2\n", "profiled_at: 2024-01-01\n", "gpu: [1, 2]\n",
)  # fmt: skip


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield _written("unchanged", "layers", dict(_files("layers")))
    while True:
        importer = rng.choice(("layers", "vidur"))
        files = dict(_files(importer))
        name = rng.choice(sorted(files))
        kind = rng.choice(("table", "table", "table", "table", "bytes", "file", "other", "packed"))
        if name == "meta.yaml":
            kind, what = "meta", rng.choice(METAS)
            files[name] = rng.choice((what, META + what)).encode(errors="surrogatepass")
        elif kind == "table":
            what, files[name] = changed_table(files[name].decode(), rng)
        elif kind == "bytes":
            what, files[name] = changed_bytes(files[name], rng)
        elif kind == "packed":
            what, files[f"{name}.gz"] = packed(files.pop(name), rng)
        elif kind == "file":
            what = "gone"
            del files[name]
        else:
            what = rng.choice(("linear_attention.csv", "moe.csv", "x.csv", "attention.csv.gz", "skew.csv", "notes.txt"))
            files[what] = files[name]
        yield _written(f"{importer} {kind}, {name}: {what[:80]!r}", importer, files)


def read(path: Path) -> None:
    """Import the folder and price an iteration, whose time must be finite."""
    import numpy as np

    from helios_sim.profile.catalog import CARDS, published_model
    from helios_sim.profile.composition import Composition
    from helios_sim.profile.importers.layers import layer_profile
    from helios_sim.profile.importers.vidur import vidur_profile
    from helios_sim.profile.runtimes import preset

    build = layer_profile if path.name == "layers" else vidur_profile
    profile = build(path, published_model(MODEL), HARDWARE, CARDS["rtx4090"], preset("captured_graphs"))
    whole = np.array([[3], [70]])
    seconds = profile.iteration_time_s(Composition((profile.model.n_layers,), whole, whole * 90, whole[:, 0]))
    assert bool(np.isfinite(seconds).all() and (seconds > 0).all()), f"a price of {seconds}"


@cache
def _files(importer: str) -> tuple[tuple[str, bytes], ...]:
    from test_importers import write_vidur
    from vllm_log import write_profile

    with TemporaryDirectory() as made:
        folder = Path(made) / importer
        if importer == "vidur":
            write_vidur(folder)
        else:
            write_profile(folder, MODEL, HARDWARE, ".csv")
            (folder / "meta.yaml").write_text(META)
        return tuple((path.name, path.read_bytes()) for path in sorted(folder.iterdir()))


def _written(what: str, importer: str, files: dict[str, bytes]) -> Mutant:
    def write(folder: Path) -> Path:
        path = folder / importer
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        return path

    return Mutant(what, write)


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
