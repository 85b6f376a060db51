"""What is refused in a user's experiment file must let the files pass that come with the program."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helios_sim.config import compose_config
from helios_sim.defaults_list import check_defaults
from helios_sim.errors import UserError
from helios_sim.help import conf_folder
from helios_sim.study.effects import check_written
from helios_sim.study.schema import Config
from helios_sim.study.workload import build_workload

SHIPPED = sorted((Path(conf_folder()) / "experiment").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_copy_of_a_shipped_experiment_passes(file: Path) -> None:
    """`scale` names a router for the replicas that its command line has."""
    check_defaults(file)
    words = ["server.replicas=2"] if file.stem == "scale" else []
    written = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(written, dict)
    check_written(compose_config(file.stem, words), written, [], file.name)


MINE = """# @package _global_
models: [opt-1.3b]
arms: {full_depth: {policy: full_depth}}
workload: {n_requests: 12}
"""
REQUESTS = "arrivals: {rate_per_s: 3.0}\nlengths: {output: {kind: fixed, value: 5}}\n"
ASIDE = "\n".join(f"  {line}" for line in REQUESTS.splitlines())


def composed(folder: Path, files: dict[str, str], experiment: str = "mine", *words: str) -> Config:
    for name, text in ({"experiment/mine.yaml": MINE} | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return compose_config(experiment, words, folder)


def with_defaults(*entries: str, more: str = "") -> str:
    return MINE.replace("models", "defaults:\n" + "".join(f"  - {entry}\n" for entry in entries) + "models", 1) + more


@pytest.mark.parametrize(
    ("files", "named"),
    [
        # what is set in vain is told of every file of the user's, not of the experiment's alone
        ({"workload/mine.yaml": REQUESTS.replace("3.0", "3.0, cv: 2.0")}, r"mine\.yaml: workload\.arrivals\.cv=2\.0"),
        ({"runtime/mine.yaml": "preset: eager\nregroup_s: 0.01\n"}, r"mine\.yaml: runtime\.regroup_s=0\.01: does"),
        ({"experiment/base.yaml": "# @package _global_\nworkload: {arrivals: {users: 4}}\n",
          "experiment/mine.yaml": with_defaults("base")}, r"base\.yaml: workload\.arrivals\.users=4: does nothing"),
        ({"experiment/mine.yaml": MINE.replace(
            "full_depth}}", "full_depth, overrides: {workload: {arrivals: {cv: 2.0}}}}}")},
         r"arms\.full_depth\.overrides\.workload\.arrivals\.cv=2\.0: does nothing"),
        ({"experiment/base.yaml": "# @package _global_\nworkload: {n_requests: 99}\n",
          "experiment/mine.yaml": with_defaults("_self_", "base")},
         r"'base': before _self_: it sets workload\.n_requests to 99, in place of 12.*put _self_ last"),
        ({"experiment/mine.yaml": with_defaults("_self_", "/engine: vllm-0.19", more="server: {schedule_ahead: 0}\n")},
         r"it sets server\.schedule_ahead to 1, in place of 0"),
        # a file of a group holds the settings of that group
        ({"workload/mine.yaml": f"workload:\n{ASIDE}\n"}, r"mine\.yaml='workload:'.*leave out workload:"),
        ({"objective/mine.yaml": "objective: {goal: energy}\n"}, r"objective/mine\.yaml='objective:'"),
        ({"engine/mine.yaml": "server: {max_batch_tokens: 64}\n"}, r"# @package _global_ in its first line"),
        ({"workload/mine.yaml": f"# @package work\n{REQUESTS}"}, r"mine\.yaml: # @package='work': a group of settings"),
        ({"workload/mine.yaml": REQUESTS.replace("rate_per_s", "rate")}, r"workload\.arrivals\.rate=3\.0: no such"),
        ({"workload/mine.yaml": REQUESTS.replace("3.0", "fast")}, r"workload\.arrivals\.rate_per_s='fast': must be a"),
        # the program's own file of that name would be taken
        ({"experiment/own.yaml": MINE}, r"own\.yaml'.*experiment=own is the program's.*my_own\.yaml"),
        ({"workload/sharegpt_like.yaml": REQUESTS}, r"workload=sharegpt_like is the program's"),
        ({"experiment/mine.yaml": MINE + "replicas: 2\n"}, r"you may have meant server\.replicas;"),
        ({"experiment/mine.yaml": MINE.replace("12}", "12, mix: {after: {gsm8k: 1}, drift: periodic, period: 100}}")},
         r"mix\.period=100\.0: from 0 to 10"),
    ],
)  # fmt: skip
def test_what_a_file_of_the_user_s_cannot_do(tmp_path: Path, files: dict[str, str], named: str) -> None:
    group = next((name.partition("/")[0] for name in files if name.endswith("/mine.yaml")), "experiment")
    words = [f"{'+' if group == 'engine' else ''}{group}=mine"] if group != "experiment" else []
    with pytest.raises(UserError, match=named):
        build_workload(composed(tmp_path, files, "own" if "experiment/own.yaml" in files else "mine", *words).workload)


def test_what_it_can(tmp_path: Path) -> None:
    """Files of groups, wherever they go; a base, which what comes after it may undo; a copy of the program's."""
    for text in (REQUESTS, f"# mine\n# @package workload\n{REQUESTS}", f"# @package _global_\nworkload:\n{ASIDE}\n"):
        found = composed(tmp_path, {"workload/mine.yaml": text}, "mine", "workload=mine")
        assert found.workload.arrivals.rate_per_s == 3.0
    shipped = (Path(conf_folder()) / "workload" / "sharegpt_like.yaml").read_text()
    base = "# @package _global_\nworkload: {n_requests: 99, arrivals: {kind: gamma, cv: 2.0}}\n"
    mine = with_defaults("base", "_self_").replace("12}", "12, arrivals: {kind: poisson}}")
    files = {"experiment/base.yaml": base, "experiment/mine.yaml": mine, "workload/sharegpt_like.yaml": shipped}
    found = composed(tmp_path, files)
    assert (found.workload.n_requests, found.workload.arrivals.kind) == (12, "poisson")
    files["experiment/mine.yaml"] = with_defaults("_self_", "base").replace("workload: {n_requests: 12}\n", "")
    assert composed(tmp_path, files).workload.n_requests == 99
