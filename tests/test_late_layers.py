"""Layers that stay in host memory and come for each iteration that runs them, and models that sleep, in closed form."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from flat_rig import MS, WHOLE, flat, run as run_flat
from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.replay import replay
from helios_sim.exits.rule import Confidence, FixedCap, PerToken, SelfSpeculation
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.answers import fault_of
from helios_sim.policy.deployment import (
    LATE_ROOM,
    AtTime,
    Deployment,
    KvRule,
    Placement,
    Probe,
)
from helios_sim.policy.prediction import Load, batch_capacity, decode_time_s, fixed_depth
from helios_sim.policy.registry import make_policy
from helios_sim.policy.transition import Underway, transition
from helios_sim.profile.profile import MemoryBudget, Profile
from helios_sim.profile.store import load_profile, read_profile, write_profile
from helios_sim.report.metrics import OF_LATE_LAYERS, compute_metrics
from helios_sim.report.records import Records
from helios_sim.workload import AllAtOnce, Exponential
from priced import priced_profile
from rig import Scripted, Served, full_depth, rows_of, serve, workload

EXITS, N_LAYERS, RESIDENT = (3, 5, 8), 8, 3
LAYER_S, HEAD_S, HOST_S = 1e-3, 4e-4, 3e-4
LAYER_BYTES = 40  # of the flat model


def profile_of(link_ms: float, slowdown: float = 1.0, **others: float) -> Profile:
    """A layer takes so long over the link."""
    return priced_profile(
        "flat", n_layers=N_LAYERS, layer_s=LAYER_S, head_s=HEAD_S, host_s=HOST_S, load_slowdown=slowdown,
        load_bytes_per_s=LAYER_BYTES / link_ms * 1e3, **others,
    )  # fmt: skip


def late(exit_rule=None, resident: int = RESIDENT, **others) -> Deployment:
    whole = full_depth(layers=N_LAYERS)
    rule = exit_rule or whole.exit_rule
    return replace(whole, active=Placement("flat", N_LAYERS, resident), exit_rule=rule, **others)


def leaving(shares: tuple[float, float], tokens: int = 500) -> ExitTrace:
    """Of all tokens these shares are confident at the first and at the second exit."""
    rng, trace = np.random.default_rng(1), synthetic_trace("flat", EXITS, tokens=tokens, chars_per_token=1)
    sure = np.ones((tokens, len(EXITS)), np.float32)
    for place, share in enumerate(shares):
        sure[:, place] = np.where(rng.uniform(size=tokens) < share, 0.9, 0.1)
    return replace(trace, confidences={Confidence.MAX_PROBABILITY: sure}, agree=sure > 0.5)


def run(deployment: Deployment, profile: Profile, work=None, trace: ExitTrace | None = None, **how) -> Served:
    work = workload(1, 5, 11) if work is None else work
    return serve(work, deployment, {"flat": profile}, {"flat": leaving((0.0, 0.0)) if trace is None else trace}, **how)


# --- what an iteration takes


@pytest.mark.parametrize("link_ms", [0.1, 1.5, 1.74, 3.0])
@pytest.mark.parametrize("slowdown", [1.0, 1.25])
def test_an_iteration_takes_the_longer_of_the_link_and_all_else(link_ms: float, slowdown: float) -> None:
    """Five of eight layers come. At a slowdown of 1.25 a fifth of the link's time is the card's memory's as well."""
    served = run(late(), profile_of(link_ms, slowdown))
    alone_ms = 1e3 * (N_LAYERS * LAYER_S + HEAD_S + HOST_S)
    late_ms = max(alone_ms + 5 * link_ms * (1 - 1 / slowdown), 5 * link_ms)
    stats, record = served.run.stats, served.records[0]
    assert record.last_token_ns - record.first_token_ns == pytest.approx(10 * late_ms * MS, abs=10)
    assert stats.late_layers == 5 * 11
    assert stats.late_ns == pytest.approx(11 * (late_ms - alone_ms) * MS, abs=20)
    found = compute_metrics(Records.of(served.records), stats)
    assert [found[name] for name in OF_LATE_LAYERS] == [5.0, pytest.approx(1 - alone_ms / late_ms, abs=1e-6)]


