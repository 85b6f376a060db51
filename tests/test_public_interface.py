"""The names that `helios_sim` offers are those that its types declare, and each loads only what it needs."""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import helios_sim


def declared() -> dict[str, str]:
    """Module by name, from the imports that only type checkers see."""
    tree = ast.parse(Path(helios_sim.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith("helios_sim")]
    return {alias.name: str(node.module) for node in ours for alias in node.names}


def test_types_and_names_agree() -> None:
    assert set(helios_sim.__all__) == {*declared(), "__version__"}
    assert list(helios_sim.__all__) == sorted(helios_sim.__all__)
    assert set(helios_sim.__all__) <= set(dir(helios_sim))


@pytest.mark.parametrize("name", sorted(declared()))
def test_each_name_is_the_one_declared(name: str) -> None:
    assert getattr(helios_sim, name) is getattr(import_module(declared()[name]), name)


def test_files_of_the_current_folder_do_not_stand_for_pythons_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, here = str(Path(random.__file__).parent), str(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [here, "set", own, f"{own}/lib-dynload", f"{own}/site-packages"])
    helios_sim._python_first()
    assert sys.path == ["set", own, f"{own}/lib-dynload", here, f"{own}/site-packages"]
    helios_sim._python_first()
    assert sys.path.index(here) == 3


def test_nor_while_a_command_starts(tmp_path: Path, repository: Path) -> None:
    """Of those that Python has not imported before it looks for the command."""
    for name in ("re", "typing", "enum", "json"):
        (tmp_path / f"{name}.py").write_text("class Policy: ...\n")
    environment = os.environ | {"PYTHONPATH": str(repository)}
    ran = subprocess.run(
        [sys.executable, "-m", "helios_sim", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (ran.stdout, ran.stderr) == (f"helios_sim {helios_sim.__version__}\n", "")


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Polcy'"):
        helios_sim.Polcy  # noqa: B018


def test_a_policy_needs_no_study(repository: Path) -> None:
    code = (
        "import sys; from helios_sim import Deployment, FixedCap, Placement, QueueAbove;"
        "assert not {'helios_sim.study', 'helios_sim.serving', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True)


@pytest.mark.slow
def test_inside_names_come_from_their_own_modules(repository: Path) -> None:
    """Through the package itself a lower layer could import a higher one, and no contract would see it; it does see
    modules.
    """
    for path in (repository / "helios_sim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "helios_sim":
                names = [alias.name for alias in node.names]
                modules = [name for name in names if (repository / "helios_sim" / f"{name}.py").is_file()]
                assert names in (["__version__"], modules), path


@pytest.mark.parametrize("package", ["helios_sim", "calibrate"])
def test_types_are_for_users_too(package: str, repository: Path) -> None:
    assert (repository / package / "py.typed").is_file()
