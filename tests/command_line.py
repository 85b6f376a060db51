"""Runs the command line inside the test's process: fast, and with what it prints."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from helios_sim.__main__ import main


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """The last line of standard output."""
        return json.loads(self.out.splitlines()[-1])


@dataclass
class CommandLine:
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    folder: Path

    def __call__(self, *arguments: str, into: str = "out") -> Said:
        """`into` is the output folder, inside the test's own; the test runs there too."""
        self.monkeypatch.chdir(self.folder)
        without = ("hydra.run.dir", "hydra.sweep.dir", "--help", "repro")
        place = [] if any(a.startswith(without) for a in arguments) else [
            f"hydra.sweep.dir={into}" if "-m" in arguments else f"hydra.run.dir={into}"
        ]  # fmt: skip
        self.monkeypatch.setattr(sys, "argv", ["helios_sim"])
        self.capsys.readouterr()
        GlobalHydra.instance().clear()
        try:
            status = main([*arguments, *place])
        finally:
            GlobalHydra.instance().clear()
        captured = self.capsys.readouterr()
        return Said(status, captured.out, captured.err)


STUDY = """# @package _global_
name: tiny
models: [opt-1.3b]
workload:
  n_requests: 12
  lengths: {output: {p50: 12, p95: 30, maximum: 40}}
arms:
  full_depth: {policy: full_depth}
  early_exit: {policy: early_exit}
baseline: full_depth
"""


def write_study(folder: Path, text: str = STUDY, name: str = "mine") -> tuple[str, ...]:
    """A study of the user's own; returns the arguments that run it."""
    file = folder / "conf" / "experiment" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return "--config-dir", str(folder / "conf"), f"+experiment={name}"
