"""Errors that are returned to clients, in the format of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {401: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}


class Problem(Exception):
    """A request is refused or fails. `status`: of HTTP. `param`: the wrong parameter. `code`: a word for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_s = status, message, param, code, retry_s

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        found = {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def wrong(param: str, message: str, code: str | None = None) -> Problem:
    """Makes the Problem of a parameter with a value that is not allowed."""
    return Problem(400, message, param, code)


def not_supported(param: str, only: str) -> Problem:
    return Problem(400, f"{param} is not supported here beyond {only}: leave it out", param, "unsupported_parameter")


class Gone(Exception):
    """The client has left."""
