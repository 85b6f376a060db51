"""A real server with the live engine on tiny checkpoints, under a wall clock. Shared by the tests of live serving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.replay import offline_exits
from helios_sim.exits.rule import Confidence
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.clock import WallClock
from helios_sim.live.device import Device
from helios_sim.live.engine import LiveEngine
from helios_sim.live.model.architecture import model_spec
from helios_sim.live.model.heads import ExitHeads
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Deployment
from helios_sim.policy.telemetry import Candidate, ExpectedLoad, Goal, Objective, Policy, Situation
from helios_sim.profile.profile import MemoryBudget, Profile
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import Request, RequestBlock, RequestRecord
from helios_sim.serving.faults import with_faults
from helios_sim.serving.server import Server
from helios_sim.simulation import Run, simulate
from helios_sim.workload.faults import FaultPlan
from rig import Scripted
from tiny_models import TEXT, write_tiny

LAYERS = 6
EXITS = (2, 4, 6)
SLOT_TOKENS = 96
LAST: list[Any] = []  # records, server and engine of the latest run


class RepeatedText:
    """The tiny tokenizer's own text, as often as it takes."""

    def prompt(self, task: int, start: int, chars: int) -> str:
        end = start % len(TEXT) + len(TEXT) * (chars // len(TEXT) + 1)
        return (TEXT * (end // len(TEXT) + 1))[end - chars : end]


def live_model(folder: Path, dtype: str = "float32", exits: Sequence[int] = EXITS, name: str = "tiny") -> LiveModel:
    """Of a folder written by `write_tiny`, with the model's own heads; a token is one character long."""
    checkpoint = find_checkpoint(str(folder))
    return LiveModel(
        checkpoint=checkpoint,
        heads=ExitHeads.own(exits[:-1]),
        tokenizer=checkpoint.tokenizer(),
        profile=profile_of(checkpoint.architecture, dtype, name),
        trace=synthetic_trace(name, exits, chars_per_token=1).bind(("text",)),
    )


def profile_of(architecture, dtype: str, name: str = "tiny") -> Profile:
    spec = model_spec(architecture, name, chars_per_token=1.0, dtype=dtype)
    flat = flat_profile(0.001, n_layers=architecture.n_layers, name=name)
    return replace(flat, model=spec)


def requests(lengths: Sequence[tuple[int, int]], gap_ns: int = 0) -> Iterator[RequestBlock]:
    """One block: (prompt tokens, answer tokens) of each."""
    n = len(lengths)
    prompt, answer = np.array(lengths, np.int64).T
    yield RequestBlock(
        request_id=np.arange(n), arrival_ns=np.arange(n) * gap_ns, prompt_chars=prompt, output_chars=answer,
        task=np.zeros(n, np.int64), text_start=np.arange(n) * 37,
    )  # fmt: skip


@dataclass
class Live:
    """What a run left: records by request, the engine with every answer."""

    records: list[RequestRecord]
    engine: LiveEngine
    server: Server
    run: Run

    def prompt(self, request_id: int) -> list[int]:
        return self.engine.answers[request_id].prompt

    def tokens(self, request_id: int) -> list[int]:
        return self.engine.answers[request_id].tokens

    def depths(self, request_id: int) -> list[int]:
        return self.engine.answers[request_id].depths


def serve_live(
    models: Mapping[str, LiveModel],
    policy: Policy | Deployment,
    blocks: Iterator[RequestBlock],
    count: int,
    *,
    users: int | None = None,
    slots: int = 8,
    kv_blocks: int = 64,
    block_tokens: int = 16,
    max_batch_tokens: int = 64,
    budget_bytes: int | None = None,
    schedule_ahead: int = 0,
    vllm_v1: bool = False,
    expected: ExpectedLoad | None = None,
    objective: Objective | None = None,
    threshold: float = 0.5,
    device: str | Device = "cpu",
    kept_answers: int | None = None,
    faults: FaultPlan | None = None,
    act: Callable[[WallClock, LiveEngine, Server], None] | None = None,
    close: bool = False,
) -> Live:
    """`kv_blocks` fit beside the weights of all models. `act` may interfere before the first event.

    The engine is left with its memory, for a test to look at, unless it is to `close`.

    Whatever stops the run, what is left of it can be read from `LAST`.
    """
    candidates = {
        name: Candidate(m.profile, offline_exits(m.trace.trace, threshold, Confidence.MAX_PROBABILITY))
        for name, m in models.items()
    }
    profiles = [m.profile for m in models.values()]
    weights = sum(p.weight_bytes(p.model.n_layers) for p in profiles)
    kv = max(p.kv_bytes_per_token(p.model.n_layers) for p in profiles) * block_tokens * kv_blocks
    situation = Situation(
        candidates=candidates,
        memory=MemoryBudget(budget_bytes or weights + kv, 1.0, block_tokens),
        objective=objective or Objective(Goal.THROUGHPUT, 0.5),
        max_running_requests=slots,
        max_batch_tokens=max_batch_tokens,
        seed=0,
        expected=expected,
        schedule_ahead=schedule_ahead,
        vllm_v1=vllm_v1,
    )
    env = WallClock()
    engine = LiveEngine(
        env, models, RepeatedText(), slots=slots, slot_tokens=SLOT_TOKENS, device=device, kept_answers=kept_answers
    )
    servers: list[Server] = []
    records: list[RequestRecord] = []

    def make_server(env, number, on_left):
        own = Scripted(policy) if isinstance(policy, Deployment) else policy
        used = engine if faults is None else with_faults(engine, env)
        servers.append(Server(env, number, used, own, situation, on_left))
        engine.faults = servers[0]
        servers[0].open()
        LAST[:] = [records, servers[0], engine]
        if act is not None:
            act(env, engine, servers[0])
        env.sync()
        return servers[0]

    run = simulate(make_server, blocks, count, records.append, users=users, env=env, faults=faults)
    engine.close() if close else engine.residents.stop()
    return Live(sorted(records, key=lambda r: r.request_id), engine, servers[0], run)


def request(request_id: int = 0, prompt: int = 8, answer: int = 8) -> Request:
    return Request(request_id, 0, prompt, answer, 0, 0)


__all__ = ["EXITS", "LAYERS", "Live", "live_model", "requests", "serve_live", "write_tiny"]
