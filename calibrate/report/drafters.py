"""The page's section and summary figures on drafters: other models that draft for the calibrated one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrate.report.page import Section, Table
from helios_sim.exits.trace import FUSED, ExitTrace

_BINS = 10  # number of bins of a drafter's confidence


def shares(joint: ExitTrace) -> dict[str, NDArray[np.bool_]]:
    """Whether each drafter predicts the answer's tokens, (T,), by name. Several drafters also get their fused draft."""
    found = {name: joint.drafted_by(name) for name in joint.drafters}
    return found if len(found) == 1 else {**found, FUSED.join(found): joint.drafted_by_all(tuple(found))}


def drafts_summary(joint: ExitTrace) -> dict[str, Any]:
    """The drafters' part of summary.json: the share of tokens that each predicts, in total and by task."""
    return {
        name: {
            "all": round(float(right.mean()), 4),
            **{task: round(float(right[joint.task == k].mean()), 4) for k, task in enumerate(joint.tasks)},
        }
        for name, right in shares(joint).items()
    }


def draft_sentences(joint: ExitTrace) -> list[str]:
    found = []
    for name, share in drafts_summary(joint).items():
        by_task = {task: share[task] for task in joint.tasks}
        least, most = min(by_task, key=lambda t: by_task[t]), max(by_task, key=lambda t: by_task[t])
        who = f"{name} predicts" if FUSED not in name else f"The surest of {name.replace(FUSED, ', ')} predicts"
        found.append(
            f"{who} {share['all']:.1%} of the {joint.n_tokens:,} tokens of the answers: {by_task[most]:.1%} of {most}, "
            f"{by_task[least]:.1%} of {least}."
        )
    return found


def drafts_section(joint: ExitTrace) -> Section:
    found = shares(joint)
    parts = [(task, joint.task == k) for k, task in enumerate(joint.tasks)]
    parts.append(("all tasks", np.ones(joint.n_tokens, np.bool_)))
    rows = [
        [name, f"{int(of.sum()):,}", *(f"{100 * right[of].mean():.1f} %" for right in found.values())]
        for name, of in parts
    ]
    by_task = Table(
        ("task", "tokens", *(name if FUSED not in name else "the surest" for name in found)), rows,
        title="Tokens of the answers that a drafter predicts from the true text before them",
    )  # fmt: skip
    return Section(
        "drafts", "What other models would draft", joint.provenance.provenance_class.value,
        [
            "Each read prompts and answers once. Verified greedily, that is what it would draft: up to the first draft "
            "that is refused, all follow the true text."
        ],
        tables=[by_task, _reliability(joint.drafters, joint.drafters_sure)],
    )  # fmt: skip


def _reliability(right: Mapping[str, NDArray[np.bool_]], sure: Mapping[str, NDArray[np.float32]]) -> Table:
    rows = []
    for k in range(_BINS):
        cells = [f"{k / _BINS:.1f} to {(k + 1) / _BINS:.1f}"]
        for name, values in sure.items():
            of = np.clip((values * _BINS).astype(int), 0, _BINS - 1) == k
            cells += [f"{int(of.sum()):,}", f"{100 * right[name][of].mean():.1f} %" if of.any() else ""]
        rows.append(cells)
    columns = [text for name in sure for text in (f"{name}: tokens", "of them right")]
    return Table(("how sure it was", *columns), rows, title="How far a drafter knows when it is right")
