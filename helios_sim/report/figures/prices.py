"""The figure of a profile's prices beside their floors, over batch and over prompt length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from helios_sim.profile.check import UTILISATION, decodes, price_and_floor, prompt, prompts_that_fit, tokens_that_fit
from helios_sim.profile.precision import in_words
from helios_sim.profile.profile import Profile
from helios_sim.report.figures.style import (
    BASELINE_COLOR,
    MODEL_COLORS,
    Drawing,
    handles_of,
    legend_above,
    look,
    new_figure,
    use_log_seconds,
)

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (256, 1024, 4096, 16_384)
_PALE = 0.3  # opacity of what does not fit
PROMPTS = tuple(2**power for power in range(5, 15))


def price_drawing(profile: Profile) -> Drawing:
    """A figure of prices: milliseconds of an iteration above, the floor's share of them below; decodes on the left."""
    with look():
        figure, (batch_ms, prompt_ms, batch_share, prompt_share) = new_figure(
            2, 2, 6.2, sharex="col", height_ratios=[3, 2]
        )
        room = tokens_that_fit(profile)
        for context, color in zip(prompts_that_fit(profile, CONTEXTS), MODEL_COLORS, strict=False):
            price_s, floor_s = price_and_floor(profile, [decodes(profile, BATCHES, context)])
            fits = np.array(BATCHES) * context <= room
            label = f"{context:,} tokens of context"
            _lines(batch_ms, batch_share, BATCHES, price_s, floor_s, fits, color, label)
        lengths = prompts_that_fit(profile, PROMPTS)
        price_s, floor_s = price_and_floor(profile, [prompt(profile, tokens) for tokens in lengths])
        fits = np.array(lengths) <= room
        _lines(prompt_ms, prompt_share, lengths, price_s, floor_s, fits, MODEL_COLORS[-1], None)
        for ax, title in ((batch_ms, "A batch of decodes"), (prompt_ms, "A prompt on its own")):
            use_log_seconds(ax, y=True)
            ax.set_title(title)
        batch_ms.set_ylabel("time of an iteration")
        batch_share.set_ylabel("floor / price")
        for ax, sizes, label in (
            (batch_share, BATCHES, "requests in the batch"), (prompt_share, lengths, "tokens of the prompt"),
        ):  # fmt: skip
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_locator(FixedLocator(list(sizes[:: 1 if len(sizes) < 8 else 2])))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            ax.set_ylim(0, 1.05)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            ax.set_xlabel(label)
        batch_ms.plot([], [], color=BASELINE_COLOR, linewidth=1.3, linestyle="--", label="floor")
        batch_ms.plot([], [], color=BASELINE_COLOR, alpha=_PALE, marker="o", label="pale: beyond the memory")
        legend_above(figure, handles_of(batch_ms, prompt_ms))
    caption = (
        "Solid: what an iteration costs; dashed: the floor that no kernel on the card can beat. Pale: K and V do not "
        f"fit into {UTILISATION:.0%} of the memory."
    )
    return Drawing("prices", f"{profile.name}: price and floor, {in_words(profile.model)}", caption, figure)


def _lines(
    above: Axes, below: Axes, sizes: Sequence[int], price_s: NDArray[np.float64], floor_s: NDArray[np.float64],
    fits: NDArray[np.bool_], color: str, label: str | None,
) -> None:  # fmt: skip
    """Price and floor above and their ratio below; pale throughout, and strong over what fits into the memory."""
    for strong in (False, True):
        shown = fits if strong else np.ones(len(sizes), bool)
        x, alpha = np.array(sizes)[shown], 1.0 if strong else _PALE
        above.plot(x, price_s[shown], color=color, alpha=alpha, marker="o", label=label if strong else None)
        above.plot(x, floor_s[shown], color=color, alpha=alpha, linewidth=1.3, linestyle="--")
        below.plot(x, (floor_s / price_s)[shown], color=color, alpha=alpha, marker="o")
