"""A first run of a model: libraries take the memory that they keep for themselves. Knows no request and no time."""

from __future__ import annotations

import torch

from helios_sim.live.kv import DecodeStep, KvCache, PromptStep
from helios_sim.live.model import SegmentedModel

PROMPT_TOKENS = 16


@torch.inference_mode()
def try_out(model: SegmentedModel, layers: int) -> None:
    """A short prompt and the token after it, in a cache of their own."""
    on = model.device
    cache = KvCache(model.architecture, layers, 1, PROMPT_TOKENS + 1, model.dtype, on)
    prompt = PromptStep(cache, 0, PROMPT_TOKENS)
    hidden = model.run(model.embed(torch.zeros_like(prompt.positions), prompt.positions), 0, layers, prompt)
    step = DecodeStep(cache, [0], [PROMPT_TOKENS])
    hidden = model.run(model.embed(torch.zeros_like(step.positions), step.positions), 0, layers, step)
    model.logits(hidden).argmax(-1).tolist()
