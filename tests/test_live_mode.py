"""`mode=live`: the same command serves the same requests with a real model, under every policy; and its mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch")

from command_line import CommandLine
from helios_sim.command_line import in_full
from helios_sim.live import served
from helios_sim.profile.store import write_profile
from live_study import HARDWARE, tiny_profile, write_live_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_live_study(folder)
    return folder


def arguments(study: Path, *more: str) -> tuple[str, ...]:
    return "--config-dir", str(study / "conf"), "+experiment=tiny_live", *more


def test_live_and_simulated_serve_the_same_requests(command: CommandLine, study: Path, tmp_path: Path) -> None:
    live = command(*arguments(study, "mode=live"), into="live")
    assert live.status == 0, live.err
    simulated = command(*arguments(study), into="simulated")
    tables = [pq.read_table(tmp_path / name / "requests.parquet").to_pydict() for name in ("live", "simulated")]
    for column in ("arm", "request_id", "arrival_ns", "prompt_tokens", "output_tokens", "status", "task"):
        assert tables[0][column] == tables[1][column], column
    for said in (live, simulated):
        assert said.summary["arms"]["full_depth"]["metrics"]["layers_per_token"] == 6
    metrics = live.summary["arms"]["early_exit"]["metrics"]
    assert metrics["ttft_s_mean"] > 0
    assert metrics["agreement"] is None  # nobody computed it while serving
    assert metrics["bits_per_char"] is None
    assert "configuration" in live.summary["provenance"]


POLICIES = (
    "full_depth", "early_exit", "early_exit_lazy", "static_cap", "helios", "helios_probe", "load_only", "switch_only",
    "transfer_only", "self_speculation", "draft_model", "helios_next", "early_exit_rebatch", "release_early",
)  # fmt: skip
NEXT_SOON = ("policy.review_requests=2", "policy.probe_share=0.9")
SOON = ("policy.prompts_per_candidate=2", "policy.round_requests=6", "policy.window_tokens=12", "policy.limit=3")


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_live(command: CommandLine, study: Path, policy: str) -> None:
    of_one_model = (
        "full_depth", "early_exit", "early_exit_lazy", "static_cap", "self_speculation", "early_exit_rebatch",
        "release_early",
    )  # fmt: skip
    more = ("policy.model=tiny",) if policy in of_one_model else NEXT_SOON if policy == "helios_next" else SOON
    if policy == "draft_model":  # which needs room for both
        for name in ("tiny", "other"):
            write_profile(tiny_profile(study / name, name, hbm_bytes=1 << 22), study / "roomy" / f"{name}@{HARDWARE}")
        more = ("policy.model=tiny", "policy.drafter=other", f"profile_folder={study}/roomy")
    if policy == "full_depth":
        more = (*more, "policy.resident_layers=1")
    said = command(*arguments(study, "mode=live", "models=[tiny,other]", f"policy={policy}", *more, "~arms"))
    assert said.status == 0, said.err
    (arm,) = said.summary["arms"].values()
    assert arm["metrics"]["requests_completed"] == 12
    late = [arm["metrics"][name] for name in ("late_layers_per_iteration", "late_time_fraction")]
    assert late == ([5.0, None] if policy == "full_depth" else [None, None])
    if policy in ("self_speculation", "draft_model"):
        assert 0 <= arm["metrics"]["draft_acceptance"] <= 1
    assert (arm["metrics"]["agreement"] is not None) == (policy == "release_early")
    if policy == "helios":
        assert arm["metrics"]["switches"] > 0


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("live.device=cuda:7",), ["live.device='cuda:7'", "live.device=cpu"]),
        (("live.device=tpu",), ["live.device='tpu'", "cpu, cuda"]),
        (("live.dtype=bfloat16",), ["live.dtype='bfloat16'", "float32"]),
        (("live.threads=0",), ["live.threads=0"]),
        (("live.texts=nowhere",), ["live.texts='nowhere'", "text.txt"]),
        (("live.weights.tiny=gone",), ["live.weights of tiny='gone'", "make models"]),
        (("+live.heads.tiny=gone",), ["live.heads of tiny", "gone"]),
        (("server.replicas=2", "live.devices=[cpu]"), ["live.devices=['cpu']", "one for each replica"]),
        (("server.schedule_ahead=1",), ["server.schedule_ahead=1"]),
        (("policy=oracle",), ["policy='oracle'", "mode=live"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_mistake_is_one_message(
    command: CommandLine, study: Path, tmp_path: Path, change: tuple[str, ...], parts: list[str]
) -> None:
    said = command(*arguments(study, "mode=live", *change))
    assert said.status == 1
    assert len(said.err.strip().splitlines()) == 1
    for part in parts:
        assert part in said.err
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_served_live(command: CommandLine, tmp_path: Path) -> None:
    """Its bytes would be those of the profile, its weights those of the folder."""
    said = command(
        "+experiment=own", "models=[opt-1.3b-fp8]", "hardware=h100-80gb", "exits.source=none", "policy=full_depth",
        "mode=live", "+live.weights={opt-1.3b-fp8: smollm2-135m}", f"hydra.run.dir={tmp_path}/out",
    )  # fmt: skip
    assert said.status == 1
    assert "name the unquantized model" in said.err


def test_without_torch_it_says_how_to_get_it(command: CommandLine, study: Path, monkeypatch) -> None:
    there = served.find_spec
    monkeypatch.setattr(served, "find_spec", lambda name: None if name == "torch" else there(name))
    said = command(*arguments(study, "mode=live"))
    assert said.status == 1
    assert "packages='torch'" in said.err
    assert "make live" in said.err


def test_a_torch_that_cannot_be_loaded_is_one_message(command: CommandLine, study: Path, monkeypatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: ncclCommRegister")

    monkeypatch.setattr(served, "import_module", broken)
    said = command(*arguments(study, "mode=live"))
    assert said.status == 1
    assert "cannot be loaded (ImportError: undefined symbol: ncclCommRegister)" in said.err


def test_weights_of_another_shape_are_refused(command: CommandLine, study: Path, tmp_path: Path) -> None:
    from tiny_models import write_tiny

    write_tiny("llama", tmp_path / "shallow", layers=4)
    said = command(*arguments(study, "mode=live", f"live.weights.tiny={tmp_path / 'shallow'}"))
    assert said.status == 1
    assert "n_layers is 4, not 6" in said.err


def test_too_little_memory_is_one_message(command: CommandLine, study: Path, monkeypatch) -> None:
    from helios_sim.live import device

    monkeypatch.setattr(device, "available_bytes", lambda device: 1000)
    said = command(*arguments(study, "mode=live"))
    assert said.status == 1
    assert "memory" in said.err
    assert "Traceback" not in said.err


def test_a_damaged_text_is_refused(command: CommandLine, study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "text.txt").write_text("  \n")
    said = command(*arguments(study, "mode=live", f"live.texts={folder}"))
    assert said.status == 1
    assert "text.txt" in said.err
    shutil.rmtree(folder)


@pytest.mark.usefixtures("sketched")
def test_agreement_is_known_when_it_is_scored(command: CommandLine, study: Path) -> None:
    """At full depth every token is full depth's own; of a model cut in the middle many are not."""
    arms = "+arms.cut={policy: static_cap, model: tiny, cap_layers: 2}"
    said = command(*arguments(study, "mode=live", "live.score=true", arms))
    assert said.status == 0, said.err
    found = {name: arm["metrics"] for name, arm in said.summary["arms"].items()}
    assert found["full_depth"]["agreement"] == 1.0
    assert found["cut"]["layers_per_token"] == 2.0
    assert 0.0 <= found["cut"]["agreement"] < 0.9
    assert found["cut"]["bits_per_char"] is None


