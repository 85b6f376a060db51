"""How far profiles built from measured kernels are from measurements that the builder did not use.

    python experiments/profile_validation/validate.py

Needs the shared data (HELIOS_SHARED_DATA). Prints the tables and writes them to tables.md beside this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from helios_sim import files
from helios_sim.entry import script
from helios_sim.profile.catalog import HARDWARE, MODELS
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.devices import device_of
from helios_sim.profile.held_out import attention as held_out_attention, products as held_out_products
from helios_sim.profile.importers.aiconfigurator import LayerTimes, gemm_times, kernel_profile
from helios_sim.profile.importers.kernel_tables import (
    A100,
    H100,
    OF_FP8,
    SHIPPED_SOURCES,
    DecodeAttentionTimes,
    GemmTimes,
    KernelSource,
    rising,
)
from helios_sim.profile.roofline import Elementwise, Gemm, layer_elementwise
from helios_sim.profile.spec import ModelSpec, Runtime
from helios_sim.shared_data import shared_data_folder

NO_HOST = Runtime(0.0, 0.0, 0.0, 0.0, None)
KERNELS = shared_data_folder() / "kernels"


def spread(ratio: Iterable[float]) -> str:
    """Count, quartiles and 5 % tails of ours / theirs, and the mean absolute error, as table cells."""
    r = np.asarray(list(ratio))
    low, median, high = np.quantile(r, [0.05, 0.5, 0.95])
    return f"{len(r)} | {median:.3f} | {low:.2f} to {high:.2f} | {100 * np.mean(np.abs(r - 1)):.0f} %"


def table(title: str, first: str, rows: Iterable[tuple[str, str]]) -> str:
    head = f"### {title}\n\n| {first} | cases | median | 5 % to 95 % | mean abs. error |\n|---|---|---|---|---|\n"
    return head + "\n".join(f"| {name} | {cells} |" for name, cells in rows) + "\n"


def at_rows(times: LayerTimes, time_s: np.ndarray, rows: pd.Series) -> np.ndarray:
    return np.interp(rows, times.rows, time_s)


VIDUR_CARD = "a100pcie80gb"  # Azure's NC96ads A100 v4, says docs/profiling.md of github microsoft/vidur
SXM = "a100-80gb"


def layer_operations() -> str:
    """Vidur: operations of Llama-2-7b by tokens on an A100 80 GB, whole and cut for 2, 4 and 8 cards."""
    both = [table(f"Vidur, Llama-2-7b, priced as {card}: ours over measured", "operation", _operations(card))
            for card in (VIDUR_CARD, SXM)]  # fmt: skip
    return "\n".join(both)


def _operations(card: str) -> list[tuple[str, str]]:
    measured = pd.read_csv(KERNELS / "vidur" / "a100" / "llama2-7b_mlp.csv")
    measured = measured.groupby(["num_tensor_parallel_workers", "num_tokens"]).median(numeric_only=True).reset_index()
    ms = {c.split(".")[1]: measured[c] for c in measured.columns if c.endswith(".median")}
    tokens, cards = measured.num_tokens, measured.num_tensor_parallel_workers
    times = LayerTimes(MODELS["llama-2-7b"], device_of(card), SHIPPED_SOURCES[card])

    def gemm_s(n: int, k: int, cut: str) -> np.ndarray:
        ours = np.empty(len(measured))
        for tp in (1, 2, 4, 8):
            gemm = Gemm(n // tp, k) if cut == "n" else Gemm(n, k // tp)
            here = (cards == tp).to_numpy()
            ours[here] = at_rows(times, times.gemm_s(gemm), tokens[here])
        return ours

    ours_s = {
        "attn_pre_proj": gemm_s(3 * 4096, 4096, "n"),
        "attn_post_proj": gemm_s(4096, 4096, "k"),
        "mlp_up_proj": gemm_s(2 * 11_008, 4096, "n"),
        "mlp_down_proj": gemm_s(4096, 11_008, "k"),
    }
    whole = (cards == 1).to_numpy()
    rows = []
    for name, value in ours_s.items():
        ratio = value / (ms[name] * 1e-3)
        rows += [(f"{name}, whole", spread(ratio[whole])), (f"{name}, cut for 2 to 8 cards", spread(ratio[~whole]))]
    for low, high in ((0, 16), (16, 128), (128, 512), (512, 4096), (128, 4096)):
        here = whole & (tokens > low) & (tokens <= high)
        ours, theirs = sum(v[here] for v in ours_s.values()), sum(ms[name][here] for name in ours_s) * 1e-3
        rows.append((f"the four products, {low + 1} to {high} tokens", spread(ours / theirs)))
    small = ("input_layernorm", "post_attention_layernorm", "attn_rope", "mlp_act", "add", "add")
    kernels = layer_elementwise(times.model)
    without_kv_write = Elementwise(kernels.kernels - 1, kernels.values_per_row - 2 * 2 * times.model.kv_width)
    small_s = at_rows(times, times.small_s(without_kv_write), tokens)
    small_ms = sum(ms[name] for name in small)
    for low, high in ((0, 128), (128, 4096)):
        here = whole & (tokens > low) & (tokens <= high)
        rows.append((f"small kernels, {low + 1} to {high} tokens", spread(small_s[here] / (small_ms[here] * 1e-3))))
    products_s, theirs_s = sum(ours_s.values()), (sum(ms[name] for name in ours_s) + small_ms) * 1e-3
    for name, small_kernels_s in (("", small_s), (", with their small kernels", small_ms * 1e-3)):
        for low, high in ((0, 128), (128, 4096)):
            here = whole & (tokens > low) & (tokens <= high)
            ratio = ((products_s + small_kernels_s) / theirs_s)[here]
            rows.append((f"layer without attention{name}, {low + 1} to {high} tokens", spread(ratio)))
    return rows


def attention() -> str:
    """Vidur: paged attention of 32 query and 4 KV heads on that card (older kernels)."""
    shape = dataclasses.replace(MODELS["llama-3-8b"], n_heads=32, n_kv_heads=4)
    times = LayerTimes(shape, device_of(VIDUR_CARD), SHIPPED_SOURCES[VIDUR_CARD])
    measured = pd.read_csv(KERNELS / "vidur" / "a100" / "attention_llama2-70b_tp2.csv.gz")
    rows = []
    decode = measured[~measured.is_prefill]
    ours = np.array([times.decode_s(b, kv) for b, kv in zip(decode.batch_size, decode.kv_cache_size, strict=True)])
    ratio = ours / (decode["time_stats.attn_decode.median"] * 1e-3)
    for low, high in ((0, 8), (8, 64), (64, 256)):
        here = (decode.batch_size > low) & (decode.batch_size <= high)
        rows.append((f"decode, batch {low + 1} to {high}", spread(ratio[here])))
    prefill = measured[measured.is_prefill]
    new, context = prefill.prefill_chunk_size, prefill.kv_cache_size
    ours = np.array([times.prefill_s(t, c) for t, c in zip(new, context, strict=True)])
    ratio = ours / (prefill["time_stats.attn_prefill.median"] * 1e-3)
    square = ((new + 1) / 2 + context) / (new + context)  # share of the rectangle on and below the diagonal
    for name, here in (("at least", context >= 2 * new), ("less than", context < 2 * new)):
        rows.append((f"prefill, context {name} twice the chunk", spread(ratio[here])))
        rows.append(("the same, if theirs also works above the diagonal", spread((ratio / square)[here])))
    return table(f"Vidur, attention of 32/4 heads, priced as {VIDUR_CARD}: ours over measured", "case", rows)


def cut_for(cards: int) -> ModelSpec:
    """What one of `cards` runs of Llama-2-70b."""
    return dataclasses.replace(
        MODELS["llama-2-7b"], name="llama-2-70b", n_layers=80, d_model=8192, n_heads=64 // cards,
        n_kv_heads=8 // cards, d_ff=28_672 // cards, vocab_size=32_000 // cards, max_context_tokens=16_384,
    )  # fmt: skip


def end_to_end() -> str:
    """Splitwise: prompt and token times of Llama-2-70b on 2, 4 and 8 cards (vLLM of 2023)."""
    measured = pd.read_csv(KERNELS / "splitwise" / "perf_model.csv")
    measured = measured[(measured.model == "llama2-70b") & measured.hardware.isin(["a100-80gb", "h100-80gb"])]
    keys = ["hardware", "tensor_parallel", "prompt_size", "batch_size", "token_size"]
    measured = measured.groupby(keys)[["prompt_time", "token_time"]].median().reset_index()
    none = np.zeros((1, 1), dtype=np.int64)
    rows = []
    for (card, cards), group in measured.groupby(["hardware", "tensor_parallel"]):
        profile = kernel_profile(cut_for(cards), HARDWARE[card], NO_HOST)
        token_ratio, prompt_ratio, gaps_ms = [], [], []
        for r in group[group.token_size == 128].itertuples():
            batch = np.array([[r.batch_size]])
            kv = batch * (r.prompt_size + r.token_size // 2)
            token_s = profile.iteration_time_s(Composition((80,), batch, kv, batch[:, 0]))[0]
            chunks = (PrefillChunk(r.prompt_size, 0, 80),) * r.batch_size
            prompt = Composition((80,), none, none, batch[:, 0], prefill=chunks)
            token_ratio.append(token_s / (r.token_time * 1e-3))
            gaps_ms.append(r.token_time - token_s * 1e3)
            if profile.iteration_floor_s(prompt)[0] < r.prompt_time * 1e-3:  # else no card can have done it
                prompt_ratio.append(profile.iteration_time_s(prompt)[0] / (r.prompt_time * 1e-3))
        gap = f"gap {np.min(gaps_ms):.0f} to {np.max(gaps_ms):.0f} ms"
        rows.append((f"{card}, {cards} cards: token time ({gap})", spread(token_ratio)))
        rows.append((f"{card}, {cards} cards: prompt time", spread(prompt_ratio)))
    return table("Splitwise, Llama-2-70b end to end: kernels alone over measured", "case", rows)


class WithoutWidth(GemmTimes):
    """The table with one width n left out, to see how well its neighbours tell it."""

    def __init__(self, whole: GemmTimes, n: int) -> None:
        at = list(whole._n).index(n)
        self.__dict__.update(whole.__dict__)
        self._n, self._time_s = np.delete(whole._n, at), np.delete(whole._time_s, at, axis=1)


def rules() -> str:
    """The builder's own scaling rules, on cases that the tables hold."""
    rows = []
    for source in (A100, H100):
        name = f"{source.card.name} (vLLM {source.version})"
        whole = gemm_times(source)
        widths = (3072, 4096, 5120, 6144, 8192, 10_240, 12_288, 16_384)
        ratio = [
            WithoutWidth(whole, n).time_s(Gemm(n, k))
            / rising(whole._time_s[:, list(whole._n).index(n), list(whole._k).index(k)])
            for n in widths for k in (2048, 4096, 5120, 8192)
        ]  # fmt: skip
        rows.append((f"{name}: width from its neighbours", spread(np.concatenate(ratio))))
        noise = (rising(whole._time_s) / whole._time_s)[whole.measured]
        rows.append((f"{name}: effect of making times rise with rows", spread(noise[np.isfinite(noise)])))
        eight = DecodeAttentionTimes(source, 8, 8, 128)
        for heads in (4, 2, 1):
            fewer = DecodeAttentionTimes(source, heads, heads, 128)
            rows.append((f"{name}: {heads}/{heads} heads at batch {8 // heads} b as 8/8 at b",
                         spread(compared(fewer, eight, 8 // heads, 1))))  # fmt: skip
    narrow, wide = (DecodeAttentionTimes(H100, 8, 8, d) for d in (64, 128))
    as_wide = compared(wide, narrow, 1, 0.5)
    rows.append(("h100-80gb: 8/8 heads of 64 as 8/8 of 128 with half the KV", spread(as_wide)))
    older = KernelSource("h100_sxm", "0.14.0", (128,), H100.card)
    new, old = gemm_times(H100), gemm_times(older)
    both = [(i, list(old.rows).index(m)) for i, m in enumerate(new.rows) if m in old.rows]
    ratio = [
        new.time_s(Gemm(n, k))[i] / old.time_s(Gemm(n, k))[j]
        for n in (2048, 4096, 8192, 12_288, 16_384) for k in (2048, 4096, 8192) for i, j in both
    ]  # fmt: skip
    rows.append(("h100-80gb: products of vLLM 0.19.0 over 0.14.0", spread(ratio)))
    return table("The builder's rules, inside the tables: by rule over measured", "rule", rows)


def compared(
    ours: DecodeAttentionTimes, theirs: DecodeAttentionTimes, batch_scale: int, kv_scale: float
) -> Iterable[float]:
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for kv in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
            if theirs.measured[list(theirs.batch).index(batch), list(theirs.kv_tokens).index(kv)]:
                yield ours.time_s(batch * batch_scale, kv * kv_scale) / theirs.time_s(batch, kv)


def held_out() -> str:
    """One row in ten of the tables that profiles are made from for a run, priced from the others."""
    names = ("products, up to 128 rows", "products, more rows", "attention of decodes", "attention of prompts")
    rows, every = [], [[] for _ in names]
    for card in ("a100-80gb", "h100", "h200", "b200", "l40s", "rtxpro6000"):
        found = (*held_out_products(SHIPPED_SOURCES[card]), *held_out_attention(SHIPPED_SOURCES[card]))
        for name, ratio, together in zip(names, found, every, strict=True):
            rows.append((f"{card}: {name}", off(ratio)))
            together.append(ratio)
    of_fp8 = [held_out_products(SHIPPED_SOURCES[card], OF_FP8) for card in ("h100", "h200", "b200")]
    for name, parts in zip(names, every, strict=True):
        rows.append((f"six cards: {name}", off(np.concatenate(parts))))
    for name, parts in zip(names, zip(*of_fp8, strict=True), strict=False):
        rows.append((f"three cards in fp8: {name}", off(np.concatenate(parts))))
    head = "### Rows left out of the tables: price over measured\n\n| rows | number | median | median abs. error |"
    return head + "\n|---|---|---|---|\n" + "\n".join(f"| {name} | {cells} |" for name, cells in rows) + "\n"


def off(ratio: np.ndarray) -> str:
    """Count, median, and median size of the error, as table cells."""
    return f"{len(ratio)} | {np.median(ratio):.3f} | {100 * np.median(np.abs(ratio - 1)):.1f} %"


def tables() -> str:
    return "\n".join((held_out(), layer_operations(), attention(), end_to_end(), rules()))


def main(words: list[str]) -> None:
    text = tables()
    print(text)
    files.write_text(Path(__file__).parent / "tables.md", text)


if __name__ == "__main__":
    script(__file__, main)
