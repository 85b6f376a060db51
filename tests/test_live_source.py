"""What a user may write for `weights`, and the one message that each mistake gets."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from helios_sim.errors import UserError
from helios_sim.live.checkpoint import source
from helios_sim.live.checkpoint.known import KNOWN, KnownWeights
from helios_sim.live.checkpoint.source import find_checkpoint
from tiny_models import FAMILIES, TEXT, tiny_model, write_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny("llama", tmp_path / "My-Model", layers=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_any_family_has_its_tokenizer(family: str, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(write_tiny(family, tmp_path, layers=1)))
    assert checkpoint.architecture.family == family
    assert checkpoint.tokenizer().decode(checkpoint.tokenizer()(TEXT).input_ids) == TEXT


def test_a_folder_is_identified_by_name_and_digest(folder: Path) -> None:
    checkpoint = find_checkpoint(str(folder))
    assert checkpoint.name == "My-Model"
    assert checkpoint.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    want = tiny_model("llama", 1).lm_head.weight
    assert checkpoint.tensor("lm_head.weight").equal(want)


def test_a_checkpoint_is_kept_until_its_files_are_written_anew(folder: Path) -> None:
    first = find_checkpoint(str(folder))
    assert find_checkpoint(str(folder)) is first  # with its tokenizer and what was made of its weights
    changed = folder / "config.json"
    before = changed.stat()
    changed.write_text(changed.read_text() + "\n")
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert find_checkpoint(str(folder)) is not first


def test_a_hub_id_is_fetched_without_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = find_checkpoint("facebook/layerskip-llama3.2-1B")
    assert (checkpoint.name, checkpoint.architecture.family) == ("layerskip-llama3.2-1b", "llama")
    assert asked["repo_id"] == "facebook/layerskip-llama3.2-1B"
    assert not any("bin" in pattern for pattern in asked["patterns"])


def _error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # the hub's own errors want a response of the server
    Exception.__init__(error, "the hub's words")
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (_error(GatedRepoError), "gated.*accept its terms"),
        (_error(RepositoryNotFoundError), "a model on the hub, or a folder that exists"),
        (_error(LocalEntryNotFoundError), "check network and disk"),
        (OSError(28, "No space left on device"), "No space left on device.*disk"),
    ],
)
def test_a_model_that_cannot_be_fetched(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=says):
        find_checkpoint("meta-llama/Llama-3.2-1B")


@pytest.mark.parametrize("weights", ["smollm9", "./no/such/folder", "no-such.gguf", "folder/no-such.gguf"])
def test_an_unknown_name_lists_what_is_known(weights: str) -> None:
    with pytest.raises(UserError, match=r"smollm2-135m.*folder.*gguf.*hub id"):
        find_checkpoint(weights)


def test_known_weights_come_from_the_cache_and_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"smollm2-135m.*python -m calibrate\.models"):
        find_checkpoint("smollm2-135m", tmp_path)
    with pytest.raises(UserError, match=r"huggingface\.co/Qwen"):
        find_checkpoint("qwen2.5-coder-0.5b", tmp_path)
    (tmp_path / KNOWN["smollm2-135m"].file).write_bytes(b"something else")
    with pytest.raises(UserError, match="sha256"):
        find_checkpoint("smollm2-135m", tmp_path)
    content = b"GGUF but no more"
    tiny = KnownWeights("tiny.gguf", hashlib.sha256(content).hexdigest(), "none", "nowhere")
    (tmp_path / "tiny.gguf").write_bytes(content)
    monkeypatch.setitem(source.KNOWN, "tiny", tiny)
    with pytest.raises(UserError, match="a whole GGUF file"):  # past the checksum, to the file itself
        find_checkpoint("tiny", tmp_path)


def test_folders_that_are_no_checkpoint(folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    with pytest.raises(UserError, match="folder that holds this file"):
        find_checkpoint(str(weights))
    content = weights.read_bytes()
    for damaged in (content[:-10], content[:50], b""):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="a whole file"):
            find_checkpoint(str(folder))
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only \.bin files.*save_pretrained"):
        find_checkpoint(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"with model\.safetensors"):
        find_checkpoint(str(folder))
    config.write_text("{")
    with pytest.raises(UserError, match="a JSON object"):
        find_checkpoint(str(folder))
    config.write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match=r"family llama, opt, gpt2, qwen2, gemma3; this one is 'mamba'"):
        find_checkpoint(str(folder))
    config.unlink()
    with pytest.raises(UserError, match=r"a folder with config\.json"):
        find_checkpoint(str(folder))


def test_a_folder_without_tokenizer_says_so(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="with a tokenizer"):
        find_checkpoint(str(folder)).tokenizer()
