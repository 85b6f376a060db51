"""A model that drafts for a real one: `python experiments/self_speculation/drafter.py --model PATH --drafter PATH`.

Serves the same prompts live in float32 at full depth and with each number of drafts (`--drafts 3 5`), by the same
server and policy as everywhere, and compares the texts token by token. Beside the acceptance stands what one pass of
the drafter over the full-depth answers predicts of it, by task. Models are named as in `live.weights`; texts are those
of `make models`. With Qwen2.5-Coder-1.5B-Instruct and -0.5B-Instruct it needs 10 GB of memory. Writes drafter.md beside
this file; with `--times` it also prints the processor's time of each run, for a machine where nothing else runs. With
`--recorded` nothing is served: it prints what `python -m calibrate +task=drafters` would record of these prompts, in
bfloat16, half of the memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
import torch
from live import accepted

from calibrate.exits.answers import answers
from calibrate.exits.drafters import predictions
from helios_sim import files
from helios_sim.entry import script
from helios_sim.exits.artificial import no_exits
from helios_sim.exits.replay import offline_exits
from helios_sim.exits.rule import Confidence
from helios_sim.live.answers import Answer, agreements
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.clock import WallClock
from helios_sim.live.device import open_device
from helios_sim.live.engine import LiveEngine
from helios_sim.live.memory.residents import Residents
from helios_sim.live.model.architecture import model_spec
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.heads import ExitHeads
from helios_sim.live.served import LiveModel, read_texts
from helios_sim.policy.registry import make_policy
from helios_sim.policy.telemetry import Candidate, Goal, Objective, Situation
from helios_sim.profile.profile import MemoryBudget
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import RequestBlock
from helios_sim.serving.server import Server
from helios_sim.simulation import simulate

FOLDER = Path(__file__).parent
MODEL, DRAFTER = "model", "drafter"
TASKS = ("code", "humaneval", "dialogue", "news")
PROMPT_TOKENS, RUNNING = 48, 4


@dataclass(frozen=True)
class Run:
    answers: Mapping[int, Answer]
    stats: Any
    processor_s: float


@dataclass(frozen=True)
class Outcome:
    """Of one number of drafts."""

    drafts: int
    same: int  # answers that are full depth's, token for token
    acceptance: float  # accepted / drafted
    predicted: float  # by one pass of the drafter over full depth's answers
    by_task: Sequence[float]
    processor_s: float


class Loaded(Residents):
    """Residents of which each is in memory once: on a CPU no copy of the weights is needed beside."""

    def __init__(self, models: Mapping[str, LiveModel]) -> None:
        super().__init__(models, open_device("cpu"))
        self.models = {name: SegmentedModel.load(live.checkpoint, dtype=live.dtype) for name, live in models.items()}

    def hold(self, layers: Mapping[str, int], for_good: bool = False) -> None:
        """Nothing leaves."""

    def running(self, name: str, layers: int, late: bool = False) -> SegmentedModel:
        return self.models[name]

    @contextmanager
    def whole(self, name: str) -> Iterator[SegmentedModel]:
        yield self.models[name]


class Pair:
    """One engine for all runs; each has a server and a clock of its own."""

    def __init__(self, weights: Mapping[str, str], requests: int, tokens: int) -> None:
        self._block = requests_of(requests, tokens)
        self._models = {name: opened(name, path) for name, path in weights.items()}
        self.residents = Loaded(self._models)
        self._engine = LiveEngine(
            WallClock(), self._models, read_texts(TASKS), slots=min(RUNNING, requests),
            slot_tokens=PROMPT_TOKENS + tokens, residents=self.residents, kept_answers=None,
        )  # fmt: skip
        candidates = {
            name: Candidate(live.profile, offline_exits(live.trace.trace, 0.5, Confidence.MAX_PROBABILITY))
            for name, live in self._models.items()
        }
        self._situation = Situation(
            candidates, MemoryBudget(1 << 40, 1.0), Objective(Goal.THROUGHPUT, 0.1), max_running_requests=RUNNING,
            max_batch_tokens=512, seed=0,
        )  # fmt: skip

    def serve(self, policy: str, settings: Mapping[str, Any]) -> Run:
        """All requests at once."""
        clock = self._engine._env = WallClock()
        self._engine.work.keep_only(set(), self._engine.answers)
        self._engine.answers.clear()

        def make_server(env: Any, number: int, on_left: Any) -> Server:
            server = Server(env, number, self._engine, make_policy(policy, settings), self._situation, on_left)
            clock.sync()
            return server

        began_s, requests = process_time(), len(self._block.request_id)
        run = simulate(make_server, iter((self._block,)), requests, lambda record: None, env=clock)
        return Run(dict(self._engine.answers), run.stats, process_time() - began_s)


def requests_of(requests: int, tokens: int) -> RequestBlock:
    """All at once, the tasks in turns."""
    return RequestBlock(
        np.arange(requests), np.zeros(requests, np.int64), np.full(requests, PROMPT_TOKENS),
        np.full(requests, tokens), np.arange(requests) % len(TASKS), 5_000 + 7_919 * np.arange(requests),
    )  # fmt: skip


def opened(name: str, weights: str) -> LiveModel:
    checkpoint = find_checkpoint(weights)
    spec = model_spec(checkpoint.architecture, name, 1.0, "float32")
    profile = replace(flat_profile(0.001, n_layers=spec.n_layers, name=name), model=spec)
    trace = no_exits(spec).bind(TASKS)
    return LiveModel(checkpoint, ExitHeads.own(()), checkpoint.tokenizer(), profile, trace)


def compare(pair: Pair, numbers: Sequence[int]) -> tuple[Run, list[Outcome]]:
    whole = pair.serve("full_depth", {"model": MODEL})
    seen = {number: agreements(pair.residents.models[DRAFTER], answer) for number, answer in whole.answers.items()}
    of_tasks = range(len(TASKS))
    by_task = [[agrees for number, agrees in seen.items() if number % len(TASKS) == task] for task in of_tasks]
    found = []
    for drafts in numbers:
        settings = {"model": MODEL, "drafter": DRAFTER, "draft_tokens": drafts}
        run = pair.serve("draft_model", settings)
        same = sum(run.answers[number].tokens == answer.tokens for number, answer in whole.answers.items())
        shares = [accepted(texts, drafts) for texts in by_task if texts]
        live = run.stats.accepted_drafts / run.stats.drafted_tokens
        found.append(Outcome(drafts, same, live, accepted(list(seen.values()), drafts), shares, run.processor_s))
    return whole, found


def page(names: tuple[str, str], whole: Run, outcomes: Sequence[Outcome]) -> str:
    n, tokens = len(whole.answers), sum(len(answer.tokens) for answer in whole.answers.values())
    lines = ["# self_speculation: a model that drafts, live", ""]
    drafts = " ".join(str(it.drafts) for it in outcomes)
    made = f"python experiments/self_speculation/drafter.py --requests {n} --tokens {tokens // n} --drafts {drafts}"
    said = f"{names[1]} drafts for {names[0]}, in float32, {tokens:,} tokens, {RUNNING} requests at a time"
    lines += [f"Made by `{made}`: {said}. By task: one pass over the answers.", ""]
    of_tasks = " | ".join(TASKS)
    lines += [f"| drafts a pass | equal to full depth's | acceptance | one pass over the answers | {of_tasks} |"]
    lines += ["| ---: | ---: | ---: | ---: |" + " ---: |" * len(TASKS)]
    for it in outcomes:
        shares = " | ".join(f"{100 * share:.1f} %" for share in (it.acceptance, it.predicted, *it.by_task))
        lines.append(f"| {it.drafts} | {it.same} of {n} | {shares} |")
    return "\n".join(lines) + "\n"


def recorded(weights: Mapping[str, str], requests: int, tokens: int, numbers: Sequence[int]) -> str:
    """What the recorder of traces says of the prompts that would be served, as answers of so many tokens."""
    opens = {name: opened(name, path) for name, path in weights.items()}
    block, texts = requests_of(requests, tokens), read_texts(TASKS)
    starts = zip(block.task.tolist(), block.text_start.tolist(), strict=True)
    asked = [opens[MODEL].prompt_ids(Prompt(*start), texts, PROMPT_TOKENS) for start in starts]  # type: ignore[arg-type]
    with TemporaryDirectory() as scratch:
        model = SegmentedModel.load(opens[MODEL].checkpoint, dtype=torch.bfloat16)
        found = answers(model, opens[MODEL].tokenizer, ExitHeads.own(()), asked, tokens)
        del model
        drafter = SegmentedModel.load(opens[DRAFTER].checkpoint, dtype=torch.bfloat16)
        right = predictions(drafter, found, Path(scratch)).right
    each = [part.tolist() for part in np.split(right, np.cumsum([len(answer.tokens) for answer in found])[:-1])]
    told = ", ".join(f"{100 * accepted(each, drafts):.1f} % of {drafts} drafts" for drafts in numbers)
    return f"recorded in bfloat16 of {len(found)} answers, {len(right):,} tokens, {right.mean():.1%} right: {told}"


@dataclass(frozen=True)
class Prompt:
    """What of a request its prompt depends on."""

    task: int
    text_start: int


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=40, help="of each answer")
    parser.add_argument("--drafts", type=int, nargs="+", default=[3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--recorded", action="store_true")
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    weights = {MODEL: given.model, DRAFTER: given.drafter}
    if given.recorded:
        print(recorded(weights, given.requests, given.tokens, given.drafts))
        return
    pair = Pair(weights, given.requests, given.tokens)
    whole, outcomes = compare(pair, given.drafts)
    names = Path(given.model).stem, Path(given.drafter).stem
    files.write_text(FOLDER / "drafter.md", page(names, whole, outcomes))
    sys.stdout.write(page(names, whole, outcomes))
    if given.times:
        print(f"full depth: {whole.processor_s:.1f} s of the processor")
        for it in outcomes:
            print(f"{it.drafts} drafts: {it.processor_s:.1f} s, {whole.processor_s / it.processor_s:.2f} times as fast")


if __name__ == "__main__":
    script(__file__, command)
