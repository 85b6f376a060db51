"""A study from Python: the settings and the result of the command line, mistakes in one message."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from command_line import CommandLine
from helios_sim import AxisConfig, Config, UserError, simulate, simulate_designs, study_config
from helios_sim.help import conf_folder
from helios_sim.report.write import summarise_result
from helios_sim.vary.settings import known_settings, with_settings

SMALL = ("workload.n_requests=30", "server.max_running_requests=8")


@pytest.mark.slow
def test_a_study_by_name_gives_what_the_command_line_gives(command: CommandLine) -> None:
    words = (*SMALL, "policy=helios_probe", "seeds=[3]")
    told = command(*words, "pictures=false").summary["arms"]
    found = json.loads(json.dumps(summarise_result(simulate("quickstart", *words))))["arms"]
    assert found == told


@pytest.mark.slow
def test_settings_are_set_on_top_by_path() -> None:
    config = study_config("own", *SMALL)
    arms = {"one": {"policy": "full_depth", "model": "opt-1.3b"}}
    result = simulate(config, settings={"arms": arms, "workload.n_requests": 12, "server.replicas": 2})
    assert list(result.arms) == ["one", "full_depth"]  # a mapping adds to those that are there
    assert result.arms["one"].metrics["requests_completed"] == 12
    assert len(result.arms["one"].replicas) == 2
    assert config.workload.n_requests == 30  # the caller's own stays as it is


PRESET = {"server.preset": "vllm-0.24", "server.max_running_requests": 7}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (PRESET, ("server.preset=vllm-0.24", "server.max_running_requests=7")),
        ({"server": {"preset": "sglang-0.5", "replicas": 2}}, ("server.preset=sglang-0.5", "server.replicas=2")),
        ({"model": "smollm2"}, ("model=smollm2",)),
        ({"device": "cpu", "mode": "live"}, ("device=cpu", "mode=live")),
        ({"runtime": "eager", "objective": "energy"}, ("runtime=eager", "objective=energy")),
    ],
)
def test_words_of_the_command_line_are_taken_among_settings(settings: dict, words: tuple[str, ...]) -> None:
    config = study_config("own")
    assert with_settings(config, settings) == study_config("own", *words)
    assert config == study_config("own")


@pytest.mark.slow
def test_every_key_of_the_command_line_is_taken_or_refused_by_name() -> None:
    """Each setting as it is changes nothing; what is no setting is named, with the fix."""
    config = study_config("own")
    for path in known_settings(Config):
        value = config
        for name in path.split("."):
            value = getattr(value, name)
        assert with_settings(config, {path: value}) == config, path
    for group in (folder.name for folder in Path(conf_folder()).iterdir() if folder.is_dir()):
        names = [path.stem for path in Path(conf_folder(), group).glob("*.yaml")] or ["none"]
        if group in ("runtime", "objective"):
            assert any(with_settings(config, {group: name}) != config for name in names)
            continue
        with pytest.raises(UserError, match=f"^{group}="):
            with_settings(config, {group: names[0]})


def test_a_folder_of_own_experiments_is_found(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nhardware: h100-80gb\n")
    config = study_config("mine", config_dir=tmp_path)
    assert (config.name, config.hardware) == ("mine", "h100-80gb")


@pytest.mark.slow
def test_designs_are_run_by_a_call_of_their_own() -> None:
    settings = {
        "sweep.parameters": {"limit": AxisConfig(settings=["arms.helios.limit"], values=[40, 80])},
        "arms": {"helios": {"policy": "helios"}},
        "sweep.arm": "helios",
        "sweep.objectives": ["throughput_requests_per_s", "agreement"],
    }
    found = simulate_designs("own", "workload.n_requests=20", settings=settings)
    assert [design.parameters for design in found.designs] == [{"limit": 40}, {"limit": 80}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: simulate("nothing"), "experiment='nothing': one of ablation"),
        (lambda: simulate("quickstart", "policy=hel"), "policy='hel'"),
        (lambda: simulate("quickstart", "workload.n_request=3"), "you may have meant workload.n_requests"),
        (lambda: simulate("quickstart", "-m"), "only settings, key=value"),
        (lambda: simulate("quickstart", settings={"workload.rate": 3}), "no such setting"),
        (lambda: simulate("own", settings={"server.preset": "vllm-9"}), "server.preset='vllm-9': one of"),
        (lambda: simulate("own", settings={"policy": "helios"}), 'write simulate(NAME, "policy=helios")'),
        (lambda: simulate("own", settings={"experiment": "drift"}), "the command line's own"),
        (lambda: simulate("own", settings={"+server.replicas": 2}), "write server.replicas"),
        (lambda: simulate("own", settings={"server.batch_wait_tokens": 9}), "does nothing here"),
        (lambda: simulate("own", settings={"workload": {"arrivals": {"cv": 2.0}}}), "does nothing here"),
        (lambda: simulate("paper_energy", "objective=throughput"), "objective.goal is set to energy"),
        (lambda: simulate("sweep_grid"), "call simulate_designs"),
        (lambda: simulate_designs("quickstart"), "call simulate"),
        (lambda: simulate("fidelity_vllm", "fidelity.folder=log"), "run it from the command line"),
        (lambda: simulate(Config(), "policy=helios"), "need an experiment's name"),
        (lambda: study_config("own", config_dir="nowhere"), "must be a folder that holds config groups"),
        (lambda: simulate(None), "the name of an experiment"), (lambda: simulate("own", 3), "word=3"),
        (lambda: simulate("own", settings=[("a", 1)]), "a mapping such as"),
    ],
)
def test_a_mistake_is_one_message(call, told: str) -> None:
    with pytest.raises(UserError) as raised:
        call()
    assert told in str(raised.value)


def test_settings_may_be_of_numpy_and_pathlib(tmp_path: Path) -> None:
    given = {"workload.n_requests": np.int64(3), "workload.arrivals.rate_per_s": np.float32(2.0), "seeds": (0, 1),
             "slo": {"ttft_s": np.float64(1.0)}, "server.max_running_requests": np.arange(9)[7]}  # fmt: skip
    plain = {"workload.n_requests": 3, "workload.arrivals.rate_per_s": 2.0, "seeds": [0, 1], "slo.ttft_s": 1.0,
             "server.max_running_requests": 7}  # fmt: skip
    assert with_settings(Config(), given) == with_settings(Config(), plain)
    assert with_settings(Config(), {"profile_folder": tmp_path}).profile_folder == str(tmp_path)


def test_a_setting_has_a_name() -> None:
    with pytest.raises(UserError, match="the dotted name of a setting"):
        with_settings(Config(), {"": 1})
