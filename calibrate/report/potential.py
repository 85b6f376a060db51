"""The page's section on whether the model exits at all."""

from __future__ import annotations

from calibrate.exits.potential import ALLOWED, CONTEXT_TOKENS, Potential
from calibrate.report.page import Section, Table
from helios_sim.report import format as fmt
from helios_sim.report.figures.style import (
    BASELINE_COLOR,
    MODEL_COLORS,
    Drawing,
    handles_of,
    legend_above,
    look,
    new_figure,
)


def potential_section(found: Potential) -> Section:
    """Tables by exit and by batch, and a figure."""
    return Section(
        "potential",
        "Does it exit at all?",
        "derived",
        [
            f"{found.tokens:,} tokens read at {len(found.exits)} depths through the model's own norm and LM head. A "
            "check is fitted to the confidences of one half of the texts, and all shares are of the other half. "
            f"Speeds are of decodes with {CONTEXT_TOKENS:,} tokens of context, priced for {found.card}; memory that a "
            "cap would free is not counted.",
        ],
        tables=[_by_exit(found), _by_batch(found)],
        figures=[_figure(found)],
    )


def _by_exit(found: Potential) -> Table:
    columns = ["after layer", "unchanged", "like the exit before"]
    for most in ALLOWED:
        columns += [f"can leave at {most:.0%}", "changed"]
    rows = []
    for it in found.exits:
        cells = [str(it.depth), f"{100 * it.unchanged:.1f} %", fmt.NOTHING if it.alike is None else f"{it.alike:.2f}"]
        for leave, changed in zip(it.leave, it.changed, strict=True):
            cells += [f"{100 * leave:.1f} %", f"{100 * changed:.1f} %"]
        rows.append(cells)
    note = "Like the exit before: correlation of being unchanged at both. Changed: share of all tokens."
    return Table(columns, rows, title="Each exit alone", note=note)


def _by_batch(found: Potential) -> Table:
    columns = ["requests at once", "exits that always know", *(f"the check at {most:.0%}" for most in ALLOWED)]
    rows = [
        [str(it.batch), f"{it.at_most:.2f}x", *(_checked(*way) for way in zip(it.checked, it.at, strict=True))]
        for it in found.speeds
    ]
    layers = ", ".join(
        f"{mean:.1f} at {most:.0%} ({100 * changed:.1f} % changed)"
        for mean, most, changed in zip(found.mean_layers, ALLOWED, found.changed, strict=True)
    )
    note = (
        "With the check: the best exit alone, or all of them; each check is a pass through the head. Layers per token "
        f"with all of them, of {found.layers}: {layers}."
    )
    return Table(columns, rows, title=f"How many times as fast decodes are on {found.card}", note=note)


def _checked(speed: float, at: int | None) -> str:
    return f"{speed:.2f}x ({'all exits' if at is None else f'layer {at}'})"


def _figure(found: Potential) -> Drawing:
    with look():
        figure, (ax,) = new_figure(1, 1, 3.3)
        depths = [it.depth for it in found.exits]
        ax.plot(depths, [100 * it.unchanged for it in found.exits], "o-", color=BASELINE_COLOR, label="unchanged")
        for k, (most, color) in enumerate(zip(ALLOWED, MODEL_COLORS, strict=False)):
            share = [100 * it.leave[k] for it in found.exits]
            ax.plot(depths, share, "o-", color=color, label=f"can leave at {most:.0%} changed")
        ax.set_xticks(depths)
        ax.set_xlim(0, found.layers)
        ax.set_ylim(0, 101)
        ax.set_xlabel(f"after layer, of {found.layers}")
        ax.set_ylabel("tokens (%)")
        legend_above(figure, handles_of(ax))
    caption = "Grey: tokens that full depth would give as well. Coloured: those that the check finds, each exit alone."
    return Drawing("potential", "How many tokens could leave where", caption, figure)
