"""Every mistake of a user of `python -m calibrate`: one message with the fix, status 1, nothing left behind."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import helios_sim
from calibrate.__main__ import in_full
from calibrate.schema import CalibrateConfig, CampaignConfig, CampaignLiveConfig, in_vain
from calibrate_line import calibrate as calibrate_line
from helios_sim.errors import UserError
from helios_sim.live import served
from helios_sim.live.checkpoint.known import KNOWN, SHORT_NAMES
from helios_sim.study.modes import FidelityConfig, LiveConfig, LiveFidelityConfig
from tiny_models import write_tiny

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("weights") / "tiny-llama")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


# (arguments, parts of the message). TINY and MIXTRAL stand for folders.
MISTAKES = [
    ("model=gpt-17", ["model.weights='gpt-17'", "smollm2-135m", "Fix"]),
    ("model=no/such/folder", ["no/such/folder", "Fix"]),
    ("model.weights=MIXTRAL", ["mixtral", "llama", "Fix"]),
    ("model=TINY device=tpu", ["device='tpu'", "cpu, cuda"]),
    ("model=TINY device=cuda", ["device='cuda", "Fix"]),
    ("model=TINY dtype=int4", ["dtype='int4'", "float32, bfloat16"]),
    ("model=TINY budget_s=0.001", ["budget_s=0.001", "no stage is done in that time"]),
    ("model=TINY budget_s=-1", ["budget_s=-1.0", "above 0"]),
    ("model=TINY budget_s=soon", ["budget_s='soon'", "a number or null"]),
    ("model=TINY memory_bytes=1000", ["memory='tiny-llama'", "6 layers", "1.00 kB", "model.layers"]),
    ("model=TINY model.layers=7", ["model.layers=7", "1 to 6"]),
    ("model=TINY model.exits=[6]", ["model.exits=[6]", "1 to 5"]),
    ("model=TINY model.exits=[4,2]", ["model.exits=[4, 2]", "ascend"]),
    ("model=TINY heads=nowhere", ["nowhere", "Fix"]),
    ("model=TINY +task=dance", ["task='dance'", "latency, adapters"]),
    ("model=TINY tasks=[poetry]", ["poetry", "code"]),
    ("model=TINY +task=report out=empty", ["out=", "empty'", "finished a stage"]),
    ("model=TINY out=/proc/none", ["out='/proc/none'", "cannot be made"]),
    ("model=TINY colour=red", ["colour='red'", "no such setting"]),
    ("model=TINY budget=5", ["budget='5'", "budget_s"]),
    ("model=TINY +task=potential card=nope", ["card='nope'", "a card of the catalogue", "card=card.yaml"]),
    ("model=TINY +task=potential card=8xh100", ["card='8 cards'", "cards that divide", "cards a group"]),
    ("model=TINY quickly", ["argument='quickly'", "key=value", "python -m calibrate --help"]),
    ("+campaign=rehearsal live.round_requests=0", ["live.round_requests=0", "at least 1"]),
    ("--faster", ["--faster", "Fix"]),
]


def test_what_a_task_does_not_look_at_is_told():
    words = ["model=x", "+task=latency", "trace_tokens=900", "budget_s=60", "max_batch=4", "epochs=2"]
    assert in_vain(CalibrateConfig(task="latency"), words) == [
        "trace_tokens=900 does nothing here: it counts for task=all or adapters or train_exits or traces or "
        "predictors or potential",
        "epochs=2 does nothing here: it counts for task=adapters",
    ]
    assert in_vain(CalibrateConfig(task="report"), ["budget_s=5", "threshold=0.8"])[0].startswith("budget_s=5 does")


@pytest.mark.parametrize(("line", "parts"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_gives_one_message_and_leaves_nothing(line, parts, tiny, mixtral, tmp_path, monkeypatch, capsys):
    if "device=cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a card here")
    arguments = [word.replace("TINY", str(tiny)).replace("MIXTRAL", str(mixtral)) for word in line.split()]
    said = calibrate_line(monkeypatch, capsys, tmp_path, *arguments)
    assert said.status == 1, said.err
    assert said.out == ""
    (message,) = [text for text in said.err.splitlines() if text.startswith("calibrate: ")]
    for part in parts:
        assert part in message
    assert re.search(r"\. Fix: .+\.$", message)
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_without_torch_it_says_how_to_get_it(tmp_path, monkeypatch, capsys) -> None:
    there = served.find_spec
    monkeypatch.setattr(served, "find_spec", lambda name: None if name == "torch" else there(name))
    said = calibrate_line(monkeypatch, capsys, tmp_path, "model=smollm2")
    assert said.status == 1
    assert "packages='torch'" in said.err
    assert "make live" in said.err
    assert list(tmp_path.iterdir()) == []


BLOCKED = "import sys; sys.modules['torch'] = None"
BROKEN = "raise OSError('libcudart.so.12: cannot open shared object file')"


@pytest.mark.parametrize(
    ("torch", "said"),
    [(None, "packages='torch': a calibration needs them installed"), (BROKEN, "cannot be loaded (OSError: libcudart")],
)
@pytest.mark.parametrize("words", [["model=smollm2"], ["+campaign=rehearsal"]])
def test_a_torch_that_cannot_be_imported_is_one_message(
    tmp_path: Path, torch: str | None, said: str, words: list[str]
) -> None:
    """In a process of its own, in which no module that needs torch has been imported before."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / ("sitecustomize.py" if torch is None else "torch.py")).write_text(torch or BLOCKED)
    places = [str(tmp_path / "site"), str(Path(helios_sim.__file__).parents[1])]
    ran = subprocess.run(
        [sys.executable, "-m", "calibrate", *words, "budget_s=20", "out=out"], cwd=tmp_path, capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)}, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (1, "")
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out").exists()


