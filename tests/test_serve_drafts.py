"""Drafts behind the endpoints, of an exit or of another model: several tokens a pass, and an end that cuts them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")

from helios_sim.profile.store import write_profile
from live_study import HARDWARE, tiny_profile, write_live_study
from served import contents, serving

TEXT = "/v1/completions"
ARMS = {
    "policy: self_speculation, model: tiny, exit_layer: 4": "tiny",
    "policy: draft_model, model: tiny, drafter: other": "tiny,other",
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("policy", ARMS)
def test_drafts_change_no_text(policy: str, tmp_path: Path) -> None:
    """Without end tokens nothing is drafted, since the likeliest token may be barred; with them everything is."""
    write_live_study(tmp_path, f"arms:\n  drafts: {{{policy}, draft_tokens: 3}}\n")
    for name in ("tiny", "other"):  # with room for both
        write_profile(
            tiny_profile(tmp_path / name, name, hbm_bytes=1 << 22), tmp_path / "roomy" / f"{name}@{HARDWARE}"
        )
    words = (
        "--config-dir", str(tmp_path / "conf"), "+experiment=tiny_live", "mode=live", f"models=[{ARMS[policy]}]",
        f"profile_folder={tmp_path}/roomy",
    )  # fmt: skip
    with serving(tmp_path, *words, "serve.max_model_len=96", "live.threads=1") as served:
        for prompt in ("The river ran", "def area(", "What did you say?", "every cart", "an early bird"):
            body = {"prompt": prompt, "max_tokens": 24}
            whole = served.post(TEXT, {**body, "ignore_eos": True}).json()["choices"][0]["text"]
            drafted = served.post(TEXT, body).json()
            text = drafted["choices"][0]["text"]
            assert whole.startswith(text)
            assert drafted["choices"][0]["finish_reason"] == "stop" or text == whole
            assert "".join(contents(served.chunks(TEXT, body))) == text
            drawn = served.post(TEXT, {**body, "temperature": 1.0, "seed": 3})
            assert drawn.status_code == 200
        assert served.settled()["books"]["failed"] == 0
