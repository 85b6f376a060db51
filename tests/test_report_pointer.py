"""What the figures of a page answer to the pointer: facts against the drawn elements, and the script in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from helios_sim.report.decisions import decision_rows
from helios_sim.report.figures.arms import timeline_drawings
from helios_sim.report.figures.pointer import described
from helios_sim.report.figures.style import Drawing, handles_of, lay_out, legend_above, look, new_figure, to_svg
from helios_sim.report.result import ExperimentResult, comparisons
from helios_sim.report.write import write_result
from report_example import BASELINE, example_result

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def result() -> ExperimentResult:
    return example_result((1, 2), names=(BASELINE, "static_cap_opt-1.3b", "helios"))


@pytest.fixture(scope="module")
def page(result: ExperimentResult, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    write_result(result, folder, comparisons(result))
    return (folder / "report.html").read_text(encoding="utf-8")


def facts_of(page: str) -> dict[str, dict[str, Any]]:
    found = re.findall(r'<script type="application/json" data-figure="([^"]+)">(.*?)</script>', page, re.DOTALL)
    return {html.unescape(name): json.loads(text) for name, text in found}


@pytest.mark.slow
def test_every_figure_has_facts_and_every_element_they_name_is_there_once(page: str) -> None:
    facts = facts_of(page)
    assert list(facts) == re.findall(r'<figure id="([^"]+)"', page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert [id for id, times in Counter(ids).items() if times > 1] == []
    for figure in facts.values():
        named = [*(each["id"] for each in [figure["marks"]] if each)]
        named += [id for entry in figure["legend"] for id in entry["ids"]]
        for axes in figure["axes"]:
            named += [axes["x_axis"], *axes["moved"], *(id for series in axes["series"] for id in series["ids"])]
        assert set(named) <= set(ids)


def drawn(svg: str, element: str) -> ElementTree.Element:
    (group,) = (g for g in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g") if g.get("id") == element)
    return group


def line(svg: str, element: str) -> list[tuple[float, float]]:
    path = next(drawn(svg, element).iter("{http://www.w3.org/2000/svg}path"))
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d") or "")]


@pytest.mark.parametrize("scale", ["linear", "log", "upside down"])
def test_places_of_the_drawing_give_back_the_values_that_were_drawn(scale: str) -> None:
    x, y = np.array([1.0, 2.0, 7.0, 40.0]), np.array([3.0, 1.0, 8.0, 5.0])
    with look():
        figure, (ax,) = new_figure(1, 1, 3)
        ax.plot(x, y, label="mine")
        if scale == "log":
            ax.set_xscale("log")
        if scale == "upside down":
            ax.invert_yaxis()
        legend_above(figure, handles_of(ax))
    with mpl.rc_context({"path.simplify": False}):
        drawing = Drawing("some", "Some", "caption", figure)
        lay_out(drawing)
        facts = described(drawing)
        svg = to_svg(drawing)
    (axes,) = facts["axes"]
    (series,) = axes["series"]
    left, top, right, bottom = axes["box"]
    read = []
    for px, py in line(svg, series["ids"][0]):
        across, up = (px - left) / (right - left), (bottom - py) / (bottom - top)
        low, high = axes["x"]["low"], axes["x"]["high"]
        at = low * (high / low) ** across if axes["x"]["log"] else low + (high - low) * across
        read.append((at, axes["y"]["low"] + (axes["y"]["high"] - axes["y"]["low"]) * up))
    np.testing.assert_allclose(read, np.column_stack([x, y]), rtol=1e-3)
    assert facts["legend"][0]["label"] == series["label"] == "mine"
    assert series["kind"] == "line"


@pytest.mark.slow
def test_each_mark_of_a_timeline_leads_to_the_row_of_its_decision(result: ExperimentResult, page: str) -> None:
    (drawing,) = (it for it in timeline_drawings(result) if it.of_arm == "helios")
    rows = decision_rows(result.arms["helios"])
    assert [anchor for anchor, _ in drawing.mark_rows] == [row.anchor for row in rows]
    for row in rows:
        (shown,) = re.findall(f'<tr id="{row.anchor}">(.*?)</tr>', page, re.DOTALL)
        assert f'<a href="#{drawing.name}"' in shown
        assert f"{row.time_s:.3f} s" in shown
    marks = facts_of(page)[drawing.name]["marks"]
    (svg,) = re.findall(rf'<figure id="{drawing.name}">.*?(<svg.*?</svg>)', page, re.DOTALL)
    uses = list(drawn(svg, marks["id"]).iter("{http://www.w3.org/2000/svg}use"))
    assert len(uses) == len(rows) == len(marks["rows"])


ACTIONS = """<script>
const said = {}, tip = () => document.querySelector(".tip");
const send = (node, type, [x, y]) =>
  node.dispatchEvent(new PointerEvent(type, {clientX: x, clientY: y, bubbles: true, button: 0, cancelable: true}));
const figure = (id) => {
  const f = document.getElementById(id), svg = f.querySelector("svg"), box = svg.getBoundingClientRect();
  return [f, svg, (x, y) => [box.left + box.width * x, box.top + box.height * y]];
};
const [f, svg, at] = figure("timeline_helios");
send(svg, "pointermove", at(.5, .85));
said.before = tip().innerText;
send(svg, "pointerdown", at(.4, .5)); send(svg, "pointermove", at(.6, .5)); send(window, "pointerup", at(.6, .5));
said.zoomed = f.classList.contains("zoomed");
send(svg, "pointermove", at(.5, .85));
said.after = tip().innerText;
f.querySelector("button.whole").click();
said.whole = !f.classList.contains("zoomed");
for (const details of document.querySelectorAll("#decisions details")) details.open = false;
const mark = f.querySelector("a.mark");
mark.dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true}));
said.open = document.querySelector(mark.getAttribute("href")).closest("details").open;
const [l, lsvg] = figure("latency");
const all = document.querySelectorAll("#arms_vs_baseline g, #latency g");
const shown = () => [...all].filter((g) => g.style.display === "none").length;
const [entry] = l.querySelectorAll("[role=button]");
said.label = entry.textContent; said.none = shown();
entry.dispatchEvent(new MouseEvent("click", {bubbles: true}));
said.hidden = shown(); said.pressed = entry.getAttribute("aria-pressed");
entry.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
said.again = shown();
document.body.append(Object.assign(document.createElement("pre"), {id: "said", textContent: JSON.stringify(said)}));
</script></body>"""


@needs_browser
@pytest.mark.slow
def test_the_script_in_a_browser(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", ACTIONS), encoding="utf-8")
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert not [row for row in done.stderr.splitlines() if ":CONSOLE" in row]
    (text,) = re.findall(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    said = json.loads(html.unescape(text))
    assert said["before"].startswith("time (s): ")
    assert "running" in said["before"]
    assert (said["zoomed"], said["whole"], said["open"], said["pressed"]) == (True, True, True, "false")
    assert said["after"] != ""
    assert said["none"] == said["again"] == 0
    assert said["hidden"] >= 3  # its line in each panel
