"""The bound and the advice of another framework's log: a rule speaks where its evidence is in the log."""

from collections.abc import Iterator

from grpo_autotune.records.imported import TRAINING_PASS, LogReport
from grpo_autotune.records.report import Advice, Kind
from grpo_autotune.units import amount, percent, seconds

MANY_DEAD, MANY_TRUNCATED = 0.3, 0.2
"""Shares of groups of equal rewards, and of completions that were cut off, from which they are worth a word."""
GENERATES = 0.3
LONG_TAIL = 3.0
"""Times the mean: a longest completion from which the others wait for few."""
RULES: dict[str, tuple[float, Kind, str]] = {
    TRAINING_PASS: (
        0.3, "exact",
        "this one timer holds the forward, the backward and the optimizer, and the log cannot tell which: "
        "`grpo-autotune import CONFIG --probe` measures them apart",
    ),
    "backward": (0.4, "exact", "the gradients: sharing prompts within a group, and a larger micro batch, shorten them"),
    "reference_logprob": (
        0.05, "learning",
        "a KL coefficient of 0 needs no reference pass (it changes learning); at most this is saved",
    ),
    "policy_logprob": (
        0.05, "learning",
        "the old policy's pass is needed only where a rollout serves several optimizer steps or another engine's "
        "samples are weighed; at most this is saved",
    ),
    "reward": (0.1, "exact", "nothing else runs meanwhile: score in parallel, or beside the log-prob passes"),
    "weight_sync": (0.1, "exact", "with LoRA, pushing the adapter alone moves far less than merged weights"),
    "log_save_eval": (0.1, "exact", "save and evaluate less often"),
}  # fmt: skip
"""Row -> least share of the step, kind of advice, and the sentence behind the row's seconds."""


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
    entries = []
    for row in report.stages:
        least, kind, sentence = RULES.get(row.name, (2.0, "exact", ""))
        if row.share >= least:
            text = f"{row.name}, {seconds(row.self_s)} ({percent(row.share)}): {sentence}."
            entries.append((row.share, _entry(text, kind, [row.name])))
    generation = next((row.share for row in report.stages if row.name == "generation"), 0.0)
    entries += [(generation, _entry(text, "learning", ["generation"])) for text in _of_lengths(report, generation)]
    dead = report.facts.get("groups of equal rewards")
    if dead is not None and dead.value >= MANY_DEAD:
        text = f"{percent(dead.value)} of the groups had equal rewards and taught nothing: larger groups, or prompts "
        entries.append((0.0, _entry(f"{text}that succeed now and then, make a step worth more.", "learning", [])))
    return [entry for _, entry in sorted(entries, key=lambda pair: -pair[0])]


def _of_lengths(report: LogReport, generation: float) -> Iterator[str]:
    facts = {name: fact.value for name, fact in report.facts.items()}
    part = f"generation is {percent(generation)} of the step, and " if generation else ""
    cut = facts.get("completions cut off", 0.0)
    if cut >= MANY_TRUNCATED:
        ways = "a higher limit lets them end, a prompt or a reward for short answers makes them shorter"
        yield f"{part}{percent(cut)} of the completions were cut off: {ways}."
    mean, longest = facts.get("completion tokens, mean", 0.0), facts.get("completion tokens, longest", 0.0)
    if generation >= GENERATES and mean and longest >= LONG_TAIL * mean:
        yield (
            f"{part}the longest completion has {amount(longest)} tokens where the mean has {amount(mean)}: all wait "
            "for it, so a lower limit saves time at the price of completions that are cut off."
        )


def _entry(text: str, kind: Kind, stages: list[str]) -> Advice:
    return Advice(text=text, kind=kind, predicted_saving=None, predicted_share=None, ceiling=None, stages=stages,
                  changes=[])  # fmt: skip
