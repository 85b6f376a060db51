"""Studies that are taken up again: what was made of other files, or is damaged, is run anew and said."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import random
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from capacity_example import CAPACITY
from command_line import STUDY, CommandLine, write_study
from helios_sim.api import study_config
from helios_sim.study import runner
from helios_sim.study.jobs import JobResult, run_job
from helios_sim.study.plan import plan_study
from helios_sim.vary.columns import from_bytes, to_bytes
from sweep_example import SWEEP

POLICY = """
from helios_sim.policy.full_depth import FullDepthParameters, FullDepthPolicy
from constants import LIMIT

class Mine(FullDepthPolicy):
    def __init__(self):
        super().__init__(FullDepthParameters(batch_limit=LIMIT))
"""
OWN = STUDY.replace("baseline:", "  mine: {policy: custom, object: 'my_policy:Mine'}\nbaseline:") + "seeds: [0, 1]\n"


@pytest.fixture(autouse=True)
def modules_of_its_own() -> Iterator[None]:
    """What a test imports under the name of a user's module is gone after it."""
    yield
    for name in ("my_policy", "my_reader", "constants"):
        sys.modules.pop(name, None)


pytestmark = pytest.mark.usefixtures("sketched")


@pytest.fixture
def stopped(command: CommandLine, monkeypatch: pytest.MonkeyPatch):
    """Runs a study until so many jobs are done."""

    def run(study: tuple[str, ...], after: int, *words: str) -> None:
        done = []

        def counted(job):
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(job)
            return run_job(job)

        monkeypatch.setattr(runner, "run_job", counted)
        assert command(*study, *words).status == 1
        monkeypatch.setattr(runner, "run_job", run_job)

    return run


def kept(said) -> int:
    return said.err.count("kept from before")


