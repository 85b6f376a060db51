"""Workers run tasks: in this process, in several local ones (by joblib, or as forks), or on a Ray cluster.

Whatever runs them, each task is computed by the same function from the same input, so the results are the same.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from secrets import token_hex
from subprocess import PIPE, Popen
from time import sleep
from types import ModuleType
from typing import Any, TypeVar

from helios_sim.errors import UserError
from helios_sim.interrupt import TimeIsUp, at_most, handlers_kept
from helios_sim.untrusted import in_short
from helios_sim.vary import guard
from helios_sim.vary.forks import ForkEnded, Forks

BACKENDS = ("serial", "processes", "ray")
FORKS = "forks"  # used by studies alone; no setting names it
# Workers that ask for no processor at all are put on one node. Workers that ask for half of one still find room when
# a part of the cluster is gone before Ray has noticed.
SPREAD = {"num_cpus": 0.5, "scheduling_strategy": "SPREAD"}
FEEDER_S = 2.0  # longest wait for a thread that has nothing left to do
# Makes Ray listen on 127.0.0.1 alone, as it does by default on some systems; Ray reads it when it is imported.
ON_THIS_MACHINE = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# Ray's agents write their titles over their environments, where the guard looks for its mark, unless this is set.
MARK_STAYS = ("SPT_NOENV", "1")
START_S = 60.0  # time for workers of a cluster to start, before a check whether any machine is left
MOST_IN_VAIN = 5  # times in a row that a cluster may fail without finishing a task

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class Place:
    """A place for tasks to run. `setting` names the number of workers in messages."""

    backend: str = "serial"
    workers: int | None = None  # None: one for each core, of this machine or of the cluster
    address: str | None = None  # of a running Ray cluster; None: RAY_ADDRESS, else one is started here
    setting: str = "sweep.workers"


def need(name: str, key: str, value: object) -> ModuleType:
    """Import and return the library. Raises a UserError that names the extra if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        library = name.split(".")[0]
        allowed = f"needs {library}, which is not installed"
        fix = "install the extra: make sweep, or pip install 'helios-llm-sim[sweep]'"
        raise UserError(key, value, allowed, fix) from error


class _NotStarted(Exception):
    """The workers of a cluster did not start."""


