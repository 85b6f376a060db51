"""Logs of real serving: a reader for each tool's own files, all into one form (record.py).

A reader says what it uses, knows what does not matter, and names or refuses the rest. Tables of requests (Azure,
Mooncake, BurstGPT and others) are read by workload/traces.py, the folder of a vLLM run by validate/logs.py.

The readers are imported when a log is read: most studies read none.
"""

from typing import TYPE_CHECKING, Any

from helios_sim.logs.record import Begins, PromptTexts, RequestLog, TokenTimes

if TYPE_CHECKING:
    from helios_sim.logs.tools import FORMATS, read_folder, read_tool, tool_of

__all__ = ["FORMATS", "Begins", "PromptTexts", "RequestLog", "TokenTimes", "read_folder", "read_tool", "tool_of"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from helios_sim.logs import tools

    return getattr(tools, name)
