"""Self-speculation on a real model: `python experiments/self_speculation/live.py [--requests N]`.

Serves the same prompts live in float32 at full depth and with drafts at each exit, and compares the texts token by
token. Beside the acceptance stands what is predicted of it: by one pass over the full-depth answers that looks at every
exit, and by the shipped trace of answers to other prompts in bfloat16. Writes live.md beside this file. Times are not
measured here, so nothing else need rest meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from helios_sim import files, load_trace, study_config
from helios_sim.entry import script
from helios_sim.exits.rule import SelfSpeculation
from helios_sim.live.answers import Answer, score
from helios_sim.live.exits import ExitReader
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.served import LiveModel, OpenSettings, open_models
from helios_sim.profile.store import load_profile, write_profile
from helios_sim.study.build import build
from helios_sim.study.fleet import build_fleet
from helios_sim.study.jobs import make_job, serve
from helios_sim.study.live import LiveRun
from helios_sim.study.schema import Config

FOLDER = Path(__file__).parent
MODEL, CARD, DRAFTS = "smollm2-135m", "epyc-2core", 3
SETTINGS = (
    "mode=live", f"models=[{MODEL}]", "exits.source=generated", "workload.arrivals.kind=all_at_once", "live.warm_up=0",
    "live.score=true",  # so that every answer is kept
    "server.max_running_requests=4", "workload.lengths.output.median=160", "workload.lengths.output.sigma=0.2",
    "workload.lengths.output.maximum=240",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Of one exit: texts, and what became of drafts."""

    exit_layers: int
    same: int  # answers that are full depth's, token for token
    answers: int
    tokens: int
    acceptance: float  # accepted / drafted
    predicted: float  # by one pass over the answers
    by_trace: float  # by the shipped trace


def main(requests: int) -> None:
    with TemporaryDirectory() as folder:
        profile = load_profile(f"{MODEL}@{CARD}")
        in_float32 = replace(profile.model, weight_bytes_per_value=4, kv_bytes_per_value=4)
        write_profile(replace(profile, model=in_float32), Path(folder) / f"{MODEL}@{CARD}")
        config = study_config("fidelity_live", *SETTINGS, f"workload.n_requests={requests}", f"profile_folder={folder}")
        config = replace(config, arms={})
        whole, _ = served(config, {"policy": "full_depth", "model": MODEL})
        parts = build(config, 0)
        data = parts.models[MODEL]
        live = open_models(OpenSettings(), {MODEL: data.profile}, {MODEL: data.trace})[MODEL]
        model = SegmentedModel.load(live.checkpoint, dtype=torch.float32)
        seen = {number: agreement(live, model, answer) for number, answer in whole.items()}
        outcomes = [of_exit(config, whole, live, seen, layers) for layers in live.exits[:-1]]
    files.write_text(FOLDER / "live.md", page(outcomes, requests))


def served(config: Config, entry: Mapping[str, Any]) -> tuple[dict[int, Answer], Any]:
    """One live run: every answer by the number of its request, and the statistics."""
    fleet = build_fleet(config, 0)
    live = LiveRun(config, fleet, 0)
    run = serve(make_job("arm", entry, config, 0), fleet, lambda record: None, live)
    live.close()
    answers = {number: answer for number, answer in live.device_engine.answers.items() if number >= 0}
    return answers, run.stats


def agreement(live: LiveModel, model: SegmentedModel, answer: Answer) -> list[list[bool]]:
    """Of each token and exit, whether the exit says what the whole model says, in one pass over the text."""
    reader = ExitReader(live.heads, model.architecture.n_layers)
    found: list[list[bool]] = score(live, model, reader, answer, SelfSpeculation(live.exits[0], 1), 0).agrees.tolist()
    return found


def of_exit(
    config: Config,
    whole: Mapping[int, Answer],
    live: LiveModel,
    seen: Mapping[int, list[list[bool]]],
    layers: int,
) -> Outcome:
    entry = {"policy": "self_speculation", "model": MODEL, "exit_layer": layers, "draft_tokens": DRAFTS}
    answers, stats = served(config, entry)
    column = live.exits.index(layers)
    trace = load_trace(MODEL, "generated")
    texts = [trace.agree[trace.prompt == prompt, column].tolist() for prompt in sorted(set(trace.prompt.tolist()))]
    return Outcome(
        layers,
        sum(answers[number].tokens == answer.tokens for number, answer in whole.items()),
        len(whole),
        sum(len(answer.tokens) for answer in whole.values()),
        stats.accepted_drafts / stats.drafted_tokens,
        accepted(([row[column] for row in rows] for rows in seen.values()), DRAFTS),
        accepted(texts, DRAFTS),
    )


def accepted(texts: Iterable[Sequence[bool]], drafts: int) -> float:
    """The share of drafts that is accepted where each token agrees or not. The prompt gives the first token."""
    drafted = taken = 0
    for agrees in texts:
        at = 1
        while at < len(agrees):
            most = min(drafts, len(agrees) - at - 1)
            run = next((n for n in range(most) if not agrees[at + n]), most)
            drafted, taken, at = drafted + most, taken + run, at + run + 1
    return taken / drafted


def page(outcomes: Sequence[Outcome], requests: int) -> str:
    first = outcomes[0]
    said = f"{MODEL} in float32, {first.answers} answers, {first.tokens:,} tokens, {DRAFTS} drafts a pass"
    command = f"`python experiments/self_speculation/live.py --requests {requests}`"
    lines = ["# self_speculation: live", "", f"Made by {command}: {said}."]
    lines += ["", "| exit | answers equal to full depth's | acceptance | one pass over the answers | shipped trace |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: |"]
    for it in outcomes:
        shares = " | ".join(f"{100 * share:.1f} %" for share in (it.acceptance, it.predicted, it.by_trace))
        lines.append(f"| {it.exit_layers} | {it.same} of {it.answers} | {shares} |")
    return "\n".join(lines) + "\n"


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=40)
    main(parser.parse_args(words).requests)


if __name__ == "__main__":
    script(__file__, command)
