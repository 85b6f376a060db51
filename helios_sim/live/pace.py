"""Steps that no request asked for: the warm-up of an engine, and reference steps (anchors) that show the current pace.

The warm-up keeps one-off costs (choice of kernels, allocations, threads) off the first requests. The calibration times
the anchors throughout and keeps their medians in the profile. Serving from that profile times them again. The ratio
shows how other users of the machine, its clock and its memory slow down iterations at the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch

from helios_sim.live.device import Device, Step
from helios_sim.live.memory.decodes import decode_step
from helios_sim.live.memory.kv import KvCache, PromptStep
from helios_sim.live.model.decoder import Attend, SegmentedModel
from helios_sim.policy.deployment import Deployment
from helios_sim.profile.spec import Anchor
from helios_sim.request import Request
from helios_sim.serving.iteration import Executes, Member, Plan, PrefillPart

REPEATS = 15
WARM_STEPS = 2  # not timed


def warm_up(
    engine: Executes, deployment: Deployment, requests: Sequence[Request], batch_tokens: int, times: int
) -> int:
    """Run the prompts of these requests one after the other, with `times` decodes after each.

    Returns the number of iterations. The requests get numbers below 0, which no request of a workload has.
    """
    model, ran = deployment.active.model, 0
    batch: list[Member] = []
    for number, request in enumerate(requests if times else ()):
        ghost = replace(request, request_id=-1 - number)
        tokens, span = engine.tokenize(model, ghost)
        tokens = min(tokens, batch_tokens)
        batch.append(Member(ghost, model, tokens, span.n_tokens, span, generated=0, context_tokens=0))
        engine.execute(_plan(deployment, batch, number, (PrefillPart(number, tokens, 0, finishes=True),)), 0)
        batch[number] = _after(batch[number], tokens)
        for _ in range(min(times, min(member.output_tokens - member.generated for member in batch))):
            engine.execute(_plan(deployment, batch, len(batch), ()), 0)
            batch = [_after(member, 1) for member in batch]
            ran += 1
        ran += 1
    for number in range(len(batch)):
        engine.forget(-1 - number)
    return ran


def _after(member: Member, tokens: int) -> Member:
    """The request after an iteration that put this number of its tokens into the cache."""
    return replace(member, generated=member.generated + 1, context_tokens=member.context_tokens + tokens)


def _plan(
    deployment: Deployment, batch: Sequence[Member], decoding: int, prefill: tuple[PrefillPart, ...]
) -> Plan:
    return Plan(
        model=deployment.active.model,
        loaded_layers=deployment.active.layers,
        run_layers=deployment.run_layers or deployment.active.layers,
        exit_rule=deployment.exit_rule,
        batching=deployment.batching,
        kv_rule=deployment.kv_rule,
        members=tuple(batch),
        decoding=decoding,
        prefill=prefill,
        observe_tokens=None,
        service_plan=None,
        host_ahead=False,
        loading=False,
        resident_layers=deployment.active.resident_layers,
    )




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
    cache = KvCache(model.architecture, layers, slots, tokens, model.dtype, model.device, kernels=model.kernels)
    step: Attend = PromptStep(cache, 0, rows)
    if kv_tokens:
        step = decode_step(cache, range(rows), [kv_tokens - 1] * rows, kv_tokens if rows > 1 else None)
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
