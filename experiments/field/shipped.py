"""`helios_next` on every shipped experiment that has HELIOS: `python experiments/field/shipped.py [NAME ...]`.

Under each condition, every model of the experiment serves at full depth, with exits per token, cut by the cap rule and
with drafts of its own exit: the fixed arms. The best of those that keep to the experiment's floors in agreement and in
bits per character stands beside HELIOS, its probes and `helios_next`. Writes shipped.md beside this file, when all are
run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helios_sim import files, simulate, study_config
from helios_sim.entry import script
from helios_sim.report.metrics import DEFINITIONS, Band, Better
from helios_sim.study.schema import Config
from helios_sim.vary.settings import with_settings

FOLDER = Path(__file__).parent
LOSES = 0.02  # more is told
OPT = {"batch_limit": 1}
MOST = 400  # requests of a run: more than two rounds of HELIOS
WHOLE = ("drift", "real_models")  # whose texts move over the run
SCALED = {"constants": "batch_scaled"}


@dataclass(frozen=True)
class Condition:
    """Some settings of an experiment, the metric that counts, and settings of all arms and of HELIOS's."""

    experiment: str
    what: str
    metric: str
    changes: Mapping[str, Any]
    of_all: Mapping[str, Any]
    of_helios: Mapping[str, Any]


def conditions() -> Iterator[Condition]:
    def one(
        experiment: str, what: str, metric: str, changes: Mapping[str, Any] | None = None,
        of_all: Mapping[str, Any] | None = None, of_helios: Mapping[str, Any] | None = None,
    ) -> Condition:  # fmt: skip
        helios = SCALED if of_helios is None else of_helios
        return Condition(experiment, what, metric, changes or {}, of_all or {}, helios)

    rate, e2e, chars = "throughput_requests_per_s", "e2e_s_mean", "throughput_chars_per_s"
    queue = {"workload.arrivals.kind": "all_at_once"}
    open_load = {"workload.arrivals.kind": "poisson", "workload.arrivals.rate_per_s": 1.0}
    moving = {**SCALED, "half_life_requests": 40.0}
    yield one("quickstart", "4 requests/s", e2e)
    yield one("paper_opt", "batch 1", rate, None, OPT, {})
    yield one("paper_opt", "batch 1, 75 % unchanged", rate, {"exits.parameters": {"unchanged": 0.75}}, OPT, {})
    yield one("paper_opt", "full queue", rate, queue)
    yield one("paper_latency", "1 request/s", e2e, open_load)
    yield one("paper_energy", "batch 1", "energy_wh_per_request", None, OPT, {})
    yield one("paper_batch", "full queue", rate, {"workload.n_requests": 1000})
    yield one("large", "batch 1", rate, None, OPT, {})
    yield one("large", "full queue", rate, {**queue, "workload.n_requests": 2000})
    for per_s in (2.0, 20.0, 80.0):
        yield one("load_sweep", f"{per_s:g} requests/s", e2e, {"workload.arrivals.rate_per_s": per_s})
    yield one("drift", "easy and hard tasks", e2e)
    yield one("faults", "a card dies", "e2e_s_p99", {"workload.n_requests": 600})
    yield one("prefix_caching", "as recorded", "ttft_s_mean", {"workload.n_requests": 2000})
    yield one("sweep_helios", "8 users", rate)
    yield one("guarantee", "8 users, 10 % promised", chars)
    yield one("live_drift", "6 users, simulated", chars)
    yield one("real_models", "8 users", chars, of_helios=moving)
    yield one("cluster", "four machines", chars, {"workload.n_requests": 1200}, of_helios=moving)


