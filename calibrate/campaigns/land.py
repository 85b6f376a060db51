"""The page of a campaign in Markdown, and how its results get into a checkout of this project.

`python -m calibrate.campaigns.land OUT [into=FOLDER]`: OUT is the output folder of the campaign's last call, which has
all archives; FOLDER is a checkout of this project (default: the current folder). It writes

- `helios_sim/data/profiles/MODEL@CARD/`, every profile;
- `conf/experiment/measured_CARD.yaml`, a study on these profiles: `python -m helios_sim +experiment=measured_CARD`;
- `experiments/card_campaign/CARD/`, the report, its figures, pages of its studies, and the device's recorded answers;
- a row for each card, between the marks in the page of `experiments/card_campaign`.

Earlier results of the same card are replaced. A rehearsal is refused unless `trial=true`, since its figures are not
meaningful.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

from calibrate.campaigns.archives import archives_in, campaign_of, read_archive
from calibrate.stages import Finished, read_finished
from calibrate.work import CEILINGS, ENERGY, PROFILE
from helios_sim import files
from helios_sim.entry import run
from helios_sim.errors import UserError
from helios_sim.help import is_asked
from helios_sim.profile.store import read_profile, write_profile
from helios_sim.report.format import in_unit, markdown
from helios_sim.untrusted import parse_json

OVER_CEILING = ("dense", "decode_attention", "prefill_attention", "head")

WORTHLESS = (
    "**A rehearsal: tiny shapes, few samples, a CPU. It shows that every stage runs and what it writes. "
    "No figure below means anything.**"
)


def page(campaign: str, summary: Mapping[str, Any]) -> str:
    """The page. `summary` is the content of summary.json."""
    stages: Mapping[str, Mapping[str, Any]] = summary["stages"]
    parts = [f"# Campaign {markdown(campaign)} on {markdown(summary['device'])}", ""]
    parts += [WORTHLESS, ""] if summary["worthless"] else []
    parts += ["| stage | archive | status | seconds | remark |", "| --- | --- | --- | ---: | --- |"]
    for name, stage in stages.items():
        took = "" if stage["wall_s"] is None else f"{stage['wall_s']:.1f}"
        cells = (name, str(stage["archive"]), stage["status"], took, stage["why"] or "")
        parts.append(f"| {' | '.join(map(markdown, cells))} |")
    results = {name: stage["result"] for name, stage in stages.items() if stage["result"]}
    if "ceilings" in results:
        parts += ["", "## Device", "", *_device(results["ceilings"])]
    profiles = {name: r for name, r in results.items() if name.startswith(f"{PROFILE}-")}
    if profiles:
        parts += ["", "## Profiles", "", *_profiles(profiles)]
    for name, result in results.items():
        if name.startswith(("live-", "headline-")):
            parts += ["", f"## {name}", "", f"Models: {', '.join(result['models'])}. Exits: {result['exits']}.", ""]
            parts += [f"- {markdown(sentence)}" for sentence in result["verdict"]]
        if "steady" in result:
            parts += ["", *_steady(result["steady"])]
        if "arms" in result:
            parts += ["", *_headline(result)]
    return "\n".join(parts) + "\n"


def _steady(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the time of a token, live and simulated."""
    rows = [
        [str(row["users"]), str(row["requests"]), f"{1e3 * row['live_s']:.3f}", f"{1e3 * row['simulate_s']:.3f}",
         f"{row['simulate_s'] / row['live_s'] - 1:+.1%}"]
        for row in found if row["live_s"] and row["simulate_s"]
    ]  # fmt: skip
    return table(["users", "requests", "TPOT live, ms", "simulated, ms", "simulated over live"], rows, 0)


def _device(found: Mapping[str, Any]) -> list[str]:
    ceilings, facts = found["ceilings"], found["facts"]
    rows = [
        f"- {facts['description']}, {in_unit(facts['memory_bytes'], 'bytes')} for the engine",
        f"- reading {ceilings['read_bytes_per_s'] / 1e9:.0f} GB/s",
        f"- copying {ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s, read and written",
        f"- {ceilings['dtype']} matrix products {ceilings['flops_per_s'] / 1e12:.2f} TFLOP/s",
    ]
    for kind, rates in found["host_copies"].items():
        there, back = rates["to_device_bytes_per_s"] / 1e9, rates["to_host_bytes_per_s"] / 1e9
        rows.append(f"- copies from {kind} memory: {there:.1f} GB/s to the device, {back:.1f} GB/s back")
    if found["launch"] is not None:
        launch = found["launch"]
        rows.append(
            f"- a launch takes the host {launch['host_s_per_kernel'] * 1e6:.1f} us, a graph of {launch['kernels']:.0f} "
            f"kernels {launch['host_s_per_graph'] * 1e6:.1f} us; a result on the host {found['sync_s'] * 1e6:.1f} us"
        )
    power = found["power"]
    rows.append(f"- no power: {found['power_absent']}" if power is None else f"- idle {power['idle_w']:.0f} W")
    return rows


