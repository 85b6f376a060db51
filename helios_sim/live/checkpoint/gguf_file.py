"""A GGUF file as a checkpoint: its metadata as an `Architecture`, its tensors dequantized, its tokenizer.

What a key means, and its value if it is missing, is llama.cpp's rule. Every key and tensor is used, known not to change
what is computed, or refused by name.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helios_sim.errors import WeightsError
from helios_sim.live.checkpoint.hub_config import OTHER_MODEL, wrong_family
from helios_sim.live.checkpoint.naming import gguf_pieces
from helios_sim.live.model.architecture import MOST, Architecture, Rope, Shape
from helios_sim.live.model.weights import StoredPiece, stored_names
from helios_sim.profile.gguf_header import FETCH_AGAIN, LongArray, StoredTensor, foreign_keys, read_header
from helios_sim.untrusted import Fields, reading

_FAMILIES = ("llama", "qwen2", "gemma3")
_GEMMA3_SLIDING_PERIOD = 6  # every sixth layer has full attention
_GEMMA3_27B_LAYERS = 62
_THETA = 10_000.0  # also of Gemma-3's sliding layers
# Keys of the family that say how the file was made, or repeat what tensors say; llama.cpp computes nothing from them.
_NO_MATTER = (
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout", "expert_used_count",
    "rope.scaling.alpha", "pooling_type",
)  # fmt: skip
# Keys with the values that change nothing; any other value is not supported.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "expert_count": (0,), "final_logit_softcapping": (0,), "attn_logit_softcapping": (0,), "logit_scale": (0, 1),
    "residual_scale": (0, 1), "embedding_scale": (0, 1), "attention.causal": (True,), "use_parallel_residual": (False,),
    "attention.max_alibi_bias": (0,), "attention.clamp_kqv": (0,), "rope.scaling.attn_factor": (1,),
    "leading_dense_block_count": (0,), "nextn_predict_layers": (0,), "attention.shared_kv_layers": (0,),
    "attention.output_scale": (0, 1), "attention.temperature_length": (0,),
}  # fmt: skip
_ROPE_FREQS = "rope_freqs.weight"  # divisors of the frequencies, in files of the family llama


class GgufFile:
    """Metadata and tensors of one file. Raises WeightsError for a damaged or an unsupported file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self.metadata, self._tensors = header.metadata, header.tensors
        with reading(str(path), "damaged", "a GGUF file whose keys fit together", FETCH_AGAIN, WeightsError):
            self.architecture: Architecture = self._architecture()
            self._check_tensors()
            self._check_vocabulary()

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def not_read(self) -> str:
        """A sentence that lists ignored keys of other families and programs; "" if there are none."""
        found = foreign_keys(self.metadata, self.architecture.family)
        return f"{self.path}: not read: {', '.join(found[:12])}" if found else ""

    def pieces(self, part: str, layer: int | None) -> tuple[StoredPiece, ...]:
        return gguf_pieces(self.architecture.family, part, layer)

    def shape(self, name: str) -> Shape:
        return self._tensor(name).shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of one tensor as float32. The file is not mapped, so none of its pages stay resident."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        stored = self._tensor(name)
        with reading(f"tensor {name} of {self.path}", "unreadable", "whole", FETCH_AGAIN, WeightsError):
            if len(stored.shape) == 1:  # its values are one row of blocks
                data = np.fromfile(self.path, np.uint8, stored.n_bytes, offset=stored.offset)
                return torch.from_numpy(dequantize(data, GGMLQuantizationType(stored.kind)))[start:stop]
            n_bytes = stored.row_bytes
            data = np.fromfile(self.path, np.uint8, (stop - start) * n_bytes, offset=stored.offset + start * n_bytes)
            return torch.from_numpy(dequantize(data.reshape(stop - start, n_bytes), GGMLQuantizationType(stored.kind)))

    def tokenizer(self) -> Any:
        """Build transformers' tokenizer from the file's vocabulary. Raises WeightsError if that is not possible."""
        if "tokenizer.ggml.model" not in self.metadata:
            raise WeightsError("weights", str(self.path), "a GGUF file with a tokenizer", "choose a file that has one")
        import transformers

        with reading("weights", str(self.path), "a file with a tokenizer that can be read", OTHER_MODEL, WeightsError):
            return transformers.AutoTokenizer.from_pretrained(
                self.path.parent, gguf_file=self.path.name, trust_remote_code=False
            )

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise WeightsError(f"tensor {name}", "missing", f"there in {self.path}", FETCH_AGAIN)
        return self._tensors[name]

    def _architecture(self) -> Architecture:
        general = Fields(self.metadata, str(self.path), OTHER_MODEL, WeightsError)
        family = general.value("general.architecture", "none")
        if family not in _FAMILIES:
            raise wrong_family(f"{self.path} (GGUF, which is read for {', '.join(_FAMILIES)})", family)
        general.text("general.type", ("model",), "model")  # not an adapter or a projector of images
        keys = Fields(self.metadata, str(self.path), OTHER_MODEL, WeightsError, f"{family}.")
        gemma = family == "gemma3"
        for name, neutral in _NEUTRAL.items():
            if keys.has(name) and keys.value(name) not in neutral:
                raise keys.wrong(name, keys.value(name), f"{neutral[-1]} or no such key: another value is not built")
        keys.ignore(_NO_MATTER)
        d_model, n_layers = keys.integer("embedding_length", 1, MOST["d_model"]), self._layers(keys)
        n_heads = keys.alike("attention.head_count", 1, MOST["n_heads"])
        if d_model % n_heads and not keys.has("attention.key_length"):
            raise keys.wrong("embedding_length", d_model, f"a multiple of {n_heads}, the number of heads")
        head_dim = keys.integer("attention.key_length", 2, MOST["head_dim"], d_model // n_heads)
        for name, otherwise in (("attention.value_length", d_model // n_heads), ("rope.dimension_count", head_dim)):
            if (size := keys.integer(name, 1, MOST["head_dim"], otherwise)) != head_dim:
                raise keys.wrong(name, size, f"{head_dim}, as the keys of a head: another size is not built")
        sliding, window = self._sliding(keys, n_layers) if gemma else ((), None)
        # llama.cpp's own rule, since the file does not say it. The largest Gemma-3 scales by d_model / n_heads.
        scaled_by = d_model // n_heads if gemma and n_layers == _GEMMA3_27B_LAYERS else head_dim
        theta = keys.number("rope.freq_base", 1.0, 1e12, _THETA)
        theta_sliding = keys.number("rope.freq_base_swa", 1.0, 1e12, _THETA) if gemma else _THETA
        vocab_size = self.shape("token_embd.weight")[0]
        if (named := keys.integer("vocab_size", 1, MOST["vocab_size"], vocab_size)) != vocab_size:
            raise keys.wrong("vocab_size", named, f"{vocab_size}, the rows of token_embd.weight")
        found = Architecture(
            family=family,
            n_layers=n_layers,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=keys.alike("attention.head_count_kv", 1, n_heads, n_heads),
            head_dim=head_dim,
            d_ff=keys.alike("feed_forward_length", 1, MOST["d_ff"]),
            vocab_size=vocab_size,
            max_context_tokens=keys.integer("context_length", 1, MOST["max_context_tokens"]),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-12, 0.1),
            activation="gelu_tanh" if gemma else "silu",
            tied_embeddings="output.weight" not in self._tensors,
            attention_scale=scaled_by**-0.5,
            embedding_scale=d_model**0.5 if gemma else 1.0,
            rope=self._rope(keys, theta, head_dim),
            window_tokens=window,
            sliding_rope=Rope(theta_sliding) if sliding else None,
            sliding=sliding,
        )
        found.check(str(self.path), FETCH_AGAIN)
        keys.refuse_rest("a file without this key: it is not read, and could change what the model computes")
        return found

    def _layers(self, keys: Fields) -> int:
        """The number of layers. Raises WeightsError if the file holds tensors of another number."""
        n_layers = keys.integer("block_count", 1, MOST["n_layers"])
        found = {int(n.split(".")[1]) + 1 for n in self._tensors if n.startswith("blk.") and n.split(".")[1].isdigit()}
        if max(found, default=0) != n_layers:
            raise keys.wrong("block_count", n_layers, f"{max(found, default=0)}, the layers of which there are tensors")
        return n_layers

    def _sliding(self, keys: Fields, n_layers: int) -> tuple[tuple[bool, ...], int | None]:
        """Which of Gemma-3's layers slide, and their window; () and None without a window."""
        window = keys.integer("attention.sliding_window", 0, MOST["max_context_tokens"], 0)
        pattern = keys.value("attention.sliding_window_pattern", _GEMMA3_SLIDING_PERIOD)
        if isinstance(pattern, tuple):
            if len(pattern) < n_layers or not all(isinstance(slides, bool) for slides in pattern):
                raise keys.wrong("attention.sliding_window_pattern", pattern, f"a period, or {n_layers} yes or no")
            sliding = pattern[:n_layers]
        else:
            period = keys.integer("attention.sliding_window_pattern", 0, 1024, _GEMMA3_SLIDING_PERIOD)
            sliding = tuple(period == 0 or layer % period < period - 1 for layer in range(n_layers))
        return (sliding, window) if window and any(sliding) else ((), None)

    def _rope(self, keys: Fields, theta: float, head_dim: int) -> Rope:
        """Rotary positions. A factor without a type is linear; Llama-3.1's scaling is one of the file's tensors."""
        kind = keys.text("rope.scaling.type", ("none", "linear"), "linear")
        older = keys.number("rope.scale_linear", 0, 1e6, 0.0)
        factor = keys.number("rope.scaling.factor", 0, 1e6, older) or 1.0
        if kind == "none":
            factor = 1.0
        divisors = [factor] * (head_dim // 2)
        if _ROPE_FREQS in self._tensors:
            freqs = self.rows(_ROPE_FREQS, 0, self.shape(_ROPE_FREQS)[0]).tolist()
            if len(freqs) != head_dim // 2 or not all(0 < freq < 1e6 for freq in freqs):
                where, allowed = f"tensor {_ROPE_FREQS} of {self.path}", f"{head_dim // 2} divisors above 0"
                raise WeightsError(where, f"{len(freqs)} values", allowed, FETCH_AGAIN)
            divisors = [factor * freq for freq in freqs]
        return Rope(theta, None if all(divisor == 1.0 for divisor in divisors) else tuple(divisors))

    def _check_tensors(self) -> None:
        """Raise WeightsError for a tensor that is missing, of another shape or kind, or that nothing reads."""
        from gguf.constants import GGMLQuantizationType

        used = stored_names(self) | ({_ROPE_FREQS} if self.architecture.family == "llama" else set())
        for name, stored in self._tensors.items():
            where = f"tensor {name} of {self.path}"
            if name not in used:
                allowed = "a file without it: it is not read, and could change what the model computes"
                raise WeightsError(where, stored.shape, allowed, OTHER_MODEL)
            kind = GGMLQuantizationType(stored.kind)
            if kind.name not in readable_kinds():
                allowed = f"a kind that is read: {', '.join(readable_kinds())}"
                raise WeightsError(where, kind.name, allowed, "choose a file of another quantization")

    def _check_vocabulary(self) -> None:
        tokens, rows = self.metadata.get("tokenizer.ggml.tokens"), self.architecture.vocab_size
        count = tokens.length if isinstance(tokens, LongArray) else None if tokens is None else len(tokens)
        if count not in (None, rows):
            where = f"tokenizer.ggml.tokens of {self.path}"
            raise WeightsError(where, f"{count} tokens", f"{rows}, the rows of token_embd.weight", FETCH_AGAIN)


@cache
def readable_kinds() -> tuple[str, ...]:
    """The kinds of stored values that are read, by ggml's names."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    found = []
    for kind in GGMLQuantizationType:
        with suppress(NotImplementedError):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            found.append(kind.name)
    return tuple(found)
