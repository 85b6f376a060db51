"""The oracle: a bound from knowing every exit and every request. Knows what no policy can, and pays for no change.

At admission it takes a model for each request, all weights being there for free; each token runs to the depth that
the plan says, unchecked, its prompt to the depth of the first token, and K and V above are neither computed nor
missed. The plan, and why no policy within the quality floor is faster at batch 1, is in `oracle_plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.rule import Clairvoyant
from helios_sim.policy.checks import check_positive
from helios_sim.policy.deployment import Deployment, KvRule, Placement
from helios_sim.policy.depth import prefill_time_s
from helios_sim.policy.oracle_plan import Plan, TokenTimes, make_plan
from helios_sim.policy.telemetry import Candidate, Objective, Outlook, Situation, Telemetry
from helios_sim.policy.trigger import Cause
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.request import Request


@dataclass(frozen=True, slots=True)
class OracleParameters:
    epoch_requests: int = 1  # consecutive requests that share a model; more only where batches form
    batch_limit: int | None = None  # None: the server's own limit; 1 for the bound

    def __post_init__(self) -> None:
        check_positive("epoch_requests", self.epoch_requests)
        check_positive("batch_limit", self.batch_limit)


class OraclePolicy:
    """Plans once, at the start, and is never asked again."""

    def __init__(self, parameters: OracleParameters) -> None:
        self.parameters = parameters

    def start(self, situation: Situation) -> Deployment:
        """Raises UserError if the requests to come are not known, or no model meets the floor."""
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
    """Whether full depth is within it, as recorded beforehand; true where none is known or set."""
    bits, most = candidate.offline.bits_per_char, objective.max_bits_per_char
    return bits is None or most is None or bool(bits[-1] <= most)


def token_times(situation: Situation, model: str, requests: Sequence[Request]) -> TokenTimes:
    """Times alone on the card: the first token is its prompt's prefill, token j (from 0) reads prompt + j tokens.

    What they lose is bits where the objective's floor follows a reference, else agreement with full depth.
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
        prefills = [prefill_time_s(profile, layers, p, situation.max_batch_tokens)[0] for p in prompt_seen.tolist()]
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
    """(R,) bits of each request's text under the reference at full depth; the best single model where none is named.

    A policy whose reference is the best candidate at any time needs no more than that in all.
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
    """(K,) seconds of one token at each context."""
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