@pytest.mark.slow
def test_after_its_policy_file_was_edited_a_study_does_not_mix_both(command, stopped, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_policy", "constants"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # of another test
    (tmp_path / "my_policy.py").write_text(POLICY)
    (tmp_path / "constants.py").write_text("LIMIT = 1\n")
    study = write_study(tmp_path, OWN)
    stopped(study, 5)
    for name in ("my_policy", "constants"):
        sys.modules.pop(name)
    (tmp_path / "constants.py").write_text("LIMIT = 64\n")  # not the file itself, but one that it imports
    said = command(*study)
    assert said.status == 0, said.err
    assert "policy file constants.py changed since" in said.err
    assert kept(said) == 3  # of the arms that are not made of it, which runs first
    metrics = command(*study, into="undisturbed").summary["arms"]["mine"]["metrics"]
    assert said.summary["arms"]["mine"]["metrics"] == metrics


READS = """
import json, pathlib, sqlite3
import numpy as np
from helios_sim.policy.full_depth import FullDepthParameters, FullDepthPolicy

HERE = pathlib.Path(__file__).parent
AT_IMPORT = json.loads((HERE / "import.json").read_text())

class Mine(FullDepthPolicy):
    def __init__(self):
        super().__init__(FullDepthParameters(batch_limit=int(np.load(HERE / "made.npy")[0])))

    def start(self, situation):
        (HERE / "notes.txt").write_text("mine")
        self.notes = (HERE / "notes.txt").read_text()
        self.known = sqlite3.connect(HERE / "start.db").execute("select n from known").fetchone()
        return super().start(situation)
"""


NOTES = """
import pathlib
from helios_sim.policy.full_depth import FullDepthParameters, FullDepthPolicy

class Mine(FullDepthPolicy):
    def __init__(self):
        limit = int((pathlib.Path(__file__).parent / "limit.txt").read_text())
        super().__init__(FullDepthParameters(batch_limit=limit))
"""


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["import.json", "made.npy", "start.db", None])
def test_files_that_a_policy_opens_itself_are_part_of_its_result(
    command, stopped, tmp_path, monkeypatch, changed: str | None
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_reader", raising=False)
    (tmp_path / "my_reader.py").write_text(READS)

    def write(name: str, value: int) -> None:
        if name == "import.json":
            (tmp_path / name).write_text(f"[{value}]")
        elif name == "made.npy":
            np.save(tmp_path / name, np.array([value]))
        else:
            (tmp_path / name).unlink(missing_ok=True)
            with closing(sqlite3.connect(tmp_path / name)) as known:
                known.execute("create table known(n)")
                known.execute("insert into known values(?)", (value,))
                known.commit()

    for name in ("import.json", "made.npy", "start.db"):
        write(name, 1)
    study = write_study(tmp_path, OWN.replace("my_policy", "my_reader"))
    stopped(study, 5)
    sys.modules.pop("my_reader")
    if changed is not None:
        write(changed, 64)
    said = command(*study)
    assert said.status == 0, said.err
    assert kept(said) == (5 if changed is None else 3)
    assert (changed is not None) == ("changed since: results in" in said.err)
    if changed is not None:
        assert f"{tmp_path / changed} changed since" in said.err
    made_of = json.loads((tmp_path / "out" / "provenance.json").read_text())["made_of"]
    opened = {Path(name.partition(": ")[2]).name for name in made_of if name.startswith("opened by a policy: ")}
    assert opened == {"import.json", "made.npy", "start.db"}  # and not the notes that it wrote itself


@pytest.mark.parametrize("kind", ["designs", "capacity"])
def test_designs_and_capacity_plans_name_them_too(command, tmp_path, monkeypatch, kind: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_notes", raising=False)
    (tmp_path / "limit.txt").write_text("4")
    (tmp_path / "my_notes.py").write_text(NOTES)
    own = "\n  mine: {policy: custom, object: my_notes:Mine}\n"
    if kind == "designs":
        text = SWEEP.replace("\n  helios: {policy: helios}\n", own).partition("    limit:")[0]
    else:
        text = CAPACITY.replace("\n  static_cap: {policy: static_cap}\n", own).replace(", h100-80gb", "")
        text = text.replace("seeds: [0, 1]", "seeds: [0]\njobs: 1\nprofile_band: none")
    said = command(*write_study(tmp_path, text), "pictures=false")
    assert said.status == 0, said.err
    made_of = json.loads((tmp_path / "out" / "provenance.json").read_text())["made_of"]
    assert {Path(name.partition(": ")[2]).name for name in made_of if name.startswith("opened by")} == {"limit.txt"}


@pytest.mark.slow
def test_a_profile_or_trace_rewritten_in_place_is_not_kept(command, stopped, tmp_path) -> None:
    from helios_sim.profile.store import PROFILES_FOLDER

    mine = tmp_path / "profiles" / "opt-1.3b@a100-40gb"
    mine.mkdir(parents=True)
    for file in (PROFILES_FOLDER / mine.name).iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{i},20,9\n" for i in range(12)))
    words = (
        f"profile_folder={mine.parent}", f"workload.lengths.trace={trace}", "workload.lengths.kind=trace",
        "workload.n_requests=12", "seeds=[0,1]",
    )  # fmt: skip
    study = write_study(tmp_path)
    stopped(study, 3, *words)
    assert kept(command(*study, *words)) == 3
    header = json.loads((mine / "profile.json").read_text())
    (mine / "profile.json").write_text(json.dumps(header | {"provenance": header["provenance"] | {"command": "x"}}))
    said = command(*study, *words, into="again")
    assert said.status == 0, said.err
    stopped(study, 3, *words, "hydra.run.dir=third")
    text = trace.read_text()
    trace.write_text(text.replace("20,9", "21,9"))
    said = command(*study, *words, "hydra.run.dir=third")
    assert f"trace {trace} changed since" in said.err
    assert kept(said) == 0


@pytest.mark.slow
def test_a_flipped_bit_is_noticed_and_run_anew(command, stopped, tmp_path) -> None:
    study = (*write_study(tmp_path), "seeds=[0,1]")
    whole = command(*study, into="whole").summary["arms"]
    stopped(study, 3)
    journal = tmp_path / "out" / "finished.jsonl"
    lines = journal.read_text().splitlines()
    file = tmp_path / "out" / "finished" / f"{json.loads(lines[0])['key']}.columns"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    lines[2] = lines[2].replace('"seed": ', '"seed": 1')
    journal.write_text("\n".join(lines) + "\n" + '{"half a li')
    said = command(*study)
    assert said.status == 0, said.err
    assert "a result in" in said.err
    assert "a line is damaged" in said.err
    assert kept(said) == 1  # of three
    assert said.summary["arms"] == whole


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.slow
def test_nothing_on_disk_is_unpickled(command, stopped, tmp_path) -> None:
    study = (*write_study(tmp_path), "seeds=[0,1]")
    stopped(study, 2)
    for file in list((tmp_path / "out" / "finished").iterdir()):
        for name in (file.name, f"{file.stem}.pickle"):
            file.with_name(name).write_bytes(pickle.dumps(Bomb()))
    said = command(*study)
    assert said.status == 0, said.err
    assert kept(said) == 0
    assert not (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_two_writers_in_one_folder_are_one_message(command, tmp_path) -> None:
    study = write_study(tmp_path)
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        said = command(*study)
    finally:
        os.close(descriptor)
    assert said.status == 1
    assert said.err.splitlines()[-1].startswith("helios_sim: hydra.run.dir=")
    assert "another process is at work" in said.err
    assert command(*study).status == 0


@pytest.fixture(scope="module")
def result() -> JobResult:
    config = study_config("quickstart", "workload.n_requests=30", "policy=oracle")
    return run_job(plan_study(config).jobs[-1])


@pytest.mark.slow
def test_a_result_reads_back_as_it_was(result: JobResult) -> None:
    content = to_bytes(result)
    again = from_bytes(JobResult, content)
    assert to_bytes(again) == content
    assert again.replicate.metrics == result.replicate.metrics
    assert again.timeline == result.timeline
    assert again.decisions[0].deployment == result.decisions[0].deployment


def test_damage_of_any_kind_is_a_value_error(result: JobResult) -> None:
    content, draw = to_bytes(result), random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        match draw.randrange(3):
            case 0:
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            case 1:
                del damaged[draw.randrange(len(damaged)) :]
            case _:
                damaged += b"more"
        with pytest.raises(ValueError, match="checksum"):
            from_bytes(JobResult, bytes(damaged))
