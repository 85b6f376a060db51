"""Design, simulate and validate early-exit LLM serving with adaptive model selection.

The names in `__all__` are the public interface. Each is imported when it is first used, so `import helios_sim` itself
loads nothing heavy. A study runs as on the command line, in this process and without files:

    from helios_sim import comparisons, print_table, simulate

    result = simulate("quickstart", "workload.n_requests=100", "policy=helios_probe")
    print_table(result, comparisons(result))
    print(result.arms["helios_probe"].metrics["ttft_s_p95"])
"""

import os
import sys


def _python_first() -> None:
    """Let Python's own modules come before files of the current folder, which `python -m` puts first.

    A user's json.py or random.py there would be taken for Python's by every library. What is not Python's own, such as
    the module of a policy, is still found there first. It runs before all imports but os and sys, which Python itself
    has imported by then.
    """
    own = os.path.dirname(os.__file__)
    try:
        is_first = sys.path[:1] == [os.getcwd()]
    except OSError:  # the folder was removed
        return
    if is_first:
        of_python = [i for i, path in enumerate(sys.path) if path.startswith(own) and "-packages" not in path]
        sys.path.insert(max(of_python, default=0), sys.path.pop(0))


if sys.argv[:1] == ["-m"]:  # a command of this package is being started
    _python_first()

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

__version__ = "0.1.0"

if TYPE_CHECKING:
    from helios_sim.api import simulate, simulate_designs, study_config
    from helios_sim.errors import UserError
    from helios_sim.exits.rule import (
        Clairvoyant,
        Confidence,
        DraftModel,
        ExitRule,
        FixedCap,
        FullDepth,
        OwnCard,
        PerToken,
        ReleaseEarly,
        SelfSpeculation,
    )
    from helios_sim.exits.store import load_trace, read_trace
    from helios_sim.exits.trace import ExitTrace
    from helios_sim.policy.deployment import (
        AtTime,
        BatchingRule,
        BreachLimit,
        Cause,
        Completed,
        Deployment,
        Drained,
        InFlight,
        KvAbove,
        KvRule,
        LoadFailed,
        Placement,
        PowerAbove,
        Probe,
        Probed,
        QueueAbove,
        Regrouping,
        RunningAbove,
        SloBelow,
        Started,
        Trigger,
    )
    from helios_sim.policy.telemetry import Energy, LatestRequests, Policy, Situation, Telemetry
    from helios_sim.profile.composition import Composition
    from helios_sim.profile.profile import Profile
    from helios_sim.profile.spec import RuntimeConfig
    from helios_sim.profile.store import known_profiles, load_profile
    from helios_sim.report.designs import DesignsResult
    from helios_sim.report.result import ExperimentResult, comparisons
    from helios_sim.report.tables import print_designs, print_table
    from helios_sim.report.write import write_result
    from helios_sim.study.modes import DesignsConfig, LiveConfig
    from helios_sim.study.schema import (
        ArrivalsConfig,
        Config,
        ExitsConfig,
        LengthConfig,
        LengthsConfig,
        MixConfig,
        ObjectiveConfig,
        ServerConfig,
        SloConfig,
        SweepConfig,
        WorkloadConfig,
    )
    from helios_sim.vary.axis import AxisConfig

__all__ = [
    "ArrivalsConfig",
    "AtTime",
    "AxisConfig",
    "BatchingRule",
    "BreachLimit",
    "Cause",
    "Clairvoyant",
    "Completed",
    "Composition",
    "Confidence",
    "Config",
    "Deployment",
    "DesignsConfig",
    "DesignsResult",
    "DraftModel",
    "Drained",
    "Energy",
    "ExitRule",
    "ExitTrace",
    "ExitsConfig",
    "ExperimentResult",
    "FixedCap",
    "FullDepth",
    "InFlight",
    "KvAbove",
    "KvRule",
    "LatestRequests",
    "LengthConfig",
    "LengthsConfig",
    "LiveConfig",
    "LoadFailed",
    "MixConfig",
    "ObjectiveConfig",
    "OwnCard",
    "PerToken",
    "Placement",
    "Policy",
    "PowerAbove",
    "Probe",
    "Probed",
    "Profile",
    "QueueAbove",
    "Regrouping",
    "ReleaseEarly",
    "RunningAbove",
    "RuntimeConfig",
    "SelfSpeculation",
    "ServerConfig",
    "Situation",
    "SloBelow",
    "SloConfig",
    "Started",
    "SweepConfig",
    "Telemetry",
    "Trigger",
    "UserError",
    "WorkloadConfig",
    "__version__",
    "comparisons",
    "known_profiles",
    "load_profile",
    "load_trace",
    "print_designs",
    "print_table",
    "read_trace",
    "simulate",
    "simulate_designs",
    "study_config",
    "write_result",
]

_NAMES_BY_MODULE = {
    "api": "simulate simulate_designs study_config",
    "errors": "UserError",
    "exits.rule": (
        "Clairvoyant Confidence DraftModel ExitRule FixedCap FullDepth OwnCard PerToken ReleaseEarly SelfSpeculation"
    ),
    "exits.store": "load_trace read_trace",
    "exits.trace": "ExitTrace",
    "policy.deployment": (
        "AtTime BatchingRule BreachLimit Cause Completed Deployment Drained InFlight KvAbove KvRule LoadFailed "
        "Placement PowerAbove Probe Probed QueueAbove Regrouping RunningAbove SloBelow Started Trigger"
    ),
    "policy.telemetry": "Energy LatestRequests Policy Situation Telemetry",
    "profile.composition": "Composition",
    "profile.profile": "Profile",
    "profile.spec": "RuntimeConfig",
    "profile.store": "known_profiles load_profile",
    "report.designs": "DesignsResult",
    "report.result": "ExperimentResult comparisons",
    "report.tables": "print_designs print_table",
    "report.write": "write_result",
    "study.modes": "DesignsConfig LiveConfig",
    "study.schema": (
        "ArrivalsConfig Config ExitsConfig LengthConfig LengthsConfig MixConfig ObjectiveConfig "
        "ServerConfig SloConfig SweepConfig WorkloadConfig"
    ),
    "vary.axis": "AxisConfig",
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
