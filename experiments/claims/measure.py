"""Published figures beside what the simulator makes of their conditions: `python experiments/claims/measure.py`.

Reads claims.yaml and writes results.md and claims.png beside it. No number here is fitted to a figure that it is
compared with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from helios_sim import files, simulate
from helios_sim.entry import script
from helios_sim.exits.rule import OwnCard
from helios_sim.policy.drafts import pass_time, pass_time_apart, pass_time_with, tokens_per_pass
from helios_sim.policy.prediction import Depths, decode_time_s, fixed_depth
from helios_sim.profile.profile import Profile
from helios_sim.profile.resolve import find_profile
from helios_sim.profile.runtimes import preset
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
from helios_sim.report.format import markdown
from helios_sim.untrusted import parse_yaml

FOLDER = Path(__file__).parent
REPRODUCED, REFUTED, OPEN = "reproduced", "refuted", "cannot be checked"
NEAR = 0.15  # of a figure: full depth alone differs by 11 % between runs of one model in one of the sources
CARD, CONTEXT = "a100-80gb", 600
LONG_PLAIN = 39.047  # tokens/s of Llama-2-7B at full depth over 512 tokens, in the same source as the short answers
ASSUMED_DRAFTS = 6  # where only the acceptance that a figure asks for is told


@dataclass(frozen=True)
class Row:
    """A claim with what came of it."""

    source: str
    what: str
    published: str
    ours: str  # "" where there is none
    given: str
    worked_out: str
    verdict: str
    why: str
    page: str = ""  # another experiment, which has ours
    drawn: tuple[float, float] | None = None  # published speed over full depth's, and ours, for the figure


def rows(requests: int = 30) -> list[Row]:
    """Every claim, in the order of the file. Self-speculation is simulated with so many requests."""
    told = read()
    found = []
    for claim in told["claims"]:
        make: Callable[[Mapping[str, Any], int], Row] = KINDS[claim["kind"]]
        found.append(make(claim, requests))
    return found


def read() -> dict[str, Any]:
    content = (FOLDER / "claims.yaml").read_text(encoding="utf-8")
    told: dict[str, Any] = parse_yaml(content)
    return told


def within(ours: float, published: float) -> str:
    return REPRODUCED if abs(ours / published - 1) <= NEAR else REFUTED


def eager(model: str, card: str, launch_s_per_layer: float) -> Profile:
    """The host launches every kernel, and that is all it does: what a full-depth token takes is spread over layers."""
    nothing = replace(preset("eager"), launch_s_per_layer=launch_s_per_layer, host_overhead_s=0.0, sync_s=0.0)
    return find_profile(model, card).with_runtime(nothing)


def agreement_of(acceptance: float, drafts: int) -> float:
    """The probability that a token agrees, alike for all, at which this share of all drafts is accepted."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_per_pass(middle, drafts) < 1 + drafts * acceptance else (low, middle)
    return low


def _speculation(claim: Mapping[str, Any], requests: int) -> Row:
    plain, drafts, answer = claim["plain"], claim["drafts"], claim.get("answer", 512)
    token_s = 1 / (plain if "plain_total_s" not in claim else LONG_PLAIN)
    agreement = agreement_of(claim["acceptance"], drafts)
    fixed = (("prompt", 16), ("output", answer))
    lengths = [f"workload.lengths.{which}={{kind: fixed, value: {n}}}" for which, n in fixed]
    result = simulate(
        "own", "models=[llama-2-7b]", f"hardware={CARD}", "runtime=eager", f"runtime.launch_s_per_layer={token_s / 32}",
        "runtime.host_overhead_s=0", "runtime.sync_s=0", "profile_band=none", "exits.source=stated",
        f"+exits.parameters.layers=[{claim['exit']}]", f"+exits.parameters.unchanged=[{agreement}]",
        "policy=self_speculation", f"policy.exit_layer={claim['exit']}", f"policy.draft_tokens={drafts}",
        "workload.arrivals.kind=closed_loop", "workload.arrivals.users=1", f"workload.n_requests={requests}", *lengths,
    )  # fmt: skip
    (arm,) = result.arms.values()
    request_s = float(arm.metrics["e2e_s_mean"])  # type: ignore[arg-type]
    prompt_s = max(0.0, claim.get("plain_total_s", 0.0) - answer * token_s) if "plain_total_s" in claim else 0.0
    ours = answer / (request_s + prompt_s)
    given = f"full depth {plain:.1f}/s, acceptance {claim['acceptance']:.3f}, exit {claim['exit']}, {drafts} drafts"
    if "plain_total_s" in claim:
        given += f"; of the prompt {prompt_s:.2f} s more than a token takes at {LONG_PLAIN:.1f}/s"
    return Row(
        claim["source"], claim["what"], f"{claim['published']:.1f}/s ({claim['published'] / plain:.2f}x)",
        f"{ours:.1f}/s ({ours / plain:.2f}x)", given, "tokens/s with drafts", within(ours, claim["published"]),
        claim.get("why", ""), drawn=(claim["published"] / plain, ours / plain),
    )  # fmt: skip


