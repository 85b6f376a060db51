"""Tokenized passages, and hidden states of a frozen model at chosen depths, kept in files."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calibrate.drafts import kept
from calibrate.exits.texts import TASKS, Split, domain_of, passages
from calibrate.stages import CannotRun
from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.live import served

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.model.decoder import SegmentedModel

_BATCH_TOKENS = 3_072


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """A tokenized piece of text that a model reads at once, without earlier context."""

    task: str
    split: Split
    tokens: NDArray[np.int64]  # (n,)
    chars: NDArray[np.int32]  # (n,) characters that begin in each token; sums to the text's length

    @property
    def domain(self) -> str:
        return domain_of(self.task)


class Tokens(Protocol):
    """Anything with a number of tokens, for batching by length."""

    @property
    def tokens(self) -> NDArray[np.int64]: ...


def tokenized(tokenizer: Any, text: str) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Tokens (n,) of the text, and the characters that each adds (n,), which sum to len(text).

    A character that takes several tokens counts at the first of them. Raises UserError for a tokenizer that gives no
    offsets or drops characters at an end.
    """
    if not tokenizer.is_fast:
        raise UserError("tokenizer", type(tokenizer).__name__, "one that gives offsets", "take a fast tokenizer")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = np.maximum.accumulate(np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int32))
    if not len(ends) or ends[-1] != len(text):
        raise UserError("tokenizer", type(tokenizer).__name__, "one that covers the whole text", "take another one")
    return np.array(encoded["input_ids"], dtype=np.int64), np.diff(ends, prepend=np.int32(0))


def start_token(tokenizer: Any, vocab_size: int) -> int:
    """The token before a text, so that the text's first token is predicted too. Raises UserError if there is none."""
    found = served.start_token(tokenizer, vocab_size)
    if found is None:
        raise UserError("tokenizer", type(tokenizer).__name__, "a token that begins or ends a text", "take another one")
    return found


def tokenized_passages(
    tokenizer: Any, chars_by_task: dict[str, int], split: Split, passage_chars: int
) -> list[Passage]:
    """The tasks' passages of one split, in the order of `chars_by_task`."""
    return [
        Passage(task, split, *tokenized(tokenizer, text))
        for task, chars in chars_by_task.items()
        for text in passages(task, split, chars, passage_chars)
    ]


def batches(chosen: Sequence[Tokens], batch_tokens: int = _BATCH_TOKENS) -> Iterator[list[int]]:
    """Batches of passage indices of similar length, at most `batch_tokens` with padding; every passage once."""
    group: list[int] = []
    for i in sorted(range(len(chosen)), key=lambda i: len(chosen[i].tokens)):
        if group and (len(group) + 1) * len(chosen[i].tokens) > batch_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def states(
    model: SegmentedModel, start: int, texts: Sequence[NDArray[np.int64]], depths: Sequence[int]
) -> list[Tensor]:
    """Hidden states (sum of n, d) at each depth, of all texts in order. Row i is the state that predicts token i."""
    return read_rows(model, [np.concatenate(([start], tokens[:-1])) for tokens in texts], depths)


def read_rows(model: SegmentedModel, rows: Sequence[NDArray[np.int64]], depths: Sequence[int]) -> list[Tensor]:
    """Hidden states (sum of n, d) at each depth, of rows of n token ids each, read unchanged as one batch."""
    import torch

    from helios_sim.live.memory.kv import Packed

    longest = max(map(len, rows))
    if longest > model.architecture.max_context_tokens:
        context = model.architecture.max_context_tokens
        raise CannotRun(f"a text to be read has {longest} tokens, and the model takes {context}")
    ids = np.full((len(rows), longest), rows[0][0], dtype=np.int64)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    attend = Packed(model.architecture, len(rows), longest, model.dtype, model.device)
    real = np.arange(longest) < np.array([[len(row)] for row in rows])
    keep = torch.from_numpy(np.flatnonzero(real)).to(model.device)
    hidden = model.embed(torch.from_numpy(ids.ravel()).to(model.device), attend.positions)
    found, done = [], 0
    for depth in depths:
        hidden = model.run(hidden, done, depth, attend)
        done = depth
        found.append(hidden[keep])
    return found


@dataclass(frozen=True, slots=True, eq=False)
class HiddenStates:
    """Hidden states of N tokens at D depths for training."""

    depths: tuple[int, ...]
    hidden: Tensor  # (N, D, d) in the model's dtype
    split: NDArray[np.int32]  # (N,) index into Split
    task: NDArray[np.int32]  # (N,) index into TASKS
    device: Any = "cpu"  # device of the training

    def rows(self, split: Split) -> NDArray[np.int64]:
        return np.flatnonzero(self.split == list(Split).index(split))

    def at(self, depth: int, rows: NDArray[np.int64]) -> Tensor:
        """The states (len(rows), d) at a depth, on the training's device."""
        import torch

        return self.hidden[torch.from_numpy(rows), self.depths.index(depth)].to(self.device)


def collect(
    model: SegmentedModel,
    start: int,
    chosen: Sequence[Passage],
    depths: Sequence[int],
    folder: Path,
    seed: int,
    say: Callable[[str], None] = print,
) -> HiddenStates:
    """Hidden states of all passages. Every batch is a file, so that an interrupted run can be resumed."""
    import torch
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    groups = list(batches(chosen))
    random.Random(seed).shuffle(groups)  # noqa: S311 - an order, not a secret
    shards = []
    for b, group in enumerate(groups):
        path = folder / f"{b:05d}.safetensors"
        if (shard := kept_tensors(path)) is None:
            with torch.inference_mode():
                hidden = torch.stack(states(model, start, [chosen[i].tokens for i in group], depths), dim=1)
            labels = [(list(Split).index(chosen[i].split), TASKS.index(chosen[i].task)) for i in group]
            lengths = [len(chosen[i].tokens) for i in group]
            label = torch.from_numpy(np.repeat(np.array(labels, dtype=np.int32), lengths, axis=0))
            shard = {"hidden": hidden.cpu().contiguous(), "label": label}
            files.write_bytes(path, save(shard))
            if b % 10 == 0:
                say(f"hidden states: batch {b + 1} of {len(groups)}")
        shards.append(shard)
    label = torch.cat([shard["label"] for shard in shards]).numpy()
    hidden = torch.cat([shard["hidden"] for shard in shards])
    return HiddenStates(tuple(depths), hidden, label[:, 0], label[:, 1], model.device)


def kept_tensors(path: Path) -> dict[str, Tensor] | None:
    """Tensors that an interrupted call wrote; None if there are none, or they are damaged."""
    from safetensors.torch import load_file

    return kept(path, load_file)
