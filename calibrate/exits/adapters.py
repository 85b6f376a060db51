"""Trains exit heads for a frozen model, calibrates them, chooses exits and writes the folder of heads.

Steps: hidden states of training and calibration texts at all candidate depths (kept in files, so that an interrupted
run can be resumed); adapters; checks, trained on whether an adapter's token equals full depth's; then, on the
calibration texts, a temperature and a calibration of the check for each exit. Finally the exits are chosen: starting
from all candidates, exits are dropped one by one while the mean net saving of the three domains rises or the files are
too large; each time, the exit that costs the least saving is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrate.exits import training
from calibrate.exits.hidden import HiddenStates, Passage, collect, kept_tensors, start_token, tokenized_passages
from calibrate.exits.reliability import (
    at_agreement,
    expected_calibration_error,
    fit_logistic,
    fit_temperature,
    risk_scale,
)  # fmt: skip
from calibrate.exits.texts import PROSE_TASKS, TASKS, Split, domain_of
from calibrate.exits.training import Recipe, Say, Tensors
from helios_sim import files
from helios_sim.live.model.heads import ExitHeads, write_heads

if TYPE_CHECKING:
    from helios_sim.live.model.decoder import SegmentedModel

DOMAINS = ("prose", "code", "dialogue")
SHARES = {  # share of each task's characters, in thousandths
    **dict.fromkeys(PROSE_TASKS, 41),
    "code": 268,
    "humaneval": 67,
    "dialogue": 54,
    "qa": 93,
    "issues": 67,
}
MAX_BYTES = 9_900_000
_TEMPERATURE_TOKENS, _DOMAIN_TOKENS = 800, 6_000
AGREEMENT = 0.95  # the agreement at which exits are chosen
CHECK_LAYERS = 0.05  # least cost of a check, in layers


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What to train, on how much text, for how long."""

    model: str
    candidates: tuple[int, ...]  # depths in layers, ascending, below the model's last
    train_chars: int = 860_000
    calibration_chars: int = 240_000
    passage_chars: int = 1_500
    shares: Mapping[str, int] = field(default_factory=lambda: SHARES)
    recipe: Recipe = field(default_factory=Recipe)
    budget_s: float | None = None  # seconds for training the adapters; None: the recipe's epochs
    max_bytes: int = MAX_BYTES
    least_exits: int = 2  # so that there is a choice of depth
    most_exits: int = 4
    command: str = "python -m calibrate +task=adapters"


def training_passages(tokenizer: Any, config: AdapterConfig) -> list[Passage]:
    """The passages of the training and the calibration split."""
    found: list[Passage] = []
    for split, chars in ((Split.TRAIN, config.train_chars), (Split.CALIBRATION, config.calibration_chars)):
        wanted = {task: round(chars * share / 1000) for task, share in config.shares.items()}
        found += tokenized_passages(tokenizer, wanted, split, config.passage_chars)
    return found


def train_heads(
    model: SegmentedModel, tokenizer: Any, config: AdapterConfig, folder: Path, scratch: Path, say: Say = print
) -> ExitHeads:
    """Train heads for the model and write them to `folder`. `scratch` keeps hidden states for a resumed run."""
    depths = (*config.candidates, model.architecture.n_layers)
    passages = training_passages(tokenizer, config)
    say(f"hidden states of {sum(len(p.tokens) for p in passages):,} tokens at {len(depths)} depths")
    start = start_token(tokenizer, model.architecture.vocab_size)
    states = collect(model, start, passages, depths, scratch, config.recipe.seed, say)
    return fit_heads(model, states, config, folder, scratch, say)


