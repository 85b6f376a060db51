"""What low-rank changes of the trunk are worth: `python experiments/exit_heads/low_rank.py [SCRATCH]`.

Trains SmolLM2's exits at layers 8 and 24 further, from the shipped adapters: once with changes of rank 16 in the three
layers before each, once (the control) without, on the same tokens in the same order. Compares both and the shipped
adapters on held-out text with what the original model says at full depth, and writes low_rank.json; measure.py prints
it. Needs SmolLM2's weights and a few minutes on two cores. What was trained stays in the folder SCRATCH, if one is
named, for a run that goes on after an interrupt. No shipped file is written.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrate.exits.adapters import AGREEMENT, DOMAINS, SHARES, risk_scale
from calibrate.exits.hidden import Passage, batches, start_token, states, tokenized_passages
from calibrate.exits.low_rank import Factors, LowRankPlan, changed, train_low_rank
from calibrate.exits.reliability import at_agreement, fit_logistic
from calibrate.exits.texts import Split
from calibrate.exits.traces import HELDOUT_CHARS, PASSAGE_CHARS, ExitOutputs, observe
from helios_sim import files
from helios_sim.entry import script
from helios_sim.exits.rule import Confidence
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.heads import SHIPPED, ExitHeads
from helios_sim.live.model.weights import load_layer

NAME = "smollm2-135m"
RESULT = Path(__file__).parent / "low_rank.json"
PLAN = LowRankPlan(exits=(8, 24), before=3, rank=16, batch_texts=2)
TEXT_TOKENS, TEXTS = 256, 64  # what is trained on
TRAINING_CHARS, CALIBRATION_CHARS, HELDOUT_SHARE = 180_000, 9_000, 0.13


def main(words: list[str]) -> None:
    torch.set_num_threads(2)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {text}", file=sys.stderr, flush=True)

    checkpoint = find_checkpoint(NAME)
    model = SegmentedModel.load(checkpoint, dtype=torch.bfloat16)
    tokenizer = checkpoint.tokenizer()
    start = start_token(tokenizer, model.architecture.vocab_size)
    shipped = ExitHeads.load(SHIPPED / NAME, model.architecture)
    adapters = {d: dict(shipped.tensors[shipped.exits.index(d)]) for d in PLAN.exits}
    layers = {layer: load_layer(checkpoint, layer, torch.float32, model.device) for layer in PLAN.layers}
    originals = {(layer, part): getattr(layers[layer], part) for layer, part in PLAN.places}

    def chosen(split: Split, chars: float) -> list[Passage]:
        return tokenized_passages(
            tokenizer, {t: round(chars * s / 1000) for t, s in SHARES.items()}, split, PASSAGE_CHARS
        )

    long = [p.tokens[:TEXT_TOKENS] for p in chosen(Split.TRAIN, TRAINING_CHARS) if len(p.tokens) >= TEXT_TOKENS]
    drawn = np.random.default_rng(PLAN.seed).permutation(len(long))[:TEXTS]
    texts = torch.from_numpy(np.stack([long[i] for i in drawn]))
    calibration = chosen(Split.CALIBRATION, CALIBRATION_CHARS)
    shares = {task: round(chars * HELDOUT_SHARE) for task, chars in HELDOUT_CHARS.items()}
    heldout = tokenized_passages(tokenizer, shares, Split.HELDOUT, PASSAGE_CHARS)
    say(f"{texts.numel()} tokens to train on, {sum(len(p.tokens) for p in heldout)} held out")

    def trained(plan: LowRankPlan) -> Any:
        kept = Path(words[0]) / f"rank_{plan.rank}.pt" if words else None
        if kept is not None and kept.exists():
            with torch.serialization.safe_globals([Factors]):  # nothing else is made of what the file names
                return torch.load(kept, weights_only=True)
        found = train_low_rank(model, originals, adapters, texts, start, plan, None, say)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, kept)
        return found

    seen: dict[str, int] = {"shipped adapters": 0}
    factors, inside, seen["with changes"] = trained(PLAN)
    _, outside, seen["adapters only"] = trained(replace(PLAN, rank=0))
    other = changed(model, originals, factors)
    arms = {
        "shipped adapters": (model, adapters),
        "adapters only": (model, {d: {**adapters[d], **outside[d]} for d in PLAN.exits}),
        "with changes": (other, {d: {**adapters[d], **inside[d]} for d in PLAN.exits}),
    }
    read = {
        name: [_read(m, tensors, start, some) for some in (calibration, heldout)] for name, (m, tensors) in arms.items()
    }
    truth = [part.choice[:, -1] for part in read["shipped adapters"]]
    say("read calibration and held-out text")
    domain = np.repeat([p.domain for p in heldout], [len(p.tokens) for p in heldout])
    chars = np.concatenate([p.chars for p in heldout])
    table = {name: _row(parts, truth, domain, chars) | {"trained_tokens": seen[name]} for name, parts in read.items()}
    change = {name: round(float((of.up @ of.down).norm() / originals[name].norm()), 4) for name, of in factors.items()}
    about = {"model": NAME, "plan": asdict(PLAN), "heldout_tokens": len(domain), "wall_s": time.monotonic() - began}
    relative = {"smallest": min(change.values()), "largest": max(change.values())}
    files.write_text(RESULT, json.dumps({**about, "relative_change": relative, "arms": table}, indent=1) + "\n")


def _read(model: SegmentedModel, adapters: Any, start: int, some: list[Passage]) -> ExitOutputs:
    """What every exit says, tokens in the passages' order."""
    depths = (*PLAN.exits, model.architecture.n_layers)
    tensors = tuple(adapters[d] for d in PLAN.exits)
    heads = ExitHeads(PLAN.exits, (1.0,) * len(depths), tensors, (1.0,) * len(PLAN.exits))
    first = np.cumsum([0, *(len(p.tokens) for p in some)])
    rows, parts = [], []
    for group in batches(some):
        with torch.inference_mode():
            hidden = states(model, start, [some[i].tokens for i in group], depths)
        parts.append(observe(model, heads, hidden, np.concatenate([some[i].tokens for i in group])))
        rows.append(np.concatenate([np.arange(first[i], first[i + 1]) for i in group]))
    order = np.argsort(np.concatenate(rows))
    columns = {n: np.concatenate([getattr(p, n) for p in parts])[order] for n in ("choice", "bits")}
    sure = {c: np.concatenate([p.confidences[c] for p in parts])[order] for c in parts[0].confidences}
    return ExitOutputs(**columns, confidences=sure)


