"""A user's own policy from a module outside the project: importing it, and checking the deployments it returns."""

from __future__ import annotations

import importlib
import inspect
import random
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np

from helios_sim.errors import OwnCodeError, UserError, lacking, text_of
from helios_sim.interrupt import is_asked
from helios_sim.opened import watched
from helios_sim.policy.answers import fault_of
from helios_sim.policy.deployment import Cause, Deployment
from helios_sim.policy.telemetry import Policy, Situation, Telemetry

_SHOWN, _MOST_SAID = 80, 300  # most characters that a message shows of a returned value, and of an error's text
_MOST_NAMES = 20  # most names of a module that a message lists
_NOT_THEIRS = (str(Path(__file__).parents[1]), "<", importlib.__file__ or "")  # prefixes of files not of the user's


@dataclass(frozen=True, slots=True)
class CustomParameters:
    """Settings of `policy=custom`. `object` is "module:Name"; `settings` are the keywords of Name().

    The module must be importable; modules in the current folder are.
    """

    object: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def load_custom(parameters: CustomParameters) -> Policy:
    """Makes an instance of the user's class, with the settings as keywords.

    Raises UserError for a wrong form, a missing module or name, settings that the class does not take, or an object
    without `start` and `decide`. Raises OwnCodeError for any error of the user's own code, here or later.
    """
    module_name, colon, name = parameters.object.partition(":")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise _error(parameters.object, "module:Name", "name a module and a class in it, such as my_policy:MyPolicy")
    parents = [".".join(module_name.split(".")[: i + 1]) for i in range(module_name.count(".") + 1)]
    with _own_code(parameters.object, f"importing {module_name}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name not in parents:
                raise  # the user's module exists and misses something itself
            fix = "run from the folder that holds it, or add that folder to PYTHONPATH"
            if module_name.endswith(".py"):
                fix = f"name the module, not its file: {module_name.removesuffix('.py')}:{name}"
            raise _error(parameters.object, f"there is no module {error.name}", fix) from None
    if not hasattr(module, name):
        names = [key for key in vars(module) if not key.startswith("_")]
        own = [key for key in names if getattr(vars(module)[key], "__module__", module_name) == module_name]
        public = ", ".join(sorted(own or names)[:_MOST_NAMES]) or "nothing"
        of_python = module_name.split(".")[0] in sys.stdlib_module_names
        fix = f"rename your file: {module_name} is a module of Python's own" if of_python else "correct the name"
        raise _error(parameters.object, f"module {module_name} has {public}", fix)
    made = getattr(module, name)
    if isinstance(made, type) or callable(made):
        try:
            inspect.signature(made).bind(**parameters.settings)
        except TypeError as error:
            allowed = f"{name}() does not take the settings {sorted(parameters.settings)}: {error}"
            raise _error(parameters.object, allowed, "correct policy.settings or the class") from None
        with _own_code(parameters.object, f"{name}()"):
            made = made(**parameters.settings)
    with _own_code(parameters.object, f"{name}.start or {name}.decide"):  # they may be properties
        missing = [method for method in ("start", "decide") if not callable(getattr(made, method, None))]
    if missing:
        allowed = "a policy has start(situation) and decide(cause, telemetry)"
        raise _error(parameters.object, allowed, f"add {' and '.join(missing)} to {name}")
    return _Checked(made, parameters.object)


class _Checked:
    """A user's policy with checked results: UserError for a deployment that the server cannot carry out."""

    def __init__(self, policy: Policy, name: str) -> None:
        self._policy, self._name = policy, name

    @property
    def name(self) -> str:
        """The name of the policy in the settings, "module:Name"."""
        return self._name

    def start(self, situation: Situation) -> Deployment:
        self._situation = situation
        random.seed(situation.seed)  # for a policy that draws without a generator of its own
        np.random.seed(situation.seed % 2**32)  # noqa: NPY002 - this one
        with _own_code(self._name, "start()", self._policy, "start"):
            found = self._policy.start(situation)
        return self._checked("start", found)

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        with _own_code(self._name, "decide()", self._policy, "decide"):
            found = self._policy.decide(cause, telemetry)
        return None if found is None else self._checked("decide", found)

    def _checked(self, method: str, found: object) -> Deployment:
        if not isinstance(found, Deployment):
            wanted = "start() returns a Deployment, decide() a Deployment or None"
            allowed = f"{method}() returned {_short(found)}; {wanted}"
            raise _error(self._name, allowed, f"return one from {method}()")
        with _own_code(self._name, f"what {method}() returned", self._policy, method):  # its fields may be code
            fault = fault_of(found, self._situation)
        if fault is not None:
            field_name, value, wanted = fault
            allowed = f"{method}() returned a Deployment with {field_name}={_short(value)}, which must be {wanted}"
            of_numpy = "np." in _short(value)
            fix = f"correct {field_name}{', with int() or float() around what NumPy gives' if of_numpy else ''}"
            raise _error(self._name, allowed, fix)
        return found


@contextmanager
def _own_code(name: str, what: str, policy: object = None, method: str = "") -> Iterator[None]:
    """Turns an error of the user's code into an OwnCodeError that names the code, with file and line.

    `policy` and `method` are the code that is called. Its definition is named if none of its lines was reached.

    Signals, a lack of memory or disk space, and this program's own UserErrors pass unchanged. Files that the code reads
    are noted, since the result depends on them.
    """
    try:
        with watched(name):
            yield
    except UserError:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        if is_asked() or isinstance(error, BrokenPipeError) or lacking(error) is not None:
            raise
        said = " ".join((str(error.msg) if isinstance(error, SyntaxError) else text_of(error)).split())
        told = f"{type(error).__name__}: {said}" if said else type(error).__name__
        told = told if len(told) <= _MOST_SAID else f"{told[: _MOST_SAID - 3]}..."
        place = _place(error, policy, method)
        allowed = f"{what} raised {told}{f' ({place})' if place else ''}"
        raise OwnCodeError("policy.object", name, allowed, "mend the policy") from error


def _place(error: BaseException, policy: object, method: str) -> str:
    """File and line of the innermost code that is neither this program's nor the import system's.

    If there is none, for instance since the method does not take the arguments, the place of the method's definition;
    an empty text if that is not known either.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
    if theirs:
        return f"{theirs[-1].filename}, line {theirs[-1].lineno}, in {theirs[-1].name}"
    with suppress(Exception):  # attributes of a user's object may run code, and raise
        code = getattr(policy, method).__code__
        if isinstance(code, CodeType):
            return f"{code.co_filename}, line {code.co_firstlineno}"
    return ""


def _short(value: object) -> str:
    with suppress(Exception):  # the user's own __repr__ may raise
        text = repr(value)
        return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
    return f"a {type(value).__name__}"


def _error(value: object, allowed: str, fix: str) -> UserError:
    return UserError("policy.object", value, allowed, fix)
