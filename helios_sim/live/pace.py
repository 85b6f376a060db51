"""How fast a device is just now: always the same steps, timed. Knows a model's layers, no request and no table.

The calibration times these steps all along and keeps their medians in the profile; whoever serves from that profile
times them again. The ratio is what other users of the machine, its clock and its memory do to iterations of that hour.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

from helios_sim.live.device import Device, Step
from helios_sim.live.memory.kv import DecodeStep, KvCache, PromptStep
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.profile.pace import Anchor

REPEATS = 15
WARM_STEPS = 2  # that do not count


@torch.inference_mode()
def prepared(model: SegmentedModel, device: Device, anchor: Anchor) -> Step:
    """The step as it runs at its best, and warm."""
    step = device.prepare(anchor_step(model, anchor))
    for _ in range(WARM_STEPS):
        step()
    return step


def anchor_step(model: SegmentedModel, anchor: Anchor) -> Step:
    """All layers that are there, for one token each of some requests or for the prompt of one.

    Decodes with the mask that contexts of several lengths have in service.
    """
    layers, rows, kv_tokens = model.n_loaded, anchor.rows, anchor.kv_tokens
    slots, tokens = (rows, kv_tokens) if kv_tokens else (1, rows)
    cache = KvCache(model.architecture, layers, slots, tokens, model.dtype, model.device)
    step: DecodeStep | PromptStep = PromptStep(cache, 0, rows)
    if kv_tokens:
        step = DecodeStep(cache, range(rows), [kv_tokens - 1] * rows, kv_tokens if rows > 1 else None)
    ids = torch.arange(rows, device=model.device)
    hidden = model.embed(ids, ids)
    return lambda: model.run(hidden, 0, layers, step)


@torch.inference_mode()
def seconds(step: Step, device: Device, repeats: int) -> float:
    """Of a step that is prepared: the median of the repeats. It has run before."""
    times_s = []
    for _ in range(repeats):
        device.wait()
        start_s = perf_counter()
        step()
        device.wait()
        times_s.append(perf_counter() - start_s)
    return median(times_s)