def test_where_all_layers_stay_nothing_is_different() -> None:
    served = run(full_depth(layers=N_LAYERS), profile_of(3.0))
    stats = served.run.stats
    assert (stats.late_layers, stats.late_ns) == (0, 0)
    assert served.records[0].first_token_ns == round(1e9 * (N_LAYERS * LAYER_S + HEAD_S + HOST_S))
    found = compute_metrics(Records.of(served.records), stats)
    assert [found[name] for name in OF_LATE_LAYERS] == [None, None]


@pytest.mark.parametrize("kv_rule", [KvRule.COPY, KvRule.PROPAGATE, KvRule.RECOMPUTE])
def test_tokens_that_leave_before_late_layers_do_not_wait_for_them(kv_rule: KvRule) -> None:
    """Token by token: of the 5 layers above the third none comes for a token that leaves there, two for one that leaves
    at the fifth. K and V that are propagated need all of them."""
    trace, work, link_ms = leaving((0.4, 0.5)), workload(1, 5, 60), 2.5
    served = run(late(PerToken(0.7), kv_rule=kv_rule), profile_of(link_ms, kv_projection_s=1e-5), work, trace)
    exits = replay(trace, PerToken(0.7), N_LAYERS).exit_index
    record, expected_ns, layers = served.records[0], 0.0, 0
    for row in rows_of(work, trace)[0][1:]:
        leaf = int(exits[row])
        own_ms = 1e3 * (EXITS[leaf] * LAYER_S + (leaf + 1 if leaf < 2 else 3) * HEAD_S + HOST_S)
        if kv_rule is KvRule.PROPAGATE:
            own_ms += 1e3 * (N_LAYERS - EXITS[leaf]) * 1e-5
        come = (5 if kv_rule is KvRule.PROPAGATE else EXITS[leaf] - RESIDENT)
        if kv_rule is KvRule.RECOMPUTE:
            continue
        expected_ns += max(own_ms, come * link_ms) * MS
        layers += come
    if kv_rule is KvRule.RECOMPUTE:  # what is owed is more rows of the same layers
        layers = sum(EXITS[int(exits[row])] - RESIDENT for row in rows_of(work, trace)[0][1:])
    else:
        assert record.last_token_ns - record.first_token_ns == pytest.approx(expected_ns, abs=60)
    assert served.run.stats.late_layers == layers + 5  # the prompt runs all layers


def test_drafts_of_layers_that_stay_do_not_wait_and_a_pass_waits_once() -> None:
    """Three drafts at the third layer, all accepted: four tokens for one time over the link."""
    trace = replace(leaving((1.0, 1.0)), agree=np.ones((500, 3), np.bool_))
    served = run(late(SelfSpeculation(3, 3)), profile_of(4.0), workload(1, 5, 1 + 4 * 5), trace)
    draft_ms, record = 1e3 * (3 * LAYER_S + HEAD_S), served.records[0]
    pass_ms = 3 * draft_ms + max(1e3 * (N_LAYERS * LAYER_S + HEAD_S + HOST_S), 5 * 4.0)
    assert record.last_token_ns - record.first_token_ns == pytest.approx(5 * pass_ms * MS, abs=50)
    assert served.run.stats.late_layers == 5 * (5 + 1)


def test_predictions_price_late_layers_as_they_are_served() -> None:
    profile = profile_of(2.0, 1.25)
    served = run(late(), profile)
    record = served.records[0]
    predicted = decode_time_s(profile.with_resident(RESIDENT), fixed_depth(N_LAYERS), np.array([1]), 6)
    assert (record.last_token_ns - record.first_token_ns) / 10 == pytest.approx(1e9 * float(predicted[0]), abs=1)


@pytest.mark.slow
def test_compiled_and_interpreted_are_the_same_to_the_bit() -> None:
    trace, work = leaving((0.4, 0.5)), workload(30, Exponential(9), Exponential(25), AllAtOnce())
    for rule, kv_rule in ((PerToken(0.7), KvRule.COPY), (SelfSpeculation(3, 2), KvRule.NONE)):
        how, deployment = {"max_running_requests": 4}, late(rule, kv_rule=kv_rule)
        each = [run(deployment, profile_of(1.1, 1.3), work, trace, compiled=code, **how) for code in (False, True)]
        assert each[0].by_request() == each[1].by_request()
        assert asdict(each[0].run.stats) == asdict(each[1].run.stats)


# --- memory, caps and switches


