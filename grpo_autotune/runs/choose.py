"""Checkpoints ranked by a strategy: one pure function, of the command `checkpoints` and of a training that chooses.

A strategy is one of `STRATEGIES` or any logged name. `kl` takes those inside a band, and of these the highest held-out
reward; the others take the lowest or the highest value. Where the value has an interval (the held-out reward), all
within that of the first are tied, and of ties the earliest step wins.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError, nearest_hint
from grpo_autotune.records.alerts import number
from grpo_autotune.records.evaluations import NO_VALUES

Mode = Literal["min", "max"]
REWARD = "eval_reward"
STRATEGIES: dict[str, tuple[str, Mode]] = {
    "val_loss": ("eval_loss", "min"),
    "ppo_loss": ("eval_ppo_loss", "min"),
    "kl": ("eval_kl", "min"),
    "adv_std": ("adv_std", "min"),
    "reward": (REWARD, "max"),
}
"""Strategy -> the name in the log, and which end of it is the best; of `kl`, outside the band."""
LOWEST = re.compile(r"(.*[_/])?(loss|kl|adv_std|failed|truncated|clipped_ratio)")
HIGHEST = re.compile(r"(.*[_/])?(reward|accuracy)|(eval_)?rewards/.+/mean")
ZERO = 1e-6
"""Below it a policy loss is a rounding error."""


@dataclass(frozen=True)
class Ranking:
    """Steps, the best first, with the value of each that the strategy looks at."""

    metric: str
    mode: Mode
    values: dict[int, float]
    why: str
    notes: tuple[str, ...]

    @property
    def best(self) -> int | None:
        return next(iter(self.values), None)


def metric_of(strategy: str, logged: Collection[str]) -> str:
    """The name in the log that a strategy looks at: held out where that was logged. ConfigError with what there is."""
    known = STRATEGIES.get(strategy)
    names = [name for name in ([known[0]] if known else [f"eval_{strategy}", strategy]) if name in logged]
    if names:
        return names[0]
    there_are = ", ".join(sorted(logged))
    if known:
        raise ConfigError(f"this run logged no {known[0]}", where=strategy, fix=f"There are {there_are}.")
    near = nearest_hint(strategy, [*STRATEGIES, *logged], f"Or a logged name: {there_are}.")
    raise ConfigError(f"no such strategy; there are {', '.join(STRATEGIES)}", where=strategy, fix=near)


def mode_of(metric: str, mode: str = "auto") -> Mode:
    """The end that is best. ConfigError where the name does not tell and `mode` is `auto`."""
    if mode in ("min", "max"):
        return "min" if mode == "min" else "max"
    known = dict(STRATEGIES.values()).get(metric) or STRATEGIES.get(metric, ("", None))[1]
    if known is not None:
        return known
    if LOWEST.fullmatch(metric) or HIGHEST.fullmatch(metric):
        return "min" if LOWEST.fullmatch(metric) else "max"
    raise ConfigError("its name does not tell whether low or high is good", where=metric, fix="Give mode: min or max.")


def rank(
    rows: Mapping[int, Mapping[str, Any]],
    strategy: str,
    *,
    mode: str = "auto",
    band: Sequence[float] = (0.01, 0.1),
    untrained: Collection[str] = (),
) -> Ranking:
    """Rank steps by their logged values (`EvaluationLog.by_step`); a step without the value is left out.

    Args:
        band: Of `kl`, in nats per token.
        untrained: Rewards of weight 0, which training does not raise.

    Raises:
        ConfigError: No row has such a name, or the name does not tell which end is the best.
    """
    logged = {name for row in rows.values() for name in row if name not in NO_VALUES and number(row, name) is not None}
    metric = metric_of(strategy, logged)
    end = mode_of(metric, mode)
    values = {step: value for step in sorted(rows) if (value := number(rows[step], metric)) is not None}
    if strategy == "kl" and mode == "auto":
        order, why = _inside(rows, values, band)
    else:
        order, why = _ordered(rows, values, metric, end)
    return Ranking(metric, end, {step: values[step] for step in order}, why, _notes(metric, values, untrained))


def rank_kept(
    rows: Mapping[int, Mapping[str, Any]],
    kept: Collection[int],
    config: RunConfig | None,
    strategy: str | None = None,
    mode: str = "auto",
) -> Ranking:
    """Rank the steps of `rows` that are `kept`, by a strategy or the configuration's own; ConfigError as `rank`."""
    chosen, chosen_mode = own_choice(config)
    return rank(
        {step: row for step, row in rows.items() if step in kept},
        strategy or chosen,
        mode=chosen_mode if mode == "auto" and strategy in (None, chosen) else mode,
        band=config.checkpoints.kl_band if config else (0.01, 0.1),
        untrained=[item.label or item.name for item in config.rewards if item.weight == 0] if config else (),
    )


