"""Settings of `python -m helios_sim.observe`: workload and seeds as of a study, and `observe.*` for the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from helios_sim.errors import UserError, require, require_finite, require_one_of
from helios_sim.study.schema import Config

KEY_VARIABLE = "OPENAI_API_KEY"
APIS, PROMPTS = ("completions", "chat"), ("ids", "words")


@dataclass
class ObserveConfig:
    url: str | None = None  # of the server, such as http://127.0.0.1:8000; `url=...` for short
    model: str | None = None  # the name that requests carry; null: the first that the server lists
    out: str = "log.jsonl"  # the log; it must not be there yet
    api: str = "completions"  # completions, chat
    prompts: str | None = None  # ids: token ids, of exact lengths, not for chat; words: about as many; null: by the api
    lowest_id: int = 1000  # prompts are token ids from this one
    highest_id: int = 9000  # to this one
    ignore_eos: bool = True  # answers as long as the workload says, which vLLM and SGLang know; false: not sent
    timeout_s: float = 600.0  # of a request, from connecting to its last token
    api_key_file: str | None = None  # its first line is the key; null: the variable OPENAI_API_KEY, if it is set

    def __post_init__(self) -> None:
        require_finite(self, "observe.")
        require_one_of("observe.api", self.api, APIS)
        require(self.prompts is None or self.prompts in PROMPTS, "observe.prompts", self.prompts, "null, ids or words")
        if self.api == "chat" and self.prompts == "ids":
            raise UserError("observe.prompts", "ids", "words: messages of a chat are texts", "leave it null")
        low, high = self.lowest_id, self.highest_id
        require(0 <= low < high < 2**31, "observe.highest_id", high, f"above observe.lowest_id, {low}")
        require(self.timeout_s > 0, "observe.timeout_s", self.timeout_s, "above 0")
        if self.url is not None:
            self.address()

    @property
    def kind_of_prompts(self) -> str:
        return self.prompts or ("ids" if self.api == "completions" else "words")

    def address(self) -> SplitResult:
        """The server's address. Raises UserError if there is no url, or it is not a server's."""
        if self.url is None:
            raise UserError("url", None, "the address of a server, such as http://127.0.0.1:8000", "set url=ADDRESS")
        try:
            found = urlsplit(self.url)
            good = found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0 and not found.query
        except ValueError:
            good = False
        require(good, "url", self.url, "an address such as http://127.0.0.1:8000, without /v1")
        return found._replace(path=found.path.rstrip("/").removesuffix("/v1"))


@dataclass
class ObservedConfig(Config):
    observe: ObserveConfig = field(default_factory=ObserveConfig)
