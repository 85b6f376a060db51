"""Traces of OPT-1.3B and OPT-6.7B drawn to fit published exit statistics. They hold no real text or token.

The published figures (HELIOS, arXiv 2504.10724, by reading notes; SpecEE, arXiv 2504.08850) and their use:

- Shares of tokens by exit: OPT-1.3B 74 / 5 / 21 % at layers 6 / 12 / 24, OPT-6.7B 77 / 23 % at 9 / 32. Fitted.
- 92 % of tokens leave at the earliest exit of at least one of the two. Fitted (`jointly_early`).
- 57 % of OPT-1.3B's late tokens need only 9 layers of OPT-6.7B. This contradicts the 92 %: with it, at most
  0.74 + 0.26 x 0.57 = 88.8 % leave early somewhere. NOT fitted; `Fit.late_helped` is the share that results instead.
  `jointly_early=0.888` fits the 57 % and gives up the 92 %.
- 85 % of the tokens that are not confident at layer 9 of OPT-6.7B are unchanged by the deeper layers. Fitted. For
  OPT-1.3B no such share is published: it is the parameter `unchanged`, to be swept from 0.70 to 0.95.
- 70 % of tokens leave within two layers of one of the last five tokens' exits. Taken literally this says nothing
  about exits as far apart as these (independent draws already give 90 % for OPT-1.3B). So it is applied to the model
  on which it was measured, with 32 layers and an exit after each. There a latent AR(1) process with equally likely
  exits reproduces the 70 % at one lag correlation, which is used here. This correlation is rather too high: if some
  exits are preferred, chance alone explains more of the 70 %.

Model: each token has one latent hardness per OPT model, jointly Gaussian, AR(1) along a prompt and independent
between prompts; a token leaves at the first exit with a cut above its hardness. Confident at one exit means
confident at all deeper ones. Agreement with full depth is drawn by one uniform number per token and model, compared
with `unchanged` at exits where the token is not confident and with `confident_agreement` where it is; so agreement is
nested too.

Traces are generated on demand: 200,000 tokens take a fraction of a second and give the same bits each time. So no file
can differ from the code that made it, and every parameter can be swept.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence
from helios_sim.exits.trace import ExitTrace
from helios_sim.provenance import Assumption, Provenance, ProvenanceClass

Floats = NDArray[np.float64]

# Share of tokens that leave first at each depth.
EXIT_SHARES: dict[str, dict[int, float]] = {
    "opt-1.3b": {6: 0.74, 12: 0.05, 24: 0.21},
    "opt-6.7b": {9: 0.77, 32: 0.23},
}
UNCHANGED_OPT_6_7B = 0.85  # share of the tokens not confident at layer 9
LATE_HELPED = 0.57  # share of OPT-1.3B's late tokens; published, not fitted
SMALLER, LARGER = EXIT_SHARES
TASKS = ("sharegpt", "cnn_dailymail", "gsm8k", "codexglue", "hellaswag")
THRESHOLD = 0.9  # a label for "the threshold of the publication"; no result depends on its value

REFERENCE_EXITS = 32  # exits of Llama-2-7B, one after each layer, in the publication on neighbouring tokens' exits
NEAR_LAYERS = 2
LOOK_BACK_TOKENS = 5
_DIGITS = 9  # decimals of solved values; further ones may differ between machines, by the order of sums


@dataclass(frozen=True, slots=True)
class PublishedParameters:
    """Parameters that the publications leave open, and the size of the sample."""

    unchanged: float = 0.85  # share of OPT-1.3B's tokens not confident at an exit that agree there all the same
    confident_agreement: float = 1.0  # share of confident tokens that agree with full depth, both models
    jointly_early: float = 0.92  # share of tokens that leave at the earliest exit of at least one model
    near_last_five: float = 0.70  # share of tokens within two layers of one of the last five exits, over 32 exits
    task_spread: float = 0.0  # standard deviation of the tasks' mean hardness; within a task it is 1
    chars_per_token: float = 4.2  # as in the OPT model specifications, so that prompts and answers agree
    prompts_per_task: int = 200
    prompt_tokens: int = 200
    seed: int = 0
    drafted: float | None = None  # share of OPT-6.7B's tokens that OPT-1.3B predicts, drawn independently

    def __post_init__(self) -> None:
        for name, low, high in (
            ("confident_agreement", UNCHANGED_OPT_6_7B, 1.0),
            ("unchanged", 0.0, self.confident_agreement),
            ("jointly_early", 0.0, 1.0),
            ("near_last_five", 0.0, 1.0),
            ("task_spread", 0.0, 1.0),
            ("chars_per_token", 1.0, 100.0),
            ("prompts_per_task", 1, 10**6),
            ("prompt_tokens", 1, 10**6),
            ("seed", 0, 2**63),
        ):
            value = getattr(self, name)
            whole = isinstance(low, int)
            if not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
                allowed = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}"
                raise UserError(f"exits.parameters.{name}", value, allowed, "choose one in this range")
        if self.drafted is not None and not (isinstance(self.drafted, int | float) and 0 <= self.drafted <= 1):
            raise UserError("exits.parameters.drafted", self.drafted, "null or a share from 0 to 1", "correct it")


def published_trace(model: str, **parameters: Any) -> ExitTrace:
    """The trace of one OPT model; the keywords are the fields of PublishedParameters.

    With the same parameters, both models' traces cover the same text, token by token. UserError for an unknown
    parameter, or a value out of range.
    """
    known = [f.name for f in fields(PublishedParameters)]
    for name in parameters:
        if name not in known:
            key = f"exits.parameters.{name}"
            raise UserError(key, parameters[name], f"parameters are {', '.join(known)}", "use one of these")
    return dict(zip(EXIT_SHARES, published_pair(PublishedParameters(**parameters)), strict=True))[model]


@lru_cache(maxsize=4)
def published_pair(parameters: PublishedParameters) -> tuple[ExitTrace, ExitTrace]:
    """Traces of OPT-1.3B and OPT-6.7B over the same 5 x prompts_per_task x prompt_tokens tokens.

    The tokens line up one to one, because all OPT models share a tokenizer. Exits do not depend on `unchanged` or
    `confident_agreement`, and the two models' agreements are drawn independently.
    """
    latents, *agreements = (np.random.default_rng(s) for s in np.random.SeedSequence(parameters.seed).spawn(3))
    fitted = fit(parameters)
    n_prompts = len(TASKS) * parameters.prompts_per_task
    hardness = latent_paths(fitted, n_prompts, parameters.prompt_tokens, latents)
    hardness += np.repeat(fitted.task_shift, parameters.prompts_per_task)[None, :, None]
    n_tokens = n_prompts * parameters.prompt_tokens
    prompt = np.repeat(np.arange(n_prompts, dtype=np.int32), parameters.prompt_tokens)
    ends = np.floor(np.arange(n_tokens + 1) * parameters.chars_per_token + 1e-9).astype(np.int64)
    traces = []
    for row, (model, shares) in enumerate(EXIT_SHARES.items()):
        confident = hardness[row].reshape(n_tokens, 1) <= np.asarray(fitted.cuts[row])
        unchanged = (parameters.unchanged, UNCHANGED_OPT_6_7B)[row]
        rate = np.where(confident, parameters.confident_agreement, unchanged)
        agree = agreements[row].random(n_tokens)[:, None] < rate
        drafters = {}
        if parameters.drafted is not None and model == LARGER:
            drafters[SMALLER] = np.random.default_rng((parameters.seed, 1)).random(n_tokens) < parameters.drafted
        traces.append(
            ExitTrace(
                model=model,
                exits=tuple(shares),
                tasks=TASKS,
                task=prompt // np.int32(parameters.prompts_per_task),
                prompt=prompt,
                chars=np.diff(ends).astype(np.int32),
                agree=_with_last_true(agree),
                provenance=_provenance(model, parameters, fitted),
                confident=_with_last_true(confident),
                published_threshold=THRESHOLD,
                published_confidence=Confidence.MAX_PROBABILITY,
                drafters=drafters,
            )
        )
    return traces[0], traces[1]


def fit(parameters: PublishedParameters) -> Fit:
    """The latent process that gives the published shares; UserError if there is none."""
    if (parameters.jointly_early, parameters.near_last_five, parameters.task_spread) == _AS_PUBLISHED:
        return _PUBLISHED
    return fit_latent(
        exit_shares=[list(shares.values()) for shares in EXIT_SHARES.values()],
        jointly_early=parameters.jointly_early,
        near_last_five=parameters.near_last_five,
        n_tasks=len(TASKS),
        task_spread=parameters.task_spread,
    )


def _with_last_true(flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Adds the last exit, where every token leaves and agrees with itself."""
    return np.concatenate((flags, np.ones((len(flags), 1), dtype=bool)), axis=1)


