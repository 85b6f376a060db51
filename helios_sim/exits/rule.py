"""Exit rules: when a token leaves the model. `replay` applies a rule to a recorded trace."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Confidence(StrEnum):
    """How sure an exit is. The first two need the LM head, which gives the token as well; the last does not."""

    MAX_PROBABILITY = "max_probability"
    MARGIN = "margin"  # top1 - top2 probability
    CLASSIFIER = "classifier"  # 1 - (1 - p) x risk_scale; p of agreement is predicted from the hidden state alone


@dataclass(frozen=True, slots=True)
class FullDepth:
    """Every token runs all loaded layers; no check is made."""


@dataclass(frozen=True, slots=True)
class FixedCap:
    """Every token runs exactly the loaded layers and leaves there, confident or not.

    The confidence comes from the same logits that sample the token, so it costs no extra head; a classifier's is
    charged. A token whose confidence is below the threshold is a breach.
    """

    threshold: float
    confidence: Confidence = Confidence.MAX_PROBABILITY


@dataclass(frozen=True, slots=True)
class PerToken:
    """A token leaves at the first exit where its confidence reaches the threshold.

    Each exit that a token reaches is a check that is paid for; after a classifier's check a token that leaves still
    has to pass the head. A token that is nowhere confident runs all loaded layers; that is a breach when these are
    not the whole model.
    """

    threshold: float
    confidence: Confidence = Confidence.MAX_PROBABILITY


@dataclass(frozen=True, slots=True)
class Clairvoyant:
    """A token leaves, unchecked, at the first exit that already gives its full-depth prediction.

    `disagreement_budget` is the share of tokens that may leave at the first exit whatever they predict there:
    those whose agreeing exit is deepest, per task text.
    """

    disagreement_budget: float = 0.0


ExitRule = FullDepth | FixedCap | PerToken | Clairvoyant
