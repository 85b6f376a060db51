"""Shapes of the models and limits of the cards for which profiles are built. Knows published figures only.

Model shapes are those of the published configuration files (Hugging Face: facebook/opt-*, meta-llama/*, codellama/*).
Card figures are the maker's data sheets.
"""

from __future__ import annotations

from helios_sim.errors import UserError
from helios_sim.profile.spec import HardwareSpec, ModelSpec

GIB = 2**30

# Assumed means on English text, listed in each profile's provenance: no tokenizer of these models is at hand.
CHARS_PER_TOKEN = {"opt": 4.2, "llama-2": 3.8, "llama-3": 4.4}


def _opt(name: str, n_layers: int, d_model: int, n_heads: int) -> ModelSpec:
    return ModelSpec(
        name=name, family="opt", n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_heads,
        head_dim=d_model // n_heads, d_ff=4 * d_model, gated_mlp=False, vocab_size=50_272, tied_embeddings=True,
        max_context_tokens=2048, learned_positions=True, bias=True, weight_bytes_per_value=2, kv_bytes_per_value=2,
        chars_per_token=CHARS_PER_TOKEN["opt"],
    )  # fmt: skip


def _llama(
    name: str, n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, d_ff: int, vocab_size: int, context: int
) -> ModelSpec:
    return ModelSpec(
        name=name, family="llama", n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_dim=d_model // n_heads, d_ff=d_ff, gated_mlp=True, vocab_size=vocab_size, tied_embeddings=False,
        max_context_tokens=context, learned_positions=False, bias=False, weight_bytes_per_value=2,
        kv_bytes_per_value=2, chars_per_token=CHARS_PER_TOKEN["llama-3" if vocab_size > 100_000 else "llama-2"],
    )  # fmt: skip


MODELS = {
    spec.name: spec
    for spec in (
        _opt("opt-1.3b", n_layers=24, d_model=2048, n_heads=32),
        _opt("opt-6.7b", n_layers=32, d_model=4096, n_heads=32),
        _llama("llama-2-7b", 32, 4096, 32, 32, 11_008, 32_000, 4096),
        _llama("llama-2-13b", 40, 5120, 40, 40, 13_824, 32_000, 4096),
        _llama("llama-3-8b", 32, 4096, 32, 8, 14_336, 128_256, 8192),
        _llama("codellama-34b", 48, 8192, 64, 8, 22_016, 32_000, 16_384),
    )
}

# Idle power is what nvidia-smi showed for cards that held nothing: a lower bound, since a card that holds weights
# idles higher (an H100 at 140 W: wilicc/gpu-burn, issue 114).
HARDWARE = {
    spec.name: spec
    for spec in (
        HardwareSpec(
            "a100-40gb", 40 * GIB, 1.555e12, 312e12, tdp_w=400.0, idle_w=50.0,
            source="NVIDIA A100 Tensor Core GPU data sheet: SXM4 40 GB, 1,555 GB/s, 312 TFLOPS dense bf16, 400 W; "
            "idle: nvidia-smi of eight cards, 50 to 56 W, facebookresearch/vissl issue 422",
        ),
        HardwareSpec(
            "a100-80gb", 80 * GIB, 2.039e12, 312e12, tdp_w=400.0, idle_w=59.0,
            source="NVIDIA A100 Tensor Core GPU data sheet: SXM4 80 GB, 2,039 GB/s, 312 TFLOPS dense bf16, 400 W; "
            "idle: nvidia-smi of several cards, 59 to 62 W, allenai/PeerRead issue 40",
        ),
        HardwareSpec(
            "h100-80gb", 80 * GIB, 3.35e12, 989e12, tdp_w=700.0, idle_w=69.0,
            source="NVIDIA H100 Tensor Core GPU data sheet: SXM5 80 GB, 3.35 TB/s, 989 TFLOPS dense bf16, 700 W; "
            "idle: nvidia-smi of one card, 69 W, huggingface/diffusers tests/quantization/torchao/README.md",
        ),
    )
}  # fmt: skip

# Pinned host memory to the card. PCIe x16 carries 31.5 GB/s (4.0) and 63 GB/s (5.0) a direction; a copy is assumed
# to reach about 0.8 of it.
LOAD_BYTES_PER_S = {"a100-40gb": 25e9, "a100-80gb": 25e9, "h100-80gb": 50e9}


def model_spec(name: str) -> ModelSpec:
    """Raises UserError for an unknown name."""
    if name not in MODELS:
        raise UserError("model", name, f"one of {', '.join(MODELS)}", "choose one of these or add its shape")
    return MODELS[name]


def hardware_spec(name: str) -> HardwareSpec:
    """Raises UserError for an unknown name."""
    if name not in HARDWARE:
        raise UserError("hardware", name, f"one of {', '.join(HARDWARE)}", "choose one of these or add its data sheet")
    return HARDWARE[name]


def activation_reserve_bytes(model: ModelSpec, max_batch_tokens: int = 8192, max_logit_rows: int = 1024) -> int:
    """Peak of activations that an engine sets aside.

    max_batch_tokens x value bytes x (2 d_model [residual and norm output] + the wider of the QKV output with the
    attention output and the MLP's intermediate [gate and up before, product after]) + max_logit_rows x vocabulary x
    (value bytes + 4 [float32 copy for sampling]).
    """
    q_width = model.n_heads * model.head_dim
    attention = q_width + 2 * model.kv_width + q_width
    mlp = 3 * model.d_ff if model.gated_mlp else 2 * model.d_ff
    tokens = max_batch_tokens * model.weight_bytes_per_value * (2 * model.d_model + max(attention, mlp))
    return tokens + max_logit_rows * model.vocab_size * (model.weight_bytes_per_value + 4)