def _provenance(model: str, parameters: PublishedParameters, fitted: Fit) -> Provenance:
    chosen = {name: value for name, value in asdict(parameters).items() if value is not None}
    arguments = ", ".join(f"{name}={value!r}" for name, value in chosen.items())

    def assume(name: str, why: str) -> Assumption:
        return Assumption(f"{model} exits: {name}", chosen[name], why, f"exits.parameters.{name}")

    assumptions = [
        assume(
            "confident_agreement",
            "not published; 1 is the premise of early exit, that a confident token is right, and flatters quality",
        ),
        assume("jointly_early", f"published, but at odds with the published {LATE_HELPED} of late tokens helped"),
        assume("near_last_five", "published for Llama-2-7B with 32 exits; carried over as a correlation"),
        assume("task_spread", "exit shares by task are not published; 0 makes all tasks alike"),
        assume(
            "chars_per_token",
            "usual for English text and this kind of tokenizer, as in the profiles; not measured here",
        ),
        assume("prompt_tokens", "length over which hardness is correlated; not published"),
        Assumption(
            f"{model} exits: threshold",
            THRESHOLD,
            "formula and value are not published: a label only",
            "not changeable",
        ),
    ]
    if model == "opt-1.3b":
        assumptions.insert(0, assume("unchanged", "not published for OPT-1.3B; sweep 0.70 to 0.95"))
    elif parameters.drafted is not None:
        assumptions.insert(0, assume("drafted", "how many drafts of OPT-1.3B are accepted is not published"))
    return Provenance(
        provenance_class=ProvenanceClass.PUBLISHED,
        source="drawn to fit HELIOS (arXiv 2504.10724, reading notes) and SpecEE (arXiv 2504.08850)",
        command=f"helios_sim.exits.published.published_trace({model!r}, {arguments})",
        assumptions=tuple(assumptions),
        details={
            "fit": fitted.to_json(),
            "late_tokens_helped": {
                "published": LATE_HELPED,
                "fitted": False,
                "here_of_tokens_past_layer_6": fitted.late_helped,
                "here_of_tokens_past_layer_12": fitted.last_helped,
            },
        },
    )


