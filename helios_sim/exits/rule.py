"""Exit rules: when a token leaves the model, and by which confidence. `replay` applies a rule to a recorded trace.

A confidence says how sure an exit is of its token. It lies between 0 and 1, and higher is surer, so that one scale of
thresholds serves all of them. To add one, write a function of what it reads (`Probabilities`, say), name it in
`Confidence` and give it a column in `MEASURES`: calibration records the column, live serving computes it, a replay
reads it, and settings accept its name.

- max_probability: the largest softmax probability.
- margin: the largest minus the second largest probability, which CALM (arXiv 2207.07061) calls softmax response.
- entropy: 1 - H / log V, where H is the entropy of the softmax over V words (BranchyNet and DeeBERT leave where H is
  low). It is 1 where one word has all the probability and 0 where all words are alike.
- classifier: p, the probability of agreement with full depth that a small network predicts from the hidden state, as
  1 - (1 - p) x risk_scale. The scale is 1 at the first exit and grows as leaving saves less, so that one threshold
  suits all exits; values can lie below 0.
- hidden_similarity: the cosine of the hidden states after the exit's layer and after the layer before it, 0 where it is
  negative (CALM's hidden-state saturation: a state that no longer moves will give the same token). An exit trace
  records it; live serving keeps only the states after exits.
- predictor: SpecEE's (arXiv 2504.08850): a small network reads what an exit says of `WORDS` words that the first exit's
  head proposed, and predicts whether one of them is the exit's word and full depth's. Where it says so, the head is
  asked, and the token leaves if the head's word is one of those. Where it is none of them, the measure is negative: the
  head is asked in vain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from helios_sim.errors import UserError

MOST_THRESHOLD = 2.0
WORDS = 4  # that the first exit proposes, and that predictors look at
MOST_NEAR_TOKENS = 10  # of a request that say which exits look at its next one: their exits fit into one number
MOST_LOOKS = 62  # exits of a model, where each token is looked at alone: a bit for each
MOST_EXCHANGE_S = 60.0
MOST_DRAFTS = 64  # of one pass: beyond it a batch of them would take the token budget


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
        """True if it needs the LM head, which gives the token as well; the others are a check on the hidden state."""
        return MEASURES[self].by_head


# By which cascades judge an answer: at full depth, in the mean over its tokens.
OF_ANSWERS = Confidence.MAX_PROBABILITY


class Probabilities(Protocol):
    """What the head of one exit says of n tokens, as tensors or arrays."""

    @property
    def vocab_size(self) -> int: ...

    def top(self, k: int) -> Any:
        """The k largest probabilities, (n, k), in descending order."""

    def expected(self, of: Callable[[Any], Any]) -> Any:
        """The mean of `of` (log probability) under the distribution, (n,)."""


class Checked(Protocol):
    """What the check of one exit says of n hidden states."""

    def predicted(self) -> Any:
        """The classifier's confidence, (n,)."""


class Neighbours(Protocol):
    """The hidden states of n tokens around one layer."""

    def states(self) -> tuple[Any, Any]:
        """After the layer before the exit's and after the exit's layer, (n, d) each."""


class Proposed(Protocol):
    """What an exit says of the words that the first exit proposed for each of n tokens."""

    def foreseen(self) -> Any:
        """(n,) the predictor's probability, negative where the exit's own word is none of them."""


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
    """One confidence: its function (n,), its column in an exit trace, and what may be expected of its values."""

    of: Callable[[Any], Any]  # of what it reads: `Probabilities`, `Checked`, `Neighbours` or `Proposed`
    column: str
    by_head: bool = True
    probability: bool = False  # it is meant as the probability of agreement, so its reliability can be judged
    lowest: float = 0.0
    neighbours: bool = False  # it compares the states of two neighbouring layers, which live serving does not keep
    proposes: bool = False  # it looks at words that the first exit proposed

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
    """UserError for what can be no threshold of a confidence, such as one in per cent."""
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
    """Raises UserError for a measure that only tells which tokens leave, one by one, under a cap or at a ramp."""
    if MEASURES[confidence].proposes:
        raise UserError(
            "exits.confidence", confidence.value, "another measure: a predictor tells which tokens leave, one by one, "
            "after the first exit has proposed words", "set policy=early_exit, or choose another measure",
        )  # fmt: skip


def listed(some: Iterable[Confidence]) -> str:
    """The names of some measures, for a message."""
    return ", ".join(c.value for c in some) or "none"


@dataclass(frozen=True, slots=True)
class FullDepth:
    """Every token runs all loaded layers; no check is made."""


@dataclass(frozen=True, slots=True)
class FixedCap:
    """Every token runs exactly the loaded layers and leaves there, confident or not.

    A confidence from the LM head comes from the logits that sample the token, so it costs no extra head; a check on
    the hidden state is charged. A token with a confidence below the threshold is a breach.
    """

    threshold: float
    confidence: Confidence = Confidence.MAX_PROBABILITY


