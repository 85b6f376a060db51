"""Where designs run: in this process, in several here, or on a Ray cluster. Knows no design's meaning.

Whatever runs them, each design is computed by the same function from the same input, so the results are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from helios_sim.errors import UserError
from helios_sim.study.job import Job
from helios_sim.sweep.evaluate import evaluate
from helios_sim.sweep.journal import Outcome
from helios_sim.sweep.schema import DesignsConfig

Evaluate = Callable[[Sequence[Job]], Outcome]
MOST_ROUNDS = 5  # of starting again with what was lost to machines that went away


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
        self._started_ray: Any = None
        if config.backend != "serial":
            self._joblib = need("joblib", "sweep.backend", config.backend)
        if config.backend == "ray":
            self._ray = need("ray", "sweep.backend", config.backend)
            self._connect()

    def __call__(self, designs: Mapping[str, Sequence[Job]]) -> Iterator[tuple[str, Outcome]]:
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
        """Ends a Ray cluster that was started for this sweep; one that was there before stays."""
        if self._started_ray is not None:
            self._started_ray.shutdown()
            self._started_ray = None

    def _processes(self, designs: Mapping[str, Sequence[Job]]) -> Iterator[tuple[str, Outcome]]:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        workers = min(self._config.workers or os.cpu_count() or 1, max(len(designs), 1))
        try:
            yield from self._parallel(designs, self._joblib.Parallel(
                n_jobs=workers, backend="loky", batch_size=1, return_as="generator_unordered"
            ))  # fmt: skip
        except TerminatedWorkerError as error:
            allowed = "a process was killed from outside, most often for want of memory; finished designs are kept"
            fix = "start again in the same hydra.run.dir with fewer, such as sweep.workers=1"
            raise UserError("sweep.workers", workers, allowed, fix) from error

    def _cluster(self, designs: Mapping[str, Sequence[Job]]) -> Iterator[tuple[str, Outcome]]:
        """An actor that goes down with its node is started on another, and its designs run again there."""
        from ray.exceptions import RayError

        options = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
        missing = dict(designs)
        for _ in range(MOST_ROUNDS):
            cpus = int(self._ray.cluster_resources().get("CPU", 1))
            workers = max(1, min(self._config.workers or cpus, cpus, len(missing)))
            try:
                with self._joblib.parallel_config("ray", n_jobs=workers, ray_remote_args=options):
                    parallel = self._joblib.Parallel(batch_size=1, return_as="generator_unordered")
                    for key, outcome in self._parallel(missing, parallel):
                        del missing[key]
                        yield key, outcome
                return
            except RayError as error:
                lost = error
        allowed = f"the cluster failed {MOST_ROUNDS} times ({type(lost).__name__}); finished designs are kept"
        raise UserError("sweep.backend", "ray", allowed, "look at the cluster, then start again in the same folder")

    def _parallel(self, designs: Mapping[str, Sequence[Job]], parallel: Any) -> Iterator[tuple[str, Outcome]]:
        delayed = self._joblib.delayed(_one)
        yield from parallel(delayed(self._run, key, jobs) for key, jobs in list(designs.items()))

    def _connect(self) -> None:
        import_module("ray.util.joblib").register_ray()
        if self._ray.is_initialized():
            return
        address = self._config.address
        try:
            self._ray.init(
                address=address, log_to_driver=False, include_dashboard=False if self._starts() else None,
                num_cpus=self._config.workers if self._starts() else None,
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = f"no Ray cluster can be reached there: {str(error).splitlines()[0]}"
            fix = "correct it, or leave it out to start one here"
            raise UserError("sweep.address", address, reason, fix) from error
        self._started_ray = self._ray

    def _starts(self) -> bool:
        return self._config.address in (None, "local") and "RAY_ADDRESS" not in os.environ


def _one(run: Evaluate, key: str, jobs: Sequence[Job]) -> tuple[str, Outcome]:
    return key, run(jobs)
