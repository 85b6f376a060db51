"""Exit traces: records of every token of a model at every exit.

One trace serves every policy: thresholds and caps are applied afterwards (`replay`). A trace that was fitted to
published exits has no confidences. It only holds which tokens were confident at the publication's one threshold, and
refuses every other threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from helios_sim.errors import UserError
from helios_sim.exits.rule import MEASURES, Confidence, listed
from helios_sim.provenance import Provenance

MICROBITS = 1_000_000  # in a bit
MOST_BITS = 10_000  # of one token; no float32 probability needs as many
_ROUNDING = 1e-3  # tolerance by which a stored confidence may leave its range
ANY_DRAFTER = "*"  # the drafter's name if drafts are recorded for any drafter
FUSED = "+"  # joins the names of drafters with fused drafts
ANY_TASK = "*"  # a trace with this single task serves every workload task

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """The tokens of an answer in a trace: rows first + (start + j) % length, for j = 0 .. n_tokens - 1."""

    first: int  # where the task's text begins in the trace
    start: int  # where the answer begins in the task's text, in tokens
    length: int  # tokens of the task's text, which is circular
    n_tokens: int  # at least 1; more than `length` when the answer is longer than the text

    def indices(self) -> NDArray[np.int64]:
        """Rows of the trace, shape (n_tokens,)."""
        return self.first + (self.start + np.arange(self.n_tokens, dtype=np.int64)) % self.length

    def rows(self, n_tokens: int) -> slice | NDArray[np.int64]:
        """Rows of the first `n_tokens` tokens, as a slice unless the circular text wraps around among them."""
        start, n = self.start % self.length, min(n_tokens, self.n_tokens)
        if start + n <= self.length:
            return slice(self.first + start, self.first + start + n)
        return self.indices()[:n]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ExitTrace:
    """The exit trace of one model on one set of texts: T tokens and E exits.

    Tokens are in reading order and sorted by task, so a task's text is one contiguous range. Traces of different
    models cover the same texts: per task the same number of characters, cut into different tokens. The columns are
    made read-only. Raises UserError if they do not fit together.
    """

    model: str
    exits: tuple[int, ...]  # depths in layers, ascending; the last is the whole model
    tasks: tuple[str, ...]
    task: NDArray[np.int32]  # (T,) index into tasks, non-decreasing, every task present
    prompt: NDArray[np.int32]  # (T,) id of the token's prompt; ids are unique across tasks
    chars: NDArray[np.int32]  # (T,) characters that the token covers, 0 allowed (a part of a character)
    agree: NDArray[np.bool_]  # (T, E) whether the exit predicts the last layer's token; the last column is true
    provenance: Provenance
    # Recorded confidences, (T, E) each; values from 0 to 1 (a classifier's can lie below 0)
    confidences: Mapping[Confidence, NDArray[np.float32]] = field(default_factory=dict)
    confident: NDArray[np.bool_] | None = None  # (T, E) at published_threshold, if no confidence was recorded
    published_threshold: float | None = None
    published_confidence: Confidence | None = None
    bits: NDArray[np.float32] | None = None  # (T, E) -log2 of the probability of the text's own token
    human_text: bool = False  # whether people wrote the text: only then do bits per character rank models
    # By drafter: (T,) whether it predicts this model's last layer's token. The key `ANY_DRAFTER` stands for any drafter
    drafters: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    # By drafter: (T,) how sure it was of its prediction, from 0 to 1. Every drafter read the true text up to the token
    drafters_sure: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    task_first: NDArray[np.int64] = field(init=False, repr=False)  # (len(tasks) + 1,) rows at which texts begin
    char_start: NDArray[np.int64] = field(init=False, repr=False)  # (T + 1,) characters before each token
    # (T, E) `bits` in millionths, for human text only: whole numbers, so that sums do not depend on the order
    microbits: NDArray[np.int64] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_exits()
        n_tokens = len(self.task)
        wide = (n_tokens, len(self.exits))
        for name, dtype, shape in (
            ("task", np.int32, (n_tokens,)),
            ("prompt", np.int32, (n_tokens,)),
            ("chars", np.int32, (n_tokens,)),
            ("agree", np.bool_, wide),
            ("confident", np.bool_, wide),
            ("bits", np.float32, wide),
        ):
            if getattr(self, name) is not None:
                self._set(name, self._column(name, getattr(self, name), dtype, shape))
        recorded = {
            c: self._column(MEASURES[c].column, values, np.float32, wide) for c, values in self.confidences.items()
        }
        self._set("confidences", recorded)
        drafted = {name: self._column(name, values, np.bool_, (n_tokens,)) for name, values in self.drafters.items()}
        self._set("drafters", drafted)
        sure = {
            name: self._column(f"how sure {name} was", values, np.float32, (n_tokens,))
            for name, values in self.drafters_sure.items()
        }
        for name, values in sure.items():
            if name not in drafted or not ((values >= -_ROUNDING) & (values <= 1 + _ROUNDING)).all():
                allowed = "numbers from 0 to 1 for a model whose drafts were recorded"
                self._fail(f"how sure {name} was", sorted(drafted), allowed)
        self._set("drafters_sure", sure)
        self._check_columns()
        self._set("task_first", _frozen(np.searchsorted(self.task, np.arange(len(self.tasks) + 1)).astype(np.int64)))
        self._set("char_start", _frozen(np.concatenate(([0], np.cumsum(self.chars, dtype=np.int64)))))
        microbits = None if self.bits is None or not self.human_text else _frozen(_whole_microbits(self.bits))
        self._set("microbits", microbits)
        if not self.task_chars().all():
            self._fail("chars", "0 in a whole task", "each task's text covers at least one character")

    @property
    def n_tokens(self) -> int:
        return len(self.task)

    @property
    def n_layers(self) -> int:
        return self.exits[-1]

    def task_chars(self) -> NDArray[np.int64]:
        """Characters of each task's text, shape (len(tasks),)."""
        return np.diff(self.char_start[self.task_first])

    def confident_at(
        self, threshold: float, confidence: Confidence, rows: slice | NDArray[Any] = slice(None)
    ) -> NDArray[np.bool_]:
        """Whether the confidence reaches the threshold, (T, E), or `rows` of this table; compared in float32.

        UserError if the trace lacks the record: another measure, or, in a published trace, another threshold.
        """
        if self.confident is None:
            return self.recorded(confidence)[rows] >= np.float32(threshold)
        if (threshold, confidence) != (self.published_threshold, self.published_confidence):
            measure = self.published_confidence.value if self.published_confidence else "?"
            raise UserError(
                "threshold",
                f"{confidence.value} {threshold:g}",
                f"the exit trace of {self.model} ({self.provenance.source}) knows exits but no confidences, and "
                f"answers only {measure} {self.published_threshold:g}",
                f"use threshold {self.published_threshold:g} with {measure}, or a measured trace",
            )
        return self.confident[rows]

    def recorded(self, confidence: Confidence) -> NDArray[np.float32]:
        """The recorded values (T, E) of a measure. UserError if the trace does not hold it."""
        if confidence not in self.confidences:
            self._fail(
                "exits.confidence", confidence.value, f"measures recorded: {listed(self.confidences)}",
                "use one of them, or record a trace with `python -m calibrate +task=traces`",
            )  # fmt: skip
        return self.confidences[confidence]

    def drafted_by(self, model: str) -> NDArray[np.bool_]:
        """Whether the drafter `model` predicts this model's token, (T,). UserError if that was not recorded."""
        found = self.drafters.get(model, self.drafters.get(ANY_DRAFTER))
        if found is None:
            self._fail(
                "drafter", model, f"models whose drafts were recorded: {', '.join(self.drafters) or 'none'}",
                "name one of them, or state a share: exits.source=stated +exits.parameters.drafted=0.7",
            )  # fmt: skip
        return found

    def drafted_by_all(self, models: Sequence[str]) -> NDArray[np.bool_]:
        """Whether the fused draft of several drafters is this model's token, (T,).

        The fused draft of a token is that of the surest drafter, or of the first named among equally sure ones. This is
        exact if drafts are verified greedily: up to the first refused draft, all drafters have read the true text. It
        needs a joint trace, which holds how sure each drafter was, or a share stated for all together; else UserError.
        """
        if len(models) == 1:
            return self.drafted_by(models[0])
        together = FUSED.join(models)
        if together in self.drafters:
            return self.drafters[together]
        if not all(model in self.drafters_sure for model in models):
            self._fail(
                "drafters", ", ".join(models),
                "fused drafts take a joint trace, with how sure each was of each token; recorded so: "
                + (", ".join(self.drafters_sure) or "none"),
                f'state a share: exits.source=stated +exits.parameters.drafted="{{{together}: 0.8}}"',
            )  # fmt: skip
        surest = np.argmax([self.drafters_sure[model] for model in models], axis=0)
        each: NDArray[np.bool_] = np.stack([self.drafters[model] for model in models])
        right: NDArray[np.bool_] = each[surest, np.arange(self.n_tokens)]
        return right

    def bind(self, task_names: Sequence[str]) -> BoundTrace:
        """The trace as read by a workload with these task names; UserError if a task is missing."""
        if self.tasks == (ANY_TASK,):
            return BoundTrace(self, (0,) * len(task_names))
        missing = [name for name in task_names if name not in self.tasks]
        if missing:
            raise UserError(
                "workload.mix.tasks",
                ", ".join(missing),
                f"the exit trace of {self.model} has the tasks {', '.join(self.tasks)}",
                "name only these tasks in the workload, or take a trace that has them",
            )
        return BoundTrace(self, tuple(self.tasks.index(name) for name in task_names))

    def _check_exits(self) -> None:
        steps = np.diff((0, *self.exits))
        if not 0 < len(self.exits) < 128 or (steps <= 0).any():
            self._fail("exits", self.exits[:16], "1 to 127 exits, depths above 0 and ascending")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            self._fail("tasks", self.tasks, "at least one task, each named once")

    def _check_columns(self) -> None:
        steps, ends = np.diff(self.task), (self.task[:1].tolist(), self.task[-1:].tolist())
        if ends != ([0], [len(self.tasks) - 1]) or ((steps != 0) & (steps != 1)).any():
            self._fail("task", "unsorted or incomplete", "tokens are sorted by task and every task has some")
        if (self.chars < 0).any():
            self._fail("chars", int(self.chars.min()), "at least 0")
        if not self.agree[:, -1].all():
            self._fail("agree", "false at the last exit", "the last exit agrees with itself")
        published = [x is not None for x in (self.confident, self.published_threshold, self.published_confidence)]
        if any(published) != all(published):
            self._fail("confident", published, "confident, published_threshold and published_confidence come together")
        if published[0] and self.confidences:
            self._fail("confident", "beside confidences", "recorded confidences or published exits, not both")
        if not published[0] and not self.confidences:
            self._fail("confidences", None, f"one of {listed(MEASURES)}, or published exits")
        if self.bits is not None and not ((self.bits >= -_ROUNDING) & (self.bits <= MOST_BITS)).all():
            self._fail("bits", f"{self.bits.min():g} to {self.bits.max():g}", f"numbers from 0 to {MOST_BITS}")
        for confidence, record in self.confidences.items():
            measure = MEASURES[confidence]
            if not np.isfinite(record).all():
                self._fail(measure.column, "not finite", "finite numbers")
            if record.min() < measure.lowest - _ROUNDING or record.max() > 1 + _ROUNDING:
                self._fail(
                    measure.column, f"{record.min():g} to {record.max():g}", "confidences from 0 to 1, higher is surer",
                    "write it as a share: neither per cent, nor a logarithm, nor logits",
                )  # fmt: skip

    def _column(self, name: str, values: object, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
        values = np.asarray(values)
        if values.shape != shape:
            self._fail(name, values.shape, f"shape {shape}")
        if values.dtype != dtype and not np.can_cast(values.dtype, dtype, "same_kind"):
            self._fail(name, str(values.dtype), f"values of type {np.dtype(dtype)}")
        return _frozen(np.ascontiguousarray(values, dtype=dtype))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _fail(self, name: str, value: object, allowed: str, fix: str = "write the trace anew") -> NoReturn:
        raise UserError(name, value, f"exit trace of {self.model}: {allowed}", fix)


@dataclass(frozen=True, slots=True, eq=False)
class BoundTrace:
    """A trace as read by a workload, with the workload's task numbers."""

    trace: ExitTrace
    task_index: tuple[int, ...]  # number in the trace, for each task of the workload

    def locate(self, task: int, text_start: int, output_chars: int) -> TokenSpan:
        """The tokens of an answer: all tokens that begin within its characters, on the task's circular text.

        `task` is the workload's number. Characters count modulo the length of the text, so every model's trace gives
        the same text. Neighbouring answers share no token, and answers have output_chars / mean(chars) tokens on
        average. An answer that lies within one token is that token.
        """
        trace = self.trace
        k = self.task_index[task]
        first, end = int(trace.task_first[k]), int(trace.task_first[k + 1])
        origin = int(trace.char_start[first])
        begins = trace.char_start[first:end]
        text_chars, length = int(trace.char_start[end]) - origin, end - first
        begin = text_start % text_chars
        loops, tail = divmod(begin + output_chars, text_chars)
        start = int(begins.searchsorted(origin + begin))
        n_tokens = loops * length + int(begins.searchsorted(origin + tail)) - start
        if n_tokens < 1:
            return TokenSpan(first, int(begins.searchsorted(origin + begin, "right")) - 1, length, 1)
        return TokenSpan(first, start % length, length, n_tokens)

    def locate_many(
        self, task: NDArray[np.int64], text_start: NDArray[np.int64], output_chars: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Like `locate`, for n answers: first, start, length and number of tokens of each, shape (n, 4)."""
        trace = self.trace
        found = np.zeros((len(task), 4), np.int64)
        for k in set(self.task_index):
            rows = np.flatnonzero(np.array(self.task_index)[task] == k)
            first, end = int(trace.task_first[k]), int(trace.task_first[k + 1])
            origin = int(trace.char_start[first])
            begins = trace.char_start[first:end]
            text_chars, length = int(trace.char_start[end]) - origin, end - first
            begin = text_start[rows] % text_chars
            loops, tail = np.divmod(begin + output_chars[rows], text_chars)
            start = begins.searchsorted(origin + begin)
            n_tokens = loops * length + begins.searchsorted(origin + tail) - start
            start %= length
            within = np.flatnonzero(n_tokens < 1)  # answers within one token
            start[within] = begins.searchsorted(origin + begin[within], "right") - 1
            n_tokens[within] = 1
            found[rows] = np.stack(np.broadcast_arrays(first, start, length, n_tokens), axis=1)
        return found


def _whole_microbits(bits: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.rint(bits.astype(np.float64) * MICROBITS).astype(np.int64)


def _frozen(values: NDArray[_Scalar]) -> NDArray[_Scalar]:
    view = values.view()
    view.flags.writeable = False
    return view
