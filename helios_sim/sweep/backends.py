"""Where designs run: in this process, in several here, or on a Ray cluster. Knows no design's meaning.

Whatever runs them, each design is computed by the same function from the same input, so the results are the same.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from time import sleep
from types import ModuleType
from typing import Any

from helios_sim.errors import UserError
from helios_sim.study.job import Job
from helios_sim.sweep.evaluate import evaluate
from helios_sim.sweep.journal import Outcome
from helios_sim.sweep.schema import DesignsConfig

# Workers that ask for no processor at all are put on one node; those that ask for half of one still find room when a
# part of the cluster is gone before anybody has noticed.
SPREAD = {"num_cpus": 0.5, "scheduling_strategy": "SPREAD"}

Evaluate = Callable[[Sequence[Job]], Outcome]
FEEDER_S = 2.0  # that a thread with nothing left to do has for its end
MOST_IN_VAIN = 5  # times that a cluster may fail, one after the other, without a design in between


def need(name: str, key: str, value: object) -> ModuleType:
    """The library, or a UserError that names the extra."""
    try:
        return import_module(name)
    except ImportError as error:
        library = name.split(".")[0]
        allowed = f"needs {library}, which is not installed"
        fix = "install the extra: make sweep, or pip install 'helios-llm-sim[sweep]'"
        raise UserError(key, value, allowed, fix) from error


class Workers:
    """Runs designs where the settings say. Processes stay between calls, with what they keep."""

    def __init__(self, config: DesignsConfig, run: Evaluate = evaluate) -> None:
        """UserError where the backend's libraries are missing or its cluster cannot be reached."""
        self._config, self._run = config, run
        self._connected: Any = None
        if config.backend != "serial":
            self._joblib = need("joblib", "sweep.backend", config.backend)
        if config.backend == "ray":
            self._ray = need("ray", "sweep.backend", config.backend)
            self._connect()

    def __call__(self, designs: Mapping[str, Sequence[Job]]) -> Generator[tuple[str, Outcome]]:
        """Outcomes by key, in the order in which they come."""
        match self._config.backend:
            case "processes":
                yield from self._processes(designs)
            case "ray":
                yield from self._cluster(designs)
            case _:
                for key, jobs in designs.items():
                    yield key, self._run(jobs)

    def close(self) -> None:
        """Leaves the Ray cluster, which ends it if it was started for this sweep."""
        if self._connected is not None:
            self._connected.shutdown()
            self._connected = None

    def _processes(self, designs: Mapping[str, Sequence[Job]]) -> Iterator[tuple[str, Outcome]]:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        workers = min(self._config.workers or os.cpu_count() or 1, max(len(designs), 1))
        try:
            yield from self._parallel(designs, workers, os.getpid(), backend="loky")
        except TerminatedWorkerError as error:
            allowed = "a process was killed from outside, most often for want of memory; finished designs are kept"
            fix = "start again in the same hydra.run.dir with fewer, such as sweep.workers=1"
            raise UserError("sweep.workers", workers, allowed, fix) from error
        except BaseException:
            _join_feeders()
            raise

    def _cluster(self, designs: Mapping[str, Sequence[Job]]) -> Iterator[tuple[str, Outcome]]:
        """What was lost with a node runs again on those that are left."""
        from ray.exceptions import RayError

        missing, in_vain = dict(designs), 0
        while missing:
            cpus = int(self._ray.cluster_resources().get("CPU", 1))
            workers = max(1, min(self._config.workers or cpus, cpus, len(missing)))
            before = len(missing)
            try:
                with self._joblib.parallel_config("ray", ray_remote_args=SPREAD):
                    for key, outcome in self._parallel(missing, workers, None):
                        del missing[key]
                        yield key, outcome
            except RayError as error:
                in_vain = in_vain + 1 if len(missing) == before else 0
                if in_vain == MOST_IN_VAIN:
                    allowed = f"the cluster does not answer ({type(error).__name__}); finished designs are kept"
                    fix = "look at the cluster, then start again in the same hydra.run.dir"
                    raise UserError("sweep.backend", "ray", allowed, fix) from error

    def _parallel(
        self, designs: Mapping[str, Sequence[Job]], workers: int, parent: int | None, **options: Any
    ) -> Iterator[tuple[str, Outcome]]:
        parallel = self._joblib.Parallel(workers, batch_size=1, return_as="generator_unordered", **options)
        one = self._joblib.delayed(_one)
        yield from parallel(one(self._run, key, jobs, parent) for key, jobs in list(designs.items()))

    def _connect(self) -> None:
        ray_backend = import_module("ray.util.joblib.ray_backend").RayBackend
        # Results as they come: Ray hands them over as joblib's other pools do, which joblib does not know of it.
        streaming = type("RayBackend", (ray_backend,), {"supports_return_generator": True})
        self._joblib.register_parallel_backend("ray", streaming)
        if self._ray.is_initialized():
            return
        address = self._config.address
        own = address in (None, "local") and "RAY_ADDRESS" not in os.environ
        of_own = {"include_dashboard": False, "num_cpus": self._config.workers} if own else {}
        try:
            _knock(address)
            self._ray.init(address=address, log_to_driver=False, logging_level="error", **of_own)
        except (OSError, ValueError, RuntimeError) as error:
            reason = f"no Ray cluster can be reached there: {str(error).splitlines()[0]}"
            fix = "correct it, or leave it out to start one here"
            raise UserError("sweep.address", address, reason, fix) from error
        self._connected = self._ray


def _knock(address: str | None) -> None:
    """OSError where nothing listens at HOST:PORT, which Ray would wait minutes for."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=5).close()


def _one(run: Evaluate, key: str, jobs: Sequence[Job], parent: int | None) -> tuple[str, Outcome]:
    if parent is not None and parent != os.getpid():
        _follow(parent)
    return key, run(jobs)


def _join_feeders() -> None:
    """joblib waits for its processes when it stops half-way, but not for the thread that feeds their queue. That one
    gives semaphores back as it ends; an interpreter that ends earlier complains that they leak.
    """
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":
            thread.join(FEEDER_S)


@cache
def _follow(parent: int) -> None:
    """A process of ours leaves interrupts to its parent, and does not outlive it: joblib's would wait for minutes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        sleep(1.0)
    os._exit(1)
