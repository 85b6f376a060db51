"""Fits the shares of a data sheet that cards without tables are assumed to reach, to the cards that have tables.

`python experiments/kernels/fit.py` prints the shares fitted to all measured cards, and the error of each card's times
by shares that were fitted to the others: what to expect of a card that nobody measured. First in bf16, then with what
fp8 products add, with the shares of bf16 as they are. Products with integer weights are in the table of one card alone,
the A100: their shares are fitted to its single products. With the path of the wheel of aiconfigurator-core (or of the
folder that it was unpacked into) those are held against the 8-bit weights that SGLang's table of the H100 has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from extract import only, read
from numpy.typing import NDArray
from scipy.optimize import least_squares

from helios_sim.entry import script
from helios_sim.profile.catalog import published_model
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.devices import device_of
from helios_sim.profile.formats import INT8, WEIGHTS
from helios_sim.profile.importers.aiconfigurator import device_profile, gemm_times
from helios_sim.profile.importers.kernel_tables import INTEGERS, SHIPPED_SOURCES
from helios_sim.profile.precision import Precision
from helios_sim.profile.profile import Profile
from helios_sim.profile.roofline import FITTED, Efficiency, Gemm, device_roofline, quantized_s

CARDS = ("a100-80gb", "h100", "h200", "b200", "l40s", "rtxpro6000")
MODELS = ("llama-3.2-1b", "llama-2-7b", "llama-3.1-8b", "qwen2.5-14b", "qwen3-32b")
DECODES = ((1, 512), (8, 2048), (32, 1024), (128, 1024), (256, 512))  # running requests, context
PROMPTS = (128, 512, 2048, 4096)
WIDTHS = (1024, 2048, 2560, 3072, 4096, 5120, 7168, 8192, 10_240, 12_288, 16_384)  # of single products
Floats = NDArray[np.float64]


def times_s(profile: Profile) -> NDArray[np.float64]:
    """(iterations,) seconds of decodes and of prompts on their own, without the host's costs."""
    layers, host_s = profile.model.n_layers, profile.runtime.host_overhead_s
    none = np.zeros((1, 1), np.int64)
    found = []
    for batch, context in DECODES:
        rows = np.array([[batch]])
        found.append(profile.iteration_time_s(Composition((layers,), rows, rows * context, rows[:, 0])))
    for tokens in PROMPTS:
        chunk = (PrefillChunk(tokens, 0, layers),)
        found.append(profile.iteration_time_s(Composition((layers,), none, none, np.array([1]), prefill=chunk)))
    return np.concatenate(found) - host_s


def measured_s(card: str, quantization: str | None) -> Floats:
    models = [Precision(quantization).applied(published_model(name)) for name in MODELS]
    profiles = [device_profile(model, device_of(card), SHIPPED_SOURCES[card], "") for model in models]
    return np.concatenate([times_s(profile) for profile in profiles])


def roofline_s(efficiency: Efficiency, card: str, quantization: str | None) -> Floats:
    models = [Precision(quantization).applied(published_model(name)) for name in MODELS]
    return np.concatenate([times_s(device_roofline(model, device_of(card), None, efficiency)) for model in models])


def in_bf16(point: Floats) -> Efficiency:
    return Efficiency(*point[:3], kernel_s=point[3] * 1e-6)


def in_fp8(point: Floats) -> Efficiency:
    return replace(FITTED, fp8_flops=point[0], fp8_kernel_s=point[1] * 1e-6)


def in_fp4(point: Floats) -> Efficiency:
    return replace(FITTED, fp4_flops=point[0], fp4_kernel_s=point[1] * 1e-6)


def fitted(miss: Callable[[Floats], Floats], start: list[float], low: list[float], high: list[float]) -> Floats:
    return np.asarray(least_squares(miss, start, bounds=(low, high), loss="soft_l1").x)


