"""Readers of weights, exit heads and archives under mutants: each is read or refused, in time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from faults import Mutant, bad, campaign, campaign_archives, gguf_files, head_folders, hub_folders

COUNT = 30  # `python -m faults.LOADER 1000` in this folder tries more


@pytest.mark.slow
@pytest.mark.parametrize("loader", [gguf_files, hub_folders, head_folders, campaign_archives])
def test_a_mutant_is_read_or_refused(loader, monkeypatch: pytest.MonkeyPatch) -> None:
    mutants: Callable[[int], Iterator[Mutant]] = loader.mutants
    read: Callable[[Path], None] = loader.read
    monkeypatch.setenv("HELIOS_CACHE", "set anew for each mutant")
    threads = torch.get_num_threads()
    try:
        assert bad(campaign(mutants(1), read, COUNT)) == []
    finally:
        torch.set_num_threads(threads)
