"""Which labelled texts are at hand, and how much of them can be traced in the time. Knows no model's inside."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from calibrate.inputs import Inputs
from calibrate.stages import NotEnoughTime, StageRun
from calibrate.texts import TASKS, Split, documents, passages
from helios_sim.errors import UserError
from helios_sim.report import files

PROBE_CHARS = 1_500  # of each task, for the mean length of a token
SAFETY = 0.75  # of the time allowed is planned with: a shared machine varies


@dataclass(frozen=True, slots=True)
class Texts:
    """Tasks whose texts are here, and why others are not."""

    tasks: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def shares(self) -> dict[str, int]:
        """As for training, of these tasks alone, summing to a thousand."""
        from calibrate.adapters import SHARES

        total = sum(SHARES[task] for task in self.tasks)
        return {task: round(1000 * SHARES[task] / total) for task in self.tasks}


def texts_at_hand(inputs: Inputs) -> Texts:
    """Tasks that the settings name must be there (UserError); of all tasks, those that can be had."""
    named = inputs.config.tasks
    found, left_out = [], {}
    for task in TASKS if named is None else named:
        try:
            documents(task)
        except UserError as error:
            if named is not None:
                raise
            left_out[task] = str(error)
        else:
            found.append(task)
    return Texts(tuple(found), left_out)


def chars_per_token(inputs: Inputs) -> float:
    """Mean over a little held-out text of every task at hand; of random weights, what is assumed for their family."""
    from helios_sim.live.checkpoint.random_weights import RandomWeights

    if isinstance(inputs.checkpoint.storage, RandomWeights):
        return inputs.checkpoint.storage.chars_per_token
    pieces = [p for t in texts_at_hand(inputs).tasks for p in passages(t, Split.HELDOUT, PROBE_CHARS, PROBE_CHARS)]
    tokens = sum(len(ids) for ids in inputs.tokenizer(pieces, add_special_tokens=False)["input_ids"])
    return sum(map(len, pieces)) / tokens


def chars_that_fit(inputs: Inputs, stage: StageRun) -> tuple[dict[str, int], dict[str, str]]:
    """Characters to trace of each task, and the tasks left out with reasons.

    So many that `trace_tokens` come together, or fewer in the time allowed, by the time that a little text takes. A
    call that goes on after a kill reads what was decided. NotEnoughTime where not even one passage a task fits.
    """
    decided = stage.folder / "chars.json"
    at_hand = texts_at_hand(inputs)
    if decided.is_file():
        return dict(json.loads(decided.read_text())), dict(at_hand.left_out)
    from calibrate.traces import HELDOUT_CHARS

    of_all = {task: HELDOUT_CHARS[task] for task in at_hand.tasks}
    wanted = inputs.config.trace_tokens * chars_per_token(inputs)
    if stage.allowance_s is not None:
        wanted = min(wanted, _chars_per_s(inputs, at_hand) * stage.allowance_s * SAFETY)
    if wanted < PROBE_CHARS * len(of_all) / 2 and stage.allowance_s is not None and not inputs.config.quick:
        raise NotEnoughTime(f"in {stage.allowance_s:.0f} s not even one passage of each task can be traced")
    scale = wanted / sum(of_all.values())
    chars = {task: max(1, round(n * scale)) for task, n in of_all.items()}
    files.write_json(decided, chars)
    return chars, dict(at_hand.left_out)


def _chars_per_s(inputs: Inputs, at_hand: Texts) -> float:
    from calibrate.traces import Origin, reference_trace

    origin = Origin(inputs.config.model.name, "", "")
    speeds = []
    for chars in (1, 2 * PROBE_CHARS):  # the first warms up
        with tempfile.TemporaryDirectory() as scratch:
            began = time.monotonic()
            trace = reference_trace(
                inputs.model, inputs.tokenizer, inputs.heads, origin, Path(scratch), {at_hand.tasks[0]: chars},
                lambda text: None,
            )  # fmt: skip
            speeds.append(int(trace.chars.sum()) / (time.monotonic() - began))
    return speeds[-1]
