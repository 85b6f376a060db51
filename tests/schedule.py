"""How tests are spread over processes: whole files, since their tests share fixtures, and the longest files first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler.protocol import Scheduling

TESTS = Path(__file__).parent
# Seconds of CPU, about. A file that takes long and comes last keeps one process at work while the others are done.
LONGEST = {
    "test_machine_code.py": 100,  # the first of all, since it makes the machine code that others find
    "test_campaign.py": 80, "digests/test_digests.py": 70, "test_capacity.py": 60, "test_environments.py": 55,
    "cuda/test_kernels.py": 45, "test_experiments.py": 42, "test_bad_inputs.py": 41, "test_live_mode.py": 40,
    "test_kills.py": 40, "test_notebooks.py": 40, "test_calibrate_command.py": 40, "test_faults_machine.py": 40,
    "test_bundle.py": 30, "cuda/test_serving.py": 28, "test_capacity_scaled.py": 27,
    "test_settings_of_kinds_count.py": 25, "test_calibrate_profile.py": 23, "test_live_exits.py": 18,
    "test_prefix_caching.py": 17, "test_report_sentences.py": 15, "test_serve_live.py": 14,
}  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling | None:
    """Where nothing else is asked for by `--dist`."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # which goes by how many tests a file has
    return LoadFileScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In processes of pytest-xdist; where there is one process, files keep their order."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -LONGEST.get(item.path.relative_to(TESTS).as_posix(), 0))
