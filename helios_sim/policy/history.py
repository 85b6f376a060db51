"""The performance history table: observations and predictions of each candidate, with their age.

Age is counted in completed requests of the run, so that it does not depend on the clock. An observation's weight
halves every `half_life_requests`; offline records are as old as the run. The weighting is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helios_sim.policy.cap import Evidence, Weighed, weighed
from helios_sim.policy.prediction import Prediction
from helios_sim.policy.telemetry import Candidate, Observation


class ObservedPrompts:
    """Counts of the latest observed prompts of one model with E exits, up to `kept` of them, oldest first."""

    def __init__(self, exits: int, kept: int) -> None:
        self._kept = kept
        self._n = 0
        rows = 2 * kept  # once all rows are used, the latest `kept` move to the front
        kinds: dict[str, tuple[Any, tuple[int, ...]]] = {
            "at_request": (np.int64, (rows,)),
            "tokens": (np.int64, (rows,)),
            "chars": (np.int64, (rows,)),
            "has_bits": (np.bool_, (rows,)),
            "differs": (np.int64, (rows, exits)),
            "confident": (np.int64, (rows, exits)),
            "first": (np.int64, (rows, exits)),
            "bits": (np.float64, (rows, exits)),
        }
        self._columns = {name: np.zeros(shape, kind) for name, (kind, shape) in kinds.items()}

    def __len__(self) -> int:
        return min(self._n, self._kept)

    def add(self, *, bits: NDArray[np.float64] | None, **counts: ArrayLike) -> None:
        """Adds one prompt: `at_request`, `tokens`, `chars`, and by exit `differs`, `confident`, `first`."""
        if self._n == 2 * self._kept:
            for column in self._columns.values():
                column[: self._kept] = column[self._kept :]
            self._n = self._kept
        values = {**counts, "has_bits": bits is not None, "bits": 0.0 if bits is None else bits}
        for name, column in self._columns.items():
            column[self._n] = values[name]
        self._n += 1

    @property
    def at_request(self) -> NDArray[np.int64]:
        """Completed requests when each prompt was observed, (P,)."""
        return self._latest("at_request")

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self._latest("tokens")

    @property
    def chars(self) -> NDArray[np.int64]:
        return self._latest("chars")

    @property
    def has_bits(self) -> NDArray[np.bool_]:
        return self._latest("has_bits")

    @property
    def differs(self) -> NDArray[np.int64]:
        """Tokens that differ from full depth at each exit, (P, E)."""
        return self._latest("differs")

    @property
    def confident(self) -> NDArray[np.int64]:
        """Tokens that are confident at each exit, (P, E)."""
        return self._latest("confident")

    @property
    def first(self) -> NDArray[np.int64]:
        """Tokens with their first confident exit at each exit, (P, E)."""
        return self._latest("first")

    @property
    def bits(self) -> NDArray[np.float64]:
        """Bits of the text's own tokens at each exit, (P, E); 0 where `has_bits` is false."""
        return self._latest("bits")

    def _latest(self, name: str) -> NDArray[Any]:
        return self._columns[name][self._n - len(self) : self._n]


OBSERVATIONS_KEPT = 512  # prompts per model


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """Weighted means over a candidate's evidence, per exit."""

    disagreement: NDArray[np.float64]  # (E,) share of tokens that differ from full depth
    confident: NDArray[np.float64]  # (E,) share of tokens that are confident there
    exit_histogram: NDArray[np.float64]  # (E,) share of tokens with their first confident exit there; sums to 1
    bits_per_char: NDArray[np.float64] | None  # (E,)