def _row(parts: list[ExitOutputs], truth: list[Any], domain: Any, chars: Any) -> dict[str, Any]:
    """Agreement and saving by domain, all against the original's full depth. Confidence is the exit's probability
    through the whole head, calibrated on the calibration texts, its risk scaled by what leaving saves."""
    depths = (*PLAN.exits, 30)
    calibration, heldout = parts
    columns = []
    for e in range(len(PLAN.exits)):
        known, asked = (part.confidences[Confidence.MAX_PROBABILITY][:, e] for part in parts)
        slope, offset = fit_logistic(_logit(known), calibration.choice[:, e] == truth[0])
        columns.append(1 / (1 + np.exp(-(slope * _logit(asked) + offset))))
    scale = np.array([*risk_scale(PLAN.exits, depths[-1]), 1.0])
    sure = 1 - (1 - np.column_stack([*columns, np.ones(len(chars))])) * scale
    agree = heldout.choice == truth[1][:, None]
    found = {}
    for d in DOMAINS:
        mine = domain == d
        point = at_agreement(sure[mine], agree[mine], depths, AGREEMENT, 0.0)
        found[d] = {
            "tokens": int(mine.sum()),
            "agree": dict(zip(map(str, depths), agree[mine].mean(0).tolist(), strict=True)),
            "bits_per_char": float(heldout.bits[mine, -1].sum() / chars[mine].sum()),
            "saved_gross": point.saved_gross,
            "agreement": point.agreement,
            "left": point.left,
        }
    return found


def _logit(p: Any) -> Any:
    clipped = np.clip(p.astype(np.float64), 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))


if __name__ == "__main__":
    script(__file__, main)
