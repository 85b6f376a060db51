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
    "test_machine_code.py": 100,  # 45, and the first, since it makes the machine code that others find
    "test_calibrate_command.py": 80, "digests/test_digests.py": 76, "test_experiments.py": 75,
    "test_campaign.py": 65, "test_kills.py": 60, "test_environments.py": 55,
    "test_capacity.py": 45, "test_faults_machine.py": 45, "test_study_runs.py": 30,
    "test_bad_inputs.py": 41, "test_notebooks.py": 40, "test_report_names.py": 37, "test_capacity_scaled.py": 36,
    "test_policy_settings_count.py": 31, "test_live_mode.py": 28, "cuda/test_serving.py": 28,
    "cuda/test_kernels.py": 27, "test_study_resumed.py": 26, "test_settings_of_kinds_count.py": 25,
    "test_calibrate_profile.py": 23, "test_faults_weights.py": 21, "test_report_files.py": 19,
    "test_words.py": 27, "test_profile_precision.py": 20, "test_settings_count.py": 11,
    "test_live_exits.py": 18, "test_profile_any.py": 18, "test_study_seeds.py": 18, "test_live_policies.py": 17,
    "test_fidelity_live.py": 16, "test_prefix_caching.py": 15, "test_report_sentences.py": 15,
    "test_serve_live.py": 14, "test_serving_properties.py": 14, "test_bundle.py": 13,
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
