"""Tokenizers, chat templates and detokenization token by token for each candidate, without torch.

A real tokenizer is read from its folder (`tokenizer.json`, as `save_pretrained` writes it). A simulated model without
a tokenizer gets a small built-in vocabulary, so that a server answers anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from helios_sim.errors import UserError
from helios_sim.live.checkpoint.known import KNOWN, is_as_written
from helios_sim.shared_data import cache_folder
from helios_sim.untrusted import in_short

PASSAGE = (
    "The river ran high in March, and the keeper of the bridge wrote down each cart that crossed it. In the morning he "
    "opened the door of his small house, looked at the water, and wrote the number of the day on a new page. Some days "
    "there was nothing to write. On others a man came with a horse and a load of wood, or a woman with milk and bread "
    "for the town, and he asked them where they were going and put it in the book. At night he read the page again by "
    "the light of a lamp. When the wind was strong he could hear the bell of the harbour, and he thought of the ships "
    "that were out at sea. In the spring the children of the village came to see the birds, and he told them which "
    "tree had been there before the road was made. They wanted to know why he wrote everything down. Because, he said, "
    "a thing that is written can be found again, and a thing that is found again can be understood. "
)
REPLACEMENT = "\ufffd"  # stands for bytes of an incomplete character
_CONTEXT = 6  # last tokens of the prompt, decoded with the first tokens of an answer
_WORDS = Path(__file__).with_name("words.txt")


class Reader(Protocol):
    """The tokenizer of one model."""

    name: str  # folder, or what else it was made from
    vocab_size: int

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Tokenizes a text. `special` adds the special tokens that the tokenizer puts around it, such as BOS.

        The interpreter's lock is released meanwhile.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes token ids, and leaves out special tokens."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Renders a conversation as a prompt, up to the assistant's turn. UserError if the chat template refuses it."""
        ...


