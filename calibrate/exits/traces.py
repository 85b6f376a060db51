"""Exit traces of a real model with its heads on texts; `calibrate.exits.answers` traces the model's own answers.

A reference trace reads held-out text as it stands: every token is predicted from the text before it. The traces of all
models cover the same passages, so that they can be aligned by characters.

If the model computes in bfloat16, its logits are rounded to 8 bits, too coarse for confidences and for choices among
near ties. So `observe` computes the largest logits and the reference's again in float32 from the same hidden state. The
many small logits only enter the sum of the softmax.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrate.drafts import kept
from calibrate.exits.hidden import Passage, batches, start_token, states, tokenized_passages
from calibrate.exits.predictors import proposed
from calibrate.exits.texts import PROSE_TASKS, TASKS, Split
from calibrate.measure.devices import cpuinfo
from helios_sim import files
from helios_sim.exits.rule import MEASURES, Confidence
from helios_sim.exits.trace import ExitTrace
from helios_sim.live.model.predictors import features, largest, signed
from helios_sim.provenance import Provenance, ProvenanceClass

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.heads import ExitHeads
    from helios_sim.live.model.predictors import Predictors

_EXACT = 8  # largest logits that are computed again
_CHUNK_TOKENS, _SUM_ROWS = 256, 4
HELDOUT_CHARS = {  # together more than 50,000 tokens for each of the three models
    **dict.fromkeys(PROSE_TASKS, 11_600),
    "code": 28_000,
    "humaneval": 12_500,
    "dialogue": 24_000,
    "qa": 11_500,
    "issues": 8_000,
}
PASSAGE_CHARS = 1_500


@dataclass(frozen=True, slots=True, eq=False)
class ExitOutputs:
    """The output of E exits, the last being full depth, at N tokens."""

    choice: NDArray[np.int64]  # (N, E), most probable token
    bits: NDArray[np.float32]  # (N, E), -log2 of the reference token's probability
    # (N, E) each, of every measure that can be computed; logits are divided by the exit's temperature
    confidences: Mapping[Confidence, NDArray[np.float32]]

    @property
    def agree(self) -> NDArray[np.bool_]:
        return self.choice == self.choice[:, -1:]

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns of a trace by name."""
        measured = {MEASURES[c].column: values for c, values in self.confidences.items()}
        return {"agree": self.agree, **measured, "bits": self.bits}


def observe(
    model: SegmentedModel,
    heads: ExitHeads,
    hidden: Sequence[Tensor],
    reference: NDArray[np.int64],
    before: Sequence[Tensor] | None = None,
    predictors: Predictors | None = None,
) -> ExitOutputs:
    """Read every exit at `hidden`, (N, d) per early exit and after the last layer; reference (N,): the text's ids.

    `before`: the states one layer earlier, (N, d) each; without them no measure that compares two layers is recorded.
    Without `predictors` there is no column of theirs.
    """
    import torch

    measured = [
        c for c, measure in MEASURES.items()
        if (heads.has_check or c is not Confidence.CLASSIFIER) and (before is not None or not measure.neighbours)
        and (predictors is not None or not measure.proposes)
    ]  # fmt: skip
    found: list[list[NDArray[Any]]] = []  # by exit: choice, bits, then the measures
    with torch.inference_mode():
        words = torch.from_numpy(reference).to(model.device)
        for e, state in enumerate(hidden):
            earlier = state if before is None else before[e]
            pieces = zip(*(t.split(_CHUNK_TOKENS) for t in (state, earlier, words)), strict=True)
            views = [_ExactView(model, heads, e, *piece) for piece in pieces]
            if predictors is not None:
                pieces = zip(*(h.split(_CHUNK_TOKENS) for h in (hidden[0], hidden[max(e - 1, 0)])), strict=True)
                for view, piece in zip(views, pieces, strict=True):
                    view.proposes(predictors, *piece)
            rows = [[v.choice, v.bits(), *(MEASURES[c].of(v) for c in measured)] for v in views]
            found.append([torch.cat(column).cpu().numpy() for column in zip(*rows, strict=True)])
    choice, bits, *measures = (np.column_stack(column) for column in zip(*found, strict=True))
    return ExitOutputs(
        choice.astype(np.int64),
        bits.astype(np.float32),
        {c: values.astype(np.float32) for c, values in zip(measured, measures, strict=True)},
    )


