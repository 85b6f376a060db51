"""What kernels draw, from the power that NVIDIA's tables hold: of the B200, its attention under vLLM 0.22.

`python experiments/kernels/power.py WHEEL` prints quantiles of the power of kernels that take 0.1 ms and more; shorter
ones are drowned in the counter's average. The first band is what studies take for a B200 (`catalog.CARDS`); kernels of
experts, which it was not made from, are printed beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from extract import read

from helios_sim.entry import script

LEAST_MS = 0.1
QUANTILES = (0.05, 0.5, 0.95)
TABLES = {
    "decodes": "b200_sxm/attention/vllm/0.22.0/generation_attention_perf.parquet",
    "prompts": "b200_sxm/attention/vllm/0.22.0/context_attention_perf.parquet",
    "experts (not used)": "b200_sxm/moe/vllm/0.22.0/moe_perf.parquet",
}


def main(wheel: Path) -> None:
    found = {}
    for name, path in TABLES.items():
        table = read(wheel, path)
        power_w = table["power"].to_numpy()[table["latency"].to_numpy() >= LEAST_MS]
        found[name] = np.quantile(power_w, QUANTILES)
        told = ", ".join(f"{watts:.0f}" for watts in found[name])
        print(f"{name:<20} {len(power_w):>6} kernels: 5, 50 and 95 % draw less than {told} W")
    print(f"while iterations run: {found['decodes'][0]:.0f} to {found['prompts'][-1]:.0f} W")


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    main(parser.parse_args(words).wheel)


if __name__ == "__main__":
    script(__file__, command)
