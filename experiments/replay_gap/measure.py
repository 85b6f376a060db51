"""What replaying a trace leaves out: `python experiments/replay_gap/measure.py [MODEL] [--requests N]`.

Serves the same prompts live at full depth, under every cap, and with per-token exits under both KV rules. What a
replay predicts for each rule is read off the full-depth answers: their exits, scored in one pass. Beside it stands what
really happened: where an answer first departs from full depth's, how many stay the same, how often a token is what
full depth would have said of the same text, and how surprised another model is by the text. Writes MODEL.json and
results.md beside this file. Times are not measured here, so nothing else need rest meanwhile.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray

from calibrate.exits.hidden import start_token, states
from calibrate.exits.traces import observe
from helios_sim import files
from helios_sim.config import register, to_config
from helios_sim.entry import script
from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.help import conf_folder
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.served import LiveModel, OpenSettings, open_models
from helios_sim.study.build import build
from helios_sim.study.fleet import build_fleet
from helios_sim.study.jobs import make_job, serve
from helios_sim.study.live import LiveRun
from helios_sim.study.schema import Config

FOLDER = Path(__file__).parent
JUDGES = {"smollm2-135m": "gemma3-270m", "gemma3-270m": "qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b": "gemma3-270m"}
THRESHOLDS = {"smollm2-135m": 0.72, "gemma3-270m": 0.68, "qwen2.5-coder-0.5b": 0.64}  # as in real_models
SETTINGS = (
    "+experiment=fidelity_live", "mode=live", "workload.arrivals.kind=all_at_once", "live.warm_up=0",
    "live.score=true",  # so that every answer is kept
    "workload.lengths.output.median=220", "workload.lengths.output.sigma=0.2", "workload.lengths.output.maximum=320",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Served:
    task: int
    prompt: list[int]
    tokens: list[int]
    depths: list[int]


def main(model: str, requests: int) -> None:
    register()
    with initialize_config_dir(conf_folder(), version_base=None):
        settings = compose("config", [*SETTINGS, f"models=[{model}]", f"workload.n_requests={requests}"])
    config = replace(to_config(settings), models=[model], arms={})
    parts = build(config, 0)
    data = parts.models[model]
    exits = data.trace.trace.exits
    rules: dict[str, dict[str, Any]] = {"full depth": {"policy": "full_depth"}}
    for cap in exits[:-1]:
        rules[f"cap {cap}"] = {"policy": "static_cap", "cap_layers": cap}
    per_token = {"policy": "early_exit", "confidence": "classifier", "threshold": THRESHOLDS[model]}
    rules["per token, propagated"] = {**per_token, "kv_rule": "propagate"}
    rules["per token, recomputed"] = {**per_token, "kv_rule": "recompute"}
    answers = {}
    for name, entry in rules.items():
        answers[name] = answers_of(config, entry)
        print(f"{name}: {sum(len(a.tokens) for a in answers[name].values())} tokens", flush=True)
    judge = JUDGES[model]
    judged = replace(to_config(settings), models=[judge], arms={})
    live = opened(config, model), opened(judged, judge)
    results = compare(
        answers, *live, exits, PerToken(THRESHOLDS[model], Confidence.CLASSIFIER), parts.workload.mix.tasks
    )
    results |= {
        "model": model,
        "judge": judge,
        "threshold": THRESHOLDS[model],
        "exits": list(exits),
        "requests": requests,
    }
    files.write_text(FOLDER / f"{model}.json", json.dumps(results, indent=1) + "\n")
    write_tables()


def answers_of(config: Config, entry: Mapping[str, Any]) -> dict[int, Served]:
    """One live run: every answer by the number of its request."""
    fleet = build_fleet(config, 0)
    live = LiveRun(config, fleet, 0)
    serve(make_job("arm", {**entry, "model": config.models[0]}, config, 0), fleet, lambda record: None, live)
    live.close()
    return {
        number: Served(a.request.task, list(a.prompt), list(a.tokens), list(a.depths))
        for number, a in live.device_engine.answers.items()
        if number >= 0
    }


def opened(config: Config, name: str) -> tuple[LiveModel, SegmentedModel]:
    import torch

    parts = build(config, 0)
    data = parts.models[name]
    live = open_models(OpenSettings(), {name: data.profile}, {name: data.trace})[name]
    return live, SegmentedModel.load(live.checkpoint, dtype=torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Scored:
    """Of one answer of n tokens."""

    agree: NDArray[np.bool_]  # (n,) what was served is what full depth says of the same text
    exits_agree: NDArray[np.bool_]  # (n, E) what each exit would have said is
    sure: NDArray[np.float32]  # (n, E)


def score(live: LiveModel, model: SegmentedModel, answer: Served) -> Scored:
    """One pass over prompt and answer at full depth, K and V exact everywhere."""
    import torch

    n = len(answer.tokens)
    text = np.array([*answer.prompt[1:], *answer.tokens], np.int64)
    with torch.inference_mode():
        hidden = [h[-n:] for h in states(model, answer.prompt[0], [text], live.exits)]
    seen = observe(model, live.heads, hidden, text[-n:])
    return Scored(seen.choice[:, -1] == text[-n:], seen.agree, seen.confidences[Confidence.CLASSIFIER])


def surprise(judge: tuple[LiveModel, SegmentedModel], live: LiveModel, answer: Served) -> tuple[float, int]:
    """Bits that the answer's text costs another model after the same prompt, and its characters."""
    import torch

    theirs, model = judge
    prompt = np.array(theirs.encode(live.decode(answer.prompt[1:])), np.int64)
    said = live.decode(answer.tokens)
    tokens = np.array(theirs.encode(said), np.int64)
    if not len(tokens):
        return 0.0, 0
    text = np.concatenate([prompt, tokens])
    start = start_token(theirs.tokenizer, model.architecture.vocab_size)
    with torch.inference_mode():
        (hidden,) = states(model, start, [text], (model.architecture.n_layers,))
        logits = model.logits(hidden[-len(tokens) :]).float().log_softmax(-1)
    own = logits.gather(1, torch.from_numpy(tokens)[:, None])
    return float(-own.sum() / np.log(2)), len(said)


