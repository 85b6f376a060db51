"""Reads the body of a request. Parameters that this server does not support are refused by name, never ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helios_sim.serve.front.problems import Problem, not_supported, wrong
from helios_sim.untrusted import parse_json

# Parameters of OpenAI's API and of vLLM that are accepted only at these values, at which they change nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,),
    "repetition_penalty": (1,), "length_penalty": (1,), "logit_bias": ({},), "top_k": (-1, 0), "min_p": (0,),
    "use_beam_search": (False,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"),
    "modalities": (["text"],), "stop_token_ids": ([],), "include_stop_str_in_output": (False,), "detokenize": (True,),
    "return_token_ids": (False,), "return_tokens_as_token_ids": (False,), "chat_template_kwargs": ({},),
    "chat_template": (), "documents": ([],), "prompt_logprobs": (), "allowed_token_ids": (), "bad_words": ([],),
    "truncate_prompt_tokens": (), "logits_processors": ([],), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "structured_outputs": (), "reasoning_effort": ("none",), "audio": (),
    "prediction": (), "verbosity": ("medium",), "web_search_options": (), "kv_transfer_params": (),
    "logits_processor": (), "vllm_xargs": ({},), "include_reasoning": (True,), "cache_salt": (),
    "mm_processor_kwargs": (), "return_token_strs": (False,),
}  # fmt: skip
# Parameters that label a request and change no answer.
LABELS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "request_id")
COMMON = (
    "model", "stream", "stream_options", "max_tokens", "min_tokens", "ignore_eos", "temperature", "top_p", "seed",
    "stop", "logprobs", "priority", "return_depths", "add_special_tokens", *LABELS,
)  # fmt: skip
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_PROMPTS = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request for an answer as parsed from its body, before the prompt is tokenized."""

    chat: bool
    model: str | None
    prompts: Sequence[str | Sequence[int]]  # empty for a chat
    messages: Sequence[Mapping[str, str]]
    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    temperature: float | None
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    logprobs: bool
    top_logprobs: int
    stream: bool
    usage: bool  # send usage in a chunk of its own at the end of a stream
    usage_in_chunks: bool
    priority: int
    depths: bool  # report the layers that each token ran
    special: bool  # add the special tokens that the tokenizer puts around a text


def parsed(body: bytes) -> dict[str, Any]:
    """Parses the body as a JSON object. Problem if it is not one."""
    if not body:
        raise Problem(400, "The body is empty: it must be a JSON object", None, "invalid_json")
    try:
        found = parse_json(body)
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Problem(400, f"The body is no JSON that can be read: {said}", None, "invalid_json") from None
    if not isinstance(found, dict):
        raise Problem(400, f"The body is a JSON {type(found).__name__}: it must be an object", None, "invalid_json")
    return found


def read_completion(body: Mapping[str, Any]) -> Wanted:
    _check_names(body, (*COMMON, "prompt"))
    logprobs = _whole(body, "logprobs", 0, 1)
    return _wanted(
        body, chat=False, prompts=_prompts(body.get("prompt")), messages=(), logprobs=logprobs is not None,
        top_logprobs=logprobs or 0, max_tokens=_whole(body, "max_tokens", 1) or 16, special=True,
    )  # fmt: skip


