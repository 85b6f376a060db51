"""The policy oracle: a bound from knowing every exit and every request.

At admission it takes a model for each request; all weights are loaded for free. Each token runs to the depth that the
plan says, unchecked, and the prompt to the depth of the first token. K and V of deeper layers are neither computed nor
missed.

Quality is measured by a loss d of each token, and by the loss a(r, m) that request r may have on model m. The sum of
all d must not exceed the sum of all a. For a floor in agreement, d is 1 if the exit gives another token than full
depth, and a is epsilon times the number of tokens. For a floor in bits per character, d is the bits of the text's token
at the exit, and a is the allowed multiple of the bits that the reference needs for the text.

No policy that keeps to the floor is faster (one request at a time, epoch_requests 1), for this reason. Let a policy
serve every request on one model each. Running token j of request r on model m to exit e takes at least t(r, m, j, e),
the profile's time of that iteration alone; let s(r) be the sum of d. The policy's time is at least sum t, and since
sum (s - a) <= 0, for any price u >= 0

    time >= sum t >= sum t + u sum (s - a) >= sum over r of min over m of [ sum over j of min over e of (t + u d)
                                                                             - u a ].

The plan takes exactly these minima, so the right side is the plan's own time plus u sum (s - a) over the plan. u is
chosen so that the plan spends the budget, sum (s - a) >= 0 (or u is 0). Hence the plan's time is no longer than the
policy's. Requests at the critical price are split so that the budget is overspent by less than one request can lose:
the oracle is a relaxed bound and may itself miss the floor by that much. The argument does not cover a policy that
moves a request to another model in mid-answer. With larger batches or epochs the plan is a reference, not a proven
bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.rule import Clairvoyant
from helios_sim.policy.checks import check_positive
from helios_sim.policy.deployment import Cause, Deployment, KvRule, Placement
from helios_sim.policy.telemetry import Candidate, Objective, Outlook, Situation, Telemetry
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.request import Request

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
DOUBLINGS = 60  # most doublings of a price that is too low
CLOSE = 0.001  # loss per token by which a plan may overspend
BISECTIONS = 60  # of the price; the remaining error is below the last bits of the times


@dataclass(frozen=True, slots=True, eq=False)
class TokenTimes:
    """Times and losses of all T answer tokens of one model at E exits. R requests follow each other, none is empty."""

    exits: tuple[int, ...]
    time_s: FloatArray  # (T, E) time to run the token to each exit, alone on the card
    loss: BoolArray | FloatArray  # (T, E) loss of leaving there; not negative
    allowed: FloatArray  # (R,) loss allowed for each request
    first: IntArray  # (R,) where each request's tokens begin
    possible: BoolArray  # (R,) whether the model's context is long enough

    @property
    def tokens(self) -> IntArray:
        """Number of tokens of each request, (R,)."""
        return np.diff(np.append(self.first, len(self.time_s)))

    def cheapest(self, price_s: float) -> IntArray:
        """The exit of each token with the least time plus price of its loss, (T,); the deepest among equals."""
        cost = (self.time_s + price_s * self.loss)[:, ::-1]
        return np.asarray(cost.shape[1] - 1 - cost.argmin(axis=1), dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The plan: model and exits of every request, in their order. It is also the server's `ServicePlan`."""

    models: tuple[str, ...]
    request_ids: Mapping[int, int]  # from a request's id to its place
    tables: tuple[TokenTimes, ...]  # per model
    price_s: float  # of a loss of 1
    model_index: IntArray  # (R,)
    exit_index: tuple[IntArray, ...]  # per model, (T,)
    slack: FloatArray  # (R,) loss above what is allowed: s - a
    time_s: FloatArray  # (R,)

    def model(self, request_id: int) -> str:
        return self.models[int(self.model_index[self.request_ids[request_id]])]

    def layers(self, request_id: int) -> IntArray:
        """Depth of each answer token, (n,)."""
        place = self.request_ids[request_id]
        m = self.model_index[place]
        table = self.tables[m]
        span = slice(table.first[place], table.first[place] + table.tokens[place])
        return np.asarray(np.array(table.exits, dtype=np.int64)[self.exit_index[m][span]])


