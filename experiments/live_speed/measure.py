"""Times the live engine against transformers' generate, turn by turn in one run.

`python experiments/live_speed/measure.py [--model smollm2-135m] [--dtype bfloat16 float32] [--device cpu] [--rounds 5]`
prints a JSON line for each dtype; with --record it also goes to results.json beside this file. Both sides have the same
weights, dtype and threads, read the same prompts and write the same number of tokens, greedily. Ours runs behind the
whole server: scheduler, accounting and clock are in its time. All sides of all dtypes take turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch

from helios_sim import files
from helios_sim.entry import script
from helios_sim.exits.artificial import no_exits
from helios_sim.exits.replay import offline_exits
from helios_sim.exits.rule import Confidence, FullDepth
from helios_sim.live.checkpoint.source import Checkpoint, find_checkpoint
from helios_sim.live.clock import WallClock
from helios_sim.live.engine import LiveEngine
from helios_sim.live.model.architecture import model_spec
from helios_sim.live.model.heads import ExitHeads
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Cause, Deployment, KvRule, Placement
from helios_sim.policy.telemetry import Candidate, Goal, Objective, Situation, Telemetry
from helios_sim.profile.profile import MemoryBudget
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import RequestBlock
from helios_sim.serving.server import Server
from helios_sim.simulation import simulate

HERE = Path(__file__).parent
ALONE = ((64, 96),)  # prompt and answer in tokens
MIXED = ((24, 96), (200, 24), (64, 64), (120, 40), (16, 80), (90, 16), (48, 56), (150, 32))
SLOT_TOKENS = 320
PASSAGE = "The keeper of the bridge wrote down every cart that crossed, its driver, its load and the toll he paid. "


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    wall_s: list[float]
    cpu_s: list[float]


@dataclass
class Always:
    """A policy that decides once."""

    deployment: Deployment

    def start(self, situation: Situation) -> Deployment:
        return self.deployment

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        return None


class Passage:
    """The words of every prompt: one passage, over and over."""

    def prompt(self, task: int, start: int, chars: int) -> str:
        return (PASSAGE * (chars // len(PASSAGE) + 2))[start % len(PASSAGE) :][:chars]


class Ours:
    """One engine for all rounds; each round has a server and a clock of its own."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str) -> None:
        spec = model_spec(checkpoint.architecture, "served", 1.0, dtype)
        profile = replace(flat_profile(0.001, n_layers=spec.n_layers, name="served"), model=spec)
        trace = no_exits(spec)
        self.model = LiveModel(checkpoint, ExitHeads.own(()), checkpoint.tokenizer(), profile, trace.bind(("text",)))
        self.clock = WallClock()
        self.engine = LiveEngine(
            self.clock,
            {"served": self.model},
            Passage(),
            slots=8,
            slot_tokens=SLOT_TOKENS,
            device=device,
            kept_answers=None,
        )
        offline = offline_exits(trace, 0.5, Confidence.MAX_PROBABILITY)
        self.situation = Situation(
            {"served": Candidate(profile, offline)}, MemoryBudget(1 << 40, 1.0), Objective(Goal.THROUGHPUT, 0.1),
            max_running_requests=8, max_batch_tokens=512, seed=0,
        )  # fmt: skip

    def serve(self, lengths: Sequence[tuple[int, int]]) -> list[list[int]]:
        """All requests at once; the answers' tokens."""
        depth = self.model.profile.model.n_layers
        policy = Always(Deployment(Placement("served", depth), FullDepth(), kv_rule=KvRule.NONE))
        self.clock = self.engine._env = WallClock()
        self.engine.work.keep_only(set(), self.engine.answers)
        self.engine.answers.clear()

        def make_server(env: Any, number: int, on_left: Any) -> Server:
            server = Server(env, number, self.engine, policy, self.situation, on_left)
            self.clock.sync()
            return server

        simulate(make_server, _block(lengths), len(lengths), lambda record: None, env=self.clock)
        return [self.engine.answers[i].tokens for i in range(len(lengths))]


def _block(lengths: Sequence[tuple[int, int]]) -> Iterator[RequestBlock]:
    prompt, answer = np.array(lengths, np.int64).T
    nothing = np.zeros(len(lengths), np.int64)
    yield RequestBlock(np.arange(len(lengths)), nothing, prompt, answer, nothing, nothing)


