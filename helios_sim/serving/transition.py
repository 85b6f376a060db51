"""Brings a decided deployment into force: loads, drains and preempts, and accounts for the cost.

Weights load while serving goes on if they fit into memory beside the resident ones; the KV pool shrinks to make room.
If they do not fit beside the KV cache that requests in flight will need, a change of model waits until those requests
are done (or migrates them), and a raise of the cap preempts the newest requests, which must be computed again anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from helios_sim.core.layout import NEVER
from helios_sim.errors import UserError
from helios_sim.exits.rule import DraftModel, ExitRule
from helios_sim.policy.deployment import Deployment, InFlight, Placement
from helios_sim.profile.profile import MemoryBudget, Profile
from helios_sim.serving.backoff import Backoff
from helios_sim.serving.handover import settle
from helios_sim.serving.replica import Replica


class Residency:
    """Loaded layers by model. A model is resident once, up to the deepest layer that a placement asks for.

    The two places for late layers count as layers, and begin with the first two late layers in them.
    """

    def __init__(self, profiles: Mapping[str, Profile], memory: MemoryBudget, most_running: int) -> None:
        self._profiles = profiles
        self._memory = memory
        self._most_running = most_running
        self._pool_bytes: dict[tuple[tuple[str, int], ...], int] = {}  # pool bytes by resident layers
        self.layers: dict[str, int] = {}

    @staticmethod
    def wanted(deployment: Deployment) -> dict[str, int]:
        wanted: dict[str, int] = {}
        for placement in (deployment.active, *deployment.standby):
            wanted[placement.model] = max(placement.held_layers, wanted.get(placement.model, 0))
        return wanted

    def missing(self, deployment: Deployment) -> list[Placement]:
        """Placements that are not loaded deep enough, the active one first."""
        return [
            Placement(model, layers)
            for model, layers in self.wanted(deployment).items()
            if self.layers.get(model, 0) < layers
        ]

    def with_placement(self, placement: Placement) -> dict[str, int]:
        return {**self.layers, placement.model: max(placement.layers, self.layers.get(placement.model, 0))}

    def missing_bytes(self, placement: Placement) -> int:
        profile = self._profiles[placement.model]
        loaded = self.layers.get(placement.model)
        return profile.weight_bytes(placement.layers) - (profile.weight_bytes(loaded) if loaded else 0)

    def weight_bytes(self, layers: Mapping[str, int]) -> int:
        return sum(self._profiles[model].weight_bytes(n) for model, n in layers.items())

    def pool_bytes(self, layers: Mapping[str, int]) -> int:
        key = tuple(layers.items())
        found = self._pool_bytes.get(key)
        if found is None:
            found = self._memory.pool_bytes((self._profiles[model], n) for model, n in key)
            self._pool_bytes[key] = found
        return found

    def pool_blocks(self, layers: Mapping[str, int], active: Placement, rule: ExitRule) -> int:
        """KV blocks that there is room for; if another card drafts, on that card too."""
        blocks = self.pool_bytes(layers) // self.block_bytes(active, rule)
        if isinstance(rule, DraftModel) and rule.own_card is not None:
            drafted = self._most_running * (rule.draft_tokens // self._memory.block_tokens + 1)
            for name in rule.drafters:
                drafter, n_layers = self._profiles[name], self._profiles[name].model.n_layers
                block_bytes = self._memory.block_tokens * drafter.kv_bytes_per_token(n_layers)
                blocks = min(blocks, self.pool_bytes({name: n_layers}) // block_bytes - drafted)
        return max(0, blocks)

    def block_bytes(self, active: Placement, rule: ExitRule) -> int:
        """Bytes of a block: K and V of the active model, and of a drafter on the same card."""
        token_bytes = self._profiles[active.model].kv_bytes_per_token(active.layers)
        if isinstance(rule, DraftModel) and rule.own_card is None:
            drafter = self._profiles[rule.drafter]
            token_bytes += drafter.kv_bytes_per_token(drafter.model.n_layers)
        return self._memory.block_tokens * token_bytes


@dataclass(slots=True)
class Pending:
    """A decided deployment that is not in force yet."""

    deployment: Deployment
    decided_ns: int
    missing: list[Placement]
    falls_back: bool = False  # it returns to the deployment in force, after a load has failed


class Transitions:
    def __init__(self, replica: Replica, on_change: Callable[[], None], wake: Callable[[], None]) -> None:
        self._replica = replica
        self._on_change = on_change  # called when a deployment comes into force
        self.wake = wake
        profiles = {name: candidate.profile for name, candidate in replica.situation.candidates.items()}
        self.residency = Residency(profiles, replica.situation.memory, replica.situation.max_running_requests)
        self.backoff = Backoff()
        self._pending: Pending | None = None
        self._transfers = 0
        self._loading_since_ns = 0
        self._before_load: dict[str, int] = {}  # resident layers when the latest load began
        self._in_force_since_ns = 0

    @property
    def loads(self) -> str | None:
        """The model that is being loaded for the pending deployment."""
        return self._pending.missing[0].model if self._pending is not None and self._pending.missing else None

    @property
    def pending(self) -> bool:
        return self._pending is not None

    @property
    def loading(self) -> bool:
        return self._transfers > 0

    @property
    def falls_back(self) -> bool:
        """Whether the deployment in force is being loaded again, after a load has failed."""
        return self._pending is not None and self._pending.falls_back

    @property
    def draining(self) -> bool:
        """Whether no request starts, since the model is about to change and requests in flight finish first."""
        pending, replica = self._pending, self._replica
        return (
            pending is not None
            and pending.deployment.active.model != replica.deployment.active.model
            and (pending.deployment.in_flight is InFlight.DRAIN or not replica.running_requests)
        )

    def tell_loop(self) -> None:
        """Write into the loop's state what a pending change waits for, and which requests may start meanwhile."""
        s, pending = self._replica.state, self._pending
        changes = pending is not None and pending.deployment.active.model != self._replica.deployment.active.model
        drains = changes and pending is not None and pending.deployment.in_flight is InFlight.DRAIN
        s.loading, s.pending, s.draining = int(self.loading), int(pending is not None), int(drains)
        s.migrating = int(changes and not drains)
        waits_for_room = pending is not None and bool(pending.missing) and not self.loading
        s.room_blocks = NEVER
        if waits_for_room and pending is not None:
            s.room_blocks = max(NEVER, self._blocks_beside(pending.missing[0]))
        s.awaits_answers = int(pending is not None and not pending.missing)

    def start(self, deployment: Deployment) -> None:
        """Bring the first deployment of a run into force. It is loaded before the first request, at no cost."""
        self._require_fit(deployment)
        self._replica.deployment = deployment
        self._enforce(deployment)
        self._on_change()

    def begin(self, deployment: Deployment) -> None:
        """Begin a decided deployment. It comes into force here or, after loads and drains, in `advance`."""
        replica = self._replica
        self._require_fit(deployment)
        self._pending = Pending(deployment, replica.now_ns, self._to_load(deployment))
        self.advance()

    def _to_load(self, deployment: Deployment) -> list[Placement]:
        return [] if deployment.instant else self.residency.missing(deployment)

    def refused(self, deployment: Deployment) -> tuple[str, str, int] | None:
        """A model that the deployment needs but that failed to load lately, why, and until when it waits; else None."""
        now_ns = self._replica.now_ns
        for placement in self._to_load(deployment):
            until_ns = self.backoff.until_ns(placement.model, now_ns)
            if until_ns is not None:
                return placement.model, f"its loads failed {self.backoff.told(placement.model, now_ns)}", until_ns
        return None

    def refuse(self, model: str, reason: str) -> Deployment:
        """Keep the deployment in force, without the limits of a round, in place of one that is refused. Returns it."""
        return self._fall_back(f"{model} is not loaded ({reason})")

    def advance(self) -> None:
        """Go on with the pending deployment as far as possible now."""
        pending, replica = self._pending, self._replica
        if pending is None or self.loading:
            return
        if pending.missing:
            placement = pending.missing[0]
            if self._make_room(pending.deployment, placement):
                n_bytes = self.residency.missing_bytes(placement)
                self._before_load = self.residency.layers
                self.residency.layers = self.residency.with_placement(placement)
                replica.stats.loads += 1
                self.transfer(n_bytes, placement.model, self._next_missing)
            return
        deployment = pending.deployment
        if deployment.active.model != replica.deployment.active.model:
            if deployment.in_flight is InFlight.DRAIN and replica.in_flight:
                return
            replica.preempt_until(0)
        self._activate(pending)

    def follow_plan(self) -> None:
        """Change to the model that the oracle's plan names for the next request, if nothing is running."""
        replica = self._replica
        model = replica.first_waiting_model()
        if model is None or replica.running_requests:
            return
        if model != replica.deployment.active.model:
            n_layers = replica.situation.candidates[model].profile.model.n_layers
            settle(replica, model)
            replica.deployment = replace(replica.deployment, active=Placement(model, n_layers))
            replica.stats.switches += 1
            self._enforce(replica.deployment)

    def transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        """Copy a model's weights to the card while serving goes on. `on_done` is called when they are there."""
        replica = self._replica
        if not self._transfers:
            self._loading_since_ns = replica.now_ns
        self._transfers += 1

        def done() -> None:
            self._transfer_ended()
            on_done()
            self.wake()

        # Late layers keep half of the link meanwhile.
        share = 1 if replica.deployment.active.resident_layers is None else 2
        replica.engine.start_transfer(share * n_bytes, model, done)
        self.wake()

    def load_again(self, on_done: Callable[[], None]) -> None:
        """Load all resident layers again, one model after the other, after `engine.free`."""
        waiting = list(self.residency.layers)
        self._replica.engine.hold(self.residency.layers)

        def load_next() -> None:
            if not waiting:
                self._replica.enforce()  # the engine may have less room for requests now
                on_done()
                return
            model = waiting.pop(0)
            self.transfer(self.residency.weight_bytes({model: self.residency.layers[model]}), model, load_next)

        load_next()

    def give_up(self, reason: str, again: bool) -> tuple[str, Deployment] | None:
        """Handle a failed load: the deployment in force stays, without the limits of a round.

        Returns the model and that deployment. Weights that were freed to make room are loaded again. If that fails too,
        it is tried once more with `again` (and None is returned); else UserError is raised.
        """
        pending = self._pending
        self.lose_transfer()
        assert pending is not None
        model = pending.missing[0].model
        self.residency.layers = self._before_load
        told = self.backoff.told(model, self._replica.now_ns)
        reason = f"{reason}, {told}" if told else reason
        if pending.falls_back:
            if not again:
                raise UserError(
                    "model", model, f"weights that can be loaded ({reason})", "free memory, or name fewer models"
                )
            return None
        return model, self._fall_back(f"{model} could not be loaded ({reason})")

    def _fall_back(self, why: str) -> Deployment:
        kept = self._replica.deployment
        stays = f"{why}: {kept.active.model} serves on as before"
        fallback = replace(kept, admit_limit=None, observe_tokens=None, probe=None, reason=stays, evidence={})
        missing = self.residency.missing(fallback)
        self._pending = Pending(fallback, self._replica.now_ns, missing, falls_back=True)
        return fallback

    def lose_transfer(self) -> None:
        """Note that the weights of the transfer in progress are lost."""
        self._transfer_ended()
        self.wake()

    def close(self) -> None:
        """End the accounting of the deployment in force, at the end of the run."""
        self._end_evaluation(self._replica.deployment, int(self._replica.state.acted_ns))

    def _transfer_ended(self) -> None:
        self._transfers -= 1
        if not self._transfers:
            self._replica.stats.load_ns += self._replica.now_ns - self._loading_since_ns

    def _end_evaluation(self, deployment: Deployment, now_ns: int) -> None:
        if deployment.observe_tokens is not None or deployment.probe is not None:
            self._replica.stats.evaluation_ns += now_ns - self._in_force_since_ns
        self._in_force_since_ns = now_ns

    def _next_missing(self) -> None:
        assert self._pending is not None
        self.backoff.note_loaded(self._pending.missing[0].model)
        del self._pending.missing[0]

    def _make_room(self, deployment: Deployment, placement: Placement) -> bool:
        """Shrink the KV pool so that the placement fits into memory. Returns False if more must drain first."""
        replica, residency = self._replica, self.residency
        active = replica.deployment.active
        both = residency.with_placement(placement)
        blocks = self._blocks_beside(placement)
        drains = deployment.active.model != active.model and deployment.in_flight is InFlight.DRAIN
        if drains and replica.blocks_to_finish() > blocks:
            return False
        replica.preempt_until(blocks)
        if residency.pool_bytes(both) < 0:
            # Nothing runs any more: weights that the new deployment does not keep are freed first.
            wanted = residency.wanted(deployment)
            residency.layers = {m: min(n, wanted[m]) for m, n in residency.layers.items() if m in wanted}
            both = residency.with_placement(placement)
            blocks = self._blocks_beside(placement)
        replica.resize_pool(blocks)
        self._weigh(both)
        return True

    def _blocks_beside(self, placement: Placement) -> int:
        """KV blocks of the active model that fit beside the resident weights and this placement."""
        now = self._replica.deployment
        return self.residency.pool_blocks(self.residency.with_placement(placement), now.active, now.exit_rule)

    def _activate(self, pending: Pending) -> None:
        replica, stats, deployment = self._replica, self._replica.stats, pending.deployment
        old, old_depth = replica.deployment, replica.run_layers
        now_ns = replica.now_ns
        settle(replica, deployment.active.model)
        self._end_evaluation(old, now_ns)
        replica.deployment = deployment
        if deployment.active.model != old.active.model:
            stats.switches += 1
            replica.reorder()
        elif replica.run_layers > old_depth or _drafter(deployment) not in (None, _drafter(old)):
            # Hidden states at the old cap were not kept: deeper layers need the text from layer 1. So does a model that
            # begins to draft.
            replica.preempt_until(0)
        if deployment.active != old.active:
            stats.switch_time_ns += now_ns - pending.decided_ns
            stats.transitions_ns.append(now_ns)
            replica.state.placed_decode_ns = replica.state.placed_decode_batch_ns = 0
        self._pending = None
        self._enforce(deployment)
        self._on_change()

    def _enforce(self, deployment: Deployment) -> None:
        """Set memory and admission as the deployment wants them."""
        replica, residency = self._replica, self.residency
        residency.layers = residency.wanted(deployment)
        active = deployment.active
        if deployment.instant:  # the oracle's relaxed memory: as if only the first exit's layers were loaded
            first_exit = replica.situation.candidates[active.model].offline.exits[0]
            residency.layers = {active.model: first_exit}
            active = Placement(active.model, first_exit)
        blocks = residency.pool_blocks(residency.layers, active, deployment.exit_rule)
        replica.preempt_until(blocks)
        replica.resize_pool(blocks)
        replica.state.block_bytes = residency.block_bytes(active, deployment.exit_rule)
        if (drafter := _drafter(deployment)) is not None:
            replica.engine.lay_beside(active.model, drafter[0])
        self._weigh(residency.layers, for_good=not deployment.triggers)
        replica.state.starts_left = NEVER if deployment.admit_limit is None else deployment.admit_limit
        replica.enforce()  # the engine may know its room for requests only now

    def _weigh(self, layers: dict[str, int], for_good: bool = False) -> None:
        self._replica.engine.hold(layers, for_good)
        usable = self._replica.situation.memory.usable_bytes
        self._replica.state.weight_bytes = usable - self.residency.pool_bytes(layers)
        self._replica.note_memory()

    def _require_fit(self, deployment: Deployment) -> None:
        wanted = self.residency.wanted(deployment)
        if self.residency.pool_blocks(wanted, deployment.active, deployment.exit_rule) > 0 or deployment.instant:
            return
        memory = self._replica.situation.memory
        names = ", ".join(f"{model} ({layers} layers)" for model, layers in wanted.items())
        raise UserError(
            "model",
            names,
            f"weights, activations and one KV block must fit into {memory.usable_bytes / 1e9:.1f} GB "
            f"({memory.utilisation:.0%} of the card)",
            "choose a smaller model, a lower cap, a larger card, more cards (server.tensor_parallel) or a higher "
            "server.memory_utilisation",
        )


def _drafter(deployment: Deployment) -> tuple[str, bool, tuple[str, ...]] | None:
    """The other model that drafts, whether it has its own card, and the models that draft beside it."""
    rule = deployment.exit_rule
    return (rule.drafter, rule.own_card is not None, rule.fused_with) if isinstance(rule, DraftModel) else None
