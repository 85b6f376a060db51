"""The steps in which Numba compiles the loop's functions: those that numbers, records and arrays need.

Numba's own also look for closures, contexts, exceptions, constants to fold, array expressions and parallel loops, of
which the loop has none, and write down every type for people to read.
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

    class Plain(compiler.CompilerBase):  # type: ignore[misc]
        def define_pipelines(self) -> list[Any]:
            passes = machinery.PassManager("plain")
            for step in steps:
                passes.add_pass(step, step.__name__)
            passes.finalize()
            return [passes]

    return Plain
