"""Puts a campaign's results into a checkout of this project.

`python -m calibrate.campaigns.land OUT [into=FOLDER]`: OUT is the output folder of the campaign's last call, which has
all archives; FOLDER is a checkout of this project (default: the current folder). It writes

- `helios_sim/data/profiles/MODEL@CARD/`, every profile;
- `conf/experiment/measured_CARD.yaml`, a study on these profiles: `python -m helios_sim +experiment=measured_CARD`;
- `experiments/h100_campaign/CARD/`, the report, its figures, pages of its studies, and the device's recorded answers;
- the part of that folder's page between its marks: a row for each card.

Earlier results of the same card are replaced. A rehearsal is refused unless `trial=true`, since its figures are not
meaningful.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from calibrate.campaigns.archives import archives_in, campaign_of, read_archive
from calibrate.campaigns.page import shown, table
from calibrate.stages import Finished, read_finished
from calibrate.work import CEILINGS, PROFILE
from helios_sim.errors import UserError
from helios_sim.profile.store import read_profile
from helios_sim.report import files

PROFILES = Path("helios_sim/data/profiles")
EXPERIMENTS = Path("conf/experiment")
PAGES = Path("experiments/h100_campaign")
PAGE, REHEARSAL = "README.md", "rehearsal"
FROM, TO = "<!-- cards: written by calibrate.campaigns.land -->", "<!-- end of cards -->"
SUMMARY, REPORT, ANSWERS = "summary.json", "report.md", "device.jsonl"
PAGE_OF_STUDY = "report.html"
_TEMPLATE = Path(__file__).parents[1] / "templates" / "measured.yaml"
_USAGE = "python -m calibrate.campaigns.land OUT into=FOLDER"


def land(out: Path, into: Path, trial: bool = False) -> list[Path]:
    """Write the results and return the paths. Raises UserError first if OUT is no campaign or INTO no checkout."""
    summary = _summary(out)
    if summary["worthless"] and not trial:
        raise UserError("OUT", str(out), "a campaign at full size: this one is a rehearsal", "try it with trial=true")
    page = into / PAGES / PAGE
    if not (page.is_file() and (into / PROFILES).is_dir() and (into / EXPERIMENTS).is_dir()):
        raise UserError("into", str(into), "a checkout of this project", "name its folder")
    before, mark, rest = page.read_text(encoding="utf-8").partition(FROM)
    _, end, after = rest.partition(TO)
    if not (mark and end):
        raise UserError("into", str(page), f"a page with {FROM} and {TO}", "put them around the part to be written")
    with tempfile.TemporaryDirectory() as scratch:
        finished = _finished(out, Path(scratch))
        profiles = [s.part("profile") / s.result["name"] for n, s in finished.items() if n.startswith(f"{PROFILE}-")]
        if not profiles or CEILINGS not in finished:
            raise UserError("OUT", str(out), "a campaign with a device report and a profile", "let it finish these")
        card = {read_profile(folder).hardware.name for folder in profiles}.pop()
        written = [_replaced(folder, into / PROFILES / folder.name) for folder in profiles]
        place = into / PAGES / card
        for source in (out / SUMMARY, out / REPORT, finished[CEILINGS].part(ANSWERS)):
            files.write_bytes(place / source.name, source.read_bytes())
        for name, stage in finished.items():  # pages of simulated and served studies
            if stage.part(PAGE_OF_STUDY).is_file():
                files.write_bytes(place / f"{name}.html", stage.part(PAGE_OF_STUDY).read_bytes())
    written.append(place)
    pair = summary["provenance"]["configuration"]["live"]["pair"]
    if all((into / PROFILES / f"{model}@{card}").is_dir() for model in pair) and pair:
        written.append(_experiment(into, card, *pair))
    files.write_text(page, f"{before}{FROM}\n{cards(into / PAGES)}\n{TO}{after}")
    return [*written, page]


def cards(folder: Path) -> str:
    """Markdown tables of all cards with results: their ceilings, and what HELIOS gains there."""
    ceilings, gained = [], []
    for path in sorted(folder.glob(f"*/{SUMMARY}")):
        if path.parent.name == REHEARSAL:
            continue
        summary = json.loads(path.read_text(encoding="utf-8"))
        results = {name: stage["result"] for name, stage in summary["stages"].items() if stage["result"]}
        card = f"[{path.parent.name}]({path.parent.name}/{REPORT})"
        found, date = results[CEILINGS]["ceilings"], summary["stages"][CEILINGS]["finished_at"][:10]
        rates = [f"{found['read_bytes_per_s'] / 1e9:.0f}", f"{found['flops_per_s'] / 1e12:.1f}"]
        done = f"{len(results)} of {len(summary['stages'])}"
        ceilings.append([f"{card}{' (a rehearsal: worth nothing)' * summary['worthless']}", date, done, *rates])
        gained += [[card, *row] for row in _gains(results)]
    lines = table(["card", "measured", "stages", "reading, GB/s", "matrix products, TFLOP/s"], ceilings, 3)
    if gained:
        lines += ["", "HELIOS's figure over the rival's:", ""]
        columns = ["card", "models", "served", "over", "throughput", "response time", "energy", "batch"]
        lines += table(columns, gained, 4)
    return "\n".join(lines)


def _gains(results: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Rows with the gains of every headline; the live one includes both modes."""
    for name, result in results.items():
        if "gains" not in result or f"live-{name}" in results:
            continue
        for gain in result["gains"]:
            keys = ("throughput_requests_per_s", "e2e_s_mean", "energy_wh_per_request", "batch_mean")
            what = [", ".join(result["models"]), f"{gain['mode']}, {gain['load']}", gain["over"]]
            yield [*what, *(shown(gain[key]) for key in keys)]


def _experiment(into: Path, card: str, smaller: str, larger: str) -> Path:
    """Write the experiment, named after the first word of the card's name: measured_h100."""
    name = f"measured_{card.partition('-')[0]}"
    path = into / EXPERIMENTS / f"{name}.yaml"
    text = Template(_TEMPLATE.read_text(encoding="utf-8"))
    files.write_text(path, text.substitute(name=name, card=card, smaller=smaller, larger=larger))
    return path


def _summary(out: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        if {"campaign", "worthless", "stages"} <= found.keys():
            return found
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError("OUT", str(out), f"the output folder of a campaign, with its {SUMMARY}", f"write {_USAGE}")


def _finished(out: Path, state: Path) -> dict[str, Finished]:
    for path in archives_in([str(out)]):
        read_archive(path, campaign_of(path), state)
    return read_finished(state)


def _replaced(source: Path, target: Path) -> Path:
    if target.exists():
        shutil.rmtree(target)
    return Path(shutil.copytree(source, target))


def main(arguments: Sequence[str]) -> int:
    settings = dict(a.split("=", 1) for a in arguments if "=" in a)
    places = [a for a in arguments if "=" not in a]
    try:
        if len(places) != 1 or not settings.keys() <= {"into", "trial"}:
            allowed = "one folder OUT, and into= where it goes"
            raise UserError("arguments", " ".join(arguments), allowed, f"write {_USAGE}")
        trial = settings.get("trial") == "true"
        written = land(Path(places[0]).expanduser(), Path(settings.get("into", ".")).expanduser(), trial)
    except UserError as error:
        print(f"calibrate.campaigns.land: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    print("By hand: the answer on the page and in experiments/README.md, and what EFFORTS in plan.py guessed.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
