"""What prefixes that prompts share are worth in a logged run that does not say which prompts share any.

`python experiments/fidelity_vllm/prefixes.py LOG [PROMPTS TOKENS]`: of the log's prompts so many (32) are drawn that
begin with the first TOKENS (608) of an earlier one, as is known of the texts of these runs in sum; with a prefix cache,
the run is simulated under twenty such draws, beside the run without it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from helios_sim.entry import script
from helios_sim.study.modes import FidelityConfig
from helios_sim.validate.logs import ServingLog, Times, read_log
from helios_sim.validate.replay import Quantities, Shared, estimate, estimated_from, run_once
from helios_sim.validate.setup import set_up
from helios_sim.workload.prefixes import SharedPrefixes

DRAWS = 20


def drawn(log: ServingLog, prompts: int, tokens: int, rng: np.random.Generator) -> Shared:
    """So many requests and, for each, an earlier one with the same beginning, all of them longer than that."""
    long = np.flatnonzero(log.prompt_tokens > tokens)
    later = np.sort(rng.choice(long[1:], prompts, replace=False))
    rows, segments = np.full(len(log), -1, np.int64), []
    for request in later.tolist():
        first = int(rng.choice(long[long < request]))
        if rows[first] < 0:
            rows[first] = len(segments)
            segments.append([(len(segments), tokens)])
        rows[request] = rows[first]
    return Shared(SharedPrefixes.of(segments), rows)


def means_s(times: Times, tokens: np.ndarray) -> np.ndarray:
    """Mean time to first token, time per output token and end to end, in seconds."""
    ttft, e2e = times.first_ns - times.queued_ns, times.last_ns - times.queued_ns
    tpot = ((times.last_ns - times.first_ns) / np.maximum(tokens - 1, 1))[tokens > 1]
    return np.array([ttft.mean(), tpot.mean(), e2e.mean()]) / 1e9


def main(folder: Path, prompts: int, tokens: int) -> None:
    config = FidelityConfig(compare=True, folder=str(folder))
    log = read_log(folder)
    setup = set_up(log, config)
    tokens_of = log.output_tokens
    measured = means_s(log.measured, tokens_of)
    estimated = estimate(log, setup, estimated_from(log, config.estimate_from)) or Quantities()
    for name, quantities in (("nothing estimated", Quantities()), ("quantities estimated", estimated)):
        with_them, rng = quantities.applied(setup), np.random.default_rng(0)
        alone = means_s(run_once(log, with_them, quantities.warm_up_s).times, tokens_of)
        found, hits = [], []
        for _ in range(DRAWS):
            run = run_once(log, with_them, quantities.warm_up_s, shared=drawn(log, prompts, tokens, rng))
            found.append(means_s(run.times, tokens_of))
            hits.append(run.stats.prefix_cache_hits / run.stats.prefix_cache_queries)
        effect = np.array(found) / alone - 1
        print(f"{name}: {np.mean(hits):.1%} of prompt tokens found; TTFT, TPOT, E2E in the mean")
        print("  without over measured:     " + ", ".join(f"{x:+.1%}" for x in alone / measured - 1))
        print("  with over without:         " + ", ".join(f"{x:+.1%}" for x in effect.mean(axis=0)))
        print("  standard deviation of draws: " + ", ".join(f"{x:.1%}" for x in effect.std(axis=0, ddof=1)))
        print("  with over measured:        " + ", ".join(f"{x:+.1%}" for x in np.mean(found, axis=0) / measured - 1))


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("prompts", nargs="?", type=int, default=32)
    parser.add_argument("tokens", nargs="?", type=int, default=608)
    options = parser.parse_args(words)
    main(options.log, options.prompts, options.tokens)


if __name__ == "__main__":
    script(__file__, command)
