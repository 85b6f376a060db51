"""Steps of `calibrate.train_exits` around the training itself (`calibrate.exits.trunk`): texts, the change of the trunk
as it is served, heads, and choices at each exit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrate.exits.adapters import AdapterConfig, fit_heads
from calibrate.exits.hidden import Passage, batches, collect, states as states_of, tokenized_passages
from calibrate.exits.texts import Split
from calibrate.exits.traces import PASSAGE_CHARS
from calibrate.exits.training import Recipe, Say, Tensors, choices
from calibrate.exits.trunk import TrainedTrunk, TrunkPlan
from helios_sim.errors import UserError
from helios_sim.live.model.delta import write_delta

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.checkpoint.source import Checkpoint
    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.heads import ExitHeads

FOR_CHECKS = 8  # every 8th passage is set apart for checks


def trunk_texts(
    tokenizer: Any, chars: int, text_tokens: int, shares: Mapping[str, int]
) -> tuple[Tensor, list[Passage]]:
    """Texts (n, text_tokens) for the trunk, from about `chars` characters, and passages set apart for checks.

    Raises UserError if the tasks have no text of that length.
    """
    import torch

    wanted = {task: round(chars * share / 1000) for task, share in shares.items()}
    found = tokenized_passages(tokenizer, wanted, Split.TRAIN, PASSAGE_CHARS)
    apart = found[::FOR_CHECKS]
    pieces = [
        passage.tokens[first : first + text_tokens]
        for number, passage in enumerate(found)
        if number % FOR_CHECKS
        for first in range(0, len(passage.tokens) - text_tokens + 1, text_tokens)
    ]
    if not pieces:
        allowed = "passages of the texts are shorter; at least one must be as long"
        raise UserError("train_exits.text_tokens", text_tokens, allowed, "set it lower, or name other tasks")
    return torch.from_numpy(np.stack(pieces)), apart


@dataclass(frozen=True, slots=True)
class TrainedPlan:
    """What to train, and on which texts."""

    model: str
    trunk: TrunkPlan
    train_chars: int
    text_tokens: int
    check_chars: int  # characters of the training split for the checks; the trunk is not trained on them
    calibration_chars: int
    check_width: int
    shares: Mapping[str, int]
    command: str


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Texts of the training split for the trunk, and passages for checks and their calibration."""

    trunk: Tensor  # (n, T) token ids
    checks: list[Passage]


def read_texts(tokenizer: Any, plan: TrainedPlan) -> Texts:
    """Read the texts of the plan. Raises UserError if the tasks have no text of `plan.text_tokens` tokens."""
    trunk, apart = trunk_texts(tokenizer, plan.train_chars, plan.text_tokens, plan.shares)
    share = min(1.0, plan.check_chars / max(1, sum(int(p.chars.sum()) for p in apart)))
    number = max(1, round(share * len(apart)))
    chosen = [apart[i] for i in np.linspace(0, len(apart) - 1, number).round().astype(int)]  # of all tasks
    wanted = {task: round(plan.calibration_chars * s / 1000) for task, s in plan.shares.items()}
    return Texts(trunk, chosen + tokenized_passages(tokenizer, wanted, Split.CALIBRATION, PASSAGE_CHARS))


def write_change(checkpoint: Checkpoint, weights: str, found: TrainedTrunk, plan: TrainedPlan, folder: Path) -> None:
    """Write the trunk's change as a folder that can be used as `model.weights`."""
    path = Path(weights).expanduser()
    header = {
        "weights": str(path.resolve()) if path.exists() else weights,
        "weights_sha256": checkpoint.stored_sha256,
        "training": {
            "command": plan.command,
            "data": "calibrate.exits.texts: " + ", ".join(plan.shares),
            "licence": "the change: the project's; texts: see calibrate.exits.texts; weights: the model's own",
            "plan": asdict(plan.trunk),
            "tokens": found.progress.tokens,
            "steps": found.progress.step,
            "learning_rate_falls_from_step": found.progress.falls_from,
            "wall_s": round(found.progress.spent_s),
            "short": found.short or None,
            "divergence": found.progress.history,
        },
    }
    write_delta(folder, header, {place: (of.down, of.up) for place, of in found.factors.items()})


def checked_heads(
    model: SegmentedModel,
    start: int,
    adapters: Mapping[int, Tensors],
    texts: Texts,
    plan: TrainedPlan,
    folder: Path,
    scratch: Path,
    say: Say,
) -> ExitHeads:
    """Heads at all exits of already trained adapters, with trained and calibrated checks."""
    exits = plan.trunk.exits
    recipe = Recipe(plan.trunk.width, check_width=plan.check_width, adapter_share=0.5, seed=plan.trunk.seed)
    config = AdapterConfig(
        plan.model, exits, round(plan.check_chars), plan.calibration_chars, shares=plan.shares, recipe=recipe,
        least_exits=len(exits), most_exits=len(exits), command=plan.command,
    )  # fmt: skip
    states = collect(model, start, texts.checks, (*exits, model.architecture.n_layers), scratch, recipe.seed, say)
    return fit_heads(model, states, config, folder, scratch, say, adapters)


def choices_at(
    model: SegmentedModel, heads: ExitHeads | None, start: int, chosen: Sequence[Passage]
) -> NDArray[np.int64]:
    """First choices (N, E) at every exit of the heads and at full depth, passage by passage; without heads, (N, 1)."""
    import torch

    depths = (*(heads.exits if heads else ()), model.architecture.n_layers)
    found: dict[int, NDArray[np.int64]] = {}
    for group in batches(chosen):
        with torch.inference_mode():
            hidden = states_of(model, start, [chosen[i].tokens for i in group], depths)
        tensors = [*(dict(of) or None for of in (heads.tensors if heads else ())), None]
        columns = [choices(model, t, h)[0].cpu().numpy() for t, h in zip(tensors, hidden, strict=True)]
        ends = np.cumsum([len(chosen[i].tokens) for i in group])[:-1]
        for i, rows in zip(group, np.split(np.column_stack(columns), ends), strict=True):
            found[i] = rows
    return np.concatenate([found[i] for i in range(len(chosen))])
