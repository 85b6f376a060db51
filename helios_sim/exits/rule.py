"""Exit rules: when a token leaves the model, and by which confidence. `replay` applies a rule to a recorded trace.

A confidence says how sure an exit is of its token. It lies between 0 and 1, and higher is surer, so that one scale of
thresholds serves all measures. To add one, write a function of its input (`Probabilities`, say), name it in
`Confidence` and give it a column in `MEASURES`: calibration records the column, live serving computes it, a replay
reads it, and settings accept its name.

- max_probability: the largest softmax probability.
- margin: the largest minus the second largest probability, which CALM (arXiv 2207.07061) calls softmax response.
- entropy: 1 - H / log V, where H is the entropy of the softmax over V words (BranchyNet and DeeBERT exit if H is low).
  It is 1 if one word has all the probability and 0 if all words are equally likely.
- classifier: p, the probability of agreement with full depth that a small network predicts from the hidden state, as
  1 - (1 - p) x risk_scale. The scale is 1 at the first exit and grows as leaving saves less, so that one threshold
  suits all exits; values can lie below 0.
- hidden_similarity: the cosine of the hidden states after the exit's layer and after the layer before it, or 0 if it is
  negative (CALM's hidden-state saturation: a state that no longer moves will give the same token). An exit trace
  records it; live serving cannot, since it keeps only the states after exits.
- predictor: SpecEE's (arXiv 2504.08850). The head of the first exit proposes `WORDS` words. A small network reads an
  exit's logits of these words (and how their shares have changed since the exit before), and predicts whether one of
  them is both the exit's word and full depth's. If it is sure, the head is run, and the token leaves if the head's word
  is one of the proposed words. If it is another word, the measure is negative, and the head was run in vain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from helios_sim.errors import UserError

MOST_THRESHOLD = 2.0
WORDS = 4  # words that the first exit proposes and predictors read
MOST_NEAR_TOKENS = 10  # latest tokens of a request that choose the exits to check next: their exits fit in one integer
MOST_LOOKS = 62  # exits of a model if each token is checked alone, since a bit mask holds one bit for each
MOST_EXCHANGE_S = 60.0
MOST_DRAFTS = 64  # drafts of a request in one pass; more would let a batch use up the token budget


class Confidence(StrEnum):
    """The name of a confidence measure, as settings write it."""

    MAX_PROBABILITY = "max_probability"
    MARGIN = "margin"
    CLASSIFIER = "classifier"
    ENTROPY = "entropy"
    HIDDEN_SIMILARITY = "hidden_similarity"
    PREDICTOR = "predictor"

    @property
    def by_head(self) -> bool:
        """Whether it needs the LM head, which gives the token as well; if not, it is a check on the hidden state."""
        return MEASURES[self].by_head


# The confidence by which cascades judge an answer: its mean over the answer's tokens, at full depth.
OF_ANSWERS = Confidence.MAX_PROBABILITY


class Probabilities(Protocol):
    """The word distributions of n tokens from the head of one exit, as tensors or arrays."""

    @property
    def vocab_size(self) -> int: ...

    def top(self, k: int) -> Any:
        """The k largest probabilities, (n, k), in descending order."""

    def expected(self, of: Callable[[Any], Any]) -> Any:
        """The mean of of(log probability) under the distribution, (n,)."""


class Checked(Protocol):
    """The result of one exit's check on n hidden states."""

    def predicted(self) -> Any:
        """The classifier's confidence, (n,)."""


class Neighbours(Protocol):
    """The hidden states of n tokens around one layer."""

    def states(self) -> tuple[Any, Any]:
        """Hidden states (n, d) after the layer before the exit's layer, and (n, d) after the exit's layer."""


class Proposed(Protocol):
    """The result of one exit's predictor on the words that the first exit proposed for each of n tokens."""

    def foreseen(self) -> Any:
        """The predictor's probability (n,), negative if the exit's own word is none of the proposed words."""


def _max_probability(seen: Probabilities) -> Any:
    return seen.top(1)[:, 0]


def _margin(seen: Probabilities) -> Any:
    best = seen.top(2)
    return best[:, 0] - best[:, 1]


def _entropy(seen: Probabilities) -> Any:
    return (1 + seen.expected(lambda log_p: log_p) / math.log(seen.vocab_size)).clip(0, 1)


def _classifier(seen: Checked) -> Any:
    return seen.predicted()


