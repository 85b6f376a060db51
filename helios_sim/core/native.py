"""Calls the compiled loop without Numba: LLVM alone loads its object code.

Importing Numba and loading its cache takes longer than simulating ten thousand requests. So the loop is compiled behind
an entry point that takes the places of its arrays (`places`), and the object code is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import CDLL, CFUNCTYPE, byref, c_int32, c_int64, c_void_p, cast
from importlib import import_module
from typing import Any

import numpy as np

from helios_sim.core.passes import compiler_class
from helios_sim.core.places import NUMBERS, arrays_of, group_type, place_of

NAME = "entry"


def processor() -> str:
    """Return a description of the processor and its features, on which object code depends."""
    from llvmlite import binding

    return " ".join(
        (binding.get_process_triple(), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())
    )


def compiled(function: Callable[..., Any], kinds: Sequence[Any]) -> bytes:
    """Compile `function` for arguments of these types (`places`), to be called with their places in one array.

    Returns a line with the names of the entry point and of the functions that it may call, then the object code.
    """
    numba: Any = import_module("numba")
    fields = {f"arg_{n}": kind for n, kind in enumerate(kinds)}
    names: dict[str, Any] = {"function": function}
    call = f"function({', '.join(f'args.{field}' for field in fields)})"
    exec(f"def {NAME}(args):\n    return {call}", names)  # noqa: S102 - text made above, of no input
    signature = numba.types.int64(group_type("args", fields))
    made = numba.cfunc(signature, error_model="numpy", _nrt=False, pipeline_class=compiler_class())(names[NAME])
    symbol = made.native_name.removeprefix("cfunc.")  # the function behind the wrapper, which returns a status
    code, called = _emitted(made._library.module(), symbol)
    return " ".join([symbol, *called]).encode() + b"\n" + code


def _emitted(module: Any, symbol: str) -> tuple[bytes, list[str]]:
    """Return the object code of a function with all that it calls, and the names of functions outside the module."""
    from llvmlite import binding

    for function in module.functions:
        if not function.is_declaration and function.name != symbol:
            function.linkage = "linkonce_odr"  # dropped if it is not called
    options = binding.create_pipeline_tuning_options(speed_level=1)
    # These make compiling half as long again, and the loop no faster.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    machine = _machine()
    module.data_layout = str(machine.target_data)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    wanting = [it.name for it in module.functions if it.is_declaration and not it.name.startswith("llvm.")]
    return machine.emit_object(module), wanting


def _machine() -> Any:
    """Return LLVM's target machine for code that runs in a process of this machine, as Numba makes it."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    triple = binding.get_process_triple()
    return binding.Target.from_triple(triple).create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=1,
        reloc="static" if triple.startswith("x86") else "default", jit=True,
    )  # fmt: skip


class Native:
    """Object code that is loaded into this process."""

    def __init__(self, code: bytes) -> None:
        from llvmlite import binding

        names, content = code.split(b"\n", 1)
        symbol, *called = names.decode().split()
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        process = CDLL(None)
        for name in called:  # Numba's functions for errors and reference counts, which the loop never calls
            if not hasattr(process, name) and binding.address_of_symbol(name) is None:
                binding.add_symbol(name, cast(process.abort, c_void_p).value)
        machine = binding.Target.from_default_triple().create_target_machine()
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)  # owns the code
        self._engine.add_object_file(binding.ObjectFileRef.from_data(content))
        self._engine.finalize_object()
        address = self._engine.get_function_address(symbol)
        self.run = CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p)(address)


class Call:
    """The loaded function for one caller. Keeps the places of the arrays of its last call."""

    def __init__(self, native: Native) -> None:
        self._native, self._run = native, native.run
        self._known: list[Any] = []  # arguments of the last call, kept so that their arrays are not freed
        self._first: list[int] = []  # for each argument, the place of its first array
        self._result, self._error = c_int64(), c_void_p()
        self._places: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> int:
        if not self._known:
            self._lay_out(args)
        for number, known in enumerate(self._known):
            if args[number] is not known:
                self._note(number, args[number])
        status = self._run(*self._places)
        if status:
            raise RuntimeError(f"the compiled loop ended with status {status}")
        return self._result.value

    def _lay_out(self, args: Sequence[Any]) -> None:
        arrays = 0
        for arg in args:
            self._first.append(arrays)
            arrays += sum(1 for _ in arrays_of(arg))
        self._written = np.zeros((arrays, NUMBERS), np.int64)
        self._places = byref(self._result), byref(self._error), self._written.ctypes.data
        self._known = [None] * len(args)

    def _note(self, number: int, arg: Any) -> None:
        for at, array in enumerate(arrays_of(arg), self._first[number]):
            self._written[at] = place_of(array)
        self._known[number] = arg
