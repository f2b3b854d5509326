"""The same numbers under the names that other trainers log them by, where the meaning is the same.

`timing_s/*`, `timing_per_token_ms/*`, `perf/total_num_tokens`, `perf/time_per_step`, `perf/throughput`,
`prompt_length/*` and `response_length/*` are verl's (`verl/trainer/ppo/metric_utils.py`); the other `perf/*` are
those of TRL's asynchronous GRPO trainer (`trl/experimental/async_grpo/async_grpo_trainer.py`). Token counts of
`timing_per_token_ms` are this rank's, as its seconds are, and count a token once however often it is trained on: verl
divides all epochs' `update_actor` by the tokens of the generated batch. `perf/total_num_tokens` counts all ranks, and
`perf/throughput` is tokens per second and device.
"""

from grpo_autotune.probe.breakdown import Breakdown
from grpo_autotune.records.probe import ProbeRecord


def flat_metrics(record: ProbeRecord, b: Breakdown) -> dict[str, float]:
    """Metric name to value; a stage that never ran is left out."""
    forward_s = b.parts_s.get(("policy_logprob", "training_forward"), 0.0)
    backward_s, optimizer_s = b.seconds("backward"), b.seconds("optimizer")
    timing = {
        "gen": b.seconds("generation"),
        "reward": b.seconds("reward"),
        "old_log_prob": b.parts_s.get(("policy_logprob", "old_policy"), 0.0),
        "ref": b.seconds("reference_logprob"),
        "update_actor": forward_s + backward_s + optimizer_s,
        "testing": b.parts_s.get(("log_save_eval", "evaluate"), 0.0),
        "save_checkpoint": b.parts_s.get(("log_save_eval", "save"), 0.0),
    }
    metrics = {f"timing_s/{name}": spent for name, spent in timing.items() if spent > 0.0}
    metrics["timing_s/step"] = metrics["perf/step_s"] = metrics["perf/time_per_step"] = b.step_s
    metrics |= {"perf/fwd_s": forward_s, "perf/fwd_bwd_s": forward_s + backward_s, "perf/optimizer_s": optimizer_s}
    if b.seconds("weight_sync") > 0.0:
        metrics["perf/weight_sync_s"] = b.seconds("weight_sync")
    return metrics | _token_metrics(record, b, timing)


def _token_metrics(record: ProbeRecord, b: Breakdown, timing: dict[str, float]) -> dict[str, float]:
    tokens = record.tokens
    if tokens is None:
        return {}
    every = tokens.prompt_per_step + tokens.completion_per_step
    counts = {"gen": tokens.completion_per_step, "ref": every, "update_actor": every}
    metrics = {
        f"timing_per_token_ms/{name}": timing[name] * 1000.0 / count
        for name, count in counts.items()
        if count > 0.0 and timing[name] > 0.0
    }
    metrics["perf/total_num_tokens"] = every * record.trainer.world_size
    metrics["perf/throughput"] = every / b.step_s
    metrics |= {"prompt_length/mean": tokens.prompt.mean, "prompt_length/max": tokens.prompt.max}
    metrics |= {"response_length/mean": tokens.completion.mean, "response_length/max": tokens.completion.max}
    return metrics
