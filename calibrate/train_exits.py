"""The steps of the stage `train_exits`, which trains a model for early exit. Each step can be resumed.

First the trunk is trained (`calibrate.exits.trunk`), and its change is rounded and written as it is served. Then the
changed model, and the frozen one with exits attached on the same tokens, each get checks, calibration and a trace on
held-out text. The checks learn from texts of the training split on which neither was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from calibrate.exits.before_after import AFTER, BEFORE, CHANGE, HEADS, TRACES, compared
from calibrate.exits.hidden import start_token, tokenized_passages
from calibrate.exits.texts import Split
from calibrate.exits.traces import PASSAGE_CHARS, TraceOrigin, reference_trace
from calibrate.exits.trained import TrainedPlan, checked_heads, choices_at, read_texts, write_change
from calibrate.exits.trunk import train_trunk
from calibrate.inputs import Inputs
from calibrate.stages import SHORT, NotEnoughTime, StageRun
from helios_sim.exits.store import write_trace

TRUNK_SHARE = 0.6  # share of the time for training; the rest is for checks and traces
TRACE_SHARE = 0.35  # share of the time then left for each of two traces
UNLIMITED_S = 3_600.0  # seconds of training without a budget


def train_exits(
    inputs: Inputs, stage: StageRun, plan: TrainedPlan, chars_to_trace: Callable[[StageRun, float], Mapping[str, int]]
) -> dict[str, Any]:
    """Run all steps in the stage's folder. Returns its result.

    `chars_to_trace` says how many characters of each task can be traced in a share of the time that is left.
    """
    from helios_sim.live.checkpoint.source import changed_by
    from helios_sim.live.model.decoder import SegmentedModel

    def say(text: str) -> None:
        stage.tell(text, None)

    scratch, model = stage.folder / "scratch", inputs.model
    start = start_token(inputs.tokenizer, model.architecture.vocab_size)
    texts = read_texts(inputs.tokenizer, plan)
    first = {d: dict(of) for d, of in zip(inputs.heads.exits, inputs.heads.tensors, strict=True) if of}
    budget_s = UNLIMITED_S if stage.left_s is None else TRUNK_SHARE * stage.left_s
    found = train_trunk(
        model, texts.trunk, start, plan.trunk, scratch, None if plan.trunk.steps and stage.left_s is None else budget_s,
        say, first,
    )  # fmt: skip
    if not found.progress.step:
        raise NotEnoughTime("the time did not suffice for one step of the training")
    weights = inputs.config.model.weights or inputs.config.model.name
    write_change(inputs.checkpoint, weights, found, plan, stage.folder / CHANGE)
    changed = changed_by(stage.folder / CHANGE, inputs.checkpoint)
    after = SegmentedModel.load(changed, None, model.dtype, model.device, model.kernels)
    key = changed.sha256[:16]  # files from an earlier change must not be used
    heads = {
        side: checked_heads(of, start, adapters, texts, plan, stage.folder / HEADS[side], scratch / key / side, say)
        for side, of, adapters in ((BEFORE, model, found.attached), (AFTER, after, found.adapters))
    }
    inputs.use_heads(stage.folder / HEADS[BEFORE])
    chars = chars_to_trace(stage, TRACE_SHARE)
    traces = {}
    for side, of, sha256 in ((BEFORE, model, inputs.checkpoint.sha256), (AFTER, after, changed.sha256)):
        origin = TraceOrigin(plan.model, sha256, plan.command)
        traces[side], _ = reference_trace(
            of, inputs.tokenizer, heads[side], origin, stage.folder / "batches" / key / side, chars, stage.tell
        )
        write_trace(traces[side], stage.folder / TRACES[side])
    passages = tokenized_passages(inputs.tokenizer, dict(chars), Split.HELDOUT, PASSAGE_CHARS)
    kept = choices_at(after, heads[AFTER], start, passages) == choices_at(model, None, start, passages)
    wanted = inputs.config.tokens_to_trace
    tokens = traces[AFTER].n_tokens
    few = "" if tokens >= 0.9 * wanted else f"{tokens:,} tokens traced in place of about {wanted:,}"
    return {
        "tokens": found.progress.tokens,
        "steps": found.progress.step,
        "wall_s": round(found.progress.spent_s, 1),
        "compared": compared(traces[BEFORE], traces[AFTER], kept),
        SHORT: "; ".join(words for words in (found.short, few) if words),
    }
