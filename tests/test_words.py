"""Words of the command line and files of settings: paths with any sign, nothing that runs code or does nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import CommandLine, write_study
from helios_sim import UserError, simulate, study_config
from helios_sim.config import compose_config
from helios_sim.serve.settings import ServedConfig
from helios_sim.words import unreadable

SMALL = ("policy=none", "workload.n_requests=5", "pictures=false")
NAMES = ["a=b", "a,b", "a(b", "a[b", "a{b", "it's", "a#b", "aüb", 'a"b', "a\\b", "ends\\", "two words", "a:b", "~a"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_path_with_any_sign_is_that_path(command: CommandLine, tmp_path: Path, name: str) -> None:
    pictures = f"pictures={str(name in NAMES[:2]).lower()}"  # which take longer than the rest
    said = command(*write_study(tmp_path), f"hydra.run.dir={tmp_path}/{name}", pictures)
    assert said.status == 0, said.err
    assert (tmp_path / name / "summary.json").is_file()
    said = command(*write_study(tmp_path), f"exits.source={tmp_path}/{name}", into="out")
    assert f"exits.source={f'{tmp_path}/{name}'!r}" in said.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("+server.tensor_parallel=4", "Fix: write server.tensor_parallel=4"),
        ("+server.pipeline_parallel=4", "server.pipeline_parallel=4: left out: pipeline parallelism is not modelled"),
        ("+foo=1", "foo=1: no such setting"),
        ("+workload.foo.bar=1", "workload.foo="),
        ("+hydra.foo=1", "hydra.foo='1': no such setting of Hydra"),
        ("+sweep.parameters={a: {settings: [x], valuez: [1]}}", "sweep.parameters"),
        ("+hydra.callbacks.x._target_=os.system", "settings name no code to run"),
        ("title=${oc.env:HOME}", "settings call no resolver"),
        ("arms.x={policy: helios", "cannot be read"),
        ("workload.arrivals.users=4", "only with workload.arrivals.kind=closed_loop"),
        ("live.warm_up=3", "only with mode=live"),
        ("device=cuda", "only with mode=live"),
        ("fidelity.kv_blocks=3", "only with fidelity.folder"),
        ("sweep.designs=10", "only with sweep.parameters"),
        ("seeds=[18446744073709551615]", "from 0 to 2^63 - 1"),
        ("server.replicas=1000000000", "one run would take about 4,"),
        ("workload.n_requests=1000000000000", "one run would take about 200,000 GB"),
        ("server.max_running_requests=2000000000", "one run would take about 900 GB"),
        ("server.max_batch_tokens=99999999999999999999999", "from 1 to 2^31 - 1"),
        ("runtime.sync_s=1e8", "from 0 to 3600 seconds"),
        ("runtime.host_overhead_s=1e13", "from 0 to 3600 seconds"),
        ("profile_time_factor=1e13", "from 0.001 to 1000"),
        ("profile_time_factor=0.01", "at most 1 of what the card can do"),
    ],
)
def test_what_cannot_be_is_one_message(command: CommandLine, word: str, part: str) -> None:
    said = command(*SMALL, word)
    assert said.status == 1
    assert said.out == ""
    message = said.err.splitlines()[-1]
    assert message.startswith("helios_sim: ")
    assert part in message
    assert "Traceback" not in said.err


@pytest.mark.slow
def test_times_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="all requests might take"):
        simulate("quickstart", "policy=none", "workload.n_requests=1000000", "runtime.sync_s=3600")


NESTED = "a: " + "[\n" * 1500 + "]" * 1500
BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("hydra: {callbacks: {x: {_target_: os.system, command: touch exploded}}}", "settings name no code to run"),
        ("title: ${oc.env:HOME}", "settings call no resolver"),
        ("title: ${oc.decode:x}", "settings call no resolver"),
        (BOMB, "at most 100000, anchors written out"),
        (NESTED, "nested too deeply"),
        ("a: &a [*a]", "anchors that contain themselves"),
        ("a: &a {b: *a}", "anchors that contain themselves"),
        ("x: " + "y" * 300_000, "at most 262144 bytes"),
        ("a: [b", "valid YAML"),
    ],
    ids=["target", "environment", "decode", "bomb", "deep", "circle", "circle of mappings", "long", "invalid"],
)
def test_a_file_of_settings_that_could_do_harm(command: CommandLine, tmp_path: Path, text: str, part: str) -> None:
    study = write_study(tmp_path, f"# @package _global_\n{text}\n")
    said = command(*study, *SMALL)
    assert said.status == 1
    assert part in said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(UserError, match=part[:20]):
        study_config("mine", config_dir=tmp_path / "conf")


def test_a_file_of_settings_that_is_no_text_is_named(command: CommandLine, tmp_path: Path) -> None:
    study = write_study(tmp_path)
    file = next((tmp_path / "conf").rglob("*.yaml"))
    file.write_bytes(file.read_bytes() + b"# \xff\n")
    said = command(*study, *SMALL)
    assert said.status == 1
    assert f"{file}=" in said.err
    assert "text in UTF-8" in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--hydra-help",), ("--cfg", "job"), ("--info",), ("--help",), ("--version",)])
def test_a_reader_who_leaves_is_no_error(repository: Path, flags: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "helios_sim", *flags], stdout=write, stderr=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    os.close(write)
    assert "rror" not in done.stderr, done.stderr
    assert done.returncode == 0


WRONG = """
class Nothing:
    def start(self, situation): return None
    def decide(self, cause, telemetry): return None
