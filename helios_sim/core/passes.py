"""The steps in which Numba compiles the loop's functions: those that numbers, records and arrays need.

Numba's own also look for closures, contexts, exceptions, constants to fold, array expressions, parallel loops and
objects to be freed, of which the loop has none, and write down every type for people to read. And they make machine
code of each function with all that it calls, where all that is ever run here is the one that calls the others: so what
LLVM is to compile is collected, and put together when all of it is there (`Collected.module`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any


@cache
def compiler_class() -> Any:
    """What `numba.njit` takes as `pipeline_class`. The library of what it compiles has a method `module`."""
    compiler: Any = import_module("numba.core.compiler")
    machinery: Any = import_module("numba.core.compiler_machinery")
    untyped: Any = import_module("numba.core.untyped_passes")
    typed: Any = import_module("numba.core.typed_passes")
    codegen: Any = import_module("numba.core.codegen")
    llvm: Any = import_module("llvmlite.binding")

    class Collected(codegen.CodeLibrary):  # type: ignore[misc]
        """What LLVM is to compile of one function, and the libraries of those that it calls."""

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
            """There is nothing to do before all functions are there."""

        def get_pointer_to_function(self, name: str) -> int:
            return 0  # it is nowhere in this process

        @property
        def codegen(self) -> Any:
            return self  # of which all that is wanted is the next

        def set_env(self, name: str, env: Any) -> None:
            """For objects that machine code uses."""

        def module(self) -> Any:
            """The function and all that it calls, directly or not, as one module of LLVM."""
            whole = llvm.parse_assembly("")
            for part in self._parts(set()):
                whole.link_in(part)
            return whole

        def _parts(self, seen: set[Any]) -> Iterator[Any]:
            seen.add(self)
            yield from map(llvm.parse_assembly, self._texts)  # first: of Numba's own only what is called is taken
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
            raise NotImplementedError  # of a part there is none: machine code is emitted of the whole

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
