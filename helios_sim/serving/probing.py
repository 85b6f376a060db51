"""Scores texts that were already served on other models, while serving goes on.

A candidate's layers stream from host memory through a window of two layers, so serving keeps its memory and slows
down as it does during a load; then one prefill pass over the texts takes the device for itself. In the real engine
both interleave layer by layer; the device time is the same.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from simpy.events import Event

from helios_sim.request import Request
from helios_sim.serving.decider import Decider
from helios_sim.serving.handover import hand_over
from helios_sim.serving.iteration import Hands
from helios_sim.serving.replica import Replica
from helios_sim.serving.transition import Transitions
from helios_sim.serving.turns import Turns


class Prober:
    def __init__(self, replica: Replica, decider: Decider, transitions: Transitions, turns: Turns) -> None:
        self._replica, self._turns = replica, turns
        self._decider = decider
        self._transitions = transitions
        self._streaming: str | None = None
        self._streamed: str | None = None

    @property
    def awaits_completion(self) -> bool:
        """Whether the probe must wait, since no request has been served that it could score."""
        scoring = self._replica.deployment.probe is not None and not self._transitions.pending
        return scoring and self._streaming is None and bool(self._decider.probe_left)

    @property
    def streams(self) -> str | None:
        """The model that is streaming."""
        return self._streaming

    def lose_stream(self) -> None:
        """Note that streamed weights were lost: the candidate is streamed again."""
        self._streaming = self._streamed = None

    def advance(self) -> Generator[Event, Any, int | None]:
        """Start the next candidate's stream, or score the one that has streamed and return the end of that pass.

        An engine with its own thread is waited for.
        """
        replica = self._replica
        probe = replica.deployment.probe
        if probe is None or self._transitions.pending:
            self._streamed = None
            return None
        hand_over(replica)  # records of served texts
        if self._streamed is not None:
            model, self._streamed = self._streamed, None
            if model not in self._decider.probe_left:
                return None  # the probe was given up
            requests = [Request(*row) for row in list(replica.served)[-probe.prompts :]]
            rule, began_ns = replica.deployment.exit_rule, replica.now_ns
            duration_ns: int
            if isinstance(replica.engine, Hands):
                scored, tell = self._turns.told()
                replica.engine.hand_probe(model, requests, rule, tell)
                duration_ns, observations = (yield scored)()
            else:
                duration_ns, observations = replica.engine.probe(model, requests, rule)
            self._decider.probe_left.remove(model)
            self._decider.note_probe()
            replica.observations.extend(observations)
            return max(began_ns + duration_ns, replica.now_ns)
        if self._streaming is None:
            self._pass_over()
        if self._streaming is None and self._decider.probe_left and replica.served:
            in_place = self._stream(self._decider.probe_left[0])
            return (yield from self.advance()) if in_place else None
        return None

    def _pass_over(self) -> None:
        """Leave candidates out of this probe if their streams have failed too often."""
        for model in list(self._decider.probe_left):
            told = self._transitions.backoff.told(model, self._replica.now_ns)
            if told:
                self._decider.probe_left.remove(model)
                self._decider.note_probe()
                self._decider.note_fault(f"{model} is not probed: its loads failed {told}")

    def _stream(self, model: str) -> bool:
        """Start to stream the layers that are not resident. Returns True if there are none to wait for."""
        profile = self._replica.situation.candidates[model].profile
        loaded = self._transitions.residency.layers.get(model)
        n_bytes = profile.weight_bytes(profile.model.n_layers) - (profile.weight_bytes(loaded) if loaded else 0)
        self._streaming = model

        def done() -> None:
            self._streaming, self._streamed = None, model
            if n_bytes:
                self._transitions.backoff.note_loaded(model)

        if not n_bytes:
            done()
            return True
        self._transitions.transfer(n_bytes, model, done)
        return False
