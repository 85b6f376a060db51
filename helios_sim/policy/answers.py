"""Checks of the deployments that a user's own policy returns, before they take effect: types, names, depths, ranges."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from helios_sim.exits.rule import (
    MOST_DRAFTS,
    MOST_EXCHANGE_S,
    MOST_NEAR_TOKENS,
    MOST_THRESHOLD,
    Clairvoyant,
    Confidence,
    DraftModel,
    FixedCap,
    FullDepth,
    Near,
    OwnCard,
    PerToken,
    ReleaseEarly,
    SelfSpeculation,
)
from helios_sim.policy.deployment import (
    LATE_ROOM,
    MOST_FLUSH_S,
    AtTime,
    BatchingRule,
    BreachLimit,
    Completed,
    Deployment,
    Drained,
    InFlight,
    KvAbove,
    KvRule,
    Placement,
    PowerAbove,
    Probe,
    Probed,
    QueueAbove,
    Regrouping,
    RunningAbove,
    SloBelow,
)
from helios_sim.policy.telemetry import Situation

MOST = 2**60  # largest whole number allowed; some are nanoseconds
_LEAST = {  # by trigger, the least value of each of its whole numbers
    BreachLimit: {"window_tokens": 1, "limit": 0},
    Completed: {"requests": 1},
    AtTime: {"time_ns": 0},
    QueueAbove: {"requests": 0},
    RunningAbove: {"requests": 0},
    KvAbove: {},
    SloBelow: {"requests": 1},
    PowerAbove: {},
    Drained: {},
    Probed: {},
}
_MOST_WINDOW = 1_000_000  # tokens or requests of a window, which are all kept in memory
_WINDOWS_S = 0.1, 50.0  # least and most seconds over which power is averaged


def fault_of(found: Deployment, situation: Situation) -> tuple[str, object, str] | None:
    """The first field that the server cannot carry out, its value and what is allowed; None if there is no fault."""
    candidates = situation.candidates

    def placement(value: object) -> str | None:
        if not isinstance(value, Placement):
            return "Placement(model, layers)"
        if not isinstance(value.model, str) or value.model not in candidates:
            return f"a model among {', '.join(candidates)}"
        exits = candidates[value.model].offline.exits
        is_exit = _is_whole(value.layers) and value.layers in exits
        if not is_exit:
            return f"layers {_listed(exits)} of {value.model}"
        if value.resident_layers is None or _is_whole(value.resident_layers, 1, value.layers - LATE_ROOM - 1):
            return None
        return f"resident_layers None, or from 1 to {value.layers - LATE_ROOM - 1}: {LATE_ROOM} more have room anyway"

    def rule(value: object) -> str | None:
        if type(value) is FullDepth:
            return None
        if type(value) is Clairvoyant:
            return None if _is_share(value.disagreement_budget) else "a disagreement_budget from 0 to 1"
        if type(value) is SelfSpeculation:
            return speculation(value)
        if type(value) is DraftModel:
            return drafting(value)
        if type(value) is ReleaseEarly:
            return release(value)
        if type(value) not in (FixedCap, PerToken):
            known = "FullDepth(), FixedCap(threshold), PerToken(threshold), Clairvoyant(), SelfSpeculation(...)"
            return f"{known}, DraftModel(...) or ReleaseEarly(...): the server knows no other exit rule"
        assert isinstance(value, FixedCap | PerToken)
        if not _is_share(value.threshold, MOST_THRESHOLD):
            return f"a threshold from 0 to {MOST_THRESHOLD:g}"
        if isinstance(value, PerToken) and value.checkpoints is not None:
            exits, at = candidates[found.active.model].offline.exits[:-1], value.checkpoints
            if not isinstance(at, tuple) or list(at) != sorted(set(at) & set(exits)):
                return f"PerToken with checkpoints None, or among {_listed(exits) or 'none'}, in their order"
        if isinstance(value, PerToken) and (wrong := looking(value)) is not None:
            return wrong
        if isinstance(value, FixedCap) and value.confidence is Confidence.PREDICTOR:
            return "PerToken with Confidence.PREDICTOR: it tells which tokens leave, one by one"
        return None if isinstance(value.confidence, Confidence) else f"a confidence of {_listed(Confidence)}"

    def looking(value: PerToken) -> str | None:
        """The form required of a rule that checks each token alone, if `value` does not have it; else None."""
        exits, near = candidates[found.active.model].offline.exits, value.near
        known = isinstance(value.confidence, Confidence)
        if near is not None:
            counts = isinstance(near, Near) and _is_whole(near.tokens, 1, MOST_NEAR_TOKENS) and _is_whole(near.layers)
            if not counts:
                return f"PerToken with near None, or Near(tokens from 1 to {MOST_NEAR_TOKENS}, layers from 0)"
            if not value.checkpoints and value.confidence is not Confidence.PREDICTOR:
                return "PerToken with near and checkpoints: without exits that always check no token leaves"
            if found.active.layers != exits[-1]:
                return f"PerToken with near only with all {exits[-1]} layers of {found.active.model}"
        if known and value.looks and found.batching is not BatchingRule.EACH_TOKEN:
            return "PerToken with near or a predictor only with BatchingRule.EACH_TOKEN"
        if known and value.confidence is Confidence.PREDICTOR and exits[0] not in (value.checkpoints or exits[:1]):
            return f"PerToken with a predictor and {exits[0]} among its checkpoints: its head proposes the words"
        return None

    def speculation(value: SelfSpeculation) -> str | None:
        exits = candidates[found.active.model].offline.exits
        if found.active.layers != exits[-1] or found.run_layers not in (None, exits[-1]):
            return f"SelfSpeculation only with all {exits[-1]} layers of {found.active.model}"
        if not _is_whole(value.exit_layers) or value.exit_layers not in exits[:-1]:
            return f"SelfSpeculation with exit_layers {_listed(exits[:-1]) or 'none'}"
        if not _is_whole(value.draft_tokens, 0, MOST_DRAFTS):
            return f"SelfSpeculation with draft_tokens from 0 to {MOST_DRAFTS}"
        if value.largest_batch is not None and not _is_whole(value.largest_batch):
            return "SelfSpeculation with largest_batch None or a whole number from 0"
        return None

    def drafting(value: DraftModel) -> str | None:
        active, whole = found.active.model, candidates[found.active.model].profile.model.n_layers
        if found.active.layers != whole or found.run_layers not in (None, whole):
            return f"DraftModel only with all {whole} layers of {active}"
        if value.drafter not in candidates or value.drafter == active:
            return f"DraftModel with another model than {active} among {', '.join(candidates)}"
        layers = candidates[value.drafter].profile.model.n_layers
        if layers > whole:
            return f"DraftModel with a drafter of at most the {whole} layers of {active}"
        if value.own_card is not None:
            return own_card(value)
        if value.fused_with:
            return "DraftModel with fused_with only with own_card: each of its models has a card"
        if not any(other == Placement(value.drafter, layers) for other in found.standby):
            return f"DraftModel with Placement({value.drafter!r}, {layers}) among standby"
        return drafts(value)

    def own_card(value: DraftModel) -> str | None:
        own = value.own_card
        if not isinstance(own, OwnCard) or not _is_number(own.exchange_s) or not 0 <= own.exchange_s <= MOST_EXCHANGE_S:
            return f"DraftModel with own_card None, or OwnCard(exchange_s from 0 to {MOST_EXCHANGE_S:g}, parts)"
        if own.parts not in (1, 2):
            return "DraftModel with an OwnCard of 1 or 2 parts"
        if not isinstance(value.fused_with, tuple) or len(set(value.drafters)) <= len(value.fused_with):
            return "DraftModel with fused_with (): a tuple of other drafters, each once"
        for name in value.fused_with:
            if name not in candidates or name == found.active.model:
                return f"DraftModel with fused_with among {', '.join(candidates)}"
        if at := [other.model for other in found.standby if other.model in value.drafters]:
            return f"DraftModel with own_card without {at[0]} among standby: it is on its own card"
        return drafts(value)

    def drafts(value: DraftModel) -> str | None:
        if not _is_whole(value.draft_tokens, 0, MOST_DRAFTS):
            return f"DraftModel with draft_tokens from 0 to {MOST_DRAFTS}"
        if value.largest_batch is not None and not _is_whole(value.largest_batch):
            return "DraftModel with largest_batch None or a whole number from 0"
        return None

    def release(value: ReleaseEarly) -> str | None:
        exits = candidates[found.active.model].offline.exits
        if found.active.layers != exits[-1] or found.run_layers not in (None, exits[-1]):
            return f"ReleaseEarly only with all {exits[-1]} layers of {found.active.model}"
        ramps, thresholds = value.ramps, value.thresholds
        if not isinstance(ramps, tuple) or list(ramps) != sorted(set(ramps) & set(exits[:-1])):
            return f"ReleaseEarly with ramps among {_listed(exits[:-1]) or 'none'}, in their order"
        if not isinstance(thresholds, tuple) or len(thresholds) != len(ramps):
            return "ReleaseEarly with one threshold for each ramp"
        if not all(_is_share(threshold, MOST_THRESHOLD) for threshold in thresholds):
            return f"ReleaseEarly with thresholds from 0 to {MOST_THRESHOLD:g}"
        return None if isinstance(value.confidence, Confidence) else f"a confidence of {_listed(Confidence)}"

    def regrouping(value: object) -> str | None:
        if not isinstance(value, Regrouping):
            return "Regrouping(split_above, flush_requests, flush_s)"
        shares = value.split_above if isinstance(value.split_above, tuple) else (value.split_above,)
        exits = sum(depth < found.active.layers for depth in candidates[found.active.model].offline.exits)
        if not all(map(_is_share, shares)) or (isinstance(value.split_above, tuple) and len(shares) != exits):
            return f"split_above, a share from 0 to 1, or {exits} of them: one for each exit before the last layer"
        if value.flush_requests is not None and not _is_whole(value.flush_requests, 1):
            return "flush_requests, None or a whole number from 1"
        if value.flush_s is not None and not (_is_number(value.flush_s) and 0 <= value.flush_s <= MOST_FLUSH_S):
            return f"flush_s, None or seconds from 0 to {MOST_FLUSH_S:g}"
        return None

    def trigger(value: object) -> str | None:
        if type(value) not in _LEAST:
            return f"triggers of {_listed(kind.__name__ for kind in _LEAST)}"
        for name, least in _LEAST[type(value)].items():
            kept = name == "window_tokens" or isinstance(value, SloBelow)
            most = _MOST_WINDOW if kept else MOST
            if not _is_whole(getattr(value, name), least, most):
                return f"{name}, a whole number from {least}"
        if isinstance(value, KvAbove | SloBelow) and not _is_share(value.share):
            return "share, a number from 0 to 1"
        if isinstance(value, SloBelow) and not situation.slo.any:
            return "SloBelow only where the study has SLOs: slo.ttft_s, slo.tpot_s or slo.e2e_s"
        if isinstance(value, PowerAbove):
            return power(value)
        if isinstance(value, Probed) and found.probe is None:
            return "Probed() only beside a probe"
        return None

    def power(value: PowerAbove) -> str | None:
        if situation.power_w is None:
            return "PowerAbove only where power is known: a card with idle_w and tdp_w, live a device with a counter"
        low_w, high_w = situation.power_w
        if not _is_number(value.watts) or not low_w <= value.watts < high_w:
            return f"watts, a number from {low_w:g} (idle) to less than {high_w:g} (the board's limit)"
        if not _is_number(value.window_s) or not _WINDOWS_S[0] <= value.window_s <= _WINDOWS_S[1]:
            return f"window_s, a number from {_WINDOWS_S[0]:g} to {_WINDOWS_S[1]:g}"
        return None

    def probe(value: object) -> str | None:
        if value is None:
            return None
        if found.active.resident_layers is not None:
            return "None beside layers that come late"
        if not isinstance(value, Probe) or not isinstance(value.models, tuple) or not value.models:
            return "None, or Probe((model, ...), prompts)"
        if not all(isinstance(model, str) and model in candidates for model in value.models):
            return f"models among {', '.join(candidates)}"
        if len(set(value.models)) < len(value.models):
            return "each model once"
        return None if _is_whole(value.prompts, 1) else "prompts, a whole number from 1"

    def run_layers(value: object) -> str | None:
        if value is None:
            return None
        exits = [depth for depth in candidates[found.active.model].offline.exits if depth <= found.active.layers]
        return None if _is_whole(value) and value in exits else f"None or {_listed(exits)}"

    def next_best(value: object) -> str | None:
        if value is None:
            return None
        if not isinstance(value, Deployment) or value.next_best is not None:
            return "None, or a Deployment that has none of its own"
        fault = fault_of(value, situation)
        return None if fault is None else f"a Deployment with {fault[0]} {fault[2]}"

    checks: dict[str, Callable[[Any], str | None]] = {
        "active": placement,
        "exit_rule": rule,
        "standby": _each(placement, "Placements"),
        "batching": _one_of(BatchingRule),
        "kv_rule": _one_of(KvRule),
        "regrouping": regrouping,
        "batch_limit": _whole_or_none(1),
        "in_flight": _one_of(InFlight),
        "admit_limit": _whole_or_none(0),
        "observe_tokens": _whole_or_none(0),
        "run_layers": run_layers,
        "probe": probe,
        "instant": lambda value: None if value is False else "False: loads take time",
        "plan": lambda value: None if value is None else "None: a plan is for the oracle",
        "next_best": next_best,
        "triggers": _each(trigger, "triggers"),
        "reason": lambda value: None if isinstance(value, str) else "a text",
        "evidence": _evidence,
    }
    for name, check in checks.items():
        if not hasattr(found, name):
            return name, None, "given: Deployment(...) makes one with all its fields"
        value = getattr(found, name)
        allowed = check(value)
        if allowed is not None:
            return name, value, allowed
    return None


def _is_whole(value: object, least: int = 0, most: int = MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_share(value: object, most: float = 1.0) -> bool:
    return _is_number(value) and 0 <= value <= most


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole_or_none(least: int) -> Callable[[object], str | None]:
    return lambda value: None if value is None or _is_whole(value, least) else f"None or a whole number from {least}"


def _one_of(kind: Any) -> Callable[[object], str | None]:
    names = _listed(f"{kind.__name__}.{member.name}" for member in kind)
    return lambda value: None if isinstance(value, kind) else names


def _each(check: Callable[[object], str | None], what: str) -> Callable[[object], str | None]:
    def checked(values: object) -> str | None:
        if not isinstance(values, tuple):
            return f"a tuple of {what}, such as ({what[:-1].lower()},)"
        return next((allowed for value in values if (allowed := check(value)) is not None), None)

    return checked


def _evidence(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return "a mapping"
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return "texts, finite numbers, lists and mappings of these: the decision log keeps it as JSON"
    return None


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))