def compare(
    answers: Mapping[str, Mapping[int, Served]],
    ours: tuple[LiveModel, SegmentedModel],
    judge: tuple[LiveModel, SegmentedModel],
    exits: Sequence[int],
    rule: PerToken,
    tasks: Sequence[str],
) -> dict[str, Any]:
    """Figures by rule, of all answers and of every task's."""
    live, model = ours
    full = answers["full depth"]
    scored_full = {number: score(live, model, answer) for number, answer in full.items()}
    found: dict[str, Any] = {}
    for name, of_rule in answers.items():
        rows = []
        for number, answer in of_rule.items():
            reference = full[number]
            same = np.array(answer.tokens) == np.array(reference.tokens)
            first = None if same.all() else int(np.argmin(same))
            scored = scored_full[number] if name == "full depth" else score(live, model, answer)
            bits, chars = surprise(judge, live, answer)
            replayed, layers = replay(name, scored_full[number], exits, rule)
            rows.append({
                "task": tasks[answer.task], "tokens": len(answer.tokens), "first": first,
                "agreed": int(scored.agree.sum()), "replayed": int(replayed.sum()),
                "layers": sum(answer.depths), "replayed_layers": int(layers.sum()),
                "bits": bits, "chars": chars, "repeats": repeats(answer.tokens),
            })  # fmt: skip
        found[name] = {"all": summed(rows), **{t: summed([r for r in rows if r["task"] == t]) for t in tasks}}
        print(name, found[name]["all"], flush=True)
    return {"rules": found}


