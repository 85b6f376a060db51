"""The precision of a served model: the effect of `server.quantization` and `server.kv_cache_dtype` on its shape.

Both are vLLM's names. The card's units decide how a format is priced: `products_on`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from helios_sim.errors import UserError, require_one_of
from helios_sim.profile.formats import FORMATS, FP4, FP8, INT8, WEIGHTS, named_format
from helios_sim.profile.spec import HardwareSpec, ModelSpec
from helios_sim.provenance import Assumption

KV_BYTES = {"auto": None, "bfloat16": 2, "fp8": 1}  # by server.kv_cache_dtype; None: as in the checkpoint


@dataclass(frozen=True, slots=True)
class Precision:
    """The precision that settings ask for. Raises UserError if they are not known."""

    quantization: str | None = None  # server.quantization; None: as the model's name or config says, else bf16
    kv_cache_dtype: str = "auto"  # server.kv_cache_dtype

    def __post_init__(self) -> None:
        if self.quantization is not None:
            require_one_of("server.quantization", self.quantization, FORMATS)
        require_one_of("server.kv_cache_dtype", self.kv_cache_dtype, KV_BYTES)

    @property
    def is_bf16(self) -> bool:
        """Whether the settings ask for nothing beyond bf16, or the precision in a model's name."""
        return self.quantization is None and self.kv_cache_dtype != "fp8"

    @property
    def settings(self) -> str:
        """The settings as words of a command line, each after a blank."""
        of_weights = "" if self.quantization is None else f" server.quantization={self.quantization}"
        return of_weights + ("" if self.kv_cache_dtype == "auto" else f" server.kv_cache_dtype={self.kv_cache_dtype}")

    @property
    def first(self) -> tuple[str, str]:
        """The first setting with a value of its own, and its value."""
        if self.quantization is not None:
            return "server.quantization", self.quantization
        return "server.kv_cache_dtype", self.kv_cache_dtype

    def applied(self, model: ModelSpec) -> ModelSpec:
        """The model as it is served, with the change in its name. Raises UserError if its checkpoint differs."""
        kv_bytes = KV_BYTES[self.kv_cache_dtype]
        if self.quantization is not None:
            form = FORMATS[self.quantization]
            if model.quantization is None:
                model = replace(model, name=f"{model.name}-{form.name}", quantization=form)
            elif form.name not in (model.quantization.name, model.quantization.name.split("-")[0]):
                allowed = f"left out: {model.name} is in {model.quantization.name} already"
                raise UserError("server.quantization", self.quantization, allowed, "name the unquantized model")
        if kv_bytes not in (None, model.kv_bytes_per_value):
            name = f"{model.name}-kv-{self.kv_cache_dtype}"
            model = replace(model, name=name, kv_bytes_per_value=kv_bytes)
        return model


PLAIN = Precision()


def served_as(name: str, model: ModelSpec) -> str:
    """A user's name of a model, with the precision in which it is served if the name does not say it."""
    form = model.quantization
    weights = "" if form is None or named_format(name)[1] is not None or name.endswith(".gguf") else f"-{form.name}"
    return name + weights + ("-kv-fp8" if model.kv_bytes_per_value == 1 else "")


def in_words(model: ModelSpec) -> str:
    """The precision in words, such as "weights in fp8, K and V in bf16"."""
    plain = {4: "float32", 2: "bf16", 1: "fp8"}
    values = plain.get(model.weight_bytes_per_value, f"{model.weight_bytes_per_value} bytes a value")
    weights = values if model.quantization is None else model.quantization.name
    kv = plain.get(model.kv_bytes_per_value, f"{model.kv_bytes_per_value} bytes a value")
    return f"weights in {weights}, K and V in {kv}"


def scaled_by(model: ModelSpec, products: str | None, measured: str | None) -> tuple[str, ...]:
    """Figures that were scaled because of the precision, for a profile's provenance.

    `measured` is the kind of product in the measured tables of layers; None if their times are by fitted shares.
    """
    form, said = model.quantization, []
    if form is None:
        return ()
    if products == WEIGHTS and form.products != WEIGHTS:
        said.append(f"no units for {form.products} on this card: weights are made bf16 in the kernel, as vLLM does")
    if measured in ("fp8", "nvfp4"):
        made = f"the making of {products} inputs, which an engine may do elsewhere"
        said.append(f"products in {measured}: as measured, with {made}")
    if measured == "fp8" and products == INT8:
        said.append("products in int8: those in fp8, which have as many bytes and the same rate on this card")
    if measured in ("int4_wo", "int8_wo", "sq"):
        said.append(f"products of the layers: as measured under TensorRT-LLM 1.0.0 on the A100 ({measured}), not vLLM")
    if measured is None and products in (INT8, WEIGHTS):
        said.append("products of the layers: by shares fitted to TensorRT-LLM's on an A100, the only ones measured")
    if (form.group and measured not in ("nvfp4", "fp8_block")) or (form.outputs == 1 and products == FP8):
        said.append("scales of groups or outputs: their bytes count, times are those of products without them")
    return tuple(said)


def assumed_of(model: ModelSpec) -> tuple[Assumption, ...]:
    """Assumptions that the precision needs."""
    if model.quantization is None and model.kv_bytes_per_value != 1:
        return ()
    why = "agreement, exits and lengths of answers are those of the model in bf16"
    return (Assumption("effect of the precision on answers", None, why, "exits.source"),)


def products_on(model: ModelSpec, card: HardwareSpec) -> str | None:
    """The kind of products of the model's layers on this card: FP8, INT8, FP4 or WEIGHTS; None for plain bf16.

    As vLLM does, weights in fp8 and fp4 are made bf16 in the kernel where a card has no units for them (its page "FP8
    W8A8"), and int8 is not computed on Blackwell ("INT8 W8A8"). Raises UserError for int8 there, and for K and V in fp8
    on a card without units for it.
    """
    if model.kv_bytes_per_value == 1 and card.fp8_flops_per_s is None:
        fix = "leave it out, or choose a card with units for fp8, such as l40s, h100 or b200"
        raise UserError("server.kv_cache_dtype", "fp8", f"a card with units for fp8, which {card.name} has not", fix)
    if model.quantization is None:
        return None
    products = model.quantization.products
    if products == INT8 and card.int8_flops_per_s is None:
        allowed = f"a card for which vLLM has int8 products, which {card.name} is not"
        raise UserError("server.quantization", model.quantization.name, allowed, "choose fp8 or int4 on this card")
    lacks = {FP8: card.fp8_flops_per_s is None, FP4: card.fp4_flops_per_s is None}
    return WEIGHTS if lacks.get(products) else products


def check_groups(model: ModelSpec, cards: int) -> None:
    """Raise UserError if inputs that share a scale would be cut by a matrix's end, or by the cards of a group."""
    form = model.quantization
    if form is None or not form.group or form.outputs != 1:
        return
    widths = {"n_heads x head_dim": model.n_heads * model.head_dim, "d_ff": model.d_ff}  # these inputs are split
    parts = {what: (inputs, cards) for what, inputs in widths.items()} | {"d_model": (model.d_model, 1)}
    for what, (inputs, split) in parts.items():
        if inputs % (split * form.group):
            on = f" on each of {cards} cards" if cards > 1 else ""
            allowed = f"groups of {form.group} inputs that divide {what} of {model.name}, {inputs // split}{on}"
            fix = "choose fp8, or another number of cards" if cards > 1 else "choose fp8"
            raise UserError("server.quantization", form.name, allowed, fix)
