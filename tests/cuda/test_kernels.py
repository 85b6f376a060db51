"""The project's kernels without a card: their errors, what they read, and what they need when compiled for cards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")  # there is none for macOS and Windows

from helios_sim.errors import UserError
from helios_sim.live.device import open_device
from helios_sim.live.kernels import activation, attention, choice, first_contact, gemv, head, leave, norms, turn
from helios_sim.live.kernels.choice import described, kernels_for
from helios_sim.live.kernels.interface import TORCH, Inside
from kernel_builds import SHARED_BYTES, build, launches

TESTS = Path(__file__).parents[1]
PARTS, LEAST_OF_A_PART = 20, 21  # of all cases of attention
MOST_ERROR = {"float32": 1e-6, "bfloat16": 1e-2}
CARDS = (80, 90, 100)
HEADS = (  # of a model: heads, KV heads, width
    (32, 32, 128), (32, 8, 128), (64, 8, 128), (9, 3, 64), (12, 12, 64), (32, 32, 80), (16, 4, 96), (8, 8, 256),
    (8, 4, 256), (4, 1, 256), (32, 1, 128), (64, 1, 64), (71, 1, 64),
)  # fmt: skip
FEW = ((32, 32, 128), (32, 8, 128), (4, 1, 256))
META = torch.device("meta")


def cases(*words: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "kernel_cases.py"), *words], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_attention(found: dict[str, Any]) -> None:
    for name, case in found.items():
        most = MOST_ERROR[name.rpartition(" ")[2]]
        assert case["error"] < most, name
        assert case["written"] < most, name
        assert not case["elsewhere"], f"{name}: K or V of others are written"
        assert not case["read_too_much"], f"{name}: other bytes of K and V are read than those of the requests' tokens"
        assert not case["padding"], name


def check_others(found: dict[str, Any]) -> None:
    for name, error in found["rows"].items():
        assert error < MOST_ERROR[name.rpartition(" ")[2]], name
    for name, error in found["steps"].items():
        assert error < 1e-5, name
    assert found["repeated"] < 1e-6
    assert max(found["turned"].values()) < 1e-6
    assert max(found["one_pass"]) < 1e-5
    assert not found["leaves"]
    assert found["not_numbers"] == [True, True, False, False]
    *right, wrong = found["first_contact"]
    assert max(right) < 0.01 < first_contact.MOST_ERROR < wrong
    assert found["attended"] == [[False, True]] * 12, "a row of NaN looks like one of numbers"


def test_the_kernels_compute_what_torch_defines_and_read_what_they_need() -> None:
    """By Triton's interpreter against float64."""
    found = cases()
    check_attention(found.pop("attention"))
    check_others(found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(PARTS))
def test_the_same_of_all_lengths_and_batches(part: int) -> None:
    found = cases("exhaustive", f"{part}/{PARTS}")["attention"]
    assert len(found) >= LEAST_OF_A_PART
    check_attention(found)


@pytest.mark.exhaustive
def test_the_same_of_all_sizes_of_other_kernels() -> None:
    check_others(cases("exhaustive", "others"))


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def decodes(heads: int, kv_heads: int, width: int, rows: int, dtype: torch.dtype, **more: Any) -> Any:
    qkv, cache = drawn(rows, heads + 2 * kv_heads, width, dtype=dtype), drawn(rows, kv_heads, 4096, width, dtype=dtype)
    numbers, angles = drawn(rows, dtype=torch.int64), drawn(4096, width, dtype=torch.float32)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    return lambda: attention.decode(q, k, v, cache, cache, numbers, numbers, width**-0.5, angles, **more)


def steps_of_rows(dtype: torch.dtype, widths: tuple[int, ...]) -> list[Any]:
    def of(*shape: int) -> torch.Tensor:
        return drawn(*shape, dtype=dtype)

    def slots(n: int) -> torch.Tensor:
        return drawn(n, dtype=torch.int64)

    found: list[Any] = [lambda: head.look_at(of(4, 128256), 2), lambda: activation.activate(of(8, 28672), "silu", True)]
    found.append(lambda: activation.activate(of(8, 16384), "gelu", False))
    one = drawn(16, dtype=torch.float64)
    inside = Inside(slots(16), slots(16), drawn(4, 16, dtype=torch.float64))
    sure = drawn(16, dtype=torch.float32)
    for lazy in (False, True):
        found.append(lambda lazy=lazy: leave.leave(inside, 8, sure, (slots(16), sure), one, one, lazy, False))
    found.append(lambda: gemv.product(of(3, 11008), of(4096, 11008), None))
    found.append(lambda: turn.turn_and_write(  # attention that is not ours follows
        of(8, 32, 128), of(8, 8, 128), of(8, 8, 128), of(8, 8, 4096, 128), of(8, 8, 4096, 128), slots(8), slots(8),
        drawn(4096, 128, dtype=torch.float32)))  # fmt: skip
    found.append(lambda: turn.write(
        of(8, 8, 128), of(8, 8, 128), of(8, 8, 4096, 128), of(8, 8, 4096, 128), slots(8), slots(8),
        drawn(4096, 128, dtype=torch.float32), (of(128), 1e-6)))  # fmt: skip
    for w in widths:
        found.append(lambda w=w: norms.add_norm(of(8, w), of(8, w), of(w), of(w), None, 1e-5))
        found.append(lambda w=w: norms.add_norm(of(8, w), of(8, w), None, of(w), of(w), 1e-5))
        found.append(lambda w=w: norms.add_norm(of(8, w), of(8, w), None, of(w), None, 1e-5, slots(8)))
        for n in (1, 2, 4):
            if gemv.fits(n, w):
                given = (of(n, w), of(n, w), None, of(w), None, 1e-5, of(2 * 11008, w), None, "silu", True)
                found.append(lambda given=given: gemv.normed_product(*given))
                found.append(lambda given=given, n=n: gemv.normed_product(*given, slots(n), needed=False))
                given = (of(n, w), of(n, w), None, of(w), of(w), 1e-5, of(3 * w, w), of(3 * w), None, False)
                found.append(lambda given=given: gemv.normed_product(*given))
                given = (of(n, w), of(n, w), of(w), of(w), None, 1e-5, of(8192, w), None, "gelu_tanh", True)
                found.append(lambda given=given: gemv.normed_product(*given))
            found.append(lambda n=n, w=w: gemv.product(of(n, w), of(w, w), of(w)))
            found.append(lambda n=n, w=w: gemv.product(of(n, w), of(w, w), None, slots(n)))
    return found


