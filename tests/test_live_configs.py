"""Every key of every family's config.json, changed: what transformers then computes is computed too, or refused.

The weights stay. A key that changes transformers' logits and is not read would leave ours as they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helios_sim.errors import UserError
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.model.decoder import SegmentedModel
from live_example import TOLERANCE, packed_logits, reference_logits, token_ids
from tiny_models import FAMILIES, tiny_config, tiny_model, write_tiny

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
# What older files say, and what other families know: transformers takes some of them from any config.
FURTHER: tuple[tuple[str, Any], ...] = tuple({
    "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0, "rope_local_base_freq": 500.0,
    "partial_rotary_factor": 0.5, "rope_parameters": LINEAR, "sliding_window": 4, "sliding_window_pattern": 2,
    "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 0.5, "attention_multiplier": 0.1,
    "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "final_logit_softcapping": 1.0,
    "attn_logit_softcapping": 1.0, "use_sliding_window": True, "clip_qkv": 0.1, "qk_layernorm": True,
    "quantization_config": {"quant_method": "fp8"}, "n_shared_head": 2, "is_causal": False,
    "per_layer_config": {"0": {"rms_norm_eps": 0.05, "layer_norm_epsilon": 0.05}},
}.items()) + tuple(("rope_parameters", {"rope_theta": 1e4, "factor": 4.0, **more}) for more in (
    {"rope_type": "yarn"}, {"rope_type": "dynamic"}, {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "yarn", "original_max_position_embeddings": 8, "truncate": False, "attention_factor": 2.0},
    {"rope_type": "longrope", "short_factor": [2.0] * 6, "long_factor": [4.0] * 6},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5}, {"rope_type": "linear", "rope_theta": 500.0},
))  # fmt: skip
# Of Python, not of what is computed; and the tied head, which follows from the tensors (test_live_checked.py).
LEFT_OUT = ("return_dict", "dtype", "model_type", "architectures", "transformers_version", "tie_word_embeddings")


def others(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2
    if isinstance(value, float):
        return value * 2 + 0.1
    return "gelu" if isinstance(value, str) else 0.5


def changes(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    values = tiny_config(family, 2).to_dict()
    for key, value in values.items():
        if key not in LEFT_OUT and not isinstance(value, dict | list):
            yield key, values | {key: others(value)}
    for key, value in FURTHER:
        yield key, values | {key: value}
        if key in ("rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
            yield f"{key} alone", {k: v for k, v in values.items() if k != "rope_parameters"} | {key: value}


def theirs(folder: Path, state: dict[str, Any], ids: torch.Tensor) -> torch.Tensor | None:
    """transformers' logits with these weights by the folder's config; None where it refuses them."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        missing, unexpected = model.load_state_dict(state, strict=False)
        if [name for name in missing if name != "lm_head.weight"] or unexpected:
            return None
        model.tie_weights()
        return reference_logits(model, ids)
    except Exception:
        return None


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_is_ignored_that_changes_the_logits(family: str, tmp_path: Path) -> None:
    reference, ids = tiny_model(family, 2), token_ids(batch=1, tokens=24)
    reference.save_pretrained(tmp_path)
    before, state = reference_logits(reference, ids), reference.state_dict()
    wrong, effective, refused = [], 0, 0
    for key, values in changes(family):
        (tmp_path / "config.json").write_text(json.dumps(values))
        want = theirs(tmp_path, state, ids)
        effective += want is not None and not torch.allclose(want, before, atol=TOLERANCE)
        try:
            got = packed_logits(SegmentedModel.load(find_checkpoint(str(tmp_path))), ids)
        except UserError:
            refused += 1
            continue
        if want is None or not torch.allclose(got, want, atol=TOLERANCE, rtol=0):
            wrong.append((key, values[key.removesuffix(" alone")], want is not None))
    assert wrong == []
    assert effective >= 3
    assert refused >= 3


@pytest.mark.parametrize(
    ("twice", "said"),
    [
        ({"rope_parameters": {"rope_type": "linear", "type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "type yarn"),
        ({"rope_theta": 500.0}, "rope_theta 500"), ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type linear"),
    ],
)  # fmt: skip
def test_a_rotation_that_is_said_twice_and_otherwise_is_refused(tmp_path: Path, twice: dict, said: str) -> None:
    folder = write_tiny("llama", tmp_path / "tiny")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": values["rope_parameters"]["rope_theta"]}))
    find_checkpoint(str(folder))
    (folder / "config.json").write_text(json.dumps(values | twice))
    with pytest.raises(UserError, match=f"{said}.*one rotation"):
        find_checkpoint(str(folder))


def test_keys_that_nothing_is_made_of_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny("llama", tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"torch_dtype": "bfloat16", "unsloth_version": "1", "bos_token_id": 1}))
    assert "not read" not in find_checkpoint(str(tmp_path)).source
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"}, "architectures": ["XForCausalLM"]}
    own |= {"scale_emb": 12, "share_layers": True, "unused": None, "use_gate": False}
    own |= {"rope_parameters": {**values["rope_parameters"], "warp": 2}}
    path.write_text(json.dumps(values | own))
    source = find_checkpoint(str(tmp_path)).source
    for said in ("scale_emb (12)", "share_layers (True)", "auto_map (", "architectures (['XForCausalLM'])",
                 "use_gate (False)", "unused (None)", "rope_parameters.warp (2)"):  # fmt: skip
        assert said in source
        assert said in caplog.text
