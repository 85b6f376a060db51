"""What is made of measured rows and their predictions: groups, gates, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.result import Gate
from helios_sim.report.silicon import Compared, Errors, SiliconResult
from helios_sim.study.schema import Config
from helios_sim.validate.silicon import INFERENCEMAX, Prediction, Row, preset_for

TRIAL, NVIDIA = "trial", "NVIDIA"
# Mean errors of TPOT and TTFT of the shipped rows as others predict them: a throw-away simulator of a closed loop, and
# aiconfigurator 0.12.0 with its defaults, static.
OTHERS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "Qwen3-32B, vllm-0.12, h100_sxm, bf16": {TRIAL: (0.044, 0.281), NVIDIA: (0.126, 0.313)},
    "Llama-3.1-70B, vllm-0.10, h100_sxm, fp8": {TRIAL: (0.100, 0.161), NVIDIA: (0.050, 0.586)},
    "Llama-3.1-70B, vllm-0.10, h200_sxm, fp8": {TRIAL: (0.065, 0.110), NVIDIA: (0.055, 0.389)},
    "Llama-3.1-8B, trtllm-1.0, h100_sxm, bf16": {TRIAL: (0.121, 0.567), NVIDIA: (0.112, 0.655)},
    "Qwen3-32B, trtllm-1.0, h100_sxm, fp8": {TRIAL: (0.097, 0.303), NVIDIA: (0.088, 0.394)},
    "Qwen3-32B, sglang-0.5, h100_sxm, bf16": {TRIAL: (0.078, 0.141), NVIDIA: (0.281, 0.854)},
    "Llama-3.1-70B, trtllm-1.1, b200_sxm, fp8": {TRIAL: (0.067, 0.132), NVIDIA: (0.389, 0.324)},
    "Llama-3.1-70B, trtllm-1.1, b200_sxm, nvfp4": {TRIAL: (0.154, 0.124), NVIDIA: (0.299, 0.255)},
}
OF_ALL = {TRIAL: (0.094, 0.288), NVIDIA: (0.162, 0.492)}
AFTER_LOOKING = (
    "Chosen after looking at these rows: prompts before decodes under SGLang, memory for whole answers and batch_wait "
    "under TensorRT-LLM (each as in its source), its own kernels, products of fixed scales without the making of "
    "their inputs, Qwen3's weights in fp8 scaled by blocks, equal lengths where the harness is not documented."
)
Found = Sequence[tuple[Row, Prediction | None]]


def name_of(row: Row) -> str:
    """The group: model, preset of the engine's version, card and precision."""
    model = row.model.rsplit("/", 1)[-1].removesuffix("-Instruct")
    try:
        engine = preset_for(row)
    except ValueError:
        engine = f"{row.backend} {row.backend_version}"
    return f"{model}, {engine}, {row.system}, {row.precision}"


def result_of(
    found: Found, why_not: Mapping[str, str], config: Config, provenance: Mapping[str, Any], shipped: bool
) -> SiliconResult:
    """`shipped`: these are the rows that others have predicted too. `why_not`: by id, of rows without a prediction."""
    names = dict.fromkeys(name_of(row) for row, _ in found)
    groups = [
        _compared(name, [one for one in found if name_of(one[0]) == name], OTHERS.get(name, {}) if shipped else {})
        for name in names
    ]
    sums: dict[str, tuple[Found, Mapping[str, tuple[float, float]]]] = {
        "vLLM": ([one for one in found if one[0].backend == "vllm"], {}),
        "Llama-70B": ([one for one in found if "70B" in one[0].model], {}),
        "the half that host times were fitted to": ([one for one in found if shipped and one[0].is_fitted], {}),
        "the half that they were not": ([one for one in found if shipped and not one[0].is_fitted], {}),
        "all": (found, OF_ALL if shipped else {}),
    }
    together = [_compared(name, rows, others) for name, (rows, others) in sums.items() if rows]
    gates = tuple(_gates({one.name: one for one in together}, groups, len(why_not)))
    return SiliconResult(
        experiment=config.name, title=config.title, question=config.question, rows=[_shown(*one) for one in found],
        groups=groups, together=together, gates=gates, not_predicted=list(why_not.items()),
        notes=_notes(found, gates, together, shipped), others=(TRIAL, NVIDIA) if shipped else (), provenance=provenance,
    )  # fmt: skip


