"""`+experiment=from_log`: a log's requests replayed, its engine fitted to the first part, the second part predicted.

Then other policies, models or cards serve the same requests. The arm `as_logged` is the fitted engine; all others have
its settings except for those that they change.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import BeyondRoofline, UserError
from helios_sim.logs import RequestLog
from helios_sim.profile.devices import group_of
from helios_sim.report.result import (
    ComparedRow,
    Comparisons,
    ExperimentResult,
    Fidelity,
    RequestTimes,
    comparisons,
)
from helios_sim.report.tables import compared_table, print_table
from helios_sim.report.terminal import say
from helios_sim.report.write import write_result
from helios_sim.study.assemble import assemble
from helios_sim.study.build import build_profile
from helios_sim.study.command import end, processes, provenance, with_read
from helios_sim.study.fleet import shared_fleet
from helios_sim.study.modes import LIVE
from helios_sim.study.plan import check_study, jobs_of, plan_study
from helios_sim.study.runner import forget_jobs, job_lines, journal_of, run_jobs
from helios_sim.study.schema import AUTO, NONE, Config
from helios_sim.study.seeds import first_plan, settle
from helios_sim.validate.fit import Quantities, Replayed, estimate, figures_of, replayed
from helios_sim.validate.opened import PROFILES, TRACE, Opened, answered, open_log, prepared
from helios_sim.vary.runner import at_work_in, progress
from helios_sim.vary.settings import with_settings

AS_LOGGED = "as_logged"
STATISTICS = (("mean", None), ("p50", 50), ("p90", 90), ("p99", 99))
TIMES = ("TTFT", "TPOT", "E2E")
DRAWS, LEVEL = 1000, 95  # bootstrap draws for the band of an error, and its level in per cent
FEWEST = 8  # fewest requests in a log
FloatArray = NDArray[np.float64]


def run_from_log(config: Config, folder: Path) -> int:
    """Run, write and print. Returns 0, or 2 if a gate failed. Raises UserError before any result is written."""
    _check_kind(config)
    opened = open_log(config)
    with at_work_in(folder), redirect_stdout(sys.stderr), _nothing_of_a_mistake(folder):
        changed, told = prepared(opened, config, folder)
        log = answered(opened.log, config.workload.n_requests)
        if len(log) < FEWEST:
            raise UserError("log", f"{len(log)} requests that were answered", f"at least {FEWEST}", "take a longer log")
        check_study(plan_study(asked(changed, config, Quantities())))  # before the log is replayed many times
        n = max(1, int(len(log) * config.from_log.share))
        quantities, run = _fitted(log, changed, n)
        study = asked(changed, config, quantities)
        plan = first_plan(study)
        journal = journal_of(folder)
        total = len({job.key for job in plan.jobs})
        with _of_the_log(log, quantities), progress(study.name, total, job_lines(total)) as on_done:
            settled = settle(plan, study, lambda jobs: run_jobs(jobs, journal, processes(study), on_done))
        made = with_read(provenance(study), journal) | {"seeds": list(settled.plan.config.seeds), "log": _about(opened)}
        result = _told(assemble(settled, made), opened, log, quantities, run, n, told)
        ratios = comparisons(result)
        summary = write_result(result, folder, ratios, study.figures_as)
        forget_jobs(folder)
    return end(lambda: _show(result, ratios), folder, summary, result.gates)


@contextmanager
def _nothing_of_a_mistake(folder: Path) -> Iterator[None]:
    """Remove the files for the replay from the folder if the study cannot be run."""
    try:
        yield
    except UserError:
        shutil.rmtree(folder / PROFILES, ignore_errors=True)
        (folder / TRACE).unlink(missing_ok=True)
        raise


@contextmanager
def _of_the_log(log: RequestLog, quantities: Quantities | None) -> Iterator[None]:
    """Blame the log, and not the profile, if it is the log that is faster than the card can be."""
    try:
        yield
    except BeyondRoofline as error:
        if quantities is None or error.arm != AS_LOGGED:
            raise
        told = f"{log.source} on {error.value}"
        allowed = f"a log of this model on this card: {error.allowed}"
        fix = "name the card and the model that served it, and server.quantization if its weights were quantized"
        raise UserError("hardware", told, allowed, fix) from error


def _about(opened: Opened) -> dict[str, Any]:
    """The log for programs: its source and format, failures, missing data, and data that are not used."""
    log = opened.log
    failed = Counter(why for why, done in zip(log.status, log.completed, strict=True) if not done)
    return {
        "source": log.source, "format": log.format, "times_begin_when": log.begins.value, "requests": len(log),
        "failed": dict(failed), "missing": list(log.missing), "notices": [*log.notices, *opened.notices],
        "stated": {name: value for name, value in log.stated.items() if value is not None},
    }  # fmt: skip


def _check_kind(config: Config) -> None:
    if config.sweeps or config.sweep.parameters:
        raise UserError("sweeps", "given", "none beside a log", "leave sweeps out")
    if config.seeds == AUTO:
        raise UserError("seeds", AUTO, "a list: the requests are those of the log under every seed", "set seeds=[0]")
    if config.mode == LIVE:
        raise UserError("mode", LIVE, "a log is replayed in a simulation", "leave mode out")
    if AS_LOGGED in config.arms and config.arms[AS_LOGGED] is None:
        raise UserError(f"arms.{AS_LOGGED}", None, "the arm that is fitted to the log", "leave it in")
    if config.cluster.kinds:
        raise UserError("cluster.kinds", "given", "one kind of replica, as the log's engine", "leave it out")


def _fitted(log: RequestLog, config: Config, n: int) -> tuple[Quantities | None, Replayed]:
    """The quantities, None if nothing is to be estimated or the log has no times, and the replay with them."""
    plain = _plain(config)
    (job, *_) = jobs_of(plain, AS_LOGGED)
    requests = shared_fleet(job.config, job.seed).parts.workload.requests
    if requests != len(log):
        raise UserError("log", f"{requests} requests in the trace", f"the {len(log)} of the log", "report this")
    if not config.from_log.estimate or not figures_of(log, n):
        return None, replayed(log, plain, AS_LOGGED)
    found = estimate(log, plain, AS_LOGGED, n, _note)
    base = build_profile(plain, plain.models[0]).runtime
    return found, replayed(log, with_settings(plain, found.settings(base, plain)), AS_LOGGED, found.warm_up_s)


def _plain(config: Config) -> Config:
    """The settings of the log's engine alone: full depth, without exits."""
    arm = {AS_LOGGED: dict(config.arms.get(AS_LOGGED) or {"policy": "full_depth"})}
    return replace(with_settings(config, {"exits.source": NONE}), arms=arm, policy=None, baseline="", subject=None)


