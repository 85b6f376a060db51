"""Devices: one card by name or by a file of its figures, or a group of cards that work as one (tensor parallelism).

`h100-80gb` is a card of the catalogue, `card.yaml` a user's own card, `4xh100-80gb` and `4xcard.yaml` groups of four.
Other spellings of a name (H100, NVIDIA H100 80GB HBM3, 4 x h100) mean the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from helios_sim.errors import HardwareError, UserError, near_names
from helios_sim.profile.catalog import (
    CARDS,
    HARDWARE,
    LOAD_BYTES_PER_S,
    PCIE_LINK,
    Link,
    card_key,
    card_spec,
)
from helios_sim.profile.precision import check_groups
from helios_sim.profile.spec import HardwareSpec, ModelSpec
from helios_sim.profile.tables import FloatArray
from helios_sim.untrusted import Fields, parse_yaml, read_text, reading

DEGREES = (1, 2, 4, 8)  # sizes of groups for which all-reduces were measured
_GROUP = re.compile(r"([0-9]{1,9}) *[xX] *(.+)")
_FIX = "correct the file"
_FLOPS_PER_BYTE = (1.0, 5_000.0)  # plausible range: a CPU has some 5, a B300 some 300
_MOST_TIMES = 16.0  # most operations in fewer bits, in multiples of bf16
_READ_S = 20.0  # longest plausible time to read all memory: 2 TB at 100 GB/s, as of a host
_KEYS = (
    "name", "hbm_gib", "hbm_gb_per_s", "tflops", "tdp_w", "idle_w", "load_gb_per_s", "link_gb_per_s", "link_us",
    "source", "fp8_tflops", "int8_tflops", "fp4_tflops",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Device:
    """One card, or `cards` equal cards that run a model together with its matrices split over them."""

    card: HardwareSpec  # one of the cards
    link: Link
    load_bytes_per_s: float  # from pinned host memory to one card
    cards: int = 1
    key: str | None = None  # the card's name in `catalog.CARDS`; None for a user's own card

    @property
    def name(self) -> str:
        return self.card.name if self.cards == 1 else f"{self.cards}x{self.card.name}"

    @property
    def whole(self) -> HardwareSpec:
        """The group as one device: memory, bandwidth, operations and power are the sums of its cards'."""
        if self.cards == 1:
            return self.card
        n, card = self.cards, self.card
        of_all = (
            "tdp_w", "idle_w", "least_busy_w", "most_busy_w", "fp8_flops_per_s", "int8_flops_per_s", "fp4_flops_per_s",
        )  # fmt: skip
        sums = {key: None if (one := getattr(card, key)) is None else n * one for key in of_all}
        return replace(
            card, name=self.name, hbm_bytes=n * card.hbm_bytes, hbm_bytes_per_s=n * card.hbm_bytes_per_s,
            flops_per_s=n * card.flops_per_s, source=f"{n} cards, each: {card.source}", **sums,
        )  # fmt: skip


def group_of(name: str) -> tuple[int, str]:
    """The number of cards that a name of hardware means, and the name or file of each."""
    grouped = _GROUP.fullmatch(name.strip())
    return (int(grouped[1]), grouped[2]) if grouped else (1, name.strip())


def catalogue_name(card: str) -> str | None:
    """A card's name in the catalogue, in `HARDWARE` if it is there; None if it is not known."""
    return card.lower() if card.lower() in HARDWARE else card_key(card)


def card_file(card: str) -> Path | None:
    """The file of a user's own card, or None if the name is one of the catalogue."""
    return Path(card).expanduser() if card.lower().endswith((".yaml", ".yml")) else None


def device_of(name: str, key: str = "hardware") -> Device:
    """The device that a setting names. Raises UserError for one that is not known, or a file that is damaged."""
    degree, card = group_of(name)
    if (inner := group_of(card.strip("() ")))[0] != 1:
        fix = f"set hardware={inner[0]}x{inner[1]} server.replicas={degree}"
        allowed = "one group of cards, such as 4xh100; replicas of groups are server.replicas"
        raise HardwareError(key, name, allowed, fix)
    if degree not in DEGREES:
        allowed = f"a group of {', '.join(map(str, DEGREES[1:]))} cards: for these all-reduces were measured"
        raise HardwareError(key, name, allowed, "choose one of these sizes; replicas of groups are server.replicas")
    path = card_file(card)
    return replace(_known_card(card, key) if path is None else _own_card(path, key), cards=degree)


