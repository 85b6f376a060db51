"""Logs of real serving: a reader for each tool's own files, all into one form (record.py).

A reader says what it uses, knows what does not matter, and names or refuses the rest. Tables of requests (Azure,
Mooncake, BurstGPT and others) are read by workload/traces.py, the folder of a vLLM run by validate/logs.py.
"""

from helios_sim.logs.record import Begins, PromptTexts, RequestLog, TokenTimes
from helios_sim.logs.tools import FORMATS, read_folder, read_tool, tool_of

__all__ = ["FORMATS", "Begins", "PromptTexts", "RequestLog", "TokenTimes", "read_folder", "read_tool", "tool_of"]
