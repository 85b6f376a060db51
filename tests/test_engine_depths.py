"""What every iteration runs, layer by layer and token by token, against a reference that has no arrays."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.rule import Clairvoyant, Confidence, ExitRule, FixedCap, FullDepth, PerToken
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.deployment import BatchingRule, Deployment, KvRule, Placement
from helios_sim.profile.composition import Composition
from helios_sim.workload import AllAtOnce, ClosedLoop, DrawnLengths, Exponential, Fixed, Poisson, TaskMix, Workload
from priced import priced_profile
from rig import Scripted, composition_of, kv_rules, serve

EXITS = (2, 4, 6)
N_LAYERS = 6


@dataclass
class Work:
    """What one iteration does in each layer (from 1), after each exit, and in the head."""

    rows: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    kv_tokens: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    propagated: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    checked: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # through the head
    classified: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    prefill: list[tuple[int, int, int]] = field(default_factory=list)
    sampled: int = 0

    def comparable(self) -> tuple:
        counts = (self.rows, self.kv_tokens, self.propagated, self.checked, self.classified)
        return (*({k: n for k, n in count.items() if n} for count in counts), sorted(self.prefill), self.sampled)


def work_of(c: Composition, j: int) -> Work:
    work = Work(sampled=int(c.sampled_tokens[j]), prefill=[(p.tokens, p.context_tokens, p.layers) for p in c.prefill])
    for s, (start, end) in enumerate(zip((0, *c.bounds[:-1]), c.bounds, strict=True)):
        for layer in range(start + 1, end + 1):
            work.rows[layer] = int(c.decode_tokens[j, s])
            work.kv_tokens[layer] = int(c.decode_kv_tokens[j, s])
            work.propagated[layer] = 0 if c.propagated_tokens is None else int(c.propagated_tokens[j, s])
        work.checked[end] = 0 if c.check_tokens is None else int(c.check_tokens[j, s])
        work.classified[end] = 0 if c.classifier_tokens is None else int(c.classifier_tokens[j, s])
    return work


@dataclass
class Answer:
    """One request's tokens so far."""

    layers_run: int = 0
    early: int = 0
    breaches: int = 0
    agreed: int = 0
    evaluated: int = 0
    bits: float = 0.0
    owed: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # by layer, K and V not computed there yet


