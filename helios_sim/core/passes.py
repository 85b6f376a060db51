"""The compiler passes for the loop's functions: only those that numbers, records and arrays need.

Numba's default passes also look for closures, contexts, exceptions, constants to fold, array expressions, parallel
loops and objects to be freed, of which the loop has none, and annotate every type for people to read. They also make
machine code of each function together with all that it calls, while only the outermost function is run here. So the
input of LLVM is collected instead, and linked when all functions are there (`Collected.module`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any


@cache
def compiler_class() -> Any:
    """Return a `pipeline_class` for `numba.njit`. The library of a compiled function has a method `module`."""
    compiler: Any = import_module("numba.core.compiler")
    machinery: Any = import_module("numba.core.compiler_machinery")
    untyped: Any = import_module("numba.core.untyped_passes")
    typed: Any = import_module("numba.core.typed_passes")
    codegen: Any = import_module("numba.core.codegen")
    llvm: Any = import_module("llvmlite.binding")

    class Collected(codegen.CodeLibrary):  # type: ignore[misc]
        """The LLVM code of one function, and the libraries of the functions that it calls."""

        def __init__(self, of: Any, name: str) -> None:
            super().__init__(of, name)
            self._texts: list[str] = []
            self._called: list[Any] = []

        def add_ir_module(self, ir_module: Any) -> None:
            self._texts.append(str(ir_module))

        def add_linking_library(self, library: Any) -> None:
            own = isinstance(library, Collected)
            self._called.append(library if own else library._get_module_for_linking())  # of Numba's own functions

        def finalize(self) -> None:
            """Do nothing: code is linked when all functions are there."""

        def get_pointer_to_function(self, name: str) -> int:
            return 0  # the function is not loaded into this process

        @property
        def codegen(self) -> Any:
            return self  # callers only use `set_env` of it

        def set_env(self, name: str, env: Any) -> None:
            """Do nothing: the machine code uses no Python objects."""

        def module(self) -> Any:
            """Return the function and all that it calls, directly or not, as one LLVM module."""
            whole = llvm.parse_assembly("")
            for part in self._parts(set()):
                whole.link_in(part)
            return whole

        def _parts(self, seen: set[Any]) -> Iterator[Any]:
            seen.add(self)
            yield from map(llvm.parse_assembly, self._texts)  # first, so that Numba's are linked only if called
            for library in self._called:
                if library in seen:
                    continue
                if isinstance(library, Collected):
                    yield from library._parts(seen)
                else:
                    seen.add(library)
                    yield library.clone()

        def _get_module_for_linking(self) -> Any:
            return self.module()

        def get_function(self, name: str) -> Any:
            return self.module().get_function(name)

        def get_llvm_str(self) -> str:
            return str(self.module())

        def get_asm_str(self) -> str:
            raise NotImplementedError  # machine code exists only for the whole module

    class Lowering(typed.NativeLowering):  # type: ignore[misc]
        _name = "collected_lowering"

        def run_pass(self, state: Any) -> Any:
            state.library = Collected(state.targetctx.codegen(), state.func_id.func_qualname)
            return super().run_pass(state)

    machinery.register_pass(mutates_CFG=True, analysis_only=False)(Lowering)
    steps = (
        untyped.TranslateByteCode, untyped.FixupArgs, untyped.IRProcessing,
        untyped.ReconstructSSA, typed.NopythonTypeInference, typed.PreLowerStripPhis,
        Lowering, typed.NoPythonBackend,
    )  # fmt: skip

    class Plain(compiler.CompilerBase):  # type: ignore[misc]
        def define_pipelines(self) -> list[Any]:
            passes = machinery.PassManager("plain")
            for step in steps:
                passes.add_pass(step, step.__name__)
            passes.finalize()
            return [passes]

    return Plain
