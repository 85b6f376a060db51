"""Command that shows the costs of models on cards.

- `python -m helios_sim.profile list`: cards and models of the catalogue.
- `python -m helios_sim.profile show MODEL HARDWARE`: bytes, times and their sources, for any names that a study takes.
- `python -m helios_sim.profile check MODEL HARDWARE`: each price beside the floor that no kernel can beat, and how far
  off kernels are that are left out of the card's tables; with `out=FILE.png` as a picture too.
  Both take `quantization=NAME` and `kv_cache_dtype=NAME`, as `server` has them in a study.
- `python -m helios_sim.profile build ...`: a profile from tables of one's own; see `build`.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from helios_sim import files
from helios_sim.entry import run
from helios_sim.errors import UserError
from helios_sim.profile import build
from helios_sim.profile.catalog import CARDS, HARDWARE, MODELS, SHAPES, card_key
from helios_sim.profile.check import UTILISATION, decodes, price_and_floor, prompt, prompts_that_fit
from helios_sim.profile.devices import group_of
from helios_sim.profile.formats import FORMATS
from helios_sim.profile.held_out import PARTS, attention, products
from helios_sim.profile.importers.kernel_tables import SHIPPED_SOURCES
from helios_sim.profile.precision import Precision, in_words
from helios_sim.profile.profile import MemoryBudget, Profile
from helios_sim.profile.resolve import SHAPE_FROM, find_profile
from helios_sim.profile.shapes import shape_of
from helios_sim.profile.store import known_profiles

USAGE = "list | show MODEL HARDWARE | check MODEL HARDWARE [out=FILE.png] | build key=value ..."
PRECISION = ("quantization", "kv_cache_dtype")
BATCHES = (1, 8, 32, 128, 256)
PROMPTS = (128, 512, 2048, 8192)
CONTEXT_TOKENS = 1024
PICTURE = "out"


def main(arguments: Sequence[str]) -> int:
    """Return the exit status."""
    return run("helios_sim.profile", _run, arguments)


def _run(arguments: Sequence[str]) -> int:
    command, *rest = arguments or [""]
    if command in ("--help", "-h", "help"):
        print(__doc__)
        return 0
    if command == "build":
        return build.main(rest)
    if command == "list" and not rest:
        listed()
    elif command in ("show", "check") and len(rest) >= 2:
        words = [word for word in rest[2:] if command != "check" or not word.startswith(f"{PICTURE}=")]
        picture = _picture([word for word in rest[2:] if word not in words])
        profile = find_profile(rest[0], rest[1], precision=_precision(words))
        if command == "check":
            status = checked(profile)
            if picture is not None:
                drawn(profile, picture)
            return status
        shown(profile)
    else:
        raise UserError("arguments", " ".join(arguments), USAGE, "write one of these")
    return 0


def _precision(words: Sequence[str]) -> Precision:
    """The precision that the words after model and hardware ask for. Raises UserError for any other word."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        name = key.removeprefix("server.")
        if not equals or name not in PRECISION or name in found:
            allowed = f"{' and '.join(f'{key}=NAME' for key in PRECISION)}, each once"
            raise UserError("arguments", word, allowed, "write one of these after the hardware")
        found[name] = value
    return Precision(**found)


def _picture(words: Sequence[str]) -> Path | None:
    """The file for the picture, if one is asked for. Raises UserError if it is no picture or more than one."""
    if not words:
        return None
    path = Path(words[0].partition("=")[2]).expanduser()
    if len(words) > 1 or path.suffix.lower() != ".png":
        raise UserError("arguments", " ".join(words), f"{PICTURE}=FILE.png, once", "name one file that ends in .png")
    return path


def listed() -> None:
    """Print cards and models, with the sources of their prices."""
    rates = f"{'TFLOPS':>6} {'fp8':>5} {'int8':>4} {'fp4':>5}"
    print(f"{'card':<12} {'GiB':>4} {'GB/s':>5} {rates} {'TDP W':>5}  times from")
    for name, card in CARDS.items():
        source = SHIPPED_SOURCES.get(name)
        kernels = "data sheet" if source is None else f"kernels, vLLM {source.version}"
        watts = "" if card.tdp_w is None else f"{card.tdp_w:.0f}"
        memory, bandwidth = card.total_bytes / 2**30, card.bytes_per_s / 1e9
        rates = f"{_tera(card.flops_per_s):>6} {_tera(card.fp8_flops_per_s):>5} {_tera(card.int8_flops_per_s):>4}"
        rates += f" {_tera(card.fp4_flops_per_s):>5}"
        print(f"{name:<12} {memory:>4.0f} {bandwidth:>5.0f} {rates} {watts:>5}  {kernels}")
    print()
    _say("TFLOPS of bf16, fp8, int8 (TOPS) and fp4, dense. Without units, weights are made bf16 in the kernel.")
    bytes_of = {form: form.matrix_bytes(4096, 4096) / 4096**2 for form in FORMATS.values()}
    formats = "; ".join(f"{form.text} ({each:.3f} bytes a weight)" for form, each in bytes_of.items())
    _say(f"weights besides bf16, by server.quantization: {formats}")
    _say("K and V in fp8: server.kv_cache_dtype=fp8, on cards with units for fp8.")
    known = [*HARDWARE, *(name for name, card in CARDS.items() if card.idle_w is not None)]
    _say(f"{', '.join(known)}: with their idle power, which energy needs.")
    _say("A group that runs a model together: 4xh100. A card of your own: the path of a card.yaml (README).")
    print()
    print(f"{'model':<18} {'parameters':>10} {'layers':>6} {'context':>9} {'K and V of a token':>20}")
    for name in sorted({*SHAPES, *MODELS}):
        model = shape_of(name).model
        values, kv = model.weight_bytes(model.n_layers) / 2e9, model.n_layers * model.kv_bytes_per_token_layer
        print(f"{name:<18} {values:>8.2f} B {model.n_layers:>6} {model.max_context_tokens:>9,} {kv / 1024:>16.0f} KiB")
    print()
    _say(f"profiles that are shipped: {', '.join(known_profiles())}")