def study(c: Condition) -> Config:
    config = study_config(c.experiment)
    requests = config.workload.n_requests
    if c.experiment not in WHOLE and (requests is None or requests > MOST):
        config = with_settings(config, {"workload.n_requests": MOST})
    config = with_settings(config, c.changes)
    empty: dict[str, Any] = {"sweeps": [], "figures": [], "published": [], "gates": [], "policy": None}
    fixed: dict[str, dict[str, Any]] = {"full_depth": {}, "early_exit": {}, "static_cap": {}}
    if not config.server.enable_prefix_caching:  # shared blocks are not lent to drafts
        fixed["self_speculation"] = {"review_requests": 50}
    own = {"batch_limit": c.of_all["batch_limit"]} if "batch_limit" in c.of_all else {}
    arms: dict[str, Any] = {
        f"{policy}_{model}": {"policy": policy, "model": model, **settings, **own}
        for policy, settings in fixed.items() for model in config.models
        # Exits and drafts of the larger model of a pair lose to those of the smaller one in each of these experiments
        if len(config.models) != 2 or policy in ("full_depth", "static_cap") or model == config.models[0]
    }  # fmt: skip
    for policy in ("helios", "helios_probe"):
        arms[policy] = {"policy": policy, **c.of_helios, **own}
    arms["helios_next"] = {"policy": "helios_next", **own}
    return replace(
        config, arms=arms, baseline=next(iter(arms)), subject="helios_next", seeds=[0], pictures=False,
        next_best="none", profile_band="none", headline_metrics=[c.metric],
        sweep=replace(config.sweep, parameters={}), **empty,
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    experiment: str
    what: str
    metric: str
    best: str  # of the fixed arms
    values: dict[str, float]  # of the best, helios, helios_probe and helios_next
    agreement: dict[str, float]
    kept: bool  # helios_next keeps to the floors too

    def gain(self, arm: str) -> float:
        """How many times better than the best fixed arm."""
        of_best, of_arm = self.values[self.best], self.values[arm]
        return of_best / of_arm if DEFINITIONS[self.metric].better is Better.LOWER else of_arm / of_best


def measured(c: Condition) -> Row:
    config = study(c)
    arms = simulate(config).arms
    values, agreement = {}, {}
    for name, arm in arms.items():
        value, share = arm.metrics[c.metric], arm.metrics["agreement"]
        assert isinstance(value, Band | float | int)
        assert isinstance(share, float | int)
        values[name] = (value.low + value.high) / 2 if isinstance(value, Band) else float(value)
        agreement[name] = float(share)
    bits = {name: value for name, arm in arms.items() if isinstance(value := arm.metrics["bits_per_char"], float)}
    full = [value for name, value in bits.items() if name.startswith("full_depth")]
    ratio = config.objective.max_bits_ratio
    most = ratio * min(full) if ratio is not None and full else None

    def keeps(name: str) -> bool:
        within = most is None or name not in bits or bits[name] <= most
        return within and agreement[name] >= 1 - config.objective.max_disagreement - 1e-9

    fixed = [name for name in arms if not name.startswith("helios") and keeps(name)]
    sign = 1 if DEFINITIONS[c.metric].better is Better.LOWER else -1
    best = min(fixed, key=lambda name: sign * values[name])
    return Row(c.experiment, c.what, c.metric, best, values, agreement, keeps("helios_next"))


def told(rows: list[Row]) -> str:
    lines = ["# helios_next beside the best fixed arm of every shipped experiment", ""]
    lines += ["Made by `python experiments/field/shipped.py`, seed 0. Each policy's figure is how many times better",
              "it is than the best fixed arm, by the metric of that experiment; in brackets its agreement with full",
              "depth. Bold: more than 2 % behind, or beyond a floor of quality.", ""]  # fmt: skip
    columns = ("experiment", "condition", "by", "best fixed arm", "helios", "helios_probe", "helios_next")
    lines += [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for row in rows:
        shown = {
            arm: f"{row.gain(arm):.2f} ({row.agreement[arm]:.1%})" for arm in row.values if arm.startswith("helios")
        }
        if row.gain("helios_next") < 1 - LOSES or not row.kept:
            shown["helios_next"] = f"**{shown['helios_next']}**"
        best = f"`{row.best}` ({row.agreement[row.best]:.1%})"
        cells = (row.experiment, row.what, DEFINITIONS[row.metric].label, best, *shown.values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    rows = []
    for c in conditions():
        if names and c.experiment not in names:
            continue
        rows.append(measured(c))
        row = rows[-1]
        gains = ", ".join(f"{arm} {row.gain(arm):.3f}" for arm in ("helios", "helios_probe", "helios_next"))
        print(f"{row.experiment}, {row.what}: {row.best}; {gains}", flush=True)
    if not names:
        files.write_text(FOLDER / "shipped.md", told(rows))


if __name__ == "__main__":
    script(__file__, main)
