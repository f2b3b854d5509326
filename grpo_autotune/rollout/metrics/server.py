"""Counters of a vLLM server while it generates for this trainer, from its `/metrics`.

Counters are read before and after TRL's call; how many requests ran and how full the cache was is asked meanwhile, a
few times per second. A server that also works for others counts their requests too.
"""

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from grpo_autotune.records.rollout import EngineFacts
from grpo_autotune.rollout.metrics.scheduler import SAME, EngineMeter, per, together
from grpo_autotune.rollout.server.http import http_client
from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, Next, wrap

POLL_S = 0.2
TIMEOUT_S = 5.0
COUNTERS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "cached_tokens": "vllm:prompt_tokens_cached_total",
    "decode_tokens": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
}
GAUGES = {
    "running_max": "vllm:num_requests_running",
    "waiting_max": "vllm:num_requests_waiting",
    "kv_use_max": "vllm:kv_cache_usage_perc",
}
CACHE = "vllm:cache_config_info"


def read_metrics(text: str) -> dict[str, float]:
    """Values by name, summed over labels, of Prometheus' text (else ValueError); the cache's tokens under `CACHE`."""
    values: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] += _cache_tokens(sample.labels) if sample.name == CACHE else sample.value
    return dict(values)


def _cache_tokens(labels: Mapping[str, str]) -> float:
    sizes = [labels.get(key, "") for key in ("num_gpu_blocks", "block_size")]
    return float(sizes[0]) * float(sizes[1]) if all(size.isdigit() for size in sizes) else 0.0


@dataclass
class ServerMeter(EngineMeter):
    """An `EngineMeter` for TRL's client of a server; only the process that holds the client sees anything."""

    kv_tokens: int | None = None

    def install(self) -> list[Handle]:
        client = getattr(self.generation, "vllm_client", None)
        handles = [wrap(AttributeSlot(self.generation, "sync_weights"), self._timed("sync"))]
        if client is not None:
            handles.append(wrap(AttributeSlot(client, "generate"), self._client_layer, INNER))
        return handles

    def facts(self, first: int) -> EngineFacts | None:
        """As `EngineMeter.facts`; a server does not tell which of its seconds were prefill."""
        total = together(self._seen(first))
        if not total.generations:
            return None
        untold = {name: getattr(total, name) or None for name in ("images_encoded", "running_max", "kv_use_max")}
        return EngineFacts(
            **{name: getattr(total, name) for name in SAME} | untold,
            prefill_tokens_per_s=None,
            decode_tokens_per_s=per(total.decode_tokens, total.decode_s),
            running_mean=per(total.running_s, total.decode_s) or None,
            kv_tokens=self.kv_tokens,
            sync_s=per(total.sync_s, total.syncs),
            source="server",
        )

    def _client_layer(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        if not self.counting():
            return call_next(*args, **kwargs)
        before, seen, done = self._read(), list[dict[str, float]](), threading.Event()
        watching = threading.Thread(target=self._poll, args=(done, seen), daemon=True)
        watching.start()
        begin = self.clock()
        try:
            answer = call_next(*args, **kwargs)
        finally:
            seconds = self.clock() - begin
            done.set()
            watching.join()
        self._count_call(before, self._read(), seen, seconds)
        return answer

    def _count_call(
        self, before: dict[str, float], after: dict[str, float], seen: list[dict[str, float]], seconds: float
    ) -> None:
        turn = self._turn()
        turn.generations += 1
        turn.decode_s += seconds
        if not (before and after):
            return
        for name, metric in COUNTERS.items():
            setattr(turn, name, getattr(turn, name) + round(after.get(metric, 0.0) - before.get(metric, 0.0)))
        for name, metric in GAUGES.items():
            largest = max((values.get(metric, 0.0) for values in seen), default=0.0)
            setattr(turn, name, max(getattr(turn, name), largest if name == "kv_use_max" else int(largest)))
        turn.prefill_tokens = turn.prompt_tokens - turn.cached_tokens
        running = [values.get(GAUGES["running_max"], 0.0) for values in seen]
        turn.running_s += seconds * sum(running) / len(running) if running else 0.0
        self.kv_tokens = int(after.get(CACHE, 0.0)) or None

    def _poll(self, done: threading.Event, seen: list[dict[str, float]]) -> None:
        while not done.wait(POLL_S):
            seen.append(self._read())

    def _read(self) -> dict[str, float]:
        """The server's metrics; none where it tells none (they may be switched off, or it is gone)."""
        try:
            reply = http_client().get(f"{self.generation.vllm_client.base_url}/metrics", timeout=TIMEOUT_S)
            return read_metrics(reply.raise_for_status().text)
        except (httpx2.HTTPError, ValueError):
            return {}


def meter_for(generation: Any, **settings: Any) -> EngineMeter:
    """The meter that fits how a trainer reaches its engine."""
    server = getattr(generation, "mode", None) == "server"
    return (ServerMeter if server else EngineMeter)(generation, **settings)
