"""What other models predict of a tiny model's answers: transformers, token by token, is the reference; resuming."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from calibrate.exits import answers as own, drafters as of_drafters  # noqa: E402
from calibrate.exits.traces import TimeSpent, TraceOrigin  # noqa: E402
from calibrate.report.drafters import drafts_summary  # noqa: E402
from calibrate.report.outputs import use_joint  # noqa: E402
from calibrate_line import calibrate  # noqa: E402
from helios_sim import simulate  # noqa: E402
from helios_sim.exits.artificial import synthetic_trace  # noqa: E402
from helios_sim.exits.store import read_trace, write_trace  # noqa: E402
from helios_sim.live.checkpoint.source import find_checkpoint  # noqa: E402
from helios_sim.live.model.decoder import SegmentedModel  # noqa: E402
from helios_sim.live.model.heads import ExitHeads  # noqa: E402
from test_live_drafter import write_shallow  # noqa: E402
from tiny_models import tiny_tokenizer, write_tiny  # noqa: E402

TASKS, ANSWERS, TOKENS, PROMPT_CHARS = ("code",), 3, 12, 40
QUICK = ("+task=drafters", "quick=true", "threads=1", "dtype=float32", "tasks=[code]", "answers=3", "out=out")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The model, its first layers, which are often right, and a model that knows nothing of it."""
    folder = tmp_path_factory.mktemp("drafters")
    found = {
        "large": write_tiny("llama", folder / "large"),
        "shallow": write_shallow("llama", folder / "shallow"),
        "stranger": write_tiny("llama", folder / "stranger", layers=2, seed=1),
    }
    write_tiny("llama", folder / "foreign", layers=2, seed=2)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder / "foreign")
    return found


def loaded(folder: Path) -> SegmentedModel:
    return SegmentedModel.load(find_checkpoint(str(folder)))


def recorded(folder: Path, scratch: Path, tell=lambda text, share: None):
    """The trace of the answers, and the answers."""
    checkpoint = find_checkpoint(str(folder))
    trace, _ = own.generated_trace(
        loaded(folder), checkpoint.tokenizer(), ExitHeads.own((3,)), TraceOrigin("large", "0" * 64, "a test"), scratch,
        TASKS, ANSWERS, TOKENS, tell, PROMPT_CHARS,
    )  # fmt: skip
    return trace, own.read_answers(scratch, trace.tasks)


@pytest.fixture(scope="module")
def answered(folders, tmp_path_factory):
    return recorded(folders["large"], tmp_path_factory.mktemp("answers"))


@pytest.mark.parametrize("name", ["shallow", "stranger"])
def test_what_is_recorded_of_a_drafter_is_what_transformers_says_token_by_token(
    name: str, folders, answered, tmp_path: Path, monkeypatch
) -> None:
    trace, answers = answered
    assert [len(a.tokens) for a in answers] == np.bincount(trace.prompt).tolist()
    monkeypatch.setattr(of_drafters, "batches", lambda texts: [[2, 0], [1]])  # texts of several lengths in a batch
    found = of_drafters.predictions(loaded(folders[name]), answers, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    right, sure, bits = [], [], []
    for answer in answers:
        for n, token in enumerate(answer.tokens):
            with torch.no_grad():
                logits = reference(torch.tensor([[*answer.prompt, *answer.tokens[:n]]])).logits[0, -1]
            p = logits.softmax(-1)
            right.append(bool(p.argmax() == token))
            sure.append(float(p.max()))
            bits.append(-float(p[token].log2()))
    assert found.right.tolist() == right
    assert np.allclose(found.sure, sure, rtol=1e-4)
    assert np.allclose(found.bits, bits, rtol=1e-3, atol=1e-3)
    assert any(right) == (name == "shallow")


def test_the_model_itself_would_draft_every_token(folders, answered, tmp_path: Path) -> None:
    _, answers = answered
    assert of_drafters.predictions(loaded(folders["large"]), answers, tmp_path).right.all()


def test_a_joint_trace_holds_each_drafter_and_fuses_them(folders, answered, tmp_path: Path) -> None:
    trace, answers = answered
    both = ("shallow", "stranger")
    found = {name: of_drafters.predictions(loaded(folders[name]), answers, tmp_path / name) for name in both}
    joint = of_drafters.joint_trace(trace, found, dict.fromkeys(both, "0" * 64), "a test")
    surer = found["shallow"].sure >= found["stranger"].sure
    fused = np.where(surer, found["shallow"].right, found["stranger"].right)
    assert (joint.drafted_by_all(both) != fused).sum() <= 1  # sures are kept to three digits
    assert (joint.agree == trace.agree).all()
    told = drafts_summary(joint)
    assert told["shallow"]["code"] == pytest.approx(found["shallow"].right.mean(), abs=1e-4)
    assert set(told) == {*both, "shallow+stranger"}


class Stopped(Exception):
    """The process was killed."""


def test_what_was_interrupted_goes_on_to_the_same_bits(folders, answered, tmp_path: Path, monkeypatch) -> None:
    trace, answers = answered
    monkeypatch.setattr(of_drafters, "batches", lambda texts: [[0], [1], [2]])
    drafter, said = loaded(folders["shallow"]), []
    whole = of_drafters.predictions(drafter, answers, tmp_path / "whole")

    def stop(text: str, share: float | None) -> None:
        if text.startswith("batch 2"):
            raise Stopped

    with pytest.raises(Stopped):
        of_drafters.predictions(drafter, answers, tmp_path / "part", stop)
    kept = sorted((tmp_path / "part").iterdir())
    assert len(kept) == 2
    with pytest.raises(TimeSpent, match="2 of 3 batches"):
        of_drafters.predictions(drafter, answers, tmp_path / "part", left_s=lambda: -1.0)
    kept[0].write_bytes(kept[0].read_bytes()[:50])  # damaged: read anew
    monkeypatch.setattr(of_drafters, "_read", lambda *read, of=of_drafters._read: said.append(1) or of(*read))
    again = of_drafters.predictions(drafter, answers, tmp_path / "part")
    assert len(said) == 2
    for name in ("right", "sure", "bits"):
        assert getattr(again, name).tobytes() == getattr(whole, name).tobytes()

    def unused(*_: object) -> None:
        raise AssertionError

    scratch = tmp_path / "answers"
    recorded(folders["large"], scratch)
    with monkeypatch.context() as patched:
        patched.setattr(own, "answers", unused)
        kept_trace, kept_answers = recorded(folders["large"], scratch)
    assert (kept_trace.bits == trace.bits).all()
    assert [a.tokens.tolist() for a in kept_answers] == [a.tokens.tolist() for a in answers]
    monkeypatch.setattr(own, "prompts", lambda task, count, chars: ["another question"])
    assert [a.tokens.tolist() for a in recorded(folders["large"], scratch)[1]] != [a.tokens.tolist() for a in answers]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("", ["drafters={}", "+drafters={small: PATH}"]),
        ("+drafters={foreign: FOLDER/foreign}", ["drafters.foreign=", "very tokenizer of large", "same family"]),
        ("+drafters={copy: FOLDER/large}", ["drafters.copy=", "those of large, the model that verifies"]),
        ("+drafters={large: FOLDER/shallow}", ["drafters='large'", "another name than that of the model"]),
        ("+drafters={a: FOLDER/shallow, b: FOLDER/shallow}", ["drafters.b=", "those of a", "name other weights"]),
        ("+drafters={a+b: FOLDER/shallow}", ["drafters='a+b'", "a name without +"]),
        ("+drafters={a: FOLDER/none}", ["drafters.a=", "a folder, a .gguf file"]),
        ("+drafters={a: FOLDER/shallow} answers=0", ["answers=0", "at least 1"]),
    ],
)
def test_a_drafter_that_cannot_be_is_one_message(given, parts, folders, tmp_path, monkeypatch, capsys) -> None:
    large = folders["large"]
    words = [*QUICK, *given.replace("FOLDER", str(large.parent)).rsplit(" answers", 1)]
    words = [f"answers{word}" if word.startswith("=") else word for word in words if word]
    said = calibrate(monkeypatch, capsys, tmp_path, f"model={large}", *words)
    assert (said.status, said.out) == (1, "")
    (message,) = [line for line in said.err.splitlines() if line.startswith("calibrate: ")]
    for part in parts:
        assert part in message
    assert re.search(r"\. Fix: .+\.$", message)
    assert list(tmp_path.iterdir()) == []


