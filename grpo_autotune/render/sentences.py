"""A report's facts as sentences, for any renderer."""

from grpo_autotune.records.probe import Utilisation
from grpo_autotune.records.report import Report
from grpo_autotune.units import amount, listing, percent, plural, seconds, size

LEGEND = {
    "generation": "sampling the completions",
    "policy_logprob": "log-probs of the model in training (old_policy: once, without gradient; training_forward: in "
    "the loss)",
    "reference_logprob": "log-probs of the reference model, for the KL term",
    "reward": "the reward functions",
    "backward": "the gradients",
    "data": "reading rows and decoding images",
    "prompt": "chat template, tokenizer and image processor",
    "tools": "calls of tools, and resets of environments",
    "weight_sync": "pushing the weights to vLLM",
    "engine": "vLLM's sleep and wake-up",
    "sync_wait": "waiting for other ranks, and what passes between them",
    "optimizer": "clipping the gradient and updating the weights",
    "log_save_eval": "logging, checkpoints and evaluation",
    "other": "everything between these (score: in TRL's generate-and-score; step: in the training loop)",
}
PHASE_WORDS = {
    "import": "importing libraries",
    "data": "preparing the data",
    "model": "loading the model",
    "engine": "starting vLLM",
    "trainer": "building the trainer",
    "first_generation": "the first generation",
    "first_reward": "the first rewards",
    "first_step": "the first step",
    "first_update": "the rest of the first step",
    "script": "the script before it built the trainer",
    "before_attach": "the script before attach()",
}


def header_lines(report: Report) -> list[str]:
    """Speed, model, batch and machine of the run."""
    warm = f" after {len(report.warmup_s)} for warming up" if report.warmup_s else ""
    lines = [f"{seconds(report.step_s)} per optimizer step ({_timed(report)}{warm})"]
    rates = report.rates
    if rates is not None:
        lines.append(
            f"{amount(rates.tokens_per_s)} tokens/s, {amount(rates.completion_tokens_per_s)} of them generated"
        )
    if rates is not None and rates.useful_completions_per_s is not None:
        useful = amount(rates.useful_completions_per_s)
        meaning = rates.useless or "those in groups whose rewards differ, less one per group"
        lines.append(f"{useful} useful completions/s ({meaning})")
    facts = [f"Model:   {_model(report)}", f"Batch:   {_batch(report)}", f"Machine: {_machine(report)}"]
    if "sharding" in report.runtime:
        facts.append(f"Sharing: {report.runtime['sharding']}")
    if report.trainer.speedups:
        facts.append(f"Speed-ups: {', '.join(report.trainer.speedups)}")
    return [*lines, "", *facts]


