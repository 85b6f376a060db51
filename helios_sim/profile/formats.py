"""Formats of quantized weights: their bytes and names, and the kind of matrix products that they need.

Only matrices of layers are quantized. The embedding, the LM head, norms and biases stay in bf16, as in checkpoints of
AWQ, GPTQ and fp8. A format is given by its name, by the end of a model's name on Hugging Face (-FP8, -AWQ,
-GPTQ-Int4), or by the quantization_config of a config.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from helios_sim.errors import UserError, require_one_of
from helios_sim.untrusted import Fields

# Kinds of products. WEIGHTS: weights are converted to bf16 in each product
FP8, INT8, FP4, WEIGHTS = "fp8", "int8", "fp4", "weights"
_MOST_GROUP = 1 << 16


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The format of a weight matrix with n outputs and k inputs in a checkpoint."""

    name: str  # as in names of models and profiles
    bits: int  # bits of a weight, 8 or 4
    products: str  # FP8, INT8, FP4 or WEIGHTS
    group: int = 0  # inputs that share a scale; 0: all
    outputs: int = 1  # outputs that share a scale; 0: all
    scale_bytes: int = 2
    zero_bits: int = 0  # bits of the zero point beside each scale
    input_bytes: int = 0  # bytes of an index for each input
    scales_of_scales: int = 0  # scales that share a float32 scale; 0 if scales have none
    fixed_bytes: int = 0  # bytes of a matrix independent of its size
    bytes_of_a_million: int = 0  # bytes of a million weights, if matrices differ; 0: follow from the fields above

    def __post_init__(self) -> None:
        require_one_of("quantization.products", self.products, (FP8, INT8, FP4, WEIGHTS))
        sizes = {"group": self.group, "outputs": self.outputs, "scale_bytes": self.scale_bytes,
                 "zero_bits": self.zero_bits, "input_bytes": self.input_bytes,
                 "scales_of_scales": self.scales_of_scales, "fixed_bytes": self.fixed_bytes}  # fmt: skip
        for key, value in sizes.items():
            if not 0 <= value <= _MOST_GROUP:
                raise UserError(f"quantization.{key}", value, f"from 0 to {_MOST_GROUP}", "correct it")
        if not 0 <= self.bytes_of_a_million <= 2_000_000:
            key = "quantization.bytes_of_a_million"
            raise UserError(key, self.bytes_of_a_million, "from 0 to 2000000", "correct it")
        if self.bits not in (4, 8):
            raise UserError("quantization.bits", self.bits, "4 or 8", "choose another checkpoint")

    def matrix_bytes(self, n: int, k: int) -> int:
        """Bytes of a matrix of n outputs and k inputs: weights, scales, zero points and indices."""
        if self.bytes_of_a_million:
            return -(-n * k * self.bytes_of_a_million // 1_000_000)
        scales = -(-n // (self.outputs or n)) * -(-k // (self.group or k))
        found = -(-n * k * self.bits // 8) + scales * self.scale_bytes + -(-scales * self.zero_bits // 8)
        found += 4 * -(-scales // self.scales_of_scales) if self.scales_of_scales else 0
        return found + k * self.input_bytes + self.fixed_bytes

    @property
    def text(self) -> str:
        """The format in words, for people."""
        what = "floats" if self.name.startswith(("fp8", "fbgemm", "nvfp4")) else "integers"
        shared = f", a scale for each {self.group} inputs" if self.group else ""
        on_the_way = ", made bf16 in the kernel" if self.products == WEIGHTS else ", inputs too"
        return f"{self.name}: {self.bits}-bit {what}{shared}{on_the_way}"


# By `server.quantization`: the formats that vLLM, and the tools in its documentation, make by default.
FORMATS = {
    one.name: one
    for one in (
        WeightFormat("fp8", 8, FP8, outputs=0, scale_bytes=4),  # vLLM's own, when it loads bf16: one scale a matrix
        WeightFormat("fp8-block", 8, FP8, group=128, outputs=128, scale_bytes=4),  # as Qwen3 and DeepSeek publish it
        WeightFormat("int8", 8, INT8),  # W8A8 of llm-compressor: one bf16 scale an output
        WeightFormat("int4", 4, WEIGHTS, group=128),  # W4A16 of llm-compressor: symmetric, so without zero points
        WeightFormat("awq", 4, WEIGHTS, group=128, zero_bits=4),
        WeightFormat("gptq", 4, WEIGHTS, group=128, zero_bits=4, input_bytes=4),
        # Scales in fp8, and one float32 more for the weights and one for the inputs of a matrix
        WeightFormat("nvfp4", 4, FP4, group=16, scale_bytes=1, fixed_bytes=8),
        WeightFormat("bitsandbytes", 4, WEIGHTS, group=64, scale_bytes=1, scales_of_scales=256),  # NF4, scales nested
    )
}
_GPTQ_8 = WeightFormat("gptq-int8", 8, WEIGHTS, group=128, zero_bits=8, input_bytes=4)
_W8A16 = WeightFormat("w8a16", 8, WEIGHTS)
_ENDINGS = (  # ends of names on Hugging Face
    (r"-fp8(-dynamic|-kv)?$", FORMATS["fp8"]), (r"-awq(-int4)?$", FORMATS["awq"]), (r"-gptq-int8$", _GPTQ_8),
    (r"-gptq(-int4)?$", FORMATS["gptq"]), (r"-(quantized\.)?w8a8$|-int8$", FORMATS["int8"]),
    (r"-(quantized\.)?w4a16$|-int4$", FORMATS["int4"]), (r"-(quantized\.)?w8a16$", _W8A16),
    (r"-(nv)?fp4$", FORMATS["nvfp4"]), (r"-bnb-4bit$", FORMATS["bitsandbytes"]),
)  # fmt: skip

_BY_BLOCKS = re.compile(r"(^|/)qwen3[\w.-]*-fp8$", re.IGNORECASE)  # names under which Qwen publishes scales by blocks


def named_format(name: str) -> tuple[str, WeightFormat | None]:
    """A model's name without the ending for a quantization, and its format; None if the name has no such ending."""
    for pattern, form in _ENDINGS:
        plain = re.sub(pattern, "", name, flags=re.IGNORECASE)
        if plain != name and plain:
            return plain, FORMATS["fp8-block"] if _BY_BLOCKS.search(name) else form
    return name, None


def format_of_config(how: object, where: str, fix: str) -> tuple[WeightFormat, int | None, list[str]]:
    """The format in a config's quantization_config, bytes of a value of K and V (None if not given), and unknown keys.

    The unknown keys are false or null. Raises UserError for formats that are not priced: other methods, layers that
    differ, other bits.
    """
    key = f"quantization_config of {where}"
    if not isinstance(how, Mapping):
        raise UserError(key, how, "a mapping", fix)
    fields = Fields(how, key, fix)
    method = fields.text("quant_method", default="")
    readers = {
        "fp8": _fp8, "fbgemm_fp8": _fbgemm, "awq": _awq, "gptq": _gptq, "bitsandbytes": _bitsandbytes,
        "compressed-tensors": _compressed, "modelopt": _modelopt,
    }  # fmt: skip
    if method not in readers:
        raise UserError(key, method, f"one of {', '.join(readers)}", "give the config of the unquantized model")
    for name in _LEFT_OUT:
        _check_left_out(fields, name)
    found = readers[method](fields), _kv_bytes(fields)
    fields.ignore(_OF_NO_MATTER)
    _refuse_rest(fields)  # they may mean a quantization that is not priced
    return *found, [name for name in fields.off if name.rpartition(".")[2] not in _OFF_BY_DEFAULT]


_LEFT_OUT = ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules", "exclude_modules")
# Keys that change no byte and no priced kernel of a layer: how weights were found, and for which loader.
_OF_NO_MATTER = (
    "quant_method", "activation_scheme", "fmt", "version", "backend", "do_fuse", "fuse_max_seq_len", "exllama_config",
    "use_exllama", "use_cuda_fp16", "max_input_length", "cache_block_outputs", "dataset", "tokenizer", "model_seqlen",
    "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id", "damp_percent",
    "damp_auto_increment", "desc_act", "sym", "static_groups", "true_sequential", "model_name_or_path",
    "model_file_base_name", "quantizer", "checkpoint_format", "is_marlin_format", "meta", "pack_dtype", "uri",
    "quantization_status", "global_compression_ratio", "producer", "activation_scale_ub", "_load_in_4bit",
    "_load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_quant_storage",
    "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_threshold",
    "scale_fmt", "format", "mse", "act_group_aware", "autoround_version", "amp", "enable_minmax_tuning",
    "enable_quanted_input", "enable_norm_bias_tuning", "gradient_accumulate_steps", "iters", "lr", "minmax_lr",
    "low_gpu_mem_usage", "nsamples", "seqlen", "provider",
)
# Keys that are null, false, 0 or empty by default.
_OFF_BY_DEFAULT = (
    "kv_cache_scheme", "kv_cache_quant_algo", "input_activations", "output_activations", "transform_config", "lm_head",
    "dynamic", "weight_block_size", "sparsity_config", "load_in_8bit", "load_in_4bit", "bnb_4bit_use_double_quant",
    "block_structure", "actorder", "group_size", "observer_kwargs", "scale_dtype", "zp_dtype", "zero_point", "ignore",
    "llm_int8_skip_modules", "modules_to_not_convert", "config_groups", "targets", "format",
)
_OF_OBSERVERS = ("observer", "observer_kwargs", "dynamic", "zp_dtype")  # how scales were found
# Parts of a model outside the layers of its text model, and norms, which are never quantized.
_OUTSIDE = re.compile(
    r"lm_head|output|output_layer|embed_out|embed|embed_tokens|embed_in|embeddings?|wte|wpe|word_embeddings|score"
    r"|.*norm\d?|ln_f|.*vision.*|visual|vit|vpm|resampler|apm|.*audio.*|.*projector|mlp1|aligner|connector|merger|tts"
    r"|talker|token2wav|code2wav|img_processor|image_.*|router|mtp"
)


def _check_left_out(fields: Fields, name: str) -> None:
    """Raise UserError if some modules of a layer stay in bf16, since all layers must be alike."""
    left_out = fields.value(name, [])
    if not isinstance(left_out, list | tuple):
        raise fields.wrong(name, left_out, "a list of modules")
    for module in map(str, left_out):
        parts = [re.split(r"[^A-Za-z0-9_]+", choice) for choice in module.removeprefix("re:").split("|")]
        if "(?" in module or not all(any(map(_OUTSIDE.fullmatch, words)) for words in parts):
            raise fields.wrong(name, module, "only modules outside the layers: these are all quantized, or none is")


def _kv_bytes(fields: Fields) -> int | None:
    if fields.has("kv_cache_quant_algo"):  # modelopt
        fields.text("kv_cache_quant_algo", ("FP8",))
        return 1
    if not fields.has("kv_cache_scheme"):
        return None
    scheme = fields.inner("kv_cache_scheme")
    kind = scheme.text("type", default="float"), scheme.integer("num_bits", 1, 16, 8)
    if kind != ("float", 8):
        raise fields.wrong("kv_cache_scheme", f"{kind[1]}-bit {kind[0]}", "8-bit floats: others are not priced")
    scheme.ignore((*_OF_OBSERVERS, "symmetric"))
    scheme.text("strategy", ("tensor",), "tensor")
    _refuse_rest(scheme)
    return 1


def _refuse_rest(fields: Fields) -> None:
    """Raise UserError for a key with a value that is not used."""
    for name in fields.rest:
        raise fields.wrong(name, fields.value(name), "not there: what it says is not priced")


def _fp8(fields: Fields) -> WeightFormat:
    if not fields.has("weight_block_size"):
        return FORMATS["fp8"]
    block = fields.integers("weight_block_size", 1, _MOST_GROUP, 2)
    if len(block) != 2:
        raise fields.wrong("weight_block_size", block, "two numbers")
    return WeightFormat("fp8-block", 8, FP8, group=block[1], outputs=block[0], scale_bytes=4)


def _fbgemm(fields: Fields) -> WeightFormat:
    return WeightFormat("fbgemm_fp8", 8, FP8, scale_bytes=4)


def _awq(fields: Fields) -> WeightFormat:
    bits, group = _bits(fields, ("bits", "w_bit"), (4,)), _group(fields, ("group_size", "q_group_size"))
    zeros = 4 if fields.flag("zero_point", True) else 0
    return WeightFormat(_with_group("awq", group), bits, WEIGHTS, group=group, zero_bits=zeros)


def _gptq(fields: Fields) -> WeightFormat:
    bits, group = _bits(fields, ("bits",), (4, 8)), _group(fields, ("group_size",))
    if fields.flag("lm_head", False):
        raise fields.wrong("lm_head", True, "false: a quantized LM head is not priced")
    name = "gptq" if bits == 4 else "gptq-int8"
    return WeightFormat(_with_group(name, group), bits, WEIGHTS, group=group, zero_bits=bits, input_bytes=4)


def _bitsandbytes(fields: Fields) -> WeightFormat:
    eight, four = fields.flag("load_in_8bit", False), fields.flag("load_in_4bit", False)
    if eight and four:
        raise fields.wrong("load_in_8bit", True, "false where load_in_4bit is true")
    if eight:
        return WeightFormat("bitsandbytes-int8", 8, WEIGHTS, scale_bytes=4)
    if fields.integer("bnb_4bit_blocksize", 1, _MOST_GROUP, 64) != 64:
        raise fields.wrong("bnb_4bit_blocksize", fields.value("bnb_4bit_blocksize"), "64: others are not priced")
    if not four:
        raise fields.wrong("load_in_4bit", False, "load_in_4bit or load_in_8bit is true")
    if fields.flag("bnb_4bit_use_double_quant", False):
        return FORMATS["bitsandbytes"]
    return replace(FORMATS["bitsandbytes"], scale_bytes=4, scales_of_scales=0)


def _modelopt(fields: Fields) -> WeightFormat:
    form = FORMATS[{"FP8": "fp8", "NVFP4": "nvfp4"}[fields.text("quant_algo", ("FP8", "NVFP4"))]]
    if fields.has("group_size") and fields.integer("group_size", 0, _MOST_GROUP) not in (0, form.group):
        raise fields.wrong("group_size", fields.value("group_size"), f"{form.group}: others are not priced")
    groups = fields.inner("config_groups", {})  # repeats the above, by layers
    for name in groups.values:
        weights = groups.inner(name).inner("weights", {})
        if weights.integer("num_bits", 1, 16, form.bits) != form.bits:
            raise weights.wrong("num_bits", weights.value("num_bits"), f"{form.bits}, as quant_algo says")
    return form


def _compressed(fields: Fields) -> WeightFormat:
    """The format of one group of all linear layers, in 8-bit floats or integers or 4-bit integers."""
    _check_dense(fields)
    groups = fields.inner("config_groups")
    if len(groups.values) != 1:
        raise fields.wrong("config_groups", len(groups.values), "one group: layers are all quantized alike")
    group = groups.inner(next(iter(groups.values)))
    if group.texts("targets", 64) != ("Linear",):
        raise group.wrong("targets", group.texts("targets", 64), "[Linear]: layers are all quantized alike")
    if group.has("output_activations"):
        raise group.wrong("output_activations", "set", "none: quantized outputs are not priced")
    _check_format(group)
    weights, inputs = group.inner("weights"), group.has("input_activations")
    kind, bits = weights.text("type", ("int", "float"), "int"), weights.integer("num_bits", 1, 16)
    strategy = weights.text("strategy", ("tensor", "channel", "group", "block", "tensor_group"), "channel")
    if inputs:
        taken = _inputs(group.inner("input_activations"), strategy)
        if (kind, bits) == taken == ("float", 4):
            size = weights.integer("group_size", 1, _MOST_GROUP, 16)
            if size != 16:
                raise weights.wrong("group_size", size, "16: 4-bit floats of other groups are not priced")
            _end(group, weights, ("torch.float8_e4m3fn",))
            return FORMATS["nvfp4"]
        if taken != (kind, 8):
            raise group.wrong("input_activations", taken, f"none, or 8-bit {kind}")
    if (kind, bits, inputs) not in _COMPRESSED:
        told = f"{bits}-bit {kind} weights {'and inputs' if inputs else 'alone'}"
        raise group.wrong("weights", told, "8-bit weights and inputs, or 8-bit or 4-bit integers as weights alone")
    name, products = _COMPRESSED[kind, bits, inputs]
    if strategy == "tensor_group":
        raise weights.wrong("strategy", strategy, "tensor, channel, group or block")
    zeros = 0 if weights.flag("symmetric", True) else bits
    indexed = 4 if weights.value("actorder", None) in ("group", True) else 0  # each input's group is stored
    rows, columns = weights.integers("block_structure", 1, _MOST_GROUP, 2) if strategy == "block" else (0, 0)
    size = weights.integer("group_size", 1, _MOST_GROUP) if strategy == "group" else 0
    _end(group, weights, ("torch.bfloat16", "torch.float16", "torch.float32"))
    if strategy == "block":
        return WeightFormat(f"{name}-block", bits, products, group=columns, outputs=rows)
    outputs = 0 if strategy == "tensor" else 1
    named = _with_group(name, size) if size else name
    return WeightFormat(named, bits, products, group=size, outputs=outputs, zero_bits=zeros, input_bytes=indexed)


def _inputs(inputs: Fields, of_weights: str) -> tuple[str, int]:
    """The kind of a product's inputs and their bits. Raises UserError for scales that no priced kernel has."""
    found = inputs.text("type", ("int", "float"), "int"), inputs.integer("num_bits", 1, 16)
    shared = ("group",) if of_weights == "block" else ("tensor_group", "group") if found[1] == 4 else ()
    strategy = inputs.text("strategy", ("tensor", "token", *shared), "token")
    if strategy in shared:
        inputs.integer("group_size", 1, _MOST_GROUP, 16 if found[1] == 4 else 128)
    inputs.ignore((*_OF_OBSERVERS, "symmetric", "actorder", "scale_dtype"))
    _refuse_rest(inputs)
    return found


def _end(group: Fields, weights: Fields, scales: tuple[str, ...]) -> None:
    """Raise UserError for scales of another type, and for keys that are not used."""
    weights.text("scale_dtype", scales, scales[0])
    weights.ignore((*_OF_OBSERVERS, "symmetric", "actorder", "group_size", "strategy"))
    _refuse_rest(weights)
    _refuse_rest(group)


def _check_dense(fields: Fields) -> None:
    """Raise UserError if weights are left out of the file because they are 0."""
    how = fields.value("sparsity_config", {})
    of = how.get("format", "dense") if isinstance(how, Mapping) else how
    structure = how.get("sparsity_structure") if isinstance(how, Mapping) else None
    if of not in ("dense", "", None) or structure not in (None, "", "0:0", "unstructured"):
        raise fields.wrong("sparsity_config", of, "dense: sparse weights are not priced")
    _check_format(fields)


def _check_format(fields: Fields) -> None:
    kind = str(fields.value("format", ""))
    if kind not in _DENSE:
        raise fields.wrong("format", kind, f"{', '.join(_DENSE[1:])}: sparse weights and others are not priced")


_DENSE = (
    "", "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mixed-precision",
)
_COMPRESSED = {
    ("float", 8, True): ("fp8", FP8), ("float", 8, False): ("fp8-w8a16", WEIGHTS), ("int", 8, True): ("int8", INT8),
    ("int", 8, False): ("w8a16", WEIGHTS), ("int", 4, False): ("int4", WEIGHTS),
}  # fmt: skip


def _bits(fields: Fields, names: tuple[str, ...], allowed: tuple[int, ...]) -> int:
    name = next((name for name in names if fields.has(name)), names[0])
    bits = fields.integer(name, 1, 16, 4)
    if bits not in allowed:
        raise fields.wrong(name, bits, f"{' or '.join(map(str, allowed))} bits: others are not priced")
    return bits


def _group(fields: Fields, names: tuple[str, ...]) -> int:
    """Inputs that share a scale; 0 for all, which files write as -1."""
    name = next((name for name in names if fields.has(name)), names[0])
    return max(0, fields.integer(name, -1, _MOST_GROUP, 128))


def _with_group(name: str, group: int) -> str:
    return name if group == 128 else f"{name}-g{group or 'all'}"