def asked(changed: Config, given: Config, quantities: Quantities | None) -> Config:
    """The study: the fitted engine, the requested arms, other models and other cards."""
    config = changed
    if quantities is not None:
        base = build_profile(changed, changed.models[0]).runtime
        config = with_settings(changed, quantities.settings(base, changed))
    arms: dict[str, Any] = {AS_LOGGED: {"policy": "full_depth"}} | dict(config.arms)
    elsewhere: dict[str, Any] = {
        "profile_folder": given.profile_folder, "profile_time_factor": given.profile_time_factor,
        "profile_prompt_time_factor": given.profile_prompt_time_factor,
        "server.memory_utilisation": given.server.memory_utilisation,
    }  # fmt: skip
    if changed.runtime.preset != given.runtime.preset:
        elsewhere["runtime.preset"] = given.runtime.preset  # of the engine: that of the profile is of its card
    for card in config.from_log.cards:
        own = {"hardware": card, **elsewhere}
        if changed.server.tensor_parallel > 1 and group_of(card)[0] > 1:
            own["server.tensor_parallel"] = 1
        if changed.profile_folder != given.profile_folder:  # a name that only the log's own tables have
            own["models"] = [_name_of(changed, given)]
        arms[f"on_{card}"] = {"policy": "full_depth", "overrides": own}
    for model in config.from_log.models:
        own = {"models": [model], "exits.source": NONE, **elsewhere}
        if changed.profile_folder != given.profile_folder:
            own["hardware"] = changed.hardware.lower()
        arms[f"with_{model.rsplit('/', 1)[-1]}"] = {"policy": "full_depth", "overrides": own}
    subject = next((name for name in reversed(list(config.arms)) if name != AS_LOGGED), None)  # before cards and models
    return replace(
        config, arms=arms, baseline=config.baseline or AS_LOGGED,
        subject=config.subject or (subject if config.policy is None else None),
    )  # fmt: skip


