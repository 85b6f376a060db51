"""Traces of a tiny model: what is recorded equals what the model says, and characters add up."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from calibrate.exits import traces  # noqa: E402
from calibrate.exits.answers import characters, generated_trace  # noqa: E402
from calibrate.exits.hidden import start_token, states, tokenized  # noqa: E402
from calibrate.exits.texts import Split, passages  # noqa: E402
from calibrate.stages import CannotRun  # noqa: E402
from helios_sim.errors import UserError  # noqa: E402
from helios_sim.exits.rule import Confidence  # noqa: E402
from helios_sim.exits.store import read_trace, write_trace  # noqa: E402
from helios_sim.live.checkpoint.source import find_checkpoint  # noqa: E402
from helios_sim.live.model.decoder import SegmentedModel  # noqa: E402
from helios_sim.live.model.heads import ExitHeads  # noqa: E402
from tests.tiny_models import tiny_tokenizer, write_tiny  # noqa: E402

ORIGIN = traces.TraceOrigin("tiny", "0" * 64, "a test")
CHARS = {"code": 500}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_tiny("llama", tmp_path_factory.mktemp("tiny"))
    checkpoint = find_checkpoint(str(folder))
    return SegmentedModel.load(checkpoint), checkpoint.tokenizer(), folder


@pytest.fixture(autouse=True)
def short_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "PASSAGE_CHARS", 60)


def test_a_reference_trace_records_what_transformers_says(tiny, tmp_path: Path) -> None:
    import transformers

    model, tokenizer, folder = tiny
    trace, _ = traces.reference_trace(model, tokenizer, ExitHeads.own((3,)), ORIGIN, tmp_path, CHARS)
    texts = passages("code", Split.HELDOUT, CHARS["code"], 60)
    assert trace.task_chars().tolist() == [sum(map(len, texts))]
    assert trace.prompt[-1] == len(texts) - 1
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, _ = tokenized(tokenizer, texts[1])
    with torch.no_grad():
        read = whole(torch.tensor([[start_token(tokenizer, 320), *tokens[:-1]]]), output_hidden_states=True)
    logits = read.logits[0]
    p = torch.softmax(logits, -1)
    mine = trace.prompt == 1
    assert np.allclose(trace.recorded(Confidence.MAX_PROBABILITY)[mine, 1], p.amax(-1).numpy(), rtol=2e-3, atol=1e-4)
    bits = -torch.log2(p[torch.arange(len(tokens)), torch.from_numpy(tokens)]).numpy()
    assert np.allclose(trace.bits[mine, 1], bits, rtol=2e-3, atol=1e-3)
    best = p.topk(2).values
    margin = trace.recorded(Confidence.MARGIN)[mine, 1]
    assert np.allclose(margin, (best[:, 0] - best[:, 1]).numpy(), rtol=5e-3, atol=2e-4)
    bits_left = torch.distributions.Categorical(probs=p).entropy() / math.log(p.shape[-1])
    assert np.allclose(trace.recorded(Confidence.ENTROPY)[mine, 1], (1 - bits_left).numpy(), atol=1e-3)
    alike = torch.cosine_similarity(read.hidden_states[2][0], read.hidden_states[3][0], dim=-1)  # after 2 and 3 layers
    assert np.allclose(trace.recorded(Confidence.HIDDEN_SIMILARITY)[mine, 0], alike.clip(0, 1).numpy(), atol=1e-3)


def test_an_interrupted_trace_goes_on_and_is_written_and_read_alike(tiny, tmp_path: Path) -> None:
    model, tokenizer, _ = tiny
    heads = ExitHeads.own((2, 4))
    first, _ = traces.reference_trace(model, tokenizer, heads, ORIGIN, tmp_path / "a", CHARS)
    said: list[str] = []

    def tell(text: str, share: float | None) -> None:
        said.append(text)

    again, _ = traces.reference_trace(model, tokenizer, heads, ORIGIN, tmp_path / "a", CHARS, tell)
    assert said == []
    kept = sorted((tmp_path / "a").glob("*.npz"))
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # damaged: read anew
    again, _ = traces.reference_trace(model, tokenizer, heads, ORIGIN, tmp_path / "a", CHARS, tell)
    assert len(said) == 1
    write_trace(again, tmp_path / "trace")
    back = read_trace(tmp_path / "trace")
    assert np.array_equal(back.recorded(Confidence.MAX_PROBABILITY), first.recorded(Confidence.MAX_PROBABILITY))
    assert back.human_text


@pytest.mark.parametrize("fault", [MemoryError(), PermissionError(13, "Permission denied")])
def test_a_passage_that_cannot_be_read_now_is_not_taken_for_damaged(tiny, tmp_path: Path, monkeypatch, fault) -> None:
    """What was measured stays: only content that makes no sense is measured again."""
    model, tokenizer, _ = tiny
    traces.reference_trace(model, tokenizer, ExitHeads.own((2, 4)), ORIGIN, tmp_path, CHARS)
    kept = sorted(tmp_path.glob("*.npz"))

    def load(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(traces.np, "load", load)
    with pytest.raises(type(fault)):
        traces.reference_trace(model, tokenizer, ExitHeads.own((2, 4)), ORIGIN, tmp_path, CHARS)
    assert sorted(tmp_path.glob("*.npz")) == kept


def test_a_trace_that_lacks_time_holds_what_was_read_and_goes_on_later(tiny, tmp_path: Path) -> None:
    model, tokenizer, _ = tiny
    heads, left = ExitHeads.own((3,)), iter([1e9])
    wanted = CHARS
    whole, lacking = traces.reference_trace(model, tokenizer, heads, ORIGIN, tmp_path / "whole", wanted)
    assert lacking == ""
    part, lacking = traces.reference_trace(
        model, tokenizer, heads, ORIGIN, tmp_path / "a", wanted, left_s=lambda: next(left, 0.0)
    )
    assert "passages were read" in lacking
    assert 0 < part.n_tokens < whole.n_tokens
    rest, lacking = traces.reference_trace(model, tokenizer, heads, ORIGIN, tmp_path / "a", wanted, left_s=lambda: 1e9)
    assert (lacking, rest.n_tokens, rest.tasks) == ("", whole.n_tokens, whole.tasks)


def test_generated_answers_are_full_depths_own_choices(tiny, tmp_path: Path) -> None:
    model, tokenizer, _ = tiny
    trace, _ = generated_trace(
        model, tokenizer, ExitHeads.own((3,)), ORIGIN, tmp_path, ("code",), 2, 12, prompt_chars=60
    )
    assert not trace.human_text
    assert trace.agree[:, -1].all()
    sure = trace.recorded(Confidence.MAX_PROBABILITY)[:, -1]
    assert np.allclose(2.0 ** -trace.bits[:, -1], sure, rtol=2e-3)  # its own most probable token


def test_characters_of_an_answer_add_up_to_its_text() -> None:
    tokenizer = tiny_tokenizer()
    text = "café — naïve, said 東京\n"
    tokens = np.array(tokenizer(text)["input_ids"])
    chars = characters(tokenizer, tokens)
    assert chars.sum() == len(text)
    assert (chars >= 0).all()


def test_tokens_of_a_text_cover_every_character_once() -> None:
    text = "x = 'é€🙂'  # naïve\n"
    tokens, chars = tokenized(tiny_tokenizer(), text)
    assert len(tokens) == len(chars)
    assert chars.sum() == len(text)


def test_what_is_kept_of_a_probability_is_three_digits() -> None:
    values = np.array([0.123456, 0.9999, 1.0, 1e-4], dtype=np.float32)
    assert np.allclose(traces.short(values), values, rtol=6e-4)


def test_a_text_starts_with_a_token_that_the_model_has() -> None:
    tokenizer, known = tiny_tokenizer(), 320
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == known
    assert start_token(tokenizer, known) == tokenizer.bos_token_id
    assert start_token(tokenizer, known + 1) == known
    with pytest.raises(UserError, match="begins or ends a text"):
        start_token(tokenizer, 1)


def test_a_text_beyond_the_context_is_a_stage_that_cannot_run() -> None:
    """The profile that was measured before it is delivered all the same."""
    model = SimpleNamespace(architecture=SimpleNamespace(max_context_tokens=16))
    with pytest.raises(CannotRun, match="has 17 tokens, and the model takes 16"):
        states(model, 0, [np.zeros(17, np.int64)], (1,))
