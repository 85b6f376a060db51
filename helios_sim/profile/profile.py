"""The costs of a model on a card: tables, memory, loads and provenance. Also the card's memory left for KV."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from helios_sim.core.price import FLOOR, TIME
from helios_sim.errors import UserError
from helios_sim.exits.rule import MEASURES, Confidence
from helios_sim.profile.composition import Composition
from helios_sim.profile.operating import OperatingPoints
from helios_sim.profile.price_tables import Pricing
from helios_sim.profile.spec import Anchors, HardwareSpec, ModelSpec, Runtime, TimeBand, require_within
from helios_sim.profile.tables import LayerTables, RowsTable
from helios_sim.provenance import Provenance

_RANGES = {
    "load_bytes_per_s": (1.0, 1e18), "load_slowdown": (1.0, 1e3), "time_factor": (0.0, 1e9),
    "disk_bytes_per_s": (1.0, 1e18), "link_bytes_per_s": (1.0, 1e18), "resident_layers": (1, 10_000),
    "times_within": (0.0, 1e3),
    "mixed_factor": (0.0, 1e3), "unequal_kv_factor": (0.0, 1e3), "activation_reserve_bytes": (0, 1 << 60),
}  # fmt: skip
_MOST_CELLS = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Tables hold device time of one layer or one head pass; the host's costs come from `runtime`.

    `load_slowdown` multiplies device time while weights stream into the card. `mixed_factor` multiplies a layer's
    time when an iteration holds both prefill and decode; `unequal_kv_factor` multiplies decode attention for batches
    of unequal KV lengths; both are None if no source gives them. `time_factor` multiplies whole iterations.
    `padded_kv`: decode attention reads every context of a batch as far as the longest one, behind a mask, and so takes
    as long as for equal lengths of that size.
    Raises UserError if a table is damaged.
    """

    model: ModelSpec
    hardware: HardwareSpec
    runtime: Runtime
    provenance: Provenance
    layer_tables: tuple[LayerTables, ...]  # one per layer class
    layer_class: tuple[int, ...]  # (n_layers,) index into layer_tables
    head: RowsTable  # final norm, LM head and sampling
    embedding: RowsTable  # lookup, once an iteration
    check: RowsTable | None  # an exit check through the head, with all that belongs to it; None: the head's time
    activation_reserve_bytes: int
    load_bytes_per_s: float  # pinned host memory to the card
    load_slowdown: float = 1.0
    mixed_factor: float | None = None
    unequal_kv_factor: float | None = None
    time_factor: float = 1.0
    check_classifier: RowsTable | None = None  # a check by a classifier, without the head; None if not known
    padded_kv: bool = False
    anchors: Anchors | None = None  # how fast the device was when this was measured; None if not known
    time_band: TimeBand | None = None  # how far whole iterations may be off; None if not known
    disk_bytes_per_s: float | None = None  # rate of reading weights from files; None if not known
    link_bytes_per_s: float | None = None  # host memory to the card, if loads come from files; None: load_bytes_per_s
    resident_layers: int | None = None  # layers above come from host memory in each iteration; None: all stay
    check_predictor: RowsTable | None = None  # a check by a predictor of a few words; None if not known (`predictor`)
    times_within: float | None = None  # relative error of all times if time to measure was short; None: it was not
    _pricing: Pricing = field(init=False, repr=False)
    operating: OperatingPoints = field(init=False, repr=False)
    _weight_bytes: dict[int, int] = field(init=False, repr=False, default_factory=dict)  # by layers

    def __post_init__(self) -> None:
        self._check_all()
        factors = {
            "load_slowdown": self.load_slowdown,
            "mixed_factor": 1.0 if self.mixed_factor is None else self.mixed_factor,
            "kv_factor": 1.0 if self.unequal_kv_factor is None else self.unequal_kv_factor,
            "time_factor": self.time_factor,
            **self._late_layers(),
        }
        pricing = Pricing(
            self.model, self.hardware, self.runtime, self.layer_tables, self.layer_class, self.head, self.check,
            self.check_classifier, self.embedding, factors, self.padded_kv,
        )  # fmt: skip
        object.__setattr__(self, "_pricing", pricing)
        object.__setattr__(self, "operating", OperatingPoints(pricing))

    def __reduce__(self) -> tuple[type[Profile], tuple[object, ...]]:
        """Pickle the tables alone. Processes of a sweep make the lookups anew, with the same bits."""
        return type(self), tuple(getattr(self, f.name) for f in fields(self) if f.init)

    @property
    def pricing(self) -> Pricing:
        return self._pricing

    @property
    def prices_spread(self) -> bool:
        """Whether prices depend on the shortest and the longest context of a batch."""
        return self.padded_kv or any(tables.unequal_kv is not None for tables in self.layer_tables)

    @property
    def name(self) -> str:
        return f"{self.model.name}@{self.hardware.name}"

    def weight_bytes(self, layers: int) -> int:
        """Bytes of the model loaded up to `layers`, embedding and LM head included."""
        found = self._weight_bytes.get(layers)
        if found is None:
            found = self._weight_bytes[layers] = self.model.weight_bytes(layers)
        return found

    def kv_bytes_per_token(self, layers: int) -> int:
        """Bytes of K and V of one token in `layers` layers."""
        return layers * self.model.kv_bytes_per_token_layer

    def load_time_s(self, n_bytes: int) -> float:
        """Seconds to load weights from host memory over a free link."""
        return self.runtime.load_fixed_s + n_bytes / self.load_bytes_per_s

    def with_load_rate(self, bytes_per_s: float) -> Profile:
        """The profile with another rate of loads. Their share of the card's memory bandwidth changes in proportion."""
        share = (1.0 - 1.0 / self.load_slowdown) * bytes_per_s / self.load_bytes_per_s
        if not share < 1.0:
            allowed = f"less than the memory of {self.hardware.name} can take in beside serving"
            raise UserError("runtime.load_gb_per_s", bytes_per_s / 1e9, allowed, "correct it")
        known = self.provenance.without(["load_bytes_per_s", "load_slowdown"])
        return replace(self, load_bytes_per_s=bytes_per_s, load_slowdown=1.0 / (1.0 - share), provenance=known)

    def with_disk_rate(self, bytes_per_s: float) -> Profile:
        """The profile with another rate of reading files."""
        return replace(self, disk_bytes_per_s=bytes_per_s, provenance=self.provenance.without(["disk_bytes_per_s"]))

    def from_files(self) -> Profile:
        """The profile with loads that read files, for models that are discarded when they leave the card.

        A file is read and copied to the card at the same time, so the slower rate counts. Raises UserError if the rate
        of reading is not known.
        """
        if self.disk_bytes_per_s is None:
            allowed = f"1: at which rate {self.name} is read from files is not known"
            raise UserError("server.sleep_level", 2, allowed, "set runtime.disk_gb_per_s, or measure the profile")
        slower = self.with_load_rate(min(self.disk_bytes_per_s, self.load_bytes_per_s))
        return replace(slower, link_bytes_per_s=self.load_bytes_per_s, provenance=self.provenance)

    def with_resident(self, layers: int) -> Profile:
        """The profile with only so many layers on the card: prices of `Placement.resident_layers`."""
        return replace(self, resident_layers=layers)

    def _late_layers(self) -> dict[str, float]:
        """The number of resident layers, and the seconds that a late layer takes on the link and in memory."""
        link_bytes_per_s = self.load_bytes_per_s if self.link_bytes_per_s is None else self.link_bytes_per_s
        share = 1.0 - 1.0 / self.load_slowdown  # share of the card's bandwidth that loads take
        return {
            "resident_layers": self.model.n_layers if self.resident_layers is None else self.resident_layers,
            "late_s_per_layer": self.model.layer_bytes / link_bytes_per_s,
            "late_write_s_per_layer": self.model.layer_bytes / self.load_bytes_per_s * share,
        }

    def check_table(self, confidence: Confidence) -> RowsTable:
        """The table of an exit check's cost under this measure. Raises UserError if it was not measured."""
        if confidence.by_head:
            return self.head if self.check is None else self.check
        if MEASURES[confidence].proposes:
            if self.check_predictor is None:
                allowed = f"the profile {self.name} has no cost of a predictor (table check_predictor)"
                fix = "set exits.confidence=predictor, for which it is derived, or measure the profile"
                raise UserError("exits.confidence", confidence.value, allowed, fix)
            return self.check_predictor
        if self.check_classifier is None:
            raise UserError(
                "exits.confidence",
                confidence.value,
                f"the profile {self.name} has no cost of a check on the hidden state (table check_classifier)",
                f"set it to {Confidence.MAX_PROBABILITY.value} or {Confidence.MARGIN.value}, or measure the profile",
            )
        return self.check_classifier

    def checking(self, confidence: Confidence) -> Profile:
        """The profile with checks by this measure. Raises UserError if their cost is not known."""
        table = self.check_table(confidence)
        return replace(self, check_classifier=table) if MEASURES[confidence].proposes else self

    def iteration_time_s(self, c: Composition) -> NDArray[np.float64]:
        """(K,) seconds. An iteration has the same price to the last bit alone or as one of K.

        Raises ValueError when bounds do not ascend within the model or a prefill depth is not one of them, UserError
        when a classifier checks and its cost is not known.
        """
        self._check_classifier(c)
        return self._pricing.time_s(c)

    def prompt_time_s(self, layers: int, tokens: int, budget: int, cached: int = 0) -> tuple[float, float]:
        """Seconds of a prompt on its own, in chunks of at most `budget` tokens, and their floor.

        Its first `cached` tokens are not computed, but attended to.
        """
        found = self.operating.of(layers, (tokens, cached, budget), (1, 0), (0.0, 0.0, 0.0))
        return found.prefill_s, found.prefill_floor_s

    def decodes_time_s(
        self, layers: int, batch: NDArray[np.int64], kv_tokens: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(K,) `iteration_time_s` of iterations with nothing but decodes, all to one depth."""
        return self._pricing.decodes(layers, batch, kv_tokens, TIME)[:, TIME]

    def decodes_floor_s(
        self, layers: int, batch: NDArray[np.int64], kv_tokens: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(K,) `iteration_floor_s` of iterations with nothing but decodes, all to one depth."""
        return self._pricing.decodes(layers, batch, kv_tokens, FLOOR)[:, FLOOR]

    def iteration_floor_s(self, c: Composition) -> NDArray[np.float64]:
        """(K,) roofline floors in seconds. Floor divided by `iteration_time_s` is the utilisation."""
        return self._pricing.floor_s(c)

    def outside_grid(self, c: Composition) -> NDArray[np.bool_]:
        """(K,) whether a table had to be extrapolated."""
        return self._pricing.outside_grid(c)

    def with_runtime(self, runtime: Runtime) -> Profile:
        """The profile with other host costs. Their `sources` say what is assumed."""
        known = (f"runtime.{f.name}" for f in fields(Runtime))
        return replace(self, runtime=runtime, provenance=self.provenance.without(known))

    def scaled(self, time_factor: float) -> Profile:
        """The profile with times of iterations scaled, to study profile errors. Loads do not change."""
        return replace(self, time_factor=self.time_factor * time_factor)

    def _check_classifier(self, c: Composition) -> None:
        if c.classifier_tokens is not None:
            self.check_table(Confidence.CLASSIFIER)

    def _check_all(self) -> None:
        for i, tables in enumerate(self.layer_tables):
            tables.check(f"{self.name}.layer_tables[{i}]")
        self.head.check(f"{self.name}.head")
        self.embedding.check(f"{self.name}.embedding")
        if self.check is not None:
            self.check.check(f"{self.name}.check")
        if self.check_classifier is not None:
            self.check_classifier.check(f"{self.name}.check_classifier")
        if self.check_predictor is not None:
            self.check_predictor.check(f"{self.name}.check_predictor")
        if self.padded_kv and any(tables.unequal_kv is not None for tables in self.layer_tables):
            fix = "leave one of them out"
            raise UserError(f"{self.name}.padded_kv", True, "false beside a table of unequal KV lengths", fix)
        known = range(len(self.layer_tables))
        if len(self.layer_class) != self.model.n_layers or not all(i in known for i in self.layer_class):
            raise UserError(
                f"{self.name}.layer_class", self.layer_class,
                f"one class below {len(self.layer_tables)} for each of {self.model.n_layers} layers",
                "rebuild the profile",
            )  # fmt: skip
        require_within(self.name, self, _RANGES)
        cells = self._lookup_cells()
        if cells > _MOST_CELLS:
            fix = "take a coarser grid, or one that ends earlier"
            raise UserError(self.name, f"{cells} numbers", f"tables that unfold to at most {_MOST_CELLS}", fix)

    @property
    def _checks(self) -> tuple[RowsTable | None, ...]:
        return self.check, self.check_classifier, self.check_predictor

    def _lookup_cells(self) -> int:
        """Size of the arrays that `price_tables` makes: every number of rows, batch and KV length has an entry."""
        rows = [self.head, self.embedding, *(t for t in self._checks if t is not None)]
        rows += [table for tables in self.layer_tables for table in (tables.dense, tables.kv_projection)]
        cells = (4 + 3 * len(self.layer_tables)) * max(int(table.rows[-1]) for table in rows)
        of_class = 0
        for tables in self.layer_tables:
            decode, unequal, mixed = tables.decode_attention, tables.unequal_kv, tables.mixed_attention
            own = 2 * int(decode.first[-1]) * len(decode.second) + int(decode.second[-1])
            own += 0 if unequal is None else unequal.excess.size // len(unequal.batch) * int(unequal.batch[-1])
            own += 0 if mixed is None else mixed.time_s.size
            of_class = max(of_class, own)
        return cells + len(self.layer_tables) * of_class


class Weighs(Protocol):
    """The part of a profile that memory depends on."""

    @property
    def activation_reserve_bytes(self) -> int: ...

    def weight_bytes(self, layers: int) -> int: ...
    def kv_bytes_per_token(self, layers: int) -> int: ...


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """capacity x utilisation - weights of every resident placement - activation reserve = KV pool."""

    capacity_bytes: int
    utilisation: float  # share of the card given to the engine, as vLLM's gpu_memory_utilization
    block_tokens: int = 16

    @property
    def usable_bytes(self) -> int:
        return int(self.capacity_bytes * self.utilisation)

    def pool_bytes(self, resident: Iterable[tuple[Weighs, int]]) -> int:
        """Bytes left for KV with these (profile, layers) resident; negative when they do not fit.

        The activation reserve is the largest of the residents', since one model runs at a time.
        """
        weights = reserve = 0
        for profile, layers in resident:
            weights += profile.weight_bytes(layers)
            reserve = max(reserve, profile.activation_reserve_bytes)
        return self.usable_bytes - weights - reserve

    def pool_blocks(self, resident: Iterable[tuple[Weighs, int]], active: tuple[Weighs, int]) -> int:
        """KV blocks of the active placement that fit beside all residents (at least 0)."""
        profile, layers = active
        block_bytes = self.block_tokens * profile.kv_bytes_per_token(layers)
        return max(0, self.pool_bytes(resident) // block_bytes)
