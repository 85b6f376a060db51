"""Opens what live serving needs: device, checkpoints with their heads and tokenizers. Knows files, serves nothing.

What can be wrong is found here, before a run begins, each with one message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helios_sim.errors import UserError
from helios_sim.exits.trace import BoundTrace
from helios_sim.live.architecture import VALUE_BYTES
from helios_sim.live.packages import check_packages
from helios_sim.profile.profile import Profile

if TYPE_CHECKING:
    from helios_sim.live.heads import ExitHeads
    from helios_sim.live.served import LiveModel
    from helios_sim.live.source import Checkpoint


@dataclass(frozen=True, slots=True)
class Wanted:
    """How models are to be opened. `weights` and `heads` by model, where they are not found by the model's name."""

    device: str = "cpu"  # cpu, cuda, cuda:N
    dtype: str | None = None  # None: the profile's
    threads: int | None = None  # of a CPU; None: as torch has it
    seed: int = 0
    weights: Mapping[str, str] | None = None
    heads: Mapping[str, str] | None = None


def open_models(
    wanted: Wanted, profiles: Mapping[str, Profile], traces: Mapping[str, BoundTrace]
) -> dict[str, LiveModel]:
    """Every model that has a profile. Layers are not read yet.

    Raises UserError for packages, a device, weights or heads that are not there, and for weights that are not those
    of the profile or do not fit.
    """
    from helios_sim.live.served import LiveModel

    _open_device(wanted)
    found = {}
    for name, profile in profiles.items():
        _check_dtype(wanted.dtype, profile)
        checkpoint = _checkpoint(name, wanted)
        _check_shape(checkpoint, profile)
        exits = traces[name].trace.exits
        heads = _heads(name, checkpoint, wanted, exits)
        found[name] = LiveModel(checkpoint, heads, checkpoint.tokenizer(), profile, traces[name], checkpoint.is_random)
    return found


def _open_device(wanted: Wanted) -> None:
    check_packages("serving on a device")
    import torch

    if wanted.device != "cpu":
        number = int(wanted.device.partition(":")[2] or 0)
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if number >= there:
            cards = f"a card that is there: {there} found" + ("" if there else ", and torch sees no CUDA")
            raise UserError("live.device", wanted.device, cards, "set live.device=cpu, or name another card")
    elif wanted.threads is not None:
        torch.set_num_threads(wanted.threads)
    torch.manual_seed(wanted.seed)


def _checkpoint(name: str, wanted: Wanted) -> Checkpoint:
    from helios_sim.live.source import find_checkpoint

    given = (wanted.weights or {}).get(name)
    try:
        return find_checkpoint(given or name)
    except UserError as error:
        if error.key != "weights":
            raise
        fix = (
            f"{error.fix}; or name them: '+live.weights={{{name}: FOLDER}}' (`make models` fetches the small open ones)"
        )
        raise UserError(f"live.weights of {name}", error.value, error.allowed, fix) from error


def _check_dtype(dtype: str | None, profile: Profile) -> None:
    """The profile's bytes say what policies and the KV cache count with, so nothing else can be served beside it."""
    kept = next((d for d, n in VALUE_BYTES.items() if n == profile.model.weight_bytes_per_value), "another dtype")
    if dtype is not None and dtype != kept:
        fix = f"leave live.dtype out, or measure a profile with python -m calibrate dtype={dtype}"
        raise UserError("live.dtype", dtype, f"{kept}, in which the profile {profile.name} was measured", fix)


def _check_shape(checkpoint: Checkpoint, profile: Profile) -> None:
    a, m = checkpoint.architecture, profile.model
    for key, there, known in (
        ("layers", a.n_layers, m.n_layers),
        ("d_model", a.d_model, m.d_model),
        ("vocab_size", a.vocab_size, m.vocab_size),
    ):
        if there != known:
            raise UserError(
                f"live.weights of {m.name}", checkpoint.source, f"{known} {key}, as the profile {profile.name} has; "
                f"these have {there}", "name the weights that the profile was measured with, or measure these",
            )  # fmt: skip


def _heads(name: str, checkpoint: Checkpoint, wanted: Wanted, exits: tuple[int, ...]) -> ExitHeads:
    """Named, shipped for the model, or the model's own head at every exit of the trace."""
    from helios_sim.live.heads import HEADER, SHIPPED, ExitHeads

    given = (wanted.heads or {}).get(name)
    folder = Path(given).expanduser() if given is not None else SHIPPED / name
    if given is None and not (folder / HEADER).is_file():
        return ExitHeads.own(exits[:-1])
    try:
        return ExitHeads.load(folder, checkpoint.architecture, wanted.device)
    except UserError as error:
        raise error.about(f"live.heads of {name}: {error.key}") from error