def _profiles(profiles: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tables of the profiles' accuracy, and of measured over predicted times and memory."""
    quality, over = [], []
    for name, found in profiles.items():
        model = name.removeprefix(f"{PROFILE}-")
        errors = [t["median_absolute"] for t in (found.get("interpolation") or {}).values() if t is not None]
        whole = (found.get("whole_iterations") or {}).get("all")
        quality.append(
            [
                model,
                str(found.get("weights")),
                f"{max(errors):.1%}" if errors else "",
                "" if whole is None else f"{whole['median']:+.1%}",
                str(len(found.get("below_floor") or ())),
            ]
        )
        times = [f"{found['over_ceiling'][kind]:.2f}" for kind in OVER_CEILING]
        memory = [_measured_over_predicted(found["memory"][part]) for part in ("weights", "kv", "activations")]
        over.append([model, *times, *memory, f"{next(iter(found['loads']['bytes_per_s'].values())) / 1e9:.1f}"])
    columns = ["model", "weights", "interpolation error, median", "whole iterations, median error", "below the floor"]
    names = [kind.replace("_", " ") for kind in OVER_CEILING]
    return [
        *table(columns, quality, 2),
        "",
        "Median time over the least that the ceilings allow, memory over what the shapes say, and loads:",
        "",
        *table(["model", *names, "weights", "KV", "activations", "loads, GB/s"], over, 1),
    ]


def _measured_over_predicted(found: Mapping[str, Any]) -> str:
    return "" if found["measured"] is None else f"{found['measured'] / found['predicted']:.2f}"


def _headline(result: Mapping[str, Any]) -> list[str]:
    """Tables of the arms with the origin of their figures, and of what HELIOS gains over each rival."""
    requests = ", ".join(f"{n} ({load})" for load, n in result["requests"].items())
    counter = result["counter"] or "none of a live run; bands are between idle power and the board's limit"
    arms: Mapping[str, Mapping[str, Any]] = result["arms"]
    origins = ("times", "exits", "energy", "class")
    metrics = [metric for metric in next(iter(arms.values())) if metric != "provenance"]
    told = [
        [*(markdown(text or "") for text in (name, *(values["provenance"][key] for key in origins))),
         *(shown(values[metric]) for metric in metrics)]
        for name, values in arms.items()
    ]  # fmt: skip
    keys = [key for key in result["gains"][0] if key not in ("mode", "load", "over")]
    gains = [
        [f"{gain['mode']}, {gain['load']}", gain["over"], *(shown(gain[key]) for key in keys)]
        for gain in result["gains"]
    ]
    within = result.get("times_within")
    known = f" There was little time: times of the profiles are within about {within:.0%}." if within else ""
    return [
        f"Requests of each arm: {requests}. Energy counter: {counter}.{known}",
        "",
        *table(["arm", *origins, *metrics], told, 1 + len(origins)),
        "",
        "HELIOS's figure over the rival's:",
        "",
        *table(["served", "over", *keys], gains, 2),
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """A Markdown table. The first `words` columns hold words, the others numbers."""
    rule = ["---" if i < words else "---:" for i in range(len(columns))]
    return [f"| {' | '.join(row)} |" for row in (columns, rule, *rows)]


def shown(value: Any) -> str:
    """A figure as text; a band by both its ends."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return " to ".join(f"{float(v):.4g}" for v in value.values())
    return f"{float(value):.4g}"


PROFILES = Path("helios_sim/data/profiles")
EXPERIMENTS = Path("conf/experiment")
PAGES = Path("experiments/card_campaign")
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
        _add_idle_power(written, finished.get(ENERGY))
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


def _add_idle_power(profiles: Sequence[Path], energy: Finished | None) -> None:
    """Add the idle power of the card, measured after these profiles, to the profiles."""
    measured = {} if energy is None else energy.result["found"]
    if measured:
        idle_w = float(next(iter(measured.values()))["idle_w"])
        for folder in profiles:
            profile = read_profile(folder)
            write_profile(replace(profile, hardware=replace(profile.hardware, idle_w=idle_w)), folder)


def cards(folder: Path) -> str:
    """Markdown tables of all cards with results: their ceilings, and what HELIOS gains there."""
    ceilings, gained = [], []
    for path in sorted(folder.glob(f"*/{SUMMARY}")):
        if path.parent.name == REHEARSAL:
            continue
        summary = parse_json(path.read_text(encoding="utf-8"))
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
        found: dict[str, Any] = parse_json((out / SUMMARY).read_text(encoding="utf-8"))
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


def main(arguments: Sequence[str] | None = None) -> int:
    return run("calibrate.campaigns.land", _landed, arguments)


def _landed(arguments: Sequence[str]) -> int:
    if is_asked(arguments):
        print(__doc__)
        return 0
    settings = dict(a.split("=", 1) for a in arguments if "=" in a)
    places = [a for a in arguments if "=" not in a]
    if len(places) != 1 or not settings.keys() <= {"into", "trial"}:
        allowed = "one folder OUT, and into= where it goes"
        raise UserError("arguments", " ".join(arguments), allowed, f"write {_USAGE}")
    trial = settings.get("trial") == "true"
    for path in land(Path(places[0]).expanduser(), Path(settings.get("into", ".")).expanduser(), trial):
        print(path)
    print("By hand: the answer on the page and in experiments/README.md, and what EFFORTS in plan.py guessed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
