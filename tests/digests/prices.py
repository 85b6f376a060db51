"""Random iterations of one profile from plain seeds, and digests of what they cost. Needs nothing but a profile."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import helios_sim
from digests.canonical import digest_of_bytes
from digests.serving import chooser
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import load_profile
from serving_cases import measured, uneven_profiles

BLOCK = 1000  # compositions that share a digest
BLOCKS = 10
MADE_UP = 12  # profiles with terms that no shipped profile has

# Upper ends of what is drawn. Half of the iterations are small, since profiles of small devices have small grids.
SMALL = {"rows": (4, 8, 16, 40), "kv": (30, 100, 250, 1000), "chunk": (60, 400), "context": 200}
LARGE = {"rows": (8, 64, 512, 6000), "kv": (60, 1500, 4096, 60_000), "chunk": (600, 9000), "context": 6000}
SHARES = (0.4, 0.7, 0.95, 1.0)  # of draws up to each of four ends, added up


def shipped() -> list[str]:
    return sorted(path.name for path in Path(helios_sim.__file__).parent.joinpath("data", "profiles").iterdir())


def profile_names() -> list[str]:
    return [*shipped(), *(f"made-up {i}" for i in range(MADE_UP))]


def profile_of(name: str) -> Profile:
    if not name.startswith("made-up"):
        return load_profile(name)
    choose = chooser(name)
    return measured(uneven_profiles(choose([0.0, 2e-5]))[choose(["a", "b"])], choose)


def block_digests(name: str, block: int, price: Callable[[Profile, Composition], Any] | None = None) -> dict[str, str]:
    """Digests of the float64 bytes of times and floors, and of the flags. `price` may stand in for the profile's own:
    it gives (time in s, floor in s, outside the grid) of a composition."""
    profile = profile_of(name)
    price = price or own_price
    rows = [price(profile, c) for c in compositions(profile, f"{name}/{block}", BLOCK)]
    time_s, floor_s, outside = zip(*rows, strict=True)
    return {
        "time_s": digest_of_bytes([np.array(time_s, "<f8").tobytes()]),
        "floor_s": digest_of_bytes([np.array(floor_s, "<f8").tobytes()]),
        "outside": digest_of_bytes([np.array(outside, np.uint8).tobytes()]),
    }


def own_price(profile: Profile, c: Composition) -> tuple[float, float, bool]:
    return (
        float(profile.iteration_time_s(c)[0]),
        float(profile.iteration_floor_s(c)[0]),
        bool(profile.outside_grid(c)[0]),
    )


def compositions(profile: Profile, seed: str, n: int) -> Iterator[Composition]:
    """n single iterations of this model. The seed gives the same ones with every version of Python."""
    draw = random.Random(seed).random
    return (_composition(profile, draw) for _ in range(n))


def _composition(profile: Profile, draw: Callable[[], float]) -> Composition:
    ends: dict[str, Any] = SMALL if draw() < 0.5 else LARGE

    def below(end: int) -> int:
        return int(draw() * end)

    def count() -> int:
        """A number of rows: none in one of eight."""
        return 0 if draw() < 0.125 else 1 + below(_end(ends["rows"]))

    def _end(of: tuple[int, ...]) -> int:
        kind = draw()
        return next(end for end, share in zip(of, SHARES, strict=True) if kind < share)

    n_layers = profile.model.n_layers
    bands = 1 + below(min(5, n_layers))
    depths = {n_layers} if draw() < 0.6 else set()
    while len(depths) < bands:
        depths.add(1 + below(n_layers))
    bounds = tuple(sorted(depths))

    decode = [count()]
    for _ in bounds[1:]:  # fewer go deeper, unless what was left out earlier is computed there
        before = decode[-1]
        decode.append(before + below(8) if draw() < 0.15 else below(before + 1))
    mean = 1 + below(_end(ends["kv"]))
    kv = [rows * mean + below(rows + 1) for rows in decode]
    least = most = None
    if decode[0] and draw() < 0.7:
        shortest = 1 + below(kv[0] // decode[0])
        longest = max(-(-kv[0] // decode[0]), shortest) + (0 if draw() < 0.2 else below(2 * mean))
        least, most = np.array([shortest]), np.array([longest])

    chunks: list[PrefillChunk] = []
    if draw() < 0.45:
        for _ in range(1 + below(3)):
            tokens = 1 + below(ends["chunk"][draw() < 0.2])
            chunks.append(PrefillChunk(tokens, 0 if draw() < 0.4 else below(ends["context"]), bounds[below(bands)]))

    def by_band(share: float) -> np.ndarray | None:
        if draw() >= share:
            return None
        return np.array([[count() if draw() < 0.7 else 0 for _ in bounds]], np.int64)

    return Composition(
        bounds=bounds,
        decode_tokens=np.array([decode], np.int64),
        decode_kv_tokens=np.array([kv], np.int64),
        sampled_tokens=np.array([decode[-1] if draw() < 0.5 else count()], np.int64),
        check_tokens=by_band(0.4),
        classifier_tokens=by_band(0.4) if profile.check_classifier is not None else None,
        decode_kv_least=least,
        decode_kv_most=most,
        propagated_tokens=by_band(0.4),
        prefill=tuple(chunks),
        host_sync_at_checks=draw() < 0.5,
        host_ahead=draw() < 0.3,
        loading=draw() < 0.25,
    )
