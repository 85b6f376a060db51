"""What SECURITY.md promises: each promise names tests that exist, and packages are pinned with their digests."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
UNDER = {
    "sweep": ("core",), "trace": ("core", "sweep"), "serve": ("core", "sweep", "trace"),
    "test": ("core", "sweep", "trace", "serve"), "live": ("core",),
}  # fmt: skip
NAMED = sorted(set(re.findall(r"`(tests/\w+\.py::\w+)`", (ROOT / "SECURITY.md").read_text())))


def pins(layer: str) -> dict[str, str]:
    """The entries of a file by name, each with the lines of its digests."""
    text = (FOLDER / f"{layer}.txt").read_text()
    return {entry.split("==")[0]: entry for entry in re.split(r"\n(?=[^\s#])", text) if "==" in entry}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def version(entry: str) -> str:
    return re.split(r"[ ;\\\n]", entry.split("==")[1])[0]


@pytest.mark.parametrize("layer", ["build", "core", "sweep", "trace", "serve", "test", "live", "audit"])
def test_every_pin_has_its_digests(layer: str) -> None:
    found = pins(layer)
    assert found
    for entry in found.values():
        assert re.fullmatch(r"[\w.-]+==[^\\]+( \\\n    --hash=sha256:[0-9a-f]{64})+\n?", entry), entry
    below = {name for under in UNDER.get(layer, ()) for name in pins(under)}
    assert below.isdisjoint(found)


def test_a_package_has_one_version_in_all_files() -> None:
    seen: dict[str, str] = {}
    for path in sorted(FOLDER.glob("*.txt")):
        for name, entry in pins(path.stem).items():
            assert seen.setdefault(name, version(entry)) == version(entry), (name, path)
    assert seen["torch"]
    assert all(re.fullmatch(r"torch|triton|cuda-.*|nvidia-.*", name) for name in pins("torch"))
    assert "hash" not in (FOLDER / "torch.txt").read_text()


@pytest.mark.slow
def test_all_that_is_needed_is_pinned() -> None:
    """Nothing is resolved at installation, so each file has all that its packages need on this machine."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, wanted = settings["project"], {"core": settings["project"]["dependencies"]}
    wanted |= {layer: [*project["dependencies"], *more] for layer, more in project["optional-dependencies"].items()}
    wanted["build"] = settings["build-system"]["requires"]
    for layer in ("audit", "clients"):  # have environments of their own
        del wanted[layer]
    tools = {normal(Requirement(text).name) for text in project["optional-dependencies"]["audit"]}
    assert tools <= set(pins("audit"))
    for layer, packages in wanted.items():
        there = set(pins(layer)) | {name for under in UNDER.get(layer, ()) for name in pins(under)}
        there |= set(pins("torch")) if layer == "live" else set()
        ahead, seen = [Requirement(package) for package in packages], set()
        while ahead:
            one = ahead.pop()
            if (one.marker is None or one.marker.evaluate({"extra": ""})) and normal(one.name) not in seen:
                seen.add(normal(one.name))
                try:
                    ahead += [Requirement(text) for text in requires(one.name) or ()]
                except PackageNotFoundError:  # of an extra that is not installed here
                    continue
        assert seen - there == set(), layer


def test_every_installation_checks_digests() -> None:
    """In the Makefile, only the project itself and torch are installed without."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    words = {line.split(" := ")[0]: line for line in lines if " := " in line}
    assert "--require-hashes" in words["PINNED"]
    without = [line.strip() for line in lines if line.startswith("\t") and re.search(r"\$\(PIP\)|pip install", line)]
    assert [line for line in without if "--require-hashes" not in line] == [
        "$(PIP) $(AS_NEEDED) -c requirements/torch.txt torch",
        "$(call client,$@) -m pip install --quiet --disable-pip-version-check '$(CLIENT_$@)'",
    ]


def test_actions_are_pinned_by_commit() -> None:
    used = re.findall(r"uses: (\S+)", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action)] == []


@pytest.mark.slow
def test_nothing_unpickles() -> None:
    """No module of the packages imports what unpickles, or asks NumPy or torch to."""
    wrong = []
    for path in sorted(p for package in ("helios_sim", "calibrate") for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path.name}: {n}" for n in names if n in ("pickle", "cloudpickle", "dill", "shelve", "marshal")]
            if isinstance(node, ast.Call):
                wrong += [f"{path.name}: {ast.unparse(node)}" for k in node.keywords if _unpickles(k)]
                wrong += [f"{path.name}: torch.load"] if ast.unparse(node.func) == "torch.load" else []
    assert wrong == []


def _unpickles(keyword: ast.keyword) -> bool:
    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
    return (keyword.arg, value) in (("allow_pickle", True), ("weights_only", False))


@pytest.mark.parametrize("name", NAMED)
def test_the_tests_that_hold_a_promise_exist(name: str) -> None:
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test() -> None:
    text = (ROOT / "SECURITY.md").read_text().partition("## What is promised")[2].partition("## What is not")[0]
    promises = re.findall(r"(?:^- |^\*\*Nobody).*?(?=\n- |\n\n)", text, re.M | re.S)
    assert len(promises) >= 12
    assert [promise for promise in promises if "`tests/" not in promise] == []
