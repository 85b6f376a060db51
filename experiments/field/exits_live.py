"""Regrouped exits and early releases on a real model: `python experiments/field/exits_live.py [--requests N]`.

Serves prompts live in float32 under both policies. Each answer is then written once more by a loop over the model,
alone, with a cache of its own: with the exits that its tokens had and K and V copied from there, or with the thresholds
under which it was released. And what the exits of the live run said is simulated, under the same policy. Writes
exits_live.md beside this file. Texts, depths, splits and thresholds are compared; no speed is. By how much earlier
answers were delivered stands beside what the profile, which is of bfloat16, says of a machine at rest.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from helios_sim import files, study_config
from helios_sim.engine.simulated import ModelData, SimulatedEngine
from helios_sim.entry import script
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.rule import Confidence
from helios_sim.live.answers import Answer
from helios_sim.live.exits import ExitReader, Row
from helios_sim.live.memory.decodes import decode_step
from helios_sim.live.memory.kv import KvCache, PromptStep
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.regroup import copy_kv
from helios_sim.live.served import LiveModel, OpenSettings, open_models
from helios_sim.policy.registry import make_policy
from helios_sim.policy.telemetry import Situation
from helios_sim.profile.store import load_profile, write_profile
from helios_sim.request import RequestBlock, RequestRecord
from helios_sim.serving.server import Server
from helios_sim.simulation import Run, simulate
from helios_sim.study.fleet import build_fleet
from helios_sim.study.jobs import make_job, serve
from helios_sim.study.live import LiveRun
from helios_sim.study.schema import Config

FOLDER = Path(__file__).parent
MODEL, CARD, MEASURE = "smollm2-135m", "epyc-2core", Confidence.MAX_PROBABILITY
REGROUPED = {"threshold": 0.5, "flush_requests": 3, "flush_s": 3600.0}  # by number alone: what a clock cannot change
RELEASED = {"max_disagreement": 0.05, "review_requests": 3}
SETTINGS = (
    "mode=live", f"models=[{MODEL}]", "exits.source=generated", "workload.arrivals.kind=all_at_once", "live.warm_up=0",
    "live.score=true",  # so that every answer is kept
    "server.max_running_requests=4", "workload.lengths.output.median=160", "workload.lengths.output.sigma=0.2",
    "workload.lengths.output.maximum=240",
)  # fmt: skip


@dataclass(frozen=True)
class Served:
    """One live run, and the simulation of what its exits said."""

    policy: str
    answers: Mapping[int, Answer]
    records: Sequence[RequestRecord]  # by request
    run: Run
    same: int  # answers that the loop wrote too, token for token
    simulated: Run


def main(requests: int) -> None:
    with TemporaryDirectory() as folder:
        profile = load_profile(f"{MODEL}@{CARD}")
        in_float32 = replace(profile.model, weight_bytes_per_value=4, kv_bytes_per_value=4)
        write_profile(replace(profile, model=in_float32), Path(folder) / f"{MODEL}@{CARD}")
        config = study_config("fidelity_live", *SETTINGS, f"workload.n_requests={requests}", f"profile_folder={folder}")
        config = replace(config, arms={})
        found = [
            of_policy(config, "early_exit_rebatch", {**REGROUPED, "model": MODEL}),
            of_policy(config, "release_early", {**RELEASED, "model": MODEL}),
        ]
    files.write_text(FOLDER / "exits_live.md", page(found, requests))


def of_policy(config: Config, policy: str, own: Mapping[str, Any]) -> Served:
    records: list[RequestRecord] = []
    fleet = build_fleet(config, 0)
    live = LiveRun(config, fleet, 0)
    run = serve(make_job("arm", {"policy": policy, **own}, config, 0), fleet, records.append, live)
    live.close()
    records.sort(key=lambda record: record.request_id)
    answers = {record.request_id: live.device_engine.answers[record.request_id] for record in records}
    data = fleet.parts.models[MODEL]
    opened = open_models(OpenSettings(), {MODEL: data.profile}, {MODEL: data.trace})[MODEL]
    alone = Alone(opened)
    texts = [alone.write(answer) for answer in answers.values()]
    same = sum(text.tokens == answer.tokens for text, answer in zip(texts, answers.values(), strict=True))
    simulated = replay(fleet.parts.situation, opened, records, texts, policy, own)
    return Served(policy, answers, records, run, same, simulated)


@dataclass(frozen=True)
class Text:
    tokens: list[int]
    confidences: list[list[float]]  # of each token, by exit before the last
    agrees: list[list[bool]]  # with the whole model, where that ran


class Alone:
    """A loop over the model: one request, one token after the other."""

    def __init__(self, live: LiveModel) -> None:
        self._model = SegmentedModel.load(live.checkpoint, dtype=torch.float32)
        self._exits, self._reader = live.exits, ExitReader(live.heads, self._model.architecture.n_layers)

    @torch.inference_mode()
    def write(self, answer: Answer) -> Text:
        """The answer once more: its tokens leave at its depths, or are released as its thresholds say."""
        model, depths, found = self._model, self._exits, Text([], [], [])
        room = len(answer.prompt) + len(answer.tokens)
        cache = KvCache(model.architecture, depths[-1], 1, room)
        step = PromptStep(cache, 0, len(answer.prompt))
        hidden = model.run(model.embed(torch.tensor(answer.prompt), step.positions), 0, depths[-1], step)[-1:]
        found.tokens.append(self._reader.read(model, depths[-1], hidden, None).tokens[0])
        found.confidences.append([1.0] * (len(depths) - 1))
        found.agrees.append([True] * (len(depths) - 1))
        for n, depth in enumerate(answer.depths[1:]):
            position = len(answer.prompt) + n
            one = decode_step(cache, [0], [position])
            hidden, said = model.embed(torch.tensor(found.tokens[-1:]), torch.tensor([position])), []
            for start, end in pairwise((0, *depths)):
                if start < depth:
                    hidden = model.run(hidden, start, end, one)
                    said.append(self._reader.read(model, end, hidden, MEASURE))
            if depth < depths[-1]:
                copy_kv(cache, [Row(0, position, 0, depth)], depth, depths[-1])
            words = [each.tokens[0] for each in said]
            sure = [each.confidence[0] for each in said if each.confidence is not None]
            missing = len(depths) - len(words)
            found.confidences.append([*sure, *[1.0] * missing][:-1])
            found.agrees.append([*(word == words[-1] for word in words), *[True] * missing][:-1])
            found.tokens.append(self._released(answer, n, words, sure))
        return found

    def _released(self, answer: Answer, n: int, words: list[int], sure: list[float]) -> int:
        if answer.ramped:
            rule = answer.ramped[n].rule
            for ramp, threshold in zip(rule.ramps, rule.thresholds, strict=True):
                if sure[self._exits.index(ramp)] >= np.float32(threshold):
                    return words[self._exits.index(ramp)]
        return words[-1]


def replay(
    situation: Situation, live: LiveModel, records: Sequence[RequestRecord], texts: Sequence[Text], policy: str,
    own: Mapping[str, Any],
) -> Run:  # fmt: skip
    """The same requests, each with a part of a trace of its own: what the exits said of it. A token is a character."""
    values = np.array([[*row, 1.0] for text in texts for row in text.confidences], np.float32)
    agrees = np.array([[*row, True] for text in texts for row in text.agrees], np.bool_)
    trace = synthetic_trace(MODEL, live.exits, tokens=len(values), chars_per_token=1)
    trace = replace(trace, confidences={MEASURE: values}, agree=agrees)
    profile = replace(live.profile, model=replace(live.profile.model, chars_per_token=1.0))
    candidate = replace(situation.candidates[MODEL], profile=profile)
    situation = replace(situation, candidates={MODEL: candidate})
    prompt, output = (np.array([getattr(r, name) for r in records]) for name in ("prompt_tokens", "output_tokens"))
    n = len(records)

    def blocks() -> Iterator[RequestBlock]:
        yield RequestBlock(
            request_id=np.arange(n), arrival_ns=np.zeros(n, np.int64), prompt_chars=prompt, output_chars=output,
            task=np.zeros(n, np.int64), text_start=np.cumsum(output) - output,
        )  # fmt: skip

    def server(env: Any, number: int, on_left: Any) -> Server:
        models = {MODEL: ModelData(profile, trace.bind(("text",)))}
        return Server(env, number, SimulatedEngine(env, models), make_policy(policy, own), situation, on_left)

    return simulate(server, blocks(), n, lambda record: None)


def rules(run: Run) -> list[Any]:
    """What was decided, one after the other."""
    return [(d.deployment.exit_rule, d.deployment.regrouping) for d in run.servers[0].decisions]


def page(found: Sequence[Served], requests: int) -> str:
    load = os.getloadavg()[0]
    regrouped, released = found
    tokens = sum(record.output_tokens for record in regrouped.records)
    command = f"`python experiments/field/exits_live.py --requests {requests}`"
    lines = ["# field: exits, live", "", f"Made by {command}: {MODEL} in float32, {len(regrouped.records)} answers"]
    lines[-1] += f" each, {tokens:,} tokens, at most 4 requests together, one thread; load of the machine {load:.1f}."
    lines += ["", "| | live | simulated from what the live run's exits said |", "| --- | ---: | ---: |"]
    for title, of in (
        ("`early_exit_rebatch`: iterations", lambda run: f"{run.stats.iterations}"),
        ("decodes an iteration, by time", lambda run: f"{run.stats.decode_batch_ns / run.stats.decode_ns:.2f}"),
        ("batches split", lambda run: f"{run.stats.splits}"),
        ("waits at an exit", lambda run: f"{run.stats.held_tokens}"),
        ("tokens by depth", lambda run: ", ".join(f"{d}: {n}" for d, n in depths(run))),
    ):
        lines.append(f"| {title} | {of(regrouped.run)} | {of(regrouped.simulated)} |")
    for title, of in (
        ("`release_early`: iterations", lambda run: f"{run.stats.iterations}"),
        ("changes of thresholds", lambda run: f"{len(run.servers[0].decisions) - 1}"),
        ("released", lambda run: f"{run.stats.released_tokens / tokens_of(released):.1%}"),
        ("earlier by, ms", lambda run: f"{run.stats.released_ns / 1e6 / max(1, run.stats.released_tokens):.1f}"),
    ):
        lines.append(f"| {title} | {of(released.run)} | {of(released.simulated)} |")
    lines += ["", f"Thresholds decided alike: {rules(released.run) == rules(released.simulated)}."]
    differ = 1 - sum(record.agreed_tokens for record in released.records) / tokens_of(released)
    lines += [f"Released answers that differ from the whole model's: {differ:.2%} of all tokens."]
    for each in found:
        lines += [f"Answers of `{each.policy}` that the loop writes too: {each.same} of {len(each.records)}."]
    return "\n".join(lines) + "\n"


def depths(run: Run) -> list[tuple[int, int]]:
    return sorted(run.stats.tokens_by_depth[MODEL].items())


def tokens_of(served: Served) -> int:
    return sum(record.output_tokens for record in served.records)


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10)
    main(parser.parse_args(words).requests)


if __name__ == "__main__":
    script(__file__, command)