@pytest.mark.usefixtures("sketched")
def test_the_same_faults_strike_live_and_simulated(command: CommandLine, study: Path) -> None:
    faults = (
        "workload.faults.iteration_fails.at_s=[0.02,0.03,0.04]", "workload.faults.iteration_fails.rate_per_hour=7200",
        "workload.faults.replica_dies.at_s=[0.05]", "workload.faults.replica_dies.lasts_s=0.2",
        "workload.faults.retries=50",
    )  # fmt: skip
    for mode in ("live", "simulate"):
        said = command(*arguments(study, f"mode={mode}", *faults), into=mode)
        assert said.status == 0, said.err
        arm = said.summary["arms"]["full_depth"]
        assert arm["metrics"]["requests_completed"] == 12
        assert arm["metrics"]["availability"] < 1
        assert arm["faults"]["hits"]["replica_dies"] == 1
        assert (arm["faults"]["without"] is None) == (mode == "live")


def test_a_model_and_a_device_for_short() -> None:
    assert in_full(["+experiment=x", "model=smollm2", "device=cuda:1"]) == [
        "+experiment=x", "models=[smollm2-135m]", "live.device=cuda:1",
    ]  # fmt: skip
    assert in_full(["model=mine", "models=[a,b]", "policy.model=c"]) == [
        "models=[mine]",
        "models=[a,b]",
        "policy.model=c",
    ]
