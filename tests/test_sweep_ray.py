"""A sweep on a real Ray cluster of two nodes here, one of which is killed in the middle."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from helios_sim.errors import UserError
from helios_sim.report.designs import designs_table
from helios_sim.study.designs import plan_sweep
from helios_sim.study.sweep import run_plan, sweep
from helios_sim.vary.axis import AxisConfig
from sweep_example import example

pytest.importorskip("ray", reason="the extra sweep is not installed")

pytestmark = pytest.mark.slow

HELD = """
import time
from pathlib import Path
import ray
from helios_sim.policy.early_exit import EarlyExitParameters, EarlyExitPolicy

class Held(EarlyExitPolicy):
    '''From the fourth design on, waits for a file, so that a node can be killed while both work.'''
    def __init__(self, number=0):
        super().__init__(EarlyExitParameters(threshold=0.9, batch_limit=1 + number))
        self.number = number
    def start(self, situation):
        folder = Path(__file__).parent
        if self.number >= 4:
            node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
            (folder / f"waiting_{self.number}").write_text(node)
            while not (folder / "go").exists():
                time.sleep(0.02)
        return super().start(situation)
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    (tmp_path / "held_on_nodes.py").write_text(HELD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the cluster's processes
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    small: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
    for attempt in range(3):  # Ray gives a node 30 s to start, which a busy machine may not keep
        cluster = Cluster(initialize_head=False)
        try:
            cluster.add_node(**small, include_dashboard=False)
            cluster.second = cluster.add_node(**small)
            cluster.wait_for_nodes()
            break
        except Exception:
            cluster.shutdown()
            if attempt == 2:
                raise
    yield cluster
    cluster.shutdown()


def held(**settings: Any) -> Any:
    base = example(
        parameters={"number": AxisConfig(settings=["arms.helios.settings.number"], values=list(range(12)))},
        objectives=["throughput_requests_per_s", "e2e_s_p99"],
        **settings,
    )
    arm = {"policy": "custom", "object": "held_on_nodes:Held", "settings": {"number": 0}}
    return plan_sweep(replace(base, arms={**base.arms, "helios": arm}))


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_node_that_dies_in_the_middle_changes_nothing(cluster, tmp_path):
    finished_before: list[int] = []
    at_work: set[str] = set()

    def kill() -> None:
        journal = tmp_path / "out" / "finished.jsonl"
        wait_for(lambda: len([f for f in tmp_path.glob("waiting_*") if f.read_text()]) == 4)
        wait_for(lambda: journal.is_file() and len(journal.read_text().splitlines()) == 4)
        finished_before.append(4)
        at_work.update(file.read_text() for file in tmp_path.glob("waiting_*"))
        cluster.remove_node(cluster.second, allow_graceful=False)
        (tmp_path / "go").touch()

    (tmp_path / "out").mkdir()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    plan = held(backend="ray", address=cluster.address)
    on_ray = run_plan(plan, tmp_path / "out", {}, lambda task, outcome, kept: None)
    killer.join()
    assert finished_before == [4]
    assert len(at_work) == 2  # both nodes, when one of them was killed
    assert "here" not in {file.read_text() for file in tmp_path.glob("waiting_*")}  # nor did anything run elsewhere
    assert all(design.error is None for design in on_ray.designs)
    journal = (tmp_path / "out" / "finished.jsonl").read_text().splitlines()
    assert len(journal) == 12 + 1  # each once; the arm as it was set is the first design
    here = run_plan(held(), None, {}, lambda task, outcome, kept: None)
    assert designs_table(on_ray).equals(designs_table(here))


def test_an_address_where_nothing_answers_is_said():
    with pytest.raises(UserError, match=r"sweep\.address='127\.0\.0\.1:1'"):
        sweep(example(backend="ray", address="127.0.0.1:1"))