class Number(Nothing):
    def start(self, situation): return 3
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Nothing", "Number"])
def test_a_policy_that_answers_with_something_else(command, tmp_path, monkeypatch, name) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wrong_policy.py").write_text(WRONG)
    said = command("workload.n_requests=5", "policy=custom", f"policy.object=wrong_policy:{name}")
    assert said.status == 1
    assert "start() returned" in said.err
    assert "Traceback" not in said.err


@pytest.mark.slow
def test_two_runs_at_once_have_folders_of_their_own(command: CommandLine, tmp_path: Path) -> None:
    words = [*SMALL, "hydra.run.dir=outputs/${name}/${now:%Y-%m-%d_%H-%M-%S-%f}"]
    assert words[-1].split("=", 1)[1] in (Path(__file__).parents[1] / "conf" / "config.yaml").read_text()
    folders = {command(*words).out.split("output folder: ")[1].splitlines()[0] for _ in range(3)}
    assert len(folders) == 3


@pytest.mark.slow
def test_a_whole_mix_takes_the_place_of_the_experiments(command) -> None:
    mix = "workload.mix.tasks={gsm8k: 0.25, sharegpt: 0.75}"
    said = command(mix, "workload.n_requests=20", "pictures=false")
    assert said.status == 0
    assert set(said.summary["arms"]["helios"]["tasks"]) == {"gsm8k", "sharegpt"}
    shown = command(mix, "--cfg", "job").out
    assert "codexglue" not in shown
    assert study_config("quickstart", mix).workload.mix.tasks == {"gsm8k": 0.25, "sharegpt": 0.75}
    several = command("-m", mix, "server.max_running_requests=8,16", "workload.n_requests=8", "pictures=false")
    assert several.status == 0
    assert set(several.summary["arms"]["helios"]["tasks"]) == {"gsm8k", "sharegpt"}


@pytest.mark.parametrize("word", ["workload.mix.tasks={gsm8k: 1}", "arms.full_depth_opt-1.3b.batch_limit=2"])
def test_commands_with_settings_of_their_own_take_whole_mixes_and_arms_with_a_dot(word: str) -> None:
    assert compose_config("quickstart").name == "quickstart"  # whose schema is another
    config = compose_config("quickstart", [word.replace("arms", "+arms"), "serve.port=8123"], schema=ServedConfig)
    assert config.serve.port == 8123
    assert config.workload.mix.tasks == {"gsm8k": 1} or config.arms["full_depth_opt-1.3b"]["batch_limit"] == 2
    with pytest.raises(UserError, match="serve"):
        compose_config("quickstart", ["serve.port=8123"])


DOTTED = ("workload.n_requests=5", "pictures=false", "profile_band=none")


@pytest.mark.slow
def test_arms_with_a_dot_in_their_name_are_set_and_left_out(command: CommandLine) -> None:
    words = (
        "arms.full_depth_opt-1.3b.model=opt-6.7b", "~arms.early_exit_opt-1.3b", "~arms.full_depth_opt-6.7b",
        "+arms.full_depth_opt-1.3b.batch_limit=2",
    )  # fmt: skip
    done = command(*DOTTED, *words)
    assert done.status == 0, done.err
    assert list(done.summary["arms"]) == ["full_depth_opt-1.3b", "static_cap", "helios"]
    assert done.summary["arms"]["full_depth_opt-1.3b"]["metrics"]["layers_per_token"] == 32.0
    same = study_config("quickstart", *DOTTED, *words)
    assert same.arms["full_depth_opt-1.3b"] == {"policy": "full_depth", "model": "opt-6.7b", "batch_limit": 2}
    assert same.arms["early_exit_opt-1.3b"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "word", ["arms.full_depth_opt-1.2b.model=opt-6.7b", "~arms.nothing-1.3b", "+arms.a-1.3b.policy=helios"]
)
def test_an_arm_that_is_none_is_named_with_those_that_are(command: CommandLine, word: str) -> None:
    done = command(*DOTTED, word)
    assert done.status == 1
    assert "begins with the name of an arm: full_depth_opt-1.3b, full_depth_opt-6.7b" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_the_baseline_cannot_be_left_out_without_another(command: CommandLine) -> None:
    done = command(*DOTTED, "~arms.full_depth_opt-1.3b")
    assert done.status == 1
    assert "baseline" in done.err