@dataclass(frozen=True, slots=True)
class Fit:
    """The fitted latent process. The hardness of a token for a model is task_shift + Z, with Z standard normal.

    Along a prompt Z is AR(1) with `lag_correlation`; between the models Z is correlated by `cross_correlation`.
    """

    cuts: tuple[tuple[float, ...], ...]  # by model and exit but the last; a token leaves there if hardness <= cut
    cross_correlation: float
    lag_correlation: float
    task_shift: tuple[float, ...]  # mean hardness by task
    late_helped: float  # share of tokens past the first model's first exit that leave at the second model's first
    last_helped: float  # share of tokens at the first model's last exit that leave at the second model's first

    def to_json(self) -> dict[str, Any]:
        """JSON values: lists for tuples, so that a provenance read back equals the one written."""
        return {
            "cuts": [list(cuts) for cuts in self.cuts],
            "cross_correlation": self.cross_correlation,
            "lag_correlation": self.lag_correlation,
            "task_shift": list(self.task_shift),
        }


# The result of `fit_latent` for the default parameters, kept here since SciPy takes 0.15 s to import.
_AS_PUBLISHED = 0.92, 0.70, 0.0  # jointly_early, near_last_five, task_spread
_PUBLISHED = Fit(
    cuts=((0.643345405, 0.806421247), (0.738846849,)),
    cross_correlation=0.195489176,
    lag_correlation=0.821155759,
    task_shift=(0.0, 0.0, 0.0, 0.0, 0.0),
    late_helped=0.6923076921884467,
    last_helped=0.6836195751340717,
)


def fit_latent(
    exit_shares: Sequence[Sequence[float]],
    jointly_early: float,
    near_last_five: float,
    n_tasks: int,
    task_spread: float,
) -> Fit:
    """Fits the process of two models to these shares of tokens by exit, over equally frequent tasks.

    `jointly_early` is the share of tokens that leave at the first exit of at least one model, `near_last_five` as in
    `near_share`. UserError if one of them cannot be reached.
    """
    shift = _task_shift(n_tasks, task_spread)
    cuts = tuple(tuple(_cut(below, shift) for below in np.cumsum(shares)[:-1]) for shares in exit_shares)
    first_cut, second_cut = cuts[0][0], cuts[1][0]

    def missed(cross_correlation: float, cut: float = first_cut) -> float:
        return both_above(cut - shift, second_cut - shift, cross_correlation)

    cross = _solve(lambda r: 1 - missed(r) - jointly_early, "jointly_early", jointly_early, (-0.999, 0.999))
    lag = _solve(lambda r: near_share(r) - near_last_five, "near_last_five", near_last_five, (0.0, 0.99))
    late, last = 1 - exit_shares[0][0], exit_shares[0][-1]
    return Fit(
        cuts=cuts,
        cross_correlation=cross,
        lag_correlation=lag,
        task_shift=tuple(shift.tolist()),
        late_helped=1 - missed(cross) / late,
        last_helped=1 - missed(cross, cuts[0][-1]) / last,
    )