@dataclass(frozen=True, slots=True)
class Near:
    """Exits that look because a request's latest tokens left close by (SpecEE, arXiv 2504.08850).

    Those at most `layers` away from where one of its latest `tokens` left, or ran to the end.
    """

    tokens: int = 5
    layers: int = 2


@dataclass(frozen=True, slots=True)
class PerToken:
    """A token leaves at the first exit where its confidence reaches the threshold.

    Each exit that a token reaches is a check that is paid for; after a check on the hidden state a token that leaves
    still has to pass the head. A token that is nowhere confident runs all loaded layers; that is a breach when these
    are not the whole model. With `checkpoints` only these exits check (TIDE, arXiv 2603.21365). With `near` the exits
    near those of the request's latest tokens check besides the `checkpoints`, without which no token would ever leave.

    With the confidence `predictor` the head of the first exit is asked for every token, since it proposes the words;
    so that exit always checks. Where a predictor is sure the head is asked in the same band.
    """

    threshold: float
    confidence: Confidence = Confidence.MAX_PROBABILITY
    checkpoints: tuple[int, ...] | None = None  # layers, exits before the last; None: every exit
    near: Near | None = None

    def checks_at(self, layers: int) -> bool:
        """Whether every token that comes there is checked."""
        return self.near is None if self.checkpoints is None else layers in self.checkpoints

    @property
    def looks(self) -> bool:
        """Each token is looked at alone."""
        return self.near is not None or MEASURES[self.confidence].proposes


@dataclass(frozen=True, slots=True)
class Clairvoyant:
    """A token leaves, unchecked, at the first exit that already gives its full-depth prediction.

    `disagreement_budget` is the share of tokens that may leave at the first exit whatever they predict there:
    those with the deepest agreeing exit, per task text.
    """

    disagreement_budget: float = 0.0


@dataclass(frozen=True, slots=True)
class SelfSpeculation:
    """The layers up to `exit_layers` and the LM head draft `draft_tokens` tokens, one after the other; then one pass of
    the whole model verifies them all (LayerSkip, arXiv 2404.16710).

    A draft is kept as long as the whole model gives the same token, and its own next token comes on top, so that every
    token is the whole model's. The verification goes on from the drafts' hidden states and K and V. Where more than
    `largest_batch` requests decode none drafts, as drafts then cost more than they save; None: they always do.
    """

    exit_layers: int
    draft_tokens: int
    largest_batch: int | None = None


@dataclass(frozen=True, slots=True)
class OwnCard:
    """The model that drafts has a card of its own, of the same kind, and works while the other card verifies (CoSine,
    arXiv 2503.10325).

    A stage ends when both have ended what they do, and `exchange_s` later what either gave is on the other card. With
    two `parts` at most half of the batch is drafted for at once, while drafts of the other half are verified; with one
    part all that wait are: requests that came at one moment then wait for one card after the other together.
    """

    exchange_s: float
    parts: int = 2


@dataclass(frozen=True, slots=True)
class DraftModel:
    """Another model, with the same tokenizer, drafts `draft_tokens` tokens; one pass of the active one verifies them.

    Drafts are kept as under `SelfSpeculation`. Weights and K and V of both are in memory. The other model computes
    prompts too, and reads with its first draft what it has not read yet: the last draft of a pass that was accepted as
    a whole, and tokens of iterations in which none drafted.
    """

    drafter: str
    draft_tokens: int
    largest_batch: int | None = None
    own_card: OwnCard | None = None  # None: both models are on one card
    # Others that propose each token too, each on a card of its own; all go on with the one that was surest (CoSine)
    fused_with: tuple[str, ...] = ()

    @property
    def drafters(self) -> tuple[str, ...]:
        return (self.drafter, *self.fused_with)


@dataclass(frozen=True, slots=True)
class ReleaseEarly:
    """A token's answer is delivered at the first of `ramps` where it is confident, and the token runs the whole model
    all the same (Apparate, arXiv 2312.05385): K and V are complete, every answer is compared with the whole model's.

    Each ramp checks every token, and the host does not wait for the answer. The next token of a request starts when the
    iteration ends: what is gained is the delivery of the token, not the rate.
    """

    ramps: tuple[int, ...]  # layers, ascending, before the last
    thresholds: tuple[float, ...]  # of each ramp; above 1: nothing is released there
    confidence: Confidence = Confidence.MAX_PROBABILITY
    tells_all: bool = False  # the policy gets an observation of each complete answer, all its tokens at all ramps


ExitRule = FullDepth | FixedCap | PerToken | Clairvoyant | SelfSpeculation | DraftModel | ReleaseEarly
