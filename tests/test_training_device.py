"""Training of heads runs where the model is: every tensor that it makes names its device.

No card is needed to see it: with another default device, a tensor made without one meets those of the model and fails.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from calibrate.exits import training
from calibrate.exits.training import Recipe
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.model.decoder import SegmentedModel


def test_no_tensor_of_the_training_lies_on_a_default_device(monkeypatch) -> None:
    for name in ("randn", "randint", "randperm"):  # draws by a generator of the CPU, then moved
        drawn = getattr(torch, name)

        def on_cpu(*shape: Any, drawn: Any = drawn, **settings: Any) -> Any:
            return drawn(*shape, **{"device": "cpu", **settings})

        monkeypatch.setattr(torch, name, on_cpu)
    model = SegmentedModel.load(find_checkpoint("tiny:llama-2-7b"))
    generator = torch.Generator().manual_seed(0)
    hidden = {depth: torch.randn(200, 32, generator=generator) for depth in (1, 2, 4)}
    recipe = Recipe(width=8, check_width=8, vocabulary=64, batch=32)
    with torch.device("meta"):
        teacher = training.teach(model, hidden[4], recipe.considered)
        adapters = {depth: training.first_adapter(hidden[depth], hidden[4], 8, 0) for depth in (1, 2)}
        training.train_adapters(
            model, teacher, lambda depth, rows: hidden[depth][rows], adapters, recipe, lambda: 0.0, lambda text: None
        )
        words = torch.unique(teacher.top[:, 0])
        choice, sure = training.choices(model, adapters[1], hidden[1], words)
        agree = choice == training.choices(model, None, hidden[4], words)[0]
        check = training.train_check(hidden[1], training.softened(sure, agree, 0.5), adapters[1]["scale"], recipe)
        logits = training.exit_logits(model, adapters[1], hidden[1])
        assert training.confidences(logits, 1.0).shape == (200,)
        assert training.check_logits({**adapters[1], **check}, hidden[1]).shape == (200,)
    assert {tensor.device.type for tensor in {**adapters[1], **check}.values()} == {"cpu"}
