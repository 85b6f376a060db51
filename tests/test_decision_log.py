"""The log of decisions of a long run: bounded, with its beginning and its end, and the run the same."""

from __future__ import annotations

from dataclasses import replace

from helios_sim.policy.deployment import Completed
from helios_sim.serving import decider
from helios_sim.workload import Constant, DrawnLengths, Fixed, TaskMix, Workload
from rig import Scripted, full_depth, serve


def test_a_long_log_keeps_its_first_half_and_the_latest(monkeypatch) -> None:
    work = Workload(Constant(100.0), DrawnLengths(Fixed(3), Fixed(4)), TaskMix.single("text"), 60, chars_per_token=None)
    decided = [replace(full_depth(), triggers=(Completed(1),), reason=f"{turn}") for turn in range(60)]

    def run():
        return serve(work, Scripted(decided[0], decided[1:]))

    whole = run()
    log = whole.run.servers[0].decisions
    assert len(log) > 50
    monkeypatch.setattr(decider, "MOST_DECISIONS", 20)
    short = run()
    (server,) = short.run.servers
    assert server.decisions == log[:10] + log[-10:]
    assert server.decisions_left_out == len(log) - 20
    assert short.records == whole.records
