"""The timeline of an arm: active model, loaded layers, memory, batch and queue."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from helios_sim.report.figures.style import (
    BASELINE_COLOR,
    INK,
    MODEL_COLORS,
    MUTED,
    Drawing,
    annotate,
    look,
    new_figure,
)
from helios_sim.report.result import ArmResult, ExperimentResult
from helios_sim.request import NS_PER_S

_MOST_TIMELINES = 4  # those of arms that change something come first


def timeline_drawings(result: ExperimentResult) -> list[Drawing]:
    """Timelines of the arms that change their placement, else of the last arm that has one."""
    with_samples = [a for a in result.arms.values() if a.timeline is not None and len(a.timeline.rows) > 1]
    moving = [a for a in with_samples if _transitions_ns(a)]
    shown = (moving or with_samples[-1:])[:_MOST_TIMELINES]
    names = [_file_name(arm.name) for arm in shown]
    names = [f"{name}_{place}" if names.index(name) < place else name for place, name in enumerate(names)]
    with look():
        return [_timeline(arm, name) for arm, name in zip(shown, names, strict=True)]


def _file_name(arm: str) -> str:
    return re.sub(r"[^\w.-]", "_", arm)[:80]


def _timeline(arm: ArmResult, file: str) -> Drawing:
    assert arm.timeline is not None
    times_ns, models, layers, running, queued, kv_bytes, weight_bytes = zip(*arm.timeline.rows, strict=True)
    time_s = np.array(times_ns, dtype=np.float64) / NS_PER_S
    names = sorted(set(models))  # so that a model has its colour in every arm
    figure, axes = new_figure(3, 1, 6.2, sharex=True, gridspec_kw={"height_ratios": [1, 1.2, 1]})
    depth, memory, load = axes

    for place, name in enumerate(names):
        here = np.array([model == name for model in models])
        color = MODEL_COLORS[place % len(MODEL_COLORS)]
        depth.fill_between(time_s, 0, np.where(here, layers, 0), step="post", color=color, alpha=0.75, linewidth=0)
    keys = [Patch(color=MODEL_COLORS[i % len(MODEL_COLORS)], alpha=0.75) for i in range(len(names))]
    moments_ns = _transitions_ns(arm)
    change = [Line2D([], [], color=MUTED, linewidth=0.8, linestyle=":")] if moments_ns else []
    depth.legend(
        [*keys, *change],
        [*names, *["new placement"][: len(change)]],
        loc="lower left",
        bbox_to_anchor=(0.18, 1.01),
        ncols=5,
        fontsize=9,
        borderaxespad=0,
    )
    depth.set_title("Model and layers")
    depth.set_ylabel("layers run")
    depth.set_ylim(0, max(layers) * 1.12)
    depth.yaxis.set_major_locator(MaxNLocator(5, integer=True))

    weights_gb, kv_gb = np.array(weight_bytes) / 1e9, np.array(kv_bytes) / 1e9
    memory.fill_between(
        time_s,
        0,
        weights_gb,
        step="post",
        color=BASELINE_COLOR,
        alpha=0.55,
        linewidth=0,
        label="weights and activations",
    )
    memory.fill_between(
        time_s,
        weights_gb,
        weights_gb + kv_gb,
        step="post",
        color="#0fa08a",
        alpha=0.75,
        linewidth=0,
        label="KV cache in use",
    )
    if arm.capacity_bytes is not None:
        memory.axhline(arm.capacity_bytes / 1e9, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        annotate(memory, "card", (1, arm.capacity_bytes / 1e9), (-4, -11), across=True, ha="right", color=INK)
    memory.set_title("Memory")
    memory.set_ylabel("GB")
    memory.set_ylim(bottom=0)
    memory.legend(loc="lower left", bbox_to_anchor=(0.18, 1.01), ncols=2, fontsize=9, borderaxespad=0)

    load.step(time_s, running, where="post", color=INK, linewidth=1.5, label="running")
    load.step(time_s, queued, where="post", color="#e5822e", linewidth=1.5, label="waiting")
    load.set_title("Requests")
    load.set_ylabel("requests")
    load.set_ylim(bottom=0)
    load.set_xlabel("time (s)")
    load.legend(loc="lower left", bbox_to_anchor=(0.18, 1.01), ncols=2, fontsize=9, borderaxespad=0)

    for ax in axes:
        ax.set_xlim(time_s[0], time_s[-1])
        for moment_ns in moments_ns:
            ax.axvline(moment_ns / NS_PER_S, color=MUTED, linewidth=0.8, linestyle=":")
    caption = "Dotted lines: a changed placement came into force. " if moments_ns else ""
    caption += "Samples of the first seed; metrics do not use them."
    which = f", the first of {len(arm.replicas)} replicas" if len(arm.replicas) > 1 else ""
    return Drawing(f"timeline_{file}", f"What {arm.name} did{which}", caption, figure)


def _transitions_ns(arm: ArmResult) -> Sequence[int]:
    own = arm.timeline_transitions_ns
    return arm.replicates[0].stats.transitions_ns if own is None else own
