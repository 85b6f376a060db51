"""Runs `python -m calibrate` inside the test's process: fast, and with what it prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from calibrate.__main__ import main
from command_line import Said


def calibrate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path, *arguments: str) -> Said:
    """`here` becomes the current folder, so that an output folder without a path lies in it."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", ["calibrate"])
    capsys.readouterr()
    GlobalHydra.instance().clear()
    try:
        status = main(list(arguments))
    finally:
        GlobalHydra.instance().clear()
    captured = capsys.readouterr()
    return Said(status, captured.out, captured.err)
