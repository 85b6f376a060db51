"""What the simulator computes, frozen as digests, so that its inside can be rewritten without a change of results.

Three kinds of results are compared with recorded ones (`data/*.json`):

- `serving`: 500 random runs of the serving loop, over everything that a run can hold (`serving_cases.choose_case`);
  each has digests of its request records, its decisions, its statistics and of what its policies were told.
- `prices`: 10,000 random iterations of every shipped profile and of a few made-up ones with every optional term: their
  time, their floor and whether they lie beyond the measured grid.
- `experiments`: every experiment in `conf/experiment` that needs no model, no device and no optional package, with few
  requests: rows of requests.parquet and decisions.parquet, and the figures of summary.json.

A plain test run compares a part of them, `pytest -m exhaustive tests/digests` all. A digest says that something
changed, not what: to look at one case, run `digests.serving.run_case(seed)` (or `digests.prices.compositions`, or the
experiment) before and after the change.

Where a change of results is meant, record anew and commit the data together with the change, and give the reason in
CHANGELOG.md under "Intended differences":

    cd tests && python -m digests.record                    # all; or one of serving, prices, experiments

Times, counts and prices are compared to the last bit, other figures (means, percentiles, evidence of decisions) to ten
significant digits, because NumPy's functions may round differently on another CPU. Digests were recorded with the
packages of requirements/ on x86-64.
"""