def _hidden_similarity(seen: Neighbours) -> Any:
    before, after = seen.states()
    lengths = (before * before).sum(-1) * (after * after).sum(-1)
    return ((before * after).sum(-1) / lengths**0.5).clip(0, 1)


def _predictor(seen: Proposed) -> Any:
    return seen.foreseen()


@dataclass(frozen=True, slots=True)
class Measure:
    """One confidence measure: its function, its column in an exit trace, and properties of its values."""

    of: Callable[[Any], Any]  # `Probabilities`, `Checked`, `Neighbours` or `Proposed` -> confidences (n,)
    column: str
    by_head: bool = True  # it needs the LM head
    probability: bool = False  # it is meant as the probability of agreement, so its reliability can be judged
    lowest: float = 0.0  # least possible value
    neighbours: bool = False  # it compares the states of two neighbouring layers, which live serving does not keep
    proposes: bool = False  # it reads the words that the first exit proposes

    @property
    def live(self) -> bool:
        return not self.neighbours


MEASURES: Mapping[Confidence, Measure] = {
    Confidence.MAX_PROBABILITY: Measure(_max_probability, "confidence", probability=True),
    Confidence.MARGIN: Measure(_margin, "margin"),
    Confidence.CLASSIFIER: Measure(_classifier, "classifier", by_head=False, probability=True, lowest=-math.inf),
    Confidence.ENTROPY: Measure(_entropy, "entropy"),
    Confidence.HIDDEN_SIMILARITY: Measure(_hidden_similarity, "hidden_similarity", by_head=False, neighbours=True),
    Confidence.PREDICTOR: Measure(_predictor, "predictor", by_head=False, lowest=-1.0, proposes=True),
}

BY_COLUMN: Mapping[str, Confidence] = {measure.column: confidence for confidence, measure in MEASURES.items()}


def require_threshold(key: str, threshold: float) -> None:
    """Raises UserError for a value that cannot be a threshold, such as one in per cent."""
    if not 0 <= threshold <= MOST_THRESHOLD:
        allowed = f"from 0 to 1, where higher is surer; above 1, to {MOST_THRESHOLD:g}, no token leaves"
        raise UserError(key, threshold, allowed, "write a share: neither per cent, nor a logarithm")


def require_live(confidence: Confidence) -> None:
    """Raises UserError for a measure that live serving cannot compute."""
    if not MEASURES[confidence].live:
        live = listed(c for c, measure in MEASURES.items() if measure.live)
        raise UserError(
            "exits.confidence", confidence.value, f"live serving keeps no state of the layer before an exit's: {live}",
            "choose one of these, or simulate with a trace that records it",
        )  # fmt: skip


def require_leaving(confidence: Confidence) -> None:
    """Raises UserError for a measure that cannot judge tokens under a cap or at a ramp: the predictor's.

    A predictor only tells, token by token, which tokens may leave.
    """
    if MEASURES[confidence].proposes:
        raise UserError(
            "exits.confidence", confidence.value, "another measure: a predictor tells which tokens leave, one by one, "
            "after the first exit has proposed words", "set policy=early_exit, or choose another measure",
        )  # fmt: skip


def listed(some: Iterable[Confidence]) -> str:
    """Names of measures, separated by commas, for a message."""
    return ", ".join(c.value for c in some) or "none"


@dataclass(frozen=True, slots=True)
class FullDepth:
    """The rule under which every token runs all loaded layers, without a check."""


@dataclass(frozen=True, slots=True)
class FixedCap:
    """The rule under which every token runs exactly the loaded layers and leaves there, confident or not.

    A confidence from the LM head comes from the logits that sample the token, so it costs no extra head; a check on
    the hidden state is charged. A token with a confidence below the threshold is a breach.
    """

    threshold: float
    confidence: Confidence = Confidence.MAX_PROBABILITY


@dataclass(frozen=True, slots=True)
class Near:
    """Exits that check a request's next token because its latest tokens left close by (SpecEE, arXiv 2504.08850).

    An exit checks if it is at most `layers` away from the depth at which one of the latest `tokens` tokens left (or
    ended, after all layers).
    """

    tokens: int = 5
    layers: int = 2