def _known_card(name: str, key: str) -> Device:
    found = catalogue_name(name)
    if found is None:
        near = near_names(name.lower(), (*HARDWARE, *CARDS))
        meant = f"did you mean {near[0]}? Or " if near else ""
        fix = f"{meant}describe it in a file: {key}=card.yaml (see README)"
        known = ", ".join(dict.fromkeys((*HARDWARE, *CARDS)))
        raise HardwareError(key, name, f"a card of the catalogue ({known}), N of one (4xh100), or a .yaml file", fix)
    of_card = card_key(found)
    assert of_card is not None
    card = CARDS[of_card]
    if found in HARDWARE:
        spec = replace(
            HARDWARE[found], fp8_flops_per_s=card.fp8_flops_per_s, int8_flops_per_s=card.int8_flops_per_s,
            fp4_flops_per_s=card.fp4_flops_per_s,
        )  # fmt: skip
        return Device(spec, card.link, LOAD_BYTES_PER_S[found], key=of_card)
    return Device(card_spec(found, card), card.link, card.load_bytes_per_s, key=of_card)


def _own_card(path: Path, key: str) -> Device:
    """Read a card from a YAML file with the keys of `_KEYS`, of which only the first four are required."""
    content = read_text(path, 64 << 10, f"set {key} to a file that is there")
    with reading(str(path), "damaged", "a YAML mapping", _FIX):
        values: Any = parse_yaml(content)
        if not isinstance(values, dict):
            raise UserError(str(path), type(values).__name__, f"a mapping of {', '.join(_KEYS)}", _FIX)
    fields = Fields(values, str(path), _FIX)
    spec = HardwareSpec(
        name=fields.text("name"),
        hbm_bytes=round(fields.number("hbm_gib", 0.1, 1e6) * 2**30),
        hbm_bytes_per_s=fields.number("hbm_gb_per_s", 1, 1e6) * 1e9,
        flops_per_s=fields.number("tflops", 0.01, 1e6) * 1e12,
        tdp_w=fields.maybe("tdp_w", 10, 1e5),
        idle_w=fields.maybe("idle_w", 0, 1e5),
        source=fields.text("source", default=f"{path.name}, as its author describes the card"),
        fp8_flops_per_s=_per_s(fields.maybe("fp8_tflops", 0.01, 1e6)),
        int8_flops_per_s=_per_s(fields.maybe("int8_tflops", 0.01, 1e6)),
        fp4_flops_per_s=_per_s(fields.maybe("fp4_tflops", 0.01, 1e6)),
    )
    link = Link(
        fields.number("link_us", 0.01, 1e6, PCIE_LINK.latency_s * 1e6) / 1e6,
        fields.number("link_gb_per_s", 0.1, 1e5, PCIE_LINK.bytes_per_s / 1e9) * 1e9,
        _said_of_link(fields, path),
    )
    load = fields.number("load_gb_per_s", 0.01, 1e5, min(25.0, spec.hbm_bytes_per_s / 1e9)) * 1e9
    fields.refuse_rest(f"only {', '.join(_KEYS)} are read")
    if group_of(spec.name)[0] != 1:
        raise fields.wrong("name", spec.name, "a name of one card: several are hardware=4xFILE")
    _check_units(fields, spec)
    return Device(spec, link, load)


