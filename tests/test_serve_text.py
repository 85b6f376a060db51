"""Text on a server's side: tokens that become text, stops, chat templates, the vocabulary that is built in."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from helios_sim.errors import UserError
from helios_sim.serve.text import PASSAGE, BuiltInReader, Growing, Script, Stops, open_reader

BUILT_IN = BuiltInReader()
MESSAGES = [{"role": "user", "content": "Hello"}]


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_every_text_is_read_back_as_it_was(text: str) -> None:
    assert BUILT_IN.decode(BUILT_IN.encode(text)) == text


@given(st.text(max_size=40), st.text(max_size=20))
@settings(max_examples=150, deadline=None)
def test_text_that_grows_token_by_token_is_the_whole_text(text: str, prompt: str) -> None:
    """Characters of several bytes come whole, with the last of their tokens."""
    growing = Growing(BUILT_IN, BUILT_IN.encode(prompt))
    parts = [growing.add(token) for token in BUILT_IN.encode(text)]
    assert "".join(parts) + growing.rest() == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


def test_ids_of_a_tokenizer_that_is_not_here_are_a_token_each() -> None:
    reader = BuiltInReader(50_000)
    text = reader.decode([49_999, 104, 20_000])
    assert text == "\ufffdh\ufffd"
    assert len(reader.encode(text)) == 3  # for a second candidate, too


def test_what_is_left_of_a_character_comes_at_the_end() -> None:
    growing = Growing(BUILT_IN, [])
    assert [growing.add(token) for token in "\u00e9".encode()[:1]] == [""]
    assert growing.rest() == "\ufffd"


def test_each_simulated_token_is_some_text() -> None:
    script = Script(BUILT_IN)
    texts = [BUILT_IN.decode([script.token(3, number)]) for number in range(400)]
    assert all(texts)
    assert "".join(texts)[:60] in PASSAGE * 2


@pytest.mark.slow
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_a_stop_is_found_wherever_tokens_cut_it(text: str, stops: Sequence[str]) -> None:
    searched, found, stopped = Stops(stops), "", False
    for character in text:
        new, stopped = searched.add(character)
        found += new
        if stopped:
            break
    # the stop that is complete first, and of several complete at once the one that begins first
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    if not stopped:
        found += searched.rest()
    assert stopped == bool(ends)
    if ends:
        first = min(ends)[0]
        expected = text[: min(start for end, start in ends if end == first)]
    assert found == expected


def folder_with(tmp_path: Path, template: str) -> str:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    (tmp_path / "chat_template.jinja").write_text(template)
    return str(tmp_path)


def test_a_chat_template_is_rendered_with_the_tokenizer_s_tokens(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    assert open_reader(folder_with(tmp_path, template)).chat(MESSAGES) == "<s>[user] Hello\n[assistant]"


def test_a_long_text_is_read_while_other_threads_go_on(tmp_path: Path) -> None:
    """Otherwise one long prompt would stop the streams of all clients for seconds."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate("ab")}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reader, ended, ticks = open_reader(str(tmp_path)), threading.Event(), []
    thread = threading.Thread(target=lambda: [ticks.append(0) for _ in iter(lambda: ended.wait(0.001), True)])
    assert reader.encode("ab") == [0, 1]
    thread.start()
    _wait_for_tick(ticks)
    before = len(ticks)
    assert len(reader.encode("ab" * 400_000)) == 800_000
    meanwhile = len(ticks) - before
    ended.set()
    thread.join()
    assert meanwhile > 3


def _wait_for_tick(ticks: list[int]) -> None:
    while not ticks:
        time.sleep(0.001)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('only once') }}",
    ],
)
def test_a_chat_template_reaches_nothing(tmp_path: Path, template: str) -> None:
    with pytest.raises(UserError, match="chat template"):
        open_reader(folder_with(tmp_path, template)).chat(MESSAGES)


def test_a_folder_without_a_tokenizer_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"serve\.tokenizers"):
        open_reader(str(tmp_path))
