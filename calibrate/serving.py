"""What serving adds to the model's own time in an iteration, from real iterations. Knows a subject, no profile.

Of an iteration in which everybody decodes, the time from the end of the one before to its own end is known, and so is
what of it was spent inside the forward pass. The difference is the host's, while the device waits: the server, the
scheduler, the policy, telemetry and the engine's own books.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from calibrate.ceilings import Ceilings
from calibrate.points import figure
from calibrate.subject import Subject
from helios_sim.profile.spec import ModelSpec
from helios_sim.request import NS_PER_S

WARM_ITERATIONS = 3  # decodes of each batch that do not count
ITERATIONS = 16  # and those that do


@dataclass(frozen=True, slots=True)
class ServingCosts:
    """Medians in seconds an iteration, by batch."""

    host_s: dict[int, float]  # outside the forward pass
    host_iqr_s: dict[int, float]
    forward_s: dict[int, float]  # inside it
    iterations: int  # of each batch

    @property
    def middle_host_s(self) -> float:
        """At the middle batch."""
        return self.host_s[sorted(self.host_s)[len(self.host_s) // 2]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ServingCosts:
        by_batch = {k: {int(b): t for b, t in data[k].items()} for k in ("host_s", "host_iqr_s", "forward_s")}
        return cls(**{**data, **by_batch})


def measure_serving(subject: Subject, spec: ModelSpec, ceilings: Ceilings) -> ServingCosts:
    """Some 20 iterations of each of three batches. KV memory for so many short requests must be free."""
    from calibrate.serving_run import serve

    host, forward = {}, {}
    for batch in subject.limits.few_batches:
        decodes = serve(subject, spec, ceilings, batch, 1 + WARM_ITERATIONS + ITERATIONS).decodes(batch)
        counted = decodes[WARM_ITERATIONS:]
        host[batch] = figure([step.overhead_ns / NS_PER_S for step in counted])
        forward[batch] = figure([step.forward_ns / NS_PER_S for step in counted])
    return ServingCosts(
        {batch: f.median_s for batch, f in host.items()},
        {batch: f.iqr_s for batch, f in host.items()},
        {batch: f.median_s for batch, f in forward.items()},
        ITERATIONS,
    )