class Workers:
    """Runs tasks at a place. Processes stay between calls, with their caches."""

    def __init__(self, place: Place) -> None:
        """Connect to the place. UserError if the backend's libraries are missing or its cluster cannot be reached."""
        self._place = place
        self._connected: Any = None
        self._guard: Popen[bytes] | None = None  # ends the processes of a cluster that was started here
        if place.backend == "ray":
            self._own = place.address in (None, "local") and "RAY_ADDRESS" not in os.environ
            if self._own:
                os.environ.setdefault(*ON_THIS_MACHINE)
                os.environ.setdefault(*MARK_STAYS)
            self._ray = need("ray", "sweep.backend", place.backend)
            self._connect()

    def __call__(self, function: Callable[[_In], _Out], inputs: Mapping[str, _In]) -> Generator[tuple[str, _Out]]:
        """Yield keys and results as they come. Raises the first error of a task and ends the other tasks."""
        wanted = min(self._place.workers or os.cpu_count() or 1, len(inputs))
        if self._place.backend == "ray":
            yield from self._cluster(function, inputs)
        elif self._place.backend == "processes" and wanted > 1:
            yield from self._processes(function, inputs, wanted)
        elif self._place.backend == FORKS and wanted > 1:
            yield from self._forks(function, inputs, wanted)
        else:
            for key, value in inputs.items():
                yield key, function(value)

    def close(self) -> None:
        """Leave the Ray cluster, which ends it if it was started for these tasks."""
        if self._connected is not None:
            self._connected.shutdown()
            self._connected = None
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None

    def _processes(
        self, function: Callable[[_In], _Out], inputs: Mapping[str, _In], workers: int
    ) -> Iterator[tuple[str, _Out]]:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        try:
            yield from _parallel(
                function, inputs, workers, backend="loky", max_nbytes=None, initializer=_follow, initargs=(os.getpid(),)
            )
        except TerminatedWorkerError as error:
            raise self._killed(workers) from error
        except BaseException:
            _join_feeders()
            raise

    def _forks(
        self, function: Callable[[_In], _Out], inputs: Mapping[str, _In], workers: int
    ) -> Iterator[tuple[str, _Out]]:
        with _without_interrupts():
            forks = Forks(function, list(inputs.values()), workers, _follow)
        with closing(forks):
            try:
                yield from zip(inputs, forks.results(), strict=True)
            except ForkEnded as error:
                raise self._killed(workers) from error

    def _killed(self, workers: int) -> UserError:
        setting = self._place.setting
        allowed = "a process was killed from outside, most often for want of memory; what is finished is kept"
        fix = f"start again in the same hydra.run.dir with fewer, such as {setting}=1"
        return UserError(setting, workers, allowed, fix)

    def _cluster(self, function: Callable[[_In], _Out], inputs: Mapping[str, _In]) -> Iterator[tuple[str, _Out]]:
        """Run tasks on the cluster; tasks that were lost with a node run again on the nodes that are left."""
        from joblib import parallel_config
        from ray.exceptions import RayError

        missing, in_vain = dict(inputs), 0
        while missing:
            cpus = int(self._ray.cluster_resources().get("CPU", 0))
            if not cpus:
                allowed = "no machine of the cluster is left to work; what is finished is kept"
                fix = "add machines to the cluster, then start again in the same hydra.run.dir"
                raise UserError("sweep.backend", "ray", allowed, fix)
            workers = min(self._place.workers or cpus, cpus, len(missing))
            before = len(missing)
            try:
                with parallel_config("ray", ray_remote_args=SPREAD):
                    for key, result in self._started(function, missing, workers):
                        del missing[key]
                        yield key, result
            except _NotStarted:  # wait for other work that has all processors, or machines were just lost
                continue
            except RayError as error:
                in_vain = in_vain + 1 if len(missing) == before else 0
                if in_vain == MOST_IN_VAIN:
                    allowed = f"the cluster does not answer ({type(error).__name__}); what is finished is kept"
                    fix = "look at the cluster, then start again in the same hydra.run.dir"
                    raise UserError("sweep.backend", "ray", allowed, fix) from error

    def _started(
        self, function: Callable[[_In], _Out], inputs: Mapping[str, _In], workers: int
    ) -> Iterator[tuple[str, _Out]]:
        """Return results as they come. _NotStarted if workers found no room, or fewer processors than before."""
        try:
            with at_most(START_S):
                return _parallel(function, inputs, workers)
        except TimeIsUp as error:
            raise _NotStarted from error
        except (ValueError, KeyError) as error:
            if int(self._ray.cluster_resources().get("CPU", 0)) >= workers:
                raise
            raise _NotStarted from error

    def _connect(self) -> None:
        from joblib import register_parallel_backend

        ray_backend = import_module("ray.util.joblib.ray_backend").RayBackend
        # Results as they come: Ray hands them over like joblib's other pools, but does not declare it to joblib.
        streaming = type("RayBackend", (ray_backend,), {"supports_return_generator": True})
        register_parallel_backend("ray", streaming)
        if self._ray.is_initialized():
            return
        address = self._place.address
        of_own = {"include_dashboard": False, "num_cpus": self._place.workers} if self._own else {}
        try:
            _knock(address)
            with self._guarded(), handlers_kept():
                # Without an address Ray would join the cluster that was started last on this machine.
                at = "local" if self._own else address
                self._ray.init(address=at, log_to_driver=False, logging_level="error", **of_own)
        except Exception as error:  # Ray raises plain exceptions too, as when a node does not start in time
            reason = f"no Ray cluster can be reached there: {in_short(error)}"
            fix = "correct it, or leave it out to start one here"
            raise UserError("sweep.address", address, reason, fix) from error
        self._connected = self._ray

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Make sure that a cluster started inside does not outlive this process, even if the process is killed."""
        if not self._own:
            yield
            return
        mark = f"{os.getpid()}.{token_hex(8)}"
        words = [sys.executable, "-m", guard.__name__, mark]
        self._guard = Popen(words, stdin=PIPE, start_new_session=True)  # noqa: S603 - words of our own, no shell
        os.environ[guard.VARIABLE] = mark
        try:
            yield
        except BaseException:
            self.close()
            raise
        finally:
            del os.environ[guard.VARIABLE]


def _parallel(
    function: Callable[[_In], _Out],
    inputs: Mapping[str, _In],
    workers: int,
    **options: Any,
) -> Iterator[tuple[str, _Out]]:
    """Return an iterator of results as they come; the workers have started when this returns."""
    from joblib import Parallel, delayed

    parallel = Parallel(workers, batch_size=1, return_as="generator_unordered", **options)
    with _without_interrupts():
        results: Iterator[tuple[str, _Out]] = parallel(
            delayed(_one)(function, key, value) for key, value in list(inputs.items())
        )
    return results


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Keep the terminal's Ctrl-C from processes that are started inside; their parent handles it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _one(function: Callable[[_In], _Out], key: str, value: _In) -> tuple[str, _Out]:
    return key, function(value)


def _knock(address: str | None) -> None:
    """Raise OSError if nothing listens at HOST:PORT; Ray would wait for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=5).close()


def _join_feeders() -> None:
    """Wait for the thread that feeds the queue of joblib's processes, which joblib does not when it stops half-way.

    The thread gives semaphores back as it ends; an interpreter that ends earlier complains that they leak.
    """
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":
            thread.join(FEEDER_S)


def _follow(parent: int) -> None:
    """Let a worker process leave interrupts to its parent and end with it, however the parent ends.

    joblib's own processes would wait for minutes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        sleep(0.5)
    os._exit(1)
