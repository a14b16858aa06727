"""What happens in the server, for Prometheus, under vLLM's names with our prefix.

Everything is counted where the worker delivers it, so the sums are those of the responses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from layerskip.serve.worker import GoneError, LateError

if TYPE_CHECKING:
    from layerskip.decode.request import Round
    from layerskip.serve.worker import Job, Worker

PREFIX = "layerskip:"
FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
EACH = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
WHOLE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
POSITIONS = 32


class Metrics:
    """Count deliveries: `metrics(job, event)` is a worker's `watch`."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, about, ("model_name", *labels), registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(PREFIX + name, about, ("model_name",), buckets=buckets, registry=self.registry)
            return made.labels(model)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(PREFIX + name, about, ("model_name",), registry=self.registry).labels(model)

        self._model = model
        self.prompt = counter("prompt_tokens", "Prompt tokens of requests that got a row.").labels(model)
        self.made = counter("generation_tokens", "Tokens written.").labels(model)
        self.cached = counter("prefix_cache_hits", "Prompt tokens that a cache held already.").labels(model)
        self.asked = counter("prefix_cache_queries", "Prompt tokens looked up in caches.").labels(model)
        self.done = counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self.failed = counter("request_failure", "Requests that ended by an error, by kind.", "reason")
        self.drafts = counter("spec_decode_num_drafts", "Rounds that drafted, by source.", "source")
        self.drafted = counter("spec_decode_num_draft_tokens", "Tokens drafted, by source.", "source")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Drafts kept, by source.", "source")
        self.places = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Drafts kept, by place in their round.", "position"
        )
        self.queued = histogram("request_queue_time_seconds", "From arrival to a row.", FIRST)
        self.first = histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST)
        self.each = histogram("time_per_output_token_seconds", "Between tokens, over a request.", EACH)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", WHOLE)
        self.rounds = histogram("round_seconds", "Of one round of the engine, shared by its rows.", EACH)
        self.running = gauge("num_requests_running", "Requests that have a row.")
        self.suspended = gauge("num_requests_suspended", "Requests paused until their client reads on.")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for a row.")
        self.usage = gauge("kv_cache_usage_perc", "Share of the rows' slots that hold tokens, 0 to 1.")

    def observe(self, worker: Worker) -> None:
        """Read the gauges off a worker whenever they are asked for."""

        def used() -> float:
            cache = worker.engine.cache
            return sum(cache.lengths) / (len(cache.lengths) * cache.capacity)

        self.running.set_function(lambda: worker.running)
        self.suspended.set_function(lambda: worker.suspended)
        self.waiting.set_function(lambda: worker.waiting)
        self.usage.set_function(used)

    def __call__(self, job: Job, event: Round | Exception) -> None:
        if isinstance(event, Exception):
            kind = {GoneError: "cancelled", LateError: "timeout"}.get(type(event), "error")
            self.failed.labels(self._model, kind).inc()
            if job.started is None:
                return
        else:
            self._count(job, event)
            if not event.finish_reason:
                return
            self.done.labels(self._model, "stop" if event.finish_reason != "length" else "length").inc()
        assert job.ended is not None
        self.whole.observe(job.ended - job.submitted)

    def _count(self, job: Job, event: Round) -> None:
        self.made.inc(len(event.tokens))
        self.rounds.observe(event.step_s)
        if event.drafted:
            for counter, count in (
                (self.drafts, 1),
                (self.drafted, event.drafted),
                (self.accepted, event.accepted),
            ):
                counter.labels(self._model, event.source).inc(count)
            for place in range(min(event.accepted, POSITIONS)):
                self.places.labels(self._model, str(place)).inc()
        if event.source == "prefill" and event.tokens:
            prompt = len(job.request.prompt)
            self.prompt.inc(prompt)
            self.asked.inc(prompt)
            self.cached.inc(job.cached)
            if job.started is not None and job.first is not None:
                self.queued.observe(job.started - job.submitted)
                self.first.observe(job.first - job.submitted)
        if event.finish_reason and job.first is not None and job.ended is not None and job.made > 1:
            self.each.observe((job.ended - job.first) / (job.made - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)