def make_plan(
    models: Sequence[str],
    tables: Sequence[TokenTimes],
    request_ids: Sequence[int],
    epoch_requests: int = 1,
) -> Plan:
    """Makes the plan of the module's argument, for at least one request; the plan of least loss if none is allowed."""

    def at(price_s: float) -> Plan:
        return _plan_at(price_s, tuple(models), tuple(tables), request_ids, epoch_requests)

    low = at(0.0)
    if low.slack.sum() <= 0:
        return low  # even losses for free stay within the budget
    # At twice the largest time between a token's exits no loss of 1 pays. If each model has one exit, only models
    # differ, and the largest time of a token takes its place.
    apart_s = max(float(np.ptp(t.time_s, axis=1).max()) for t in tables) or max(float(t.time_s.max()) for t in tables)
    high = at(2.0 * apart_s)
    for _ in range(DOUBLINGS):  # losses below 1, or a choice between models, may need a higher price
        if high.slack.sum() <= 0:
            break
        high = at(2.0 * high.price_s)
    if high.slack.sum() >= 0:
        return high  # no loss is allowed, or every plan loses more than is allowed
    of_one_request = max(int(t.tokens.max()) * float(t.loss.max()) for t in tables)
    close = min(of_one_request, max(len(t.time_s) for t in tables) * CLOSE)
    for _ in range(BISECTIONS):
        if low.slack.sum() < close:
            return low
        middle = at(0.5 * (low.price_s + high.price_s))
        if middle.slack.sum() >= 0:
            low = middle
        else:
            high = middle
    return _split(low, high)


def _plan_at(
    price_s: float,
    models: tuple[str, ...],
    tables: tuple[TokenTimes, ...],
    request_ids: Sequence[int],
    epoch_requests: int,
) -> Plan:
    """The plan at a price: each request (or epoch) on the model of least Lagrangian, tokens at their cheapest exits."""
    n_requests = len(request_ids)
    epochs = np.arange(0, n_requests, epoch_requests)
    exits, times, slacks, costs = [], [], [], []
    for table in tables:
        chosen = table.cheapest(price_s)
        rows = np.arange(len(chosen))
        time_s = np.add.reduceat(table.time_s[rows, chosen], table.first)
        slack = np.add.reduceat(table.loss[rows, chosen].astype(np.float64), table.first) - table.allowed
        cost = np.where(table.possible, time_s + price_s * slack, np.inf)
        exits.append(chosen)
        times.append(time_s)
        slacks.append(slack)
        costs.append(np.add.reduceat(cost, epochs))
    best = np.repeat(np.argmin(costs, axis=0), np.diff(np.append(epochs, n_requests)))
    place = np.arange(n_requests)
    return Plan(
        models=models,
        request_ids={request_id: i for i, request_id in enumerate(request_ids)},
        tables=tables,
        price_s=price_s,
        model_index=best.astype(np.int64),
        exit_index=tuple(exits),
        slack=np.array(slacks)[best, place],
        time_s=np.array(times)[best, place],
    )


def _split(low: Plan, high: Plan) -> Plan:
    """Mixes two plans that are both optimal at the critical price: the first requests follow `low`, as few as suffice
    to use up the budget, and the others `high`."""
    gained = np.cumsum(low.slack - high.slack)
    n = int(np.argmax(gained >= -high.slack.sum())) + 1
    first = np.arange(len(low.slack)) < n
    exit_index = tuple(
        np.where(np.repeat(first, table.tokens), a, b)
        for table, a, b in zip(low.tables, low.exit_index, high.exit_index, strict=True)
    )
    return replace(
        low,
        model_index=np.where(first, low.model_index, high.model_index),
        exit_index=exit_index,
        slack=np.where(first, low.slack, high.slack),
        time_s=np.where(first, low.time_s, high.time_s),
    )


@dataclass(frozen=True, slots=True)
class OracleParameters:
    """Settings of `policy=oracle`."""

    epoch_requests: int = 1  # consecutive requests that share a model; more than 1 only makes sense with batches
    batch_limit: int | None = None  # None means the server's own limit; set 1 for the bound

    def __post_init__(self) -> None:
        check_positive("epoch_requests", self.epoch_requests)
        check_positive("batch_limit", self.batch_limit)


class OraclePolicy:
    """The oracle's decisions: it plans once, at the start, and is never asked again."""

    def __init__(self, parameters: OracleParameters) -> None:
        self.parameters = parameters

    def start(self, situation: Situation) -> Deployment:
        """Deploys the plan. Raises UserError if the requests to come are not known, or no model meets the floor."""
        requests = () if situation.outlook is None else situation.outlook.requests()
        if not requests:
            allowed = "the requests to come and their exits must be known, and there must be one"
            raise UserError("policy", "oracle", allowed, "use it in simulation, on a workload that ends")
        objective = situation.objective
        models = [name for name, c in situation.candidates.items() if _meets_absolute_floor(c, objective)]
        if not models:
            allowed = "at least one must meet the floor in bits per character"
            raise UserError("models", ", ".join(situation.candidates), allowed, "loosen the floor")
        tables = [token_times(situation, model, requests) for model in models]
        ids = [request.request_id for request in requests]
        plan = make_plan(models, tables, ids, self.parameters.epoch_requests)
        first = plan.model(ids[0])
        return Deployment(
            active=Placement(first, situation.candidates[first].profile.model.n_layers),
            exit_rule=Clairvoyant(objective.max_disagreement),
            kv_rule=KvRule.NONE,
            batch_limit=self.parameters.batch_limit,
            instant=True,
            plan=plan,
            reason="every request and every exit is known, and no change costs anything",
            evidence=_evidence(plan),
        )

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        return None


