"""Finished parts of a campaign as JSON files in a folder, each written in one step. Knows no measurement."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError


class Parts:
    """`settings` are what all parts depend on; a folder with others is refused, not mixed."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(settings))
        found = self.get("settings")
        if found is not None and found != plain:
            differing = sorted(k for k in {**found, **plain} if found.get(k) != plain.get(k))
            raise UserError(
                "folder", str(folder), f"it holds measurements under another {', '.join(differing)}",
                "name another folder, or delete this one",
            )  # fmt: skip
        self.put("settings", plain)

    def get(self, name: str) -> Any | None:
        """None where it is not there yet. UserError where it cannot be read."""
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(str(path), str(error), "JSON of a finished part", "delete it to measure anew") from error

    def put(self, name: str, value: Any) -> None:
        path = self.folder / f"{name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def made(self, name: str, make: Callable[[], Any]) -> Any:
        """The part, made now if it is not there."""
        found = self.get(name)
        if found is None:
            self.put(name, make())
            found = self.get(name)
        return found
