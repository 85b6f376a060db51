"""Which model serves each request and how deep each token runs, when all is known. Knows times, no server.

Quality is a loss per token, d, and what request r may lose on model m, a(r, m), over which the sum of all losses must
not go: for a floor in agreement, d is 1 where the exit gives another token than full depth and a is epsilon times the
tokens; for one in bits per character, d is the bits of the text's token there and a what the reference needs for it.

Why no policy that keeps to the floor is faster (one request at a time, epoch_requests 1). Let a policy serve every
request on one model each. Running token j of request r on model m to exit e takes at least t(r, m, j, e), the
profile's time of that iteration alone; let s(r) be the sum of d. The policy's time is at least sum t, and since
sum (s - a) <= 0, for any price u >= 0

    time >= sum t >= sum t + u sum (s - a) >= sum over r of min over m of [ sum over j of min over e of (t + u d)
                                                                             - u a ].

The plan takes exactly these minima, so the right side is the plan's own time plus u sum (s - a) over the plan. u is
chosen so that the plan spends the budget, sum (s - a) >= 0 (or u is 0): hence the plan's time is no longer than the
policy's. Requests at the critical price are split so that the budget is overspent by less than one request can lose:
the oracle is a relaxed bound and may itself miss the floor by that much. A policy that moves a request to another
model in mid-answer is outside the argument. With larger batches or epochs the same plan is a reference, no proven
bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
DOUBLINGS = 60  # of a price that is too low
CLOSE = 0.001  # loss per token by which a plan may overspend
BISECTIONS = 60  # of the price; what is left is below the last bits of the times


@dataclass(frozen=True, slots=True, eq=False)
class TokenTimes:
    """All answer tokens of one model, request after request: T tokens, E exits, R requests, at least one each."""

    exits: tuple[int, ...]
    time_s: FloatArray  # (T, E) of running the token to each exit, alone on the card
    loss: BoolArray | FloatArray  # (T, E) of leaving there; not negative
    allowed: FloatArray  # (R,) loss of each request
    first: IntArray  # (R,) where each request's tokens begin
    possible: BoolArray  # (R,) the model's context is long enough

    @property
    def tokens(self) -> IntArray:
        """(R,) of each request."""
        return np.diff(np.append(self.first, len(self.time_s)))

    def cheapest(self, price_s: float) -> IntArray:
        """(T,) exit of least time plus price of its loss; the deepest of equals."""
        cost = (self.time_s + price_s * self.loss)[:, ::-1]
        return np.asarray(cost.shape[1] - 1 - cost.argmin(axis=1), dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Model and exits of every request, in their order. It is also the server's `ServicePlan`."""

    models: tuple[str, ...]
    request_ids: Mapping[int, int]  # to the request's place
    tables: tuple[TokenTimes, ...]  # per model
    price_s: float  # of a loss of 1
    model_index: IntArray  # (R,)
    exit_index: tuple[IntArray, ...]  # per model, (T,)
    slack: FloatArray  # (R,) loss above what is allowed: s - a
    time_s: FloatArray  # (R,)

    def model(self, request_id: int) -> str:
        return self.models[int(self.model_index[self.request_ids[request_id]])]

    def layers(self, request_id: int) -> IntArray:
        """(n,) depth of each answer token."""
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
    """The plan of the module's argument, for at least one request; that of least loss where no plan is allowed."""

    def at(price_s: float) -> Plan:
        return _plan_at(price_s, tuple(models), tuple(tables), request_ids, epoch_requests)

    low = at(0.0)
    if low.slack.sum() <= 0:
        return low  # even losses for free stay within the budget
    # No changed token is worth twice what the exits of a token are apart; with one exit each, models are.
    apart_s = max(float(np.ptp(t.time_s, axis=1).max()) for t in tables) or max(float(t.time_s.max()) for t in tables)
    high = at(2.0 * apart_s)
    for _ in range(DOUBLINGS):  # but less than a token may be, and no model may come so cheap
        if high.slack.sum() <= 0:
            break
        high = at(2.0 * high.price_s)
    if high.slack.sum() >= 0:
        return high  # no loss is allowed, or not as little as there must be
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
    """Each request (or epoch) on the model of least Lagrangian, each token at its exit of least price."""
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
    """Both minimise at the critical price: the first requests spend as in `low`, as few as use up the budget."""
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
