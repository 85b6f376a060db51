"""Access limits: API keys, hosts and origins that are answered, and open requests per client."""

from __future__ import annotations

import hmac
import ipaddress
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from helios_sim.errors import UserError
from helios_sim.serve.front.problems import Problem
from helios_sim.serve.settings import KEY_VARIABLE, ServeConfig

_LEAST_KEY = 16  # fewest characters of a key
_MOST_BYTES = 1 << 16


def keys_of(serve: ServeConfig) -> tuple[bytes, ...]:
    """Reads the API keys. UserError for unusable keys, or if others can reach the server and there is none."""
    if serve.api_key_file is not None:
        fix = "name a file with one key on each line, that you may read"
        try:
            with Path(serve.api_key_file).expanduser().open(encoding="utf-8-sig") as file:
                text = file.read(_MOST_BYTES)
        except (OSError, ValueError) as error:
            raise UserError("serve.api_key_file", serve.api_key_file, f"a file of keys ({error})", fix) from error
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise UserError("serve.api_key_file", serve.api_key_file, "a file with at least one key", fix)
    else:
        found = [os.environ[KEY_VARIABLE].strip()] if os.environ.get(KEY_VARIABLE, "").strip() else []
    where = KEY_VARIABLE if serve.api_key_file is None else "serve.api_key_file"
    if any(len(key) < _LEAST_KEY or not (key.isascii() and key.isprintable()) or " " in key for key in found):
        fix = "make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        allowed = f"keys of at least {_LEAST_KEY} characters of ASCII without a space, as a header carries them"
        raise UserError(where, "(not shown)", allowed, fix)
    if not found and not serve.is_local:
        allowed = "127.0.0.1 unless there is an API key: others could use this server"
        fix = f"set serve.api_key_file=FILE, or the variable {KEY_VARIABLE}"
        raise UserError("serve.host", serve.host, allowed, fix)
    return tuple(key.encode() for key in found)


class Gate:
    """Checks headers and open requests of clients. Its checks raise Problem."""

    def __init__(self, serve: ServeConfig, keys: tuple[bytes, ...]) -> None:
        self._keys = keys
        self._local = serve.is_local
        self._most_of_client = serve.streams_per_client
        self._of_client: Counter[str] = Counter()

    def check_host(self, headers: Mapping[str, str]) -> None:
        """Refuses foreign Host and Origin headers, so that no page of another origin can use a server on this machine.

        The check of Host is against a foreign name that resolves to this machine (DNS rebinding).
        """
        host = _name(headers.get("host", ""))
        if self._local and not self._keys and host not in ("", "localhost") and not _is_loopback(host):
            raise Problem(403, "This server answers on this machine's own addresses alone", None, "wrong_host")
        origin = headers.get("origin")
        if origin not in (None, "") and origin.partition("://")[2] != headers.get("host", ""):
            raise Problem(403, "Pages of other origins are not answered", None, "wrong_origin")

    def check_key(self, headers: Mapping[str, str]) -> str | None:
        """Returns which key was given, to count the client's requests by; None if no key is needed."""
        if not self._keys:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        found = None
        for number, key in enumerate(self._keys):  # compares all of them, so that the time taken tells nothing
            if hmac.compare_digest(given.strip().encode(errors="replace"), key):
                found = f"key {number}"
        if kind.lower() != "bearer" or found is None:
            raise Problem(401, "Incorrect API key provided: send Authorization: Bearer KEY", None, "invalid_api_key")
        return found

    @contextmanager
    def counted(self, client: str, requests: int) -> Iterator[None]:
        """Counts requests as open for the client while the context lasts. Problem if it would have too many."""
        if self._of_client[client] + requests > self._most_of_client:
            told = f"Rate limit reached: {self._most_of_client} requests may be open at once"
            raise Problem(429, told, None, "rate_limit_exceeded", 1)
        self._of_client[client] += requests
        try:
            yield
        finally:
            self._of_client[client] -= requests
            if not self._of_client[client]:
                del self._of_client[client]


def _name(host: str) -> str:
    """The name or address of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
