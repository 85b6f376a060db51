"""A sweep on a real Ray cluster of nodes here, which are killed in the middle: one of them, then the last."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from command_line import write_study
from helios_sim.errors import UserError
from helios_sim.report.designs import designs_table
from helios_sim.study.designs import plan_sweep
from helios_sim.study.sweep import run_plan, sweep
from helios_sim.vary.axis import AxisConfig
from sweep_example import example
from test_kills import SWEEP

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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder from which the cluster's processes import."""
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def cluster(place):
    """A head that does no work, and two machines that do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place))
        patch.syspath_prepend(place)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield from _cluster(place)


SOON_NOTICED = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


def _cluster(place):
    from ray.cluster_utils import Cluster

    (place / "held_on_nodes.py").write_text(HELD)
    small: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
    for attempt in range(3):  # Ray gives a node 30 s to start, which a busy machine may not keep
        cluster = Cluster(initialize_head=False)
        try:
            head = {**small, "num_cpus": 0, "_system_config": SOON_NOTICED}
            cluster.add_node(**head, include_dashboard=False)
            addresses = ("127.0.0.2", "127.0.0.3")  # other machines than that of the command
            cluster.workers = [cluster.add_node(**small, node_ip_address=address) for address in addresses]
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


@pytest.fixture
def held_here(place):
    """No design waits, and no file tells of one."""
    for file in (place / "go", *place.glob("waiting_*")):
        file.unlink(missing_ok=True)
    return place


def test_a_node_that_dies_in_the_middle_changes_nothing(cluster, held_here, tmp_path):
    finished_before: list[int] = []
    at_work: set[str] = set()

    def kill() -> None:
        journal = tmp_path / "out" / "finished.jsonl"
        wait_for(lambda: len([f for f in held_here.glob("waiting_*") if f.read_text()]) == 4)
        wait_for(lambda: journal.is_file() and len(journal.read_text().splitlines()) == 4)
        finished_before.append(4)
        at_work.update(file.read_text() for file in held_here.glob("waiting_*"))
        cluster.remove_node(cluster.workers.pop(), allow_graceful=False)
        (held_here / "go").touch()

    (tmp_path / "out").mkdir()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    plan = held(backend="ray", address=cluster.address)
    on_ray = run_plan(plan, tmp_path / "out", {}, lambda task, outcome, kept: None)
    killer.join()
    assert finished_before == [4]
    assert len(at_work) == 2  # both nodes, when one of them was killed
    assert "here" not in {file.read_text() for file in held_here.glob("waiting_*")}  # nor did anything run elsewhere
    assert all(design.error is None for design in on_ray.designs)
    journal = (tmp_path / "out" / "finished.jsonl").read_text().splitlines()
    assert len(journal) == 12 + 1  # each once; the arm as it was set is the first design
    here = run_plan(held(), None, {}, lambda task, outcome, kept: None)
    assert designs_table(on_ray).equals(designs_table(here))


def test_the_last_machine_that_dies_ends_the_sweep_in_one_message_and_what_is_finished_is_kept(
    cluster, held_here, tmp_path, monkeypatch
):
    """After the test above one machine is left to work."""
    monkeypatch.setattr("helios_sim.vary.workers.START_S", 2.0)
    journal = tmp_path / "out" / "finished.jsonl"

    def kill() -> None:
        wait_for(lambda: journal.is_file() and len(journal.read_text().splitlines()) == 4)
        while cluster.workers:
            cluster.remove_node(cluster.workers.pop(), allow_graceful=False)

    (tmp_path / "out").mkdir()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(UserError, match=r"no machine of the cluster is left to work; what is finished is kept"):
        run_plan(held(backend="ray", address=cluster.address), tmp_path / "out", {}, lambda task, outcome, kept: None)
    killer.join()
    (held_here / "go").touch()
    before = journal.read_text()
    resumed = run_plan(held(), tmp_path / "out", {}, lambda task, outcome, kept: None)
    assert before.count("\n") >= 4
    assert journal.read_text().startswith(before)  # and nothing of it is run again:
    assert len(journal.read_text().splitlines()) == 12 + 1
    assert designs_table(resumed).equals(designs_table(run_plan(held(), None, {}, lambda *_: None)))


def test_an_address_where_nothing_answers_is_said():
    with pytest.raises(UserError, match=r"sweep\.address='127\.0\.0\.1:1'"):
        sweep(example(backend="ray", address="127.0.0.1:1"))


def test_without_an_address_a_cluster_of_others_is_left_alone(cluster, tmp_path, repository):
    """Ray joins the cluster of this machine that somebody started last, unless it is told not to."""
    words = (*write_study(tmp_path, SWEEP), "sweep.backend=ray", "sweep.workers=1", f"hydra.run.dir={tmp_path}/out")
    command = [sys.executable, "-m", "helios_sim", *words]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(repository)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
