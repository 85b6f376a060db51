"""The speed of drafts on a real model: `python experiments/self_speculation/speed.py [--seconds 300] [--passes 2]`.

SmolLM2 in float32 on one thread is measured (`seconds` for its profile), then serves the same prompts at full depth and
with drafts in turns, full depth first and last. Full depth's answers, looked at once more at every exit, are the trace
from which the simulation replays the same passes, at the pace that the machine had in each run. So what is left of a
difference is prices, and they stand beside what drafts, verifications, other decodes and prompts really took, each on
its own. Iterations are timed by the processor time of the thread that serves, which is all that computes here, so that
others on the machine count only as far as they slow it down. Writes speed.md beside this file; needs torch and the
weights and texts of `make models`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from time import thread_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from helios_sim import files, study_config
from helios_sim.engine.simulated import ModelData
from helios_sim.entry import script
from helios_sim.exits.rule import Confidence, SelfSpeculation
from helios_sim.exits.trace import ANY_TASK, BoundTrace, ExitTrace, TokenSpan
from helios_sim.live import engine, pace
from helios_sim.live.answers import Answer, score
from helios_sim.live.exits import Chunk, ExitReader
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.served import LiveModel, open_models
from helios_sim.live.speculation import Drafts, Speculation
from helios_sim.profile.composition import Composition
from helios_sim.profile.pace import at_pace
from helios_sim.profile.profile import Profile
from helios_sim.provenance import Provenance, ProvenanceClass
from helios_sim.report.records import RecordLog, Records
from helios_sim.study.fleet import Fleet, build_fleet
from helios_sim.study.jobs import make_job, serve
from helios_sim.study.live import LiveRun, wanted
from helios_sim.study.schema import Config
from helios_sim.study.watched import LiveNotes, Step
from helios_sim.validate.live import measured_profiles
from helios_sim.vary.settings import with_settings

FOLDER = Path(__file__).parent
MODEL = "smollm2-135m"
ARMS: Mapping[str, Mapping[str, Any]] = {
    "full depth": {"policy": "full_depth", "model": MODEL},
    "2 drafts at layer 8": {"policy": "self_speculation", "model": MODEL, "exit_layer": 8, "draft_tokens": 2},
    "3 drafts at layer 24": {"policy": "self_speculation", "model": MODEL, "exit_layer": 24, "draft_tokens": 3},
}
FULL_DEPTH = next(iter(ARMS))
SETTINGS = (
    f"models=[{MODEL}]", "exits.source=generated", "workload.arrivals.kind=all_at_once", "workload.n_requests=12",
    "server.max_running_requests=4", "workload.lengths.output.median=160", "workload.lengths.output.sigma=0.2",
    "workload.lengths.output.maximum=240", "live.threads=1", "live.dtype=float32", "live.pace_every_s=0.3",
)  # fmt: skip
WITHIN = 0.05


@dataclass(frozen=True, slots=True)
class Served:
    """One run: its answers by request, its records, and every iteration of it."""

    answers: Mapping[int, Answer]
    records: Records
    stats: Any
    steps: Sequence[Step]
    spent_s: Sequence[tuple[float, float]]  # the processor's time of each iteration, and of its drafts
    notes: LiveNotes


class Timed(Speculation):
    """Drafts with the processor's time that they took."""

    drafts_s = 0.0  # of all so far

    def draft(self, requests: Sequence[Drafts], chunks: Sequence[Chunk] = ()) -> list[Composition]:
        began_s = thread_time()
        ran = super().draft(requests, chunks)
        Timed.drafts_s += thread_time() - began_s
        return ran


class Stopwatch:
    """Stands before an engine's `execute`."""

    def __init__(self, execute: Any) -> None:
        self._execute = execute
        self.spent_s: list[tuple[float, float]] = []

    def __call__(self, plan: Any, now_ns: int) -> Any:
        began_s, drafts_s = thread_time(), Timed.drafts_s
        outcome = self._execute(plan, now_ns)
        self.spent_s.append((thread_time() - began_s, Timed.drafts_s - drafts_s))
        return outcome


@dataclass(slots=True)
class Part:
    """What one kind of step took, and what the profile at the run's pace says of it."""

    taken_ns: float = 0.0
    priced_ns: float = 0.0
    steps: int = 0

    def add(self, taken_ns: float, priced_s: float, steps: int = 1) -> None:
        self.taken_ns, self.priced_ns = self.taken_ns + taken_ns, self.priced_ns + 1e9 * priced_s
        self.steps += steps