def _name_of(changed: Config, given: Config) -> str:
    name = changed.models[0]
    return name if given.models[0] in (name, "of_the_log") else given.models[0]


def _told(
    result: ExperimentResult, opened: Opened, log: RequestLog, quantities: Quantities | None, run: Replayed, n: int,
    told: tuple[str, ...],
) -> ExperimentResult:  # fmt: skip
    """The result, with the comparison before the answer."""
    fidelity = _compared(log, run, quantities, n)
    warnings = [*opened.log.failures, *opened.log.missing, *_of_loop(opened.log), *opened.log.notices, *opened.notices]
    warnings += [*told, *_of_blocks(opened)]
    if quantities is not None and any(name.startswith(("on_", "with_")) for name in result.arms):
        warnings.append(
            "Other cards and models have the host time and gap that were estimated here; prices and memory are theirs."
        )
    if quantities is not None and (limits := quantities.at_limits()):
        why = "This profile is not of the log's engine, or its machine had other work: the answer is worth nothing."
        warnings.insert(0, f"At their limits: {', '.join(limits)}. {why}")
    first = _verdict(fidelity, log, run, quantities, n)
    return replace(
        result,
        fidelity=fidelity,
        verdict=(*first, *result.verdict),
        warnings=tuple(dict.fromkeys((*warnings, *result.warnings))),
        assumptions=(*result.assumptions, *(quantities.assumptions(n) if quantities else ())),
    )


def _of_loop(log: RequestLog) -> list[str]:
    most = log.stated.get("in_flight_at_most")
    if not isinstance(most, int) or most >= len(log):
        return []
    return [
        f"{log.source}: its client kept at most {most} requests in flight. They are replayed at the times at which "
        "they were sent, so a slower engine does not slow its client here."
    ]


def _of_blocks(opened: Opened) -> list[str]:
    if opened.kv_blocks is not None:
        return [f"KV blocks: {opened.blocks_from}."]
    return ["KV blocks: not logged; as many as the card's memory has room for at server.memory_utilisation."]


def _compared(log: RequestLog, run: Replayed, quantities: Quantities | None, n: int) -> Fidelity | None:
    """The comparison, the predicted part first, which is the test. None if the log has no times."""
    measured = {"TTFT": log.ttft_s, "TPOT": log.tpot_s(), "E2E": log.e2e_s}
    simulated = {"TTFT": run.ttft_s, "TPOT": run.tpot_s(log.output_tokens), "E2E": run.e2e_s}
    both = {
        name: (times, np.where(np.isnan(times), np.nan, simulated[name]))
        for name, times in measured.items()
        if times is not None
    }
    if not both:
        return None
    total = len(log)
    how = "fitted" if quantities else "replayed"
    spans = {
        f"requests {n + 1} to {total}, predicted": slice(n, total), f"requests 1 to {n}, {how}": slice(0, n),
        f"all {total} requests": slice(0, total),
    }  # fmt: skip
    parts = tuple((part, _rows(both, rows)) for part, rows in spans.items())
    second = slice(n, total)
    spreads = tuple(
        RequestTimes(f"requests {n + 1} to {total}", name, (_sorted(a[second]),), (_sorted(b[second]),))
        for name, (a, b) in both.items()
        if name in ("TTFT", "TPOT")
    )
    terms = quantities.told() if quantities else ()
    told = tuple((name, f"{value}, from requests 1 to {n}") for name, value in terms)
    return Fidelity(parts, (), (), 0.0, told, spreads)


def _sorted(times: FloatArray) -> FloatArray:
    return np.sort(times[~np.isnan(times)])


def _rows(both: Mapping[str, tuple[FloatArray, FloatArray]], rows: slice) -> tuple[ComparedRow, ...]:
    found = []
    for name in TIMES:
        if name not in both:
            continue
        measured, simulated = (times[rows] * 1e3 for times in both[name])
        known = ~np.isnan(measured)
        bands = _bands(measured[known], simulated[known])
        for (statistic, q), band in zip(STATISTICS, bands, strict=True):
            a, b = (_figure(times[known], q) for times in (measured, simulated))
            found.append(ComparedRow(name, statistic, "ms", a, b, band=band))
    return tuple(found)


