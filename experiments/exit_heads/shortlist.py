"""What a shortlist of the vocabulary is worth as a check: `python experiments/exit_heads/shortlist.py [time]`.

Reads the held-out text of the shipped SmolLM2 trace with the shipped heads and writes shortlist.json; measure.py prints
it. Needs SmolLM2's weights. With `time` it measures instead what one check takes on this machine, and adds that.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrate.exits.adapters import AGREEMENT, CHECK_LAYERS, DOMAINS, AdapterConfig, training_passages
from calibrate.exits.hidden import batches, start_token, states, tokenized_passages
from calibrate.exits.low_rank import frequent_tokens, in_layers, shortlist_logit
from calibrate.exits.reliability import at_agreement, expected_calibration_error, fit_logistic
from calibrate.exits.texts import Split, domain_of
from calibrate.exits.traces import HELDOUT_CHARS, PASSAGE_CHARS
from calibrate.exits.training import choices
from helios_sim import files
from helios_sim.entry import script
from helios_sim.exits.rule import Confidence
from helios_sim.exits.store import load_trace
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.memory.kv import DecodeStep, KvCache
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.heads import ADAPTER, SHIPPED, ExitHeads

NAME = "smollm2-135m"
RESULT = Path(__file__).parent / "shortlist.json"
COUNTS = (2_048, 6_144)
CALIBRATION_CHARS = 32_000
PASSES, CONTEXT = 40, 128


def main(words: list[str]) -> None:
    torch.set_num_threads(2)
    checkpoint = find_checkpoint(NAME)
    model = SegmentedModel.load(checkpoint, dtype=torch.bfloat16)
    tokenizer = checkpoint.tokenizer()
    heads = ExitHeads.load(SHIPPED / NAME, model.architecture)
    config = AdapterConfig(NAME, heads.exits, calibration_chars=CALIBRATION_CHARS)
    passages = training_passages(tokenizer, config)
    read = [p.tokens for p in passages if p.split is Split.TRAIN]
    frequent = frequent_tokens(read, max(COUNTS), model.architecture.vocab_size)
    words = {n: torch.from_numpy(frequent[:n]) for n in COUNTS}
    if words == ["time"]:
        found = json.loads(RESULT.read_text()) | {"measured": measured(model, heads, words)}
    else:
        calibration = [p for p in passages if p.split is Split.CALIBRATION]
        found = scored(model, tokenizer, heads, words, calibration)
        found["covered"] = {n: float(np.mean([np.isin(t, frequent[:n]).mean() for t in read])) for n in COUNTS}
    files.write_text(RESULT, json.dumps(found, indent=1) + "\n")


def scored(model: SegmentedModel, tokenizer: Any, heads: ExitHeads, words: Any, calibration: Any) -> dict[str, Any]:
    """Layers saved at AGREEMENT on held-out text, by domain and check."""
    start, n_layers = start_token(tokenizer, model.architecture.vocab_size), model.architecture.n_layers
    early = range(len(heads.exits))
    with torch.inference_mode():
        parts = [
            states(model, start, [calibration[i].tokens for i in group], (*heads.exits, n_layers))
            for group in batches(calibration)
        ]
    hidden = [torch.cat(column) for column in zip(*parts, strict=True)]
    truth = choices(model, None, hidden[-1])[0]
    fits: dict[tuple[int, int], tuple[float, float]] = {}
    for e in early:
        agree = (choices(model, heads.tensors[e], hidden[e])[0] == truth).numpy()
        for n, these in words.items():
            fits[n, e] = fit_logistic(shortlist_logit(model, heads.tensors[e], hidden[e], these), agree)
    trace = load_trace(NAME, "reference")
    logits = {n: np.empty((trace.n_tokens, len(heads.exits))) for n in words}
    chosen = tokenized_passages(tokenizer, dict(HELDOUT_CHARS), Split.HELDOUT, PASSAGE_CHARS)
    if not np.array_equal(np.concatenate([p.chars for p in chosen]), trace.chars):
        raise SystemExit("the texts at hand are not those of the shipped trace")
    first = np.cumsum([0, *(len(p.tokens) for p in chosen)])
    for group in batches(chosen):
        rows = np.concatenate([np.arange(first[i], first[i + 1]) for i in group])
        with torch.inference_mode():
            found = states(model, start, [chosen[i].tokens for i in group], heads.exits)
        for n, these in words.items():
            for e in early:
                logits[n][rows, e] = shortlist_logit(model, heads.tensors[e], found[e], these)
        print(f"{rows[-1]} of {trace.n_tokens} tokens", file=sys.stderr, flush=True)

    def check(p: Any) -> tuple[Any, list[float]]:
        """What is held against the threshold, and the calibration error of the probability p (T, E) behind it."""
        ece = [expected_calibration_error(p[:, e], trace.agree[:, e]) for e in early]
        return 1 - (1 - p) * np.array([*heads.risk_scale, 1.0]), ece

    by_head, checked = (trace.recorded(c) for c in (Confidence.MAX_PROBABILITY, Confidence.CLASSIFIER))
    checks = {"whole head": check(by_head), "classifier": (checked, None)}
    for n, values in logits.items():
        slope, offset = np.array([fits[n, e] for e in early]).T
        p = 1 / (1 + np.exp(-(slope * values + offset)))
        checks[f"shortlist {n}"] = check(np.column_stack((p, np.ones(len(p)))))
    domain = np.array([domain_of(task) for task in trace.tasks])[trace.task]
    costs = charged(model, heads, words)
    table = []
    for name, (values, ece) in checks.items():
        for d in DOMAINS:
            mine = domain == d
            point = at_agreement(values[mine], trace.agree[mine], trace.exits, AGREEMENT, *costs[name])
            table.append({"check": name, "domain": d, "check_layers": costs[name][0], "ece": ece, **point.to_json()})
    return {"model": NAME, "agreement": AGREEMENT, "tokens": trace.n_tokens, "calibration": len(truth), "points": table}


def charged(model: SegmentedModel, heads: ExitHeads, words: Any) -> dict[str, tuple[float, float]]:
    """Layer equivalents, by weights, of a check and of leaving. A check that needs the adapter's answer pays it."""
    a = model.architecture
    leave = in_layers(sum(t.numel() for k, t in heads.tensors[0].items() if k in ADAPTER), a)
    found = {f"shortlist {n}": (leave + in_layers(n * a.d_model, a), 0.0) for n in words}
    found["whole head"] = (leave + in_layers(a.vocab_size * a.d_model, a), 0.0)
    return {**found, "classifier": (CHECK_LAYERS, leave)}


