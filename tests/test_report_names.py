"""Names and texts from files reach pages, figures, terminals and file names as text, whatever stands in them."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from helios_sim.report.figures.style import Drawing, handles_of, legend_above, new_figure, to_png, to_svg
from helios_sim.report.format import code_span, markdown, visible
from helios_sim.report.page import render
from helios_sim.report.result import ExperimentResult, comparisons
from helios_sim.report.tables import print_table
from helios_sim.report.terminal import TextTable, say
from helios_sim.report.write import write_result
from report_example import example_result

PAYLOADS = (
    "[/]", "[bold red]x[/bold red]", r"$\frac{a}{b$", "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>',
    "</style></svg><script>", "&lt;&amp;", "\x1b[31mred\x1b]0;title\x07", "\x00\x08\x9b2J", "a\u202eb\u200bc",
    "../../up", "name/with/slashes", "con", "ü × 中文 \U0001f680", "{{ 7*7 }}{% x %}", "%s %(a)s {0} {x}",
    "two\nlines\ttab", "\udcff", "x" * 300,
)  # fmt: skip
PATHS = ("../../up", "name/with/slashes", "\x00\x08\x9b2J", "con", "two\nlines\ttab", "\udcff", "x" * 300)
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u200b]")


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs), attrs


def elements(page: str) -> list[str]:
    parser = Elements()
    parser.feed(page)
    return parser.names


def named(result: ExperimentResult, text: str) -> ExperimentResult:
    """The result with the text wherever a user's name or sentence stands."""
    helios = replace(result.arms["helios"], name=f"helios {text}", description=text)
    arms = {**{name: arm for name, arm in result.arms.items() if name != "helios"}, f"helios {text}": helios}
    return replace(
        result, title=text, question=text, conditions=text, verdict=(text,), warnings=(text,), arms=arms,
        experiment=text, workload=replace(result.workload, statement=text, facts=((text, text),)),
        provenance={text: text}, inputs=dict.fromkeys([text], next(iter(result.inputs.values()))), figures=(),
        published=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def result() -> ExperimentResult:
    return example_result((1,), points=False)


@pytest.fixture(scope="module")
def plain(result: ExperimentResult) -> list[str]:
    """Elements of the page on which all names are plain."""
    found = named(result, "plain")
    return elements(render(found, comparisons(found), []))


@pytest.mark.slow
@pytest.mark.parametrize("text", PAYLOADS)
def test_pages_show_names_as_text(result: ExperimentResult, plain: list[str], text: str) -> None:
    evil = named(result, text)
    page = render(evil, comparisons(evil), [])
    assert elements(page) == plain
    assert not ACTING.search(page)
    page.encode()


@pytest.mark.slow
@pytest.mark.parametrize("text", PAYLOADS)
def test_figures_show_names_as_text(text: str) -> None:
    figure, (ax,) = new_figure(1, 1, 2.0)
    ax.plot([1, 2], [3, 4], color="#112233", label=text)
    ax.set_title(text)
    ax.set_xlabel(text)
    ax.set_ylabel(text)
    ax.set_xticks([1, 2], [text, text])
    ax.annotate(text, (1, 3))
    legend_above(figure, handles_of(ax))
    drawing = Drawing("name", text, text, figure)
    svg = to_svg(drawing)
    root = ElementTree.fromstring(svg)
    found = [(element.tag.rpartition("}")[2], element.text or "") for element in root.iter()]
    assert {name for name, _ in found} <= {
        "svg", "g", "path", "text", "tspan", "clipPath", "rect", "defs", "use", "style",
    }
    assert visible(text).split()[-1] in " ".join(shown for name, shown in found if name in ("text", "tspan")).split()
    assert to_png(drawing).startswith(b"\x89PNG")


def test_powers_of_ten_are_set_as_such() -> None:
    """That names are no formulas must not turn matplotlib's own labels into text."""
    figure, (ax,) = new_figure(1, 1, 2.0)
    ax.plot([0.5, 200], [0, 1])
    ax.set_xscale("log")
    root = ElementTree.fromstring(to_svg(Drawing("name", "title", "caption", figure)))
    texts = (element for element in root.iter() if element.tag.rpartition("}")[2] in ("text", "tspan"))
    shown = "".join(element.text or "" for element in texts)
    assert "$" not in shown
    assert "math" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("text", PAYLOADS)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_terminals_get_no_code_from_names(result: ExperimentResult, text: str, encoding: str) -> None:
    out = io.BytesIO()
    stream = io.TextIOWrapper(out, encoding=encoding, newline="\n")
    evil = named(result, text)
    print_table(evil, comparisons(evil), stream)
    table = TextTable(text)
    table.column(text)
    table.row([text])
    table.show(stream)
    say(text, stream)
    stream.flush()
    assert not ACTING.search(out.getvalue().decode(encoding))


@pytest.mark.slow
@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("text", [text for text in PAYLOADS if text in PATHS])
def test_files_stay_in_their_folder(result: ExperimentResult, text: str, tmp_path: Path) -> None:
    evil = named(result, text)
    write_result(evil, tmp_path / "out")
    found = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.parts[0] == "out" for path in found)
    for path in found:
        assert re.fullmatch(r"[\w.-]+", path.name), path


@pytest.mark.parametrize("text", PAYLOADS)
def test_markdown_holds_names_as_text(text: str) -> None:
    for shown in (markdown(text), code_span(text)):
        assert "\n" not in shown
        assert not ACTING.search(shown)
        assert not re.search(r"(?<!\\)\|", shown)  # a cell does not end
    assert not re.search(r"(?<!\\)[<`*]|\]\(", markdown(text))


def test_markdown_leaves_usual_sentences_as_they_are() -> None:
    said = "helios helps: 1.47 times the Requests/s of full_depth_opt-1.3b (95 % interval 1.41 to 1.53) [a, b] - 3 > 2."
    assert markdown(said) == said
    assert code_span("full_depth_opt-1.3b") == "`full_depth_opt-1.3b`"
    assert code_span("a`b") == "``a`b``"


@pytest.mark.slow
def test_a_run_with_such_names_ends_well_on_a_terminal_without_unicode(tmp_path: Path) -> None:
    words = ["+experiment=own", "models=[opt-1.3b]", "policy=full_depth", "exits.source=none", "workload.n_requests=5"]
    title = r"title='[/] $\frac{a}{b$ ü ×'"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-m", "helios_sim", *words, title, f"hydra.run.dir={tmp_path}"],
        env=environment, capture_output=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(rb"[/] $\frac{a}{b$")
    assert b"[/] $" in (tmp_path / "report.html").read_bytes()
