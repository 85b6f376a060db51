"""Fits the shares of a data sheet that cards without tables are assumed to reach, to the cards that have tables.

`python experiments/kernels/fit.py` prints the shares fitted to all measured cards, and the error of each card's times
by shares that were fitted to the others: what to expect of a card that nobody measured. Nothing else is fitted.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from helios_sim.profile.catalog import published_model
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.devices import device_of
from helios_sim.profile.importers.aiconfigurator import SHIPPED_SOURCES, device_profile
from helios_sim.profile.profile import Profile
from helios_sim.profile.roofline import Efficiency, device_roofline

CARDS = ("a100-80gb", "h100", "h200", "b200", "l40s", "rtxpro6000")
MODELS = ("llama-3.2-1b", "llama-2-7b", "llama-3.1-8b", "qwen2.5-14b", "qwen3-32b")
DECODES = ((1, 512), (8, 2048), (32, 1024), (128, 1024), (256, 512))  # running requests, context
PROMPTS = (128, 512, 2048, 4096)


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


def roofline_s(point: NDArray[np.float64], card: str) -> NDArray[np.float64]:
    efficiency = Efficiency(*point[:3], kernel_s=point[3] * 1e-6)
    models = [published_model(name) for name in MODELS]
    return np.concatenate([times_s(device_roofline(model, device_of(card), None, efficiency)) for model in models])


def fitted(cards: tuple[str, ...], measured: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Bandwidth, operations, operations of attention; and microseconds of a kernel."""

    def miss(point: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([np.log(roofline_s(point, card) / measured[card]) for card in cards])

    found = least_squares(miss, [0.8, 0.7, 0.5, 3.0], bounds=([0.2, 0.1, 0.05, 0.5], [1, 1, 1, 20]), loss="soft_l1")
    return np.asarray(found.x)


def main() -> None:
    models = [published_model(name) for name in MODELS]
    measured = {
        card: np.concatenate(
            [times_s(device_profile(m, device_of(card), SHIPPED_SOURCES[card], "")) for m in models]
        )
        for card in CARDS
    }  # fmt: skip
    names = [f.name for f in fields(Efficiency)]
    print("all cards: " + ", ".join(f"{n} {v:.3f}" for n, v in zip(names, fitted(CARDS, measured), strict=True)))
    n = len(DECODES)
    decode = np.tile(np.arange(n + len(PROMPTS)) < n, len(MODELS))
    everything = []
    print(f"{'card':<12} {'decode: median, 90th':>22} {'prefill: median, 90th':>22}   by shares of the others")
    for card in CARDS:
        point = fitted(tuple(other for other in CARDS if other != card), measured)
        error = roofline_s(point, card) / measured[card] - 1
        everything.append(error)
        parts = [f"{np.median(e):>+8.0%} {np.quantile(abs(e), 0.9):>8.0%}" for e in (error[decode], error[~decode])]
        print(f"{card:<12} {parts[0]:>22} {parts[1]:>22}   {', '.join(f'{v:.2f}' for v in point)}")
    error = np.concatenate(everything)
    both = np.tile(decode, len(CARDS))
    for name, of in (("decode", error[both]), ("prefill", error[~both])):
        low, high = np.quantile(1 / (1 + of), [0.05, 0.95])
        print(f"{name}: measured over predicted, 5 % to 95 %: {low:.2f} to {high:.2f}; mean error {abs(of).mean():.0%}")


if __name__ == "__main__":
    main()