def check_builds(calls: list[Any], cards: tuple[int, ...]) -> None:
    """Compile what the calls launch, each kernel once for each card."""
    known = set()
    for call in calls:
        for kernel, given, constants in launches(call):
            key = (kernel.__name__, str(constants), tuple(t.dtype if isinstance(t, torch.Tensor) else t for t in given))
            if key in known:
                continue
            known.add(key)
            for card in cards:
                built = build(kernel, given, constants, card)
                assert not built.spilled_bytes, built
                assert built.shared_bytes <= SHARED_BYTES[card], built


@pytest.mark.parametrize("card", CARDS)
def test_nothing_spills_when_compiled(card: int) -> None:
    """By ptxas, for A100, H100 and B200: attention of a few kinds, and the rest for one of the cards."""
    of_heads = [decodes(*heads, rows, torch.bfloat16) for heads in FEW for rows in ((1, 64) if card == 90 else (64,))]
    if card == 90:  # rows of one request
        firsts = {rows: drawn(rows, dtype=torch.int64) for rows in (64, 512)}
        of_heads += [decodes(9, 3, 64, rows, torch.bfloat16, firsts=of) for rows, of in firsts.items()]
    check_builds([*of_heads, *(steps_of_rows(torch.bfloat16, (4096,)) if card == 90 else ())], (card,))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_spills_at_any_shape(dtype: torch.dtype) -> None:
    calls = []
    for heads in HEADS:
        norm = drawn(heads[2], dtype=dtype)
        for rows in (1, 4, 64, 256):
            calls += [decodes(*heads, rows, dtype), decodes(*heads, rows, dtype, norms=(norm, norm, 1e-6), window=512)]
            firsts = drawn(2 * rows, dtype=torch.int64)
            calls += [decodes(*heads, 2 * rows, dtype, firsts=firsts, window=window) for window in (None, 512)]
    check_builds([*calls, *steps_of_rows(dtype, (576, 768, 2048, 4096, 5120, 8192, 16384))], CARDS)


@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64)])
def test_grouped_heads_run_on_tensor_cores(heads: tuple[int, int, int]) -> None:
    """While one tile is multiplied the next one is copied."""
    kernel, given, constants = launches(decodes(*heads, 16, torch.bfloat16))[0]
    built = build(kernel, given, constants, 90)
    assert built.tensor_cores
    assert built.asynchronous


def test_a_cpu_computes_with_torch() -> None:
    assert open_device("cpu").kernels is TORCH
    assert kernels_for(torch.device("cpu"), "torch") is TORCH
    with pytest.raises(UserError, match=r"live\.kernels"):
        open_device("cpu", "triton")


def test_kernels_that_fail_at_the_first_launch_are_not_used_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there is no driver; where one is, results are compared."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "_FAULTS", {})
    card, errors = torch.device("cuda", 1), [RuntimeError("libcuda.so cannot found!\nrun ldconfig")]

    current: list[torch.device] = []

    @contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        try:
            yield
        finally:
            current.pop()

    def largest_error(kernels: object, device: torch.device, batch: int) -> float:
        assert current == [device], "Triton launches on the current card"
        if errors:
            raise errors[0]
        return 0.7

    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(first_contact, "largest_error", largest_error)
    for said in (r"launched \(libcuda.so cannot found!\)$", "70 % off"):
        first_contact.fault.cache_clear()
        assert kernels_for(card) is TORCH
        assert re.search(said, described(TORCH))
        with pytest.raises(UserError, match=r"live\.kernels"):
            kernels_for(card, "triton")
        errors.clear()
    first_contact.fault.cache_clear()


def test_a_card_computes_with_triton_unless_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_contact, "fault", lambda device: None)
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    card = torch.device("cuda", 0)
    assert kernels_for(card).name == "triton"
    assert "Triton" in described(kernels_for(card))
    assert kernels_for(card, "torch") is TORCH
    with monkeypatch.context() as bare:  # Triton builds its launcher at the first launch on a host
        bare.delenv("CC", raising=False)
        bare.setattr(shutil, "which", lambda name: None)
        assert kernels_for(card) is TORCH
        assert "C compiler" in described(TORCH)
        with pytest.raises(UserError, match="C compiler"):
            kernels_for(card, "triton")
    with monkeypatch.context() as bare:
        bare.setattr(sysconfig, "get_path", lambda name: "/nowhere")
        assert kernels_for(card) is TORCH
    capability[0] = (7, 5)
    assert kernels_for(card) is TORCH
    with pytest.raises(UserError, match="compute capability"):
        kernels_for(card, "triton")