class HistoryTable:
    """The history table of one replica in one run. Observed prompts add up; a prediction replaces the last one."""

    def __init__(self, candidates: Mapping[str, Candidate], half_life_requests: float) -> None:
        self._candidates = candidates
        self._half_life_requests = half_life_requests
        self._prompts = {
            name: ObservedPrompts(len(candidate.offline.exits), OBSERVATIONS_KEPT)
            for name, candidate in candidates.items()
        }
        self._weighed: dict[str, Weighed] = {}  # by model; dropped when a prompt is added, as the next two
        self._shares: dict[str, Shares] = {}
        self._observed: dict[str, tuple[Evidence | None, float]] = {}
        self._added = dict.fromkeys(candidates, 0)
        self._predictions: dict[str, tuple[Prediction, int]] = {}

    def add(self, observation: Observation, completed_requests: int) -> None:
        """Adds the counts of one observed prompt; an observation without tokens is ignored."""
        n_tokens, n_exits = observation.agrees.shape
        if n_tokens == 0:
            return
        self._added[observation.model] += 1
        self._weighed.pop(observation.model, None)
        self._shares.pop(observation.model, None)
        self._observed.pop(observation.model, None)
        reached = observation.confident.copy()
        reached[:, -1] = True
        self._prompts[observation.model].add(
            at_request=completed_requests,
            tokens=n_tokens,
            chars=observation.chars,
            differs=n_tokens - np.add.reduce(observation.agrees, axis=0, dtype=np.int64),
            confident=np.add.reduce(observation.confident, axis=0, dtype=np.int64),
            first=np.bincount(reached.argmax(axis=1), minlength=n_exits),
            bits=None if observation.bits is None else observation.bits.sum(axis=0, dtype=np.float64),
        )

    def note(self, model: str, prediction: Prediction, completed_requests: int) -> None:
        self._predictions[model] = (prediction, completed_requests)

    def weighed(self, model: str) -> Weighed:
        """The evidence from two sources, weighted by age: prompts recorded offline, and observed prompts."""
        found = self._weighed.get(model)
        if found is None:
            offline, prompts = self._candidates[model].offline, self._prompts[model]
            seen, weight = self.observed(model)
            weights = np.full(len(offline.prompt_tokens), weight)
            recorded = Evidence(offline.prompt_tokens, offline.prompt_disagreements, weights)
            sources = [recorded] if seen is None else [recorded, seen]
            found = self._weighed[model] = weighed(sources, prompts.confident, prompts.first)
        return found

    def observed(self, model: str) -> tuple[Evidence | None, float]:
        """Observed prompts weighted by age, the youngest by 1, and the weight of an offline prompt beside them.

        Only ages relative to the youngest matter, so weights stay until another prompt is observed.
        """
        found = self._observed.get(model)
        if found is None:
            found = self._observed[model] = self._weighted(model)
        return found

    def _weighted(self, model: str) -> tuple[Evidence | None, float]:
        seen = self._prompts[model]
        if not len(seen):
            return None, 1.0
        youngest = int(seen.at_request[-1])
        weights = 0.5 ** ((youngest - seen.at_request).astype(np.float64) / self._half_life_requests)
        return Evidence(seen.tokens, seen.differs, weights), 0.5 ** (youngest / self._half_life_requests)

    def shares(self, model: str) -> Shares:
        """Shares by offline and observed tokens together, each token weighted by age."""
        found = self._shares.get(model)
        if found is None:
            found = self._shares[model] = self._pooled(model)
        return found

    def _pooled(self, model: str) -> Shares:
        offline, observed = self._candidates[model].offline, self.weighed(model)
        evidence, offline_weight = self.observed(model)
        weights = np.zeros(0) if evidence is None else evidence.weights
        offline_tokens = offline_weight * float(offline.prompt_tokens.sum())
        total = offline_tokens + observed.tokens
        return Shares(
            disagreement=(offline_tokens * offline.disagreement + observed.differs) / total,
            confident=(offline_tokens * offline.confident_share + observed.confident) / total,
            exit_histogram=(offline_tokens * offline.exit_share + observed.first) / total,
            bits_per_char=self._bits_per_char(model, offline_weight, weights),
        )

    def _bits_per_char(
        self, model: str, offline_weight: float, weights: NDArray[np.float64]
    ) -> NDArray[np.float64] | None:
        offline, seen = self._candidates[model].offline, self._prompts[model]
        bits, chars = np.zeros(len(offline.exits)), 0.0
        if offline.bits_per_char is not None:
            chars = offline_weight * float(offline.prompt_tokens.sum()) * offline.chars_per_token
            bits = chars * offline.bits_per_char
        with_bits = seen.has_bits
        weights = weights[with_bits]
        if len(weights):
            bits = _sum_in_order(bits, weights[:, None] * seen.bits[with_bits])
            chars = float(_sum_in_order(chars, weights * seen.chars[with_bits]))
        return bits / chars if chars > 0 else None

    def observed_prompts(self, model: str) -> int:
        """Number of prompts of the model that were ever added, including those no longer kept."""
        return self._added[model]

    def rows(self, completed_requests: int) -> dict[str, dict[str, Any]]:
        """The table as JSON values for the decision log, one row per candidate."""
        table: dict[str, dict[str, Any]] = {}
        for model, prompts in self._prompts.items():
            shares = self.shares(model)
            row: dict[str, Any] = {
                "exits": list(self._candidates[model].offline.exits),
                "observed_prompts": len(prompts),
                "age_requests": completed_requests - int(prompts.at_request[-1]) if len(prompts) else None,
                "disagreement": shares.disagreement.tolist(),
                "confident_share": shares.confident.tolist(),
                "exit_histogram": shares.exit_histogram.tolist(),
                "bits_per_char": None if shares.bits_per_char is None else shares.bits_per_char.tolist(),
            }
            if model in self._predictions:
                prediction, at_request = self._predictions[model]
                row["prediction"] = prediction.to_json()
                row["prediction_age_requests"] = completed_requests - at_request
            table[model] = row
        return table


def _sum_in_order(first: ArrayLike, terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums `first` and the terms (P, ...) in their order, which `np.sum` does not keep.

    It overwrites the first term with its sum with `first`.
    """
    terms[0] += first
    return np.asarray(np.add.accumulate(terms, axis=0)[-1])