def _full_depth(claim: Mapping[str, Any], requests: int) -> Row:
    given = find_profile(claim["given"], CARD).model
    launch_s = claim["given_ms"] / 1e3 / given.n_layers
    ours = 1e3 * pass_time(eager(claim["of"], CARD, launch_s), 1, 0, 1, CONTEXT).total_s
    known = f"{claim['given_ms']} ms of {claim['given']}: {1e3 * launch_s:.2f} ms a layer, by the host"
    why = "" if within(ours, claim["published"]) == REPRODUCED else "the host also takes time that no layer does"
    return Row(
        claim["source"], claim["what"], f"{claim['published']} ms", f"{ours:.1f} ms", known,
        "ms a token, the larger of launches and reading the weights", within(ours, claim["published"]), why,
    )  # fmt: skip


def _layers(claim: Mapping[str, Any], requests: int) -> Row:
    profile = find_profile(claim["of"], claim["card"]).with_runtime(preset("captured_graphs"))
    exits, shares = tuple(claim["shares"]), tuple(claim["shares"].values())
    reach = tuple(1.0 - sum(shares[:i]) for i in range(len(exits)))
    batch = np.array([1])
    whole = decode_time_s(profile, fixed_depth(profile.model.n_layers), batch, CONTEXT)
    ours = float(whole[0] / decode_time_s(profile, Depths(exits, reach), batch, CONTEXT)[0]) - 1
    told = ", ".join(f"{share:.0%} after layer {layer}" for layer, share in zip(exits, shares, strict=True))
    return Row(
        claim["source"], claim["what"], f"+{claim['published']:.1%}", f"+{ours:.1%}",
        f"{told} of {profile.model.n_layers}", "time of a decode, whose checks are free here",
        within(ours, claim["published"]), "",
    )  # fmt: skip


def _regroup(claim: Mapping[str, Any], requests: int) -> Row:
    """Batches that are split, over batches that leave together, for shares of tokens that could leave at one exit."""

    def rate(policy: str, share: float) -> float:
        result = simulate(
            "own", f"models=[{claim['of']}]", f"hardware={CARD}", "profile_band=none", "exits.source=stated",
            f"+exits.parameters.layers=[{claim['exit']}]", "+exits.parameters.unchanged=[0.9]",
            f"+exits.parameters.confident=[{share}]", f"policy={policy}", "workload.arrivals.kind=closed_loop",
            f"workload.arrivals.users={claim['batch']}", f"workload.n_requests={4 * claim['batch']}",
            "workload.lengths.prompt={kind: fixed, value: 128}", "workload.lengths.output={kind: fixed, value: 400}",
        )  # fmt: skip
        (arm,) = result.arms.values()
        return float(arm.metrics["throughput_requests_per_s"])  # type: ignore[arg-type]

    shares = claim["shares"]
    gains = [100 * (rate("early_exit_rebatch", share) / rate("early_exit_lazy", share) - 1) for share in shares]
    ours = ", ".join(f"{gain:+.1f}%" for gain in gains)
    given = f"{claim['of']}, exit {claim['exit']}, batch {claim['batch']}; of tokens that could leave there we assume "
    given += ", ".join(f"{100 * share:.0f} %" for share in shares)
    return Row(
        claim["source"], claim["what"], f"+{100 * claim['published']:.1f}%", ours, given,
        "throughput over a batch that leaves together", OPEN, claim["why"],
    )  # fmt: skip


def _needs(claim: Mapping[str, Any], requests: int) -> Row:
    cost = 1 + ASSUMED_DRAFTS * claim["exit"] / claim["layers"]
    needed = (claim["published"] * cost - 1) / ASSUMED_DRAFTS
    why = f"neither acceptance nor drafts are published; of {ASSUMED_DRAFTS} drafts it needs {needed:.2f}"
    if "like" in claim:
        like = (1 + ASSUMED_DRAFTS * claim["like_acceptance"]) / cost
        why += f"; with that of {claim['like']} it would be {like:.2f}x"
    return Row(claim["source"], claim["what"], f"{claim['published']:.3g}x", "", "", "", OPEN, why)