def test_the_memory_that_is_freed_is_exact() -> None:
    """Three layers and room for two more, of eight: three layers' bytes are free for K and V."""
    rig = {"hbm_bytes": 68 + N_LAYERS * LAYER_BYTES + 640, "utilisation": 1.0, "block_tokens": 1}
    pools = {}
    for name, deployment in (("late", late()), ("whole", full_depth(layers=N_LAYERS))):
        found: list[int] = []
        run(deployment, profile_of(1.0), watch=lambda s, to=found: to.append(int(s._replica.state.total_blocks)), **rig)
        pools[name] = found[-1]
    token_bytes = 4 * N_LAYERS
    assert pools == {"whole": 640 // token_bytes, "late": (640 + 3 * LAYER_BYTES) // token_bytes}


def test_a_model_that_does_not_fit_serves_with_late_layers() -> None:
    held, work = 68 + 5 * LAYER_BYTES, workload(1, 1, 2)
    rig = {"hbm_bytes": held + 3 * 4 * N_LAYERS, "utilisation": 1.0, "block_tokens": 1}
    with pytest.raises(UserError, match="must fit"):
        run(full_depth(layers=N_LAYERS), profile_of(1.0), work, **rig)
    served = run(late(), profile_of(1.0), work, **rig)
    assert held < served.run.stats.hbm_peak_bytes <= rig["hbm_bytes"]


def test_a_cap_is_lifted_by_late_layers_without_a_load_of_them_and_by_a_load_of_the_rest() -> None:
    """Cut at the third layer; then all eight, of which the two that have room first are loaded; then all stay: three
    more are loaded, which takes twice as long beside layers that come late. Each time the text is computed again."""
    layer_ms = 2.0
    profile = profile_of(layer_ms)
    cut = Deployment(Placement("flat", 3), FixedCap(0.7), kv_rule=KvRule.NONE, triggers=(AtTime(0),))
    then = [late(triggers=(AtTime(100 * MS),)), full_depth(layers=N_LAYERS)]
    served = run(Scripted(cut, list(then)), profile, workload(1, 5, 60))
    stats = served.run.stats
    assert stats.loads == 2
    assert stats.load_ns == (2 + 2 * 3) * layer_ms * MS
    assert served.records[0].preemptions == 1  # the depth of tokens changed once
    sizes = [profile.weight_bytes(each.active.held_layers) for each in (cut, *then)]
    assert np.diff(sizes).tolist() == [2 * LAYER_BYTES, 3 * LAYER_BYTES]


def test_a_switch_to_late_layers_loads_what_stays_as_it_is_predicted() -> None:
    profile = replace(profile_of(2.0), model=replace(profile_of(2.0).model, name="b"))
    both = {"flat": profile_of(2.0), "b": profile}
    traces = {name: synthetic_trace(name, EXITS, chars_per_token=1) for name in both}
    first = replace(full_depth("flat", N_LAYERS), triggers=(AtTime(5 * MS),))
    to = replace(full_depth("b", N_LAYERS), active=Placement("b", N_LAYERS, RESIDENT))
    served = serve(workload(1, 5, 40), Scripted(first, [to]), both, traces)
    n_bytes = profile.weight_bytes(RESIDENT + LATE_ROOM)
    assert served.run.stats.load_ns == round(n_bytes / profile.load_bytes_per_s * 1e9)
    known = served.run.servers[0]._replica.situation
    now = Underway(first.active, (), 1, 0.01)
    way = transition(known, now, to.active, Load(5, 40))
    assert (way.load_bytes, round(way.load_s * 1e9)) == (n_bytes, served.run.stats.load_ns)
    back = transition(known, replace(now, active=to.active), full_depth("b", N_LAYERS).active, Load(5, 40))
    assert back.load_bytes == profile.weight_bytes(N_LAYERS) - n_bytes
    request_bytes = 4 * N_LAYERS * 16 * 3  # of 45 tokens, in blocks of 16
    tight = replace(known, memory=MemoryBudget(n_bytes + request_bytes, 1.0), expected=None)
    assert batch_capacity(tight, to.active, 45) == 1
    assert batch_capacity(tight, full_depth("b", N_LAYERS).active, 45) == 0


# --- sleep levels


def test_a_discarded_model_comes_from_files_and_a_sleeping_one_over_the_link() -> None:
    """Fixed part and rate: 0.17 s + bytes / 12.7 GB/s, as two published points are."""
    profile = flat(load_ms=10.0)["a"]
    profile = profile.with_runtime(replace(profile.runtime, load_fixed_s=0.17))
    link, slow, fast = profile.load_bytes_per_s, 0.25, 4.0
    assert profile.load_time_s(WHOLE) == pytest.approx(0.18)
    assert profile.with_disk_rate(slow * link).from_files().load_time_s(WHOLE) == pytest.approx(0.17 + 0.04)
    # what reads faster than the link waits for it
    assert profile.with_disk_rate(fast * link).from_files().load_time_s(WHOLE) == pytest.approx(0.18)
    with pytest.raises(UserError, match="disk_gb_per_s"):
        profile.from_files()


def test_a_switch_waits_for_files_as_long_as_predicted() -> None:
    """The whole model in 10 ms over the link, in 40 ms from files."""
    for make, load_ms in ((lambda p: p, 10), (lambda p: p.with_disk_rate(p.load_bytes_per_s / 4).from_files(), 40)):
        both = {name: make(flat(name)[name]) for name in "ab"}
        first = replace(full_depth("a", batch_limit=1), triggers=(AtTime(5 * MS),))
        served = run_flat(first, [full_depth("b")], workload(2, 5, 20), both, hbm_bytes=WHOLE + 60 * 16, block_tokens=1)
        assert served.run.stats.load_ns == load_ms * MS
        assert served.run.stats.switches == 1
        assert both["b"].load_time_s(WHOLE) == pytest.approx(load_ms / 1e3)


def test_loads_from_files_take_less_of_the_cards_bandwidth_and_late_layers_come_as_before() -> None:
    """Half of the bandwidth at the link's rate, an eighth at a quarter of it; late layers wait in host memory still."""
    profile = profile_of(2.0, 2.0)
    slow = profile.with_disk_rate(profile.load_bytes_per_s / 4).from_files()
    assert slow.load_slowdown == pytest.approx(1 / (1 - 0.5 / 4))
    alone, from_files = (run(late(), each).by_request() for each in (profile, slow))
    assert alone[0].last_token_ns == pytest.approx(from_files[0].last_token_ns, abs=20)


def test_the_rate_of_files_is_kept_with_a_profile_and_known_of_measured_ones(tmp_path) -> None:
    write_profile(flat()["a"].with_disk_rate(3e9), tmp_path / "a@flat")
    assert read_profile(tmp_path / "a@flat").disk_bytes_per_s == 3e9
    measured = load_profile("smollm2-135m@epyc-2core")
    assert measured.disk_bytes_per_s == measured.provenance.details["loads"]["checkpoint_bytes_per_s"]


# --- policies, and what is refused


@pytest.mark.parametrize("name", ["full_depth", "early_exit", "self_speculation"])
def test_policies_keep_some_layers_in_host_memory(name: str) -> None:
    asked = {"resident_layers": RESIDENT, **({"threshold": 0.7} if name == "early_exit" else {})}
    work, trace = workload(2, 5, 12), leaving((0.5, 0.5))
    served = run(make_policy(name, asked), profile_of(1.0), work, trace)
    deployment = served.run.servers[0].decisions[0].deployment
    assert deployment.active == Placement("flat", N_LAYERS, RESIDENT)
    assert served.run.stats.late_layers > 0
    whole = run(make_policy(name, {**asked, "resident_layers": None}), profile_of(1.0), work, trace)
    assert whole.run.stats.late_layers == 0
    assert whole.run.stats.hbm_peak_bytes > served.run.stats.hbm_peak_bytes
    for wrong in (0, N_LAYERS - LATE_ROOM):
        with pytest.raises(UserError, match=r"policy.resident_layers.*from 1 to 5 of 8 layers"):
            run(make_policy(name, {**asked, "resident_layers": wrong}), profile_of(1.0), work, trace)


def test_what_a_policy_may_not_ask_for() -> None:
    found = run(late(), profile_of(1.0))
    known = found.run.servers[0]._replica.situation
    assert fault_of(late(), known) is None
    for resident in (0, N_LAYERS - LATE_ROOM, 2.5):
        assert fault_of(late(resident=resident), known)[0] == "active"
    assert fault_of(late(probe=Probe(("flat",), 1)), known)[0] == "probe"
