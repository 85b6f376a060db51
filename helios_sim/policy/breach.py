"""Load or switch: what answers a breach of the limit. Knows options and their costs, no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from helios_sim.policy.helios_parameters import BreachAction
from helios_sim.policy.options import Option


def answer(
    action: BreachAction, load: Option | None, switches: Sequence[Option], cost: Callable[[Option], float]
) -> Option | None:
    """The option to take, None if there is none. On equal terms loading wins: it keeps the model's own tokens.

    `load` raises the active model to full depth, `switches` are other candidates' partial loads; all meet the quality
    floor. `cost` is an option's cost until the next round, transition included.
    """
    loads = [] if load is None else [load]
    match action:
        case BreachAction.LOAD_ONLY:
            return load
        case BreachAction.SWITCH_ONLY:
            return min(switches, key=cost, default=None)
        case BreachAction.TRANSFER_ONLY:
            return min([*loads, *switches], key=lambda option: option.transition.load_s, default=None)
        case BreachAction.CHEAPER:
            return min([*loads, *switches], key=cost, default=None)
