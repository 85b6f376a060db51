"""The models that are served: weights, exit heads, tokenizer, profile and texts of each, and how they are opened.

Requests are spans of text. Their lengths in tokens are exactly those of the simulation: prompts by the profile's mean
token, answers by the exit trace. The words of a prompt are real: the text just before the recorded answer, from a
folder with TASK.txt for every task, or one file for all. The answer is what the model writes, with exactly as many
tokens as planned: an end token does not end it.

`open_models` checks everything that can be wrong before a run begins. Importing this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, cast

from helios_sim.errors import UserError, WeightsError, lacking
from helios_sim.exits.rule import MEASURES, Confidence, ExitRule, PerToken
from helios_sim.exits.trace import BoundTrace, TokenSpan
from helios_sim.interrupt import is_asked
from helios_sim.live.model.architecture import VALUE_BYTES
from helios_sim.profile.profile import Profile
from helios_sim.request import Request
from helios_sim.shared_data import cache_folder
from helios_sim.untrusted import in_short, read_bytes, reading

if TYPE_CHECKING:
    import torch

    from helios_sim.live.checkpoint.source import Checkpoint
    from helios_sim.live.model.heads import ExitHeads
    from helios_sim.live.model.predictors import Predictors
    from helios_sim.live.model.weights import TensorSource

LIVE_PACKAGES = ("torch", "transformers", "safetensors", "gguf")
FOLDER = "prompts"  # in the cache folder
_MOST_BYTES = 256 << 20  # largest text file that is read
_FIX = "name a folder with these files or one text file by live.texts, or run `make models`"


class PromptTexts(Protocol):
    """The source of prompt text."""

    def prompt(self, task: int, start: int, chars: int) -> str:
        """The `chars` characters of the workload's task number `task` that end just before character `start`.

        `start` is a request's `text_start`, where the recorded answer begins. It may be any whole number: a task's
        text is circular, so that every span exists.
        """
        ...


@dataclass(frozen=True, slots=True)
class FileTexts:
    """Circular texts, one per task, in the order of the workload's task numbers. No text is empty."""

    by_task: tuple[str, ...]

    def prompt(self, task: int, start: int, chars: int) -> str:
        """The `chars` characters of the task's text that end just before character `start`."""
        text = self.by_task[task]
        end = start % len(text)
        rounds = -(-(chars - end) // len(text)) if chars > end else 0
        whole = text * rounds + text[:end]
        return whole[len(whole) - chars :]


def read_texts(tasks: Sequence[str], place: str | None = None) -> FileTexts:
    """Read the tasks' texts from a folder or a file, or from the cache folder if `place` is None.

    Raises UserError for a missing or empty file.
    """
    where = cache_folder() / FOLDER if place is None else Path(place).expanduser()
    if where.is_file():
        return FileTexts((_read(where),) * len(tasks))
    missing = [task for task in tasks if not (where / f"{task}.txt").is_file()]
    if missing:
        files = ", ".join(f"{task}.txt" for task in missing)
        raise UserError("live.texts", str(where), f"a folder that holds {files}", _FIX)
    return FileTexts(tuple(_read(where / f"{task}.txt") for task in tasks))


def _read(path: Path) -> str:
    with reading("live.texts", str(path), "text in UTF-8 that can be read", _FIX):
        text = read_bytes(path, _MOST_BYTES, _FIX).decode()
    if not text.strip():
        raise UserError("live.texts", str(path), "a file with some text", _FIX)
    return text




@dataclass(frozen=True, slots=True, eq=False)
class LiveModel:
    """One model to serve. `tokenizer` is transformers'. Policies predict with the profile, which also sets the dtype.

    `replays`: the weights are random, so confidences and agreement are taken from the trace.
    """

    checkpoint: TensorSource
    heads: ExitHeads
    tokenizer: Any
    profile: Profile
    trace: BoundTrace
    replays: bool = False
    predictors: Predictors | None = None  # of the heads' exits; None if there are none
    one_at_a_time: Lock = field(default_factory=Lock, repr=False)  # engines in threads share the tokenizer
    start_token: int | None = field(init=False)  # begins a text, if the vocabulary has one
    _where_predictors_look: Profile = field(init=False, repr=False)
    _late: dict[tuple[bool, int], Profile] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        there = self.profile.check_predictor is not None
        looking = self.profile.checking(Confidence.PREDICTOR) if there else self.profile
        object.__setattr__(self, "_where_predictors_look", looking)
        # Looked up once, since get_vocab() builds the dictionary anew at every call.
        object.__setattr__(self, "start_token", start_token(self.tokenizer, self.checkpoint.architecture.vocab_size))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and KV, which is the profile's, since policies and the server count its bytes."""
        import torch

        return {4: torch.float32, 2: torch.bfloat16}[self.profile.model.weight_bytes_per_value]

    @property
    def exits(self) -> tuple[int, ...]:
        """Depths at which a token may exit; the last is full depth."""
        return self.trace.trace.exits

    def pricing(self, rule: ExitRule, resident_layers: int | None = None) -> Profile:
        """Return the profile that prices iterations under the rule, if layers above `resident_layers` come late."""
        looks = isinstance(rule, PerToken) and MEASURES[rule.confidence].proposes
        profile = self._where_predictors_look if looks else self.profile
        if resident_layers is None:
            return profile
        if (looks, resident_layers) not in self._late:
            self._late[looks, resident_layers] = profile.with_resident(resident_layers)
        return self._late[looks, resident_layers]

    def lengths(self, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        """Prompt length in tokens, including the answer so far, and the span of the answer that is still to come."""
        span = self.trace.locate(
            request.task, request.text_start + answered_chars, request.output_chars - answered_chars
        )
        return self.profile.model.tokens(request.prompt_chars + answered_chars), span

    def prompt_ids(self, request: Request, texts: PromptTexts, n_tokens: int, answered: str = "") -> list[int]:
        """Exactly `n_tokens` ids: a start token and the end of the text so far, including `answered`.

        More text is read until it is enough, since tokens can be longer than the mean.
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
        with self.one_at_a_time:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        with self.one_at_a_time:
            text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def start_token(tokenizer: Any, vocab_size: int) -> int | None:
    """The token between documents in pretraining if the vocabulary has one, else the tokenizer's own start token.

    A tokenizer may have more tokens than the model has embeddings; those are not used.
    """
    known = tokenizer.get_vocab()
    names = ("<bos>", "<|endoftext|>", tokenizer.bos_token, tokenizer.eos_token)
    return next((int(known[n]) for n in names if n in known and known[n] < vocab_size), None)


@dataclass(frozen=True, slots=True)
class OpenSettings:
    """How to open models.

    `weights`, `heads`: places by model. Models without an entry are looked up by name.
    `predictors`: folders of trained predictors, by model, for the models that use them.
    """

    device: str = "cpu"  # cpu, cuda, cuda:N
    dtype: str | None = None  # None for the profile's
    threads: int | None = None  # CPU threads; None for torch's default
    weights: Mapping[str, str] | None = None
    heads: Mapping[str, str] | None = None
    kernels: str | None = None  # triton, torch or flashinfer; None for what suits the device
    predictors: Mapping[str, Path] = field(default_factory=dict)


def open_models(
    settings: OpenSettings,
    profiles: Mapping[str, Profile],
    traces: Mapping[str, BoundTrace],
    known: Mapping[str, LiveModel] | None = None,
) -> dict[str, LiveModel]:
    """Open every model that has a profile. Layers are not read yet.

    `known`: models that are already open. A new model of the same name shares their weights and tokenizer.
    Raises UserError for missing packages, devices, weights or heads, for kernels that the device cannot run, and for
    weights of another model than the profile's.
    """

    _open_device(settings)
    found = {}
    for name, profile in profiles.items():
        _check_dtype(settings.dtype, profile)
        before = (known or {}).get(name)
        checkpoint = _checkpoint(name, settings) if before is None else cast("Checkpoint", before.checkpoint)
        _check_shape(checkpoint, profile)
        exits = traces[name].trace.exits
        heads = _heads(name, checkpoint, settings, exits)
        predictors = _predictors(settings.predictors.get(name), heads, exits, settings.device)
        lock = Lock() if before is None else before.one_at_a_time
        found[name] = LiveModel(
            checkpoint, heads, checkpoint.tokenizer(), profile, traces[name], checkpoint.is_random, predictors, lock
        )
    return found


def _open_device(settings: OpenSettings) -> None:
    check_packages("serving on a device")
    import torch

    from helios_sim.live.kernels.choice import kernels_for

    if settings.device != "cpu":
        number = int(settings.device.partition(":")[2] or 0)
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if number >= there:
            cards = f"a card that is there: {there} found" + ("" if there else ", and torch sees no CUDA")
            raise UserError("live.device", settings.device, cards, "set live.device=cpu, or name another card")
    elif settings.threads is not None:
        torch.set_num_threads(settings.threads)
    kernels_for(torch.device(settings.device), settings.kernels)


def _checkpoint(name: str, settings: OpenSettings) -> Checkpoint:
    from helios_sim.live.checkpoint.source import find_checkpoint

    given = (settings.weights or {}).get(name)
    try:
        return find_checkpoint(given or name)
    except WeightsError as error:
        fix = (
            f"{error.fix}; or name them: '+live.weights={{{name}: FOLDER}}' (`make models` fetches the small open ones)"
        )
        found = error.named_by(f"live.weights of {name}")
        raise WeightsError(found.key, found.value, found.allowed, fix) from error


def _check_dtype(dtype: str | None, profile: Profile) -> None:
    """Raise UserError for another dtype than the profile's: policies and the KV cache count with its bytes."""
    if profile.model.quantization is not None or profile.model.kv_bytes_per_value == 1:
        allowed = f"{profile.name} without quantization: live serving computes in bf16 or float32"
        raise UserError("models", profile.model.name, allowed, "name the unquantized model")
    kept = next((d for d, n in VALUE_BYTES.items() if n == profile.model.weight_bytes_per_value), "another dtype")
    if dtype is not None and dtype != kept:
        fix = f"leave live.dtype out, or measure a profile with python -m calibrate dtype={dtype}"
        raise UserError("live.dtype", dtype, f"{kept}, in which the profile {profile.name} was measured", fix)


def _check_shape(checkpoint: Checkpoint, profile: Profile) -> None:
    """Raise WeightsError unless the weights have the shape of the profile's model."""
    different = checkpoint.architecture.differences(profile.model)
    if different:
        raise WeightsError(
            f"live.weights of {profile.model.name}", checkpoint.source,
            f"a model as the profile {profile.name} describes it; these differ: {', '.join(different)}",
            "name the weights that the profile was measured with, or measure these",
        )  # fmt: skip


def _heads(name: str, checkpoint: Checkpoint, settings: OpenSettings, exits: tuple[int, ...]) -> ExitHeads:
    """The named heads, else those shipped for the model, else the model's own head at every exit of the trace."""
    from helios_sim.live.model.heads import HEADER, SHIPPED, ExitHeads

    given = (settings.heads or {}).get(name)
    folder = Path(given).expanduser() if given is not None else SHIPPED / name
    if given is None and not (folder / HEADER).is_file():
        return ExitHeads.own(exits[:-1])
    try:
        return ExitHeads.load(folder, checkpoint.architecture, settings.device)
    except UserError as error:
        raise error.about(f"live.heads of {name}: {error.key}") from error


def _predictors(folder: Path | None, heads: ExitHeads, exits: tuple[int, ...], device: str) -> Predictors | None:
    """Read the predictors in the folder, if one is named. UserError if there are none, or those of other exits."""
    if folder is None:
        return None
    from helios_sim.live.model.predictors import FILE, no_predictors, read_predictors

    if not (folder / FILE).is_file():
        raise no_predictors(f"in {folder}")
    found = read_predictors(folder, device)
    if not found.exits == heads.exits == exits[:-1]:
        served = f"those of the heads, {_listed(heads.exits)}, and of the trace, {_listed(exits[:-1])}"
        allowed = f"{served}: the predictors in {folder} are of {_listed(found.exits)}"
        fix = "name heads and a trace of these exits, or train predictors with `python -m calibrate +task=predictors`"
        raise UserError("exits.confidence", Confidence.PREDICTOR.value, allowed, fix)
    return found


def _listed(exits: tuple[int, ...]) -> str:
    return ", ".join(map(str, exits)) or "none"


def check_packages(why: str) -> None:
    """Raise UserError if packages of the extra `live` are missing or torch cannot load. `why`: what needs them."""
    missing = [name for name in LIVE_PACKAGES if find_spec(name) is None]
    if missing:
        fix = "run `make live`, or pip install 'helios-llm-sim[live]'"
        raise UserError("packages", ", ".join(missing), f"{why} needs them installed", fix)
    try:
        import_module("torch")
    except Exception as error:  # any error of torch's libraries, e.g. if they need another driver
        if is_asked() or lacking(error) is not None:
            raise
        allowed = f"it is installed and cannot be loaded ({in_short(error)})"
        fix = "install the build for this machine: see https://pytorch.org/get-started"
        raise UserError("packages", "torch", allowed, fix) from error