def own_choice(config: RunConfig | None) -> tuple[str, str]:
    """Strategy and mode of a run itself: of `checkpoints`, of transformers' keys, or else the held-out reward."""
    if config is None or config.checkpoints.choose is not None:
        return (str(config.checkpoints.choose), config.checkpoints.mode) if config else ("reward", "auto")
    grpo = config.grpo
    metric = grpo.get("metric_for_best_model") or ("loss" if grpo.get("load_best_model_at_end") else None)
    if metric is None:
        return "reward", "auto"
    greater = grpo.get("greater_is_better")
    least = metric.endswith("loss") if greater is None else not greater  # as transformers has it
    return metric.removeprefix("eval_"), "min" if least else "max"


def _ordered(
    rows: Mapping[int, Mapping[str, Any]], values: Mapping[int, float], metric: str, end: Mode
) -> tuple[list[int], str]:
    sign = 1.0 if end == "min" else -1.0
    order = sorted(values, key=lambda step: (sign * values[step], step))
    top, half = order[0], number(rows[order[0]], f"{metric}_ci") or 0.0
    tied = [step for step in order if abs(values[step] - values[top]) <= half]
    first, word = min(tied), "lowest" if end == "min" else "highest"
    order.remove(first)
    why = f"{metric} {_told(rows, first, metric)} is the {word} of {len(values)}"
    if first != top:
        why = f"{metric} {_told(rows, first, metric)} is the earliest of {len(tied)} within the interval of the {word}"
        why += f", {_told(rows, top, metric)} at step {top}"
    elif len(tied) > 1:
        why += f", and earlier than {len(tied) - 1} that {'are within its interval' if half else 'equal it'}"
    return [first, *order], why


def _inside(
    rows: Mapping[int, Mapping[str, Any]], kl: Mapping[int, float], band: Sequence[float]
) -> tuple[list[int], str]:
    low, high = band
    away = {step: max(low - value, value - high, 0.0) for step, value in kl.items()}
    rewards = {step: number(rows[step], REWARD) for step in kl if not away[step]}
    inside = {step: reward for step, reward in rewards.items() if reward is not None}
    outside = sorted(kl.keys() - inside.keys(), key=lambda step: (away[step], step))
    words = f"the band of {low:g} to {high:g} nats per token"
    if not inside:
        return outside, f"KL {kl[outside[0]]:.4g} is nearest to {words}; none with a held-out reward is inside"
    order, why = _ordered(rows, inside, REWARD, "max")
    return [*order, *outside], f"KL {kl[order[0]]:.4g} is inside {words}, and {why} there"


def _notes(metric: str, values: Mapping[int, float], untrained: Collection[str]) -> tuple[str, ...]:
    notes = []
    if not metric.startswith("eval_"):
        notes.append(f"{metric} is of the rows that were trained on, not of held-out ones")
    reward = re.fullmatch(r"eval_rewards/(.+)/(mean|std)", metric)
    if metric.endswith("reward") or (reward and reward[1] not in untrained):
        notes.append(f"{metric} is what training raises: a reward of weight 0 would judge without being trained on")
    if metric == "eval_ppo_loss" and all(abs(value) < ZERO for value in values.values()):
        notes.append("it is 0 but for rounding, as the advantages of a prompt sum to 0: its order says nothing")
    return tuple(notes)


def _told(rows: Mapping[int, Mapping[str, Any]], step: int, metric: str) -> str:
    half, value = number(rows[step], f"{metric}_ci"), number(rows[step], metric) or 0.0
    return f"{value:.4g}" if half is None else f"{value:.4g} ± {half:.2g}"
