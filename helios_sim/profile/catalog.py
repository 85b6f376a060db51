"""Published shapes of dense models and data sheets of cards.

Shapes are those of the models' configuration files on Hugging Face (num_hidden_layers, hidden_size, ...); a suffix of
the name, such as -Instruct, does not change them. Cards are the makers' data sheets; `total_bytes` is what the driver
reports of a card (nvidia-smi), which is somewhat less than the nominal size. `MODELS` and `HARDWARE` are those for
which profiles are shipped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from helios_sim.errors import UserError, near_names
from helios_sim.profile.families import FAMILIES, other_values, windows_of
from helios_sim.profile.spec import HardwareSpec, ModelSpec
from helios_sim.provenance import Assumption

MIB = 2**20
UNLIMITED = 1e18  # operations or bytes a second: more than any card has

# family, layers, d_model, heads, KV heads, head width, MLP width, vocabulary, tied embeddings, context
_Shape = tuple[str, int, int, int, int, int, int, int, bool, int]
SHAPES: dict[str, _Shape] = {
    "llama-2-7b": ("llama", 32, 4096, 32, 32, 128, 11_008, 32_000, False, 4096),
    "llama-2-13b": ("llama", 40, 5120, 40, 40, 128, 13_824, 32_000, False, 4096),
    "llama-2-70b": ("llama", 80, 8192, 64, 8, 128, 28_672, 32_000, False, 4096),
    "llama-3-8b": ("llama", 32, 4096, 32, 8, 128, 14_336, 128_256, False, 8192),
    "llama-3-70b": ("llama", 80, 8192, 64, 8, 128, 28_672, 128_256, False, 8192),
    "llama-3.1-8b": ("llama", 32, 4096, 32, 8, 128, 14_336, 128_256, False, 131_072),
    "llama-3.1-70b": ("llama", 80, 8192, 64, 8, 128, 28_672, 128_256, False, 131_072),
    "llama-3.1-405b": ("llama", 126, 16_384, 128, 8, 128, 53_248, 128_256, False, 131_072),
    "llama-3.2-1b": ("llama", 16, 2048, 32, 8, 64, 8192, 128_256, True, 131_072),
    "llama-3.2-3b": ("llama", 28, 3072, 24, 8, 128, 8192, 128_256, True, 131_072),
    "llama-3.3-70b": ("llama", 80, 8192, 64, 8, 128, 28_672, 128_256, False, 131_072),
    "qwen2.5-0.5b": ("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, True, 32_768),
    "qwen2.5-1.5b": ("qwen2", 28, 1536, 12, 2, 128, 8960, 151_936, True, 32_768),
    "qwen2.5-3b": ("qwen2", 36, 2048, 16, 2, 128, 11_008, 151_936, True, 32_768),
    "qwen2.5-7b": ("qwen2", 28, 3584, 28, 4, 128, 18_944, 152_064, False, 32_768),
    "qwen2.5-14b": ("qwen2", 48, 5120, 40, 8, 128, 13_824, 152_064, False, 32_768),
    "qwen2.5-32b": ("qwen2", 64, 5120, 40, 8, 128, 27_648, 152_064, False, 32_768),
    "qwen2.5-72b": ("qwen2", 80, 8192, 64, 8, 128, 29_568, 152_064, False, 32_768),
    "qwen3-0.6b": ("qwen3", 28, 1024, 16, 8, 128, 3072, 151_936, True, 40_960),
    "qwen3-1.7b": ("qwen3", 28, 2048, 16, 8, 128, 6144, 151_936, True, 40_960),
    "qwen3-4b": ("qwen3", 36, 2560, 32, 8, 128, 9728, 151_936, True, 40_960),
    "qwen3-8b": ("qwen3", 36, 4096, 32, 8, 128, 12_288, 151_936, False, 40_960),
    "qwen3-14b": ("qwen3", 40, 5120, 40, 8, 128, 17_408, 151_936, False, 40_960),
    "qwen3-32b": ("qwen3", 64, 5120, 64, 8, 128, 25_600, 151_936, False, 40_960),
    "mistral-7b-v0.1": ("mistral", 32, 4096, 32, 8, 128, 14_336, 32_000, False, 32_768),
    "mistral-7b-v0.3": ("mistral", 32, 4096, 32, 8, 128, 14_336, 32_768, False, 32_768),
    "mistral-nemo": ("mistral", 40, 5120, 32, 8, 128, 14_336, 131_072, False, 131_072),
    "mistral-small-24b": ("mistral", 40, 5120, 32, 8, 128, 32_768, 131_072, False, 32_768),
    "phi-3-mini-4k": ("phi3", 32, 3072, 32, 32, 96, 8192, 32_064, False, 4096),
    "phi-3-medium-4k": ("phi3", 40, 5120, 40, 10, 128, 17_920, 32_064, False, 4096),
    "phi-4": ("phi3", 40, 5120, 40, 10, 128, 17_920, 100_352, False, 16_384),
    "gemma-2-2b": ("gemma2", 26, 2304, 8, 4, 256, 9216, 256_000, True, 8192),
    "gemma-2-9b": ("gemma2", 42, 3584, 16, 8, 256, 14_336, 256_000, True, 8192),
    "gemma-2-27b": ("gemma2", 46, 4608, 32, 16, 128, 36_864, 256_000, True, 8192),
    "gemma-3-1b": ("gemma3_text", 26, 1152, 4, 1, 256, 6912, 262_144, True, 32_768),
    "gemma-3-4b": ("gemma3_text", 34, 2560, 8, 4, 256, 10_240, 262_208, True, 131_072),
    "gemma-3-12b": ("gemma3_text", 48, 3840, 16, 8, 256, 15_360, 262_208, True, 131_072),
    "gemma-3-27b": ("gemma3_text", 62, 5376, 32, 16, 128, 21_504, 262_208, True, 131_072),
    "llama-7b": ("llama", 32, 4096, 32, 32, 128, 11_008, 32_000, False, 2048),
    "llama-13b": ("llama", 40, 5120, 40, 40, 128, 13_824, 32_000, False, 2048),
    "llama-30b": ("llama", 60, 6656, 52, 52, 128, 17_920, 32_000, False, 2048),
    "llama-65b": ("llama", 80, 8192, 64, 64, 128, 22_016, 32_000, False, 2048),
    "codellama-7b": ("llama", 32, 4096, 32, 32, 128, 11_008, 32_016, False, 16_384),
    "codellama-13b": ("llama", 40, 5120, 40, 40, 128, 13_824, 32_016, False, 16_384),
    "codellama-70b": ("llama", 80, 8192, 64, 8, 128, 28_672, 32_016, False, 16_384),
    "yi-6b": ("llama", 32, 4096, 32, 4, 128, 11_008, 64_000, False, 4096),
    "yi-9b": ("llama", 48, 4096, 32, 4, 128, 11_008, 64_000, False, 4096),
    "yi-34b": ("llama", 60, 7168, 56, 8, 128, 20_480, 64_000, False, 4096),
    "smollm2-360m": ("llama", 32, 960, 15, 5, 64, 2560, 49_152, True, 8192),
    "smollm2-1.7b": ("llama", 24, 2048, 32, 32, 64, 8192, 49_152, True, 8192),
    "smollm3-3b": ("smollm3", 36, 2048, 16, 4, 128, 11_008, 128_256, True, 65_536),
    "qwen2-0.5b": ("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, True, 32_768),
    "qwen2-1.5b": ("qwen2", 28, 1536, 12, 2, 128, 8960, 151_936, True, 32_768),
    "qwen2-7b": ("qwen2", 28, 3584, 28, 4, 128, 18_944, 152_064, False, 32_768),
    "qwen2-72b": ("qwen2", 80, 8192, 64, 8, 128, 29_568, 152_064, False, 32_768),
    "mistral-large": ("mistral", 88, 12_288, 96, 8, 128, 28_672, 32_768, False, 131_072),
    "gemma-2b": ("gemma", 18, 2048, 8, 1, 256, 16_384, 256_000, True, 8192),
    "gemma-7b": ("gemma", 28, 3072, 16, 16, 256, 24_576, 256_000, True, 8192),
    "phi-1_5": ("phi", 24, 2048, 32, 32, 64, 8192, 51_200, False, 2048),
    "phi-2": ("phi", 32, 2560, 32, 32, 80, 10_240, 51_200, False, 2048),
    "phi-3.5-mini": ("phi3", 32, 3072, 32, 32, 96, 8192, 32_064, False, 131_072),
    "phi-4-mini": ("phi3", 32, 3072, 24, 8, 128, 8192, 200_064, True, 131_072),
    "opt-125m": ("opt", 12, 768, 12, 12, 64, 3072, 50_272, True, 2048),
    "opt-2.7b": ("opt", 32, 2560, 32, 32, 80, 10_240, 50_272, True, 2048),
    "opt-13b": ("opt", 40, 5120, 40, 40, 128, 20_480, 50_272, True, 2048),
    "opt-30b": ("opt", 48, 7168, 56, 56, 128, 28_672, 50_272, True, 2048),
    "opt-66b": ("opt", 64, 9216, 72, 72, 128, 36_864, 50_272, True, 2048),
    "opt-175b": ("opt", 96, 12_288, 96, 96, 128, 49_152, 50_272, True, 2048),
    "gpt2": ("gpt2", 12, 768, 12, 12, 64, 3072, 50_257, True, 1024),
    "gpt2-medium": ("gpt2", 24, 1024, 16, 16, 64, 4096, 50_257, True, 1024),
    "gpt2-large": ("gpt2", 36, 1280, 20, 20, 64, 5120, 50_257, True, 1024),
    "gpt2-xl": ("gpt2", 48, 1600, 25, 25, 64, 6400, 50_257, True, 1024),
    "pythia-410m": ("gpt_neox", 24, 1024, 16, 16, 64, 4096, 50_304, False, 2048),
    "pythia-1b": ("gpt_neox", 16, 2048, 8, 8, 256, 8192, 50_304, False, 2048),
    "pythia-1.4b": ("gpt_neox", 24, 2048, 16, 16, 128, 8192, 50_304, False, 2048),
    "pythia-2.8b": ("gpt_neox", 32, 2560, 32, 32, 80, 10_240, 50_304, False, 2048),
    "pythia-6.9b": ("gpt_neox", 32, 4096, 32, 32, 128, 16_384, 50_432, False, 2048),
    "pythia-12b": ("gpt_neox", 36, 5120, 40, 40, 128, 20_480, 50_688, False, 2048),
    "gpt-neox-20b": ("gpt_neox", 44, 6144, 64, 64, 96, 24_576, 50_432, False, 2048),
    "falcon-7b": ("falcon", 32, 4544, 71, 1, 64, 18_176, 65_024, True, 2048),
    "falcon-40b": ("falcon", 60, 8192, 128, 8, 64, 32_768, 65_024, True, 2048),
    "olmo-7b": ("olmo", 32, 4096, 32, 32, 128, 11_008, 50_304, False, 2048),
    "olmo-2-1124-7b": ("olmo2", 32, 4096, 32, 32, 128, 11_008, 100_352, False, 4096),
    "olmo-2-1124-13b": ("olmo2", 40, 5120, 40, 40, 128, 13_824, 100_352, False, 4096),
    "granite-3.1-2b": ("granite", 40, 2048, 32, 8, 64, 8192, 49_155, True, 131_072),
    "granite-3.1-8b": ("granite", 40, 4096, 32, 8, 128, 12_800, 49_155, True, 131_072),
}
_VARIANTS = re.compile(r"-(1m|instruct|thinking|chat|hf|it|pt|base|coder|math|24\d\d|25\d\d)(?=-|$)")

_EXPERTS = re.compile(
    r"mixtral|moe|deepseek-(v|r1(?!-distill))|-a\d+b|gpt-oss|kimi|minimax|grok|dbrx|llama-4|scout|maverick"
)

# Models with another context than others of their shape: max_position_embeddings of their configs.
_CONTEXTS = (
    (r"^qwen3-.*-2507", 262_144), (r"^qwen3-.*-base$", 32_768), (r"^qwen2\.5-math-", 4_096),
    (r"^qwen2\.5-.*-1m$", 1_010_000), (r"^qwen2\.5-(1\.5|7|14|32|72)b$", 131_072),
)  # fmt: skip
_WINDOWS = (  # sliding_window of their configs, where it is in force
    (r"^gemma-2-", 4096), (r"^gemma-3-1b", 512), (r"^gemma-3-", 1024), (r"^mistral-7b-v0\.1$", 4096),
    (r"^phi-3-mini-4k$", 2047), (r"^phi-3-medium-4k$", 2047),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Link:
    """The connection between the cards of a tensor-parallel group, for all-reduces."""

    latency_s: float  # time of the smallest all-reduce
    bytes_per_s: float  # bandwidth of each card in each direction
    source: str


PCIE_LINK = Link(20e-6, 16e9, "assumed for cards on PCIe without NVLink: 20 us and 16 GB/s")
NVLINK_4 = Link(10e-6, 450e9, "assumed latency of 10 us; NVLink 4: 450 GB/s a direction, NVIDIA H100 data sheet")
NVLINK_3 = Link(10e-6, 300e9, "assumed latency of 10 us; NVLink 3: 300 GB/s a direction, NVIDIA A100 data sheet")


@dataclass(frozen=True, slots=True)
class Card:
    """A card under the name that logs use."""

    total_bytes: int
    bytes_per_s: float
    flops_per_s: float  # dense bf16 tensor cores, accumulation in float32
    tdp_w: float | None
    link: Link
    source: str
    load_bytes_per_s: float = 25e9  # copies from pinned host memory: 0.8 of PCIe 4.0 x16, 31.5 GB/s a direction
    fp8_flops_per_s: float | None = None  # dense, sums in float32; None if the card has no units for it
    int8_flops_per_s: float | None = None  # dense; None: vLLM has no int8 products for it, as on Blackwell
    fp4_flops_per_s: float | None = None  # dense; None: no units for it
    idle_w: float | None = None  # None if no source is known
    busy_w: tuple[float, float] | None = None  # least and most power of kernels, if measured


NVLINK_5 = Link(10e-6, 900e9, "assumed latency of 10 us; NVLink 5: 900 GB/s a direction, NVIDIA B200 data sheet")
XGMI = Link(15e-6, 448e9, "assumed latency of 15 us; 7 Infinity Fabric links of 64 GB/s, AMD MI300X data sheet")
PCIE_5, C2C = 50e9, 360e9  # 0.8 of PCIe 5.0 x16, 63 GB/s; 0.8 of NVLink-C2C, 450 GB/s a direction
_ADA = "NVIDIA Ada GPU architecture white paper"
_AMPERE = "NVIDIA Ampere GA102 GPU architecture white paper"
# If a name is in `HARDWARE` too, a study takes the card from there, with its idle power.
CARDS: dict[str, Card] = {
    "rtxpro6000": Card(97_887 * MIB, 1.597e12, 503.8e12, 600.0, PCIE_LINK, "NVIDIA RTX PRO 6000 Server sheet", PCIE_5),
    "rtx5090": Card(32_607 * MIB, 1.792e12, 209.5e12, 575.0, PCIE_LINK, "NVIDIA RTX Blackwell white paper", PCIE_5),
    "rtx4090": Card(24_564 * MIB, 1.008e12, 165.2e12, 450.0, PCIE_LINK, _ADA),
    "rtx3090": Card(24_576 * MIB, 0.936e12, 71.0e12, 350.0, PCIE_LINK, _AMPERE),
    "rtxa6000": Card(49_140 * MIB, 0.768e12, 154.8e12, 300.0, PCIE_LINK, _AMPERE),
    "rtxa5000": Card(24_564 * MIB, 0.768e12, 111.1e12, 230.0, PCIE_LINK, _AMPERE),
    "rtx6000ada": Card(49_140 * MIB, 0.960e12, 364.2e12, 300.0, PCIE_LINK, _ADA),
    "l40s": Card(46_068 * MIB, 0.864e12, 362.05e12, 350.0, PCIE_LINK, "NVIDIA L40S data sheet"),
    "l4": Card(23_034 * MIB, 0.300e12, 121.0e12, 72.0, PCIE_LINK, "NVIDIA L4 data sheet"),
    "a10": Card(23_028 * MIB, 0.600e12, 125.0e12, 150.0, PCIE_LINK, "NVIDIA A10 data sheet"),
    "a100-40gb": Card(40_960 * MIB, 1.555e12, 312e12, 400.0, NVLINK_3, "NVIDIA A100 data sheet, SXM4 40 GB"),
    "a100-80gb": Card(81_920 * MIB, 2.039e12, 312e12, 400.0, NVLINK_3, "NVIDIA A100 data sheet, SXM4 80 GB"),
    "a100pcie40gb": Card(40_960 * MIB, 1.555e12, 312e12, 250.0, PCIE_LINK, "NVIDIA A100 data sheet, PCIe 40 GB"),
    "a100pcie80gb": Card(81_920 * MIB, 1.935e12, 312e12, 300.0, PCIE_LINK, "NVIDIA A100 data sheet, PCIe 80 GB"),
    "h100pcie": Card(81_559 * MIB, 2.0e12, 756e12, 350.0, PCIE_LINK, "NVIDIA H100 data sheet, PCIe", PCIE_5),
    "h100": Card(81_559 * MIB, 3.35e12, 989e12, 700.0, NVLINK_4, "NVIDIA H100 data sheet, SXM5", PCIE_5),
    "h200": Card(143_771 * MIB, 4.8e12, 989e12, 700.0, NVLINK_4, "NVIDIA H200 data sheet", PCIE_5),
    "a30": Card(24_576 * MIB, 0.933e12, 165e12, 165.0, PCIE_LINK, "NVIDIA A30 data sheet"),
    "rtx4080": Card(16_376 * MIB, 0.717e12, 97.5e12, 320.0, PCIE_LINK, _ADA),
    "rtx5080": Card(16_303 * MIB, 0.960e12, 112.6e12, 360.0, PCIE_LINK, "NVIDIA RTX Blackwell white paper", PCIE_5),
    "gh200": Card(97_871 * MIB, 4.0e12, 989e12, 900.0, NVLINK_4, "NVIDIA GH200 data sheet, 96 GB HBM3", C2C),
    "b200": Card(183_359 * MIB, 7.7e12, 2250e12, 1000.0, NVLINK_5, "NVIDIA HGX B200 data sheet", PCIE_5),
    "b300": Card(275_040 * MIB, 7.75e12, 2250e12, 1100.0, NVLINK_5, "NVIDIA HGX B300 data sheet", PCIE_5),
    "gb200": Card(189_471 * MIB, 8.0e12, 2500e12, 1200.0, NVLINK_5, "NVIDIA GB200 NVL72 data sheet", C2C),
    "mi300x": Card(196_592 * MIB, 5.3e12, 1307e12, 750.0, XGMI, "AMD Instinct MI300X data sheet", PCIE_5),
}  # fmt: skip
# Dense TFLOPS of fp8 (with sums in float32), TOPS of int8 and TFLOPS of fp4, of the same sheets. Ampere has no units
# for fp8, and only Blackwell has some for fp4. int8 is left out where vLLM does not compute it (its page "INT8 W8A8":
# Blackwell; MI300X in its table of supported hardware).
_NARROW: dict[str, tuple[float | None, float | None, float | None]] = {
    "rtxpro6000": (1007.6, None, 2015.2), "rtx5090": (419.0, None, 1676.0), "rtx4090": (330.3, 660.6, None),
    "rtx3090": (None, 284.0, None), "rtxa6000": (None, 309.7, None), "rtxa5000": (None, 222.2, None),
    "rtx6000ada": (728.5, 728.5, None), "l40s": (733.0, 733.0, None), "l4": (242.5, 242.5, None),
    "a10": (None, 250.0, None), "a100-40gb": (None, 624.0, None), "a100-80gb": (None, 624.0, None),
    "a100pcie40gb": (None, 624.0, None), "a100pcie80gb": (None, 624.0, None), "h100pcie": (1513.0, 1513.0, None),
    "h100": (1979.0, 1979.0, None), "h200": (1979.0, 1979.0, None), "a30": (None, 330.0, None),
    "rtx4080": (194.9, 389.9, None), "rtx5080": (225.1, None, 900.4), "gh200": (1979.0, 1979.0, None),
    "b200": (4500.0, None, 9000.0), "b300": (4500.0, None, 14_000.0), "gb200": (5000.0, None, 10_000.0),
    "mi300x": (2614.9, None, None),
}  # fmt: skip


def _per_s(tera: float | None) -> float | None:
    return None if tera is None else tera * 1e12


for _name, (_fp8, _int8, _fp4) in _NARROW.items():
    CARDS[_name] = replace(
        CARDS[_name], fp8_flops_per_s=_per_s(_fp8), int8_flops_per_s=_per_s(_int8), fp4_flops_per_s=_per_s(_fp4)
    )
# What kernels of a B200 draw that take 0.1 ms and more: 5 % of those of decodes less than the first, 5 % of those of
# prompts more than the second (experiments/kernels/power.py). Idle: nvidia-smi of seven cards that held nothing, 139 to
# 144 W; cards that hold a model idle at 192 to 196 W (NVIDIA/TensorRT-LLM issue 10278).
CARDS["b200"] = replace(CARDS["b200"], idle_w=139.0, busy_w=(349.0, 979.0))
_OTHER_NAMES = {
    "a6000": "rtxa6000", "a5000": "rtxa5000", "a100": "a100-80gb", "a10080gb": "a100-80gb",
    "a10040gb": "a100-40gb", "a100pcie": "a100pcie80gb",
    "a10080gbpcie": "a100pcie80gb", "a10040gbpcie": "a100pcie40gb", "h10080gb": "h100",
    "h200141gb": "h200", "rtxpro6000blackwell": "rtxpro6000",
}  # fmt: skip


def published_model(name: str, key: str = "model") -> ModelSpec:
    """The shape of a model by its name on Hugging Face. Raises UserError if it is not known."""
    shape = SHAPES.get(name) or SHAPES.get(plain_model(name))
    if shape is None:
        if (shipped := MODELS.get(plain_model(name))) is not None:
            return replace(shipped, name=name.rsplit("/", 1)[-1].lower())
        if _EXPERTS.search(name.lower()):
            raise UserError(key, name, "a dense model: mixtures of experts are not modelled", "choose a dense model")
        near = near_names(plain_model(name), SHAPES, 3, 0.5)
        meant = f"did you mean {' or '.join(near)}? Or " if near else ""
        fix = f"{meant}give the path of its config.json"
        allowed = f"one of the {len(SHAPES)} published shapes that `python -m helios_sim.profile list` shows"
        raise UserError(key, name, allowed, fix)
    family, layers, d_model, heads, kv_heads, head_dim, d_ff, vocabulary, tied, context = shape
    plain = name.rsplit("/", 1)[-1].lower()
    context = next((tokens for pattern, tokens in _CONTEXTS if re.search(pattern, plain)), context)
    kind = FAMILIES[family]
    return ModelSpec(
        name=plain, family=family.removesuffix("_text"), n_layers=layers, d_model=d_model, n_heads=heads,
        n_kv_heads=kv_heads, head_dim=head_dim, d_ff=d_ff, gated_mlp=kind.gated_mlp, vocab_size=vocabulary,
        tied_embeddings=tied, max_context_tokens=context, learned_positions=kind.learned_positions, bias=kind.bias,
        weight_bytes_per_value=2, kv_bytes_per_value=2,
        chars_per_token=chars_per_token(family, vocabulary),
        other_layer_values=other_values(
            kind, d_model, d_ff, heads, kv_heads, head_dim, further_norms=2 if plain.startswith("falcon-40b") else 0
        ),
    )  # fmt: skip


def same_shape(one: str, other: str) -> bool:
    """Whether two names on Hugging Face mean models of one shape, whatever their context; by name if one is unknown."""
    names = [plain_model(name) for name in (one, other)]
    shapes = [SHAPES.get(name) for name in names]
    if shapes[0] is None or shapes[1] is None:
        return names[0] == names[1]
    return shapes[0][1:-1] == shapes[1][1:-1]  # without family and context


def published_windows(name: str, model: ModelSpec) -> tuple[int, ...]:
    """The attention window of each layer of a published model, 0 for none; () if no layer has one."""
    plain = plain_model(name)
    window = next((tokens for pattern, tokens in _WINDOWS if re.search(pattern, plain)), None)
    if window is None or re.search(r"^mistral-7b-.*v0\.2$", model.name):  # that one has the shape of v0.1 and no window
        return ()
    family = SHAPES[plain if plain in SHAPES else name][0]
    return windows_of(window, FAMILIES[family].every, model.n_layers)


def assumed_tokens(model: ModelSpec) -> tuple[Assumption, ...]:
    """The assumption about a published model's tokenizer, for a profile's provenance."""
    why = "English text and a vocabulary of this size; no tokenizer at hand"
    return (Assumption("chars_per_token", model.chars_per_token, why, "model.chars_per_token"),)


def published_card(name: str) -> Card | None:
    """A card by what a log or a profile calls it, such as RTXPRO6000 or NVIDIA GeForce RTX 4090; None if not known."""
    key = card_key(name)
    return None if key is None else CARDS[key]


def card_key(name: str) -> str | None:
    """The name of a card in `CARDS`, or None."""
    plain = re.sub(r"(nvidia|geforce|edition|server|workstation|generation|sxm\d?|hbm\d?e?)", "", name.lower())
    plain = re.sub(r"[^a-z0-9]", "", plain)
    plain = _OTHER_NAMES.get(plain, plain)
    return plain if plain in CARDS else None


def card_spec(name: str, card: Card, number: int = 1) -> HardwareSpec:
    """A card as a device, or a tensor-parallel group as one: memory, bandwidth, operations and power are sums."""
    least_w, most_w = card.busy_w or (None, None)

    def of_all(one: float | None) -> float | None:
        return None if one is None else number * one

    return HardwareSpec(
        name=name if number == 1 else f"{number}x{name}",
        hbm_bytes=number * card.total_bytes,
        hbm_bytes_per_s=number * card.bytes_per_s,
        flops_per_s=number * card.flops_per_s,
        tdp_w=of_all(card.tdp_w),
        idle_w=of_all(card.idle_w),
        source=card.source,
        fp8_flops_per_s=of_all(card.fp8_flops_per_s),
        int8_flops_per_s=of_all(card.int8_flops_per_s),
        fp4_flops_per_s=of_all(card.fp4_flops_per_s),
        least_busy_w=of_all(least_w),
        most_busy_w=of_all(most_w),
    )


def plain_model(name: str) -> str:
    """The name without owner, tuning and date, which do not change the shape."""
    plain = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    return _VARIANTS.sub("", plain).replace("-v0.2", "-v0.1")


GIB = 2**30

# Assumed means on English text, listed in each profile's provenance: no tokenizer of these models is at hand.
CHARS_PER_TOKEN = {"opt": 4.2, "llama-2": 3.8, "llama-3": 4.4}


def chars_per_token(family: str, vocabulary: int) -> float:
    """Mean characters per token of English text, by the tokenizer that the family and vocabulary size suggest."""
    if family in ("opt", "gpt2"):  # one tokenizer
        return CHARS_PER_TOKEN["opt"]
    return CHARS_PER_TOKEN["llama-3" if vocabulary > 100_000 else "llama-2"]


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
        kv_bytes_per_value=2, chars_per_token=chars_per_token("llama", vocab_size),
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
    """The shape of a model of the catalogue. Raises UserError for an unknown name."""
    if name not in MODELS:
        raise UserError("model", name, f"one of {', '.join(MODELS)}", "choose one of these or add its shape")
    return MODELS[name]


def hardware_spec(name: str) -> HardwareSpec:
    """The data sheet of a card of the catalogue. Raises UserError for an unknown name."""
    if name not in HARDWARE:
        raise UserError("hardware", name, f"one of {', '.join(HARDWARE)}", "choose one of these or add its data sheet")
    return HARDWARE[name]


def activation_reserve_bytes(model: ModelSpec, max_batch_tokens: int = 8192, max_logit_rows: int = 1024) -> int:
    """Peak memory of activations that an engine sets aside.

    max_batch_tokens x value bytes x (2 d_model [residual and norm output] + the wider of the QKV output with the
    attention output and the MLP's intermediate [gate and up before, product after]) + max_logit_rows x vocabulary x
    (value bytes + 4 [float32 copy for sampling]).
    """
    q_width = model.n_heads * model.head_dim
    attention = q_width + 2 * model.kv_width + q_width
    mlp = 3 * model.d_ff if model.gated_mlp else 2 * model.d_ff
    tokens = max_batch_tokens * model.weight_bytes_per_value * (2 * model.d_model + max(attention, mlp))
    return tokens + max_logit_rows * model.vocab_size * (model.weight_bytes_per_value + 4)
