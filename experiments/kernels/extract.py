"""Extracts the kernel tables that helios_sim ships from NVIDIA's package aiconfigurator-core.

`python experiments/kernels/extract.py WHEEL` reads the wheel (or a folder that it was unpacked into) and writes
helios_sim/data/kernels. Kept are matrix products in bf16, fp8 and nvfp4, full attention over K and V in bf16 and fp8,
and all-reduces, as vLLM runs them, and in folders of their own as TensorRT-LLM does, with its products in fp8 by
blocks; products with integer weights, which only its table of the A100 has. Columns that are the same in all rows are
dropped, and of a case that stands there twice the quicker one is kept, since noise is mostly upward. Nothing else of
the wheel is read.
"""

from __future__ import annotations

import argparse
import zipfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helios_sim.entry import script

TARGET = Path(__file__).parents[2] / "helios_sim" / "data" / "kernels"
TABLES = "aiconfigurator_core/systems/data"
CARDS = {  # vLLM's version of its kernels, of its all-reduce, and NCCL's
    "a100_sxm": ("0.14.0", "0.14.0", "2.27.3"), "h100_sxm": ("0.24.0", "0.24.0", "2.29.2"),
    "h200_sxm": ("0.24.0", "0.24.0", "2.29.2"), "b200_sxm": ("0.24.0", "0.24.0", "2.29.2"),
    "l40s": ("0.24.0", "0.22.0", "2.27.3"), "rtx_pro_6000_server": ("0.24.0", "0.24.0", "2.29.2"),
}  # fmt: skip
MOST_ROWS = 16_384  # of a matrix product
TYPES = ("bfloat16", "fp8", "nvfp4")  # the last on Blackwell alone
INTEGERS = {"a100_sxm": "1.0.0"}  # TensorRT-LLM's version of the table with int4_wo, int8_wo and sq
TRTLLM = "1.3.0rc20"
TRTLLM_CARDS = ("h100_sxm", "h200_sxm", "b200_sxm", "l40s", "rtx_pro_6000_server")
TRTLLM_HEADS = (64, 128, 256)
COLUMNS = {
    "gemm": ("gemm_dtype", "m", "n", "k"),
    "context_attention": ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "kv_cache_dtype"),
    "generation_attention": ("batch_size", "step", "num_heads", "num_key_value_heads", "head_dim", "kv_cache_dtype"),
    "custom_allreduce": ("num_gpus", "message_size"),
    "nccl": ("num_gpus", "message_size"),
}


def read(source: Path, path: str) -> pa.Table:
    name = f"{TABLES}/{path}"
    if source.is_dir():
        return pq.read_table(source / name)
    with zipfile.ZipFile(source) as wheel:
        return pq.read_table(BytesIO(wheel.read(name)))


def only(table: pa.Table, column: str, *values: object) -> pa.Table:
    """Rows with one of these values; all where there is no such column, as in older tables without windows."""
    return table.filter(pc.is_in(table[column], pa.array(values))) if column in table.column_names else table


def written(table: pa.Table, name: str, path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = COLUMNS[name]
    table = table.select([*keys, "latency"]).group_by(list(keys)).aggregate([("latency", "min")])
    table = table.rename_columns([*keys, "latency"]).sort_by([(key, "ascending") for key in keys])
    columns = {
        key: table[key].cast(pa.int32()) if pa.types.is_integer(table[key].type) else table[key].dictionary_encode()
        for key in keys
    }
    pq.write_table(pa.table({**columns, "latency": table["latency"].cast(pa.float32())}), path, compression="zstd")
    return path.stat().st_size


def main(source: Path) -> None:
    total = 0
    for card, (vllm, all_reduce, nccl) in CARDS.items():
        folder = TARGET / card
        gemm = only(read(source, f"{card}/gemm/vllm/{vllm}/gemm_perf.parquet"), "gemm_dtype", *TYPES)
        if card in INTEGERS:
            others = read(source, f"{card}/gemm/trtllm/{INTEGERS[card]}/gemm_perf.parquet")
            others = only(others, "gemm_dtype", "int4_wo", "int8_wo", "sq")
            kept = [*COLUMNS["gemm"], "latency"]
            gemm = pa.concat_tables([gemm.select(kept), others.select(kept)], promote_options="permissive")
        total += written(gemm.filter(pc.less_equal(gemm["m"], MOST_ROWS)), "gemm", folder / "gemm.parquet")
        for name in ("context_attention", "generation_attention"):
            table = read(source, f"{card}/attention/vllm/{vllm}/{name}_perf.parquet")
            table = only(only(table, "window_size", 0), "kv_cache_dtype", "bfloat16", "fp8")
            if name == "context_attention":
                table = only(table, "batch_size", 1)
            total += written(table, name, folder / f"{name}.parquet")
        table = read(source, f"{card}/comm/vllm/{all_reduce}/custom_allreduce_perf.parquet")
        table = only(table, "kernel_source", "vLLM_custom_graph")
        total += written(table, "custom_allreduce", folder / "custom_allreduce.parquet")
        table = read(source, f"{card}/comm/nccl/{nccl}/nccl_perf.parquet")
        table = only(only(table, "op_name", "all_reduce"), "nccl_dtype", "half")
        total += written(table, "nccl", folder / "nccl.parquet")
    total += sum(of_trtllm(source, card, TARGET / card / "trtllm") for card in TRTLLM_CARDS)
    print(f"{total / 1e6:.1f} MB in {TARGET}")


def of_trtllm(source: Path, card: str, folder: Path) -> int:
    """TensorRT-LLM's kernels of a card; prompts over K and V in fp8 as computed in fp8 where that was measured."""
    gemm = read(source, f"{card}/gemm/trtllm/{TRTLLM}/gemm_perf.parquet")
    gemm = only(gemm, "gemm_dtype", "bfloat16", "fp8", "fp8_block", "nvfp4")
    total = written(gemm.filter(pc.less_equal(gemm["m"], MOST_ROWS)), "gemm", folder / "gemm.parquet")
    for name in ("context_attention", "generation_attention"):
        table = read(source, f"{card}/attention/trtllm/{TRTLLM}/{name}_perf.parquet")
        table = only(only(only(table, "window_size", 0), "beam_width", 1), "head_dim", *TRTLLM_HEADS)
        if name == "context_attention":
            table = only(table, "batch_size", 1)
        total += written(only(table, "attn_dtype", "bfloat16"), name, folder / f"{name}.parquet")
    table = read(source, f"{card}/comm/trtllm/{TRTLLM}/custom_allreduce_perf.parquet")
    return total + written(table, "custom_allreduce", folder / "custom_allreduce.parquet")


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    main(parser.parse_args(words).wheel)


if __name__ == "__main__":
    script(__file__, command)
