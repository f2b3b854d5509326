"""The rule that advises the speed-ups: what TRL computes again and again, and what is left of it when it is shared."""

from __future__ import annotations

from grpo_autotune.advice.facts import PASSES, Facts, Idea
from grpo_autotune.records.report import Change
from grpo_autotune.speedups.base import SERVED
from grpo_autotune.units import percent


def speed_ups(facts: Facts) -> Idea | None:
    """With `speedups: auto`, a prompt goes through the model once a micro batch and group, an image is decoded once.

    A micro batch with g completions of C tokens on a prompt of P has P + g C tokens instead of g (P + C); passes are
    assumed to take time by tokens. Decoding and processing shrink to once an image. What sharing the prompt saves in
    generation is not predicted. LoRA's dropout and other attention kernels keep the passes as they are.
    """
    t, tokens, images = facts.record.trainer, facts.record.tokens, facts.record.images
    if t.speedups or tokens is None or (facts.config or {}).get("speedups", "none") != "none":
        return None
    prompt, completion = tokens.prompt.mean, tokens.completion.mean
    together = min(t.num_generations, t.per_device_train_batch_size)
    left = (prompt + together * completion) / (together * (prompt + completion))
    shares = t.attn_implementation in SERVED and not (t.peft or {}).get("lora_dropout")
    saving = (1.0 - left) * sum(facts.breakdown.seconds(stage) for stage in PASSES) if shares else 0.0
    stages = list(PASSES) if saving else []
    because = (
        f"{together} completions of a prompt share a micro batch; with {prompt:.0f} tokens of prompt and "
        f"{completion:.0f} of completion {percent(1.0 - left)} of what the log-prob and backward passes compute is a "
        "prompt that was computed before, and they are assumed to take time by tokens"
        if saving
        else "Images are decoded and processed again and again"
    )
    if images is not None:
        for stage, times in (("data", images.decodes_per_image), ("prompt", images.processings_per_image)):
            if times > 1.0:
                saving += (1.0 - 1.0 / times) * facts.breakdown.seconds(stage)
                stages.append(stage)
    if not saving:
        return None
    return Idea(
        kind="exact",
        stages=tuple(stages),
        changes=(Change(key="speedups", before="none", after="auto"),) if facts.config is not None else (),
        action="" if facts.config is not None else "call grpo_autotune.speed_up(trainer) before trainer.train()",
        saving_s=saving,
        because=because,
        caveat="" if t.use_vllm else "What generation gains is not predicted",
    )
