"""Mutants of what a user says of a model and a card: a config.json, and a card's YAML."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from faults import Mutant, changed_bytes, changed_json, main

CONFIGS = (
    {
        "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "head_dim": 32,
        "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "attention_bias": False,
    },
    {
        "model_type": "gemma3", "text_config": {
            "model_type": "gemma3_text", "num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 512, "vocab_size": 1000,
            "max_position_embeddings": 4096, "sliding_window": 64, "sliding_window_pattern": 6,
        },
    },
    {"model_type": "gpt2", "n_embd": 256, "n_layer": 3, "n_head": 8, "vocab_size": 1000, "n_positions": 128},
    {
        "model_type": "falcon", "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8,
        "vocab_size": 1000, "multi_query": True, "new_decoder_architecture": False,
    },
)  # fmt: skip
CARD = {
    "name": "mine", "hbm_gib": 24, "hbm_gb_per_s": 700, "tflops": 120.5, "tdp_w": 250, "idle_w": 20,
    "load_gb_per_s": 25, "link_gb_per_s": 32, "link_us": 10, "source": "its data sheet",
}  # fmt: skip


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield Mutant("unchanged", lambda folder: _written(folder, json.dumps(CONFIGS[0]).encode(), _yaml(CARD)))
    while True:
        config, card = json.dumps(rng.choice(CONFIGS)).encode(), _yaml(CARD)
        kind = rng.choice(("config", "config", "config", "config bytes", "card", "card", "card bytes"))
        if kind == "config":
            what, changed = changed_json(json.loads(config), rng)
            config = json.dumps(changed).encode()
        elif kind == "config bytes":
            what, config = changed_bytes(config, rng)
        elif kind == "card":
            what, changed = changed_json(CARD, rng)
            card = _yaml(changed)
        else:
            what, card = changed_bytes(card, rng)
        yield Mutant(f"{kind}: {what}", lambda folder, config=config, card=card: _written(folder, config, card))


def read(path: Path) -> None:
    """Make the profile of the model on two of the cards, and compare its prices with their floors."""
    from helios_sim.profile.__main__ import checked
    from helios_sim.profile.resolve import find_profile

    assert checked(find_profile(str(path), f"2x{path / 'card.yaml'}")) == 0


def _yaml(values: object) -> bytes:
    return yaml.safe_dump(values).encode()


def _written(folder: Path, config: bytes, card: bytes) -> Path:
    (folder / "config.json").write_bytes(config)
    (folder / "card.yaml").write_bytes(card)
    return folder


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
