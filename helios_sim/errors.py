"""Errors that a user can mend. Knows no module of the project; every module may raise these."""

from __future__ import annotations


class UserError(ValueError):
    """One clear message: the key, the value, what is allowed and the fix.

    The command line prints the message without a traceback and exits with status 1.
    """

    def __init__(self, key: str, value: object, allowed: str, fix: str) -> None:
        self.key, self.value, self.allowed, self.fix = key, value, allowed, fix
        # SimPy makes an error of a process anew from its arguments, and so does pickle.
        super().__init__(key, value, allowed, fix)

    def about(self, key: str) -> UserError:
        """The same mistake under a key that tells the user more."""
        return UserError(key, self.value, self.allowed, self.fix)

    def __str__(self) -> str:
        return f"{self.key}={self.value!r}: {self.allowed}. Fix: {self.fix}."
