"""Timers of each framework as rows of a step: which stages each one holds, and what is left when they are taken off."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from grpo_autotune.records.imported import TRAINING_PASS

RAY = "timing_s/"
TRL = "profiling/Time taken: "
SLACK, ROUNDED_S = 0.001, 0.002
"""Share of a step, and seconds of rounding to three decimals, by which timers may exceed the step that holds them."""
OCCASIONS = {"save_checkpoint", "testing", "validation"}
ALONE = {  # timer of verl or EasyR1 -> its row, and the stages that it holds
    "old_log_prob": ("policy_logprob", "policy_logprob.old_policy"),
    "old": ("policy_logprob", "policy_logprob.old_policy"),
    "ref": ("reference_logprob", "reference_logprob"),
    "RefPolicy": ("reference_logprob", "reference_logprob"),
    "reward": ("reward", "reward"),
    "update_actor": (TRAINING_PASS, "policy_logprob.training_forward", "backward", "optimizer", "sync_wait"),
    "update_weights": ("weight_sync", "weight_sync", "engine"),
    "values": ("critic's values", "critic's values"),
    "update_critic": ("critic's training", "critic's training"),
}
LEFT_OVER = {"start_profile", "stop_profile", "dump_rollout_generations"}
INSIDE = {"step", "gen", "generate_sequences", "reshard", "adv"} | OCCASIONS | LEFT_OVER | set(ALONE)
OVERLAP = ("param_sync", "wait_for_enough_samples", "generate_async", "sync_rollout_weights", "switch_")
"""Timers of asynchronous trainers: their stages run beside each other, so nothing adds up to a step."""
LEAST_WAIT = 0.01
TORN_TIMER = "(torn)"  # key of a step of which a timer is no number, or below zero


class Part(NamedTuple):
    """A row's seconds in one step."""

    name: str
    holds: tuple[str, ...]
    keys: tuple[str, ...]
    seconds: float


def is_async(keys: Iterable[str]) -> bool:
    """True for the timers of an asynchronous trainer."""
    return any(key.startswith("fully_async/") or key.rpartition("/")[2].startswith(OVERLAP) for key in keys)


def ray_parts(values: Mapping[str, float], idle_s: float) -> list[Part] | None:
    """The rows of a step of verl or EasyR1, `other` last, which sum to `timing_s/step`; None where its timers hold
    more than it. Saving and evaluating count where the step has room for them beside `idle_s`, the seconds that steps
    without leave over."""
    timers = {key.removeprefix(RAY): spent for key, spent in values.items() if key.startswith(RAY)}
    step_s, parts = timers["step"], [*_generation(timers)]
    parts += [Part(ALONE[k][0], ALONE[k][1:], (RAY + k,), spent) for k, spent in timers.items() if k in ALONE]
    if "adv" in timers:  # where no timer of its own waits for the rewards, this one does
        waits = timers["adv"] > LEAST_WAIT * step_s > timers.get("reward", 0.0)
        parts.append(Part("adv", ("other", "reward") if waits else ("other",), (f"{RAY}adv",), timers["adv"]))
    room = step_s * (1.0 + SLACK) + ROUNDED_S - sum(part.seconds for part in parts)
    named = [Part(k, (), (RAY + k,), s) for k, s in timers.items() if "/" not in k and k not in INSIDE]
    if named and sum(part.seconds for part in named) <= room:
        parts, room = parts + named, room - sum(part.seconds for part in named)
    for key in sorted(OCCASIONS & timers.keys()):
        if timers[key] <= room and room - idle_s > timers[key] / 2.0:
            parts.append(Part("log_save_eval", ("log_save_eval",), (RAY + key,), timers[key]))
            room -= timers[key]
    taken = tuple(f"-{key}" for part in parts for key in part.keys)
    rest = step_s - sum(part.seconds for part in parts)
    parts.append(Part("other", ("other",), (f"{RAY}step", *taken), max(0.0, rest)))
    return parts if room >= 0.0 and TORN_TIMER not in values else None


def _generation(timers: Mapping[str, float]) -> Iterator[Part]:
    """`gen`, cut where the version tells the push of the weights apart."""
    if "gen" not in timers:
        return
    whole, slowest, reshard = timers["gen"], timers.get("generation_timing/max"), timers.get("reshard")
    in_loop = any(key.startswith("agent_loop/") for key in timers)
    if slowest is not None and slowest <= whole and not in_loop and "update_weights" not in timers:
        yield Part("generation", ("generation",), (f"{RAY}generation_timing/max",), slowest)
        keys = (f"{RAY}gen", f"-{RAY}generation_timing/max")  # both switches of the worker around its generation
        yield Part("weight_sync", ("weight_sync", "engine"), keys, whole - slowest)
    elif reshard is not None and reshard <= whole:
        yield Part("generation", ("generation", "prompt"), (f"{RAY}gen", f"-{RAY}reshard"), whole - reshard)
        yield Part("weight_sync", ("weight_sync", "engine"), (f"{RAY}reshard",), reshard)
    else:
        streamed = any(key.startswith("agent_loop/compute_score") for key in timers)
        pushed = () if "update_weights" in timers else ("weight_sync", "engine")
        data = ("data",) if {"old", "validation"} & timers.keys() else ()  # EasyR1 draws its batches in there
        holds = ("generation", "prompt", *pushed, *data, *(["reward"] if streamed else []))
        yield Part("generation", holds, (f"{RAY}gen",), whole)


