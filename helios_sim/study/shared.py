"""What jobs of one process share of their replicas, made once.

Arms and designs differ in a policy's settings, the objective or the threshold. Profiles, exit traces, their replays and
what is known of the load are the same for all of them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from helios_sim.exits.replay import OfflineExits, offline_exits
from helios_sim.policy.telemetry import Candidate
from helios_sim.study.build import confidence, objective_of, threshold
from helios_sim.study.fleet import Fleet, Kind, build_fleet, of_kind
from helios_sim.study.schema import PRESENTATION, Config

MOST_KEPT = 4  # different parts at a time, such as one for each seed
MOST_USES = 200  # of the same parts: a trace remembers its replays, one for every threshold


@dataclass(slots=True)
class _Kept:
    fleet: Fleet
    uses: int = 0
    offline: dict[tuple[str, str, float], OfflineExits] = field(default_factory=dict)  # by kind, model and threshold


_kept: OrderedDict[str, _Kept] = OrderedDict()


def shared_fleet(config: Config, seed: int) -> Fleet:
    """As `build_fleet` gives it, the same to the last bit, from what was built before where it can be."""
    key = _key(config, seed)
    kept = _kept.pop(key, None)
    if kept is None or kept.uses >= MOST_USES:
        kept = _Kept(build_fleet(config, seed))
    _kept[key] = kept
    while len(_kept) > MOST_KEPT:
        _kept.popitem(last=False)
    kept.uses += 1
    return replace(kept.fleet, kinds=tuple(_as_set(kind, config, kept) for kind in kept.fleet.kinds))


def _as_set(kind: Kind, config: Config, kept: _Kept) -> Kind:
    """The kind with what its policy is told set anew: the objective, and sums over exits at the threshold."""
    at, candidates = threshold(config), {}
    with of_kind(kind.name):
        for name, data in kind.parts.models.items():
            place = (kind.name, name, at)
            if place not in kept.offline:
                kept.offline[place] = offline_exits(data.trace.trace, at, confidence(config), kind.tasks)
            candidates[name] = Candidate(data.profile, kept.offline[place])
        situation = replace(kind.parts.situation, objective=objective_of(config, candidates), candidates=candidates)
    return replace(kind, parts=replace(kind.parts, situation=situation))


def what_counts(config: Config) -> dict[str, Any]:
    """The settings that change a result, by name; the groups are the configuration's own."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in PRESENTATION}


def in_json(settings: Any) -> str:
    """The same text for the same settings, whatever their order."""
    return json.dumps(settings, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return str(value)


def _key(config: Config, seed: int) -> str:
    """Of everything that parts are made of, but for what is set anew each time."""
    settings = what_counts(config)
    del settings["objective"]
    if not any("policy" in kind for kind in config.cluster.kinds.values()):  # a kind's own policy goes by the threshold
        settings["exits"] = {name: value for name, value in vars(config.exits).items() if name != "threshold"}
    return in_json([seed, settings])
