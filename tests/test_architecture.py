"""What ARCHITECTURE.md and the other pages for developers name exists: every file, folder, function and link."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("ARCHITECTURE.md", "GLOSSARY.md", "CONTRIBUTING.md", "SECURITY.md", "README.md")
PATH = re.compile(r"[\w.][\w./-]*")
MADE_ELSEWHERE = {"TASK.txt"}  # by users
ENDINGS = (".py", ".md", ".toml", ".yaml", ".yml", ".ipynb", ".cff", ".txt")


def quoted(page: str) -> list[str]:
    """What stands in backticks, outside blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL))


def names(page: str) -> list[str]:
    return sorted({text for text in quoted(page) if re.fullmatch(r"[\w./-]+\.py:[\w.]+", text)})


def paths(page: str) -> list[str]:
    """Paths of files and of folders; a placeholder in capitals names none."""
    found = {text.split(":")[0] for text in quoted(page) if PATH.fullmatch(text.split(":")[0])}
    return sorted(text for text in found if text.endswith((*ENDINGS, "/")) and not re.search(r"\b[A-Z]+/", text))


def located(text: str) -> Path | None:
    return next((path for folder in (ROOT / "helios_sim", ROOT) if (path := folder / text).exists()), None)


def in_module(module: ModuleType, name: str) -> Any:
    """The object by its dotted name."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("page", "text"), [(page, text) for page in PAGES for text in paths(page)])
def test_paths_exist(page: str, text: str) -> None:
    assert text in MADE_ELSEWHERE or located(text) is not None, f"{page} names {text}"


def needs_torch(text: str) -> bool:
    return text.startswith(("live/", "calibrate/"))


@pytest.mark.parametrize(
    ("page", "text"),
    [
        pytest.param(page, text, marks=[pytest.mark.live] if needs_torch(text) else [])
        for page in PAGES
        for text in names(page)
    ],
)
def test_functions_exist(page: str, text: str) -> None:
    path, _, name = text.partition(":")
    file = located(path)
    assert file is not None
    relative = file.relative_to(ROOT)
    if needs_torch(text):
        pytest.importorskip("torch")
    in_module(importlib.import_module(".".join(relative.with_suffix("").parts)), name)


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), f"{page} links to {target}"


def test_every_layer_of_the_contract_is_on_the_page() -> None:
    contract = (ROOT / "pyproject.toml").read_text().split("layers = [", 1)[1].split("]", 1)[0]
    page = (ROOT / "ARCHITECTURE.md").read_text()
    missing = [name for name in re.findall(r"\((\w+)\)", contract) if not re.search(rf"`{name}(/|\.py)`", page)]
    assert missing == []


def test_every_reason_to_stop_is_on_the_page() -> None:
    source = (ROOT / "helios_sim/core/advance.py").read_text() + (ROOT / "helios_sim/core/schedule.py").read_text()
    reasons = set(re.findall(r"return ([A-Z]+)\b", source)) - {"NEVER", "GO"}
    page = (ROOT / "ARCHITECTURE.md").read_text()
    assert [reason for reason in sorted(reasons) if f"`{reason}`" not in page] == []