class Theirs:
    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str, kept: Path | None) -> None:
        """`kept`: a folder where the model unpacked from a GGUF file is kept, since unpacking takes a minute."""
        import transformers

        path = Path(checkpoint.storage.files[0])
        where: dict[str, Any] = {}
        if path.suffix == ".gguf":  # unpacked into the dtype, as ours are: packed weights are much slower in bfloat16
            where = {"gguf_file": path.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
        load = transformers.AutoModelForCausalLM.from_pretrained
        folder = path.parent
        if kept is not None and where:
            folder = kept / f"{path.stem}-{dtype}"
            if not (folder / "config.json").exists():
                load(path.parent, dtype=getattr(torch, dtype), **where).save_pretrained(folder)
            where = {}
        self.model = load(folder, dtype=getattr(torch, dtype), **where).to(device).eval()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """A static batch: shorter prompts are padded on the left, and all rows go on until the longest is done."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **settings
        )
        return [row[longest:].tolist() for row in out]

    @torch.inference_mode()
    def gap(self, text: Sequence[int], token: int) -> float:
        """By how much the token's logit lies below the first choice after this text."""
        logits = self.model(torch.tensor([list(text)], device=self.model.device)).logits[0, -1].float()
        return float(logits.max() - logits[token])


def alternate(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Each side once a round, after one round that does not count; the order turns around every other round."""
    times = {name: Times([], []) for name in sides}
    for round_number in range(rounds + 1):
        for name in sides if round_number % 2 else reversed(sides):
            started_s, started_cpu_s = perf_counter(), process_time()
            sides[name]()
            if round_number:
                times[name].wall_s.append(perf_counter() - started_s)
                times[name].cpu_s.append(process_time() - started_cpu_s)
    return times


def compared(
    lengths: Sequence[tuple[int, int]], pairs: dict[str, tuple[Ours, Theirs]], rounds: int
) -> dict[str, dict[str, Any]]:
    """By dtype; all sides of all dtypes take turns."""
    longest = max(answer for _, answer in lengths)
    tokens = sum(answer for _, answer in lengths)
    found: dict[str, dict[str, Any]] = {}
    sides: dict[str, Callable[[], object]] = {}
    for dtype, (ours, theirs) in pairs.items():
        answers = ours.serve(lengths)
        prompts = [ours.engine.answers[i].prompt for i in range(len(lengths))]
        found[dtype] = _agreement(theirs, prompts, answers, theirs.generate(prompts, longest))
        sides[f"{dtype} ours"] = partial(ours.serve, lengths)
        sides[f"{dtype} theirs"] = partial(theirs.generate, prompts, longest)
    times = alternate(sides, rounds)
    for dtype in pairs:
        of = {name: times[f"{dtype} {name}"] for name in ("ours", "theirs")}
        median = {name: statistics.median(t.wall_s) for name, t in of.items()}
        median_cpu = {name: statistics.median(t.cpu_s) for name, t in of.items()}
        found[dtype] = {
            "requests": [list(pair) for pair in lengths],
            "tokens_per_s": {name: round(tokens / s, 2) for name, s in median.items()},
            "times_as_fast": round(median["theirs"] / median["ours"], 3),
            "times_as_fast_by_cpu_time": round(median_cpu["theirs"] / median_cpu["ours"], 3),
            **found[dtype],
            "rounds": {name: {k: [round(s, 4) for s in v] for k, v in asdict(t).items()} for name, t in of.items()},
        }
    return found


def _agreement(
    theirs: Theirs, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], written: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """How many tokens are the same, and by how much ours misses the first choice where the two first part."""
    same = sum(a == b for answer, row in zip(answers, written, strict=True) for a, b in zip(answer, row, strict=False))
    gaps = [
        round(theirs.gap([*prompt, *answer[:at]], answer[at]), 4)
        for prompt, answer, row in zip(prompts, answers, written, strict=True)
        if (at := next((i for i, (a, b) in enumerate(zip(answer, row, strict=False)) if a != b), None)) is not None
    ]
    share = round(same / sum(map(len, answers)), 3)
    return {"same_tokens_share": share, "logit_gaps_at_first_difference": gaps}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kept", type=Path, help="folder for the unpacked weights of the other side")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    checkpoint = find_checkpoint(options.model)
    pairs = {
        dtype: (Ours(checkpoint, dtype, options.device), Theirs(checkpoint, dtype, options.device, options.kept))
        for dtype in options.dtype
    }
    alone, mixed = (compared(lengths, pairs, options.rounds) for lengths in (ALONE, MIXED))
    about = {
        "device": options.device, "threads": torch.get_num_threads(), "in_turn_with": options.dtype,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip
    versions = {"python": platform.python_version(), "torch": torch.__version__, **_transformers_version()}
    results = [
        {"model": options.model, "weights": checkpoint.source, "dtype": dtype, **about, "alone": alone[dtype],
         "mixed_8": mixed[dtype], "versions": versions}
        for dtype in options.dtype
    ]  # fmt: skip
    for result in results:
        print(json.dumps(result))
    if options.record:
        path = HERE / "results.json"
        found = json.loads(path.read_text()) if path.exists() else []
        kept = [r for r in found if r["model"] != options.model or r["dtype"] not in options.dtype]
        files.write_text(path, json.dumps([*kept, *results], indent=1) + "\n")


def _transformers_version() -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__}


if __name__ == "__main__":
    script(__file__, main)
