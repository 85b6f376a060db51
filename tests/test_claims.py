"""The page of published figures is what its script makes of its file, and says of each claim why it stands or not."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from helios_sim.policy.drafts import tokens_per_pass


@pytest.fixture(scope="module")
def claims(repository: Path) -> dict[str, Any]:
    return runpy.run_path(str(repository / "experiments" / "claims" / "measure.py"))


@pytest.mark.slow
def test_the_recorded_page_is_what_the_script_makes(claims: dict[str, Any], repository: Path) -> None:
    rows = claims["rows"]()
    assert (repository / "experiments/claims/results.md").read_text(encoding="utf-8") == claims["page"](rows)
    assert len(rows) >= 25
    readme = (repository / "experiments/claims/README.md").read_text(encoding="utf-8")
    verdicts = ("reproduced", "refuted", "cannot be checked")
    told = ", ".join(f"{sum(row.verdict == verdict for row in rows)} {verdict}" for verdict in verdicts)
    assert f"of {len(rows)} claims: {told}." in readme
    for row in rows:
        assert row.verdict in verdicts
        assert row.why or row.verdict == "reproduced"
        assert bool(row.ours) or row.verdict == "cannot be checked"


def test_what_other_pages_have_is_there(claims: dict[str, Any], repository: Path) -> None:
    for claim in claims["read"]()["claims"]:
        if claim["kind"] == "recorded":
            folder = repository / "experiments" / claim["page"]
            text = "".join((folder / name).read_text(encoding="utf-8") for name in ("README.md", "results.md"))
            assert [n for n in re.findall(r"[\d.]+", claim["ours"]) if n not in text] == []


@pytest.mark.parametrize("drafts", [1, 6, 12])
@pytest.mark.parametrize("acceptance", [0.02, 0.4, 0.95])
def test_the_agreement_gives_the_acceptance_back(claims: dict[str, Any], acceptance: float, drafts: int) -> None:
    agreement = claims["agreement_of"](acceptance, drafts)
    assert (tokens_per_pass(agreement, drafts) - 1) / drafts == pytest.approx(acceptance, abs=1e-9)
    assert agreement >= acceptance - 1e-9