def _meets_absolute_floor(candidate: Candidate, objective: Objective) -> bool:
    """Whether recorded bits at full depth are within the absolute floor; true if bits or floor are not known."""
    bits, most = candidate.offline.bits_per_char, objective.max_bits_per_char
    return bits is None or most is None or bool(bits[-1] <= most)


def token_times(situation: Situation, model: str, requests: Sequence[Request]) -> TokenTimes:
    """Times and losses of all answer tokens, each request alone on the card.

    The first token is the prompt's prefill; token j (from 0) reads prompt + j tokens. The loss is in bits if the
    objective's floor follows a reference, else in agreement with full depth.
    """
    assert situation.outlook is not None
    candidate = situation.candidates[model]
    profile, exits = candidate.profile, candidate.offline.exits
    agrees = [situation.outlook.agreement(model, request) for request in requests]
    lengths = np.array([len(a) for a in agrees], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    prompts = np.array([profile.model.tokens(request.prompt_chars) for request in requests], dtype=np.int64)
    contexts = np.repeat(prompts, lengths) + np.arange(int(lengths.sum())) - np.repeat(first, lengths)
    seen, which = np.unique(contexts, return_inverse=True)
    prompt_seen, prompt_which = np.unique(prompts, return_inverse=True)
    time_s = np.empty((len(contexts), len(exits)))
    for e, layers in enumerate(exits):
        time_s[:, e] = _decode_alone_s(profile, layers, seen)[which]
        prefills = [profile.prompt_time_s(layers, p, situation.max_batch_tokens)[0] for p in prompt_seen.tolist()]
        time_s[first, e] = np.array(prefills)[prompt_which]
    possible = prompts + lengths <= profile.model.max_context_tokens
    if situation.objective.max_bits_ratio is not None:
        loss: NDArray[Any] = np.concatenate([_bits(situation.outlook, model, request) for request in requests])
        allowed: NDArray[Any] = situation.objective.max_bits_ratio * reference_bits(situation, requests)
    else:
        loss = ~np.concatenate(agrees)
        allowed = situation.objective.max_disagreement * lengths
    return TokenTimes(exits, time_s, loss, allowed, first, possible)


def reference_bits(situation: Situation, requests: Sequence[Request]) -> NDArray[np.float64]:
    """Bits of each request's text under the reference at full depth, (R,); by default that is the best single model.

    The best single model has the least sum of bits, so a policy that may follow a better reference at any time is not
    allowed more bits in all.
    """
    assert situation.outlook is not None
    outlook, named = situation.outlook, situation.objective.bits_reference
    models = situation.candidates if named is None else [named]
    needed = [np.array([_bits(outlook, model, request)[:, -1].sum() for request in requests]) for model in models]
    return min(needed, key=lambda bits: float(bits.sum()))


def _bits(outlook: Outlook, model: str, request: Request) -> NDArray[np.float64]:
    bits = outlook.bits(model, request)
    if bits is None:
        raise UserError(
            "objective.max_bits_ratio", model, "bits of human text are recorded for each model", "take other traces"
        )
    return bits


def _decode_alone_s(profile: Profile, layers: int, contexts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Seconds of one token at each context length, (K,)."""
    one = np.ones((len(contexts), 1), dtype=np.int64)
    composition = Composition((layers,), one, contexts[:, None].astype(np.int64), sampled_tokens=one[:, 0])
    return profile.iteration_time_s(composition)


def _evidence(plan: Plan) -> dict[str, object]:
    allowed = np.array([t.allowed for t in plan.tables])[plan.model_index, np.arange(len(plan.slack))]
    return {
        "requests": {name: int(np.count_nonzero(plan.model_index == m)) for m, name in enumerate(plan.models)},
        "loss": float((plan.slack + allowed).sum()),
        "loss_allowed": float(allowed.sum()),
        "price_s_per_loss": plan.price_s,
        "busy_s": float(plan.time_s.sum()),
    }
