"""Every rule's advice: what saves too little is dropped, the rest is ranked and put into sentences."""

from collections.abc import Iterable, Iterator

from grpo_autotune.advice import learning, observed, remote
from grpo_autotune.advice.facts import Facts, Idea
from grpo_autotune.advice.sentences import knob_ideas
from grpo_autotune.records.report import Advice, Change
from grpo_autotune.units import listing, percent, seconds

LEAST_SHARE = 0.01
"""A predicted saving below this share of the step is not worth a user's time."""


def ideas(facts: Facts) -> Iterator[Idea]:
    """Everything that may be advised: the knobs as the models see them, then what follows from the record alone."""
    yield from knob_ideas(facts)
    rules = (*observed.RULES, remote.slow_reward, *learning.RULES)
    yield from (idea for rule in rules if (idea := rule(facts)) is not None)


def judge(facts: Facts, candidates: Iterable[Idea] | None = None) -> list[Advice]:
    """The verdict: exact advice before advice that changes learning, each by predicted saving."""
    least_s = LEAST_SHARE * facts.breakdown.step_s
    candidates = ideas(facts) if candidates is None else candidates
    worth = [idea for idea in candidates if idea.saving_s is None or idea.saving_s >= least_s]
    worth.sort(key=lambda idea: (idea.kind != "exact", -(idea.saving_s or 0.0)))
    return [advice_of(idea, facts) for idea in worth]


def amdahl(facts: Facts, stages: Iterable[str]) -> float | None:
    """Amdahl's law (1967): with a share s of the step gone the step is 1 / (1 - s) times faster; None at s = 1."""
    rest = 1.0 - sum(facts.breakdown.shares.get(stage, 0.0) for stage in stages)
    return 1.0 / rest if rest > 1e-6 else None


def advice_of(idea: Idea, facts: Facts) -> Advice:
    """Put an idea into words and numbers."""
    step_s = facts.breakdown.step_s
    ceiling = amdahl(facts, idea.stages)
    head = idea.action or listing([_say(change, facts.config is not None) for change in idea.changes])
    sentences = [head[0].upper() + head[1:]]
    if idea.saving_s is None and idea.stages:
        sentences[0] += "; no seconds of a step are predicted to be saved"
    elif idea.saving_s is not None:
        saved = f"{seconds(idea.saving_s)} of a step's {seconds(step_s)} ({percent(idea.saving_s / step_s)})"
        sentences[0] += f": predicted to save {saved}"
    sentences += [text for text in (idea.because, idea.caveat) if text]
    if idea.saving_s is not None and ceiling is not None:
        what = listing([stage for stage in idea.stages if facts.breakdown.self_s.get(stage)])
        sentences.append(f"Whatever is done about {what}, the step can get at most {ceiling:.2f}x faster")
    return Advice(
        text=" ".join(f"{sentence.rstrip('.')}." for sentence in sentences),
        kind=idea.kind,
        predicted_saving=idea.saving_s,
        predicted_share=None if idea.saving_s is None else idea.saving_s / step_s,
        ceiling=ceiling,
        stages=list(idea.stages),
        changes=list(idea.changes),
    )


def _say(change: Change, has_config: bool) -> str:
    """`set grpo.beta to 0.0 (now 0.04)`, or, in a script without our configuration, `pass beta=0.0 to GRPOConfig`."""
    now = "" if change.before is None else f" (now {_value(change.before)})"
    section, _, name = change.key.partition(".")
    if has_config:
        return f"set {change.key} to {_value(change.after)}{now}"
    if section == "data":
        return f"bring the images' longest side to {_value(change.after)} pixels{now}"
    name = f"vllm_{name}" if section == "vllm" else name
    after = repr(change.after) if not isinstance(change.after, float) else f"{change.after:g}"
    return f"pass {name}={after} to GRPOConfig{now}"


def _value(value: bool | int | float | str | None) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
