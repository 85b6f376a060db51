"""What is good enough: floors in bits per character and in response time. Knows figures of candidates, no load.

Bits per character depend on the text: every model needs more for prose than for code. A floor that is to hold while
the text drifts therefore follows a reference on the same text: the best candidate, or a named one, at full depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from helios_sim.policy.options import Option
from helios_sim.policy.telemetry import Objective


def bits_floor(objective: Objective, full_depth_bits: Mapping[str, float | None]) -> float | None:
    """Bits per character that are still good enough, by those of the candidates at full depth; None: any are.

    Floors that cannot be worked out, since nothing is known of the reference, do not bind.
    """
    floors = [] if objective.max_bits_per_char is None else [objective.max_bits_per_char]
    if objective.max_bits_ratio is not None:
        known = {model: bits for model, bits in full_depth_bits.items() if bits is not None}
        of = objective.bits_reference
        reference = min(known.values(), default=None) if of is None else known.get(of)
        if reference is not None:
            floors.append(objective.max_bits_ratio * reference)
    return min(floors, default=None)


def quick_enough(objective: Objective, options: Sequence[Option]) -> list[Option]:
    """Those predicted to answer within the objective's bound; where none does, the quickest."""
    most_s = objective.max_response_time_s
    if most_s is None or not options:
        return list(options)
    within = [option for option in options if option.prediction.response_time_s <= most_s]
    return within or [min(options, key=lambda option: option.prediction.response_time_s)]
