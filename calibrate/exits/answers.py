"""Greedy answers of a real model to held-out prompts, with the exits' outputs at every token, and their exit trace.

The answers to a task's prompts are one batch, kept in one file as token ids. An interrupted run resumes after its last
file, and `calibrate.exits.drafters` reads the answers from these files. No ids go into a trace.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrate.drafts import kept
from calibrate.exits.hidden import start_token
from calibrate.exits.texts import prompts
from calibrate.exits.traces import (
    Tell,
    TimeSpent,
    TraceOrigin,
    joined,
    load_columns,
    neighbours,
    observe,
    quiet,
    save_columns,
)
from helios_sim.errors import UserError
from helios_sim.exits.trace import ExitTrace

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.heads import ExitHeads

GENERATED_TASKS = ("news", "fiction", "learned", "code", "humaneval", "dialogue", "qa", "writing")
_ASKED = "asked"  # key in a kept file: a digest of the prompts and settings
_OWN = ("prompt", "token", "chars", "prompt_ends", "ends")  # columns of a kept file that a trace does not have


@dataclass(frozen=True, slots=True, eq=False)
class GreedyAnswer:
    """One answer of n tokens, without the token that ends it, to a prompt of m."""

    prompt: NDArray[np.int64]  # (m,)
    tokens: NDArray[np.int64]  # (n,)
    chars: NDArray[np.int32]  # (n,), characters that each token adds to the decoded answer
    columns: dict[str, NDArray[Any]]  # columns of a trace by name, (n, E) each


def answers(
    model: SegmentedModel, tokenizer: Any, heads: ExitHeads, asked: Sequence[Sequence[int]], most_tokens: int
) -> list[GreedyAnswer]:
    """Greedy full-depth answers to prompts of token ids, each up to its end token."""
    import torch

    from helios_sim.live.memory.kv import DecodeStep, KvCache, PromptStep

    depths = neighbours((*heads.exits, model.architecture.n_layers))
    longest = max(map(len, asked)) + most_tokens
    cache = KvCache(model.architecture, model.n_loaded, len(asked), longest, model.dtype, model.device)
    hidden: list[list[Tensor]] = []  # per step, per depth (B, d)
    chosen: list[Tensor] = []  # per step (B,)
    with torch.inference_mode():
        first = []
        for slot, tokens in enumerate(asked):
            step = PromptStep(cache, slot, len(tokens))
            ids = torch.tensor(tokens, device=model.device)
            first.append([h[-1:] for h in _through(model, ids, step, depths)])
        hidden.append([torch.cat(rows) for rows in zip(*first, strict=True)])
        chosen.append(model.logits(hidden[-1][-1]).argmax(-1))
        for t in range(most_tokens - 1):
            lengths = [len(tokens) + t for tokens in asked]
            decode = DecodeStep(cache, list(range(len(asked))), lengths)
            hidden.append(_through(model, chosen[-1], decode, depths))
            chosen.append(model.logits(hidden[-1][-1]).argmax(-1))
    tokens = torch.stack(chosen, dim=1).cpu().numpy()  # (B, T)
    states = [torch.stack([step[e] for step in hidden], dim=1) for e in range(len(depths))]  # (B, T, d) each
    ends = _end_tokens(tokenizer)
    found = []
    for b, row in enumerate(tokens):
        stops = np.flatnonzero(np.isin(row, ends))
        n = int(stops[0]) if len(stops) else len(row)
        if n == 0:
            continue
        before, after = states[::2], states[1::2]
        seen = observe(model, heads, [t[b, :n] for t in after], row[:n], [t[b, :n] for t in before])
        prompt = np.array(asked[b], dtype=np.int64)
        found.append(GreedyAnswer(prompt, row[:n], characters(tokenizer, row[:n]), seen.columns))
    return found


def characters(tokenizer: Any, tokens: NDArray[np.int64]) -> NDArray[np.int32]:
    """Characters (n,) that each token adds to the decoded answer. A split character counts where it is complete."""
    lengths = []
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:n].tolist(), clean_up_tokenization_spaces=False)
        lengths.append(len(text.rstrip("\N{REPLACEMENT CHARACTER}")))
    return np.diff(np.maximum.accumulate(np.array(lengths, dtype=np.int32)), prepend=np.int32(0))


def _through(model: SegmentedModel, tokens: Tensor, step: Any, depths: Sequence[int]) -> list[Tensor]:
    hidden, done, found = model.embed(tokens, step.positions), 0, []
    for depth in depths:
        hidden = model.run(hidden, done, depth, step)
        done = depth
        found.append(hidden)
    return found


def _end_tokens(tokenizer: Any) -> list[int]:
    known = tokenizer.get_vocab()
    names = (tokenizer.eos_token, "<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<eos>")
    return [known[name] for name in names if name in known]


def generated_trace(
    model: SegmentedModel,
    tokenizer: Any,
    heads: ExitHeads,
    origin: TraceOrigin,
    scratch: Path,
    tasks: Sequence[str] = GENERATED_TASKS,
    prompts_a_task: int = 6,
    answer_tokens: int = 64,
    tell: Tell = quiet,
    prompt_chars: int = 400,
    left_s: Callable[[], float] | None = None,
) -> tuple[ExitTrace, str]:
    """The trace of greedy full-depth answers to held-out prompts of the tasks. A task's prompts are one batch.

    Also returns, in words, what the trace lacks: tasks for which there was no time. A task is not begun if the slowest
    task so far took more than the `left_s()` seconds that are left (`left_s` None: no limit). Tasks with only empty
    answers are left out. Raises TimeSpent if there was no time for any task, and UserError if all answers are empty.
    Each batch is kept in a file in `scratch`, from which an interrupted run resumes.
    """
    depths = (*heads.exits, model.architecture.n_layers)
    found: dict[str, list[GreedyAnswer]] = {}
    slowest_s = 0.0
    for task in tasks:
        began_s, path = time.monotonic(), _file_of(scratch, task)
        asked = [
            _asked(tokenizer, prompt, model.architecture.vocab_size)
            for prompt in prompts(task, prompts_a_task, prompt_chars)
        ]
        digest = hashlib.sha256(repr((asked, answer_tokens)).encode()).digest()
        before = kept(path, _read)
        if before is not None and before[0] == digest:
            answered = before[1]
        elif left_s is not None and left_s() <= slowest_s:
            break
        else:
            answered = [a for a in answers(model, tokenizer, heads, asked, answer_tokens) if a.chars.sum()]
            _write(path, digest, answered)
            slowest_s = max(slowest_s, time.monotonic() - began_s)
        found[task] = answered
        tell(f"{task}, {sum(len(a.tokens) for a in answered)} tokens", len(found) / len(tasks))
    if not found:
        raise TimeSpent("no time is left for one answer")
    told = tuple(task for task, answered in found.items() if answered)
    if not told:
        raise UserError("model", origin.model, "answers with at least one character", "give other prompts or tokens")
    by_answer = [(number, answer) for number, task in enumerate(told) for answer in found[task]]
    return joined(
        origin, model, depths, told, [number for number, _ in by_answer], [answer.chars for _, answer in by_answer],
        [answer.columns for _, answer in by_answer], human_text=False,
        what=f"its own greedy answers of at most {answer_tokens} tokens to held-out prompts",
    ), "" if len(found) == len(tasks) else f"no answers to {', '.join(tasks[len(found):])}"  # fmt: skip


def read_answers(scratch: Path, tasks: Sequence[str]) -> list[GreedyAnswer]:
    """The answers of these tasks that `generated_trace` kept, in the order of its trace."""
    return [answer for task in tasks for answer in _read(_file_of(scratch, task))[1]]


def _file_of(scratch: Path, task: str) -> Path:
    return scratch / f"{task}.npz"


def _read(path: Path) -> tuple[bytes, list[GreedyAnswer]]:
    columns = load_columns(path)
    digest = columns.pop(_ASKED).tobytes()
    prompt, token, chars, starts, ends = (columns.pop(name) for name in _OWN)
    if not len(ends):
        return digest, []
    each = {name: np.split(values, ends[:-1]) for name, values in columns.items()}
    rows = zip(np.split(prompt, starts[:-1]), np.split(token, ends[:-1]), np.split(chars, ends[:-1]), strict=True)
    found = [GreedyAnswer(*row, {name: parts[k] for name, parts in each.items()}) for k, row in enumerate(rows)]
    return digest, found


def _write(path: Path, asked: bytes, answered: Sequence[GreedyAnswer]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids, none = np.zeros(0, np.int64), np.zeros(0, np.int32)
    own = (
        np.concatenate([ids, *(a.prompt for a in answered)]), np.concatenate([ids, *(a.tokens for a in answered)]),
        np.concatenate([none, *(a.chars for a in answered)]),
        np.cumsum([len(a.prompt) for a in answered], dtype=np.int64),
        np.cumsum([len(a.tokens) for a in answered], dtype=np.int64),
    )  # fmt: skip
    names = answered[0].columns if answered else ()
    columns = {name: np.concatenate([a.columns[name] for a in answered]) for name in names}
    known = {_ASKED: np.frombuffer(asked, np.uint8), **dict(zip(_OWN, own, strict=True))}
    save_columns(path, {**known, **columns})


def _asked(tokenizer: Any, prompt: str, vocab_size: int) -> list[int]:
    """Token ids of the prompt: as a chat if the model has a template, else the plain text after a start token."""
    if tokenizer.chat_template is not None:
        talk = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [start_token(tokenizer, vocab_size), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
