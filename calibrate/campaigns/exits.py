"""Where the exits of a campaign's studies come from: measured, published, carried over or made up. Knows no arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calibrate.campaigns.schema import CampaignConfig
from calibrate.stages import Finished
from calibrate.work import TRACES
from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.published import EXIT_SHARES, TASKS as PUBLISHED_TASKS, published_trace
from helios_sim.exits.store import read_trace, write_trace
from helios_sim.exits.trace import ExitTrace
from helios_sim.profile.profile import Profile
from helios_sim.provenance import Assumption, Provenance, ProvenanceClass
from helios_sim.study.schema import ExitsConfig

MADE_UP = "text"  # the task of made-up exits
SURE_HEAD, SURE_CHECK = 0.9, 0.8  # thresholds of a head's probability, and of a classifier's check
SURE_MADE_UP = 0.6
LENDER = "opt-6.7b"  # whose published exits a model without its own is given
# By model: the published layer of its early exit, and the share of tokens not confident there that deeper layers leave
# unchanged (HELIOS, arXiv 2504.10724, by reading notes). How many tokens are confident there is not published.
CARRIED: Mapping[str, tuple[int, float]] = {"codellama-34b": (16, 0.90)}


@dataclass(frozen=True, slots=True)
class Exits:
    """`said`: where they come from, in words; `origin`: in one."""

    settings: ExitsConfig
    tasks: Sequence[str]
    chars_per_token: float
    said: str
    origin: str  # measured, published, assumed, made up


def exits_of(
    config: CampaignConfig, profiles: Mapping[str, Profile], finished: Mapping[str, Finished], folder: Path
) -> Exits:
    """Of models that serve together. `folder` is for what has to be written. UserError where nobody knows any."""
    if config.text_model in profiles:
        return _measured(finished[TRACES], profiles[config.text_model])
    if config.live.exits:
        for model in profiles:
            trace = synthetic_trace(model, config.live.exits[model], (MADE_UP,), seed=config.seed)
            write_trace(trace, folder / model)
        exits = ExitsConfig(source=f"{folder}/{{model}}", threshold=SURE_MADE_UP)
        return Exits(exits, (MADE_UP,), 4.0, "made up, to rehearse", "made up")
    if set(profiles) <= set(EXIT_SHARES):
        said = "fitted to published shares; weights are random, so their text means nothing"
        return Exits(ExitsConfig(source="published", threshold=SURE_HEAD), PUBLISHED_TASKS, 4.2, said, "published")
    for model, profile in profiles.items():
        write_trace(carried_over(model, profile.model.n_layers, profile.model.chars_per_token), folder / model)
    exits = ExitsConfig(source=f"{folder}/{{model}}", threshold=SURE_HEAD)
    chars = next(iter(profiles.values())).model.chars_per_token
    said = f"assumed: shares as published for {LENDER}, at the model's own published exit"
    return Exits(exits, PUBLISHED_TASKS, chars, said, "assumed")


def carried_over(model: str, n_layers: int, chars_per_token: float) -> ExitTrace:
    """The lender's tokens at the model's published exit. UserError for a model of which no exit is published."""
    if model not in CARRIED:
        allowed = f"exits are known for {', '.join((*EXIT_SHARES, *CARRIED))}"
        raise UserError("models", model, allowed, "name them in live.exits")
    layer, unchanged = CARRIED[model]
    lent = published_trace(LENDER, chars_per_token=chars_per_token)
    assert lent.confident is not None
    confident = lent.confident[:, 0]
    agree = np.ones_like(lent.agree)
    agree[:, 0] = confident | (np.random.default_rng(0).random(lent.n_tokens) < unchanged)
    (lent_layer, share), *_ = EXIT_SHARES[LENDER].items()
    why = f"published for {LENDER} at layer {lent_layer}; of {model} no share is published"
    return replace(
        lent,
        model=model,
        exits=(layer, n_layers),
        agree=agree,
        provenance=Provenance(
            ProvenanceClass.PUBLISHED,
            f"exits of {LENDER} at layer {layer} of {model}; {unchanged:.0%} of tokens not confident there unchanged: "
            "HELIOS (arXiv 2504.10724, reading notes)",
            f"calibrate.campaigns.exits.carried_over({model!r}, {n_layers}, {chars_per_token})",
            assumptions=(Assumption(f"{model} exits: share at layer {layer}", share, why, "exits.source"),),
        ),
    )


def _measured(traces: Finished, profile: Profile) -> Exits:
    place = traces.part("trace")
    trace = read_trace(place)
    checks = trace.classifier is not None and profile.check_classifier is not None
    exits = ExitsConfig(
        source=str(place), threshold=SURE_CHECK if checks else SURE_HEAD,
        confidence="classifier" if checks else "max_probability",
    )  # fmt: skip
    said = f"measured by this campaign, {trace.n_tokens} tokens"
    return Exits(exits, trace.tasks, float(trace.chars.sum() / trace.n_tokens), said, "measured")