class _ExactView:
    """The outputs of exit `e` at states (n, d), as `MEASURES` read them; `before` is the state one layer earlier."""

    def __init__(
        self, model: SegmentedModel, heads: ExitHeads, e: int, state: Tensor, before: Tensor, reference: Tensor
    ) -> None:
        import torch

        self._model, self._heads, self._exit, self._state, self._before = model, heads, e, state, before
        self._temperature = temperature = heads.temperature[e]
        normed = model.normed(heads.adapt(e, state).to(model.dtype))
        self._logits = normed @ model.outer.head.T
        coarse, tokens = largest(self._logits, _EXACT)
        self._tokens = tokens = torch.cat((tokens, reference[:, None]), 1)
        exact = torch.einsum("nd,nkd->nk", normed.float(), model.outer.head[tokens].float()) / temperature
        peak = exact[:, :_EXACT].amax(1, keepdim=True)
        rows = [
            (few.float() / temperature).sub_(p).exp_().sum(-1)  # few rows at a time stay in the processor's cache
            for few, p in zip(self._logits.split(_SUM_ROWS), peak.split(_SUM_ROWS), strict=True)
        ]
        total = torch.cat(rows).double()
        fine, rough = exact[:, :_EXACT].double() - peak, coarse.double() / temperature - peak
        total += (fine.exp() - rough.exp()).sum(1)
        self._exact, self._peak, self._total = exact, peak, total
        self._best = fine.sort(descending=True)
        self.choice = tokens[:, :_EXACT].gather(1, self._best.indices[:, :1])[:, 0]

    def proposes(self, predictors: Predictors, first: Tensor, at_exit_before: Tensor) -> None:
        """Run the predictors' check, from the states (n, d) at the first exit and at the exit before this one."""
        self._words = predictors, proposed(self._model, self._heads, first), at_exit_before

    def foreseen(self) -> Tensor:
        import torch

        (predictors, words, before), e = self._words, self._exit
        if e == len(predictors.exits):
            return torch.ones(len(words), device=words.device)
        seen = features(self._model, self._heads, e, self._state, before if e else None, words)
        return signed(predictors.predicted(e, seen), self.choice, words)

    @property
    def vocab_size(self) -> int:
        return int(self._logits.shape[-1])

    def bits(self) -> Tensor:
        """-log2 (n,) of the reference token's probability."""
        return (self._total.log() - (self._exact[:, -1].double() - self._peak[:, 0])) / math.log(2)

    def top(self, k: int) -> Tensor:
        return self._best.values[:, :k].exp() / self._total[:, None]

    def expected(self, of: Callable[[Any], Any]) -> Tensor:
        import torch

        from helios_sim.live.exits import mean_of

        log_total = (self._total.log()[:, None] + self._peak).float()
        few = (t.split(_SUM_ROWS) for t in (self._logits, self._tokens[:, :_EXACT], self._exact[:, :_EXACT], log_total))
        means = [
            mean_of((logits.float() / self._temperature).scatter_(1, tokens, exact).sub_(total), of)
            for logits, tokens, exact, total in zip(*few, strict=True)
        ]
        return torch.cat(means)

    def predicted(self) -> Tensor:
        return self._heads.classify(self._exit, self._state)

    def states(self) -> tuple[Tensor, Tensor]:
        return self._before.float(), self._state.float()


def neighbours(exits: Sequence[int]) -> list[int]:
    """Two depths for each exit, in one list: one layer before it, and its own."""
    return [depth - back for depth in exits for back in (1, 0)]


class TimeSpent(Exception):
    """There was not enough time for a trace; the passages read so far are kept."""


Tell = Callable[[str, float | None], None]  # called with the current activity and the share done


def quiet(text: str, share: float | None) -> None:
    """Discards progress."""


@dataclass(frozen=True, slots=True)
class TraceOrigin:
    """The origin that a trace records."""

    model: str
    weights_sha256: str
    command: str


