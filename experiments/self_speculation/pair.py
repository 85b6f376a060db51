"""A measured pair, simulated: `python experiments/self_speculation/pair.py` (a minute).

The shipped trace of Qwen2.5-Coder-1.5B-Instruct's answers says which of their tokens Qwen2.5-Coder-0.5B-Instruct
predicts. From it: how often the drafter is right by task, which share of drafts is accepted, what that share would be
if tokens were independent, and how much faster than full depth an A100-80GB answers with drafts. Writes pair.md beside
this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from live import accepted

from helios_sim import files, load_trace, simulate
from helios_sim.entry import script
from helios_sim.exits.trace import ExitTrace

FOLDER = Path(__file__).parent
MODEL, DRAFTER, CARD = "qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "a100-80gb"
NUMBERS, USERS = (1, 2, 3, 4, 6, 8), (1, 4, 16, 64)
# What was served live: drafter.md
LIVE_TASKS, LIVE_ANSWERS, LIVE_TOKENS, LIVE_DRAFTS = ("code", "humaneval", "dialogue", "news"), 2, 32, 3
DRAWS = 2_000
ARMS = {"one": "draft_tokens: 1", "two": "draft_tokens: 2", "four": "draft_tokens: 4",
        "follows": "draft_tokens: 6, review_requests: 10"}  # fmt: skip
STUDY = (
    f"models=[{DRAFTER},{MODEL}]", f"hardware={CARD}", "exits.source=generated", "workload=own_answers",
    "profile_band=none", "seeds=[0,1,2]", "policy=full_depth", f"policy.model={MODEL}",
    *(f"+arms.{name}={{policy: draft_model, {settings}}}" for name, settings in ARMS.items()),
)  # fmt: skip
Texts = Sequence[Sequence[bool]]


def texts_of(trace: ExitTrace) -> dict[str, list[list[bool]]]:
    """By task: of each answer, whether the drafter predicts each token."""
    right = trace.drafted_by(DRAFTER)
    return {
        task: [right[trace.prompt == prompt].tolist() for prompt in np.unique(trace.prompt[trace.task == number])]
        for number, task in enumerate(trace.tasks)
    }


def interval(draw: Callable[[np.random.Generator], Texts], drafts: int) -> tuple[float, float]:
    """In which 95 % of draws of answers have their share of accepted drafts."""
    rng = np.random.default_rng(0)
    low, high = np.quantile([accepted(draw(rng), drafts) for _ in range(DRAWS)], (0.025, 0.975))
    return float(low), float(high)


def again(texts: Texts) -> Callable[[np.random.Generator], Texts]:
    """As many of these answers, drawn with replacement."""
    return lambda rng: [texts[i] for i in rng.integers(0, len(texts), len(texts))]


def as_live(by_task: dict[str, list[list[bool]]]) -> Callable[[np.random.Generator], Texts]:
    """As many answers as were served live, of the same tasks and as long."""
    return lambda rng: [
        by_task[task][i][:LIVE_TOKENS]
        for task in LIVE_TASKS for i in rng.integers(0, len(by_task[task]), LIVE_ANSWERS)
    ]  # fmt: skip


def independent(share: float, drafts: int) -> float:
    """The accepted share of so many drafts if each is right with this share, whatever the others are."""
    return sum(share**n for n in range(1, drafts + 1)) / drafts


def shares(trace: ExitTrace) -> list[str]:
    by_task, right = texts_of(trace), trace.drafted_by(DRAFTER)
    every = [answer for answers in by_task.values() for answer in answers]
    lines = ["| task | answers | tokens | right | 3 drafts accepted |", "| --- | ---: | ---: | ---: | ---: |"]
    for task, answers in {**by_task, "all tasks": every}.items():
        flat = np.concatenate([np.array(answer) for answer in answers])
        told = f"{100 * flat.mean():.1f} % | {100 * accepted(answers, LIVE_DRAFTS):.1f} %"
        lines.append(f"| {task} | {len(answers)} | {len(flat):,} | {told} |")
    lines += ["", "| drafts a pass | accepted | 95 % of draws of answers | if tokens were independent |"]
    lines += ["| ---: | ---: | ---: | ---: |"]
    for drafts in NUMBERS:
        low, high = interval(again(every), drafts)
        told = f"{100 * accepted(every, drafts):.1f} % | {100 * low:.1f} to {100 * high:.1f} %"
        lines.append(f"| {drafts} | {told} | {100 * independent(float(right.mean()), drafts):.1f} % |")
    low, high = interval(as_live(by_task), LIVE_DRAFTS)
    few = f"{LIVE_ANSWERS} answers each of {', '.join(LIVE_TASKS)}, of {LIVE_TOKENS} tokens, as they were served live"
    return [*lines, "", f"{few}: 95 % of draws accept {100 * low:.1f} to {100 * high:.1f} % of {LIVE_DRAFTS} drafts."]


def speeds() -> list[str]:
    """How full depth's time per output token compares, by users who ask again at once."""
    lines = ["| users | full depth, ms a token | 1 draft | 2 drafts | 4 drafts | follows | accepted of 4 |"]
    lines += ["| ---: |" + " ---: |" * 6]
    for users in USERS:
        arms = simulate("own", *STUDY, f"workload.arrivals.users={users}").arms
        tpot = {name: float(np.mean([r.metrics["tpot_s_mean"] for r in arm.replicates])) for name, arm in arms.items()}
        whole = next(of for name, of in tpot.items() if name not in ARMS)
        four = np.mean([r.metrics["draft_acceptance"] for r in arms["four"].replicates])
        told = " | ".join(f"{whole / tpot[name]:.2f}x" for name in ARMS)
        lines.append(f"| {users} | {1000 * whole:.2f} | {told} | {100 * four:.1f} % |")
    return lines


def main(words: list[str]) -> None:
    trace = load_trace(MODEL, "generated")
    lines = ["# self_speculation: a measured pair", ""]
    lines += [f"Made by `python experiments/self_speculation/pair.py`. Trace: {trace.provenance.source}.", ""]
    lines += [*shares(trace), "", f"Simulated on an {CARD}: full depth's time per token over that of drafts.", ""]
    files.write_text(FOLDER / "pair.md", "\n".join([*lines, *speeds()]) + "\n")


if __name__ == "__main__":
    script(__file__, main)
