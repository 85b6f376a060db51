"""Exit traces not recorded from a model: traces without exits, traces of stated shares, and random data for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.rule import MEASURES, Confidence
from helios_sim.exits.trace import ANY_DRAFTER, ANY_TASK, BoundTrace, ExitTrace, TokenSpan
from helios_sim.provenance import Provenance, ProvenanceClass
from helios_sim.request import token_counts

STATED = "exits.source=stated"  # the command in the provenance of such a trace
_STATE = (
    "state exits as +exits.parameters.layers=[16] +exits.parameters.unchanged=[0.9], the drafts of another model as "
    "+exits.parameters.drafted=0.7"
)
_TOKENS = 1000  # enough that the mean of whole characters per token is right to 0.1 %


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class NoExits(ExitTrace):
    """A trace in which all tokens of a task are alike, so that answers can be counted in whole tokens."""

    chars_per_token: float

    def bind(self, task_names: Sequence[str]) -> BoundTrace:
        return _BoundNoExits(self, ExitTrace.bind(self, task_names).task_index)


@dataclass(frozen=True, slots=True, eq=False)
class _BoundNoExits(BoundTrace):
    """A `NoExits` trace, bound to a workload: answers get exact token counts."""

    def locate(self, task: int, text_start: int, output_chars: int) -> TokenSpan:
        """The span of an answer: as many tokens as the model's tokenizer makes of the text, wherever it starts.

        Counting the tokens that begin within the text would give one more or one less, depending on its start. This
        way a workload in the model's own tokens gets its token counts back.
        """
        trace = self.trace
        assert isinstance(trace, NoExits)
        tokens = max(1, round(output_chars / trace.chars_per_token))
        first, end = trace.task_first[self.task_index[task] :][:2].tolist()
        return TokenSpan(first, text_start % (end - first), end - first, tokens)

    def locate_many(
        self, task: NDArray[np.int64], text_start: NDArray[np.int64], output_chars: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        trace = self.trace
        assert isinstance(trace, NoExits)
        own = np.array(self.task_index)[task]
        first, tokens = trace.task_first[own], token_counts(output_chars, trace.chars_per_token)
        length = trace.task_first[own + 1] - first
        return np.stack(np.broadcast_arrays(first, text_start % length, length, tokens), axis=1)


class TokenisedModel(Protocol):
    """The part of a `ModelSpec` that a trace without exits needs."""

    @property
    def name(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def chars_per_token(self) -> float: ...


def no_exits(model: TokenisedModel) -> NoExits:
    """The trace of a model with its last layer as the only exit. It serves full depth and gives lengths of tokens."""
    ends = np.floor(np.arange(_TOKENS + 1) * model.chars_per_token + 1e-9).astype(np.int64)
    return NoExits(
        chars_per_token=model.chars_per_token,
        model=model.name,
        exits=(model.n_layers,),
        tasks=(ANY_TASK,),
        task=np.zeros(_TOKENS, np.int32),
        prompt=np.zeros(_TOKENS, np.int32),
        chars=np.diff(ends).astype(np.int32),
        agree=np.ones((_TOKENS, 1), bool),
        provenance=Provenance(ProvenanceClass.DERIVED, "no exits: every token runs all layers", "no_exits"),
        confidences={Confidence.MAX_PROBABILITY: np.ones((_TOKENS, 1), np.float32)},
    )


def stated_exits(
    model: TokenisedModel, layers: Sequence[int], unchanged: Sequence[float], confident: Sequence[float] | None = None,
    seed: int = 0, drafted: float | Mapping[str, float | Mapping[str, float]] | None = None,
) -> NoExits:  # fmt: skip
    """Makes the trace of a model for which only shares of tokens are stated.

    - `layers`: depths of the exits before the last layer, ascending.
    - `unchanged`: for each exit the share of tokens that it predicts as the last layer does.
    - `confident`: for each exit the share of tokens that are confident there, all of them unchanged. If it is None, no
      token is confident before the last layer, and the exits only serve fixed caps.
    - `drafted`: the share of tokens that another model predicts as this one does. It is one share for any drafter, or a
      share by name of drafter, or by drafter and task. With it, exits may be left out.

    A token that is unchanged (or confident) at an exit is so at all deeper ones. UserError if the values contradict
    each other.
    """
    tasks, by_drafter = _drafted(drafted)
    lists: dict[str, object] = {"layers": layers, "unchanged": unchanged}
    for key, values in lists.items():
        if not isinstance(values, list | tuple):
            raise UserError(f"exits.parameters.{key}", values, "a list, with a value for each exit", _STATE)
    _check_given(layers, unchanged, confident, drafted)
    depths = [int(n) if isinstance(n, int) and not isinstance(n, bool) else 0 for n in layers]
    if any(not low < n < model.n_layers for low, n in zip((0, *depths), depths, strict=False)):
        allowed = f"whole numbers from 1 to {model.n_layers - 1}, ascending: layers of {model.name} before its last"
        raise UserError("exits.parameters.layers", list(layers), allowed, "correct them")
    _check_shares("unchanged", unchanged, depths)
    if confident is not None:
        _check_shares("confident", confident, depths)
        if any(sure > same for sure, same in zip(confident, unchanged, strict=True)):
            allowed = f"none above the share that is unchanged there, {list(unchanged)}"
            raise UserError("exits.parameters.confident", list(confident), allowed, "correct them")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError("exits.parameters.seed", seed, "a whole number from 0", "correct it")
    rank = (np.random.default_rng(seed).permutation(_TOKENS) + 0.5) / _TOKENS
    said = ", ".join(f"{share:g} at layer {n}" for n, share in zip(depths, unchanged, strict=True))
    if confident is not None:
        sure_at = (f"{share:g} at layer {n}" for n, share in zip(depths, confident, strict=True))
        said += f"; confident {', '.join(sure_at)}"
    drafters = {}
    for number, (name, shares) in enumerate(by_drafter.items(), 1):
        at = (f"{share:g}" + ("" if task == ANY_TASK else f" of {task}") for task, share in shares.items())
        by = "another model" if name == ANY_DRAFTER else name
        said = ", ".join(filter(None, (said, f"{', '.join(at)} drafted by {by}")))
        places = np.random.default_rng((seed, number)).permutation(_TOKENS) + 0.5
        drafters[name] = np.concatenate([places < share * _TOKENS for share in shares.values()])
    rank = np.tile(rank, len(tasks))
    sure = rank[:, None] < np.array([*(confident or [0.0] * len(depths)), 1.0])
    none = no_exits(model)
    return replace(
        none,
        exits=(*depths, model.n_layers),
        tasks=tasks,
        task=np.repeat(np.arange(len(tasks), dtype=np.int32), _TOKENS),
        prompt=np.repeat(np.arange(len(tasks), dtype=np.int32), _TOKENS),
        chars=np.tile(none.chars, len(tasks)),
        agree=rank[:, None] < np.array([*unchanged, 1.0]),
        provenance=Provenance(ProvenanceClass.PUBLISHED, f"stated: tokens unchanged {said}", STATED),
        confidences={Confidence.MAX_PROBABILITY: sure.astype(np.float32)},
        drafters=drafters,
    )


def _drafted(stated: object) -> tuple[tuple[str, ...], dict[str, dict[str, float]]]:
    """Parses `drafted` into the tasks it tells apart, and shares by drafter and task. UserError for another form."""
    if stated is None:
        return (ANY_TASK,), {}
    of = dict(stated) if isinstance(stated, Mapping) else {ANY_DRAFTER: stated}
    tasks = next((tuple(map(str, shares)) for shares in of.values() if isinstance(shares, Mapping)), (ANY_TASK,))
    found: dict[str, dict[str, float]] = {}
    for name, shares in of.items():
        each: dict[str, Any] = dict(shares) if isinstance(shares, Mapping) else dict.fromkeys(tasks, shares)
        shown = all(isinstance(s, int | float) and not isinstance(s, bool) and 0 <= s <= 1 for s in each.values())
        if not shown or set(each) != set(tasks) or not tasks:
            allowed = "null, a share from 0 to 1, one for each drafter by its name, or one for each of its tasks"
            fix = "write 0.7, {coder: 0.7} or {coder: {code: 0.8, prose: 0.6}}, with the same tasks for each drafter"
            raise UserError("exits.parameters.drafted", stated, allowed, fix)
        found[str(name)] = {task: float(each[task]) for task in tasks}
    return tasks, found


def _check_given(layers: Sequence[int], unchanged: Sequence[float], confident: object, drafted: object) -> None:
    """Raises UserError, which names all that is missing, unless exits, drafts of another model, or both are stated."""
    needed = ("layers", layers), ("unchanged", unchanged)
    missing = [key for key, values in needed if not values]
    if not missing or (len(missing) == 2 and drafted is not None and confident is None):
        return
    given = [key for key, values in (*needed, ("confident", confident), ("drafted", drafted)) if values]
    allowed = (
        f"{' and '.join(missing)} missing: exits.source=stated takes layers with the share of tokens that each leaves "
        "unchanged, or the share that another model drafts, or both"
    )
    key = "exits.parameters" if len(missing) > 1 else f"exits.parameters.{missing[0]}"
    raise UserError(key, given if len(missing) > 1 else [], allowed, _STATE)


def _check_shares(key: str, shares: Any, depths: Sequence[int]) -> None:
    """Raises UserError unless there is one share for each depth, from 0 to 1 and none below the one before."""
    fits = isinstance(shares, list | tuple) and len(shares) == len(depths) and not any(
        isinstance(share, bool) or not isinstance(share, int | float) or not low <= share <= 1
        for low, share in zip((0.0, *shares), shares, strict=False)
    )  # fmt: skip
    if not fits:
        allowed = f"{len(depths)} shares from 0 to 1, one for each of layers {list(depths)}, none below the one before"
        value = list(shares) if isinstance(shares, list | tuple) else shares
        raise UserError(f"exits.parameters.{key}", value, allowed, "correct them")


def synthetic_trace(
    model: str = "synthetic",
    exits: Sequence[int] = (4, 8, 12),
    tasks: Sequence[str] = (ANY_TASK,),
    tokens: int = 2_000,
    seed: int = 0,
    *,
    chars_per_token: int = 4,
    uneven: bool = False,
    nested: bool = True,
    prompt_tokens: int = 50,
    human_text: bool = True,
) -> ExitTrace:
    """Draws a random trace with every column: `tokens` per task, each of `chars_per_token` characters unless `uneven`.

    The probabilities and states at exits are drawn; confidences follow from them by the functions used for a real
    model. Each token needs a depth drawn uniformly from the model's depth; deeper exits are more confident and agree
    more often. With `nested`, all exits deeper than one that agrees agree as well. Thresholds from 0 (all tokens are
    confident) to above 1 (none is) can be replayed. Traces of two models line up if tokens x chars_per_token is equal.
    """
    rng = np.random.default_rng(seed)
    n = tokens * len(tasks)
    shape = (n, len(exits))
    depth = np.asarray(exits) / exits[-1]
    needed = rng.uniform(size=n)[:, None]
    confidence = np.clip(0.5 + 0.5 * (depth - needed) + rng.normal(0, 0.1, size=shape), 0, 1)
    slack = rng.normal(0, 0.1, size=(n, 1) if nested else shape)
    agree = depth >= needed + slack
    agree[:, -1] = True
    chars = np.concatenate([_lengths(rng, tokens, chars_per_token, uneven) for _ in tasks])
    margin = confidence * rng.uniform(size=shape)
    bits = rng.gamma(2.0, 2.0 / depth, size=shape).astype(np.float32)
    predicted = np.clip(confidence + rng.normal(0, 0.05, size=shape), 0, 1)
    seen = [_Drawn(confidence[:, e], margin[:, e], predicted[:, e]) for e in range(len(exits))]
    return ExitTrace(
        model=model,
        exits=tuple(exits),
        tasks=tuple(tasks),
        task=np.repeat(np.arange(len(tasks), dtype=np.int32), tokens),
        prompt=np.arange(n, dtype=np.int32) // prompt_tokens,
        chars=chars,
        agree=agree,
        provenance=Provenance(ProvenanceClass.PUBLISHED, "synthetic, for tests: no model", "synthetic_trace(...)"),
        confidences={
            c: np.column_stack([measure.of(view) for view in seen]).astype(np.float32)
            for c, measure in MEASURES.items()
        },
        bits=bits,
        human_text=human_text,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    """A drawn view of n tokens at one exit: (n,) largest probability, its margin over the second, classifier's output.

    The words after the second share the rest of the probability. The angle between the states of neighbouring layers is
    the smaller, the surer the classifier is.
    """

    best: NDArray[np.float64]
    margin: NDArray[np.float64]
    sure: NDArray[np.float64]
    vocab_size: int = 1000

    def top(self, k: int) -> Any:
        return np.column_stack((self.best, self.best - self.margin))[:, :k]

    def expected(self, of: Callable[[Any], Any]) -> Any:
        best = np.clip(self.best, 1e-12, 1)
        second = np.clip(np.minimum(self.best - self.margin, 1 - best), 1e-12, 1)
        rest = np.clip(1 - best - second, 1e-12, 1)
        return best * of(np.log(best)) + second * of(np.log(second)) + rest * of(np.log(rest / (self.vocab_size - 2)))

    def predicted(self) -> Any:
        return self.sure

    def foreseen(self) -> Any:
        return np.clip(2 * self.sure - 0.9, -1, 1)

    def states(self) -> tuple[Any, Any]:
        angle = 1 - self.sure
        return np.column_stack((np.ones(len(angle)), 0 * angle)), np.column_stack((np.cos(angle), np.sin(angle)))


def _lengths(rng: np.random.Generator, tokens: int, chars_per_token: int, uneven: bool) -> NDArray[np.int32]:
    """Characters of each token. `uneven` cuts the text at random places, possibly twice at one place (0 characters)."""
    if not uneven:
        return np.full(tokens, chars_per_token, dtype=np.int32)
    cuts = np.sort(rng.integers(0, tokens * chars_per_token + 1, size=tokens - 1))
    return np.diff(np.concatenate(([0], cuts, [tokens * chars_per_token]))).astype(np.int32)
