"""Predictors on a real model: `python experiments/field/predictors_live.py [--requests N]`.

Serves the same prompts live in float32 with predictors at every exit and with both schedules, reads each answer once
more in one pass as calibration records exits, and says where a simulation over that record lets each token leave: the
same exit, but where rounding moves a probability over the threshold or changes a word. K and V of layers that a token
left out are computed later, so that live and record read the same. Writes predictors_live.md beside this file. Times
are not measured here, so nothing else need rest meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibrate.exits.traces import observe
from helios_sim import files, study_config
from helios_sim.entry import script
from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.exits.schedule import schedule_of
from helios_sim.live.answers import Answer
from helios_sim.live.memory.kv import Packed
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.served import LiveModel, open_models
from helios_sim.profile.store import load_profile, write_profile
from helios_sim.study.build import build
from helios_sim.study.fleet import build_fleet
from helios_sim.study.jobs import make_job, serve
from helios_sim.study.live import LiveRun, wanted
from helios_sim.study.schema import Config

FOLDER = Path(__file__).parent
MODEL, CARD, THRESHOLD = "smollm2-135m", "epyc-2core", 0.74
SETTINGS = (
    "mode=live", f"models=[{MODEL}]", "exits.source=predictors", "exits.confidence=predictor",
    "workload.arrivals.kind=all_at_once", "live.warm_up=0", "live.score=true",  # so that every answer is kept
    "server.max_running_requests=4", "workload.lengths.output.median=160", "workload.lengths.output.sigma=0.2",
    "workload.lengths.output.maximum=240",
)  # fmt: skip
ARMS = {
    "all exits look": {},
    "both schedules": {"most_checks": 1, "near_tokens": 5},
}


@dataclass(frozen=True)
class Outcome:
    """Of one schedule: decoded tokens, and where they left."""

    name: str
    checks: str  # exits that look at every token
    answers: int
    tokens: int
    layers: float  # a token, live
    unchanged: float  # share of tokens that are what the whole model says
    elsewhere: int  # leave at another exit in the simulation
    farthest: float  # of those whose exits say the same word: how far the probability is from the threshold


def main(requests: int) -> None:
    with TemporaryDirectory() as folder:
        profile = load_profile(f"{MODEL}@{CARD}")
        in_float32 = replace(profile.model, weight_bytes_per_value=4, kv_bytes_per_value=4)
        write_profile(replace(profile, model=in_float32), Path(folder) / f"{MODEL}@{CARD}")
        config = study_config("fidelity_live", *SETTINGS, f"workload.n_requests={requests}", f"profile_folder={folder}")
        config = replace(config, arms={})
        data = build(config, 0).models[MODEL]
        live = open_models(wanted(config), {MODEL: data.profile}, {MODEL: data.trace})[MODEL]
        model = SegmentedModel.load(live.checkpoint, dtype=torch.float32)
        outcomes = [outcome(name, config, settings, live, model) for name, settings in ARMS.items()]
    files.write_text(FOLDER / "predictors_live.md", page(outcomes, requests))


def outcome(
    name: str, config: Config, settings: Mapping[str, Any], live: LiveModel, model: SegmentedModel
) -> Outcome:  # fmt: skip
    rule, answers = served(config, settings)
    depths: list[int] = []
    replayed: list[int] = []
    agrees: list[bool] = []
    distances = [0.0]
    for answer in answers:
        values, agree = recorded(live, model, answer)
        left = simulated(live.exits, rule, values)
        depths += answer.depths[1:]
        replayed += left
        at = [live.exits.index(depth) for depth in answer.depths]
        agrees += agree[np.arange(1, len(at)), at[1:]].tolist()
        for token, (here, there) in enumerate(zip(answer.depths[1:], left, strict=True), 1):
            if here != there:
                value = abs(float(values[token, live.exits.index(min(here, there))]))
                distances.append(abs(value - rule.threshold))
    checks = live.exits[:-1] if rule.checkpoints is None else rule.checkpoints
    return Outcome(
        name, ", ".join(map(str, checks)), len(answers), len(depths), float(np.mean(depths)), float(np.mean(agrees)),
        sum(a != b for a, b in zip(depths, replayed, strict=True)), max(distances),
    )  # fmt: skip


def served(config: Config, settings: Mapping[str, Any]) -> tuple[PerToken, list[Answer]]:
    """One live run: the rule of its deployment, and every answer."""
    fleet = build_fleet(config, 0)
    live = LiveRun(config, fleet, 0)
    entry = {"policy": "early_exit", "model": MODEL, "threshold": THRESHOLD, "kv_rule": "recompute", **settings}
    run = serve(make_job("arm", entry, config, 0), fleet, lambda record: None, live)
    live.close()
    rule = run.servers[0].decisions[0].deployment.exit_rule
    assert isinstance(rule, PerToken)
    return rule, [answer for number, answer in live.device_engine.answers.items() if number >= 0]


@torch.inference_mode()
def recorded(live: LiveModel, model: SegmentedModel, answer: Answer) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of each token of the answer and each exit, as a trace has them: what its predictor says, and whether its word is
    the whole model's, (n, E) each."""
    ids = [*answer.prompt, *answer.tokens[:-1]]
    step = Packed(model.architecture, 1, len(ids), model.dtype, model.device)
    hidden, start, states = model.embed(torch.tensor(ids), step.positions), 0, []
    for depth in live.exits:
        hidden, start = model.run(hidden, start, depth, step), depth
        states.append(hidden[-len(answer.tokens) :])
    seen = observe(model, live.heads, states, np.array(answer.tokens), None, live.predictors)
    return seen.confidences[Confidence.PREDICTOR], seen.agree


def simulated(exits: Sequence[int], rule: PerToken, values: NDArray[Any]) -> list[int]:
    """Where each token after the first leaves, by the loop's own functions."""
    schedule, recent, found = schedule_of(exits, rule), 0, []
    sure = values >= np.float32(rule.threshold)
    for row in sure[1:]:
        looks = schedule.looking(recent)
        leaf = next((e for e in range(len(exits) - 1) if looks >> e & 1 and row[e]), len(exits) - 1)
        recent = schedule.remembered(recent, leaf)
        found.append(exits[leaf])
    return found


def page(outcomes: Sequence[Outcome], requests: int) -> str:
    command = f"`python experiments/field/predictors_live.py --requests {requests}`"
    said = f"{MODEL} in float32, exits.confidence=predictor, threshold {THRESHOLD:g}, kv_rule=recompute"
    lines = ["# field: predictors, live", "", f"Made by {command}: {said}.", ""]
    columns = ["schedule", "exits that look at every token", "answers", "tokens", "layers/token", "unchanged",
               "leave elsewhere in the simulation", "farthest from the threshold"]  # fmt: skip
    lines += [f"| {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    for it in outcomes:
        cells = (it.name, it.checks, str(it.answers), f"{it.tokens:,}", f"{it.layers:.2f}", f"{it.unchanged:.1%}",
                 str(it.elsewhere), f"{it.farthest:.1e}" if it.elsewhere else "-")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=24)
    main(parser.parse_args(words).requests)


if __name__ == "__main__":
    script(__file__, command)