@dataclass(frozen=True, slots=True)
class PerToken:
    """The rule under which a token leaves at the first exit where its confidence reaches the threshold.

    Every check of a token at an exit is paid for; if the check is one on the hidden state, a token that leaves still
    has to pass the head. A token that is confident nowhere runs all loaded layers; that is a breach unless these are
    the whole model. With `checkpoints` only these exits check (TIDE, arXiv 2603.21365). With `near` the exits near
    those of the request's latest tokens check besides the `checkpoints`, without which no token would ever leave.

    With the confidence `predictor` the head of the first exit is run for every token, since it proposes the words; so
    that exit always checks. If a predictor is sure, the head is run in the same band.
    """

    threshold: float
    confidence: Confidence = Confidence.MAX_PROBABILITY
    checkpoints: tuple[int, ...] | None = None  # exits before the last, in layers; None means every exit
    near: Near | None = None

    def checks_at(self, layers: int) -> bool:
        """Whether the exit at this depth checks every token that reaches it."""
        return self.near is None if self.checkpoints is None else layers in self.checkpoints

    @property
    def looks(self) -> bool:
        """Whether tokens are checked one by one: each has its own checking exits, or its own proposed words."""
        return self.near is not None or MEASURES[self.confidence].proposes


@dataclass(frozen=True, slots=True)
class Clairvoyant:
    """The oracle's rule: a token leaves, unchecked, at the first exit that already gives its full-depth prediction.

    `disagreement_budget` is the share of tokens, by task, that may leave at the first exit whatever they predict there.
    It goes to the tokens with the deepest agreeing exit.
    """

    disagreement_budget: float = 0.0


@dataclass(frozen=True, slots=True)
class SelfSpeculation:
    """Self-speculation (LayerSkip, arXiv 2404.16710): an exit drafts tokens, and the whole model verifies them.

    The layers up to `exit_layers` and the LM head draft `draft_tokens` tokens, one after the other; then one pass of
    the whole model verifies them all. Drafts are accepted up to the first that differs from the whole model's token,
    and the whole model's own next token comes on top; so every token is the whole model's. The verification continues
    from the drafts' hidden states, K and V. If more than `largest_batch` requests decode, none drafts, as drafts would
    then cost more than they save; with None they always draft.
    """

    exit_layers: int
    draft_tokens: int
    largest_batch: int | None = None


@dataclass(frozen=True, slots=True)
class OwnCard:
    """A drafter with its own card, of the same kind, that drafts while the other verifies (CoSine, arXiv 2503.10325).

    A stage ends when both cards are done; `exchange_s` later the tokens of each are on the other card. With two `parts`
    at most half of the batch is drafted for at once, while drafts of the other half are verified. With one part all
    waiting requests are drafted for at once; requests that came together then wait together for one card after the
    other.
    """

    exchange_s: float
    parts: int = 2


@dataclass(frozen=True, slots=True)
class DraftModel:
    """Another model, with the same tokenizer, drafts `draft_tokens` tokens; one pass of the active model verifies them.

    Drafts are accepted as under `SelfSpeculation`. Weights, K and V of both models are in memory. The drafter prefills
    prompts too. With its first draft it reads the tokens that it has not read yet: the last draft of a pass in which
    all drafts were accepted, and tokens of iterations without drafts.
    """

    drafter: str
    draft_tokens: int
    largest_batch: int | None = None
    own_card: OwnCard | None = None  # None means both models are on one card
    # Further drafters, each on its own card, that propose each token too; all continue with the surest one's (CoSine)
    fused_with: tuple[str, ...] = ()

    @property
    def drafters(self) -> tuple[str, ...]:
        return (self.drafter, *self.fused_with)


@dataclass(frozen=True, slots=True)
class ReleaseEarly:
    """Early release (Apparate, arXiv 2312.05385): a token is delivered at the first of `ramps` where it is confident.

    The token runs the whole model all the same: K and V are complete, and every delivered token is compared with the
    whole model's. Each ramp checks every token, and the host does not wait for the result. The next token of a request
    starts when the iteration ends, so that tokens are delivered earlier, but not at a higher rate.
    """

    ramps: tuple[int, ...]  # layers, ascending, before the last
    thresholds: tuple[float, ...]  # one for each ramp; above 1 nothing is released there
    confidence: Confidence = Confidence.MAX_PROBABILITY
    tells_all: bool = False  # the policy observes each complete answer, all tokens but the first, at all ramps


ExitRule = FullDepth | FixedCap | PerToken | Clairvoyant | SelfSpeculation | DraftModel | ReleaseEarly