def _pipeline(claim: Mapping[str, Any], requests: int) -> Row:
    """Two cards, one of which drafts while the other verifies, over two that each do both, with as many requests.

    Whatever is accepted, since both draft as many tokens a pass. Passing tokens takes no time.
    """
    graphs = preset("captured_graphs")
    model, drafter = (find_profile(claim[which], CARD).with_runtime(graphs) for which in ("of", "by"))
    times = []
    for drafts in claim["drafts"]:
        for batch in claim["batches"]:
            together_s = pass_time_with(model, drafter, drafts, batch, CONTEXT).total_s
            times.append(pass_time_apart(model, drafter, drafts, 2 * batch, CONTEXT, OwnCard(0.0)) / together_s)
    gains = sorted(100 * ((ratio if claim["latency"] else 1 / ratio) - 1) for ratio in times)
    published, ours = "-" if claim["latency"] else "+", f"{gains[0]:+.1f} to {gains[-1]:+.1f}%"
    published += f"{claim['published']:.1%}"
    given = f"{claim['of']} drafted by {claim['by']}, {claim['drafts'][0]} to {claim['drafts'][-1]} drafts, "
    given += f"{claim['batches'][0]} to {claim['batches'][-1]} requests a card, which we assume; any acceptance"
    return Row(
        claim["source"], claim["what"], published, ours, given,
        "drafting beside verification alone, on cards of one kind", OPEN, claim["why"],
    )  # fmt: skip


def _line(claim: Mapping[str, Any], requests: int) -> Row:
    (low, low_ms), (high, high_ms) = claim["ends"].items()
    ours = low_ms + (high_ms - low_ms) * (claim["at"] - low) / (high - low)
    given = f"{low_ms} ms at layer {low}, {high_ms} ms at layer {high}"
    worked_out = "a pass takes its drafts, each in proportion to the exit, and one whole model"
    return Row(
        claim["source"], claim["what"], f"{claim['published']} ms", f"{ours:.1f} ms", given, worked_out,
        within(ours, claim["published"]), "where acceptance is as high at every exit",
    )  # fmt: skip


def _loading(claim: Mapping[str, Any], requests: int) -> Row:
    profile = find_profile(claim.get("of", "llama-2-7b"), claim["card"])
    n_bytes = claim.get("bytes") or profile.weight_bytes(profile.model.n_layers)
    ours = profile.load_time_s(int(n_bytes))
    return Row(
        claim["source"], claim["what"], f"{claim['published']} s", f"{ours:.2f} s", f"{n_bytes / 1e9:.2f} GB",
        "bytes over the link", within(ours, claim["published"]),
        "a load has no fixed part but what runtime.load_fixed_s states",
    )  # fmt: skip


def _files(claim: Mapping[str, Any], requests: int) -> Row:
    """A wake from files, at the rate that another model's wake gives beyond the fixed part."""
    profile, fixed_s = find_profile(claim["given"], claim["card"]), claim["fixed_s"]
    given_bytes = profile.weight_bytes(profile.model.n_layers)
    rate = given_bytes / (claim["given_s"] - fixed_s)
    asleep = profile.with_runtime(profile.runtime.changed(load_fixed_s=fixed_s)).with_disk_rate(rate).from_files()
    ours = asleep.load_time_s(claim["bytes"])
    given = f"{claim['given_s']} s of {claim['given']}, of which {fixed_s} s are fixed: {rate / 1e9:.1f} GB/s"
    why = "reading has a fixed part of its own: both times together give 0.6 s, 4.1 GB/s"
    return Row(
        claim["source"], claim["what"], f"{claim['published']} s", f"{ours:.2f} s", given, "bytes at that rate",
        within(ours, claim["published"]), why,
    )  # fmt: skip


