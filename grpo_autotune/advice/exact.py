"""Rules whose advice leaves the mathematics of an optimizer step as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from grpo_autotune.advice.batch import generation_changes
from grpo_autotune.advice.facts import PASSES, Facts, Idea
from grpo_autotune.advice.ranks import excesses
from grpo_autotune.records.probe import STAGE_WORDS
from grpo_autotune.records.report import Change
from grpo_autotune.seams.loss import LOSS_KEYS, micro_batch_terms_of_keys
from grpo_autotune.units import listing, percent, seconds, size

MICRO_FACTORS = (8, 4, 2)
NUMBERS_SAVED_PER_HIDDEN = 17.0
"""Numbers that backward needs per layer, token and hidden unit without checkpointing: 34 bytes at 2 bytes a number in
Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 1."""

CADENCE_KEYS = {"log": "logging_steps", "save": "save_steps", "evaluate": "eval_steps"}


def micro_batch(facts: Facts) -> Idea | None:
    """A k times larger micro batch with k times fewer accumulations does the same step in 1/k as many calls.

    Two things shrink to 1/k: the time in which the device sits idle between small calls (1 - busy share, and never more
    than 1 - limit share), and, where a pass is bound by memory bandwidth, the time that reading the weights once a call
    takes (limit share of the pass). So the saving is (1 - 1/k) of both. Memory is judged as if everything but the
    weights grew k-fold. TRL runs the old-policy and reference passes in micro batches too, so they count. The loss is
    the same except where it is normalised within a micro batch: `bnpo`, the entropy quantile and bonus, a mixture's
    balance term.
    """
    t = facts.record.trainer
    factor = next((k for k in MICRO_FACTORS if _divides(k, facts) and _fits(k, facts)), None)
    busy = facts.busy_share(*PASSES)
    if factor is None or busy is None:
        return None
    saving = 0.0
    for stage in PASSES:
        limit = facts.limits.get(stage)
        if limit is None and not facts.on_gpu:
            continue
        idle = 1.0 - max(busy, limit.share if limit else 0.0)
        memory = limit.share if limit and limit.by == "memory" else 0.0
        saving += facts.breakdown.seconds(stage) * (idle + memory) * (1.0 - 1.0 / factor)
    why_not = _partition_matters(facts)
    return Idea(
        kind="learning" if why_not else "exact",
        stages=PASSES,
        changes=(
            Change(
                key="grpo.per_device_train_batch_size",
                before=t.per_device_train_batch_size,
                after=t.per_device_train_batch_size * factor,
            ),
            Change(
                key="grpo.gradient_accumulation_steps",
                before=t.gradient_accumulation_steps,
                after=t.gradient_accumulation_steps // factor,
            ),
            *generation_changes(facts, fewer_steps=factor),
        ),
        saving_s=saving,
        because=f"The same {t.per_device_train_batch_size * t.gradient_accumulation_steps} completions go through the "
        "model "
        f"in {factor} times fewer calls; the device is {percent(busy)} busy in these passes, and it is assumed that "
        "the "
        f"idle time and the reading of the weights shrink with the number of calls",
        caveat=f"This changes the loss, because {why_not} depends on how the batch is split" if why_not else "",
    )


def gradient_checkpointing(facts: Facts) -> Idea | None:
    """Without checkpointing, backward need not compute the forward a second time.

    The recomputation costs one forward of the layers: at most what the training forward took, and at most a third of
    backward (a backward pass is two forwards' work, Kaplan et al. 2020, section 2.1), or half of it under LoRA, where
    the frozen weights need no gradient of their own. The price is the activations of one micro batch, which must fit.
    """
    t = facts.record.trainer
    free, needed = facts.free_bytes(), activation_bytes(facts)
    if not t.gradient_checkpointing or free is None or needed is None or needed > free:
        return None
    recomputed = facts.breakdown.seconds("backward") * (1 / 2 if t.peft else 1 / 3)
    return Idea(
        kind="exact",
        stages=("backward",),
        changes=(Change(key="grpo.gradient_checkpointing", before=True, after=False),),
        saving_s=min(facts.part_s("policy_logprob", "training_forward"), recomputed),
        because="The backward pass computes the forward a second time to save memory; it is assumed to cost what the "
        f"training forward costs, and at most {'half' if t.peft else 'a third'} of the backward pass",
        caveat=f"It takes about {size(needed)} more memory (predicted), and {size(free)} is free",
    )


def loader_workers(facts: Facts) -> Idea | None:
    """With loader workers, rows are read and images decoded while the step runs.

    With w workers the step takes max(rest, load / w) instead of rest + load. Where the trainer computes on the CPU, the
    workers need cores that are idle, so only that share of the loading can hide.
    """
    load_s = facts.part_s("data", "load") or facts.breakdown.seconds("data")
    cores = (facts.machine or {}).get("cores")
    if facts.record.trainer.dataloader_num_workers or not cores:
        return None
    workers = min(4, int(cores) // facts.record.trainer.world_size - 1)
    busy = 0.0 if facts.on_gpu else facts.busy_share(*PASSES, "generation")
    if workers < 1 or busy is None:
        return None
    step_s = facts.breakdown.step_s
    hidden = step_s - max(step_s - load_s, load_s / workers)
    return Idea(
        kind="exact",
        stages=("data",),
        changes=(Change(key="grpo.dataloader_num_workers", before=0, after=workers),),
        saving_s=hidden * (1.0 - busy),
        because=f"The step waits {seconds(load_s)} for rows to be read and images to be decoded; workers do that "
        "beside "
        "the rest of the step" + ("" if facts.on_gpu else f", on cores that are {percent(busy)} busy"),
    )


def waiting_reward(facts: Facts) -> Idea | None:
    """A plain reward function that waits (for a server, a sandbox) can wait for all completions at once.

    TRL calls plain functions one after the other and awaits `async def` ones together. If the processor is busy for a
    share c of the reward stage, 1 - c of the plain functions' time is waiting; asked all at once, n completions wait
    as long as one, which saves (1 - 1/n) of it. A function that computes is left alone.
    """
    plain = [call for call in facts.record.rewards if not call.is_async]
    everything = sum(call.calls * call.mean_s for call in facts.record.rewards)
    seen = [u for u in facts.record.utilisation if u.stage == "reward" and u.cpu_percent is not None]
    t = facts.record.trainer
    rows = t.per_device_train_batch_size * t.steps_per_generation
    if not plain or everything <= 0.0 or not seen or seen[0].samples < 3:
        return None
    computing = max(min(1.0, (seen[0].cpu_percent or 0.0) / 100.0), (seen[0].gpu_percent or 0.0) / 100.0)
    if computing > 0.5 or rows < 2:
        return None
    slowest = max(plain, key=lambda call: call.calls * call.mean_s)
    share = sum(call.calls * call.mean_s for call in plain) / everything
    return Idea(
        kind="exact",
        stages=("reward",),
        action=f"make the reward function {slowest.name} an `async def` that awaits all completions at once",
        saving_s=facts.breakdown.seconds("reward") * share * (1.0 - computing) * (1.0 - 1.0 / rows),
        because=f"It takes {seconds(slowest.mean_s)} a call, and the processor is busy for only {percent(computing)} "
        "of "
        f"the time: it waits. It is assumed that {rows} completions can wait at the same time",
    )


def straggler(facts: Facts) -> Idea | None:
    """A rank that works longer than the others makes all of them wait.

    A rank's work is its step less `sync_wait`. If the slowest rank worked no longer than the mean of the others, a step
    would be shorter by the difference. Seen from another rank that comes out of its waiting, seen from the slowest
    out of the stage in which it is slower, and no more than that can be saved.
    """
    slowest = next(iter(excesses(facts.record.ranks)), None)
    if slowest is None:
        return None
    stage = slowest.stage if slowest.rank == facts.record.rank else "sync_wait"
    return Idea(
        kind="exact",
        stages=(stage,),
        action=f"find out why rank {slowest.rank} is slower than the others",
        saving_s=min(slowest.extra_s, facts.breakdown.seconds(stage)),
        because=f"The other ranks wait for it; {seconds(slowest.stage_s)} a step of the difference is in "
        f"{STAGE_WORDS.get(slowest.stage, slowest.stage)}. Longer prompts or completions on that rank, or another "
        "process on its device, are the usual reasons",
    )


def log_save_eval(facts: Facts) -> Idea | None:
    """Doing the dearest of logging, saving and evaluating half as often saves half of its seconds in a long run.

    One of them that happens every N steps takes (seconds of one) / N of a step, however many of them a short probe
    happened to hold. Silent where N is not known (see `_long_run_s`), or none was measured.
    """
    costs = {part: cost for part in CADENCE_KEYS if (cost := _long_run_s(facts, part)) is not None}
    part = max(costs, key=lambda name: costs[name][0], default=None)
    if part is None:
        return None
    (cost_s, every), key = costs[part], CADENCE_KEYS[part]
    known = _configured(facts, part) is not None
    verbs = {"log": "log", "save": "save checkpoints", "evaluate": "evaluate"}
    return Idea(
        kind="exact",
        stages=("log_save_eval",),
        changes=(Change(key=f"grpo.{key}", before=every, after=2 * every),) if known else (),
        action="" if known else f"{verbs[part]} half as often (`{key}`)",
        saving_s=min(cost_s / 2.0, facts.part_s("log_save_eval", part)),
        because=f"It takes {seconds(cost_s * every)} each time, which is {seconds(cost_s)} of a step where it happens "
        + (f"every {every} steps" if every > 1 else "at every step"),
    )


def engine_sleep(facts: Facts) -> Idea | None:
    """Without sleep mode vLLM keeps its memory, and need not be put to sleep and woken up.

    It saves the whole `engine` stage where the engine's share of the GPU and the trainer's peak fit side by side.
    """
    share = facts.setting("vllm", "gpu_memory_utilization")
    total, peak = facts.memory_bytes(), facts.peak_bytes()
    if not facts.setting("vllm", "enable_sleep_mode") or not share or total is None or peak is None:
        return None
    if share * total + peak > total:
        return None
    return Idea(
        kind="exact",
        stages=("engine",),
        changes=(Change(key="vllm.enable_sleep_mode", before=True, after=False),),
        saving_s=facts.breakdown.seconds("engine"),
        because=f"vLLM's {size(share * total)} and the trainer's peak of {size(peak)} fit into {size(total)} side by "
        "side",
    )


RULES = (micro_batch, gradient_checkpointing, loader_workers, waiting_reward, straggler, log_save_eval, engine_sleep)


def activation_bytes(facts: Facts) -> float | None:
    """Bytes that backward needs of one micro batch when nothing is recomputed; null where the sizes are not known.

    `NUMBERS_SAVED_PER_HIDDEN` numbers a token, layer and hidden unit, for the language model over the longest prompt
    and completion seen and for the vision tower over its patches; eager attention keeps 2.5 numbers a head and pair
    of tokens.
    """
    tokens, images, config = facts.record.tokens, facts.record.images, facts.record.trainer.model_config_json
    text: Mapping[str, Any] = config.get("text_config") or config
    hidden, layers = text.get("hidden_size"), text.get("num_hidden_layers")
    if tokens is None or not hidden or not layers:
        return None
    rows = facts.record.trainer.per_device_train_batch_size
    length = tokens.prompt.max + tokens.completion.max
    numbers = NUMBERS_SAVED_PER_HIDDEN * hidden * layers * rows * length
    if facts.record.trainer.attn_implementation == "eager":
        numbers += 2.5 * (text.get("num_attention_heads") or 1) * layers * rows * length**2
    vision: Mapping[str, Any] = config.get("vision_config") or {}
    if images is not None and images.tokens is not None and vision:
        patches = images.tokens.max * images.per_prompt * int(vision.get("spatial_merge_size") or 1) ** 2
        numbers += (
            NUMBERS_SAVED_PER_HIDDEN * (vision.get("hidden_size") or 0) * (vision.get("depth") or 0) * rows * patches
        )
    return float(numbers * facts.element_bytes)


def _configured(facts: Facts, part: str) -> int | None:
    """Optimizer steps between two of `part` by the configuration; null where it gives no number of steps."""
    every = facts.setting("grpo", CADENCE_KEYS[part])
    strategy = facts.setting("grpo", CADENCE_KEYS[part].replace("_steps", "_strategy"))
    counted = isinstance(every, int) and not isinstance(every, bool) and every >= 1
    return every if counted and strategy in (None, "steps") else None


def _long_run_s(facts: Facts, part: str) -> tuple[float, int] | None:
    """Seconds of a step that a part of `log_save_eval` takes in a long run, and the steps between two of it; null where
    none was measured or the steps between are not known.

    They come from the configuration, or, for saving and evaluating, from the distance between the measured steps in
    which it happened. Logging has a few microseconds in every step, so its steps are the multiples of the configured
    number.
    """
    timings = facts.record.timings
    row = next((row for row in timings.stages if row.name == "log_save_eval"), None)
    if row is None or part not in row.parts:
        return None
    spent, configured = row.parts[part], _configured(facts, part)
    if part == "log":
        times = [(step, s) for step, s in zip(timings.steps, spent, strict=True) if step % (configured or 1) == 0]
    else:
        times = [(step, s) for step, s in zip(timings.steps, spent, strict=True) if s > 0.0]
    every = configured
    if every is None and part != "log" and len(times) > 1:
        every = round((times[-1][0] - times[0][0]) / (len(times) - 1))
    total_s = math.fsum(timings.step_s)
    if not times or not every or total_s <= 0.0:
        return None
    scale = facts.breakdown.step_s * len(timings.step_s) / total_s
    return math.fsum(s for _, s in times) / len(times) / every * scale, every


def _divides(factor: int, facts: Facts) -> bool:
    t = facts.record.trainer
    return t.gradient_accumulation_steps % factor == 0 and t.steps_per_generation % factor == 0


def _fits(factor: int, facts: Facts) -> bool:
    free, peak = facts.free_bytes(), facts.peak_bytes()
    if free is None or peak is None:
        return False
    t = facts.record.trainer
    packed = bool(t.model_config_json.get("quantization_config"))
    weights = t.parameters / 2 if packed else t.parameters * facts.element_bytes
    return max(0.0, peak - weights) * (factor - 1) <= free


def _partition_matters(facts: Facts) -> str:
    """What in this run's loss depends on how the batch is split into micro batches; empty where nothing does."""
    loss = {key: facts.setting("grpo", key) for key in LOSS_KEYS} | {"loss_type": facts.record.trainer.loss_type}
    terms = micro_batch_terms_of_keys(loss, facts.record.trainer.model_config_json)
    return listing([term.name for term in terms]) if terms else ""