class Reference:
    """Follows the schedule that the server made, and works out everything else from the rules' own words."""

    def __init__(self, trace: ExitTrace, deployment: Deployment) -> None:
        self.trace, self.deployment = trace, deployment
        self.loaded = deployment.active.layers
        self.run = deployment.run_layers or self.loaded
        self.answers: dict[int, Answer] = defaultdict(Answer)

    def confident(self, row: int, layers: int) -> bool:
        record = self.trace.recorded(Confidence.CLASSIFIER if self.by_classifier else Confidence.MAX_PROBABILITY)
        return bool(record[row, EXITS.index(layers)] >= 0.7)

    @property
    def by_classifier(self) -> bool:
        return getattr(self.deployment.exit_rule, "confidence", None) is Confidence.CLASSIFIER

    def agrees(self, row: int, layers: int) -> bool:
        return bool(self.trace.agree[row, EXITS.index(layers)])

    def observed(self, generated: int) -> bool:
        return self.deployment.observe_tokens is not None and generated < self.deployment.observe_tokens

    def exits(self) -> list[int]:
        return [e for e in EXITS if e <= self.loaded]

    def leaves(self, row: int, generated: int) -> int:
        """After which layer a token leaves on its own."""
        rule = self.deployment.exit_rule
        if self.observed(generated):
            return self.loaded
        if isinstance(rule, PerToken):
            return next((e for e in self.exits() if self.confident(row, e)), self.loaded)
        if isinstance(rule, Clairvoyant):
            return next((e for e in self.exits() if self.agrees(row, e)), self.loaded)
        return self.run

    def is_breach(self, row: int, generated: int) -> bool:
        rule = self.deployment.exit_rule
        if self.observed(generated):
            return False
        if isinstance(rule, FixedCap):
            return self.run < N_LAYERS and not self.confident(row, self.run)
        if isinstance(rule, PerToken):
            return self.loaded < N_LAYERS and not any(self.confident(row, e) for e in self.exits())
        return False

    def decode(self, tokens: list[tuple[int, int, int, int]]) -> Work:
        """One iteration for (request, trace row, tokens generated before, context before)."""
        work, rule, kv_rule = Work(), self.deployment.exit_rule, self.deployment.kv_rule
        lazy = self.deployment.batching is BatchingRule.LAZY
        depth = {request: self.leaves(row, generated) for request, row, generated, _ in tokens}
        if depth and lazy and isinstance(rule, PerToken | Clairvoyant):
            depth = dict.fromkeys(depth, max(depth.values()))
        for request, row, generated, context in tokens:
            answer, layers = self.answers[request], depth[request]
            answer.layers_run += layers
            answer.early += layers < N_LAYERS
            answer.breaches += self.is_breach(row, generated)
            answer.agreed += self.agrees(row, layers)
            answer.bits += float(self.trace.bits[row, EXITS.index(layers)])
            answer.evaluated += self.observed(generated)
            for layer in range(1, layers + 1):
                again = answer.owed.pop(layer, 0)
                work.rows[layer] += 1 + again
                work.kv_tokens[layer] += (1 + again) * (context + 1)
            if isinstance(rule, PerToken):
                for layer in range(layers + 1, self.loaded + 1):
                    if kv_rule is KvRule.PROPAGATE or (lazy and kv_rule is KvRule.RECOMPUTE):
                        work.propagated[layer] += 1
                    elif kv_rule is KvRule.RECOMPUTE:
                        answer.owed[layer] += 1
            per_token, observed = isinstance(rule, PerToken), self.observed(generated)
            by_head = observed or (per_token and not self.by_classifier)
            for e in EXITS:
                below = e <= layers and e < self.loaded
                work.checked[e] += by_head and below
                work.classified[e] += per_token and self.by_classifier and below
            if isinstance(rule, FixedCap) and self.by_classifier and self.run < N_LAYERS:
                work.classified[self.run] += 1  # the counter of breaches needs to know
            # what left after a look at its logits has its token already
            work.sampled += not (per_token and not self.by_classifier and layers < self.loaded)
        return work

    def prefill(self, work: Work, request: int, row: int, generated: int, part) -> None:
        rule = self.deployment.exit_rule
        layers = self.loaded if isinstance(rule, PerToken) else self.leaves(row, generated)
        work.prefill.append((part.tokens, part.context_tokens, layers))
        answer = self.answers[request]
        answer.owed.clear()  # whatever was cached before was given up
        if part.finishes:
            work.sampled += 1
            answer.layers_run += layers
            answer.early += layers < N_LAYERS
            answer.agreed += self.agrees(row, layers)
            answer.bits += float(self.trace.bits[row, EXITS.index(layers)])
            answer.evaluated += self.observed(generated)
            if self.observed(generated):
                for e in self.exits()[:-1]:
                    work.checked[e] += 1


RULES: list[tuple[ExitRule, int, int | None]] = [
    (FullDepth(), 6, None),
    (FixedCap(0.7), 4, None),
    (FixedCap(0.7), 6, 2),
    (FixedCap(0.7), 4, 2),
    (FixedCap(0.7, Confidence.CLASSIFIER), 4, 2),
    (FixedCap(0.7, Confidence.CLASSIFIER), 6, 2),
    (FixedCap(0.7, Confidence.CLASSIFIER), 6, None),
    (PerToken(0.7), 6, None),
    (PerToken(0.7, Confidence.CLASSIFIER), 6, None),
    (PerToken(0.7, Confidence.CLASSIFIER), 4, None),
    (PerToken(0.7), 4, None),
    (Clairvoyant(), 6, None),
]


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    rule, layers, run_layers = draw(st.sampled_from(RULES))
    batching = draw(st.sampled_from([BatchingRule.EACH_TOKEN, BatchingRule.LAZY]))
    observe = draw(st.sampled_from([None, 1, 5])) if batching is BatchingRule.EACH_TOKEN else None
    return Deployment(
        Placement("a", layers), rule, batching=batching, kv_rule=draw(st.sampled_from(kv_rules(rule))),
        run_layers=run_layers,
        observe_tokens=observe,
    )  # fmt: skip


