"""The device's current pace: the same reference steps (anchors), timed again and again.

The calibration times these steps throughout and keeps their medians in the profile. Serving from that profile times
them again. The ratio shows how other users of the machine, its clock and its memory slow down iterations at the time.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

from helios_sim.live.device import Device, Step
from helios_sim.live.memory.kv import DecodeStep, KvCache, PromptStep
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.profile.spec import Anchor

REPEATS = 15
WARM_STEPS = 2  # not timed


@torch.inference_mode()
def prepared(model: SegmentedModel, device: Device, anchor: Anchor) -> Step:
    """The anchor's step, prepared for the device and warmed up."""
    step = device.prepare(anchor_step(model, anchor))
    for _ in range(WARM_STEPS):
        step()
    return step


def anchor_step(model: SegmentedModel, anchor: Anchor) -> Step:
    """A step through all loaded layers: one token each of several requests, or one prompt.

    Decodes of several requests use a mask, as contexts of different lengths do while serving.
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
    """Median seconds of a prepared, warm step over `repeats` runs."""
    times_s = []
    for _ in range(repeats):
        device.wait()
        start_s = perf_counter()
        step()
        device.wait()
        times_s.append(perf_counter() - start_s)
    return median(times_s)
