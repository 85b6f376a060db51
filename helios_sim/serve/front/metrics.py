"""Metrics for Prometheus, under vLLM's names and ours. Times are in seconds of the engine's clock.

Times to the first token, between tokens and to the last token are as clients see them: measured in the front by the
wall clock, and multiplied by the speedup of the engine's clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from helios_sim.request import NS_PER_S, RequestRecord, Status
from helios_sim.serve.messages import State, Switched, Tokens

# Buckets of vLLM (vllm/v1/metrics/loggers.py).
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
           160.0, 640.0, 2560.0)  # fmt: skip
_GAP_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
              960.0, 1920.0, 7680.0)  # fmt: skip
LEFT = "the client left"  # the reason given when such a request is aborted
_LABELS = ("model_name", "engine")
_LATEST = 4096  # latest requests that are kept to show their times on the page
_TOKENS_OVER_S = 5.0


class Metrics:
    """Metrics of all replicas. `layers`: of each candidate. `speedup`: of the engine's clock over the wall clock."""

    def __init__(self, layers: Mapping[str, int], context_tokens: int, speedup: float) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._speedup, self._layers = speedup, dict(layers)
        sizes = _one_two_five(context_tokens)

        def gauge(name: str, about: str, labels: Sequence[str] = _LABELS) -> Gauge:
            return Gauge(name, about, labels, registry=self.registry)

        def counter(name: str, about: str, labels: Sequence[str] = _LABELS) -> Counter:
            return Counter(name, about, labels, registry=self.registry)

        def histogram(name: str, about: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, about, _LABELS, registry=self.registry, buckets=buckets)

        self._running = gauge("vllm:num_requests_running", "Requests in the batch.")
        self._waiting = gauge("vllm:num_requests_waiting", "Requests that wait.")
        self._kv = gauge("vllm:kv_cache_usage_perc", "KV blocks in use, 1 is all.")
        self._sleeping = gauge("vllm:engine_sleep_state", "1: the weights are not in memory.", ("engine",))
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that began.")
        self._generated = counter("vllm:generation_tokens", "Tokens produced.")
        self._success = counter("vllm:request_success", "Requests answered.", (*_LABELS, "finished_reason"))
        self._preemptions = counter("vllm:num_preemptions", "Requests that lost their place.")
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked for in the prefix cache.")
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens found there.")
        self._ttft = histogram("vllm:time_to_first_token_seconds", "From a request to its first token.", _TTFT_S)
        self._gap = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", _GAP_S)
        self._tpot = histogram("vllm:request_time_per_output_token_seconds", "Mean of a request.", _GAP_S)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "From a request to its last token.", _REQUEST_S)
        self._queue = histogram("vllm:request_queue_time_seconds", "Until it first ran.", _REQUEST_S)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From then to the first token.", _REQUEST_S)
        self._decode = histogram("vllm:request_decode_time_seconds", "From there to the last token.", _REQUEST_S)
        self._prompt_size = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", sizes)
        self._answer_size = histogram("vllm:request_generation_tokens", "Tokens of an answer.", sizes)
        self._iteration = histogram("vllm:iteration_tokens_total", "Tokens that an iteration computes.",
                                    (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384))  # fmt: skip
        self._loaded = gauge("helios:loaded_layers", "Layers in memory, by model.")
        self._breaches = counter("helios:breaches", "Tokens that left at the cap without confidence.")
        self._switches = counter("helios:switches", "Changes of model.", ("from", "to", "engine"))
        self._load_s = gauge("helios:load_seconds", "Time so far in which weights were on the way.", ("engine",))
        self._late = gauge("helios:clock_late_seconds", "How far the engine is behind the wall clock.", ())
        self._energy = counter("helios:energy_joules", "Energy since the server began.", ())
        self._depths = {
            model: Histogram(
                "helios:exit_layer", "Layers that a token ran.", ("engine",), registry=None,
                buckets=tuple(range(1, n_layers + 1)),
            )
            for model, n_layers in layers.items()
        }  # fmt: skip
        self.registry.register(_ByModel(self._depths))
        self.latest: deque[tuple[float, float, float | None]] = deque(maxlen=_LATEST)  # end (wall), TTFT, TPOT in s
        self._rate: deque[tuple[float, int]] = deque()  # wall time in s, and tokens of an iteration
        self.depths_seen: dict[str, dict[int, int]] = {model: {} for model in layers}

    def page(self) -> bytes:
        return generate_latest(self.registry)

    # --- Events -----------------------------------------------------------------------------------------------------

    def note_iteration(self, tokens: Tokens) -> None:
        model, engine, n = tokens.model, str(tokens.replica), len(tokens.tokens)
        self._generated.labels(model, engine).inc(n)
        self._iteration.labels(model, engine).observe(n + tokens.prompt_tokens)
        depths, seen = self._depths[model].labels(engine), self.depths_seen[model]
        breaches = 0
        for token in tokens.tokens:
            depths.observe(token.layers)
            seen[token.layers] = seen.get(token.layers, 0) + 1
            breaches += token.breach
        if breaches:
            self._breaches.labels(model, engine).inc(breaches)
        self._rate.append((monotonic(), n))

    def note_record(self, record: RequestRecord) -> None:
        """Notes a request that has left the engine."""
        labels = record.model, str(record.replica)
        if record.scheduled_ns is not None:
            self._prompt_tokens.labels(*labels).inc(record.prompt_tokens)
        if record.drop_reason == LEFT:
            self._success.labels(*labels, "abort").inc()
        if record.status is not Status.COMPLETED or record.first_token_ns is None:
            return
        assert record.scheduled_ns is not None and record.last_token_ns is not None  # noqa: PT018
        self._queue.labels(*labels).observe((record.scheduled_ns - record.arrival_ns) / NS_PER_S)
        self._prefill.labels(*labels).observe((record.first_token_ns - record.scheduled_ns) / NS_PER_S)
        self._decode.labels(*labels).observe((record.last_token_ns - record.first_token_ns) / NS_PER_S)
        self._prompt_size.labels(*labels).observe(record.prompt_tokens)
        self._answer_size.labels(*labels).observe(record.output_tokens)

    def note_state(self, state: State, before: State | None) -> None:
        old = {} if before is None else {replica.replica: replica for replica in before.replicas}
        for now in state.replicas:
            labels, then = (now.model, str(now.replica)), old.get(now.replica)
            if then is not None and then.model != now.model:
                for each in (self._running, self._waiting, self._kv):
                    each.labels(then.model, labels[1]).set(0)
            self._running.labels(*labels).set(now.running)
            self._waiting.labels(*labels).set(now.waiting)
            self._kv.labels(*labels).set(now.used_blocks / max(1, now.total_blocks))
            self._sleeping.labels(labels[1]).set(int(state.asleep))
            for model in self._layers:
                self._loaded.labels(model, labels[1]).set(0 if state.asleep else now.resident.get(model, 0))
            self._preemptions.labels(*labels).inc(now.preemptions - (then.preemptions if then else 0))
            self._queries.labels(*labels).inc(now.prefix_queries - (then.prefix_queries if then else 0))
            self._hits.labels(*labels).inc(now.prefix_hits - (then.prefix_hits if then else 0))
            self._load_s.labels(labels[1]).set(now.load_s)
        self._late.set(state.late_s)
        if state.energy_j is not None:
            known_j = before.energy_j if before is not None and before.energy_j is not None else 0.0
            self._energy.inc(max(0.0, state.energy_j - known_j))

    def note_switch(self, switched: Switched) -> None:
        self._switches.labels(switched.before, switched.now, str(switched.replica)).inc()

    def note_first(self, model: str, engine: int, wall_s: float) -> None:
        self._ttft.labels(model, str(engine)).observe(wall_s * self._speedup)

    def note_gap(self, model: str, engine: int, wall_s: float) -> None:
        self._gap.labels(model, str(engine)).observe(wall_s * self._speedup)

    def note_answered(
        self, model: str, engine: int, reason: str, ttft_s: float, e2e_s: float, tokens: int
    ) -> None:
        """Notes a complete answer. `ttft_s` and `e2e_s` are by the wall clock."""
        tpot_s = (e2e_s - ttft_s) * self._speedup / (tokens - 1) if tokens > 1 else None
        self._success.labels(model, str(engine), reason).inc()
        self._e2e.labels(model, str(engine)).observe(e2e_s * self._speedup)
        if tpot_s is not None:
            self._tpot.labels(model, str(engine)).observe(tpot_s)
        self.latest.append((monotonic(), ttft_s * self._speedup, tpot_s))

    # --- For the page -----------------------------------------------------------------------------------------------

    def tokens_per_s(self) -> float:
        """Output tokens per second of the engine's clock, over the last `_TOKENS_OVER_S` seconds of the wall clock."""
        now_s = monotonic()
        while self._rate and self._rate[0][0] < now_s - _TOKENS_OVER_S:
            self._rate.popleft()
        return sum(n for _, n in self._rate) / _TOKENS_OVER_S / self._speedup

    def recent(self, seconds: float = 180.0) -> dict[str, list[float]]:
        """TTFT and TPOT in s of requests that ended in the last `seconds` of the wall clock."""
        since_s = monotonic() - seconds
        latest = [one for one in self.latest if one[0] >= since_s]
        return {"ttft_s": [one[1] for one in latest], "tpot_s": [one[2] for one in latest if one[2] is not None]}


class _ByModel:
    """One metric with different buckets for each model, since models differ in their number of layers."""

    def __init__(self, histograms: Mapping[str, Histogram]) -> None:
        self._histograms = histograms

    def collect(self):  # type: ignore[no-untyped-def]  # the library's own types are private
        whole = None
        for model, histogram in self._histograms.items():
            for family in histogram.collect():
                if whole is None:
                    whole = type(family)(family.name, family.documentation, family.type)
                for sample in family.samples:
                    whole.samples.append(sample._replace(labels={"model_name": model, **sample.labels}))
        if whole is not None:
            yield whole


def _one_two_five(most: int) -> tuple[int, ...]:
    found: list[int] = []
    scale = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * scale > most:
                return tuple(found)
            found.append(mantissa * scale)
        scale *= 10
