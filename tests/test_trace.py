"""`trace=true`: every iteration, request and decision of a study, as the format of Perfetto has them."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

from command_line import CommandLine
from helios_sim.api import study_config
from helios_sim.errors import UserError
from helios_sim.report.perfetto import Served, in_lanes
from helios_sim.study.jobs import run_job
from helios_sim.study.plan import StudyPlan, plan_study
from helios_sim.study.traced import FILE, MOST_REQUESTS, check_trace, trace_of
from trace_processor import MISSING, opened as trace_processor

Track = tuple[str, str]  # arm, and the names of the track and of the groups that it lies in


class Read:
    """What the file holds, by track."""

    def __init__(self, path: Path) -> None:
        trace = Trace()
        trace.ParseFromString(path.read_bytes())
        paths: dict[int, tuple[str, ...]] = {}
        self.slices: dict[Track, list[tuple[int, int, str]]] = defaultdict(list)
        self.counts: dict[Track, list[tuple[int, float]]] = defaultdict(list)
        self.instants: dict[Track, list[tuple[int, str]]] = defaultdict(list)
        begun: dict[int, tuple[int, str]] = {}
        for packet in trace.packet:
            if packet.HasField("track_descriptor"):
                found = packet.track_descriptor
                paths[found.uuid] = (*paths[found.parent_uuid], found.name) if found.uuid else ()
                continue
            event, at_ns = packet.track_event, packet.timestamp
            arm, *names = paths[event.track_uuid]
            track = (arm, ", ".join(names))
            if event.type == TrackEvent.TYPE_SLICE_BEGIN:
                assert event.track_uuid not in begun, "one slice of a track at a time"
                begun[event.track_uuid] = (at_ns, event.name)
            elif event.type == TrackEvent.TYPE_SLICE_END:
                start_ns, name = begun.pop(event.track_uuid)
                assert start_ns <= at_ns
                self.slices[track].append((start_ns, at_ns, name))
            elif event.type == TrackEvent.TYPE_INSTANT:
                self.instants[track].append((at_ns, event.name))
            else:
                value = event.counter_value if event.HasField("counter_value") else event.double_counter_value
                self.counts[track].append((at_ns, value))
        assert not begun


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    return plan_study(study_config("quickstart", "workload.n_requests=40"))


@pytest.fixture(scope="module")
def read(plan: StudyPlan, tmp_path_factory: pytest.TempPathFactory) -> Read:
    path = tmp_path_factory.mktemp("trace") / FILE
    path.write_bytes(trace_of(plan))
    return Read(path)


@pytest.mark.slow
def test_there_is_a_slice_for_every_iteration(plan: StudyPlan, read: Read) -> None:
    for arm, jobs in plan.headline.jobs.items():
        done = run_job(jobs[0])
        slices = read.slices[arm, "iterations"]
        assert len(slices) == done.replicate.stats.iterations
        assert sum(end_ns - start_ns for start_ns, end_ns, _ in slices) == done.replicate.stats.busy_ns
        tokens = sum(int(word.split()[0]) for *_, name in slices for word in name.split(" + ") if "prompt" in word)
        assert tokens >= int(done.replicate.records.prompt_tokens.sum())  # those of preempted requests again


def test_requests_and_decisions_are_those_of_the_study(plan: StudyPlan, read: Read) -> None:
    for arm, jobs in plan.headline.jobs.items():
        done = run_job(jobs[0])
        placements = [(it.time_ns, it.deployment.active) for it in done.decisions]
        decided = [(time_ns, f"{active.model} at layer {active.layers}") for time_ns, active in placements]
        assert read.instants[arm, "decisions"] == decided
        slots = [slices for (of, name), slices in read.slices.items() if of == arm and "slot" in name]
        served = [slice for slices in slots for slice in slices]
        prefills = {int(name.split()[0]): times for *times, name in served if "prefill" in name}
        records = done.replicate.records
        assert prefills == {
            int(k): [int(start_ns), int(end_ns)]
            for k, start_ns, end_ns in zip(
                records.request_id, records.scheduled_ns.values, records.first_token_ns.values, strict=True
            )
        }


def test_counters_hold_what_the_scheduler_saw(plan: StudyPlan, read: Read) -> None:
    for arm, jobs in plan.headline.jobs.items():
        running = [value for _, value in read.counts[arm, "requests running"]]
        assert max(running) <= jobs[0].config.server.max_running_requests
        assert min(running) >= 1
        watts = [value for _, value in read.counts[arm, "power at least"]]
        assert 0 < min(watts) < max(watts) <= 400
        times_ns = [at_ns for at_ns, _ in read.counts[arm, "KV blocks in use"]]
        assert times_ns == sorted(times_ns)


@pytest.mark.slow
def test_replicas_and_faults_have_tracks_of_their_own(tmp_path: Path) -> None:
    words = ("server.replicas=2", "workload.n_requests=40", "workload.faults.replica_dies.at_s=[1.0]")
    path = tmp_path / FILE
    path.write_bytes(trace_of(plan_study(study_config("quickstart", *words))))
    names = {name for _, name in Read(path).slices}
    assert {f"replica {k}, {name}" for k in (0, 1) for name in ("iterations", "requests, slot 0")} <= names


@pytest.mark.slow
def test_the_command_writes_it_beside_the_rest(command: CommandLine) -> None:
    plain = command("+experiment=quickstart", "workload.n_requests=20", "pictures=false", into="plain")
    traced = command("+experiment=quickstart", "workload.n_requests=20", "pictures=false", "trace=true", into="traced")
    assert (plain.status, traced.status) == (0, 0)
    assert Read(command.folder / "traced" / FILE).slices
    assert not (command.folder / "plain" / FILE).exists()
    assert plain.summary["arms"] == traced.summary["arms"]


@pytest.mark.slow
def test_names_cannot_break_out(tmp_path: Path) -> None:
    config = study_config("quickstart", "workload.n_requests=5")
    config.arms = {"a\x1b[31m": {"policy": "full_depth", "model": "opt-1.3b"}}
    config.baseline, config.subject = "", None
    path = tmp_path / FILE
    path.write_bytes(trace_of(plan_study(config)))
    assert not any("\x1b" in part for track in Read(path).slices for part in track)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("workload.n_requests=20001",), "a trace of at most 20,000 requests"),
        (("mode=live",), "does nothing here"),
    ],
)
def test_what_cannot_be_traced_is_refused(command: CommandLine, words: tuple[str, ...], said: str) -> None:
    done = command("+experiment=quickstart", "trace=true", *words)
    assert done.status == 1
    assert said in done.err
    assert MOST_REQUESTS == 20_000


@pytest.mark.slow
def test_arms_of_a_device_are_not_traced() -> None:
    config = study_config("quickstart", "workload.n_requests=5")
    config.arms["helios"] = {"policy": "helios", "overrides": {"mode": "live"}}
    with pytest.raises(UserError, match="helios is served by a device"):
        check_trace(plan_study(config))


def test_without_the_package_it_says_how_to_get_it(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios_sim.report.perfetto.find_spec", lambda name: None)
    done = command("+experiment=quickstart", "trace=true", "workload.n_requests=5")
    assert done.status == 1
    assert "pip install 'helios-llm-sim[trace]'" in done.err
    assert not (command.folder / "out" / "summary.json").exists()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=40))
def test_no_two_requests_share_a_slot_at_a_time(spans: list[tuple[int, int]]) -> None:
    requests = [Served(0, k, 0, at, at, at + long, 1, 1, 0, "", "completed") for k, (at, long) in enumerate(spans)]
    by_lane: dict[int, list[Served]] = defaultdict(list)
    for lane, request in in_lanes(requests):
        by_lane[lane].append(request)
    assert sorted(it.request_id for lane in by_lane.values() for it in lane) == list(range(len(spans)))
    for lane in by_lane.values():
        assert all(a.left_ns <= b.scheduled_ns for a, b in pairwise(lane))
    most = max((sum(at <= k < at + long for at, long in spans) for k in range(80)), default=0)
    assert len(by_lane) == most


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_trace_processor_reads_the_whole_quickstart(tmp_path: Path) -> None:
    """Every slice, instant and counter that was written is found by SQL, without a complaint of the import."""
    plan, path = plan_study(study_config("quickstart")), tmp_path / FILE
    path.write_bytes(trace_of(plan))
    read = Read(path)
    of = "join (select t.*, p.name as arm from track t join track p on t.parent_id = p.id) t on track_id = t.id"
    with trace_processor(path.read_bytes(), tmp_path / 'browser') as processor:
        assert processor.one("select count(*) as n from stats") > 100
        assert processor.rows("select * from stats where severity in ('error', 'data_loss') and value != 0") == []

        def counts(table: str, kind: str) -> dict[Track, int]:
            sql = f"select arm, t.name as track, count(*) as n from {table} {of} where {kind} group by 1, 2"  # noqa: S608
            return {(row["arm"], row["track"]): row["n"] for row in processor.rows(sql)}

        slices = counts("slice", "dur > 0")
        for arm, jobs in plan.headline.jobs.items():
            assert slices[arm, "iterations"] == run_job(jobs[0]).replicate.stats.iterations
        in_groups = {(arm, name): len(found) for (arm, name), found in read.slices.items() if "slot" not in name}
        assert {track: n for track, n in slices.items() if "slot" not in track[1]} == in_groups
        total = sum(len(found) for found in (*read.slices.values(), *read.instants.values()))
        assert processor.one("select count(*) as n from slice") == total
        assert counts("slice", "t.name = 'decisions'") == {track: len(found) for track, found in read.instants.items()}
        assert counts("counter", "true") == {track: len(found) for track, found in read.counts.items()}
        assert processor.one("select count(*) as n from slice where depth > 0 or dur < 0") == 0
