"""Throws faults at random designs while they serve, and counts requests that are unaccounted for and wrong results.

`python experiments/faults/inject.py [--faults 10000] [--seed 1]` writes inject.json and inject.md beside itself.
Designs are those of the tests (`tests/serving_cases.py`: any policy, deployment, profile, router and workload on up to
three replicas) under random plans of faults (`tests/fault_cases.py`). Each is served step by step, ahead of the clock,
and ahead of the clock by compiled code. It goes on until so many faults have struck something.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from time import perf_counter

from helios_sim.entry import script

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1] / "tests"))


def tried(faults: int, seed: int) -> dict[str, object]:
    """What became of the faults and of the requests, and the designs that went wrong, by their number."""
    from digests.serving import case, chooser
    from fault_cases import ALL_WAYS, checked, choose_plan

    started_s = perf_counter()
    struck: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    bad: list[dict[str, object]] = []
    designs = 0
    while struck.total() < faults:
        number = seed * 1_000_000 + designs
        designs += 1
        arguments, plan = case(number), choose_plan(chooser(f"faults {number}"), number)
        try:
            served = checked(arguments, plan, ALL_WAYS)
        except Exception as error:
            bad.append({"design": number, "error": f"{type(error).__name__}: {error}"})
            continue
        for fault in served.run.faults or ():
            (struck if fault.hit else missed)[fault.kind.value] += 1
            sums.update(retried=fault.retried, lost=fault.lost, wasted_tokens=fault.wasted_tokens)
        ended.update(record.status.value for record in served.records)
        sums.update(requests=served.run.requests, unaccounted=served.run.requests - len(served.records))
        if designs % 100 == 0:
            print(f"{designs} designs, {struck.total()} faults, {len(bad)} bad", file=sys.stderr, flush=True)
    return {
        "seed": seed, "designs": designs,
        "struck": dict(sorted(struck.items())), "missed": dict(sorted(missed.items())),
        "ended": dict(sorted(ended.items())), **sums, "bad": len(bad), "bad_ones": bad,
        "wall_s": round(perf_counter() - started_s),
    }  # fmt: skip


def told_apart(found: dict[str, object]) -> dict[str, object]:
    """Sorts out designs whose ways to run differ without any fault as well: those are no work of faults."""
    from digests.serving import case
    from fault_cases import ALL_WAYS, checked
    from helios_sim.workload.faults import FaultPlan

    bad, before = [], []
    for one in list(found["bad_ones"]):  # type: ignore[call-overload]
        try:
            checked(case(one["design"]), FaultPlan((), 0, 0), ALL_WAYS)
            bad.append(one)
        except AssertionError:
            before.append(one)
    return found | {"bad": len(bad), "bad_ones": bad, "differ_without_faults": before}


def table(found: dict[str, object]) -> str:
    struck, missed, ended = (dict(found[name]) for name in ("struck", "missed", "ended"))  # type: ignore[call-overload]
    n, total = int(str(found["designs"])), sum(struck.values())
    lines = [
        "# Faults injected while serving", "",
        f"Written by `python experiments/faults/inject.py`, seed {found['seed']}: {n:,} random designs, each served",
        "step by step, ahead of the clock, and compiled.", "",
        "| fault | struck | found nothing to strike |", "|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {kind.replace('_', ' ')} | {struck.get(kind, 0):,} | {missed.get(kind, 0):,} |"
        for kind in sorted({*struck, *missed})
    ]
    lines += [f"| **all** | {total:,} | {sum(missed.values()):,} |", "", "| requests | |", "|---|---|"]
    rows = [
        ("served", found["requests"]), *ended.items(), ("sent again, each time", found["retried"]),
        ("dropped because of a fault", found["lost"]), ("output tokens wasted", found["wasted_tokens"]),
        ("**unaccounted for**", found["unaccounted"]),
    ]  # fmt: skip
    lines += [f"| {name} | {value:,} |" for name, value in rows]
    wrong = f"Designs whose results differ between the three ways, or that went wrong otherwise: {found['bad']}."
    lines += ["", wrong]
    before = len(list(found["differ_without_faults"]))  # type: ignore[call-overload]
    if before:
        lines += [f"Left out: {before} whose three ways differ without any fault as well, named in inject.json."]
    lines += [""]
    return "\n".join(lines)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(words)
    found = told_apart(tried(options.faults, options.seed))
    print({name: value for name, value in found.items() if name != "bad_ones"}, flush=True)
    (FOLDER / "inject.json").write_text(json.dumps(found, indent=1) + "\n")
    (FOLDER / "inject.md").write_text(table(found))
    return 1 if found["bad"] or found["unaccounted"] else 0


if __name__ == "__main__":
    script(__file__, main)
