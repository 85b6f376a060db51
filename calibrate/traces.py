"""Exit traces of a real model with its heads: on texts, and on answers of its own. Knows no rule and no time.

A reference trace reads held-out text as it stands (every token predicted from the text before it); the traces of all
models cover the same passages, so they line up by characters. A generated trace writes greedy answers to prompts at
full depth and records what every exit would have said.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrate.hidden import Passage, batches, start_token, states, tokenized_passages
from calibrate.observe import observe
from calibrate.texts import PROSE_TASKS, TASKS, Split, prompts
from helios_sim.errors import UserError
from helios_sim.exits.trace import ExitTrace
from helios_sim.provenance import Provenance, ProvenanceClass

if TYPE_CHECKING:
    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.heads import ExitHeads

HELDOUT_CHARS = {  # more than 50,000 tokens of each of the three models
    **dict.fromkeys(PROSE_TASKS, 11_600),
    "code": 28_000,
    "humaneval": 12_500,
    "dialogue": 24_000,
    "qa": 11_500,
    "issues": 8_000,
}
PASSAGE_CHARS = 1_500
GENERATED_TASKS = ("news", "fiction", "learned", "code", "humaneval", "dialogue", "qa", "writing")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a trace says about where it comes from."""

    model: str
    weights_sha256: str
    command: str


def reference_trace(
    model: SegmentedModel,
    tokenizer: Any,
    heads: ExitHeads,
    origin: Origin,
    scratch: Path,
    chars: Mapping[str, int] | None = None,
    say: Any = print,
) -> ExitTrace:
    """The trace on held-out text people wrote, at least one passage of every task of `chars` (characters of each).

    Every passage read is a file in `scratch`, so an interrupted run, or one with more text, goes on.
    """
    depths = (*heads.exits, model.architecture.n_layers)
    chosen = tokenized_passages(tokenizer, dict(chars or HELDOUT_CHARS), Split.HELDOUT, PASSAGE_CHARS)
    start = start_token(tokenizer, model.architecture.vocab_size)
    scratch.mkdir(parents=True, exist_ok=True)
    files = [scratch / f"{_fingerprint(p)}.npz" for p in chosen]
    left = [i for i, path in enumerate(files) if not path.exists()]
    groups = [[left[k] for k in group] for group in batches([chosen[i] for i in left])]
    for b, group in enumerate(groups):
        found = _read(model, heads, start, [chosen[i] for i in group], depths)
        ends = np.cumsum([len(chosen[i].tokens) for i in group])[:-1]
        split = {name: np.split(values, ends) for name, values in found.items()}
        for j, i in enumerate(group):
            _keep(files[i], {name: pieces[j] for name, pieces in split.items()})
        say(f"trace: batch {b + 1} of {len(groups)}")
    parts = []
    for path in files:
        with np.load(path) as columns:
            parts.append({name: columns[name] for name in columns.files})
    tasks = tuple(dict.fromkeys(p.task for p in chosen))
    order = range(len(chosen))
    return _trace(
        origin, model, depths, tasks, [tasks.index(chosen[i].task) for i in order], [chosen[i].chars for i in order],
        parts, human_text=True, what="held-out text that people wrote, read passage by passage",
    )  # fmt: skip


def _fingerprint(passage: Passage) -> str:
    return hashlib.sha256(passage.tokens.tobytes()).hexdigest()[:20]


def _keep(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    draft = path.with_suffix(".part.npz")
    np.savez(draft, allow_pickle=False, **columns)
    os.replace(draft, path)


def _read(
    model: SegmentedModel, heads: ExitHeads, start: int, chosen: Sequence[Passage], depths: Sequence[int]
) -> dict[str, NDArray[Any]]:
    import torch

    with torch.inference_mode():
        hidden = states(model, start, [p.tokens for p in chosen], depths)
    seen = observe(model, heads, hidden, np.concatenate([p.tokens for p in chosen]))
    columns = {"agree": seen.agree, "confidence": seen.confidence, "margin": seen.margin, "bits": seen.bits}
    return columns if seen.classifier is None else {**columns, "classifier": seen.classifier}


def generated_trace(
    model: SegmentedModel,
    tokenizer: Any,
    heads: ExitHeads,
    origin: Origin,
    tasks: Sequence[str] = GENERATED_TASKS,
    prompts_a_task: int = 6,
    answer_tokens: int = 64,
    say: Any = print,
    prompt_chars: int = 400,
) -> ExitTrace:
    """The trace of greedy answers, at full depth, to held-out prompts of the tasks; a task's prompts are one batch.

    Tasks to which every answer is empty are left out; UserError where no answer has a character.
    """
    from calibrate.generate import answers

    depths = (*heads.exits, model.architecture.n_layers)
    parts, chars, task_of, kept = [], [], [], []
    for task in tasks:
        asked = [
            _asked(tokenizer, prompt, model.architecture.vocab_size)
            for prompt in prompts(task, prompts_a_task, prompt_chars)
        ]
        found = [a for a in answers(model, tokenizer, heads, asked, answer_tokens) if a.chars.sum()]
        say(f"answers: {task}, {sum(len(a.chars) for a in found)} tokens")
        if found:
            kept.append(task)
        for answer in found:
            parts.append(answer.columns)
            chars.append(answer.chars)
            task_of.append(len(kept) - 1)
    if not parts:
        raise UserError("model", origin.model, "answers with at least one character", "give other prompts or tokens")
    return _trace(
        origin, model, depths, tuple(kept), task_of, chars, parts, human_text=False,
        what=f"its own greedy answers of at most {answer_tokens} tokens to held-out prompts",
    )  # fmt: skip


def _asked(tokenizer: Any, prompt: str, vocab_size: int) -> list[int]:
    """Token ids of the prompt: as a chat where the model knows one, else the plain text after a start token."""
    if tokenizer.chat_template is not None:
        talk = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [start_token(tokenizer, vocab_size), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def _trace(
    origin: Origin,
    model: SegmentedModel,
    depths: Sequence[int],
    tasks: tuple[str, ...],
    task_of: Sequence[int],
    chars: Sequence[NDArray[np.int32]],
    parts: Sequence[Mapping[str, NDArray[Any]]],
    human_text: bool,
    what: str,
) -> ExitTrace:
    lengths = [len(c) for c in chars]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rounded: dict[str, Any] = {name: short(values) for name, values in columns.items() if name != "agree"}
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
                "texts": "calibrate.texts: " + ", ".join(t for t in tasks if t in TASKS),
                "rounding": "probabilities and bits to 11 significant bits (float16)",
            },
        ),
        human_text=human_text,
        **rounded,
    )


def short(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to what float16 can hold, so that files compress; three significant digits remain."""
    return values.astype(np.float16).astype(np.float32)


def _device(model: SegmentedModel) -> str:
    if model.device.type == "cpu":
        return f"{_processor()}, {os.cpu_count()} cores, {str(model.dtype).removeprefix('torch.')}"
    import torch

    return f"{torch.cuda.get_device_name(model.device)}, {str(model.dtype).removeprefix('torch.')}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
