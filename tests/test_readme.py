"""What the README shows works as it is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import helios_sim.__main__ as command_line
from helios_sim import load_trace, simulate

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_policy_in_the_readme_runs_and_decides(tmp_path: Path, monkeypatch, capsys) -> None:
    (code,) = re.findall(r"```python\n# my_policy.py\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 32
    (tmp_path / "my_policy.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        ["helios_sim", "policy=custom", "policy.object=my_policy:CutWhenBusy", "+policy.settings.busy=2",
         "workload.n_requests=40", "workload.arrivals.kind=all_at_once", "server.max_running_requests=8",
         "subject=custom", f"hydra.run.dir={tmp_path}/out"],
    )  # fmt: skip
    status = command_line.main()
    streams = capsys.readouterr()
    assert status == 0, streams.err
    summary = json.loads(streams.out.strip().splitlines()[-1])
    layers = summary["arms"]["custom"]["metrics"]["layers_per_token"]
    assert 6 <= layers < 24
    page = (tmp_path / "out" / "report.html").read_text()
    assert "run: cut at layer 6" in page


@pytest.mark.slow
def test_the_policy_that_keeps_levels_is_asked_because_of_both(tmp_path: Path, monkeypatch, capsys) -> None:
    (code,) = re.findall(r"```python\n# my_levels.py\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 32
    (tmp_path / "my_levels.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def causes(*words: str) -> str:
        out = tmp_path / words[0].partition("=")[2]
        monkeypatch.setattr(
            "sys.argv",
            ["helios_sim", "policy=custom", "policy.object=my_levels:KeepLevels", "subject=custom",
             "pictures=false", "slo.tpot_s=0.0042", f"hydra.run.dir={out}",
             *(f"+policy.settings.{word}" for word in words)],
        )  # fmt: skip
        status = command_line.main()
        streams = capsys.readouterr()
        assert status == 0, streams.err
        rows = pq.read_table(out / "decisions.parquet").to_pylist()
        return "; ".join(f"{row['cause']}: {row['reason']}" for row in rows if row["arm"] == "custom")

    assert re.search(r"power above .*: \d+% inside the SLOs, \d+ W: cut at layer 6", causes("watts=100", "share=0"))
    assert re.search(r"slo below .*: \d+% inside the SLOs, \d+ W: cut at layer 6", causes("watts=399", "share=1"))


def test_the_measured_pair_drafts_as_often_right_as_its_trace_says() -> None:
    shown = r"python -m helios_sim (\+experiment=own .*policy=draft_model)\n"
    (line,) = re.findall(shown, README.read_text())
    few = ("policy.draft_tokens=1", "workload.n_requests=150", "profile_band=none")
    (arm,) = simulate("own", *line.split()[1:], *few).arms.values()
    trace = load_trace("qwen2.5-coder-1.5b", "generated")
    right, metrics = trace.drafted_by("qwen2.5-coder-0.5b"), arm.replicates[0].metrics
    by_task = [right[trace.task == task].mean() for task in range(len(trace.tasks))]
    assert metrics["draft_acceptance"] == pytest.approx(np.mean(by_task), abs=0.03)
    assert metrics["agreement"] == 1


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()))))
def test_links_lead_somewhere(path: str) -> None:
    assert (README.parent / path).exists()
