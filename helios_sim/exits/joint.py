"""How two models' exits fall together on the same text, lined up by characters. Knows no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.replay import replay
from helios_sim.exits.rule import ExitRule
from helios_sim.exits.trace import ExitTrace


@dataclass(frozen=True, slots=True, eq=False)
class JointExits:
    """Shares of the characters of the text."""

    models: tuple[str, str]
    exits: tuple[tuple[int, ...], tuple[int, ...]]
    share: NDArray[np.float64]  # (E of the first, E of the second), sums to 1

    @property
    def early_in_either(self) -> float:
        """Share that leaves at the first exit of at least one of the two."""
        return float(1 - self.share[1:, 1:].sum())

    @property
    def late_helped(self) -> float | None:
        """Of what misses the first model's first exit, the share that makes the second's; None if nothing misses."""
        late = self.share[1:]
        return float(late[:, 0].sum() / late.sum()) if late.sum() else None


def joint_exits(first: ExitTrace, first_rule: ExitRule, second: ExitTrace, second_rule: ExitRule) -> JointExits:
    """Where each character's token leaves in one model and in the other, both loaded whole.

    UserError unless the traces cover the same texts: the same tasks, each with the same number of characters.
    """
    if first.tasks != second.tasks or not np.array_equal(first.task_chars(), second.task_chars()):
        texts = [dict(zip(t.tasks, t.task_chars().tolist(), strict=True)) for t in (first, second)]
        raise UserError(
            "exits",
            f"{first.model} with {second.model}",
            f"both cover the same texts; characters by task: {texts[0]} and {texts[1]}",
            "take traces of the same prompts",
        )
    ends = [t.char_start[1:] for t in (first, second)]
    cuts = np.union1d(*ends)  # between two cuts lies one token of each
    chars = np.diff(cuts, prepend=0)
    rows, columns = (
        replay(trace, rule, trace.n_layers).exit_index[np.searchsorted(end, cuts)]
        for trace, rule, end in zip((first, second), (first_rule, second_rule), ends, strict=True)
    )
    share = np.zeros((len(first.exits), len(second.exits)))
    np.add.at(share, (rows, columns), chars)
    return JointExits((first.model, second.model), (first.exits, second.exits), share / chars.sum())