def reference_trace(
    model: SegmentedModel,
    tokenizer: Any,
    heads: ExitHeads,
    origin: TraceOrigin,
    scratch: Path,
    chars: Mapping[str, int] | None = None,
    tell: Tell = quiet,
    left_s: Callable[[], float] | None = None,
    predictors: Predictors | None = None,
) -> tuple[ExitTrace, str]:
    """The trace on held-out text, with at least one passage of every task in `chars` (characters of each).

    Also returns, in words, what the trace lacks. `left_s()` gives the seconds that are left (`left_s` None: no limit).
    One passage of each task is read first. A batch is not begun if it would take longer than the time left, going by
    the pace so far; a task without any passage read is left out. Raises TimeSpent if there is no time for one passage.
    Every passage is kept in a file in `scratch`, so that an interrupted run, or one with more text or time, continues.
    """
    depths = (*heads.exits, model.architecture.n_layers)
    chosen = tokenized_passages(tokenizer, dict(chars or HELDOUT_CHARS), Split.HELDOUT, PASSAGE_CHARS)
    start = start_token(tokenizer, model.architecture.vocab_size)
    scratch.mkdir(parents=True, exist_ok=True)
    by = "" if predictors is None else predictors.digest()
    files = [scratch / f"{_fingerprint(p, by)}.npz" for p in chosen]
    left = [i for i, path in enumerate(files) if _kept(path) is None]
    firsts = set({chosen[i].task: i for i in reversed(range(len(chosen)))}.values())
    parts = [left] if left_s is None else [[i for i in left if (i in firsts) is first] for first in (True, False)]
    groups = [[part[k] for k in group] for part in parts for group in batches([chosen[i] for i in part])]
    pace_s = 0.0  # seconds per token in the slowest batch
    for b, group in enumerate(groups):
        tokens, began_s = sum(len(chosen[i].tokens) for i in group), time.monotonic()
        if left_s is not None and left_s() < pace_s * tokens:
            break
        found = _read(model, heads, start, [chosen[i] for i in group], depths, predictors)
        ends = np.cumsum([len(chosen[i].tokens) for i in group])[:-1]
        split = {name: np.split(values, ends) for name, values in found.items()}
        for j, i in enumerate(group):
            save_columns(files[i], {name: pieces[j] for name, pieces in split.items()})
        pace_s = max(pace_s, (time.monotonic() - began_s) / tokens)
        tell(f"batch {b + 1} of {len(groups)}", (b + 1) / len(groups))
    order = [i for i, path in enumerate(files) if path.is_file()]
    tasks = tuple(dict.fromkeys(chosen[i].task for i in order))
    if not order:
        raise TimeSpent("no time is left for one passage")
    without = [task for task in dict.fromkeys(p.task for p in chosen) if task not in tasks]
    lacking = "" if len(order) == len(chosen) else f"{len(order)} of {len(chosen)} passages were read"
    lacking += f", none of {', '.join(without)}" if without else ""
    return joined(
        origin, model, depths, tasks, [tasks.index(chosen[i].task) for i in order], [chosen[i].chars for i in order],
        [load_columns(files[i]) for i in order], human_text=True,
        what="held-out text that people wrote, read passage by passage",
    ), lacking  # fmt: skip


def _fingerprint(passage: Passage, by: str) -> str:
    return hashlib.sha256(passage.tokens.tobytes() + " ".join(MEASURES).encode() + by.encode()).hexdigest()[:20]


def _kept(path: Path) -> dict[str, NDArray[Any]] | None:
    """A passage's columns from an interrupted call; None if there are none, or they are damaged."""
    return kept(path, load_columns)


def load_columns(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file by name."""
    with np.load(path, allow_pickle=False) as columns:
        return {name: columns[name] for name in columns.files}


def save_columns(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """Write the arrays into a file, whole or not at all."""
    with files.replacing(path) as file:
        np.savez(file, allow_pickle=False, **columns)


def _read(
    model: SegmentedModel,
    heads: ExitHeads,
    start: int,
    chosen: Sequence[Passage],
    depths: Sequence[int],
    predictors: Predictors | None,
) -> dict[str, NDArray[Any]]:
    import torch

    with torch.inference_mode():
        hidden = states(model, start, [p.tokens for p in chosen], neighbours(depths))
    tokens = np.concatenate([p.tokens for p in chosen])
    return observe(model, heads, hidden[1::2], tokens, hidden[::2], predictors).columns


def joined(
    origin: TraceOrigin,
    model: SegmentedModel,
    depths: Sequence[int],
    tasks: tuple[str, ...],
    task_of: Sequence[int],
    chars: Sequence[NDArray[np.int32]],
    parts: Sequence[Mapping[str, NDArray[Any]]],
    human_text: bool,
    what: str,
) -> ExitTrace:
    """The trace of texts, each with its task's number, its tokens' characters and its columns by name."""
    lengths = [len(c) for c in chars]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rounded = {name: short(values) for name, values in columns.items() if name != "agree"}
    return ExitTrace(
        model=origin.model,
        exits=tuple(depths),
        tasks=tasks,
        task=np.repeat(np.array(task_of, dtype=np.int32), lengths),
        prompt=np.repeat(np.arange(len(chars), dtype=np.int32), lengths),
        chars=np.concatenate(chars).astype(np.int32),
        agree=columns["agree"],
        provenance=Provenance(
            provenance_class=ProvenanceClass.MEASURED,
            source=f"{origin.model} ({_device(model)}), {what}",
            command=origin.command,
            details={
                "weights_sha256": origin.weights_sha256,
                "dtype": str(model.dtype).removeprefix("torch."),
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "texts": "calibrate.exits.texts: " + ", ".join(t for t in tasks if t in TASKS),
                "rounding": "probabilities and bits to 11 significant bits (float16)",
            },
        ),
        human_text=human_text,
        bits=rounded["bits"],
        confidences={c: rounded[m.column] for c, m in MEASURES.items() if m.column in rounded},
    )


def short(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values rounded to float16, so that files compress; three significant digits remain."""
    return values.astype(np.float16).astype(np.float32)


def _device(model: SegmentedModel) -> str:
    if model.device.type == "cpu":
        processor = cpuinfo("model name") or platform.processor() or platform.machine()
        return f"{processor}, {os.cpu_count()} cores, {str(model.dtype).removeprefix('torch.')}"
    import torch

    return f"{torch.cuda.get_device_name(model.device)}, {str(model.dtype).removeprefix('torch.')}"
