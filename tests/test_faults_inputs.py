"""Readers of profiles, traces and logs under mutants: each is read, or refused with one message, in time and memory."""

from __future__ import annotations

import pytest

from faults import bad, campaign, exit_traces, measured_tables, own_models, profiles, serving_logs, workload_traces

COUNT = 30  # `python -m faults.LOADER 1000` in this folder tries more


@pytest.mark.slow
@pytest.mark.parametrize("loader", [exit_traces, measured_tables, own_models, profiles, serving_logs, workload_traces])
def test_a_mutant_is_read_or_refused(loader) -> None:
    assert bad(campaign(loader.mutants(2), loader.read, COUNT)) == []