def test_the_command_records_the_joint_trace_and_keeps_it(folders, tmp_path, monkeypatch, capsys) -> None:
    drafters = f"+drafters={{shallow: {folders['shallow']}, stranger: {folders['stranger']}}}"
    words = (f"model={folders['large']}", *QUICK, drafters)
    done = calibrate(monkeypatch, capsys, tmp_path, *words)
    assert done.status == 0, done.err
    joint = read_trace(tmp_path / "out" / "joint" / "large")
    answers = read_trace(tmp_path / "out" / "answers")
    assert (joint.agree == answers.agree).all()
    assert joint.provenance.details["drafters_weights_sha256"].keys() == {"shallow", "stranger"}
    assert done.summary["drafts"]["shallow"]["all"] == pytest.approx(joint.drafted_by("shallow").mean(), abs=1e-4)
    assert any("shallow predicts" in sentence for sentence in done.summary["verdict"])
    assert "What other models would draft" in (tmp_path / "out" / "report.html").read_text()
    alone = read_trace(tmp_path / "out" / "joint" / "stranger")
    assert (alone.exits, alone.task_chars().tolist()) == ((2,), joint.task_chars().tolist())
    again = calibrate(monkeypatch, capsys, tmp_path, *words)
    assert {stage["status"] for stage in again.summary["stages"].values()} == {"kept"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["drafts"] == done.summary["drafts"]


def test_the_joint_trace_is_simulated_by_the_line_that_is_shown(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    large, small, share = "qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", 0.7
    trace = synthetic_trace(large, (28,), ("code", "news"), tokens=1000)
    joint = replace(trace, drafters={small: np.random.default_rng(0).uniform(size=2000) < share})
    for each in (joint, synthetic_trace(small, (24,), ("code", "news"), tokens=1000)):
        write_trace(each, tmp_path / "out" / "joint" / each.model)
    (line,) = use_joint(joint, tmp_path / "out" / "joint")
    words = shlex.split(line)
    assert words[:4] == ["python", "-m", "helios_sim", "+experiment=own"]
    assert "exits.source=out/joint/{model}" in words
    few = ("workload.n_requests=40", "profile_band=none", "policy.draft_tokens=1")
    (arm,) = simulate("own", *words[4:], *few).arms.values()
    metrics = arm.replicates[0].metrics
    assert metrics["agreement"] == 1
    assert metrics["draft_acceptance"] == pytest.approx(share, abs=0.04)
    assert use_joint(replace(joint, model="nobody-knows-it"), tmp_path / "out" / "joint") == []
