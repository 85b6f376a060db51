"""The steps in which Numba compiles the loop's functions: those that numbers, records and arrays need.

Numba's own also look for closures, contexts, exceptions, constants to fold, array expressions and parallel loops, of
which the loop has none. They write down every type for people to read, and after each step look whether it has left a
function as it should be.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def compiler_class() -> Any:
    """What `numba.njit` takes as `pipeline_class`."""
    compiler: Any = import_module("numba.core.compiler")
    machinery: Any = import_module("numba.core.compiler_machinery")
    untyped: Any = import_module("numba.core.untyped_passes")
    typed: Any = import_module("numba.core.typed_passes")
    steps = (
        untyped.TranslateByteCode, untyped.FixupArgs, untyped.IRProcessing, untyped.GenericRewrites,
        untyped.ReconstructSSA, typed.NopythonTypeInference, typed.PreLowerStripPhis, typed.IRLegalization,
        typed.NativeLowering, typed.NoPythonBackend,
    )  # fmt: skip

    class Steps(machinery.PassManager):  # type: ignore[misc]
        def _runPass(self, index: int, step: Any, state: Any) -> None:
            step.analysis = self._analysis
            for part in (step.run_initialization, step.run_pass, step.run_finalizer):
                part(state)

    class Plain(compiler.CompilerBase):  # type: ignore[misc]
        def define_pipelines(self) -> list[Any]:
            passes = Steps("plain")
            for step in steps:
                passes.add_pass(step, step.__name__)
            passes.finalize()
            return [passes]

    return Plain