def measured(model: SegmentedModel, heads: ExitHeads, words: Any) -> dict[str, Any]:
    """Milliseconds of a layer and of one check by batch: medians, each after all layers ran, so out of the caches."""
    found: dict[str, Any] = {"passes": PASSES, "context_tokens": CONTEXT, "dtype": "bfloat16", "threads": 2}
    for batch in (1, 8):
        cache = KvCache(model.architecture, model.n_loaded, batch, CONTEXT + 1, model.dtype, model.device)
        step = DecodeStep(cache, list(range(batch)), [CONTEXT] * batch)
        hidden = model.embed(torch.arange(batch) + 100, step.positions)
        small = {n: model.outer.head[these].contiguous() for n, these in words.items()}
        of = heads.tensors[1]

        def through(head: Any, hidden: Any = hidden, of: Any = of) -> Any:
            logits = model.normed(heads.adapt(1, hidden).to(model.dtype)) @ head.T
            return (1 / (logits - logits.amax(-1, keepdim=True)).float().exp_().sum(-1) > 0.5).tolist()

        jobs = {
            "layer": lambda h=hidden, s=step: model.run(h, 7, 8, s),
            "classifier": lambda h=hidden: (heads.classify(1, h) > 0.5).tolist(),
            **{f"shortlist {n}": lambda head=head: through(head) for n, head in small.items()},
            "whole head": lambda: through(model.outer.head),
        }
        taken: dict[str, list[float]] = {name: [] for name in jobs}
        with torch.inference_mode():
            for _ in range(PASSES):
                for name, job in jobs.items():
                    model.run(hidden, 8, model.n_loaded, step)
                    began = time.perf_counter()
                    job()
                    taken[name].append(1e3 * (time.perf_counter() - began))
        medians = {name: statistics.median(of) for name, of in taken.items()}
        layers = {name: value / medians["layer"] for name, value in medians.items()}
        found[f"batch {batch}"] = {"ms": medians, "layers": layers}
    return found


if __name__ == "__main__":
    script(__file__, main)