def _errors(found: Found, name: str) -> NDArray[np.float64]:
    pairs = [(getattr(one, name), getattr(row, name)) for row, one in found if one is not None]
    return np.array([predicted / measured - 1 for predicted, measured in pairs])


def _compared(name: str, found: Found, others: Mapping[str, tuple[float, float]]) -> Compared:
    tpot, ttft = _errors(found, "tpot_ms"), _errors(found, "ttft_ms")
    return Compared(
        name, len(found), Errors.of(tpot) if len(tpot) else None, Errors.of(ttft) if len(ttft) else None, others
    )


def _gates(together: Mapping[str, Compared], groups: Sequence[Compared], left: int) -> list[Gate]:
    """A gate fails where a row that it is about is not predicted."""
    gates: list[Gate] = []

    def gate(name: str, over: str, figure: str, statistic: str, bound: float) -> None:
        compared = together.get(over)
        if compared is None:
            return
        errors: Errors | None = getattr(compared, figure)
        value = None if errors is None else float(getattr(errors, statistic))
        whole = errors is not None and errors.rows == compared.rows
        missing = "" if whole else f" ({compared.rows - (errors.rows if errors else 0)} rows not predicted)"
        passed = whole and value is not None and abs(value) <= bound
        gates.append(Gate(name + missing, value, f"within {bound:.0%}", passed))

    gate("TPOT of vLLM, mean error", "vLLM", "tpot", "mean", 0.06)
    gate("TPOT of vLLM, 90th percentile", "vLLM", "tpot", "p90", 0.12)
    gate("TPOT of Llama-70B, mean error", "Llama-70B", "tpot", "mean", 0.07)
    gate("TPOT of all, mean error", "all", "tpot", "mean", 0.08)
    gate("TPOT of all, bias", "all", "tpot", "bias", 0.04)
    gate("TTFT of Llama-70B, mean error", "Llama-70B", "ttft", "mean", 0.12)
    for group in groups:
        if group.others:
            worst = max(tpot for tpot, _ in group.others.values())
            value = None if group.tpot is None else group.tpot.mean
            whole = group.tpot is not None and group.tpot.rows == group.rows
            passed = whole and value is not None and value <= worst
            gates.append(Gate(f"TPOT of {group.name}", value, f"within {worst:.1%}", passed))
    return gates


def _notes(found: Found, gates: Sequence[Gate], together: Sequence[Compared], shipped: bool) -> list[str]:
    missed = [gate.name for gate in gates if not gate.passed]
    kept = f"All {len(gates)} gates are kept." if not missed else f"Missed: {', '.join(missed)}."
    notes = [kept if gates else "No gate is about these rows."]
    whole = together[-1]
    if whole.tpot is not None:
        notes.append(f"{whole.tpot.rows} of {whole.rows} rows are predicted; nothing is fitted to a row.")
    if shipped:
        notes.append(
            "Host times are fitted by engine version to the half of the rows whose ids hash to an even number; "
            "the other half judges them. All rows of vLLM 0.12 and of SGLang are one group each."
        )
        notes.append(AFTER_LOOKING)
        judged = [one for one in found if not one[0].is_fitted]
        low, high = np.percentile(1 / (1 + _errors(judged, "tpot_ms")), (5, 95))
        notes.append(
            f"Measured over predicted time per output token: 90 % of the {len(judged)} rows that nothing was fitted to "
            f"lie from {low:.2f} to {high:.2f}."
        )
    if any(not row.source.startswith(INFERENCEMAX) for row, _ in found):
        notes.append(f"TTFT of rows from elsewhere than {INFERENCEMAX} is not judged: their harness is not documented.")
    return notes


def _shown(row: Row, one: Prediction | None) -> dict[str, Any]:
    return {
        **asdict(row), "group": name_of(row), "fitted_half": row.is_fitted,
        "predicted_tpot_ms": None if one is None else one.tpot_ms,
        "predicted_ttft_ms": None if one is None else one.ttft_ms,
        "tpot_error": None if one is None else one.tpot_ms / row.tpot_ms - 1,
        "ttft_error": None if one is None else one.ttft_ms / row.ttft_ms - 1,
        "preemptions": None if one is None else one.preemptions,
    }  # fmt: skip