@dataclass(slots=True)
class Compared:
    """One arm over its passes."""

    same: list[int] = field(default_factory=list)  # answers that are full depth's
    live_per_s: list[float] = field(default_factory=list)  # output tokens
    simulated_per_s: list[float] = field(default_factory=list)
    acceptance: list[tuple[float, float]] = field(default_factory=list)  # live, simulated
    passes: list[tuple[int, int]] = field(default_factory=list)  # iterations, live and simulated
    parts: dict[str, Part] = field(default_factory=dict)

    def note(self, name: str, taken_ns: float, priced_s: float, steps: int = 1) -> None:
        self.parts.setdefault(name, Part()).add(taken_ns, priced_s, steps)


@dataclass(frozen=True, slots=True)
class OwnAnswers(BoundTrace):
    """A trace of these very answers: each request replays its own."""

    spans: Mapping[tuple[int, int], TokenSpan]  # by task and where the text starts

    def locate(self, task: int, text_start: int, output_chars: int) -> TokenSpan:
        return self.spans[task, text_start]

    def locate_many(
        self, task: NDArray[np.int64], text_start: NDArray[np.int64], output_chars: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        found = [self.spans[key] for key in zip(task.tolist(), text_start.tolist(), strict=True)]
        return np.array([(s.first, s.start, s.length, s.n_tokens) for s in found], np.int64)


def main(seconds: float, passes: int) -> None:
    config = study_config("fidelity_live", *SETTINGS, f"fidelity_live.calibrate_s={seconds:g}")
    config = replace(config, arms={})
    with TemporaryDirectory() as folder:
        config = with_settings(config, dict(measured_profiles(config, Path(folder)).changes))
        found = compare(config, passes)
    files.write_text(FOLDER / "speed.md", page(found, seconds, passes))
    sys.stdout.write(page(found, seconds, passes))


def compare(config: Config, passes: int) -> dict[str, Compared]:
    """Every arm in turns; full depth once more at the end."""
    found = {name: Compared() for name in ARMS}
    whole: Served | None = None
    own: OwnAnswers | None = None
    for name in [*list(ARMS) * passes, FULL_DEPTH]:
        run = served(with_settings(config, {"mode": "live"}), ARMS[name])
        if whole is None or own is None:
            whole, own = run, as_trace(config, run)
        note(found[name], config, ARMS[name], run, whole, own)
    return found


def served(config: Config, entry: Mapping[str, Any]) -> Served:
    """One live run. With a full queue nothing ever waits for an arrival, so its iterations are all of its time."""
    pace.perf_counter = thread_time  # type: ignore[attr-defined]
    fleet, log = build_fleet(config, 0), RecordLog()
    engine.Speculation = Timed  # type: ignore[attr-defined]
    live = LiveRun(config, fleet, 0)
    watch = Stopwatch(live.device_engine.execute)
    live.device_engine.execute = watch  # type: ignore[method-assign]
    try:
        run = serve(make_job("arm", entry, config, 0), fleet, log.add, live, block_sink=log.add_block)
        notes, steps = live.end(), list(live.engine.steps)
    finally:
        live.close()
    answers = {number: answer for number, answer in live.device_engine.answers.items() if number >= 0}
    return Served(answers, log.records(), run.stats, steps, watch.spent_s[-len(steps) :], notes)


def as_trace(config: Config, whole: Served) -> OwnAnswers:
    """What every exit says of full depth's answers, in one pass over each."""
    parts = build_fleet(config, 0).parts
    live = opened(config, parts.models)
    model = SegmentedModel.load(live.checkpoint, dtype=torch.float32)
    reader, rule = ExitReader(live.heads, model.architecture.n_layers), SelfSpeculation(live.exits[0], 1)
    agrees, spans, first = [], {}, 0
    for answer in whole.answers.values():
        agrees.append(score(live, model, reader, answer, rule, 0).agrees)
        n, request = len(answer.tokens), answer.request
        spans[request.task, request.text_start] = TokenSpan(first, 0, n, n)
        first += n
    prompt = np.repeat(np.arange(len(agrees), dtype=np.int32), [len(each) for each in agrees])
    trace = ExitTrace(
        model=MODEL, exits=live.exits, tasks=(ANY_TASK,), task=np.zeros(first, np.int32), prompt=prompt,
        chars=np.full(first, 4, np.int32), agree=np.concatenate(agrees),
        provenance=Provenance(ProvenanceClass.MEASURED, "these answers, read again", "speed.py"),
        confidences={Confidence.MAX_PROBABILITY: np.ones((first, len(live.exits)), np.float32)},
    )  # fmt: skip
    return OwnAnswers(trace, (0,) * len(parts.workload.mix.tasks), spans)


def opened(config: Config, models: Mapping[str, ModelData]) -> LiveModel:
    profiles, traces = ({name: getattr(data, of) for name, data in models.items()} for of in ("profile", "trace"))
    return open_models(wanted(config), profiles, traces)[MODEL]


def note(
    found: Compared, config: Config, entry: Mapping[str, Any], run: Served, whole: Served, own: OwnAnswers
) -> None:
    """Add one run, the simulation of it at its pace, and the prices of its parts."""
    fleet = build_fleet(config, 0)
    paced = at_pace(fleet.models[MODEL].profile, run.notes.pace or 1.0, run.notes.prompt_pace)
    records, stats = simulated(config, entry, fleet, ModelData(paced, own))
    found.same.append(sum(run.answers[n].tokens == answer.tokens for n, answer in whole.answers.items()))
    spent_s = sum(whole_s for whole_s, _ in run.spent_s) + sum(step.host_ns for step in run.steps) / 1e9
    found.live_per_s.append(tokens(run.records) / spent_s)
    found.simulated_per_s.append(tokens(records) / span_ns(records) * 1e9)
    if run.stats.drafted_tokens:
        shares = (of.accepted_drafts / of.drafted_tokens for of in (run.stats, stats))
        found.acceptance.append((next(shares), next(shares)))
    found.passes.append((len(run.steps), stats.iterations))
    for step, (whole_s, drafts_s) in zip(run.steps, run.spent_s, strict=True):
        note_parts(found, step, paced, 1e9 * (whole_s - drafts_s), 1e9 * drafts_s)


def note_parts(found: Compared, step: Step, paced: Profile, whole_ns: float, drafts_ns: float) -> None:
    """Of one iteration: its drafts, and its pass of the whole model with the host's part."""
    kind = "prompts" if step.composition.prefill else "verification" if step.drafted else "decode without drafts"
    if step.drafted:
        prices_s = sum(float(paced.iteration_time_s(draft)[0]) for draft in step.drafted)
        found.note("draft", drafts_ns, prices_s, len(step.drafted))
    found.note(kind, whole_ns + step.host_ns, float(paced.iteration_time_s(step.composition)[0]))


def simulated(config: Config, entry: Mapping[str, Any], fleet: Fleet, data: ModelData) -> tuple[Records, Any]:
    models: Any = fleet.parts.models
    models[MODEL] = data
    log = RecordLog()
    run = serve(make_job("arm", entry, config, 0), fleet, log.add, block_sink=log.add_block)
    return log.records(), run.stats


def tokens(records: Records) -> int:
    return int(records.output_tokens.sum())


def span_ns(records: Records) -> int:
    """From the first arrival to the last token."""
    return int(records.last_token_ns.values.max() - records.arrival_ns.min())


def page(found: Mapping[str, Compared], seconds: float, passes: int) -> str:
    command = f"`python experiments/self_speculation/speed.py --seconds {seconds:g} --passes {passes}`"
    lines = ["# self_speculation: speed, live and simulated", ""]
    lines += [f"Made by {command}: {MODEL} in float32 on one thread, simulated at the machine's pace. Times are the "
              "processor's.", ""]  # fmt: skip
    lines += ["| arm | tokens/s | simulated | | over full depth | simulated | | equal texts | acceptance | simulated |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    base = found[FULL_DEPTH]
    base_live, base_simulated = fmean(base.live_per_s), fmean(base.simulated_per_s)
    for name, it in found.items():
        live, simulation = fmean(it.live_per_s), fmean(it.simulated_per_s)
        over, over_simulated = live / base_live, simulation / base_simulated
        shares = [f"{100 * fmean(pair[k] for pair in it.acceptance):.1f} %" if it.acceptance else "–" for k in (0, 1)]
        lines.append(
            f"| {name} | {live:.1f} | {simulation:.1f} | {simulation / live - 1:+.1%} | {over:.3f} | "
            f"{over_simulated:.3f} | {over_simulated / over - 1:+.1%} | {min(it.same)} of {max(base.same)} | "
            f"{' | '.join(shares)} |"
        )
    lines += ["", f"Target: {WITHIN:.0%} either way.", "", "| arm | step | times | ms | priced | |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for name, it in found.items():
        for part, sums in it.parts.items():
            taken, priced = (ns / sums.steps / 1e6 for ns in (sums.taken_ns, sums.priced_ns))
            off = priced / taken - 1
            lines.append(f"| {name} | {part} | {sums.steps} | {taken:.2f} | {priced:.2f} | {off:+.1%} |")
    return "\n".join(lines) + "\n"


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="for the profile")
    parser.add_argument("--passes", type=int, default=2)
    options = parser.parse_args(words)
    main(options.seconds, options.passes)


if __name__ == "__main__":
    script(__file__, command)
