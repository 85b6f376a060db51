"""The folded check says what the formula of the heads says."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings, strategies as st

torch = pytest.importorskip("torch")

from helios_sim.live.model.heads import (  # noqa: E402
    FEW_ROWS,
    FoldedCheck,
    check_logit,
)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    d=st.integers(1, 40),
    width=st.integers(1, 24),
    rows=st.sampled_from([(), (1,), (7,), (2, 3), (FEW_ROWS + 1,)]),
    risk_scale=st.sampled_from([1.0, 1.25, 4.0]),
    magnitude=st.sampled_from([0.03, 1.0, 300.0]),
)
def test_it_is_the_formula_of_the_heads(seed, d, width, rows, risk_scale, magnitude) -> None:
    drawn = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=drawn)
        for name, shape in {
            "scale": (d,), "check_in": (width, d), "check_bias": (width,), "check_out": (width,), "check_offset": (),
        }.items()
    }  # fmt: skip
    hidden = magnitude * torch.randn((*rows, d), generator=drawn)
    assume(hidden.square().mean(-1).min() > 1e-6)  # below, the formula's 1e-12 under its root shows
    p = torch.sigmoid(check_logit(tensors, hidden).double())
    found = FoldedCheck.fold(tensors, risk_scale)(hidden)
    assert found.dtype is torch.float32
    assert found.shape == hidden.shape[:-1]
    assert torch.allclose(found.double(), 1 - (1 - p) * risk_scale, atol=2e-5 * risk_scale)


def test_a_hidden_state_of_zeros_is_never_sure() -> None:
    tensors = {"scale": torch.ones(4), "check_in": torch.ones(3, 4), "check_bias": torch.zeros(3),
               "check_out": torch.ones(3), "check_offset": torch.tensor(0.5)}  # fmt: skip
    assert not (FoldedCheck.fold(tensors, 1.0)(torch.zeros(2, 4)) >= 0.0).any()