def _check_units(fields: Fields, card: HardwareSpec) -> None:
    """Raise UserError if figures of a card do not go together, as when one of them is in another unit."""
    flops_per_byte = card.flops_per_s / card.hbm_bytes_per_s
    if not _FLOPS_PER_BYTE[0] <= flops_per_byte <= _FLOPS_PER_BYTE[1]:
        told = f"{card.flops_per_s / 1e12:g} TFLOP/s beside {card.hbm_bytes_per_s / 1e9:g} GB/s"
        low, high = _FLOPS_PER_BYTE
        allowed = f"from {low:g} to {high:g} operations a byte (an H100 has 295), not {flops_per_byte:.3g}"
        raise fields.wrong("tflops", told, allowed)
    if card.hbm_bytes / card.hbm_bytes_per_s > _READ_S:
        told = f"{card.hbm_bytes / 2**30:g} GiB beside {card.hbm_bytes_per_s / 1e9:g} GB/s"
        took = f"it takes {card.hbm_bytes / card.hbm_bytes_per_s:.3g} s (an H100 26 ms)"
        raise fields.wrong("hbm_gib", told, f"memory that is read in at most {_READ_S:g} s; {took}")
    for name in ("fp8_tflops", "int8_tflops", "fp4_tflops"):
        if fields.has(name) and fields.value(name) * 1e12 < card.flops_per_s:
            allowed = "at least tflops; left out where the card has no units for it"
            raise fields.wrong(name, fields.value(name), allowed)
        if fields.has(name) and fields.value(name) * 1e12 > _MOST_TIMES * card.flops_per_s:
            allowed = f"at most {_MOST_TIMES:g} times tflops (a B300 has 7 times as much in fp4)"
            raise fields.wrong(name, fields.value(name), allowed)
    for name in ("load_gb_per_s", "link_gb_per_s"):
        if fields.has(name) and fields.value(name) * 1e9 > card.hbm_bytes_per_s:
            raise fields.wrong(name, fields.value(name), "at most hbm_gb_per_s")


def _said_of_link(fields: Fields, path: Path) -> str:
    """The sources of the link's two figures."""
    given = [name for name in ("link_us", "link_gb_per_s") if fields.has(name)]
    if not given:
        return PCIE_LINK.source
    told = f"{' and '.join(given)} of {path.name}"
    return told if len(given) == 2 else f"{told}; the other {PCIE_LINK.source}"


def _per_s(tera: float | None) -> float | None:
    return None if tera is None else tera * 1e12


def shard(model: ModelSpec, cards: int, key: str = "hardware") -> ModelSpec:
    """The part of each layer that one card of a group computes: its share of heads, MLP and vocabulary.

    If there are fewer KV heads than cards, several cards keep the same KV head, as in vLLM. Norms run on every card.
    Raises HardwareError if the model cannot be split so.
    """
    check_groups(model, cards)
    if cards == 1:
        return model
    for what, size in (("n_heads", model.n_heads), ("d_ff", model.d_ff)):
        if size % cards:
            allowed = f"cards that divide {what} of {model.name}, {size}"
            raise HardwareError(key, f"{cards} cards", allowed, f"use {_divisors(model)} cards a group")
    if model.n_kv_heads % cards and cards % model.n_kv_heads:
        allowed = f"cards that divide the {model.n_kv_heads} KV heads of {model.name}, or a multiple of them"
        raise HardwareError(key, f"{cards} cards", allowed, f"use {_divisors(model)} cards a group")
    return replace(
        model, n_heads=model.n_heads // cards, n_kv_heads=max(1, model.n_kv_heads // cards), d_ff=model.d_ff // cards,
        vocab_size=-(-model.vocab_size // cards),
    )  # fmt: skip


def _divisors(model: ModelSpec) -> str:
    fits = [
        n for n in DEGREES
        if not model.n_heads % n and not model.d_ff % n and not (model.n_kv_heads % n and n % model.n_kv_heads)
    ]  # fmt: skip
    return " or ".join(map(str, fits))


def whole_model(model: ModelSpec, cards: int) -> ModelSpec:
    """The model as a group holds it: KV heads and norms count once for each card that keeps them."""
    if cards == 1:
        return model
    norms = 2 * model.d_model * (2 if model.bias else 1)
    kv_heads = cards * max(1, model.n_kv_heads // cards)
    return replace(
        model, n_kv_heads=kv_heads, other_layer_values=model.other_layer_values + (cards - 1) * norms
    )


def ring_s(link: Link, cards: int, moved_bytes: FloatArray) -> FloatArray:
    """Seconds of a ring all-reduce: latency + 2 (N - 1) / N x bytes / bandwidth."""
    if cards == 1:
        return np.zeros(len(moved_bytes))
    return np.asarray(link.latency_s + 2 * (cards - 1) / cards * moved_bytes / link.bytes_per_s)