workloads = st.builds(
    lambda arrivals, prompt, output, n: Workload(
        arrivals, DrawnLengths(prompt, output), TaskMix.single("text"), n, chars_per_token=None
    ),
    st.sampled_from([AllAtOnce(), ClosedLoop(2), Poisson(150.0)]),
    st.sampled_from([Fixed(1), Fixed(20), Exponential(30)]),
    st.sampled_from([Fixed(2), Fixed(33), Exponential(25)]),
    st.integers(1, 12),
)


def rows_of(member, generated: int) -> int:
    span = member.span
    return span.first + (span.start + generated) % span.length


def check_run(deployment: Deployment, workload: Workload, pool_blocks: int) -> int:
    """Serves, compares every iteration that counted and every record. Returns how many were preempted."""
    trace = synthetic_trace("a", EXITS, tokens=97, seed=5, chars_per_token=1)
    profile = priced_profile(
        "a", n_layers=N_LAYERS, layer_s=1e-4, row_s=1e-5, kv_token_s=1e-6, prefill_token_s=2e-6, classifier_s=1e-6
    )
    reference = Reference(trace, deployment)

    def compare(server, plan, start_ns: int, end_ns: int) -> None:
        composition = composition_of(server)
        members = plan.members
        assert not {part.index for part in plan.prefill} & set(range(plan.decoding))
        work = reference.decode([
            (m.request.request_id, rows_of(m, m.generated), m.generated, m.context_tokens)
            for m in members[: plan.decoding]
        ])  # fmt: skip
        for part in plan.prefill:
            member = members[part.index]
            row = rows_of(member, member.generated)
            reference.prefill(work, member.request.request_id, row, member.generated, part)
        assert work_of(composition, 0).comparable() == work.comparable()
        price_ns = round(float(profile.iteration_time_s(composition)[0]) * 1e9)
        assert end_ns - start_ns == max(price_ns, 1)

    served = serve(
        workload, Scripted(deployment), {"a": profile}, {"a": trace}, utilisation=1.0, max_batch_tokens=32,
        hbm_bytes=profile.weight_bytes(deployment.active.layers)
        + pool_blocks * 16 * profile.kv_bytes_per_token(deployment.active.layers),
        on_plan=compare,
    )  # fmt: skip
    for record in served.records:
        answer = reference.answers[record.request_id]
        counts = (record.layers_run, record.early_tokens, record.breach_tokens, record.agreed_tokens)
        assert counts == (answer.layers_run, answer.early, answer.breaches, answer.agreed)
        assert record.evaluated_tokens == answer.evaluated
        assert record.microbits == pytest.approx(1e6 * answer.bits, abs=record.output_tokens)
    return served.run.stats.preemptions


@pytest.mark.slow
@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(
    deployment=deployments(),
    workload=workloads,
    pool_blocks=st.sampled_from([8, 12, 1000]),
)
def test_every_iteration_runs_what_the_rules_say(deployment, workload, pool_blocks) -> None:
    check_run(deployment, workload, pool_blocks)


def test_debts_are_repaid_across_preemptions() -> None:
    """A run that is known to preempt, and to come back to layers that it left out."""
    deployment = Deployment(Placement("a", 6), PerToken(0.7), kv_rule=KvRule.RECOMPUTE)
    lengths = DrawnLengths(Fixed(20), Exponential(40, minimum=10))
    workload = Workload(AllAtOnce(), lengths, TaskMix.single("text"), 12, chars_per_token=None)
    assert check_run(deployment, workload, 12) > 3
