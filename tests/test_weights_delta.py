"""A change of weights in a folder: opened where weights are named, merged on loading, and refused where it is wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save  # noqa: E402

from helios_sim.errors import UserError  # noqa: E402
from helios_sim.live.checkpoint.source import find_checkpoint  # noqa: E402
from helios_sim.live.model.decoder import SegmentedModel  # noqa: E402
from helios_sim.live.model.delta import HEADER, TENSORS, WeightsDelta, write_delta  # noqa: E402
from helios_sim.live.model.weights import load_layer  # noqa: E402
from tests.tiny_models import write_tiny  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("base"), layers=2)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    drawn = torch.Generator().manual_seed(0)
    factors = {
        (1, "qkv"): (torch.randn(3, 48, generator=drawn), 0.01 * torch.randn(96, 3, generator=drawn)),
        (0, "mlp_out"): (torch.randn(2, 96, generator=drawn), 0.01 * torch.randn(48, 2, generator=drawn)),
    }
    stored = find_checkpoint(str(base))
    write_delta(tmp_path / "My-Change", {"weights": str(base), "weights_sha256": stored.sha256}, factors)
    return tmp_path / "My-Change"


def test_the_change_is_added_in_float32_and_rounded_once(base: Path, folder: Path) -> None:
    stored, changed = find_checkpoint(str(base)), find_checkpoint(str(folder))
    cpu = torch.device("cpu")
    assert isinstance(changed.delta, WeightsDelta)
    for dtype in (torch.float32, torch.bfloat16):
        for layer, part in ((1, "qkv"), (0, "mlp_out")):
            whole = getattr(load_layer(stored, layer, torch.float32, cpu), part)
            want = (whole + changed.delta.of(part, layer)).to(dtype)
            assert torch.equal(getattr(load_layer(changed, layer, dtype, cpu), part), want)
        same = load_layer(stored, 0, dtype, cpu).qkv, load_layer(changed, 0, dtype, cpu).qkv
        assert torch.equal(*same)


def test_it_is_opened_like_any_weights_and_known_by_both_contents(base: Path, folder: Path) -> None:
    stored, changed = find_checkpoint(str(base)), find_checkpoint(str(folder))
    assert find_checkpoint(str(folder)) is changed  # with its tokenizer and what was made of its weights
    assert changed.name == "My-Change"
    assert str(folder) in changed.source
    assert changed.architecture == stored.architecture
    assert changed.tokenizer().decode([7]) == stored.tokenizer().decode([7])
    assert changed.stored_sha256 == stored.sha256
    assert len({stored.sha256, changed.sha256, stored.digest, changed.digest}) == 4
    assert not torch.equal(SegmentedModel.load(changed).layers[1].qkv, SegmentedModel.load(stored).layers[1].qkv)


def rewritten(folder: Path, tensors: dict[str, Any], **header: Any) -> None:
    content = save(tensors)
    (folder / TENSORS).write_bytes(content)
    told = json.loads((folder / HEADER).read_text()) | {"sha256": hashlib.sha256(content).hexdigest()} | header
    (folder / HEADER).write_text(json.dumps(told))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        find_checkpoint(str(folder))
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("1.qkv.up", torch.zeros(95, 3), "(95, 3)"),
        ("1.qkv.up", torch.zeros(96, 2), "one rank"),
        ("1.qkv.down", torch.full((3, 48), float("nan")), "finite"),
        ("7.qkv.down", torch.zeros(3, 48), "7.qkv.down"),
        ("0.attention_norm.down", torch.zeros(3, 48), "attention_norm"),
        ("0.mlp_in.down", torch.zeros(3, 48), "one rank"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_factors_that_do_not_fit_are_refused(folder: Path, name: str, value: Any, words: str) -> None:
    rewritten(folder, load_file(folder / TENSORS) | {name: value})
    assert words in refused(folder)


def test_damaged_files_and_other_weights_are_one_message(base: Path, folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    rewritten(folder, tensors, weights_sha256="0" * 64)
    assert "it was trained for these" in refused(folder)
    rewritten(folder, tensors, weights=str(base.parent / "gone"))
    assert "gone" in refused(folder)
    rewritten(folder, tensors, weights=str(folder))
    assert "stored whole" in refused(folder)
    rewritten(folder, tensors, weights=str(base), schema_version=2)
    assert "schema_version" in refused(folder)
    rewritten(folder, tensors, schema_version=1, surplus=1)
    assert "surplus" in refused(folder)
    (folder / TENSORS).write_bytes(b"damaged")
    (folder / HEADER).write_text("{}")
    assert "not the header" in refused(folder)
