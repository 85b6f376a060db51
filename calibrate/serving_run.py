"""Serves a subject's own model at full depth with the real server and live engine, as mode=live does. Measures nothing.

The server wants a profile before there is one: it gets one made from the model's shape and the ceilings, for sizes and
floors. No time of a run depends on what it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibrate.ceilings import Ceilings
from calibrate.subject import Subject
from calibrate.whole import NO_HOST
from helios_sim.exits.artificial import no_exits
from helios_sim.exits.replay import offline_exits
from helios_sim.exits.rule import Confidence
from helios_sim.live.clock import WallClock
from helios_sim.live.device import open_device
from helios_sim.live.engine import LiveEngine
from helios_sim.live.exits import ExitReader
from helios_sim.live.memory.residents import Residents
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.heads import ExitHeads
from helios_sim.live.served import LiveModel
from helios_sim.policy.full_depth import FullDepthParameters, FullDepthPolicy
from helios_sim.policy.telemetry import Candidate, Goal, Objective, Situation
from helios_sim.profile.memory import MemoryBudget
from helios_sim.profile.profile import Profile
from helios_sim.profile.roofline import roofline_profile
from helios_sim.profile.spec import HardwareSpec, ModelSpec
from helios_sim.request import RequestBlock, RequestRecord
from helios_sim.serving.server import Server
from helios_sim.simulation import simulate
from helios_sim.study.watched import Step, WatchedEngine

PROMPT_TOKENS = 4
_UNBOUNDED_BYTES = 1 << 50  # what the server counts with: memory is not what is measured


@dataclass(frozen=True, slots=True)
class Served:
    """One run: its iterations in their order, and the records of its requests."""

    steps: list[Step]
    records: list[RequestRecord]

    def decodes(self, batch: int) -> list[Step]:
        """Iterations in which so many requests decode and nobody reads a prompt."""
        return [s for s in self.steps if not s.composition.prefill and s.composition.decode_tokens[0, 0] == batch]


def serve(subject: Subject, spec: ModelSpec, ceilings: Ceilings, batch: int, answer_tokens: int) -> Served:
    """`batch` requests with short prompts that arrive at once and decode together to their end.

    Answers are shorter where the model's context is. UserError where memory does not suffice.
    """
    spec = replace(spec, n_layers=subject.n_layers, chars_per_token=1.0)
    profile, trace = profile_of_shape(spec, subject, ceilings), no_exits(spec)
    letters = Letters()
    live = LiveModel(subject.model.source, ExitHeads.own(()), letters, profile, trace.bind(("text",)))
    answer_tokens = min(answer_tokens, subject.architecture.max_context_tokens - PROMPT_TOKENS)
    clock = WallClock()
    device = open_device(subject.device.torch_device)
    engine = LiveEngine(
        clock, {spec.name: live}, letters, slots=batch, slot_tokens=PROMPT_TOKENS + answer_tokens, device=device,
        residents=InPlace(subject.model),
    )  # fmt: skip
    watched = WatchedEngine(engine, clock)
    offline = offline_exits(trace, 1.0, Confidence.MAX_PROBABILITY)
    situation = Situation(
        {spec.name: Candidate(profile, offline)}, MemoryBudget(_UNBOUNDED_BYTES, 1.0), Objective(Goal.THROUGHPUT, 1.0),
        max_running_requests=batch, max_batch_tokens=batch * PROMPT_TOKENS, seed=0,
    )  # fmt: skip
    records: list[RequestRecord] = []

    def make_server(env: Any, number: int, on_left: Any) -> Server:
        policy = FullDepthPolicy(FullDepthParameters())
        server = Server(env, number, watched, policy, situation, on_left, leap=False)
        clock.sync()
        return server

    simulate(make_server, _requests(batch, answer_tokens), batch, records.append, env=clock)
    engine.close()
    return Served(watched.steps, records)


def profile_of_shape(spec: ModelSpec, subject: Subject, ceilings: Ceilings) -> Profile:
    """What a data sheet with these ceilings would say of the model. No host costs."""
    facts = subject.device.facts
    hardware = HardwareSpec(
        name=facts.name, hbm_bytes=facts.memory_bytes, hbm_bytes_per_s=ceilings.bytes_per_s,
        flops_per_s=ceilings.flops_per_s, tdp_w=None, idle_w=None, source="the ceilings measured just before",
    )  # fmt: skip
    return roofline_profile(spec, hardware, NO_HOST, load_bytes_per_s=ceilings.bytes_per_s)


class InPlace(Residents):
    """The subject's model where it lies: a second copy might not fit, and nothing is moved."""

    def __init__(self, model: SegmentedModel) -> None:
        super().__init__({}, open_device("cpu"))
        self._model_there = model
        self._no_exits = ExitReader(ExitHeads.own(()), model.architecture.n_layers)

    def hold(self, layers: Mapping[str, int]) -> None:
        """It is there."""

    def running(self, name: str, layers: int) -> SegmentedModel:
        return self._model_there

    def exits(self, name: str) -> ExitReader:
        return self._no_exits


class Letters:
    """Words of prompts and a tokenizer: a letter is a token. What they say does not matter to a time."""

    bos_token = eos_token = None

    def prompt(self, task: int, start: int, chars: int) -> str:
        return "a" * chars

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1 + i % 3 for i in range(len(text))]}

    def get_vocab(self) -> Mapping[str, int]:
        return {}


def _requests(count: int, answer_tokens: int) -> Iterator[RequestBlock]:
    nothing = np.zeros(count, np.int64)
    yield RequestBlock(np.arange(count), nothing, nothing + PROMPT_TOKENS, nothing + answer_tokens, nothing, nothing)
