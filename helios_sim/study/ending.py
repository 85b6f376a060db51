"""How a study ends on standard output, and with which exit status."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from helios_sim.report.format import gate_value
from helios_sim.report.result import Gate


def end(show: Callable[[], None], folder: Path, summary: Mapping[str, Any], gates: Sequence[Gate] = ()) -> int:
    """Prints what is to be shown, the gates, the folder, and summary.json last. Returns 0, or 2 when a gate failed."""
    try:
        show()
        for gate in gates:
            found = f"{gate.name} {gate_value(gate.value, gate.bound)}, must be {gate.bound}"
            print(f"gate {'passed' if gate.passed else 'FAILED'}: {found}")
        print(f"output folder: {folder}")
        print(json.dumps(summary, allow_nan=False))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader left, as `head` does; the files are there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if all(gate.passed for gate in gates) else 2