def fit_heads(
    model: SegmentedModel,
    states: HiddenStates,
    config: AdapterConfig,
    folder: Path,
    scratch: Path,
    say: Say = print,
    trained: Mapping[int, Tensors] | None = None,
) -> ExitHeads:
    """Run the steps after the hidden states. Writes heads to `folder` and returns them as loaded from there.

    `trained`: adapters by depth that are already trained; they replace new ones.
    """
    from safetensors.torch import save

    architecture, recipe = model.architecture, config.recipe
    rows = states.rows(Split.TRAIN)
    rows, fresh = np.split(rows, [max(1, round(recipe.adapter_share * len(rows)))])
    kept = scratch / "adapters.safetensors"
    last = states.at(architecture.n_layers, rows)
    teacher = training.teach(model, last, recipe.considered)
    if trained is not None:
        adapters = {d: dict(trained[d]) for d in config.candidates}
    elif (found := kept_tensors(kept)) is not None:
        stored = {name: tensor.to(model.device) for name, tensor in found.items()}
        adapters = {
            d: {k.partition(".")[2]: v for k, v in stored.items() if k.startswith(f"{d}.")} for d in config.candidates
        }
    else:
        sample = np.random.default_rng(recipe.seed).permutation(len(rows))[:30_000]
        adapters = {
            d: training.first_adapter(states.at(d, rows[sample]), last[sample], recipe.width, recipe.seed)
            for d in config.candidates
        }
        began, budget_s = time.monotonic(), config.budget_s

        def spent() -> float:
            return 0.0 if budget_s is None else (time.monotonic() - began) / budget_s

        training.train_adapters(
            model, teacher, lambda d, chosen: states.at(d, rows[chosen.numpy()]), adapters, recipe, spent, say
        )
        files.write_bytes(kept, save({f"{d}.{k}": v.contiguous() for d, of in adapters.items() for k, v in of.items()}))
    tensors = _with_checks(model, states, rows, fresh, teacher, adapters, recipe, say)
    temperature, report, tensors = _calibrated(model, states, tensors, config, say)
    exits, curve = _chosen(states, tensors, report, config, architecture, say)
    header = {
        "model": config.model,
        "architecture": {name: getattr(architecture, name) for name in ("family", "n_layers", "d_model", "vocab_size")},
        "exits": exits,
        "risk_scale": risk_scale(exits, architecture.n_layers).tolist(),
        "temperature": [*(temperature[d] for d in exits), 1.0],
        "training": {
            "command": config.command,
            "data": "calibrate.exits.texts: " + ", ".join(TASKS),
            "licence": "heads: the project's; texts: see calibrate.exits.texts; weights: the model's own",
            "train_tokens": len(rows),
            "check_tokens": len(fresh),
            "calibration_tokens": len(calibration_rows(states)),
            "recipe": asdict(recipe),
            "dtype": str(model.dtype).removeprefix("torch."),
            "candidates": config.candidates,
        },
        "calibration": {str(d): report[d]["ece"] for d in exits},
        "curves": curve,
    }
    write_heads(folder, header, {d: tensors[d] for d in exits})
    return ExitHeads.load(folder, architecture, model.device)


def calibration_rows(states: HiddenStates) -> NDArray[np.int64]:
    """Rows of the calibration split, at most `_DOMAIN_TOKENS` per domain."""
    rows = states.rows(Split.CALIBRATION)
    domain = np.array([DOMAINS.index(domain_of(task)) for task in TASKS])[states.task[rows]]
    drawn = np.random.default_rng(1)
    return np.sort(np.concatenate([drawn.permutation(rows[domain == d])[:_DOMAIN_TOKENS] for d in range(len(DOMAINS))]))


def _with_checks(
    model: SegmentedModel,
    states: HiddenStates,
    rows: NDArray[np.int64],
    fresh: NDArray[np.int64],
    teacher: training.Teacher,
    adapters: Mapping[int, Tensors],
    recipe: Recipe,
    say: Say,
) -> dict[int, Tensors]:
    """Adapters with trained checks.

    A check learns from the adapters' training tokens, on which adapters agree too often, from `fresh` tokens, and from
    the unused rest of the calibration split. Choices are restricted to tokens that full depth ever chooses.
    """
    import torch

    words = torch.unique(teacher.top[:, 0])
    leftover = np.setdiff1d(states.rows(Split.CALIBRATION), calibration_rows(states))
    unseen = np.concatenate((fresh, leftover))
    groups = [(rows, teacher.top[:, 0])]
    if len(unseen):
        groups.append((unseen, training.choices(model, None, states.at(model.architecture.n_layers, unseen), words)[0]))
    found = {}
    for depth, adapter in adapters.items():
        targets = []
        for chosen, first in groups:
            choice, sure = training.choices(model, adapter, states.at(depth, chosen), words)
            agree = choice == first
            targets.append(training.softened(sure, agree, recipe.check_soft))
        hidden = states.at(depth, np.concatenate([chosen for chosen, _ in groups]))
        check = training.train_check(hidden, torch.cat(targets), adapter["scale"], recipe)
        found[depth] = {**adapter, **check}
        say(f"layer {depth}: {float(agree.float().mean()):.3f} of the last tokens agree")
    return found


