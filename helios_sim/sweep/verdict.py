"""What a sweep says in plain sentences, from its figures alone."""

from __future__ import annotations

from collections.abc import Sequence

from helios_sim.report.designs import Design, cost, merits_of, on_front, value_text as value_shown
from helios_sim.report.format import metric as shown
from helios_sim.report.metrics import DEFINITIONS, Better


def sentences(
    arm: str, objectives: Sequence[str], designs: Sequence[Design], references: Sequence[Design]
) -> tuple[str, ...]:
    """How large the front is, its ends, and where the arms stand that were not designed."""
    costs = merits_of(designs, objectives)
    front = [design for design, there in zip(designs, on_front(costs), strict=True) if there]
    found = [_size(arm, objectives, designs, front)]
    if front:
        found += [_end(name, objectives, front) for name in objectives]
    for reference in references:
        if reference.metrics is not None:
            own = merits_of([reference], objectives)[0]
            better = int(((costs <= own).all(axis=1) & (costs < own).any(axis=1)).sum())
            found.append(_against(arm, reference, better, len(designs)))
    return tuple(found)


def in_words(design: Design) -> str:
    """#12 (threshold 0.8, round_requests 150)."""
    values = ", ".join(f"{name} {value_shown(value)}" for name, value in design.parameters.items())
    return f"{design.name} ({values})" if values else design.name


def _size(arm: str, objectives: Sequence[str], designs: Sequence[Design], front: Sequence[Design]) -> str:
    names = [DEFINITIONS[name].label for name in objectives]
    between = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    failed = sum(design.error is not None for design in designs)
    said = f"Of {len(designs)} designs of {arm}, {len(front)} are beaten by none in {between}"
    return f"{said}; {failed} failed." if failed else f"{said}."


def _end(name: str, objectives: Sequence[str], front: Sequence[Design]) -> str:
    def price(design: Design) -> list[float]:
        assert design.metrics is not None
        first = [cost(name, design.metrics[name])]
        return first + [cost(other, design.metrics[other]) for other in objectives]

    best = min(front, key=price)
    assert best.metrics is not None
    rest = [f"{DEFINITIONS[n].label} {shown(n, best.metrics[n])}" for n in objectives if n != name]
    most = "Highest" if DEFINITIONS[name].better is Better.HIGHER else "Lowest"
    said = f"{most} {DEFINITIONS[name].label}: {in_words(best)} with {shown(name, best.metrics[name])}"
    return f"{said}; {', '.join(rest)}." if rest else f"{said}."


def _against(arm: str, reference: Design, better: int, total: int) -> str:
    name = f"{arm} as it was set" if reference.name == arm else reference.name
    if not better:
        return f"No design beats {name} in every objective."
    return f"{better} of {total} designs beat {name}: none of the objectives worse, at least one better."
