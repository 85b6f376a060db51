"""The page's section on trained exits, compared with attached ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calibrate.exits.before_after import AFTER, AGREEMENTS, BEFORE, CONFIDENCES, points, share, shown
from calibrate.report.page import Section, Table


def trained_section(result: Mapping[str, Any]) -> Section:
    """Tables from a stage's result."""
    found = result["compared"]
    return Section(
        "trained",
        "What training the model for early exit did",
        "measured",
        [
            f"{result['tokens']:,} tokens in {result['steps']:,} steps, taught by the frozen model's full depth. "
            "Before: the frozen model with exits attached on the same tokens; after: the trained one. "
            f"{found['tokens']:,} tokens of {found['passages']} held-out passages; brackets are 95 % intervals over "
            "groups of passages.",
        ],
        tables=[by_exit(found), by_agreement(found)],
    )


def by_exit(found: Mapping[str, Any]) -> Table:
    """Agreement and bits at every exit, before and after."""
    columns = [
        "after layer", "agrees, before", "agrees, after", "change", "the frozen model's token", "bits/char, before",
        "bits/char, after", "change of bits",
    ]  # fmt: skip
    before, after, rows = found[BEFORE], found[AFTER], []
    for e, depth in enumerate(found["exits"]):
        last = e == len(found["exits"]) - 1
        agreement = [] if last else [share(side["agreement"][e]) for side in (before, after)]
        agreement += ["", "", ""] if last else [points(found["change"]["agreement"][e])]
        bits = [shown(side["bits_per_char"][e], ".3f") for side in (before, after)]
        change = shown(found["change"]["bits_per_char"][e], "+.3f")
        rows.append([f"{depth} (all)" if last else str(depth), *agreement, share(after["kept"][e]), *bits, change])
    note = "Agrees: with full depth of the same model. The frozen model's token: the one that it gives at full depth."
    return Table(columns, rows, title="Each exit", note=note)


def by_agreement(found: Mapping[str, Any]) -> Table:
    """The layers that tokens run if a given share must agree with full depth."""
    columns = ["decided by", "must agree", "", "layers a token", "agree", "bits/char", "leave early"]
    rows = []
    for confidence in CONFIDENCES:
        for least in AGREEMENTS:
            first = [confidence.value, f"{least:.0%}"]
            for side in (BEFORE, AFTER):
                at = found[side]["at"][confidence.value][str(least)]
                layers, bits = shown(at["layers_per_token"], ".2f"), shown(at["bits_per_char"], ".3f")
                rows.append([*first, side, layers, share(at["agreement"]), bits, f"{1 - at['left'][-1]:.1%}"])
            change = found["change"]["layers_per_token"][confidence.value][str(least)]
            rows.append([*first, "change", shown(change, "+.2f"), "", "", ""])
    note = (
        "The lowest threshold that keeps it on one half of the passages, judged on the other half. The classifier is a "
        "check of its own; max_probability takes a pass through the whole LM head, and is calibrated on the first half."
    )
    return Table(columns, rows, title="How deep tokens run", note=note)