def _calibrated(
    model: SegmentedModel, states: HiddenStates, tensors: dict[int, Tensors], config: AdapterConfig, say: Say
) -> tuple[dict[int, float], dict[int, dict[str, Any]], dict[int, Tensors]]:
    """Temperatures, statistics on the calibration split, and tensors with calibrated checks."""
    import torch

    rows = calibration_rows(states)
    truth, _ = training.choices(model, None, states.at(model.architecture.n_layers, rows))
    temperature: dict[int, float] = {}
    report: dict[int, dict[str, Any]] = {}
    calibrated: dict[int, Tensors] = {}
    for depth, of in tensors.items():
        hidden = states.at(depth, rows)
        agree = (training.choices(model, of, hidden)[0] == truth).cpu().numpy()
        sample = np.random.default_rng(0).permutation(len(rows))[:_TEMPERATURE_TOKENS]
        logits = training.exit_logits(model, of, hidden[torch.from_numpy(sample)])
        temperature[depth] = fit_temperature(partial(training.confidences, logits), agree[sample])
        logit = training.check_logits(of, hidden)
        slope, offset = fit_logistic(logit, agree)
        calibrated[depth] = training.fold(of, slope, offset)
        check = 1 / (1 + np.exp(-(slope * logit + offset)))
        ece = {
            "temperature": temperature[depth],
            "probability_before": expected_calibration_error(training.confidences(logits, 1.0), agree[sample]),
            "probability_after": expected_calibration_error(
                training.confidences(logits, temperature[depth]), agree[sample]
            ),
            "check_before": expected_calibration_error(1 / (1 + np.exp(-logit)), agree),
            "check_after": expected_calibration_error(check, agree),
            "agreement": float(agree.mean()),
        }
        report[depth] = {"agree": agree, "check": check, "ece": ece}
        say(f"layer {depth}: " + ", ".join(f"{name} {value:.3f}" for name, value in ece.items()))
    return temperature, report, calibrated


def _chosen(
    states: HiddenStates,
    tensors: Mapping[int, Tensors],
    report: Mapping[int, Mapping[str, Any]],
    config: AdapterConfig,
    architecture: Any,
    say: Say,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The chosen exits and, by domain, what they save at `AGREEMENT` on the calibration split."""
    rows = calibration_rows(states)
    domain = np.array([DOMAINS.index(domain_of(task)) for task in TASKS])[states.task[rows]]
    layer_values = sum(int(np.prod(shape)) for shape in architecture.layer_shapes().values())

    def layers(names: tuple[str, ...]) -> float:
        return sum(t.numel() for name, t in next(iter(tensors.values())).items() if name in names) / layer_values

    check = max(CHECK_LAYERS, layers(("check_in", "check_bias", "check_out")))
    leave = layers(("linear", "gate", "up", "down"))

    def saved(exits: tuple[int, ...]) -> dict[str, Any]:
        found = {}
        for d, name in enumerate(DOMAINS):
            mine = domain == d
            if mine.any():
                columns = [np.column_stack([report[e][k][mine] for e in exits]) for k in ("check", "agree")]
                worth = 1 - (1 - columns[0]) * risk_scale(exits, architecture.n_layers)
                sure = np.column_stack((worth, np.ones(mine.sum())))
                agree = np.column_stack((columns[1], np.ones(mine.sum(), dtype=bool)))
                point = at_agreement(sure, agree, (*exits, architecture.n_layers), AGREEMENT, check, leave)
                found[name] = point.to_json()
        return found

    def worth(exits: tuple[int, ...]) -> float:
        return float(np.mean([point["saved_net"] for point in saved(exits).values()]))

    exit_bytes = 2 * sum(t.numel() for t in next(iter(tensors.values())).values())
    exits, best = config.candidates, worth(config.candidates)
    while len(exits) > config.least_exits:
        fewer = {tuple(e for e in exits if e != dropped): dropped for dropped in exits}
        value, choice = max((worth(f), f) for f in fewer)
        if value < best and len(exits) <= config.most_exits and len(exits) * exit_bytes <= config.max_bytes:
            break
        say(f"without the exit at {fewer[choice]}: {value:.3f} layers saved per token, net (with it {best:.3f})")
        exits, best = choice, value
    return exits, {
        "split": "calibration",
        "agreement": AGREEMENT,
        "check_layers": check,
        "leave_layers": leave,
        **saved(exits),
    }