def replay(name: str, scored: Scored, exits: Sequence[int], rule: PerToken) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """What a trace of the full-depth answer says of this rule: agreement (n,) and layers (n,). The first token of an
    answer comes from the prompt, which runs all layers that are loaded."""
    n, depths = len(scored.agree), np.array(exits)
    if name == "full depth":
        at = np.full(n, len(exits) - 1)
    elif name.startswith("cap"):
        at = np.full(n, list(exits).index(int(name.split()[1])))
    else:
        sure = scored.sure >= rule.threshold
        sure[:, -1] = True
        at = sure.argmax(axis=1)
        at[0] = len(exits) - 1
    return scored.exits_agree[np.arange(n), at], depths[at]


def repeats(tokens: Sequence[int], length: int = 4) -> float:
    """Share of runs of four tokens that stood in the answer before."""
    runs = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def summed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    tokens = sum(r["tokens"] for r in rows)
    departed = [r["first"] for r in rows if r["first"] is not None]
    return {
        "answers": len(rows),
        "identical": sum(r["first"] is None for r in rows) / len(rows),
        "first_divergence_median": float(np.median(departed)) if departed else None,
        "agreement_live": sum(r["agreed"] for r in rows) / tokens,
        "agreement_replayed": sum(r["replayed"] for r in rows) / tokens,
        "layers_live": sum(r["layers"] for r in rows) / tokens,
        "layers_replayed": sum(r["replayed_layers"] for r in rows) / tokens,
        "judge_bits_per_char": sum(r["bits"] for r in rows) / max(sum(r["chars"] for r in rows), 1),
        "repeated_runs": float(np.mean([r["repeats"] for r in rows])),
    }


def write_tables() -> None:
    lines = ["# Replay against live: results", "", "Made by `python experiments/replay_gap/measure.py MODEL`.", ""]
    for path in sorted(FOLDER.glob("*.json")):
        found = json.loads(path.read_text())
        lines += [
            f"## {found['model']}", "",
            f"{found['requests']} prompts; exits {found['exits']}; per-token exits by the classifier at "
            f"{found['threshold']}; judged by {found['judge']}.", "",
            "| rule | identical answers | first departure (median token) | agreement live | replayed | worst task live "
            "| layers live | replayed | judge, bits/char | repeated runs of 4 |", "|" + " --- |" * 10,
        ]  # fmt: skip
        for name, by_task in found["rules"].items():
            a = by_task["all"]
            worst = min((t for t in by_task if t != "all" and by_task[t]), key=lambda t: by_task[t]["agreement_live"])
            first = "-" if a["first_divergence_median"] is None else f"{a['first_divergence_median']:.0f}"
            lines.append(
                f"| {name} | {a['identical']:.0%} | {first} | {a['agreement_live']:.1%} "
                f"| {a['agreement_replayed']:.1%} | {by_task[worst]['agreement_live']:.1%} ({worst}) "
                f"| {a['layers_live']:.2f} | {a['layers_replayed']:.2f} | {a['judge_bits_per_char']:.2f} "
                f"| {a['repeated_runs']:.0%} |"
            )
        lines += ["", "### By task: agreement live / replayed; judge's bits per character", ""]
        tasks = [t for t in next(iter(found["rules"].values())) if t != "all"]
        lines += ["| rule | " + " | ".join(tasks) + " |", "|" + " --- |" * (len(tasks) + 1)]
        for name, by_task in found["rules"].items():
            cells = [
                "-" if (f := by_task[t]) is None else
                f"{f['agreement_live']:.1%} / {f['agreement_replayed']:.1%}; {f['judge_bits_per_char']:.2f}"
                for t in tasks
            ]  # fmt: skip
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    files.write_text(FOLDER / "results.md", "\n".join(lines).rstrip() + "\n")


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m", choices=sorted(THRESHOLDS))
    parser.add_argument("--requests", type=int, default=40)
    options = parser.parse_args(words)
    main(options.model, options.requests)


if __name__ == "__main__":
    script(__file__, command)
