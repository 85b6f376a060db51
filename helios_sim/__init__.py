"""Design, simulate and validate early-exit LLM serving with adaptive model selection.

The names in `__all__` are the public interface. Each is imported when it is first used, so `import helios_sim` itself
loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from helios_sim.errors import UserError
    from helios_sim.exits.rule import Clairvoyant, Confidence, ExitRule, FixedCap, FullDepth, PerToken
    from helios_sim.exits.store import load_trace
    from helios_sim.policy.deployment import BatchingRule, Deployment, InFlight, KvRule, Placement, Probe
    from helios_sim.policy.telemetry import Policy, Situation, Telemetry
    from helios_sim.policy.trigger import (
        AtTime,
        BreachLimit,
        Cause,
        Completed,
        Drained,
        Probed,
        QueueAbove,
        Started,
        Trigger,
    )
    from helios_sim.profile.store import load_profile
    from helios_sim.report.result import ExperimentResult, comparisons
    from helios_sim.report.tables import print_table
    from helios_sim.study.run import run
    from helios_sim.study.schema import (
        ArrivalsConfig,
        Config,
        ExitsConfig,
        LengthConfig,
        LengthsConfig,
        MixConfig,
        RuntimeConfig,
        ServerConfig,
        WorkloadConfig,
    )

__all__ = [
    "ArrivalsConfig",
    "AtTime",
    "BatchingRule",
    "BreachLimit",
    "Cause",
    "Clairvoyant",
    "Completed",
    "Confidence",
    "Config",
    "Deployment",
    "Drained",
    "ExitRule",
    "ExitsConfig",
    "ExperimentResult",
    "FixedCap",
    "FullDepth",
    "InFlight",
    "KvRule",
    "LengthConfig",
    "LengthsConfig",
    "MixConfig",
    "PerToken",
    "Placement",
    "Policy",
    "Probe",
    "Probed",
    "QueueAbove",
    "RuntimeConfig",
    "ServerConfig",
    "Situation",
    "Started",
    "Telemetry",
    "Trigger",
    "UserError",
    "WorkloadConfig",
    "__version__",
    "comparisons",
    "load_profile",
    "load_trace",
    "print_table",
    "run",
]

_NAMES_BY_MODULE = {
    "errors": "UserError",
    "exits.rule": "Clairvoyant Confidence ExitRule FixedCap FullDepth PerToken",
    "exits.store": "load_trace",
    "policy.deployment": "BatchingRule Deployment InFlight KvRule Placement Probe",
    "policy.telemetry": "Policy Situation Telemetry",
    "policy.trigger": "AtTime BreachLimit Cause Completed Drained Probed QueueAbove Started Trigger",
    "profile.store": "load_profile",
    "report.result": "ExperimentResult comparisons",
    "report.tables": "print_table",
    "study.run": "run",
    "study.schema": (
        "ArrivalsConfig Config ExitsConfig LengthConfig LengthsConfig MixConfig RuntimeConfig ServerConfig "
        "WorkloadConfig"
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names.split()}

if not TYPE_CHECKING:  # a type checker that saw it would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