def _figure(times: FloatArray, q: int | None) -> float | None:
    if not len(times):
        return None
    return float(times.mean() if q is None else np.percentile(times, q))


def _bands(measured: FloatArray, simulated: FloatArray) -> list[tuple[float, float] | None]:
    """The interval of each statistic's error, by a bootstrap over blocks of neighbouring requests on both sides alike.

    Neighbours wait for the same iterations, so single requests would count as more independent cases than there are.
    """
    count = len(measured)
    length = max(1, round(count ** (1 / 3) * 2))
    blocks = count // length
    if blocks < 4:
        return [None] * len(STATISTICS)
    rng, draws = np.random.default_rng(0), max(200, min(DRAWS, 3_000_000 // count))
    starts = rng.integers(0, count - length + 1, (draws, blocks))
    rows = (starts[:, :, None] + np.arange(length)).reshape(draws, -1)
    found: list[tuple[float, float] | None] = []
    for _, q in STATISTICS:
        a, b = (times[rows].mean(axis=1) if q is None else np.percentile(times[rows], q, axis=1)
                for times in (measured, simulated))  # fmt: skip
        good = a > 0
        if not good.all():
            found.append(None)
            continue
        low, high = np.percentile(b / a - 1.0, (50 - LEVEL / 2, 50 + LEVEL / 2))
        found.append((float(low), float(high)))
    return found


def _verdict(
    fidelity: Fidelity | None, log: RequestLog, run: Replayed, quantities: Quantities | None, n: int
) -> list[str]:
    if fidelity is None:
        return _of_percentiles(log, run) or [
            f"{log.source} has no times: nothing was estimated or compared; the answer hangs on the profile alone."
        ]
    part, rows = fidelity.parts[0]
    off = {row.name: row.difference for row in rows if row.difference is not None}
    shown = {name: [off[key] for s in ("p50", "p90", "p99") if (key := f"{name} {s}") in off] for name in TIMES}
    told = ", ".join(f"{name} {' / '.join(f'{d:+.1%}' for d in found)}" for name, found in shown.items() if found)
    how = f"after a fit to the first {n} requests" if quantities else "with nothing estimated"
    worst = max(off.items(), key=lambda pair: abs(pair[1]))
    return [f"Of {part} {how}: {told} (p50 / p90 / p99); at worst {worst[1]:+.1%} ({worst[0]})."]


def _of_percentiles(log: RequestLog, run: Replayed) -> list[str]:
    """How the replay compares with percentiles of which the log knows the buckets; none where it knows none."""
    simulated = {"TTFT": run.ttft_s, "TPOT": run.tpot_s(log.output_tokens), "E2E": run.e2e_s}
    told, inside, total = [], 0, 0
    for name in (name for name in TIMES if name in log.percentiles):
        times = simulated[name][~np.isnan(simulated[name])]
        parts = []
        for share, (low_s, high_s) in log.percentiles[name]:
            found_s = float(np.quantile(times, share))
            inside, total = inside + (low_s <= found_s <= high_s), total + 1
            parts.append(f"p{100 * share:g} {found_s:.3g} ({low_s:g} to {high_s:g})")
        told.append(f"{name} {', '.join(parts)}")
    if not told:
        return []
    lead = f"With nothing estimated {inside} of {total} simulated percentiles lie in the buckets of {log.source}"
    return [f"{lead}, in seconds: {'; '.join(told)}."]


def _show(result: ExperimentResult, ratios: Comparisons) -> None:
    fidelity = result.fidelity
    if fidelity is not None:
        part, rows = fidelity.parts[0]
        compared_table(part, rows).show()
        say(f"Difference: simulated over measured, less 1; {LEVEL} %: its interval over blocks of these requests.")
        for name, value in fidelity.terms:
            say(f"{name}: {value}")
    if len(result.arms) > 1:
        print_table(result, ratios)
    for sentence in (*result.verdict, *result.warnings):
        say(sentence)


def _note(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)