def settings_of_others(folder: Path, text: str) -> Path:
    """A folder with an experiment, and settings of another program that nothing asks for."""
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "outputs" / ".hydra").mkdir(parents=True)
    (folder / "conf" / "outputs" / ".hydra" / "hydra.yaml").write_text("launcher: {_target_: a.B}\nx: ${oc.env:HOME}\n")
    (folder / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\n" + text)
    return folder / "conf"


@pytest.mark.slow
def test_only_files_that_are_loaded_are_looked_at(command: CommandLine, tmp_path: Path) -> None:
    folder = settings_of_others(tmp_path, "defaults: [own]\nname: mine\n")
    said = command(*SMALL, "+arms.a.policy=full_depth", "models=[opt-1.3b]", "exits.source=none", "--config-dir",
                   str(folder), "+experiment=mine")  # fmt: skip
    assert said.status == 0, said.err


def test_several_studies_that_are_none_are_a_mistake(command: CommandLine) -> None:
    said = command(*SMALL, "-m", "server.replicas=glob(*)")
    assert said.status == 1
    assert "server.replicas=glob(*)': no value that is there" in said.err


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["", "defaults: [other]\n"])
def test_what_is_loaded_runs_nothing(command: CommandLine, tmp_path: Path, inner: str) -> None:
    evil = "hydra:\n  callbacks:\n    x:\n      _target_: pathlib.Path.touch\n      self: touched\n"
    folder = settings_of_others(tmp_path, inner or evil)
    (folder / "experiment" / "other.yaml").write_text("# @package _global_\n" + evil)
    said = command(*SMALL, "--config-dir", str(folder), "+experiment=mine")
    assert said.status == 1
    assert "settings name no code to run" in said.err
    assert f"{'other' if inner else 'mine'}.yaml" in said.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["+hydra.callbacks.x._target_=os.getcwd"], "settings name no code to run"),
        (["model.weights=${oc.env:HOME}"], "settings call no resolver"), (["+foo=1"], "foo=1: no such setting"),
        (["--config-dir", "conf", "+campaign=mine"], "settings name no code to run"),
        (["-m", "model=smollm2,/tmp/x"], "with -m, several of"),
    ],
)  # fmt: skip
def test_calibrations_run_nothing_either(tmp_path: Path, capsys, monkeypatch, words: list[str], part: str) -> None:
    from calibrate.__main__ import main

    folder = settings_of_others(tmp_path, "")
    (folder / "campaign").mkdir()
    (folder / "campaign" / "mine.yaml").write_text(
        "# @package _global_\nhydra: {callbacks: {x: {_target_: pathlib.Path.touch}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["calibrate"])
    chosen = [] if any("model" in word or "campaign" in word for word in words) else ["model=smollm2"]
    assert main([*chosen, "budget_s=1", "device=cpu", *words]) == 1
    assert part in capsys.readouterr().err


@pytest.mark.slow
def test_a_calibration_is_written_where_it_is_told_to(tmp_path: Path, capsys, monkeypatch) -> None:
    from calibrate.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["calibrate"])
    for name in NAMES[:8]:
        assert main(["model=random:smollm2-135m", "budget_s=1", "device=cpu", f"out={name}"]) == 1
        assert "no stage is done in that time" in capsys.readouterr().err


@pytest.mark.parametrize(("sign", "fix"), [("\r", "U+000D.*Windows"), ("\u00a0", "U+00A0"), ("\u200b", "U+200B")])
def test_a_sign_that_does_not_show_is_named(sign: str, fix: str) -> None:
    error = unreadable(["pictures=false", f"workload.n_requests={sign}12"])
    assert error is not None
    assert re.search(re.escape("U+") + fix.removeprefix("U+"), str(error))


def test_several_studies_that_cannot_be_leave_nothing(command: CommandLine, tmp_path: Path) -> None:
    """Hydra writes multirun.yaml before it looks at settings."""
    said = command("-m", *SMALL, "nosuch.key=1,2", "hydra.sweep.dir=all/these")
    assert said.status == 1
    assert "nosuch.key" in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_the_users_that_nothing_would_read_is_told(command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("workload: {n_requests: 5}\n")
    said = command("--config-dir", str(tmp_path), "+experiment=quickstart", *SMALL)
    assert re.search(r"config.yaml': a study begins .* sets workload, is not read. Fix: move it to", said.err)
