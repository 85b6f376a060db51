"""The operating point of a server under a load, from prices alone: what a policy predicts for each candidate.

`policy/prediction.py:predict` describes the model. Inputs and outputs are in two arrays, indexed by the names below,
since policies ask for them very often.
"""

from __future__ import annotations

from helios_sim.core.layout import Numbers, Table
from helios_sim.core.price import FLOOR, OUTSIDE, TIME, PriceTables, price_many, price_one

POINT = 3  # in `asked`: an operating point is wanted, not TIME, FLOOR or OUTSIDE of many iterations
LEAST_S = 1e-9  # shortest iteration: even a free one takes one step of the clock, as in the serving loop
# Whole numbers. Inputs: tokens of the prompt, cached tokens of the prompt, token budget, first and last batch size, and
# whether decodes are to be priced (else their times are given). Outputs: the batch, and whether it keeps up.
PROMPT, CACHED, BUDGET, FIRST, LAST, PRICED, AT, KEEPS_UP = range(8)
# Real numbers. Inputs: mean context tokens, output tokens after the first, arrivals per second. Outputs: seconds of the
# prompt and their floor, requests per second at that batch and at most, seconds of a decode iteration and their floor.
CONTEXT, FURTHER, ARRIVALS, PREFILL, PREFILL_FLOOR, RATE, MOST_RATE, DECODE, DECODE_FLOOR = range(9)


def operating_point(
    t: PriceTables,
    scalar_table: Table,
    iterations: Table,
    spans: Table,
    class_layers: Numbers,
    work: Table,
    chunks: Table,
    asked: Numbers,
    found: Numbers,
    whole: Numbers,
    means: Numbers,
) -> int:
    """Price a prompt on its own, in chunks of the token budget, and find the least batch that keeps up with arrivals.

    If no batch keeps up, the last one is taken. B requests that decode together at d(B) seconds an iteration are served
    at 1 / (prompt + further tokens x d(B) / B) requests per second. Everything runs in one band. `found` (batches, 3)
    receives the times of each batch, or holds them already if they are not to be priced. Returns the number of batches.
    """
    it, w, chunk = iterations[0], work[0], chunks[0]
    prompt, context, priced = whole[PROMPT], whole[CACHED], whole[PRICED]
    prefill_s = prefill_floor_s = 0.0
    asked[TIME] = asked[FLOOR] = 1
    asked[OUTSIDE] = 0
    last = len(found) - 1
    it.chunks, w.decode_tokens, w.kv_tokens = 1, 0, 0
    while context < prompt:
        tokens = min(whole[BUDGET], prompt - context)
        chunk.tokens, chunk.context_tokens = tokens, context
        context += tokens
        it.sampled_tokens = 1 if context == prompt else 0
        price_one(t, scalar_table, iterations, spans, class_layers, work, chunks, asked, found, last)
        prefill_s += max(found[last, TIME], LEAST_S)
        prefill_floor_s += found[last, FLOOR]
    means[PREFILL], means[PREFILL_FLOOR] = prefill_s, prefill_floor_s
    it.chunks, asked[FLOOR] = 0, 0
    first, at, keeps_up, most = whole[FIRST], whole[LAST], 0, 0.0
    for batch in range(first, whole[LAST] + 1):
        if priced:
            it.sampled_tokens = w.decode_tokens = batch
            w.kv_tokens = round(batch * means[CONTEXT])
            price_one(t, scalar_table, iterations, spans, class_layers, work, chunks, asked, found, batch - first)
            found[batch - first, TIME] = max(found[batch - first, TIME], LEAST_S)
        rate = 1.0 / (prefill_s + means[FURTHER] * found[batch - first, TIME] / batch)
        if rate > most:
            most = rate
        if keeps_up == 0 and rate >= means[ARRIVALS]:
            at, keeps_up = batch, 1
        if batch == at:
            means[RATE], means[DECODE] = rate, found[batch - first, TIME]
    whole[AT], whole[KEEPS_UP], means[MOST_RATE] = at, keeps_up, most
    if priced and at >= first:
        it.sampled_tokens = w.decode_tokens = at
        w.kv_tokens = round(at * means[CONTEXT])
        asked[TIME], asked[FLOOR] = 0, 1
        price_one(t, scalar_table, iterations, spans, class_layers, work, chunks, asked, found, last)
        means[DECODE_FLOOR] = found[last, FLOOR]
    return whole[LAST] + 1 - first


def estimate(
    t: PriceTables,
    scalar_table: Table,
    iterations: Table,
    spans: Table,
    class_layers: Numbers,
    work: Table,
    chunks: Table,
    counts: Numbers,
    asked: Numbers,
    found: Numbers,
    whole: Numbers,
    means: Numbers,
) -> int:
    """Run `operating_point` if POINT is asked for, else `price_many`. One entry point: both are compiled together."""
    if asked[POINT]:
        return operating_point(
            t, scalar_table, iterations, spans, class_layers, work, chunks, asked, found, whole, means
        )
    return price_many(t, scalar_table, iterations, spans, class_layers, work, chunks, counts, asked, found)