def read_chat(body: Mapping[str, Any]) -> Wanted:
    _check_names(body, (*COMMON, "messages", "max_completion_tokens", "top_logprobs"))
    top = _whole(body, "top_logprobs", 0, 1)
    asked = _flag(body, "logprobs")
    if top and not asked:
        raise wrong("top_logprobs", "top_logprobs counts only with logprobs=true")
    most = [_whole(body, name, 1) for name in ("max_completion_tokens", "max_tokens")]
    if None not in most and most[0] != most[1]:
        raise wrong("max_tokens", "max_tokens and max_completion_tokens say different things: give one of them")
    return _wanted(
        body, chat=True, prompts=(), messages=_messages(body.get("messages")), logprobs=asked, top_logprobs=top or 0,
        max_tokens=most[0] or most[1], special=False,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ToTokenize:
    """The body of /tokenize."""

    model: str | None
    prompt: str | None  # None if `messages` are given
    messages: Sequence[Mapping[str, str]]
    special: bool  # add the special tokens that the tokenizer puts around a text


def read_to_tokenize(body: Mapping[str, Any]) -> ToTokenize:
    _check_names(body, ("model", "prompt", "messages", "add_special_tokens"))
    prompt, messages = body.get("prompt"), body.get("messages")
    if (prompt is None) == (messages is None):
        raise wrong("prompt", "give prompt or messages, and not both")
    if prompt is not None and not isinstance(prompt, str):
        raise wrong("prompt", "prompt must be a text")
    return ToTokenize(
        _text(body, "model"), None if prompt is None else _sound(prompt, "prompt"),
        () if messages is None else _messages(messages), _flag(body, "add_special_tokens", prompt is not None),
    )  # fmt: skip


def read_to_detokenize(body: Mapping[str, Any]) -> tuple[str | None, list[int]]:
    """Reads the model and the token ids, which may lie outside its vocabulary."""
    _check_names(body, ("model", "tokens"))
    ids = body.get("tokens")
    if not isinstance(ids, list) or not all(map(_is_id, ids)):
        raise wrong("tokens", "tokens must be a list of token ids")
    return _text(body, "model"), ids


def _wanted(body: Mapping[str, Any], *, special: bool, max_tokens: int | None, **known: Any) -> Wanted:
    options = body.get("stream_options")
    stream = _flag(body, "stream")
    if options is not None:
        if not isinstance(options, Mapping):
            raise wrong("stream_options", "stream_options must be an object")
        if not stream:
            raise wrong("stream_options", "stream_options counts only with stream=true")
        for name in options:
            if name not in ("include_usage", "continuous_usage_stats", "include_obfuscation"):
                raise wrong(f"stream_options.{name}", f"Unrecognized request argument supplied: stream_options.{name}")
        if options.get("include_obfuscation"):
            raise not_supported("stream_options.include_obfuscation", "false")
    min_tokens = _whole(body, "min_tokens", 0) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise wrong("min_tokens", f"min_tokens={min_tokens} is above max_tokens={max_tokens}")
    top_p = _number(body, "top_p", 0, 1)
    if top_p == 0:
        raise wrong("top_p", "top_p must be above 0")
    in_chunks = _flag(options or {}, "continuous_usage_stats")
    return Wanted(
        model=_text(body, "model"), min_tokens=min_tokens, max_tokens=max_tokens, ignore_eos=_flag(body, "ignore_eos"),
        temperature=_number(body, "temperature", 0, 2), top_p=1.0 if top_p is None else top_p,
        seed=_whole(body, "seed", -(2**63), 2**63 - 1), stop=_stops(body.get("stop")), stream=stream,
        usage=_flag(options or {}, "include_usage") or in_chunks, usage_in_chunks=in_chunks,
        priority=_whole(body, "priority", -(2**31), 2**31) or 0, depths=_flag(body, "return_depths"),
        special=_flag(body, "add_special_tokens", special), **known,
    )  # fmt: skip


def _check_names(body: Mapping[str, Any], known: Sequence[str]) -> None:
    for name, value in body.items():
        if name in known:
            if name in LABELS:
                _text(body, name)
        elif name not in NEUTRAL:
            raise wrong(name, f"Unrecognized request argument supplied: {name[:100]}", "unrecognized_argument")
        elif value is not None and not any(value == each and _alike(value, each) for each in NEUTRAL[name]):
            told = " or ".join(json.dumps(each) for each in NEUTRAL[name]) or "null"
            raise not_supported(name, told)


def _alike(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool)


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(name, f"{name} must be a string")
    return value


def _flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong(name, f"{name} must be true or false")
    return value


def _whole(body: Mapping[str, Any], name: str, least: int, most: int = 2**31 - 1) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise wrong(name, f"{name} must be a whole number from {least} to {most}")
    return value


def _number(body: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise wrong(name, f"{name} must be a number from {least:g} to {most:g}")
    return float(value)


def _stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    lengths = [len(stop) if isinstance(stop, str) else 0 for stop in found] if isinstance(found, list) else [0]
    if not all(0 < length <= LONGEST_STOP for length in lengths):
        raise wrong("stop", f"stop must be a string or a list of strings, of 1 to {LONGEST_STOP} characters each")
    if len(found) > MOST_STOPS:
        raise wrong("stop", f"stop may have {MOST_STOPS} strings at most")
    return tuple(_sound(stop, "stop") for stop in found)


def _prompts(value: Any) -> Sequence[str | Sequence[int]]:
    if isinstance(value, str):
        return [_sound(value, "prompt")]
    if isinstance(value, list) and value:
        if all(_is_id(each) for each in value):
            return [value]
        if len(value) > MOST_PROMPTS:
            raise wrong("prompt", f"prompt may be a list of {MOST_PROMPTS} prompts at most")
        if all(isinstance(each, str) for each in value):
            return [_sound(each, "prompt") for each in value]
        if all(isinstance(each, list) and each and all(map(_is_id, each)) for each in value):
            return value
    raise wrong("prompt", "prompt must be a text, a list of token ids, or a list of texts or of lists of token ids")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _messages(value: Any) -> Sequence[Mapping[str, str]]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", "messages must be a list of at least one message")
    return [_message(one, f"messages[{place}]") for place, one in enumerate(value)]


def _message(one: Any, where: str) -> Mapping[str, str]:
    if not isinstance(one, Mapping):
        raise wrong(where, f"{where} must be an object with role and content")
    role = one.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise wrong(f"{where}.role", f"{where}.role must be system, developer, user or assistant")
    for name, value in one.items():
        if name not in ("role", "content", "name") and value not in (None, [], ""):
            raise not_supported(f"{where}.{name}", "role, content and name of a message")
    role = "system" if role == "developer" else str(role)
    message = {"role": role, "content": _sound(_content(one.get("content"), where), f"{where}.content")}
    name = one.get("name")
    if name is None:
        return message
    if not isinstance(name, str):
        raise wrong(f"{where}.name", f"{where}.name must be a string")
    return message | {"name": _sound(name, f"{where}.name")}  # a chat template may use it


def _content(content: Any, where: str) -> str:
    """Reads content that is a text or a list of text parts. Returns the joined text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(f"{where}.content", f"{where}.content must be a text or a list of parts")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "input_text"):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise wrong(f"{where}.content", f"{where}.content has a part of type {str(kind)[:50]}: only text is read",
                        "unsupported_parameter")  # fmt: skip
        if not isinstance(part.get("text"), str):
            raise wrong(f"{where}.content", f"{where}.content has a part whose text is no string")
        for name, value in part.items():
            if name not in ("type", "text") and value not in (None, []):
                raise not_supported(f"{where}.content.{name}", "type and text of a part")
        texts.append(part["text"])
    return "".join(texts)


def _sound(text: str, where: str) -> str:
    """Returns the text. Problem if it has half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise wrong(where, f"{where} has half of a surrogate pair, which is no character") from None
    return text