def _wakes(claim: Mapping[str, Any], requests: int) -> Row:
    """What switches to and fro between two models take longer, by what each of their wakes does."""
    each, switches = sorted(claim["differences_s"].values()), claim["switches"]
    low, high = (switches // 2 * each[1 - k] + (switches - switches // 2) * each[k] for k in (0, 1))
    verdict = REPRODUCED if low * (1 - NEAR) <= claim["published"] <= high * (1 + NEAR) else REFUTED
    given = ", ".join(f"{name} wakes {more_s} s later" for name, more_s in claim["differences_s"].items())
    return Row(
        claim["source"], claim["what"], f"{claim['published']} s", f"{low:.1f} to {high:.1f} s", given,
        "sum over switches", verdict, "with level 2 more than the wakes takes longer",
    )  # fmt: skip


def _link(claim: Mapping[str, Any], requests: int) -> Row:
    ours = find_profile("llama-2-7b", claim["card"]).load_bytes_per_s / 1e9
    return Row(
        claim["source"], claim["what"], f"{claim['published']}", f"{ours:.0f}", "both times",
        "0.8 of PCIe 4.0 x16, as profiles that nobody measured assume it", within(ours, claim["published"]),
        "waking copies through memory that is not pinned, or piece by piece; a measured profile has its own figure",
    )  # fmt: skip


def _recorded(claim: Mapping[str, Any], requests: int) -> Row:
    verdict = {"open": OPEN}.get(claim["verdict"], claim["verdict"])
    return Row(
        claim["source"], claim["what"], f"{claim['published']:.3g}x", f"{claim['ours']}x", "shares of exits",
        "time, memory and the policy's costs", verdict, claim["why"], claim["page"],
    )  # fmt: skip


def _open(claim: Mapping[str, Any], requests: int) -> Row:
    value = claim["published"]
    published = f"{value} {claim['unit']}" if "unit" in claim else f"{value:.3g}x"
    if claim.get("gain"):
        published = f"+{value:.1%}"
    return Row(claim["source"], claim["what"], published, "", "", "", OPEN, claim["why"])


KINDS: dict[str, Callable[[Mapping[str, Any], int], Row]] = {
    "speculation": _speculation, "full_depth": _full_depth, "layers": _layers, "needs": _needs, "line": _line,
    "regroup": _regroup, "pipeline": _pipeline,
    "files": _files, "wakes": _wakes, "loading": _loading, "link": _link, "recorded": _recorded, "open": _open,
}  # fmt: skip


def page(found: list[Row]) -> str:
    """The tables by source, after how many of each verdict there are."""
    sources = read()["sources"]
    counts = Counter(row.verdict for row in found)
    lines = ["# claims: results", "", "Made by `python experiments/claims/measure.py`.", ""]
    lines += [f"{len(found)} claims: " + ", ".join(f"{counts[v]} {v}" for v in (REPRODUCED, REFUTED, OPEN)) + ".", ""]
    for name, source in sources.items():
        own = [row for row in found if row.source == name]
        lines += [f"## {source['name']}", "", *([f"{source['note']}.", ""] if source["note"] else [])]
        lines += ["| claim | published | ours | given | worked out | verdict | |"]
        lines += ["| --- | ---: | ---: | --- | --- | --- | --- |"]
        for row in own:
            cells = (row.what, row.published, row.ours, row.given, row.worked_out, row.verdict, row.why)
            link = f" ([{row.page}](../{row.page}/README.md))" if row.page else ""
            lines.append(f"| {' | '.join(map(markdown, cells))}{link} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _figure(found: list[Row]) -> Drawing:
    """LayerSkip's own figures: published on one axis, ours on the other."""
    points = [(row.drawn, row.verdict) for row in found if row.drawn is not None]
    ends = np.array([1.0, 1.1 * max(published for (published, _), _ in points)])
    with look():
        figure, (ax,) = new_figure(1, 1, 3.4)
        ax.plot(ends, ends, "-", color=BASELINE_COLOR, label="as published")
        ax.fill_between(ends, (1 - NEAR) * ends, (1 + NEAR) * ends, color=BASELINE_COLOR, alpha=0.2, lw=0,
                        label=f"within {NEAR:.0%}")  # fmt: skip
        for place, (verdict, mark) in enumerate({REPRODUCED: "o", REFUTED: "D"}.items()):
            of = [drawn for drawn, found_to_be in points if found_to_be == verdict]
            label = f"Llama-2-7B, published acceptance: {verdict}"
            ax.plot(*zip(*of, strict=True), mark, color=MODEL_COLORS[place], label=label)
        ax.set_xlabel("published, times full depth")
        ax.set_ylabel("ours, times full depth")
        ax.set_xlim(*ends)
        legend_above(figure, handles_of(ax))
    return Drawing("claims", "Self-speculation with the acceptance that was published", "", figure)


def main(words: list[str]) -> None:
    claims = rows()
    files.write_text(FOLDER / "results.md", page(claims))
    files.write_bytes(FOLDER / "claims.png", to_png(_figure(claims)))


if __name__ == "__main__":
    script(__file__, main)