TrlRow = tuple[str, tuple[str, ...], tuple[str, ...]]


class TrlTimers:
    """Timers of TRL's trainers, which end one after the other: those before the one around them are inside it."""

    def __init__(self) -> None:
        self.seen = False
        self.collapsed = False  # several in one row: a name that was logged twice kept its last value alone
        self._spent: dict[str, float] = defaultdict(float)
        self._passes: list[float] = []

    def add(self, values: Mapping[str, float]) -> None:
        """Take the timers of a row in."""
        names = {key: key.removeprefix(TRL).partition(".")[2] for key in values if key.startswith(TRL)}
        self.seen |= bool(names)
        self.collapsed |= len(names) > 1
        for key, name in names.items():
            if name.startswith("_get_per_token_logps"):
                self._passes.append(values[key])
            elif name in ("_prepare_inputs", "compute_loss"):
                labels = {1: ["one"], 2: ["old", "ref"]}.get(len(self._passes), ["passes"] * len(self._passes))
                labels = labels if name == "_prepare_inputs" else ["forward"] * len(self._passes)
                for label, spent in zip(labels, self._passes, strict=True):
                    self._spent[label] += spent
                self._passes = []
            self._spent[TRL_NAMES.get(name, "")] += values[key]

    def take(self, steps: int, step_s: float | None, *, kl: bool) -> list[Part]:
        """The rows of one of the `steps` optimizer steps since the last call, of `step_s` seconds where the log has
        them. Where it has a KL term (`kl`), a lone pass before the loss is the reference's, else the old policy's."""
        spent = defaultdict(float, {label: seconds / steps for label, seconds in self._spent.items()})
        self._spent.clear()
        if not spent["prepare"] or not spent["loss"]:
            return []
        spent["ref" if kl else "old"] += spent["one"]
        seconds = {label: spent[label] for label in TRL_ROWS if spent[label]}
        seconds["prompt"] = spent["prepare"] - sum(seconds.values()) + spent["forward"]
        seconds["left" if spent["forward"] else "fused"] = spent["loss"] - spent["forward"]
        if step_s is not None:
            seconds["backward"] = step_s - spent["prepare"] - spent["loss"]
        if min(seconds.values()) < -SLACK * (spent["prepare"] + spent["loss"]):
            return []
        return [Part(*(TRL_ROWS | TRL_REST)[label], max(0.0, each)) for label, each in seconds.items()]


TRL_NAMES = {  # method -> label; each reward's own name is inside `_calculate_rewards`
    **dict.fromkeys((f"transformers.generate{how}" for how in ("", "_batch", "_paged")), "gen"),
    **dict.fromkeys(("vLLM.generate", "generate"), "gen"),
    **dict.fromkeys(("sync_weights", "_move_model_to_vllm"), "sync"),
    **dict.fromkeys(("_calculate_rewards", "_compute_rewards_per_func"), "reward"),
    "_prepare_inputs": "prepare",
    "compute_loss": "loss",
}
_PASS = "_get_per_token_logps*"
TRL_ROWS: dict[str, TrlRow] = {
    "gen": ("generation", ("generation",), ("*generate",)),
    "sync": ("weight_sync", ("weight_sync",), ("sync_weights",)),
    "reward": ("reward", ("reward",), ("_calculate_rewards",)),
    "old": ("policy_logprob", ("policy_logprob.old_policy",), (_PASS,)),
    "ref": ("reference_logprob", ("reference_logprob",), (_PASS,)),
    "passes": ("log-prob passes", ("policy_logprob.old_policy", "reference_logprob"), (_PASS,)),
    "forward": ("training forward", ("policy_logprob.training_forward",), (_PASS,)),
}
TRL_REST: dict[str, TrlRow] = {  # label -> row, stages, and keys (behind `profiling/Time taken: GRPOTrainer.`)
    "prompt": ("prompt", ("prompt", "engine", "sync_wait"), ("_prepare_inputs", "-what is inside")),
    "fused": ("training forward", ("policy_logprob.training_forward",), ("compute_loss",)),
    "left": ("other", ("other",), ("compute_loss", f"-{_PASS}")),
    "backward": ("backward", ("backward",), ("step_time", "-_prepare_inputs", "-compute_loss")),
}
