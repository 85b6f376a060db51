"""The two steps that a campaign times all along: kept with their times, and what brings samples to one pace each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from fake_device import VirtualClock
from test_calibrate_profile import campaign
from virtual_subject import LIMITS, Costs, VirtualSubject


def anchors_s(costs: Costs) -> dict[str, float]:
    """What a layer of four decodes takes, and one of a prompt, where a third of the layers has no window."""
    few = [4, LIMITS.max_kv_tokens // 4]
    decode, prompt = (
        [costs.decode(s, few[1:] * few[0]) for s in (True, False)],
        [costs.prefill(s, 64, 0) for s in (True, False)],
    )
    return {
        "decode": costs.dense(few[0]) + (2 * decode[0] + decode[1]) / 3,
        "prompt": costs.dense(64) + (2 * prompt[0] + prompt[1]) / 3,
    }


def test_the_steps_that_others_time_again_are_kept_with_their_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = Costs(speed=1.5)
    found = campaign(VirtualSubject(costs), tmp_path / "work", monkeypatch).anchors
    assert (found.decode.rows, found.decode.kv_tokens) == (4, LIMITS.max_kv_tokens // 4)
    assert (found.prompt.rows, found.prompt.kv_tokens) == (64, 0)
    assert {"decode": found.decode.layer_s, "prompt": found.prompt.layer_s} == pytest.approx(anchors_s(costs))


class Moving(Costs):
    """Every other while few rows take 1.5 times as long, and many 1.2 times."""

    def __init__(self, while_s: float) -> None:
        super().__init__()
        self.while_s, self.clock = while_s, VirtualClock()

    def dense(self, rows: int) -> float:
        return self.at(rows) * super().dense(rows)

    def head(self, rows: int) -> float:
        return self.at(rows) * super().head(rows)

    def decode(self, slides: bool, kv_tokens: Sequence[int]) -> float:
        return self.at(len(kv_tokens)) * super().decode(slides, kv_tokens)

    def prefill(self, slides: bool, tokens: int, context_tokens: int) -> float:
        return self.at(tokens) * super().prefill(slides, tokens, context_tokens)

    def at(self, rows: int) -> float:
        slower = 1.5 if rows < 16 else 1.2
        return slower if int(self.clock.now_s / self.while_s) % 2 else 1.0


@pytest.mark.parametrize("while_s", [4.0, 11.0])
def test_a_machine_that_slows_down_each_kind_of_work_in_its_own_way_is_measured_at_one_pace(
    while_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables and anchors have the same pace, whichever it is: then one tells what the other comes to at another."""
    costs, plain = Moving(while_s), Costs()
    subject = VirtualSubject(costs)
    costs.clock = subject.clock
    profile = campaign(subject, tmp_path, monkeypatch)
    assert subject.clock.now_s > 4 * while_s
    found, known = profile.anchors, anchors_s(plain)
    pace = {"decode": found.decode.layer_s / known["decode"], "prompt": found.prompt.layer_s / known["prompt"]}
    for table, cost in ((profile.head, plain.head), (profile.layer_tables[0].dense, plain.dense)):
        expected = [pace["decode" if r < 16 else "prompt"] * cost(int(r)) for r in table.rows]
        np.testing.assert_allclose(table.time_s, expected, rtol=0.02)
