"""Puts potentials of several models side by side: `python experiments/potential/record.py OUT [OUT ...]`.

Each OUT is the folder of a `python -m calibrate +task=potential`. Writes results.md and potential.png beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helios_sim import files
from helios_sim.entry import script
from helios_sim.report.figures.style import (
    BASELINE_COLOR,
    MODEL_COLORS,
    Drawing,
    handles_of,
    legend_above,
    look,
    new_figure,
    to_png,
)

FOLDER = Path(__file__).parent


def main(outputs: list[str]) -> None:
    found = [json.loads((Path(output) / "summary.json").read_text(encoding="utf-8")) for output in outputs]
    lines = ["# potential: results", ""]
    for summary in found:
        lines += [*_of(summary), ""]
    files.write_text(FOLDER / "results.md", "\n".join(lines).rstrip() + "\n")
    files.write_bytes(FOLDER / "potential.png", to_png(_figure(found)))


def _of(summary: dict[str, Any]) -> list[str]:
    told, allowed = summary["potential"], summary["potential"]["allowed"]
    command = summary["provenance"]["command"].split(" out=")[0]
    lines = [f"## {summary['model']}", "", f"Made by `{command}`; {told['tokens']:,} tokens.", ""]
    lines += [*(f"- {sentence}" for sentence in summary["verdict"]), ""]
    heads = [f"leave at {most:.0%} (changed)" for most in allowed]
    lines += [f"| after layer, of {told['layers']} | unchanged | like the exit before | {' | '.join(heads)} |"]
    lines += ["| ---: " * (3 + len(allowed)) + "|"]
    for it in told["exits"]:
        alike = "" if it["alike"] is None else f"{it['alike']:.2f}"
        shares = [f"{a:.1%} ({b:.1%})" for a, b in zip(it["leave"], it["changed"], strict=True)]
        lines.append(f"| {it['depth']} | {it['unchanged']:.1%} | {alike} | {' | '.join(shares)} |")
    checks = " | ".join(f"check, {most:.0%}" for most in allowed)
    lines += ["", f"| requests at once on {told['card']} | exits that always know | {checks} |"]
    lines += ["| ---: " * (2 + len(allowed)) + "|"]
    for speed in told["speeds"]:
        checked = " | ".join(f"{value:.2f}x" for value in speed["checked"])
        lines.append(f"| {speed['batch']} | {speed['at_most']:.2f}x | {checked} |")
    return lines


def _figure(found: list[dict[str, Any]]) -> Drawing:
    """A panel for each model: unchanged tokens by depth, and those that can leave."""
    with look():
        figure, axes = new_figure(1, len(found), 3.2, sharey=True)
        for ax, summary in zip(axes, found, strict=True):
            told = summary["potential"]
            depths = [100 * it["depth"] / told["layers"] for it in told["exits"]]
            unchanged = [100 * it["unchanged"] for it in told["exits"]]
            ax.plot(depths, unchanged, "o-", color=BASELINE_COLOR, label="unchanged")
            for k, (most, color) in enumerate(zip(told["allowed"], MODEL_COLORS, strict=False)):
                shares = [100 * it["leave"][k] for it in told["exits"]]
                ax.plot(depths, shares, "o-", color=color, label=f"can leave at {most:.0%} changed")
            ax.set_title(summary["model"])
            ax.set_xlabel("depth (% of the layers)")
            ax.set_xlim(0, 100)
            ax.set_ylim(0, 101)
        axes[0].set_ylabel("tokens (%)")
        legend_above(figure, handles_of(*axes))
    return Drawing("potential", "How many tokens could leave where", "", figure)


if __name__ == "__main__":
    script(__file__, main)
