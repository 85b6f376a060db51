"""The cost of an exit check by a predictor of a few words (`exits.rule`), if a profile has not measured it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from helios_sim.exits.rule import WORDS
from helios_sim.profile.profile import Profile
from helios_sim.profile.tables import RowsTable
from helios_sim.provenance import Assumption

WIDTH = 512  # width of the network, as in SpecEE's code (arXiv 2504.08850)
NAME = "check by a predictor"
WHY = (
    "by bytes: for each token the columns of {words} words of the head and two hidden states, once the weights of a "
    "network of two layers, at the bandwidth of the data sheet; and as much as launching a layer takes"
)
_ROWS = 4096


def with_predictor(profile: Profile) -> Profile:
    """The profile with a cost of checks by predictors: measured, or derived from bytes, which its provenance says."""
    if profile.check_predictor is not None:
        return profile
    fixed_s, per_row_s = derived_s(profile)
    table = RowsTable(np.array([1, _ROWS], np.int64), fixed_s + per_row_s * np.array([1.0, _ROWS]))
    told = Assumption(NAME, fixed_s + per_row_s, WHY.format(words=WORDS), "check_predictor")
    known = replace(profile.provenance, assumptions=(*profile.provenance.assumptions, told))
    return replace(profile, check_predictor=table, provenance=known)


def derived_s(profile: Profile) -> tuple[float, float]:
    """The fixed seconds of a check, and the seconds of each token.

    A token reads WORDS columns of the head and two states of d_model values; the network's 3 x WORDS inputs, its hidden
    layer and its output have (3 WORDS + 2) WIDTH + 1 weights. Products are few beside what is read.
    """
    model, bandwidth = profile.model, profile.hardware.hbm_bytes_per_s
    value_bytes = model.weight_bytes_per_value
    network_bytes = ((3 * WORDS + 2) * WIDTH + 1) * value_bytes
    token_bytes = (WORDS + 2) * model.d_model * value_bytes
    return profile.runtime.launch_s_per_layer + network_bytes / bandwidth, token_bytes / bandwidth