class HubReader:
    """A tokenizer read from its folder: tokenizer.json, and a chat template if there is one."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.name = str(folder)
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vocab_size = self._tokenizer.get_vocab_size()
        settings = folder / "tokenizer_config.json"
        self._settings = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        template = folder / "chat_template.jinja"
        own = template.read_text(encoding="utf-8") if template.is_file() else self._settings.get("chat_template")
        self._template = _compiled(own) if isinstance(own, str) else None

    def encode(self, text: str, special: bool = False) -> list[int]:
        # A batch of one, since encoding a single text would hold the interpreter's lock and other streams would wait.
        (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        return list(found.ids)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        if self._template is None:
            return plain_chat(messages)
        tokens = {name: _as_text(self._settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        try:
            text: str = self._template.render(messages=messages, add_generation_prompt=True, **tokens)
        except Exception as error:  # any error, since a template is code of the model's makers
            allowed = f"what the chat template of {self.name} takes ({in_short(error)})"
            raise UserError("messages", "a conversation", allowed, "let user and assistant take turns") from error
        return text


class BuiltInReader:
    """A tokenizer of words and bytes. It encodes any text and decodes it unchanged; common English words are one token.

    `vocab_size` is the model's, and counts if it is larger. Clients with the model's tokenizer may then send its ids
    in prompts: each counts as one token, decoded as the replacement character since its text is not known here.
    """

    name = "built-in vocabulary"

    def __init__(self, vocab_size: int = 0) -> None:
        words = dict.fromkeys([*_WORDS.read_text(encoding="utf-8").split(), *re.findall(r"\w+", PASSAGE)])
        pieces = [" " + word for word in words] + [word for word in words if len(word) > 1] + ["\n\n", ", ", ". "]
        pieces.append(REPLACEMENT)
        self._pieces: list[bytes] = [bytes([n]) for n in range(256)] + [piece.encode() for piece in pieces]
        self._ids = {piece: n for n, piece in enumerate(self._pieces)}
        self.vocab_size = max(len(self._pieces), vocab_size)
        self._parts = re.compile(rb"\n\n|\xef\xbf\xbd| ?[A-Za-z]+|, |\. |.", re.DOTALL)

    def encode(self, text: str, special: bool = False) -> list[int]:
        found: list[int] = []
        for part in self._parts.findall(text.encode()):
            known = self._ids.get(part)
            found += [known] if known is not None else list(part)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        known = len(self._pieces)
        return b"".join(self._pieces[n if n < known else -1] for n in ids).decode(errors="replace")

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        return plain_chat(messages)


def _compiled(template: str) -> Any:
    """Compiles a chat template in a sandbox, since it is code of the model's makers."""
    from jinja2 import ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
    made.globals["raise_exception"] = _refuse
    return made.from_string(template)


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Renders a conversation as a prompt for a model without a chat template."""
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"


def open_reader(folder: str | None, vocab_size: int = 0) -> Reader:
    """Opens the tokenizer in a folder, or the built-in vocabulary if `folder` is None.

    `vocab_size` is the size of the model's own vocabulary. UserError if the tokenizer cannot be read.
    """
    if folder is None:
        return BuiltInReader(vocab_size)
    try:
        return HubReader(Path(folder))
    except Exception as error:  # the library, written in Rust, raises bare Exceptions
        allowed = f"a folder with tokenizer.json that can be read ({in_short(error)})"
        raise UserError("serve.tokenizers", folder, allowed, "save the tokenizer anew (save_pretrained)") from error


def known_folder(model: str, named: Mapping[str, str]) -> str | None:
    """The folder of a simulated model's tokenizer: `named`, beside its config, or in the cache; None if there is none.
    """
    if model in named:
        return str(Path(named[model]).expanduser())
    beside = Path(model).expanduser()
    places = [beside if beside.is_dir() else beside.parent] if beside.exists() else []
    if model in KNOWN:
        kept = cache_folder() / "tokenizers" / KNOWN[model].sha256
        places += [kept] if is_as_written(kept) else []
    return next((str(place) for place in places if (place / "tokenizer.json").is_file()), None)


class Growing:
    """The text of an answer, token by token. A character of several tokens comes with the last of them."""

    def __init__(self, reader: Reader, prompt: Sequence[int]) -> None:
        self._reader, self._ids = reader, list(prompt[-_CONTEXT:])
        self._known = 0, len(self._ids)  # start of the ids that are decoded, and end of those with known text
        self._before = reader.decode(self._ids)

    def add(self, token: int) -> str:
        """Adds a token. Returns the new text; "" while a character is incomplete."""
        self._ids.append(token)
        text = self._reader.decode(self._ids[self._known[0] :])
        if len(text) <= len(self._before) or text.endswith(REPLACEMENT):
            return ""
        return self._accept(text)

    def rest(self) -> str:
        """The rest of the text at the end of the answer: an incomplete character, if any."""
        text = self._reader.decode(self._ids[self._known[0] :])
        return text[len(self._before) :]

    def _accept(self, text: str) -> str:
        new, start = text[len(self._before) :], self._known[1]
        self._known = start, len(self._ids)
        self._before = self._reader.decode(self._ids[start:])
        return new


class Script:
    """The text of a simulated model: a passage that is repeated, token by token."""

    def __init__(self, reader: Reader) -> None:
        self._ids = reader.encode(PASSAGE)

    def token(self, request_id: int, number: int) -> int:
        return self._ids[(7 * request_id + number) % len(self._ids)]


class Stops:
    """Ends a text before the first stop string, and holds back text that may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""

    def add(self, text: str) -> tuple[str, bool]:
        """Adds text. Returns the text that can be sent, and whether a stop string was found."""
        if not self._stops:
            return text, False
        whole = self._held + text
        found = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if found:
            self._held = ""
            return whole[: min(found)], True
        keep = max(_overlap(whole, stop) for stop in self._stops)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep], False

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop string begins, in characters."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _as_text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _refuse(message: str) -> None:
    raise ValueError(message)
