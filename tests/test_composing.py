"""Settings that are composed again in one process: from what was read before, and as if it had been read anew."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from command_line import CommandLine, write_study
from helios_sim.cli import MOST_LOOKED_AT
from helios_sim.composing import loaded
from helios_sim.config import register
from helios_sim.help import conf_folder


def composed(*words: str) -> str:
    register()
    with initialize_config_dir(conf_folder(), version_base=None):
        return OmegaConf.to_yaml(compose("config", [*words]))


def test_one_composition_leaves_nothing_in_the_next() -> None:
    first = composed()
    changed = composed("+experiment=quickstart", "workload.n_requests=7", "+workload.mix.tasks.own=1", "models=[a]")
    assert changed != first
    assert composed() == first


def test_a_file_is_read_again_once_it_was_written(tmp_path: Path) -> None:
    from hydra._internal.core_plugins.file_config_source import FileConfigSource

    file, source = tmp_path / "a.yaml", FileConfigSource("main", f"file://{tmp_path}")
    file.write_text("# @package _global_\nn: 1\nat: ${n}\n")
    for _ in range(2):
        found, anew = loaded(source, file), source.load_config("a")
        assert (found.config, found.header, found.path, found.provider) == (
            anew.config, anew.header, anew.path, anew.provider,
        )  # fmt: skip
        found.config.n, found.header["package"] = 9, "other"
    file.write_text("n: 2\n")
    os.utime(file, ns=(0, 1))
    assert loaded(source, file).config == {"n": 2}
    assert loaded(source, file).header == source.load_config("a").header


def test_files_are_read_as_omegaconf_reads_them(tmp_path: Path) -> None:
    from hydra._internal.core_plugins.file_config_source import FileConfigSource

    file, source = tmp_path / "a.yaml", FileConfigSource("main", f"file://{tmp_path}")
    for text in (
        "", "a: &a {b: 1e3, c: 1e-2, d: .5, e: 1_0, f: 2020-01-02}\ng: {<<: *a, b: ~}\n", "- 1\n- {a: yes}\n",
        "a: 'é ${b}'\nb: >-\n  one\n  two\nc: 0x1F\nd: !!str 1\ne: [off, 010, 1:30, 1:30.5, .inf, 0o7]\n",
    ):  # fmt: skip
        file.write_text(text, encoding="utf-8")
        os.utime(file, ns=(0, len(text)))
        assert OmegaConf.to_yaml(loaded(source, file).config) == OmegaConf.to_yaml(OmegaConf.load(file))
    for wrong in ("a: 1\na: 2\n", "a: [1\n", "a: !!python/name:os.system x\n"):
        file.write_text(wrong, encoding="utf-8")
        os.utime(file, ns=(0, len(wrong)))
        with pytest.raises(yaml.YAMLError):
            loaded(source, file)


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    compose_all = ConfigLoaderImpl._load_configuration_impl

    def counted(*args: object, **named: object) -> object:
        found.append("one")
        return compose_all(*args, **named)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counted)
    return found


@pytest.mark.parametrize("flag", ["--config-dir", "-cd"])
def test_a_folder_of_ones_own_is_composed_once(
    command: CommandLine, tmp_path: Path, compositions: list[str], flag: str
) -> None:
    _, folder, *others = write_study(tmp_path)
    assert command(flag, folder, *others, "workload.n_requests=0").status == 1
    assert compositions == ["one"]


@pytest.mark.parametrize("where", ["in the file", "in a file of Hydra's", "in one of many files", "behind a link"])
def test_files_may_say_that_there_are_several_studies(
    command: CommandLine, tmp_path: Path, where: str
) -> None:
    """Values of a sweep, and no -m: without what the files say the values would be no number."""
    _, folder, *others = write_study(tmp_path)
    conf = Path(folder)
    several = "hydra: {mode: MULTIRUN}\n"
    if where == "in the file":
        file = conf / "experiment" / "mine.yaml"
        file.write_text(file.read_text() + several)
    else:
        (conf / "hydra").mkdir()
        (conf / "hydra" / "several.yaml").write_text("# @package hydra\nmode: MULTIRUN\n")
        others.append("+hydra=several")
    if where == "in one of many files":
        for n in range(MOST_LOOKED_AT):
            (conf / f"{n}.txt").touch()
    if where == "behind a link":
        shutil.move(conf / "hydra", tmp_path / "elsewhere")
        (conf / "hydra").symlink_to(tmp_path / "elsewhere")
    said = command("-cd", folder, *others, "workload.n_requests=0,-1", f"hydra.sweep.dir={tmp_path / 'out'}")
    assert said.status == 1
    assert [said.err.count(f"workload.n_requests={n}: must be a whole number") for n in (0, -1)] == [1, 1]
