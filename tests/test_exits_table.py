"""An exit trace from a table of one's own: both layouts, in CSV and Parquet, give the trace that was written down."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from command_line import CommandLine, write_study
from helios_sim.api import simulate
from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence
from helios_sim.exits.store import load_trace, read_trace
from helios_sim.exits.table import Told, read_table
from helios_sim.exits.trace import ExitTrace
from helios_sim.provenance import NOT_READ

EXITS = (6, 12, 24)
COMMAND = (sys.executable, "-m", "helios_sim.exits.import")


def columns(tokens: int = 60) -> dict[str, list]:
    """Two tasks, one after the other in turns, prompts of five tokens."""
    rng = np.random.default_rng(0)
    found: dict[str, list] = {
        "task": ["news" if i // 10 % 2 else "code" for i in range(tokens)],
        "prompt": [f"p{i // 5 % 3}" for i in range(tokens)],
        "chars": rng.integers(1, 9, tokens).tolist(),
    }
    for depth in EXITS:
        found[f"agree_{depth}"] = [True] * tokens if depth == 24 else (rng.random(tokens) < 0.6).tolist()
        found[f"confidence_{depth}"] = rng.random(tokens).round(3).tolist()
        likelihood = np.log(np.maximum(found[f"confidence_{depth}"], 1e-3))
        found[f"log_prob_{depth}"] = (likelihood - rng.exponential(2.0, tokens)).tolist()
    return found


def longer(wide: dict[str, list]) -> dict[str, list]:
    """One row a token and exit, deepest first, prompts apart."""
    found: dict[str, list] = {}
    for i in range(len(wide["prompt"])):
        for depth in reversed(EXITS):
            row = {"task": wide["task"][i], "prompt": wide["prompt"][i], "token": i, "layer": depth}
            row |= {"chars": wide["chars"][i]}
            row |= {name: wide[f"{name}_{depth}"][i] for name in ("agree", "confidence", "log_prob")}
            for name, value in row.items():
                found.setdefault(name, []).append(value)
    return found


def written(folder: Path, found: dict[str, list], name: str = "mine.parquet") -> Path:
    path = folder / name
    if name.endswith(".csv"):
        ones = {key: [int(v) for v in values] if key.startswith("agree") else values for key, values in found.items()}
        csv.write_csv(pa.table(ones), path)
    else:
        pq.write_table(pa.table(found), path)
    return path


def same(a: ExitTrace, b: ExitTrace) -> bool:
    tables = [(t.task, t.prompt, t.chars, t.agree, t.bits, *t.confidences.values()) for t in (a, b)]
    equal = all(np.array_equal(x, y) for x, y in zip(*tables, strict=True))
    return equal and (a.exits, a.tasks, a.human_text) == (b.exits, b.tasks, b.human_text)


@pytest.mark.parametrize("name", ["mine.parquet", "mine.csv"])
def test_each_layout_and_format_gives_what_was_written(tmp_path: Path, name: str) -> None:
    wide, told = columns(), Told(human_text=True)
    trace, ignored = read_table(written(tmp_path, wide | {"word": ["x"] * 60}, name), "m", told)
    assert ignored == ["word"]
    text = [(wide["task"][i], wide["prompt"][i]) for i in range(60)]
    order = sorted(range(60), key=lambda i: (text[i][0], text.index(text[i])))  # by task and prompt, in reading order
    assert trace.tasks == ("code", "news")
    assert trace.chars.tolist() == [wide["chars"][i] for i in order]
    for e, depth in enumerate(EXITS):
        assert trace.agree[:, e].tolist() == [wide[f"agree_{depth}"][i] for i in order]
        expected = np.array([wide[f"confidence_{depth}"][i] for i in order], np.float32)
        assert np.array_equal(trace.confidences[Confidence.MAX_PROBABILITY][:, e], expected)
        assert trace.bits is not None
        assert trace.bits[:, e] == pytest.approx([-wide[f"log_prob_{depth}"][i] / np.log(2) for i in order], rel=1e-6)
    assert len(set(trace.prompt.tolist())) == 6  # p0 to p2 in each of two tasks
    # Numbered by prompt and token, rows may come in any order.
    long = longer(columns())
    prompts = {key: long[key] for key in ("task", "prompt", "token")}
    place = sorted(range(180), key=lambda i: (prompts["task"][i], prompts["prompt"][i], prompts["token"][i]))
    by_prompt = {key: [values[i] for i in place] for key, values in long.items()}
    again, _ = read_table(written(tmp_path, long, f"long_{name}"), "m", told)
    assert same(again, read_table(written(tmp_path, by_prompt, f"sorted_{name}"), "m", told)[0])


def test_what_follows_from_the_deepest_exit_may_be_left_out(tmp_path: Path) -> None:
    wide = {name: values for name, values in columns().items() if not name.startswith("log_prob")}
    whole, _ = read_table(written(tmp_path, wide), "m")
    assert same(read_table(written(tmp_path, without("agree_24")(wide)), "m")[0], whole)
    trace, _ = read_table(written(tmp_path, without("confidence_24")(wide)), "m")
    assert trace.confidences[Confidence.MAX_PROBABILITY][:, -1].tolist() == [1.0] * 60
    assert trace.provenance.scaled == ("confidence_24: 1, since no token can leave elsewhere",)


def test_verdicts_may_be_written_as_1_0(tmp_path: Path) -> None:
    """As pandas writes columns that had gaps."""
    wide = {name: values for name, values in columns().items() if not name.startswith("log_prob")}
    found = {name: [float(v) for v in values] if name.startswith("agree") else values for name, values in wide.items()}
    pq.write_table(pa.table(found), tmp_path / "mine.parquet")
    assert same(read_table(tmp_path / "mine.parquet", "m")[0], read_table(written(tmp_path, wide, "a.csv"), "m")[0])
    found["agree_12"][3] = 0.5
    pq.write_table(pa.table(found), tmp_path / "mine.parquet")
    with pytest.raises(UserError, match=r"agree=0\.5: 0 or 1"):
        read_table(tmp_path / "mine.parquet", "m")


def test_characters_by_their_mean_add_up(tmp_path: Path) -> None:
    wide = {name: values for name, values in columns().items() if name not in ("chars", "task") and "log" not in name}
    trace, _ = read_table(written(tmp_path, wide), "m", Told(chars_per_token=4.2))
    assert trace.tasks == ("*",)
    assert trace.chars.sum() == round(60 * 4.2)
    assert set(trace.chars.tolist()) == {4, 5}


def without(*names: str):
    return lambda wide: {name: values for name, values in wide.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("prompt"), ["a column prompt is missing"]),
        (without("chars"), ["chars_per_token", "helios_sim.exits.import"]),
        (without(*(f"agree_{d}" for d in EXITS)), ["agree_D"]),
        (without(*(f"confidence_{d}" for d in EXITS)), ["confidence_D"]),
        (without("confidence_6"), ["no confidence_6"]),
        (without("agree_12"), ["no agree_12"]),
        (without("log_prob_24"), ["no log_prob_24"]),
        (lambda wide: wide | {"confidence_6": [1.5] * 60}, ["1.5", "0 to 1"]),
        (lambda wide: wide | {"confidence_6": [92.5] * 60}, ["92.5", "0 to 1"]),  # per cent
        (lambda wide: wide | {"confidence_6": [float("nan")] * 60}, ["confidence", "not finite"]),
        (lambda wide: wide | {"agree_6": [2] * 60}, ["2", "0 or 1"]),
        (lambda wide: wide | {"agree_24": [False] * 60}, ["agree"]),
        (lambda wide: wide | {"chars": [-1] * 60}, ["chars", "-1"]),
        (lambda wide: wide | {"log_prob_6": [0.5] * 60}, ["log_prob", "0.5"]),
        (lambda wide: {name: values[:0] for name, values in wide.items()}, ["mine.parquet"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_message(tmp_path: Path, change, words: list[str]) -> None:
    path = written(tmp_path, change(columns()))
    with pytest.raises(UserError) as said:
        read_table(path, "m", Told(human_text=False))
    assert all(word in str(said.value) for word in words), said.value


def test_confidences_as_logarithms_are_refused(tmp_path: Path) -> None:
    bare = without(*(f"log_prob_{depth}" for depth in EXITS))(columns()) | {"confidence_6": [-0.25] * 60}
    with pytest.raises(UserError, match=r"confidence.*-0\.25.*0 to 1"):
        read_table(written(tmp_path, bare), "m", Told())


def test_a_table_of_very_many_columns_is_refused_at_once(tmp_path: Path) -> None:
    many = columns() | {f"c{i}": [0] * 60 for i in range(20_000)}
    path = tmp_path / "many.csv"
    rows = zip(*many.values(), strict=True)
    path.write_text("\n".join([",".join(many), *(",".join(str(int(c) if isinstance(c, bool) else c) for c in row)
                                                 for row in list(rows)[:3])]) + "\n")  # fmt: skip
    began_s = time.process_time()
    with pytest.raises(UserError, match="1000 columns"):
        read_table(path, "m", Told(human_text=False))
    assert time.process_time() - began_s < 5


def test_a_token_without_one_of_its_exits_is_named(tmp_path: Path) -> None:
    long = {name: [v for i, v in enumerate(values) if i != 40] for name, values in longer(columns()).items()}
    with pytest.raises(UserError, match="each token once at each of the layers 6, 12, 24"):
        read_table(written(tmp_path, long), "m", Told(human_text=False))


def test_log_probabilities_need_to_know_who_wrote_the_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="human_text=true"):
        load_trace("m", str(written(tmp_path, columns())))


@pytest.mark.slow
def test_the_command_writes_a_trace_that_a_study_reads(command: CommandLine) -> None:
    table = written(command.folder, columns() | {"word": ["x"] * 60}, "opt-1.3b.parquet")
    ran = subprocess.run([*COMMAND, str(table), "human_text=false"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "60 tokens of 6 prompts, 2 tasks" in ran.stdout
    assert "not read: 'word'" in ran.stdout
    folder = command.folder / "opt-1.3b.exits"
    assert same(read_trace(folder), read_table(table, "opt-1.3b", Told(human_text=False))[0])
    plain = written(command.folder, without(*(f"log_prob_{d}" for d in EXITS))(columns()), "plain.csv")
    study = (*write_study(command.folder), "pictures=false", "workload.mix.tasks={news: 0.5, code: 0.5}")
    of = {source: command(*study, f"exits.source={source}", into=f"out{i}") for i, source in enumerate((folder, plain))}
    assert [said.status for said in of.values()] == [0, 0], [said.err for said in of.values()]
    first, second = (said.summary["arms"]["early_exit"]["metrics"] for said in of.values())
    assert first == second
    assert first["agreement"] < 1.0


@pytest.mark.parametrize("words", [["x.txt"], ["no.csv"], ["t.csv", "nonsense"], ["t.csv", "human_text=yes"],
                                   ["t.csv", "chars_per_token=0"]])  # fmt: skip
def test_the_command_refuses_in_one_line(tmp_path: Path, words: list[str]) -> None:
    written(tmp_path, columns(), "t.csv")
    ran = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("helios_sim: ")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"log_prob_6": [-0.001] * 60, "confidence_6": [0.1] * 60}, r"row \d+: log_prob_6.*largest probability"),
        ({"margin_6": [0.9] * 60, "margin_12": [0.0] * 60, "confidence_6": [0.1] * 60, "log_prob_6": [-9.0] * 60},
         r"row \d+: margin_6.*largest probability"),
        ({"token": [*range(10), 3, *range(11, 60)]}, "row 12: token.*reading order.*sort the rows"),
        ({"token": [*range(10), 9, *range(11, 60)]}, "row 12: token.*each once. Fix: remove the rows"),
        ({"chars": [20_000, *[5] * 59]}, "chars=20000"),
        ({"log_prob_6": [-1e5] * 60}, "log_prob=-100000.0"),
    ],
)  # fmt: skip
def test_columns_that_contradict_each_other_are_refused(tmp_path: Path, change: dict, said: str) -> None:
    alike = {"task": ["news"] * 60, "prompt": ["a"] * 60}
    read_table(written(tmp_path, columns() | alike | {"token": list(range(60))}, "good.parquet"), "m", Told(None, True))
    with pytest.raises(UserError, match=said):
        read_table(written(tmp_path, columns() | alike | change), "m", Told(None, True))


def test_rows_of_two_models_are_no_trace(tmp_path: Path) -> None:
    one = pa.table({**columns(), "model": ["org/M"] * 60})
    pq.write_table(one, tmp_path / "one.parquet")
    assert read_table(tmp_path / "one.parquet", "m", Told(human_text=True))[1] == []
    assert read_table(tmp_path / "one.parquet", "one", Told(human_text=True), is_named=False)[1] == ["model"]
    with pytest.raises(UserError, match=r"model='org/M': m-1b, for which the table is named"):
        read_table(tmp_path / "one.parquet", "m-1b", Told(human_text=True))
    pq.write_table(one.set_column(one.num_columns - 1, "model", pa.array(["a", "b"] * 30)), tmp_path / "two.parquet")
    with pytest.raises(UserError, match="one model in all rows"):
        read_table(tmp_path / "two.parquet", "m", Told(human_text=True))


@pytest.mark.slow
def test_a_study_says_which_columns_are_not_read(tmp_path: Path) -> None:
    found = columns() | {"surprise": [1.0] * 60, "agrees_6": [True] * 60}
    found = {name: values for name, values in found.items() if not name.startswith("log_prob")}
    trace = read_table(written(tmp_path, found), "opt-1.3b")[0]
    assert trace.provenance.details[NOT_READ] == "mine.parquet: not read: surprise, agrees_6"
    result = simulate(
        "own", "policy=full_depth", "workload.mix.tasks={news: 1, code: 1}",
        settings={"exits.source": str(tmp_path / "mine.parquet"), "models": ["opt-1.3b"], "workload.n_requests": 4},
    )  # fmt: skip
    assert "mine.parquet: not read: surprise, agrees_6" in result.warnings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt\tagree_6\tconfidence_6\n0\t1\t0.5\n", "comma-separated"),
        ("prompt;agree_6;confidence_6\n0;1;0.5\n", "comma-separated"),
        ("prompt,agree_6,confidence_6\n", "no rows"),
        ("prompt,task,agree_6,confidence_6\n0,a,1,0.5\n0,,1,0.5\n", "row 3: task"),
        ("prompt,model_id,agree_6,confidence_6\n0,a,1,0.5\n0,b,1,0.5\n", "one model in all rows"),
    ],
)
def test_what_is_no_whole_table_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        read_table(tmp_path / "t.csv", "m", Told(chars_per_token=4.0))


def test_empty_cells_of_a_name_in_parquet_are_refused(tmp_path: Path) -> None:
    table = {"prompt": [0, 1], "task": ["a", None], "agree_6": [1, 1], "confidence_6": [0.5, 0.6]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"task.*cells are empty"):
        read_table(tmp_path / "t.parquet", "m", Told(chars_per_token=4.0))


def test_rows_of_a_batch_go_back_to_their_prompts(tmp_path: Path) -> None:
    """A batch that is written step by step has rows of its prompts in turns."""
    rows = "".join(f"{i % 2},{i},1,0.5\n" for i in range(6))
    (tmp_path / "t.csv").write_text("prompt,chars,agree_6,confidence_6\n" + rows)
    trace, _ = read_table(tmp_path / "t.csv", "m")
    assert trace.prompt.tolist() == [0, 0, 0, 1, 1, 1]
    assert trace.chars.tolist() == [0, 2, 4, 1, 3, 5]


def test_a_depth_of_0_is_no_depth(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt,chars,agree_0,agree_6,confidence_0,confidence_6\n0,1,1,1,0.5,0.6\n")
    with pytest.raises(UserError, match=r"agree_0.*depths from 1"):
        read_table(tmp_path / "t.csv", "m")
