"""A study on tiny random models, as files that a user would have: weights, profiles, traces, texts, an experiment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from command_line import write_study
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.store import write_trace
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.model.architecture import model_spec
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import write_profile
from helios_sim.profile.synthetic import flat_profile
from helios_sim.profile.tables import RowsTable
from tiny_models import TEXT, write_tiny

EXITS = (2, 4, 6)
LAYERS = 6
HARDWARE = "here"
EXPERIMENT = """# @package _global_
defaults:
  - override /workload: tiny
name: tiny_live
models: [tiny]
hardware: here
profile_folder: {folder}/profiles
runtime: {{preset: profile}}
exits: {{source: "{folder}/traces/{{model}}", threshold: 0.4}}
objective: {{goal: throughput, max_disagreement: 0.5}}
server: {{max_running_requests: 4, max_batch_tokens: 32, memory_utilisation: 1.0, block_tokens: 8}}
live:
  texts: {folder}/words.txt
  warm_up: 1
  weights: {{tiny: "{folder}/tiny", other: "{folder}/other"}}
{arms}
"""
WORKLOAD = """n_requests: 12
chars_per_token: 1.0
arrivals: {kind: poisson, rate_per_s: 200.0}
lengths:
  kind: drawn
  prompt: {kind: lognormal, median: 12, sigma: 0.5, minimum: 2, maximum: 40}
  output: {kind: lognormal, median: 8, sigma: 0.4, minimum: 2, maximum: 24}
mix: {tasks: {text: 1.0}}
"""
ARMS = "arms:\n  full_depth: {policy: full_depth, model: tiny}\n  early_exit: {policy: early_exit, model: tiny}\n"


def tiny_profile(folder: Path, name: str, iteration_s: float = 0.003, hbm_bytes: int = 1 << 20) -> Profile:
    """Of a checkpoint in `folder`, with a made-up constant time; a token is a character."""
    spec = model_spec(find_checkpoint(str(folder)).architecture, name, chars_per_token=1.0)
    flat = flat_profile(iteration_s, n_layers=spec.n_layers, name=name, hbm_bytes=hbm_bytes)
    nothing = RowsTable(np.array([1, 4096]), np.zeros(2))
    return replace(flat, model=spec, check=nothing, hardware=replace(flat.hardware, name=HARDWARE))


def write_live_study(folder: Path, arms: str = ARMS, family: str = "llama") -> tuple[str, ...]:
    """Everything into `folder`, for the models `tiny` and `other`. Returns the arguments that run it."""
    for seed, name in enumerate(("tiny", "other")):
        write_tiny(family, folder / name, layers=LAYERS, seed=seed)
        write_profile(tiny_profile(folder / name, name), folder / "profiles" / f"{name}@{HARDWARE}")
        trace = synthetic_trace(name, EXITS, ("text",), tokens=400, seed=seed, chars_per_token=1)
        write_trace(trace, folder / "traces" / name)
    (folder / "words.txt").write_text(TEXT)
    (folder / "conf" / "workload").mkdir(parents=True)
    (folder / "conf" / "workload" / "tiny.yaml").write_text(WORKLOAD)
    return write_study(folder, EXPERIMENT.format(folder=folder, arms=arms), "tiny_live")
