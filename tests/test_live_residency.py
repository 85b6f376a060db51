"""Weights in the device's memory: loaded whole or not at all, dropped without a rest, streamed through two layers."""

from __future__ import annotations

from itertools import pairwise
from queue import SimpleQueue

import pytest
import torch
from hypothesis import given, strategies as st

from helios_sim.live.device import ALIGNMENT, CpuDevice, Mark, Pairs
from helios_sim.live.memory.residents import Residents, Slab, SlabPiece
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.served import LiveModel
from live_example import packed_logits, token_ids
from live_rig import LAYERS, live_model
from tiny_models import FAMILIES, write_tiny


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny(request.param, tmp_path_factory.mktemp("tiny")))


class Failing(CpuDevice):
    """Copies `good` blocks, then fails once."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.good = good

    def copy(self, pairs: Pairs, after: Mark | None = None):
        self.good -= 1
        if self.good == -1:
            raise RuntimeError("CUDA error: out of memory")
        return super().copy(pairs, after)


def loaded(residents: Residents, name: str) -> Exception | None:
    found: SimpleQueue[Exception | None] = SimpleQueue()
    residents.load(name, found.put)
    return found.get(timeout=20)


@given(st.lists(st.integers(1, 5 * ALIGNMENT), max_size=12), st.randoms())
def test_pieces_never_overlap_and_all_come_back(sizes: list[int], random) -> None:
    slab = Slab(20 * ALIGNMENT, torch.device("cpu"))
    held: list[SlabPiece] = []
    for size in sizes:
        try:
            held.append(slab.take(size))
        except MemoryError:
            assert slab.free_bytes < 20 * ALIGNMENT
            if held:
                slab.give(held.pop(random.randrange(len(held))))
        places = sorted((piece.start, piece.start + piece.n_bytes) for piece in held)
        assert all(a[1] <= b[0] for a, b in pairwise(places))
        assert slab.free_bytes + sum(piece.n_bytes for piece in held) == slab.total_bytes
    for piece in held:
        slab.give(piece)
    assert slab.take(slab.total_bytes).n_bytes == slab.total_bytes  # one piece again


def test_a_model_is_raised_lowered_and_dropped(tiny: LiveModel) -> None:
    residents, ids = Residents({"a": tiny, "b": tiny}, CpuDevice()), token_ids(1, 12)
    residents.hold({"a": 2})
    empty = residents.free_bytes
    for layers in (4, LAYERS, 3):
        residents.hold({"a": layers})
        assert loaded(residents, "a") is None
        want = packed_logits(SegmentedModel.load(tiny.checkpoint, layers), ids)
        assert torch.equal(packed_logits(residents.running("a", layers), ids), want)
    residents.hold({"a": 2, "b": 3})
    assert loaded(residents, "b") is None
    assert residents.layers == {"a": 2, "b": 3}
    residents.hold({"a": 2})
    assert (residents.layers, residents.free_bytes) == ({"a": 2}, empty)
    with pytest.raises(RuntimeError, match="3 layers of a are to run, 2 are there"):
        residents.running("a", 3)


def test_weights_return_to_their_own_place(tiny: LiveModel) -> None:
    """Whatever was loaded before, so that steps captured over them stay valid."""
    residents = Residents({"a": tiny, "b": tiny}, CpuDevice())
    residents.hold({"b": 3})
    with residents.laid_out("b") as model:
        assert model is not None
        places = list(model.layers)
    assert len(places) == LAYERS
    assert all(a is b for a, b in zip(residents.running("b", 3).layers, places, strict=False))
    residents.hold({"a": LAYERS})
    assert loaded(residents, "a") is None
    residents.hold({"a": LAYERS, "b": LAYERS})
    assert loaded(residents, "b") is None
    assert all(a is b for a, b in zip(residents.running("b", LAYERS).layers, places, strict=True))


@pytest.mark.parametrize("good", [1, 3])
def test_a_load_that_fails_half_way_leaves_everything_as_it_was(tiny: LiveModel, good: int) -> None:
    device = Failing(10**6)
    residents = Residents({"a": tiny, "b": tiny}, device)
    residents.hold({"a": 2})
    before = residents.free_bytes
    for held, name in (({"a": LAYERS}, "a"), ({"a": 2, "b": LAYERS}, "b")):
        residents.hold(held)
        device.good = good
        assert "out of memory" in str(loaded(residents, name))
        assert (residents.layers, residents.free_bytes) == ({"a": 2}, before)
    device.good = 10**6
    assert loaded(residents, "b") is None  # the next one is not affected


def test_out_of_memory_is_known_before_anything_is_copied_over(tiny: LiveModel) -> None:
    layer = SegmentedModel.load(tiny.checkpoint, 1).weight_bytes
    residents = Residents({"a": tiny}, CpuDevice(), weight_bytes=2 * layer)
    residents.hold({"a": 1})
    before = residents.free_bytes
    residents.hold({"a": LAYERS})
    assert isinstance(loaded(residents, "a"), MemoryError)
    assert (residents.layers, residents.free_bytes) == ({"a": 1}, before)


@pytest.mark.parametrize("resident", [0, 3, LAYERS])
def test_a_model_streams_through_two_layers(tiny: LiveModel, resident: int) -> None:
    residents, ids = Residents({"a": tiny, "other": tiny}, CpuDevice()), token_ids(2, 12)
    residents.hold({"a": resident} if resident else {"other": 1})
    before = residents.free_bytes
    with residents.whole("a") as model:
        want = packed_logits(SegmentedModel.load(tiny.checkpoint), ids)
        assert torch.equal(packed_logits(model, ids, cuts=(2, 4)), want)
    assert residents.free_bytes == before