def both_above(first_cut: Floats, second_cut: Floats, correlation: float) -> float:
    """P(X > first_cut, Y > second_cut) of standard normals, averaged over the cuts, shape (K,) each.

    Integrates phi(x) P(Y > second_cut | x) from first_cut to first_cut + 12 by Gauss-Legendre.
    """
    from scipy.special import ndtr

    node, weight = _nodes()
    x = first_cut[:, None] + 6 * (node + 1)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    tail = ndtr((correlation * x - second_cut[:, None]) / np.sqrt(1 - correlation**2))
    return float(np.mean(6 * (density * tail) @ weight))


@lru_cache(maxsize=1)
def _nodes() -> tuple[Floats, Floats]:
    """Nodes and weights of Gauss-Legendre integration on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(120)
    return nodes, weights


def near_share(lag_correlation: float, bins_per_exit: int = 8) -> float:
    """Share of tokens that exit within NEAR_LAYERS of one of the last LOOK_BACK_TOKENS exits.

    There are 32 equally likely exits, driven by a Gaussian AR(1) process. Its state is cut into equally likely bins,
    each represented by its median. The chain is reversible, so the past of a token is walked like a future that avoids
    the layers near the token's exit.
    """
    from scipy.special import ndtr, ndtri

    n_bins = REFERENCE_EXITS * bins_per_exit
    edges = ndtri(np.arange(n_bins + 1) / n_bins)
    median = ndtri((np.arange(n_bins) + 0.5) / n_bins)
    reach = ndtr((edges[None, :] - lag_correlation * median[:, None]) / np.sqrt(1 - lag_correlation**2))
    step = np.diff(reach, axis=1)  # (n_bins, n_bins) from, to
    layer = np.arange(n_bins) // bins_per_exit
    far = np.abs(layer[:, None] - np.arange(REFERENCE_EXITS)[None, :]) > NEAR_LAYERS  # (bins, own exit)
    avoided = np.ones(far.shape)
    for _ in range(LOOK_BACK_TOKENS):
        avoided = step @ (far * avoided)
    return float(1 - avoided[np.arange(n_bins), layer].mean())


def latent_paths(fit: Fit, n_prompts: int, prompt_tokens: int, rng: np.random.Generator) -> Floats:
    """Draws Z for both models, (2, n_prompts, prompt_tokens); each prompt starts anew from the stationary state."""
    noise = rng.standard_normal((2, prompt_tokens, n_prompts))
    noise[1] = fit.cross_correlation * noise[0] + np.sqrt(1 - fit.cross_correlation**2) * noise[1]
    innovation = np.sqrt(1 - fit.lag_correlation**2)
    for t in range(1, prompt_tokens):
        noise[:, t] = fit.lag_correlation * noise[:, t - 1] + innovation * noise[:, t]
    return np.ascontiguousarray(noise.transpose(0, 2, 1))


def _task_shift(n_tasks: int, task_spread: float) -> Floats:
    """Mean hardness of each task: evenly spaced, mean 0, standard deviation `task_spread`, the first the easiest."""
    scores = np.arange(n_tasks) - (n_tasks - 1) / 2
    return task_spread * scores / (scores.std() or 1.0) + 0.0  # no minus zero


def _cut(below: float, shift: Floats) -> float:
    """The hardness below which this share of tokens lies, over all tasks."""
    from scipy.special import ndtr

    return _root(lambda cut: float(ndtr(cut - shift).mean()) - below, -40, 40)


def _solve(excess: Callable[[float], float], name: str, value: float, bracket: tuple[float, float]) -> float:
    low, high = (excess(end) + value for end in bracket)
    if not min(low, high) <= value <= max(low, high):
        raise UserError(
            f"exits.parameters.{name}",
            value,
            f"with these exit shares, from {min(low, high):.3f} to {max(low, high):.3f}",
            "choose one in this range",
        )
    return _root(excess, *bracket) if low < high else _root(lambda x: -excess(x), *bracket)


def _root(increasing: Callable[[float], float], low: float, high: float) -> float:
    """The root of the function, to `_DIGITS` decimals, by bisection over steps of 1e-12.

    scipy.optimize is not used, since importing it takes longer than solving everything here.
    """
    step = 1e-12
    steps = range(round(low / step), round(high / step))
    return round(steps[bisect(steps, 0.0, key=lambda at: increasing(at * step))] * step, _DIGITS)
