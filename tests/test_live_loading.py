"""Loading: layers above the cap are never read, peak memory is that of the cap, shards and prefixes are found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helios_sim.errors import UserError
from helios_sim.live import device
from helios_sim.live.checkpoint.hub_folder import SafetensorsFolder
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.model.decoder import SegmentedModel
from live_example import TOLERANCE, packed_logits, reference_logits, token_ids
from tiny_models import tiny_config, tiny_model, write_tiny

# Resets the process's high-water mark, loads a cap, raises it, and says how far memory rose above what was there.
_MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.checkpoint.source import find_checkpoint
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
checkpoint = find_checkpoint(sys.argv[1])
torch.ones(8, 8).to(torch.bfloat16).float()
Path("/proc/self/clear_refs").write_text("5")
base = peak()
model = SegmentedModel.load(checkpoint, layers=4)
loaded = peak() - base, model.weight_bytes
model.load_layers(8)
print(json.dumps([loaded, [peak() - base, model.weight_bytes]]))
"""
_SLACK_BYTES = 8 << 20  # of the allocator and of code that is touched for the first time


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_that_of_the_cap_and_one_tensor(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_key_value_heads": 4}
    model = transformers.LlamaForCausalLM(tiny_config("llama", layers=24, **sizes))
    model.bfloat16().save_pretrained(tmp_path)
    whole_bytes = 4 * sum(p.numel() for p in model.parameters())
    tensor_bytes = 4 * 256 * 1024  # the largest that is stored, as float32
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    for peak_bytes, resident_bytes in json.loads(done.stdout):
        assert resident_bytes <= peak_bytes + _SLACK_BYTES  # the instrument sees the weights at all
        assert peak_bytes < resident_bytes + tensor_bytes + _SLACK_BYTES
        assert peak_bytes < 0.65 * whole_bytes


def test_layers_above_the_cap_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def rows(self: SafetensorsFolder, name: str, start: int, stop: int, original=SafetensorsFolder.rows) -> Tensor:
        read.append(name)
        return original(self, name, start, stop)

    monkeypatch.setattr(SafetensorsFolder, "rows", rows)
    model = SegmentedModel.load(find_checkpoint(str(write_tiny("llama", tmp_path))), layers=3)
    layers = {int(name.split(".")[2]) for name in read if ".layers." in name}
    assert layers == {0, 1, 2}
    read.clear()
    model.load_layers(4)
    assert {name.split(".")[2] for name in read} == {"3"}


def test_shards_with_an_index(tmp_path: Path) -> None:
    reference, ids = tiny_model("llama"), token_ids(batch=1, tokens=20)
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = SegmentedModel.load(find_checkpoint(str(tmp_path)))
    torch.testing.assert_close(packed_logits(model, ids), reference_logits(reference, ids), atol=TOLERANCE, rtol=0)
    next(iter(tmp_path.glob("*-of-*.safetensors"))).unlink()
    with pytest.raises(UserError, match="is missing"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize(("family", "drop"), [("gpt2", "transformer."), ("opt", "model.")])
def test_names_of_older_checkpoints(family: str, drop: str, tmp_path: Path) -> None:
    """The hub's GPT-2 and OPT were written from the inner model, without the outer prefix."""
    from safetensors.torch import load_file, save_file

    path = write_tiny(family, tmp_path) / "model.safetensors"
    save_file({name.removeprefix(drop): tensor for name, tensor in load_file(path).items()}, path)
    ids = token_ids(batch=1, tokens=20)
    got = packed_logits(SegmentedModel.load(find_checkpoint(str(tmp_path))), ids)
    torch.testing.assert_close(got, reference_logits(tiny_model(family), ids), atol=TOLERANCE, rtol=0)


def test_the_text_part_of_a_model_that_also_sees(tmp_path: Path) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    path = write_tiny("gemma3", tmp_path) / "model.safetensors"
    renamed = {f"language_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(renamed | {"vision_tower.embeddings.weight": torch.zeros(2, 2)}, path)
    transformers.Gemma3Config(text_config=tiny_config("gemma3").to_dict()).save_pretrained(tmp_path)
    ids = token_ids(batch=1, tokens=20)
    got = packed_logits(SegmentedModel.load(find_checkpoint(str(tmp_path))), ids)
    torch.testing.assert_close(got, reference_logits(tiny_model("gemma3"), ids), atol=TOLERANCE, rtol=0)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(UserError, match=r"mlp\.gate_proj\.weight=\(96, 48\): \(80, 48\)"):
        SegmentedModel.load(find_checkpoint(str(tmp_path)))


@pytest.mark.parametrize("layers", [0, 7])
def test_a_cap_outside_the_model_is_refused(layers: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 to 6"):
        SegmentedModel.load(find_checkpoint(str(write_tiny("llama", tmp_path))), layers=layers)


def test_too_little_memory_is_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = find_checkpoint(str(write_tiny("llama", tmp_path)))
    room_for_two = checkpoint.architecture.weight_values(2) * 4
    monkeypatch.setattr(device, "available_bytes", lambda device: room_for_two)
    model = SegmentedModel.load(checkpoint, layers=2)
    monkeypatch.setattr(SafetensorsFolder, "rows", lambda *_: pytest.fail("something was read"))
    with pytest.raises(UserError, match=r"memory.*free on cpu.*bfloat16"):
        SegmentedModel.load(checkpoint, layers=3)
    monkeypatch.setattr(device, "available_bytes", lambda device: 0)
    with pytest.raises(UserError, match="1 more layers"):
        model.load_layers(3)


def test_free_memory_is_read_and_limited_by_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    monkeypatch.setattr(device, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert device.available_bytes(cpu) == 1000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("4000\n")
    assert device.available_bytes(cpu) == 1000 * 1024
    (tmp_path / "memory.max").write_text("10000\n")
    assert device.available_bytes(cpu) == 6000
    monkeypatch.setattr(device, "_MEMINFO", tmp_path / "none")
    (tmp_path / "memory.max").unlink()
    assert device.available_bytes(cpu) is None