def of_cards(
    cards: tuple[str, ...], of: Callable[[Floats], Efficiency], quantization: str | None, start: list[float],
    low: list[float], high: list[float],
) -> None:  # fmt: skip
    """Print what is fitted to all cards, and what is missed on each by what is fitted to the others."""
    measured = {card: measured_s(card, quantization) for card in cards}

    def by(some: tuple[str, ...]) -> Floats:
        def miss(point: Floats) -> Floats:
            efficiency = of(point)
            return np.concatenate([np.log(roofline_s(efficiency, c, quantization) / measured[c]) for c in some])

        return fitted(miss, start, low, high)

    print(f"{quantization or 'bf16'}, all cards: {', '.join(f'{v:.3f}' for v in by(cards))}")
    n = len(DECODES)
    decode = np.tile(np.arange(n + len(PROMPTS)) < n, len(MODELS))
    everything = []
    print(f"{'card':<12} {'decode: median, 90th':>22} {'prefill: median, 90th':>22}   by shares of the others")
    for card in cards:
        point = by(tuple(other for other in cards if other != card))
        error = roofline_s(of(point), card, quantization) / measured[card] - 1
        everything.append(error)
        parts = [f"{np.median(e):>+8.0%} {np.quantile(abs(e), 0.9):>8.0%}" for e in (error[decode], error[~decode])]
        print(f"{card:<12} {parts[0]:>22} {parts[1]:>22}   {', '.join(f'{v:.2f}' for v in point)}")
    error = np.concatenate(everything)
    both = np.tile(decode, len(cards))
    for name, some in (("decode", error[both]), ("prefill", error[~both]), ("both", error)):
        low_, high_ = np.quantile(1 / (1 + some), [0.05, 0.95])
        print(f"{name}: measured over predicted, 5 % to 95 %: {low_:.2f} to {high_:.2f}; mean {abs(some).mean():.0%}")


def integers(products: str, bits: tuple[int, ...], wheel: Path | None) -> None:
    """Print the shares of single products with integer weights on the A100, and what they miss."""
    source = SHIPPED_SOURCES["a100-80gb"]
    tables = {each: gemm_times(source, INTEGERS[products, each]) for each in bits}
    cases = [(each, Gemm(n, k)) for each in bits for n in WIDTHS for k in WIDTHS]
    rows = tables[bits[0]].rows.astype(np.float64)
    measured = np.concatenate([tables[each].time_s(gemm) for each, gemm in cases])

    def of(point: Floats) -> Efficiency:
        shares = {f"{products}_flops": point[0], f"{products}_kernel_s": point[1] * 1e-6}
        return replace(FITTED, **shares)

    def miss(point: Floats) -> Floats:
        ours = [quantized_s(products, g, rows, each * g.n * g.k // 8, source.card, of(point)) for each, g in cases]
        return np.log(np.concatenate(ours) / measured)

    point = fitted(miss, [0.7, 8.0], [0.1, 0.5], [1.0, 30.0])
    error = miss(point)
    low, high = np.exp(-np.quantile(error, [0.95, 0.05]))
    said = f"measured over predicted, 5 % to 95 %: {low:.2f} to {high:.2f}; mean {abs(error).mean():.0%}"
    print(f"{products}, single products on the A100: {point[0]:.3f}, {point[1]:.1f} us; {said}")
    if products == WEIGHTS and wheel is not None:
        table = read(wheel, "h100_sxm/gemm/sglang/0.5.6.post2/gemm_perf.parquet")
        table = only(only(only(table, "gemm_dtype", "int8_wo"), "n", *WIDTHS), "k", *WIDTHS)
        shapes = np.stack([table[key].to_numpy() for key in ("m", "n", "k")], axis=1)
        card = device_of("h100").card
        ours = [
            quantized_s(products, Gemm(int(n), int(k)), np.array([float(m)]), int(n * k), card, of(point))[0]
            for m, n, k in shapes
        ]
        ratio = np.quantile(table["latency"].to_numpy() * 1e-3 / np.array(ours), [0.05, 0.5, 0.95])
        told = ", ".join(f"{each:.2f}" for each in ratio)
        print(f"SGLang's 8-bit weights on the H100, over predicted: 5, 50 and 95 %: {told}")


def main(wheel: Path | None) -> None:
    of_cards(CARDS, in_bf16, None, [0.8, 0.7, 0.5, 3.0], [0.2, 0.1, 0.05, 0.5], [1, 1, 1, 20])
    of_cards(CARDS[1:], in_fp8, "fp8", [0.6, 5.0], [0.1, 0.5], [1, 30])
    of_cards(("b200", "rtxpro6000"), in_fp4, "nvfp4", [0.5, 5.0], [0.1, 0.5], [1, 30])
    integers(INT8, (8,), wheel)
    integers(WEIGHTS, (4, 8), wheel)


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", nargs="?", type=Path)
    main(parser.parse_args(words).wheel)


if __name__ == "__main__":
    script(__file__, command)
