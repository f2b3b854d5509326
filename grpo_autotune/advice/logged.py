"""The bound and the advice of another framework's log: a rule speaks where its evidence is in the log."""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from grpo_autotune.records.imported import TRAINING_PASS, LogReport
from grpo_autotune.records.report import Advice, Kind
from grpo_autotune.units import amount, percent, seconds

MANY_DEAD, MANY_TRUNCATED = 0.3, 0.2  # shares of groups and completions from which they are worth a word
GENERATES = 0.3
LONG_TAIL = 3.0  # times the mean: a longest completion from which the others wait for few
RULES: dict[str, tuple[float, Kind, str]] = {  # row -> least share of the step, kind of advice, and its sentence
    TRAINING_PASS: (0.3, "exact", "this one timer holds the forward, the backward and the optimizer, and the log "
                    "cannot tell which: `grpo-autotune import CONFIG --probe` measures them apart"),
    "backward": (0.4, "exact", "the gradients: sharing prompts within a group, and a larger micro batch, shorten them"),
    "reference_logprob": (0.05, "learning", "a KL coefficient of 0 needs no reference pass (it changes learning); at "
                          "most this is saved"),
    "policy_logprob": (0.05, "learning", "the old policy's pass is needed only where a rollout serves several "
                       "optimizer steps or another engine's samples are weighed; at most this is saved"),
    "reward": (0.1, "exact", "nothing else runs meanwhile: score in parallel, or beside the log-prob passes"),
    "weight_sync": (0.1, "exact", "with LoRA, pushing the adapter alone moves far less than merged weights"),
    "log_save_eval": (0.1, "exact", "save and evaluate less often"),
}  # fmt: skip


def bound(report: LogReport) -> str:
    """The row that bounds the step, in one sentence."""
    if not report.stages:
        return "The log has seconds of whole steps alone: which stage bounds them, it does not tell."
    row = max(report.stages, key=lambda row: row.self_s)
    lump = f", one timer for {', '.join(row.holds)}" if row.state == "lumped" else ""
    spent = f"{seconds(row.self_s)} of {seconds(report.step_s)} ({percent(row.share)})"
    return f"{row.name} bounds the step: {spent}{lump}."


def advice(report: LogReport) -> list[Advice]:
    """Advice that the log gives reason for, most seconds first."""
    ranked = sorted([*_of_rows(report), *_of_facts(report)], key=lambda entry: -entry[0])
    none: Any = dict.fromkeys(("predicted_saving", "predicted_share", "ceiling"))
    return [Advice(kind=kind, text=text, stages=stages, changes=[], **none) for _, kind, text, *stages in ranked]


def _of_rows(report: LogReport) -> Iterator[tuple[Any, ...]]:
    for row in report.stages:
        least, kind, sentence = RULES.get(row.name, (math.inf, "", ""))
        if row.share >= least:
            yield row.share, kind, f"{row.name}, {seconds(row.self_s)} ({percent(row.share)}): {sentence}.", row.name


def _of_facts(report: LogReport) -> Iterator[tuple[Any, ...]]:
    facts = defaultdict(float, {name: fact.value for name, fact in report.facts.items()})
    cut, dead = facts["completions cut off"], facts["groups of equal rewards"]
    mean, longest = facts["completion tokens, mean"], facts["completion tokens, longest"]
    generation = next((row.share for row in report.stages if row.name == "generation"), 0.0)
    part = f"generation is {percent(generation)} of the step, and " if generation else ""
    if cut >= MANY_TRUNCATED:
        ways = "a higher limit lets them end, a prompt or a reward for short answers makes them shorter"
        yield generation, "learning", f"{part}{percent(cut)} of the completions were cut off: {ways}.", "generation"
    if generation >= GENERATES and mean and longest >= LONG_TAIL * mean:
        text = f"{part}the longest completion has {amount(longest)} tokens where the mean has {amount(mean)}: all wait "
        text += "for it, so a lower limit saves time at the price of completions that are cut off."
        yield generation, "learning", text, "generation"
    if dead >= MANY_DEAD:
        text = f"{percent(dead)} of the groups had equal rewards and taught nothing: larger groups, or prompts "
        yield 0.0, "learning", f"{text}that succeed now and then, make a step worth more."
