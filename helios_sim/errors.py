"""The error for mistakes that a user can mend, and range checks that raise it. Every module may use them."""

from __future__ import annotations

import errno
import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from numbers import Integral
from typing import Any


class UserError(ValueError):
    """One clear message: the key, the value, what is allowed and the fix.

    The command line prints the message without a traceback and exits with status 1.
    """

    def __init__(self, key: str, value: object, allowed: str, fix: str) -> None:
        self.key, self.value, self.allowed, self.fix = key, value, allowed, fix
        # SimPy and pickle rebuild an error from its arguments.
        super().__init__(key, value, allowed, fix)

    def about(self, key: str) -> UserError:
        """Return this error under a key that tells the user more."""
        return type(self)(key, self.value, self.allowed, self.fix)

    def __str__(self) -> str:
        return f"{self.key}={self.value!r}: {self.allowed}. Fix: {self.fix}."


class WeightsError(UserError):
    """The weights that the user named are missing, damaged or of a kind that is not supported.

    The key is "weights", or it names the file, tensor or entry that is wrong.
    """

    def named_by(self, setting: str) -> WeightsError:
        """Return this error under the setting that named the weights; a file, tensor or entry stays named."""
        part = self.key.removeprefix("weights")
        return type(self)(f"{setting}: {part}" if part else setting, self.value, self.allowed, self.fix)


class HardwareError(UserError):
    """A setting names a card that is not known, or a group of cards that cannot be."""


class BeyondRoofline(UserError):
    """Iterations of a run were faster than the card can be."""

    arm: str | None = None  # the arm that ran; None outside a study

    def about(self, key: str) -> BeyondRoofline:
        found = super().about(key)
        assert isinstance(found, BeyondRoofline)
        found.arm = self.arm
        return found


class OwnCodeError(UserError):
    """The user's own code raised an exception, which is the cause of this error."""


class TooLittleMemory(UserError):
    """The memory of the host or of the device does not suffice for what the user asked for."""


_LACKING = {
    errno.ENOMEM: "memory", errno.EMFILE: "open files", errno.ENFILE: "open files",
    errno.EAGAIN: "processes and threads", errno.ENOSPC: "room on the disk", errno.EDQUOT: "room on the disk",
    errno.EFBIG: "room for a file of that size",
}  # fmt: skip
# Messages of the dynamic loader, NumPy and the interpreter, which give no errno.
_SAID = (
    ("failed to map segment", "memory"), ("cannot allocate memory", "memory"), ("unable to allocate", "memory"),
    ("too many open files", "open files"), ("can't start new thread", "processes and threads"),
)  # fmt: skip


def text_of(error: BaseException) -> str:
    """Return the text of an error; empty if making the text raises another error."""
    with suppress(Exception):
        return str(error)
    return ""


def lacking(error: BaseException) -> UserError | None:
    """Return a UserError if the machine lacked memory, files or the like, however that was raised; else None."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        what = "memory" if isinstance(error, MemoryError) else None
        if isinstance(error, OSError) and error.errno is not None:
            what = what or _LACKING.get(error.errno)
        if isinstance(error, OSError | ImportError | RuntimeError | SystemError):
            what = what or next((of for words, of in _SAID if words in text_of(error).lower()), None)
        if what is not None:
            fix = "free some or raise the limit, then start again: what is finished in the output folder is kept"
            return UserError("machine", what, "this machine gives no more", fix)
        error = error.__cause__ or error.__context__ or error
    return None


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise UserError unless the condition holds; `allowed` completes "must be ..."."""
    if not holds:
        raise UserError(key, value, f"must be {allowed}", f"set {key} accordingly")


def require_finite(settings: Any, prefix: str = "") -> None:
    """Raise UserError for a field of a dataclass, or an entry of its lists and mappings, that is infinite or NaN."""
    for name, value in vars(settings).items():
        entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        for entry in entries:
            if isinstance(entry, float):
                require(math.isfinite(entry), f"{prefix}{name}", value, "finite")


def require_one_of(key: str, value: object, names: Collection[str]) -> None:
    """Raise UserError, with the name that was probably meant, unless `value` is one of the names."""
    if value not in names:
        close = near_names(str(value), names)
        fix = f"you may have meant {close[0]}" if close else f"set {key} to one of these"
        raise UserError(key, value, f"one of {', '.join(names) or 'none: there are none here'}", fix)


def near_names(name: str, names: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The names that are most like `name`, the most alike first: those that its writer may have meant."""
    from difflib import get_close_matches  # imported when a name is wrong: that takes longer than all else here

    return get_close_matches(name, list(names), most, cutoff)


def require_positive(key: str, value: float, fix: str) -> None:
    """Raise UserError unless `value` is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(key, value, "must be a finite number above 0", fix)


def require_count(key: str, value: object, fix: str) -> None:
    """Raise UserError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UserError(key, value, "must be a whole number of at least 1", fix)
