"""The stage that bounds the step, in one sentence, and warnings to read before trusting the numbers."""

from grpo_autotune.advice.facts import Facts
from grpo_autotune.advice.remote import remote_warnings
from grpo_autotune.probe.breakdown import SLOW, Limit
from grpo_autotune.records.probe import STAGE_WORDS, ProfiledStep, ResampleFacts
from grpo_autotune.records.rollout import Fidelity
from grpo_autotune.units import amount, listing, percent, seconds

ALONE = 0.4
FEW_STEPS = 3
LARGE_OTHER = 0.02
LARGE_SPREAD = 0.2
LAUNCHES = 0.7
"""Busy share of a GPU below which the host, which launches its kernels, bounds a stage."""
CEILINGS = {"matrix": "matrix rate", "memory": "memory bandwidth"}


def bound(facts: Facts) -> str:
    """The stage that takes most of the step (two, where none takes `ALONE`), and how near its ceiling it is."""
    ranked = sorted(facts.breakdown.shares.items(), key=lambda item: -item[1])
    (first, share), *rest = ranked
    step = seconds(facts.breakdown.step_s)
    if share >= ALONE or not rest:
        text = f"{STAGE_WORDS[first]} bounds the step: {percent(share)} of {step}"
    else:
        second, less = rest[0]
        both = f"{STAGE_WORDS[first]} ({percent(share)}) and {STAGE_WORDS[second]} ({percent(less)})"
        text = f"{both} bound the step of {step}"
    text = text[0].upper() + text[1:]
    subject = "It" if share >= ALONE or not rest else "The first of them"
    limit, kernels = facts.limits.get(first), _kernels(facts, first)
    if limit is not None:
        meaning = _meaning(limit) if kernels is None else ""
        text += f". {subject} runs at {percent(limit.share)} of this machine's {CEILINGS[limit.by]}{meaning}"
    return f"{text}." if kernels is None else f"{text}. {kernels}."


def _kernels(facts: Facts, stage: str) -> str | None:
    """Share of a stage's time in which a kernel ran, and their number where launches bind it; None if nobody looked."""
    profiled = facts.record.profiled
    busy = profiled.busy_share(stage) if profiled is not None else None
    if profiled is None or busy is None:
        return None
    if busy >= LAUNCHES:
        return f"A kernel runs in {percent(busy)} of its time"
    return (
        f"Launches bind it: a kernel runs in {percent(busy)} of its time, and the GPU waits for the host in the rest "
        f"({kernels_per(profiled, stage)})"
    )


def kernels_per(profiled: ProfiledStep, *stages: str) -> str:
    """Kernels of some stages in words, per token for generation, per micro batch for the others."""
    per_token = profiled.per_token() if "generation" in stages else None
    if per_token is not None:
        return f"{amount(per_token)} kernels per token"
    return f"{amount(profiled.per_micro_batch(stages))} kernels per micro batch"


def _meaning(limit: Limit) -> str:
    if limit.share < 0.3:
        return ": most of its time goes into starting many small operations, or into work that the count leaves out"
    if limit.share > 0.6:
        return ": near the limit, so only less work makes it faster"
    return ""


def warnings(facts: Facts) -> list[str]:
    """Lines to read first: the engine samples from another distribution, or the measurement is thin."""
    lines: list[str] = []
    fidelity, b, record = facts.record.fidelity, facts.breakdown, facts.record
    if fidelity is not None and not fidelity.ok:
        lines.append(_unfaithful(fidelity))
    if b.shares.get("other", 0.0) > LARGE_OTHER:
        lines.append(
            f"{percent(b.shares['other'])} of the step ({seconds(b.self_s['other'])}) is outside every function that "
            "the probe measures: the trainer's own bookkeeping, or what the script and its callbacks do."
        )
    if b.slow_steps:
        lines.append(
            f"{b.slow_steps} of {len(record.timings.step_s) // record.timings.cycle} measured steps took more than "
            f"{SLOW:g} times the median, the slowest {b.slowest:.1f} times: something was used for the first time "
            "(kernels, shapes, caches), or other work disturbed this machine. Measure more steps."
        )
    count, cycle = len(record.timings.step_s), record.timings.cycle
    if count < cycle:
        lines.append(
            f"The measured steps do not hold a whole cycle of generating and reusing, which is {cycle} steps here "
            f"({count} measured): the seconds and shares are not those of a long run. Measure {cycle} steps or a "
            "multiple of it."
        )
    if count < FEW_STEPS:
        lines.append(
            f"Only {count} step{'s were' if count > 1 else ' was'} measured: treat the seconds as a first guess."
        )
    elif b.step_spread_s > LARGE_SPREAD * b.step_s:
        lines.append(
            f"The steps differ much from each other (± {seconds(b.step_spread_s)} around {seconds(b.step_s)}): "
            "measure more of them, and see that nothing else uses this machine."
        )
    if record.others is not None and record.others.matters:
        lines.append(f"Meanwhile {record.others.warning}.")
    if record.resample is not None and record.resample.rounds > record.resample.rollouts:
        lines.append(_resampled(record.resample, facts))
    lines += remote_warnings(facts)
    if record.device_memory is not None and record.device_memory.retries:
        lines.append(
            f"The GPU's memory was full {record.device_memory.retries} times, and its allocator emptied the cache to "
            "go on, which takes time: what takes less memory may be faster."
        )
    return lines


def _resampled(r: ResampleFacts, facts: Facts) -> str:
    """The cost of dynamic sampling, per rollout."""
    t, further_s = facts.record.trainer, r.further_s / r.rollouts
    steps = t.steps_per_generation * t.num_iterations / t.gradient_accumulation_steps
    made, trained = (count * r.groups * t.num_generations for count in (r.rounds, r.rollouts))
    return (
        f"Dynamic sampling (resample): {r.rounds / r.rollouts:.3g} generations per rollout, {amount(made)} completions "
        f"for {amount(trained)} that are trained on; those after the first take {seconds(further_s)} per rollout, "
        f"{percent(further_s / (steps * facts.breakdown.step_s))} of its steps. "
        f"{percent(r.dead_groups / (r.rollouts * r.groups))} of the groups trained on have equal rewards nevertheless."
    )


def _unfaithful(f: Fidelity) -> str:
    """The error of the samples, the cause that the evidence points to, and those it rules out."""
    if f.mean_nats > f.threshold_nats:
        wrong = (
            f"its log-probs are {f.mean_nats:.3g} nats off on average (at most {f.threshold_nats:.3g} is rounding in "
            "these number formats)"
        )
    elif f.moved is False:
        wrong = "its weights do not follow the optimizer"
    else:
        wrong = "it samples with other parameters than the trainer's log-probs are computed with"
    text = (
        f"vLLM does not sample from the policy that is trained: {wrong}. What is learned from such samples is wrong; "
        "do not train before this is solved."
    )
    by_name = {cause.name: cause for cause in f.causes}
    if f.cause is not None:
        text += f" The evidence points to {f.cause}: {by_name[f.cause].evidence}."
    elif by_name:
        left = [f"{c.name} ({c.evidence})" for c in f.causes if c.points == "unknown"]
        text += f" Causes that the evidence leaves: {listing(left)}." if left else " No known cause fits the evidence."
    ruled_out = [cause.name for cause in f.causes if cause.points == "no"]
    return f"{text} Ruled out: {listing(ruled_out)}." if ruled_out else text