def shown(profile: Profile) -> None:
    """Print a profile: memory, times and their sources."""
    model, card, layers = profile.model, profile.hardware, profile.model.n_layers
    weights, kv = profile.weight_bytes(layers), profile.kv_bytes_per_token(layers)
    budget = MemoryBudget(card.hbm_bytes, UTILISATION)
    free = budget.pool_bytes([(profile, layers)])
    print(f"{model.name} on {card.name}: {layers} layers, {weights / 1e9:.1f} GB of weights")
    print(f"  precision              {in_words(model)}")
    print(f"  K and V of a token     {kv / 1024:.0f} KiB")
    print(f"  memory of the hardware {card.hbm_bytes / 1e9:.1f} GB, of which {UTILISATION:.0%} are used")
    print(f"  activations, set aside {profile.activation_reserve_bytes / 1e9:.1f} GB")
    fits = f"{free / 1e9:.1f} GB, {free // kv:,} tokens" if free > 0 else f"none: {-free / 1e9:.1f} GB too little"
    print(f"  left for K and V       {fits}")
    print(f"  load from the host     {profile.load_time_s(weights):.1f} s\n")
    times_s = profile.iteration_time_s(decodes(profile, BATCHES, CONTEXT_TOKENS))
    print(f"an iteration of decodes at {CONTEXT_TOKENS} tokens of context")
    for batch, time_s in zip(BATCHES, times_s, strict=True):
        print(f"  {batch:>5} running   {time_s * 1e3:>9.2f} ms   {batch / time_s:>9,.0f} tokens/s")
    print("a prompt on its own")
    for tokens in prompts_that_fit(profile, PROMPTS):
        time_s = float(profile.iteration_time_s(prompt(profile, tokens))[0])
        print(f"  {tokens:>5} tokens    {time_s * 1e3:>9.2f} ms   {tokens / time_s:>9,.0f} tokens/s")
    provenance = profile.provenance
    print()
    _say(f"{provenance.provenance_class.value}: {provenance.source}")
    if SHAPE_FROM in provenance.details:
        _say(f"  shape: {provenance.details[SHAPE_FROM]}")
    for text in provenance.scaled:
        _say(f"  scaled: {text}")
    for item in provenance.assumptions:
        if item.value is not None:
            value = f"{item.value:.6g}" if isinstance(item.value, float) else item.value
            _say(f"  assumed: {item.name} = {value} ({item.why})")
        else:
            _say(f"  assumed: no {item.name} ({item.why})")


def _tera(per_s: float | None) -> str:
    return "" if per_s is None else f"{per_s / 1e12:.0f}"


def _say(text: str) -> None:
    """Print text wrapped to the width of the terminal."""
    width = max(40, shutil.get_terminal_size((120, 24)).columns)
    print(textwrap.fill(text, width, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False))


def checked(profile: Profile) -> int:
    """Print prices beside floors. Returns 1 if a price is below its floor, which no card can reach."""
    batches = [(f"batch of {batch}", decodes(profile, (batch,), CONTEXT_TOKENS)) for batch in BATCHES]
    prompts = [(f"{tokens} prompt tokens", prompt(profile, tokens)) for tokens in prompts_that_fit(profile, PROMPTS)]
    print(f"{profile.name}: {in_words(profile.model)}")
    print(f"{'iteration':<20} {'price ms':>10} {'floor ms':>10} {'share':>7}")
    below = 0
    for name, composition in (*batches, *prompts):
        (price_s,), (floor_s,) = price_and_floor(profile, [composition])
        below += price_s < floor_s
        print(f"{name:<20} {price_s * 1e3:>10.2f} {floor_s * 1e3:>10.2f} {floor_s / price_s:>7.0%}")
    print("every price is above its floor" if not below else f"{below} prices are below their floors")
    left_out(profile)
    return 1 if below else 0


def left_out(profile: Profile) -> None:
    """Print by how much prices miss kernels that are left out of the card's tables, if there are any."""
    key = card_key(group_of(profile.hardware.name)[1])
    source = None if key is None else SHIPPED_SOURCES.get(key)
    if source is None:
        return
    found = [f"{np.median(np.abs(ratio - 1)):.1%}" for ratio in (*products(source), *attention(source))]
    of_products, of_attention = " and ".join(found[:2]), " and ".join(found[2:])
    _say(
        f"One row in {PARTS} of the tables measured on {source.card.name}, priced from the others, is off by "
        f"(medians of decodes and prompts) {of_products} for products in bf16, {of_attention} for attention."
    )


def drawn(profile: Profile, path: Path) -> None:
    """Write the prices and their floors as a picture. Raises UserError if the file cannot be written."""
    from helios_sim.report.figures.prices import price_drawing
    from helios_sim.report.figures.style import to_png

    drawing = price_drawing(profile)
    files.write_bytes(path, to_png(drawing))
    _say(f"{path}: {drawing.caption}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
