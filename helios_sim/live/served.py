"""A model as it is served: weights on disk, exit heads, tokenizer, and what the simulation knows of it.

Requests are spans of text. Their lengths in tokens are those of the simulation, to the token: prompts by the profile's
mean token, answers by the exit trace. The prompt's words are real, the text just before the recorded answer; the answer
is whatever the model writes, exactly as many tokens as planned: an end token does not end it.


Opens what live serving needs: device, checkpoints with their heads and tokenizers. Knows files, serves nothing.

What can be wrong is found here, before a run begins, each with one message.


Whether what a real model needs is installed. Imports none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios_sim.errors import UserError
from helios_sim.exits.trace import BoundTrace, TokenSpan
from helios_sim.live.model.architecture import VALUE_BYTES
from helios_sim.live.texts import PromptTexts
from helios_sim.profile.profile import Profile
from helios_sim.request import Request

if TYPE_CHECKING:
    import torch

    from helios_sim.live.checkpoint.source import Checkpoint
    from helios_sim.live.model.heads import ExitHeads
    from helios_sim.live.model.weights import TensorSource

@dataclass(frozen=True, slots=True, eq=False)
class LiveModel:
    """`tokenizer` is transformers'. The profile is what policies predict with; its bytes say the weights' dtype.

    `replays`: the weights are random, so the trace says who is confident and what would have changed.
    """

    checkpoint: TensorSource
    heads: ExitHeads
    tokenizer: Any
    profile: Profile
    trace: BoundTrace
    replays: bool = False
    start_token: int | None = field(init=False)  # of a text, where the vocabulary has one

    def __post_init__(self) -> None:
        # Looked up once: the vocabulary is made into a dictionary anew whenever it is asked for.
        object.__setattr__(self, "start_token", _start_token(self.tokenizer, self.checkpoint.architecture.vocab_size))

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and KV: policies and the server count with the bytes that the profile says."""
        import torch

        return {4: torch.float32, 2: torch.bfloat16}[self.profile.model.weight_bytes_per_value]

    @property
    def exits(self) -> tuple[int, ...]:
        """Depths at which a token may leave; the last is the whole model."""
        return self.trace.trace.exits

    def lengths(self, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        """Prompt tokens, with the characters answered so far, and the span of what is still to be answered."""
        span = self.trace.locate(
            request.task, request.text_start + answered_chars, request.output_chars - answered_chars
        )
        return self.profile.model.tokens(request.prompt_chars + answered_chars), span

    def prompt_ids(self, request: Request, texts: PromptTexts, n_tokens: int, answered: str = "") -> list[int]:
        """Exactly `n_tokens` ids: a start token and the end of the text so far, `answered` included.

        The text is taken as long as it has to be, since tokens are longer in some places than the mean.
        """
        chars = max(16, round(2 * n_tokens * self.profile.model.chars_per_token))
        while True:
            text = texts.prompt(request.task, request.text_start, chars) + answered
            ids = self.encode(text)
            if len(ids) >= n_tokens:
                break
            chars *= 2
        start = self.start_token
        return ids[-n_tokens:] if start is None or n_tokens < 2 else [start, *ids[1 - n_tokens :]]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _start_token(tokenizer: Any, vocab_size: int) -> int | None:
    """The token between documents where the vocabulary has one, as in pretraining, else the tokenizer's own.

    A tokenizer may know tokens past the model's rows.
    """
    known = tokenizer.get_vocab()
    names = ("<bos>", "<|endoftext|>", tokenizer.bos_token, tokenizer.eos_token)
    return next((int(known[n]) for n in names if n in known and known[n] < vocab_size), None)


@dataclass(frozen=True, slots=True)
class OpenSettings:
    """How models are to be opened. `weights` and `heads` by model, where they are not found by the model's name."""

    device: str = "cpu"  # cpu, cuda, cuda:N
    dtype: str | None = None  # None: the profile's
    threads: int | None = None  # of a CPU; None: as torch has it
    seed: int = 0
    weights: Mapping[str, str] | None = None
    heads: Mapping[str, str] | None = None


def open_models(
    wanted: OpenSettings, profiles: Mapping[str, Profile], traces: Mapping[str, BoundTrace]
) -> dict[str, LiveModel]:
    """Every model that has a profile. Layers are not read yet.

    Raises UserError for packages, a device, weights or heads that are not there, and for weights that are not those
    of the profile or do not fit.
    """

    _open_device(wanted)
    found = {}
    for name, profile in profiles.items():
        _check_dtype(wanted.dtype, profile)
        checkpoint = _checkpoint(name, wanted)
        _check_shape(checkpoint, profile)
        exits = traces[name].trace.exits
        heads = _heads(name, checkpoint, wanted, exits)
        found[name] = LiveModel(checkpoint, heads, checkpoint.tokenizer(), profile, traces[name], checkpoint.is_random)
    return found


def _open_device(wanted: OpenSettings) -> None:
    check_packages("serving on a device")
    import torch

    if wanted.device != "cpu":
        number = int(wanted.device.partition(":")[2] or 0)
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if number >= there:
            cards = f"a card that is there: {there} found" + ("" if there else ", and torch sees no CUDA")
            raise UserError("live.device", wanted.device, cards, "set live.device=cpu, or name another card")
    elif wanted.threads is not None:
        torch.set_num_threads(wanted.threads)
    torch.manual_seed(wanted.seed)


def _checkpoint(name: str, wanted: OpenSettings) -> Checkpoint:
    from helios_sim.live.checkpoint.source import find_checkpoint

    given = (wanted.weights or {}).get(name)
    try:
        return find_checkpoint(given or name)
    except UserError as error:
        if error.key != "weights":
            raise
        fix = (
            f"{error.fix}; or name them: '+live.weights={{{name}: FOLDER}}' (`make models` fetches the small open ones)"
        )
        raise UserError(f"live.weights of {name}", error.value, error.allowed, fix) from error


def _check_dtype(dtype: str | None, profile: Profile) -> None:
    """The profile's bytes say what policies and the KV cache count with, so nothing else can be served beside it."""
    kept = next((d for d, n in VALUE_BYTES.items() if n == profile.model.weight_bytes_per_value), "another dtype")
    if dtype is not None and dtype != kept:
        fix = f"leave live.dtype out, or measure a profile with python -m calibrate dtype={dtype}"
        raise UserError("live.dtype", dtype, f"{kept}, in which the profile {profile.name} was measured", fix)


def _check_shape(checkpoint: Checkpoint, profile: Profile) -> None:
    a, m = checkpoint.architecture, profile.model
    for key, there, known in (
        ("layers", a.n_layers, m.n_layers),
        ("d_model", a.d_model, m.d_model),
        ("vocab_size", a.vocab_size, m.vocab_size),
    ):
        if there != known:
            raise UserError(
                f"live.weights of {m.name}", checkpoint.source, f"{known} {key}, as the profile {profile.name} has; "
                f"these have {there}", "name the weights that the profile was measured with, or measure these",
            )  # fmt: skip


def _heads(name: str, checkpoint: Checkpoint, wanted: OpenSettings, exits: tuple[int, ...]) -> ExitHeads:
    """Named, shipped for the model, or the model's own head at every exit of the trace."""
    from helios_sim.live.model.heads import HEADER, SHIPPED, ExitHeads

    given = (wanted.heads or {}).get(name)
    folder = Path(given).expanduser() if given is not None else SHIPPED / name
    if given is None and not (folder / HEADER).is_file():
        return ExitHeads.own(exits[:-1])
    try:
        return ExitHeads.load(folder, checkpoint.architecture, wanted.device)
    except UserError as error:
        raise error.about(f"live.heads of {name}: {error.key}") from error


LIVE_PACKAGES = ("torch", "transformers", "safetensors", "gguf")


def check_packages(why: str) -> None:
    """UserError where what the extra `live` brings is not installed; `why`: what needs it."""
    missing = [name for name in LIVE_PACKAGES if find_spec(name) is None]
    if missing:
        fix = "run `make live`, or pip install 'helios-llm-sim[live]'"
        raise UserError("packages", ", ".join(missing), f"{why} needs them installed", fix)
