"""The offline bundle: made without an index, moved, joined, checked, installed into an empty environment, and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from calibrate import bundle as bundles
from calibrate.bundle import SUMS, BundleSettings, main, make_bundle, split
from calibrate.bundle_run import join, verify
from helios_sim.errors import UserError

NO_INDEX = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def test_a_large_file_is_split_and_joined_again(tmp_path) -> None:
    source = tmp_path / "weights.gguf"
    source.write_bytes(os.urandom(2500))
    parts = split(source, tmp_path / "models" / "weights.gguf", 1000)
    assert [path.stat().st_size for path in parts] == [1000, 1000, 500]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("whole")
    split(tmp_path / "texts" / "a.txt", tmp_path / "models" / "texts" / "a.txt", 1000)
    join(tmp_path / "models", tmp_path / "cache")
    assert (tmp_path / "cache" / "weights.gguf").read_bytes() == source.read_bytes()
    assert (tmp_path / "cache" / "texts" / "a.txt").read_text() == "whole"


@pytest.mark.live
def test_it_runs_where_there_is_nothing_but_the_host_s_packages(tmp_path, monkeypatch) -> None:
    pytest.importorskip("torch")
    for key, value in NO_INDEX.items():
        monkeypatch.setenv(key, value)
    made = make_bundle(BundleSettings(tmp_path / "made", models=(), packages=(), sources=()))
    bundle = shutil.move(made, tmp_path / "host" / "bundle")
    assert verify(bundle) == []

    venv.create(tmp_path / "empty", with_pip=True)
    # The host's own packages, without the editable install, whose .pth file is not read from here.
    host = {"PYTHONPATH": sysconfig.get_paths()["purelib"], "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **NO_INDEX}
    command = [
        "+campaign=rehearsal",
        "budget_s=25",  # from the start of the process, which loads torch
        "models=[tiny-opt-1.3b,tiny-opt-6.7b,tiny-smollm2-135m]",
        "out=out",
    ]
    ran = subprocess.run(
        [str(tmp_path / "empty" / "bin" / "python"), str(bundle / "run.py"), *command],
        cwd=tmp_path, env=host | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    stages = json.loads(ran.stdout.splitlines()[-1])["stages"]
    assert stages["ceilings"]["status"] == "done"
    assert (tmp_path / "out" / "a-device.tar.gz").is_file()
    assert (bundle / "site" / "helios_sim" / "conf" / "campaign" / "card.yaml").is_file()


def test_a_damaged_bundle_says_which_file(tmp_path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a").write_text("changed")
    (tmp_path / SUMS).write_text(f"{'0' * 64}  models/a\n")
    shutil.copyfile(Path(__file__).parents[1] / "calibrate" / "bundle_run.py", tmp_path / "run.py")
    ran = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.strip() == "run.py: damaged or missing: models/a. Fix: copy the bundle again."


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["python=3.12"], "out=None"),
        (["out=x", "python=2.7"], "python='2.7'"),
        (["out=x", "part_mib=0"], "part_mib='0'"),
        (["out=x", "models=[gpt]"], "models=['gpt']"),
        (["out=x", "wheels=1"], "argument='wheels=1'"),
        (["out=x", "with=[--index-url=x]"], "with=['--index-url=x']"),
        (["out=."], "empty folder"),
    ],
)
def test_a_mistake_is_one_message(arguments, part, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert part in line


def test_packages_that_the_checkout_pins_are_checked_by_their_digests(tmp_path, monkeypatch) -> None:
    commands: list[list[str]] = []

    def pip(command: str, *arguments: str) -> None:
        read = [Path(word).read_text() for word in arguments if word.endswith("pinned.txt")]
        commands.append([command, *arguments, *read])

    monkeypatch.setattr(bundles, "_pip", pip)
    bundles.fetch_wheels(tmp_path / "wheels", "3.12", ("simpy", "gguf", "own-thing==1.0"), ("antlr4-python3-runtime",))
    assert [command[0] for command in commands] == ["wheel", "wheel", "download", "download"]
    for command, names in zip(commands[1:3], (("antlr4-python3-runtime",), ("simpy", "gguf")), strict=True):
        assert "--require-hashes" in command
        assert re.findall(r"^([\w-]+)==.*(?=\n    --hash=sha256:)", command[-1], re.M) == list(names)
    assert commands[3][-1] == "own-thing==1.0"


def test_weights_that_are_not_here_are_said_before_anything_is_fetched(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HELIOS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"models='smollm2-135m'.*calibrate\.models"):
        make_bundle(BundleSettings(tmp_path / "out", models=("smollm2-135m",)))
    assert not (tmp_path / "out").exists()