def test_known_weights_that_are_not_here_say_how_to_fetch_them(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HELIOS_CACHE", str(tmp_path / "cache"))
    said = calibrate_line(monkeypatch, capsys, tmp_path, "model=gemma3")
    assert said.status == 1
    assert "model='gemma3-270m'" in said.err
    assert "python -m calibrate.models gemma3-270m" in said.err


def test_short_names_are_those_of_known_weights() -> None:
    assert set(SHORT_NAMES.values()) == set(KNOWN)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (lambda x: CalibrateConfig(budget_s=x), "budget_s"),
        (lambda x: CalibrateConfig(epochs=x), "epochs"),
        (lambda x: CampaignConfig(budget_s=x, models=["a"], text_model="a"), "budget_s"),
        (lambda x: CampaignConfig(models=["a"], text_model="a", live=CampaignLiveConfig(loads=[0.5, x])), "live.loads"),
        (lambda x: LiveFidelityConfig([0.5], seconds=x), "fidelity_live.seconds"),
        (lambda x: LiveFidelityConfig([0.5], calibrate_s=x), "fidelity_live.calibrate_s"),
        (lambda x: FidelityConfig(profile_error=x), "fidelity.profile_error"),
        (lambda x: FidelityConfig(load_factors=[x]), "fidelity.load_factors"),
        (lambda x: LiveConfig(pace_every_s=x), "live.pace_every_s"),
    ],
)
def test_what_is_infinite_or_no_number_is_refused_by_its_key(settings, key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(key)}=.*must be finite"):
        settings(value)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("model=smollm2", ["model.name=smollm2-135m"]),
        ("model=gemma3-270m", ["model.name=gemma3-270m"]),
        ("model=/here/My_Model/ budget_s=5", ["budget_s=5", "model.weights=/here/My_Model/", "model.name=my_model"]),
        ("model=a/b.gguf model.name=c", ["model.name=c", "model.weights=a/b.gguf"]),
        ("model=mine model.weights=x/y", ["model.weights=x/y", "model.name=mine"]),
        ("--cfg job +task=traces", ["task=traces", "--cfg", "job"]),
    ],
)
def test_short_ways_to_write_settings(written: str, read: list[str]) -> None:
    assert in_full(written.split()) == read