def _timed(report: Report) -> str:
    """The steps, or whole cycles of generating and reusing, that the step's seconds are the median of."""
    count, cycle = len(report.steps), report.cycle
    if cycle > 1 and (cycles := count // cycle):
        return f"median of {cycles} cycles of {cycle} steps" if cycles > 1 else f"mean of one cycle of {cycle} steps"
    return f"median of {count} steps" if count > 1 else "one step"


def _model(report: Report) -> str:
    t = report.trainer
    trained = "all trained" if t.trainable_parameters == t.parameters else f"{_count(t.trainable_parameters)} trained"
    adapter = "" if t.peft is None else f" by {t.peft.get('peft_type') or 'an adapter'}".replace("PeftType.", "")
    engine = f"vLLM ({t.vllm_mode})" if t.use_vllm else "generate()"
    return f"{t.model_class}, {_count(t.parameters)} parameters, {trained}{adapter}, {t.dtype}; sampling by {engine}"


def _batch(report: Report) -> str:
    t, passes = report.trainer, report.trainer.gradient_accumulation_steps
    micro = f"{passes} micro batch{'' if passes == 1 else 'es'} of {t.per_device_train_batch_size}"
    ranks = f" on each of {t.world_size} ranks" if t.world_size > 1 else ""
    reuse = f"; each generated batch serves {report.cycle} steps" if report.cycle > 1 else ""
    return f"{t.rows} completions per step ({micro}{ranks}), {t.num_generations} completions per prompt{reuse}"


def _machine(report: Report) -> str:
    machine = report.machine or {}
    cpu = f"{machine.get('cpu') or 'CPU'}, {plural(machine['cores'], 'core')}" if machine else ""
    memory = f", {size(machine['memory_bytes'])} memory" if machine.get("memory_bytes") else ""
    cards = listing([f"{gpu['name']} ({size(gpu['memory_bytes'])})" for gpu in machine.get("gpus") or []])
    return f"{'; '.join(filter(None, (cards, cpu + memory))) or 'not known'}; the model is on {report.trainer.device}"


def _count(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def legend(report: Report) -> str:
    """The meaning of the stages that ran, and of the columns."""
    stages = [row.name for row in report.stages if row.self_s != 0.0 or row.calls > 0.0]
    ran = [f"{name}: {LEGEND[name]}" for name in stages if name in LEGEND]
    text = (
        "; ".join(ran)
        + ". Spread: half of the distance between the quartiles over steps. Per token: completion tokens "
    )
    text += "for generation, all tokens elsewhere"
    if report.trainer.num_iterations > 1:
        text += f" (in policy_logprob, backward and optimizer each counts {report.trainer.num_iterations} times, as "
        text += "often as it is trained on)"
    text += "."
    if report.trainer.world_size > 1:
        text += " Of sync_wait gather_parameters and reduce_gradients happen within the other stages and are taken out "
        text += "of them; exchange is what TRL and accelerate gather, reduce and wait for."
    if any(row.limit_share is not None for row in report.stages):
        text += " Of limit: how near to the matrix rate or memory bandwidth that was measured on this machine."
    return text


def startup_line(report: Report) -> str:
    """The line of seconds before the first step, by phase."""
    phases = [f"{PHASE_WORDS.get(phase.name, phase.name)} {seconds(phase.seconds)}" for phase in report.startup]
    return f"{seconds(sum(phase.seconds for phase in report.startup))}: {listing(phases)}."


def facts_lines(report: Report) -> list[str]:
    """Sentences on tokens, images, rewards and devices."""
    return [*_tokens(report), *_images(report), *_rewards(report), *_devices(report)]


def _tokens(report: Report) -> list[str]:
    tokens = report.tokens
    if tokens is None:
        return []
    p, c = tokens.prompt, tokens.completion
    lines = [
        f"Prompts have {amount(p.p50)} tokens (median; longest {amount(p.max)}), completions {amount(c.p50)} "
        f"(longest {amount(c.max)}, at most {report.trainer.max_completion_length} allowed).",
        f"{percent(tokens.truncated_share)} of the completions were cut off before they ended; "
        f"{percent(tokens.padding_share)} of what the log-prob passes compute is padding.",
    ]
    if tokens.groups:
        lines.append(
            f"Mean reward {tokens.reward_mean:.3g}. {tokens.dead_groups} of {tokens.groups} groups had equal rewards, "
            "and teach nothing."
        )
    return lines


def _images(report: Report) -> list[str]:
    images = report.images
    if images is None:
        return []
    px = images.pixels
    many = f"have {amount(px.p50)} pixels (median; 90% at most {amount(px.p90)}, 99% at most {amount(px.p99)})"
    pixels = f"Images {many}" if px.max > px.mean else f"All images have {amount(px.mean)} pixels"
    lines = [f"{pixels}." if images.tokens is None else f"{pixels} and take {amount(images.tokens.mean)} tokens each."]
    if images.tokens_at:
        sizes = [f"{amount(count)} at {side} px" for side, count in images.tokens_at.items()]
        lines.append(f"Tokens per image by the length of its longest side: {listing(sizes)}.")
    workers = report.trainer.dataloader_num_workers
    decoded = "decoded by loader workers" if workers else f"decoded {images.decodes_per_image:.3g} times"
    lines.append(
        f"Each of {amount(images.distinct_per_step)} distinct images per step is {decoded} and processed "
        f"{images.processings_per_image:.3g} times."
    )
    return lines


def _rewards(report: Report) -> list[str]:
    rows = [
        f"{call.name} {seconds(call.mean_s)} (slowest {seconds(call.max_s)}{', asynchronous' if call.is_async else ''})"
        for call in report.rewards
    ]
    return [f"Reward functions, per call: {listing(rows)}."] if rows else []


def _devices(report: Report) -> list[str]:
    used = [row.utilisation for row in report.stages if row.utilisation is not None]
    if not sum(u.samples for u in used):
        return []
    cpu, gpu, power = (_mean(used, name) for name in ("cpu_percent", "gpu_percent", "power_w"))
    words, profiled = [], report.profiled
    if profiled is not None and (busy := profiled.busy_share(*(row.stage for row in profiled.stages))) is not None:
        words.append(f"the GPU worked {percent(busy)} of the time (by the kernels of step {profiled.step})")
    elif gpu is not None:
        words.append(f"the GPU was in use {gpu:.0f}% of the time (by NVML, for which any kernel counts)")
    if power is not None:
        words.append(f"drew {power:.0f} W")
    if cpu is not None:
        cores = f"{cpu / 100.0:.2g}"
        words.append(f"this process used {cores} processor {'core' if cores == '1' else 'cores'}")
    if report.others is not None:
        words.append(report.others.words)
    return [f"On average {listing(words)}."] if words else []


def _mean(used: list[Utilisation], name: str) -> float | None:
    pairs = [(u.samples, value) for u in used if (value := getattr(u, name)) is not None]
    return sum(samples * value for samples, value in pairs) / sum(samples for samples, _ in pairs) if pairs else None
