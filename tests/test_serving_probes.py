"""Probes in closed form: candidates score served text while serving goes on, on iterations of 1 ms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flat_rig import MS, flat, run
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.policy.deployment import Completed, Probe, Probed
from helios_sim.workload import ClosedLoop, generate
from rig import full_depth, workload


def test_a_probe_streams_beside_serving_and_takes_the_device_once() -> None:
    """Asked at 30 ms, when the third answer is complete; b streams for 10 ms; scoring two texts takes 2 ms, in which
    nothing else runs; then the policy is asked, once."""
    first = replace(full_depth("a"), triggers=(Completed(3),))
    probing = replace(full_depth("a"), probe=Probe(("b",), 2), triggers=(Probed(),))
    traces = {name: synthetic_trace(name, (2, 4), seed=i, chars_per_token=1) for i, name in enumerate("ab")}
    work = workload(8, 5, 10, ClosedLoop(1))
    served = run(first, [probing, None], work, flat("a") | flat("b"), traces=traces)
    assert [type(cause) for cause, _ in served.policy.asked] == [Completed, Probed]
    telemetry = served.policy.asked[1][1]
    assert telemetry.now_ns == 42 * MS
    assert served.run.end_ns == (80 + 2) * MS
    assert [(o.model, o.request_id, o.time_ns, o.chars) for o in telemetry.observations] == [
        ("b", 2, 40 * MS, 10),
        ("b", 3, 40 * MS, 10),
    ]
    bound = traces["b"].bind(("text",))
    rows = {r.request_id: r for block in generate(work, 0) for r in block.rows()}
    for observation in telemetry.observations:
        request = rows[observation.request_id]
        at = bound.locate(0, request.text_start, request.output_chars).indices()
        assert np.array_equal(observation.agrees, traces["b"].agree[at])
    assert served.run.stats.itl.longest_ns == 1 * MS  # the pass fell between two requests
    assert served.run.stats.loads == 0
    assert served.run.stats.switches == 0


def test_a_probe_of_what_is_resident_starts_at_once_and_several_follow_each_other() -> None:
    """a is there, so its pass is at 10 ms; b then streams for 10 ms, in which a serves, and is scored."""
    first = replace(full_depth("a"), triggers=(Completed(1),))
    probing = replace(full_depth("a"), probe=Probe(("a", "b"), 5), triggers=(Probed(),))
    served = run(first, [probing], workload(4, 5, 10, ClosedLoop(1)), flat("a") | flat("b"))
    asked = served.policy.asked
    assert [type(cause) for cause, _ in asked] == [Completed, Probed]
    assert [(o.model, o.request_id) for o in asked[1][1].observations] == [("a", 0), ("b", 0), ("b", 1)]
    assert asked[1][1].now_ns == (10 + 1 + 10 + 2) * MS
    assert served.run.end_ns == (40 + 3) * MS
