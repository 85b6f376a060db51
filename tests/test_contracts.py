"""What the package promises about its own shape: light imports, plain docstrings, one version, no stray names."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "pandas", "matplotlib", "scipy.stats", "pyarrow", "hydra")


def loaded_by(statement: str, repository: Path) -> set[str]:
    """Names of the heavy modules that a fresh interpreter holds after the statement."""
    code = f"import sys, json; {statement}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def modules(repository: Path) -> list[Path]:
    return sorted((repository / "helios_sim").rglob("*.py"))


def test_importing_the_package_loads_nothing_heavy(repository: Path) -> None:
    assert loaded_by("import helios_sim", repository) == set()


@pytest.mark.slow
@pytest.mark.parametrize("package", ["policy.telemetry", "serving.stats", "report.result", "report.metrics"])
def test_importing_the_core_loads_neither_torch_nor_plotting_nor_tables(package: str, repository: Path) -> None:
    if not (repository / "helios_sim" / f"{package.replace('.', '/')}.py").exists():
        pytest.fail(f"helios_sim.{package} moved: name its new place here")
    assert loaded_by(f"import helios_sim.{package}", repository) == set()


@pytest.mark.slow
def test_no_module_of_the_simulator_loads_torch(repository: Path) -> None:
    names = [
        ".".join(path.relative_to(repository).with_suffix("").parts)
        for path in modules(repository)
        if "live" not in path.parts and path.name != "__main__.py"
    ]
    statement = "import importlib; [importlib.import_module(n) for n in " + repr(names) + "]"
    assert loaded_by(statement, repository).isdisjoint({"torch", "transformers"})


@pytest.mark.slow
def test_every_module_says_what_it_knows(repository: Path) -> None:
    silent = [str(path) for path in modules(repository) if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


PREPOSITIONS = {
    "about", "above", "after", "among", "apart", "as", "at", "before", "below", "between", "beyond", "by",
    "during", "for", "from", "in", "of", "on", "over", "per", "since", "through", "to", "under", "until",
    "upon", "where", "while", "with", "within", "without",
}


@pytest.mark.parametrize("package", ["helios_sim", "calibrate"])
def test_a_docstring_opens_with_what_a_thing_is_or_does(package: str, repository: Path) -> None:
    """Not with a preposition: "Of each arm, ..." leaves the reader to guess what is of each arm."""
    opened = []
    for path in sorted((repository / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first, *_ = (ast.get_docstring(node) or "It").split()
                if first.lower().strip("`,.:") in PREPOSITIONS:
                    opened.append(f"{path}: {getattr(node, 'name', 'module')}")
    assert not opened
