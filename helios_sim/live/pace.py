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


def decode_step(model: SegmentedModel, batch: int, kv_tokens: int) -> Step:
    """All layers that are there, for one token each of `batch` requests with contexts of `kv_tokens`."""
    layers = model.n_loaded
    cache = KvCache(model.architecture, layers, batch, kv_tokens, model.dtype, model.device)
    step = DecodeStep(cache, range(batch), [kv_tokens - 1] * batch)
    ids = torch.arange(batch, device=model.device)
    hidden = model.embed(ids, ids)
    return lambda: model.run(hidden, 0, layers, step)


@torch.inference_mode()
def layer_s(model: SegmentedModel, device: Device, batch: int, kv_tokens: int) -> float:
    """Seconds of one layer in that step: the median of some repeats, the first of which do not count."""
    step = device.prepare(decode_step(model, batch, kv_tokens))
    times_s = []
    for _ in range(REPEATS + 2):
        device.wait()
        start_s = perf_counter()
        step()
        device.wait()
        times_s.append(perf_counter() - start_s)
    return median(times_s[2:]) / model.n_loaded
