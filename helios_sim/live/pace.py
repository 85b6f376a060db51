"""How fast a device is just now: one and the same step, timed. Knows a model's layers, no request and no profile.

The calibration times this step all along and keeps its median in the profile; whoever serves from that profile times it
again. The ratio is what other users of the machine, its clock and its memory do to every iteration of that hour.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

from helios_sim.live.device import Device, Step
from helios_sim.live.kv import DecodeStep, KvCache
from helios_sim.live.model import SegmentedModel

REPEATS = 15
WARM_STEPS = 2  # that do not count


@torch.inference_mode()
def prepared(model: SegmentedModel, device: Device, batch: int, kv_tokens: int) -> Step:
    """The step as it runs at its best, and warm."""
    step = device.prepare(decode_step(model, batch, kv_tokens))
    for _ in range(WARM_STEPS):
        step()
    return step


def decode_step(model: SegmentedModel, batch: int, kv_tokens: int) -> Step:
    """All layers that are there, for one token each of `batch` requests with contexts of `kv_tokens`.

    With the mask that contexts of several lengths have in service.
    """
    layers = model.n_loaded
    cache = KvCache(model.architecture, layers, batch, kv_tokens, model.dtype, model.device)
    step = DecodeStep(cache, range(batch), [kv_tokens - 1] * batch, kv_tokens if batch > 1 else None)
    ids = torch.arange(batch, device=model.device)
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
