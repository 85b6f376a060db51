"""The share of tokens that arms may change by promise (exits.guarantee), and what they changed on the served prompts.

The prompts by which thresholds and caps were chosen are set apart, and not served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from helios_sim.exits.guarantee import NO_TOKEN
from helios_sim.policy.draft_model import DraftModelParameters
from helios_sim.policy.full_depth import FullDepthParameters
from helios_sim.policy.self_speculation import SelfSpeculationParameters
from helios_sim.report.result import ArmResult, KeptPromise
from helios_sim.study.build import confidence, promised, threshold
from helios_sim.study.jobs import Job
from helios_sim.study.schema import Config

if TYPE_CHECKING:
    from helios_sim.policy.registry import PolicyParameters


def kept_promises(jobs: Mapping[str, Sequence[Job]], arms: Mapping[str, ArmResult]) -> tuple[KeptPromise, ...]:
    """Return promises of arms with the thresholds and caps that keep them; an arm with other ones is left out."""
    found = []
    for name, (first, *_) in jobs.items():
        config, parameters = first.config, first.arm.policy.parameters
        guarantee = config.exits.guarantee
        if guarantee.max_disagreement is None or not _chosen(parameters, config):
            continue
        agreement, interval = arms[name].metrics.get("agreement"), arms[name].intervals.get("agreement")
        bounds = None
        if interval is not None and interval.low is not None and interval.high is not None:
            bounds = (1.0 - interval.high, 1.0 - interval.low)
        at = threshold(config)
        found.append(KeptPromise(
            arm=name, max_disagreement=guarantee.max_disagreement, probability=1.0 - guarantee.failure,
            prompts=min(certified.prompts for certified in promised(config).values()),
            threshold=None if at == NO_TOKEN else at,
            held_out=1.0 - agreement if isinstance(agreement, float) else None, held_out_interval=bounds,
        ))  # fmt: skip
    return tuple(found)


def _chosen(parameters: PolicyParameters, config: Config) -> bool:
    """Whether the policy uses the exits that were chosen for the promise."""
    if isinstance(parameters, FullDepthParameters | SelfSpeculationParameters | DraftModelParameters):
        return True  # every token is that of full depth
    if getattr(parameters, "cap_layers", None) is not None:
        return False
    chosen = threshold(config), confidence(config)
    return (getattr(parameters, "threshold", None), getattr(parameters, "confidence", None)) == chosen


def told(promises: Sequence[KeptPromise]) -> list[str]:
    """Return one sentence for each promise that was made, with its arms."""
    said = []
    for first in dict.fromkeys((p.max_disagreement, p.probability, p.prompts, p.threshold) for p in promises):
        most, probability, prompts, at = first
        under = [p for p in promises if (p.max_disagreement, p.probability, p.prompts, p.threshold) == first]
        changed = [p for p in under if p.held_out]
        how = "no token may leave early" if at is None else f"threshold {at:g}"
        lead = (f"Promised with {_percent(probability)}: at most {_percent(most)} of the tokens change "
                f"(by {prompts} prompts set apart; {how})")  # fmt: skip
        shares = ", ".join(f"{p.arm} {_share(p)}" for p in changed) or "none changed any"
        broken = [p.arm for p in under if p.kept is False]
        open_ = [p.arm for p in under if p.kept is None]
        judged = f"broken by {', '.join(broken)}" if broken else f"open for {', '.join(open_)}" if open_ else "kept"
        said.append(f"{lead}. On the others {shares}: {judged}.")
    return said


def _share(promise: KeptPromise) -> str:
    assert promise.held_out is not None
    if promise.held_out_interval is None:
        return _percent(promise.held_out)
    low, high = promise.held_out_interval
    return f"{_percent(promise.held_out)} [{100 * low:.1f}, {100 * high:.1f}]"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
