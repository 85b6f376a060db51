"""Two models whose iterations take 1 ms and whose bytes can be counted, for loads and switches in closed form.

The flat model weighs 68 bytes and 40 for each layer; a token's K and V weigh 4 bytes in each layer.
"""

from __future__ import annotations

from helios_sim.exits.rule import FixedCap
from helios_sim.policy.deployment import Deployment, KvRule, Placement
from helios_sim.profile.profile import Profile
from helios_sim.profile.synthetic import flat_profile
from helios_sim.serving.server import Server
from helios_sim.workload import Workload
from rig import Scripted, Served, serve

MS = 1_000_000
WHOLE, HALF = 228, 148  # bytes of 4 and of 2 layers


def capped(model: str = "a", layers: int = 2, **other) -> Deployment:
    return Deployment(Placement(model, layers), FixedCap(0.7), kv_rule=KvRule.NONE, **other)


def run(first: Deployment, then: list[Deployment], work: Workload, profiles: dict[str, Profile], **rig) -> Served:
    """Serves, and keeps (time, KV blocks, model) whenever the last two change in `log`."""
    log: list[tuple[int, int, str]] = []

    def watch(server: Server) -> None:
        replica = server._replica
        state = (int(replica.state.total_blocks), replica.deployment.active.model)
        if not log or log[-1][1:] != state:
            log.append((replica.now_ns, *state))

    policy = Scripted(first, list(then))
    served = serve(work, policy, profiles, watch=watch, utilisation=1.0, **rig)
    served.log, served.policy = log, policy
    return served


def flat(name: str = "a", load_ms: float = 10.0, n_bytes: int = WHOLE, **other) -> dict[str, Profile]:
    """Loads n_bytes in load_ms."""
    return {name: flat_profile(0.001, name=name, load_bytes_per_s=n_bytes / load_ms * 1000, **other)}
