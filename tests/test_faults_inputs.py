"""Readers of profiles, traces and logs under mutants: each is read, or refused with one message, in time and memory."""

from __future__ import annotations

import pytest

from faults import (
    bad,
    campaign,
    exit_tables,
    exit_traces,
    measured_tables,
    own_models,
    profiles,
    serving_logs,
    settings_files,
    tool_logs,
    workload_traces,
)

LOADERS = [
    exit_tables, exit_traces, measured_tables, own_models, profiles, serving_logs, settings_files, tool_logs,
    workload_traces,
]  # fmt: skip
COUNT = 30  # `python -m faults.LOADER 1000` in this folder tries more


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_a_mutant_is_read_or_refused(loader) -> None:
    count = 10 if loader is settings_files else COUNT  # to compose a study takes as long as to read ten files
    assert bad(campaign(loader.mutants(2), loader.read, count)) == []
