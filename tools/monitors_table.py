"""The tables of `docs/monitors.md`: the rules with their defaults, and what was measured of them."""

from __future__ import annotations

import json
from pathlib import Path

from grpo_autotune.config.sections.monitors import MONITORS

MEASURED = Path(__file__).parent.parent / "docs" / "benchmarks" / "monitors.json"

FIRES = {
    "not_finite": ("loss, gradient norm, reward, KL or entropy is no finite number", "common practice"),
    "loss_spike": (
        "the gradient norm, on a log scale, or the loss is `above` sigmas over the median of the last 128 log events, "
        "from the 20th on",
        "OLMo-core's `SkipStepOptimizer`; the log scale is ours",
    ),
    "kl_high": (
        "`kl` is over `above` and twice the top of any `kl_band`, or a branch's KL over twice the top of its own",
        "judgement; bands: RLlib",
    ),
    "kl_low": (
        "`kl` has been over `below` and is under it, or a branch's KL has been over half the foot of its `kl_band` and "
        "is under it; off where neither is given",
        "bands: RLlib",
    ),
    "entropy_collapse": ("`entropy` is under `below` times the baseline", "judgement"),
    "length_drift": (
        "the mean length is off the baseline by more than `above` times it, and no reward has gained: a held-out one, "
        "beyond the intervals of its first and its newest evaluation, or without two evaluations that of training, by "
        "a sigma",
        "rewardspy",
    ),
    "dead_groups": ("the share of groups with equal rewards (`frac_reward_zero_std`) is over `above`", "rldoctor"),
    "truncated": (
        "the share of completions that were cut off (`completions/clipped_ratio`) is over `above`",
        "judgement",
    ),
    "reward_ceiling": (
        "the mean reward is over `above` times the highest that there can be: `maximum`, or the sum of the weights "
        "where all rewards are built in",
        "rewardspy",
    ),
    "held_out_gap": (
        "held-out reward is below its best beyond both intervals at 95%, and the reward in training has risen since; "
        "`steps` are evaluations",
        "autocontext",
    ),
    "judge_failures": (
        "the share of scores that a reward could not give (`rewards/NAME/failed`) is over `above`; over a half at once",
        "prime-rl",
    ),
    "stall": (
        "no stage has begun or ended for `times` the 99th percentile of the stage's own waits, and `at_least_s`; in "
        "the first step, in evaluations and in checkpoints for `first_s`",
        "NVRx, torchtitan",
    ),
    "memory_creep": (
        "`memory_share`, the part of the device's memory in use, is over `above`, and has grown at each of `steps` log "
        "events",
        "judgement",
    ),
    "nothing_learned": ("the gradient norm is zero; the cause is said", "nothing is learned by it"),
}
"""Monitor -> when it fires, and where its threshold comes from."""


def rules() -> str:
    """A row for each monitor: what it waits for, its keys, the unit, and where the threshold comes from."""
    lines = ["| monitor | fires when | keys and defaults | unit | threshold from |", "|---|---|---|---|---|"]
    for name, (fires, source) in FIRES.items():
        keys = ", ".join(f"`{key}: {value:g}`" for key, value in MONITORS[name][0].items() if value)
        lines.append(f"| `{name}` | {fires} | {keys} | {MONITORS[name][1] or '-'} | {source} |")
    return "\n".join([*lines, ""])


def told_of(ratio: dict[str, float] | None) -> str:
    """Runs of runs; a dash where there are none."""
    return f"{round(ratio['median'] * ratio['n'])} of {ratio['n']}" if ratio and ratio["n"] else "-"


def measured() -> str:
    """A row for each monitor: false alarms on healthy runs, and faults that were told in time."""
    ratios = json.loads(MEASURED.read_text())["ratios"]
    columns = ("false alarms per run", "faults told once within persistence")
    lines = ["| monitor | healthy runs with a false alarm | faults told once, in time |", "|---|---|---|"]
    for name in MONITORS:
        found = (ratios.get(f"{name}: {column}") for column in columns)
        cells = (
            "-" if not row or not row["n"] else f"{round(row['median'] * row['n'])} of {row['n']}" for row in found
        )
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    noisy = ratios["healthy runs with any alert"]
    linear = ratios["loss_spike with norms on a linear scale: false alarms per run"]
    lines.append(f"| (`loss_spike`, were norms on a linear scale) | {told_of(linear)} | |")
    return "\n".join([*lines, f"| any monitor | {told_of(noisy)} | |", ""])
