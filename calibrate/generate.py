"""Greedy answers of a real model to a batch of prompts, with what every exit says on the way. Knows no trace file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrate.observe import observe

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.heads import ExitHeads


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One answer of n tokens, without the token that ends it."""

    tokens: NDArray[np.int64]  # (n,)
    chars: NDArray[np.int32]  # (n,) characters that each token adds to the decoded answer
    columns: dict[str, NDArray[Any]]  # agree, confidence, margin, bits, classifier: (n, E)


def answers(
    model: SegmentedModel, tokenizer: Any, heads: ExitHeads, asked: Sequence[Sequence[int]], most_tokens: int
) -> list[Answer]:
    """Answers to prompts given as token ids. Every token is full depth's first choice; an end token ends an answer."""
    import torch

    from helios_sim.live.memory.kv import DecodeStep, KvCache, PromptStep

    depths = (*heads.exits, model.architecture.n_layers)
    longest = max(map(len, asked)) + most_tokens
    cache = KvCache(model.architecture, model.n_loaded, len(asked), longest, model.dtype, model.device)
    hidden: list[list[Tensor]] = []  # per step, per exit (B, d)
    chosen: list[Tensor] = []  # per step (B,)
    with torch.inference_mode():
        first = []
        for slot, tokens in enumerate(asked):
            step = PromptStep(cache, slot, len(tokens))
            ids = torch.tensor(tokens, device=model.device)
            first.append([h[-1:] for h in _through(model, ids, step, depths)])
        hidden.append([torch.cat(rows) for rows in zip(*first, strict=True)])
        chosen.append(model.logits(hidden[-1][-1]).argmax(-1))
        for t in range(most_tokens - 1):
            lengths = [len(tokens) + t for tokens in asked]
            decode = DecodeStep(cache, list(range(len(asked))), lengths)
            hidden.append(_through(model, chosen[-1], decode, depths))
            chosen.append(model.logits(hidden[-1][-1]).argmax(-1))
    tokens = torch.stack(chosen, dim=1).cpu().numpy()  # (B, T)
    states = [torch.stack([step[e] for step in hidden], dim=1) for e in range(len(depths))]  # (B, T, d) each
    ends = _end_tokens(tokenizer)
    found = []
    for b, row in enumerate(tokens):
        stops = np.flatnonzero(np.isin(row, ends))
        n = int(stops[0]) if len(stops) else len(row)
        if n == 0:
            continue
        seen = observe(model, heads, [state[b, :n] for state in states], row[:n])
        columns = {"agree": seen.agree, "confidence": seen.confidence, "margin": seen.margin, "bits": seen.bits}
        if seen.classifier is not None:
            columns["classifier"] = seen.classifier
        found.append(Answer(row[:n], characters(tokenizer, row[:n]), columns))
    return found


def characters(tokenizer: Any, tokens: NDArray[np.int64]) -> NDArray[np.int32]:
    """Characters that each token adds to the decoded answer, (n,); a character in pieces counts where it is whole."""
    lengths = []
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:n].tolist(), clean_up_tokenization_spaces=False)
        lengths.append(len(text.rstrip("\N{REPLACEMENT CHARACTER}")))
    return np.diff(np.maximum.accumulate(np.array(lengths, dtype=np.int32)), prepend=np.int32(0))


def _through(model: SegmentedModel, tokens: Tensor, step: Any, depths: Sequence[int]) -> list[Tensor]:
    hidden, done, found = model.embed(tokens, step.positions), 0, []
    for depth in depths:
        hidden = model.run(hidden, done, depth, step)
        done = depth
        found.append(hidden)
    return found


def _end_tokens(tokenizer: Any) -> list[int]:
    known = tokenizer.get_vocab()
    names = (tokenizer.eos_token, "<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<eos>")
    return [known[name] for name in names if name in known]
