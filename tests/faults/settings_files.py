"""Mutants of an experiment's file: values, names and bytes of its YAML, and what would run code or grow without end."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from faults import Mutant, changed_bytes, changed_json, main

HEAD = "# @package _global_\n"
STUDY = """
name: tiny
title: A small one
models: [opt-1.3b]
hardware: a100-40gb
seeds: [0]
workload:
  n_requests: 40
  arrivals: {kind: poisson, rate_per_s: 4.0}
  lengths: {prompt: {p50: 90, p95: 300, maximum: 400}, output: {kind: fixed, value: 12}}
  faults: {retries: 1, replica_dies: {rate_per_hour: 60.0, lasts_s: 2.0}}
server: {replicas: 2, max_running_requests: 16, block_tokens: 16, memory_utilisation: 0.8}
slo: {ttft_s: 0.5, tpot_s: 0.05}
exits: {parameters: {prompts_per_task: 8}}
arms:
  full_depth: {policy: full_depth, model: opt-1.3b}
  early_exit: {policy: early_exit, model: opt-1.3b, threshold: 0.9}
  few: {policy: early_exit, model: opt-1.3b, overrides: {server.max_running_requests: 8}}
baseline: full_depth
subject: few
gates: [{arm: early_exit, metric: layers_per_token, high: 24}]
sweeps:
  - {arms: [early_exit], axes: [{name: rate, settings: [workload.arrivals.rate_per_s], values: [1.0, 2.0]}]}
"""
BOMB = "x: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HARM = (
    BOMB, "x: " + "[" * 20_000, "x: &a [*a]\n", "x: " + "y" * 300_000, "title: ${oc.env:HOME}\n", "server: ${server}\n",
    "hydra: {callbacks: {x: {_target_: os.system, command: 'touch exploded'}}}\n", "x: !!python/object:os.system {}\n",
    "defaults: [/experiment/mine]\n", "defaults: [../../../etc/passwd]\n", "title: one\ntitle: two\n", "\t- x\n",
    "--- \na: 1\n--- \nb: 2\n", "<<: {title: x}\n", "? [a, b]\n: c\n", "title: 1e999\n", "seeds: !!set {1, 2}\n",
)  # fmt: skip


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield _written("unchanged", (HEAD + STUDY).encode())
    while True:
        kind = rng.choice(("value", "value", "value", "value", "bytes", "line", "harm"))
        if kind == "value":
            what, changed = changed_json(yaml.safe_load(STUDY), rng)
            content = (HEAD + yaml.safe_dump(changed, allow_unicode=True)).encode(errors="surrogatepass")
        elif kind == "bytes":
            what, content = changed_bytes((HEAD + STUDY).encode(), rng)
        elif kind == "line":
            lines = (HEAD + STUDY).splitlines()
            at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
            what, lines[at] = f"line {at + 1} as {other + 1}", lines[other]
            content = "\n".join(lines).encode()
        else:
            harm = rng.choice(HARM)
            what, content = harm[:40], (HEAD + rng.choice(("", STUDY)) + harm).encode()
        yield _written(f"{kind}: {what[:100]!r}", content)


def read(path: Path) -> None:
    """Compose the settings, and look at every arm and point as a run does before it starts."""
    from helios_sim.api import study_config
    from helios_sim.study.plan import check_study, plan_study

    config = study_config("mine", config_dir=path)
    check_study(plan_study(config))


def _written(what: str, content: bytes) -> Mutant:
    def write(folder: Path) -> Path:
        path = folder / "conf" / "experiment" / "mine.yaml"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        return folder / "conf"

    return Mutant(what, write)


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
