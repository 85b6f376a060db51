"""The inputs of a calibration: device, checkpoint, tokenizer and exit heads, each opened when it is first used."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import helios_sim
from calibrate.exits.texts import TASKS
from calibrate.schema import DRAFTERS, POTENTIAL, PREDICTORS, CalibrateConfig
from calibrate.stages import CODE
from helios_sim.contents import code_of, digest_of
from helios_sim.errors import TooLittleMemory, UserError, WeightsError
from helios_sim.live.checkpoint.known import SHORT_NAMES
from helios_sim.live.served import check_packages
from helios_sim.report import format as fmt

if TYPE_CHECKING:
    import torch

    from calibrate.measure.device import TimedDevice
    from calibrate.measure.subject import TableLimits
    from helios_sim.live.checkpoint.source import Checkpoint
    from helios_sim.live.model.architecture import Architecture
    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.heads import ExitHeads
    from helios_sim.profile.spec import ModelSpec

QUICK_MODELS = 16  # memory in a quick run, in multiples of the weights in float32
EVEN_EXITS = 5  # early exits of a model without heads, spread evenly
DEPTHS_OF_POTENTIAL = 8  # also used for predictors; reading more takes as long as the model itself
# Code that measures and code that is measured. The rest only writes pages or passes on results.
MEASURING = (
    "measure", "exits", "campaigns/device.py", "campaigns/headline.py", "inputs.py", "train_exits.py", "work.py",
)  # fmt: skip
MEASURED = ("core", "engine", "exits", "live", "policy", "profile", "serving", "study", "validate", "simulation.py")


class Inputs:
    """Opens each input lazily, since a resumed call may need none of them."""

    def __init__(self, config: CalibrateConfig) -> None:
        self.config = config

    def check(self) -> None:
        """Raise UserError for anything that would stop a stage: packages, device, weights, family, memory, heads."""
        check_packages("measuring a model")
        self._check_name()
        layers = self.layers
        self._check_room(self.config.model.name, self.spec(1.0), "set model.layers lower, or another dtype")
        if not set(self.exits) <= set(range(1, layers)):
            allowed = f"depths from 1 to {layers - 1}, below the last layer loaded"
            raise UserError("model.exits", list(self.exits), allowed, "name others, or leave it out")
        _ = self.heads
        self._check_drafters()
        unknown = sorted(set(self.config.tasks or ()) - set(TASKS))
        if unknown:
            raise UserError("tasks", unknown, f"some of {', '.join(TASKS)}", "correct the names, or leave it out")

    def _check_room(self, name: str, spec: ModelSpec, fix: str) -> None:
        needed, there = spec.weight_bytes(spec.n_layers), self.device.facts.memory_bytes
        if needed > there:
            taken, given = (fmt.in_unit(n_bytes, "bytes") for n_bytes in (needed, there))
            allowed = f"{spec.n_layers} layers in {self.dtype} take {taken}, and {given} are there"
            raise TooLittleMemory("memory", name, allowed, fix)

    def _check_drafters(self) -> None:
        """Raise UserError for a drafter that is the model or another drafter, or has another tokenizer."""
        from helios_sim.live.model.architecture import model_spec
        from helios_sim.live.other_drafts import are_one_tokenizer

        known = {self.checkpoint.digest: f"{self.config.model.name}, the model that verifies"}
        for name, checkpoint in self.drafters.items():
            if (same := known.get(checkpoint.digest)) is not None:
                allowed = f"weights of a model of its own: these are those of {same}"
                raise UserError(f"drafters.{name}", self.config.drafters[name], allowed, "name other weights")
            known[checkpoint.digest] = name
            if not are_one_tokenizer(self.tokenizer, checkpoint.tokenizer()):
                allowed = f"a model with the very tokenizer of {self.config.model.name}, whose tokens it is to draft"
                raise UserError(
                    f"drafters.{name}", self.config.drafters[name], allowed, "name a model of the same family"
                )
            spec = model_spec(checkpoint.architecture, name, 1.0, self.dtype)
            self._check_room(name, spec, "name a smaller drafter, or another dtype")

    def _check_name(self) -> None:
        """Raise WeightsError if the weights have another shape than the model of their name."""
        from helios_sim.profile.catalog import MODELS

        name = self.config.model.name
        different = self.architecture.differences(MODELS[name]) if name in MODELS else []
        if different and not self.checkpoint.is_tiny:
            allowed = f"the weights of {name}; these differ: {', '.join(different)}"
            raise WeightsError("model.weights", self.checkpoint.source, allowed, "name them otherwise by model.name")

    @cached_property
    def device(self) -> TimedDevice:
        from calibrate.measure.devices import open_device

        memory_bytes = self.config.memory_bytes
        if memory_bytes is None and self.config.quick:  # sizes of copies and reservations depend on it
            memory_bytes = QUICK_MODELS * 4 * self.architecture.weight_values(self.architecture.n_layers)
        return open_device(self.config.device, memory_bytes, self.config.threads)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        from helios_sim.live.checkpoint.random_weights import is_random
        from helios_sim.live.checkpoint.source import find_checkpoint, random_checkpoint

        wanted = self.config.model.weights or self.config.model.name
        if is_random(wanted):  # drawn on the device, so that billions of values do not cross the bus
            return random_checkpoint(wanted, self.config.device, self.config.seed)
        try:
            return find_checkpoint(wanted)
        except WeightsError as error:
            raise error.named_by("model" if self.config.model.weights is None else "model.weights") from error

    @cached_property
    def drafters(self) -> dict[str, Checkpoint]:
        """The drafters of `task=drafters` by name. Raises WeightsError for weights that cannot be opened."""
        from helios_sim.live.checkpoint.source import find_checkpoint

        found = {}
        for name, weights in self.config.drafters.items() if self.config.task == DRAFTERS else ():
            try:
                found[name] = find_checkpoint(SHORT_NAMES.get(weights, weights))
            except WeightsError as error:
                raise error.named_by(f"drafters.{name}") from error
        return found

    def drafter(self, name: str) -> SegmentedModel:
        """The drafter `name` with all its layers on the device. The model is dropped, and loaded again if used."""
        import torch

        from helios_sim.live.kernels.choice import kernels_for
        from helios_sim.live.model.decoder import SegmentedModel

        self.__dict__.pop("loaded", None)
        on = torch.device(self.device.torch_device)
        return SegmentedModel.load(
            self.drafters[name], None, self.torch_dtype, on, kernels_for(on, self.config.kernels)
        )

    @property
    def architecture(self) -> Architecture:
        return self.checkpoint.architecture

    @cached_property
    def layers(self) -> int:
        """The number of layers that are loaded."""
        most, wanted = self.architecture.n_layers, self.config.model.layers
        if wanted is not None and wanted > most:
            raise UserError("model.layers", wanted, f"1 to {most}, the model's own", "choose a cap within the model")
        return wanted or most

    @cached_property
    def dtype(self) -> str:
        if self.config.dtype is not None:
            return self.config.dtype
        facts = self.device.facts
        return "bfloat16" if facts.computes_bfloat16 else "float32"

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        import torch

        kind: torch.dtype = getattr(torch, self.dtype)
        return kind

    @property
    def model(self) -> SegmentedModel:
        """The model with its first `layers` layers, on the device."""
        return self.loaded[0]

    @cached_property
    def loaded(self) -> tuple[SegmentedModel, int | None]:
        """The model, and by how many bytes memory grew when it was loaded (None if the device cannot tell)."""
        import torch

        from calibrate.measure.memory import grown
        from helios_sim.live.kernels.choice import kernels_for
        from helios_sim.live.model.decoder import SegmentedModel

        def load() -> SegmentedModel:
            on = torch.device(self.device.torch_device)
            kernels = kernels_for(on, self.config.kernels)
            return SegmentedModel.load(self.checkpoint, self.layers, self.torch_dtype, on, kernels)

        return grown(self.device, load)

    def reload_layer(self) -> int:
        """Read the first layer again from the checkpoint. Returns its bytes."""
        from helios_sim.live.model.weights import load_layer, weight_bytes

        device = self.model.device
        return weight_bytes(load_layer(self.checkpoint, 0, self.torch_dtype, device))

    @cached_property
    def tokenizer(self) -> Any:
        return self.checkpoint.tokenizer()

    @property
    def whole(self) -> bool:
        """Whether every layer is loaded. Only then is there a full depth to compare with."""
        return self.layers == self.architecture.n_layers

    def limits(self) -> TableLimits:
        """How far the tables reach."""
        from calibrate.measure.subject import LIMITS, TableLimits

        c = self.config
        if c.quick:
            context = min(64, c.max_context_tokens or 64)
            return TableLimits(min(4, c.max_batch or 4), 16, min(16, context // 2), context, 8)
        most = LIMITS[self.device.facts.kind]
        batch, context = c.max_batch or most.max_batch, c.max_context_tokens or most.max_kv_tokens
        rows = max(batch, c.max_batch_tokens or most.max_rows)
        return replace(
            most, max_batch=batch, max_kv_tokens=context, max_rows=rows,
            max_chunk=min(most.max_chunk, context // 2, rows), max_head_rows=min(most.max_head_rows, rows),
        )  # fmt: skip

    @cached_property
    def heads_folder(self) -> Path | None:
        """The folder of the named or shipped heads; None for the model's own head, also if only exits are named."""
        from helios_sim.live.model.heads import HEADER, SHIPPED

        if self.config.heads is not None:
            return Path(self.config.heads).expanduser()
        shipped = SHIPPED / self.config.model.name
        if self.config.task == POTENTIAL:  # the potential is of the model's own head
            return None
        return shipped if (shipped / HEADER).is_file() and self.config.model.exits is None else None

    @cached_property
    def heads(self) -> ExitHeads:
        """The exit heads. Raises UserError if they belong to another model."""
        from helios_sim.live.model.heads import ExitHeads

        if self.heads_folder is None:
            return ExitHeads.own(self.exits)
        return ExitHeads.load(self.heads_folder, self.architecture, self.device.torch_device)

    def use_heads(self, folder: Path) -> None:
        """Use these heads, which were just trained, from now on."""
        for name in ("heads_folder", "heads", "exits"):
            self.__dict__.pop(name, None)
        self.config = replace(self.config, heads=str(folder), model=replace(self.config.model, exits=None))

    @cached_property
    def exits(self) -> tuple[int, ...]:
        """The depths of the early exits, below the last loaded layer."""
        from helios_sim.live.model.heads import read_header

        if self.config.model.exits is not None:
            return tuple(self.config.model.exits)
        if self.heads_folder is not None:
            return tuple(depth for depth in read_header(self.heads_folder)["exits"] if depth < self.layers)
        many = self.config.task in (POTENTIAL, PREDICTORS)
        return even_exits(self.layers, DEPTHS_OF_POTENTIAL if many else EVEN_EXITS)

    def heads_sha256(self) -> str | None:
        """The sha256 of the heads' tensors, by their header; None for the model's own head."""
        from helios_sim.live.model.heads import read_header

        return None if self.heads_folder is None else str(read_header(self.heads_folder)["sha256"])

    def heads_digest(self) -> str | None:
        """A digest of the heads' tensors and header; None for the model's own head."""
        from helios_sim.live.model.heads import HEADER, TENSORS

        if self.heads_folder is None:
            return None
        return digest_of(*(self.heads_folder / name for name in (HEADER, TENSORS)))

    def spec(self, chars_per_token: float) -> ModelSpec:
        from helios_sim.live.model.architecture import model_spec

        spec = model_spec(self.architecture, self.config.model.name, chars_per_token, self.dtype)
        return replace(spec, n_layers=self.layers)

    def identity(self) -> dict[str, Any]:
        """The settings that every measurement of the model depends on."""
        facts = self.device.facts
        return {
            "model": self.config.model.name,
            "weights": self.checkpoint.digest,
            "layers": self.layers,
            "dtype": self.dtype,
            "device": facts.name,
            "threads": self.config.threads,
            "memory_bytes": self.config.memory_bytes,
            **measured_by(),
        }


@cache
def measured_by() -> dict[str, str]:
    """A digest of the measuring and the measured code, and torch's version. Samples of different versions never mix."""
    ours, theirs = Path(__file__).parent, Path(helios_sim.__file__).parent
    return {CODE: code_of(ours, *MEASURING) + code_of(theirs, *MEASURED), "torch": version("torch")}


def even_exits(layers: int, most: int = EVEN_EXITS) -> tuple[int, ...]:
    """Evenly spaced depths below `layers`, at most `most` of them; none for a single layer."""
    count = min(most, layers - 1)
    return tuple(sorted({round(layers * (i + 1) / (count + 1)) for i in range(count)}))
