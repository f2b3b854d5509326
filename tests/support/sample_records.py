"""Hand-written probe records: what a probe of three typical runs would hold."""

from __future__ import annotations

from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import Gpu, Machine
from grpo_autotune.records.probe import (
    STAGES,
    ImageFacts,
    Phase,
    ProbeRecord,
    RankTimings,
    RewardCall,
    Spread,
    StageRow,
    StageTimings,
    TokenFacts,
    TrainerFacts,
    Utilisation,
)
from grpo_autotune.records.rewards import CallTimes, RemoteCalls
from grpo_autotune.records.rollout import EngineFacts, Fidelity, FidelityPart
from grpo_autotune.rollout.fidelity.causes import Evidence, diagnose

GIB = 1024**3
CPU_MACHINE = Machine(
    cpu="Test CPU",
    cores=4,
    memory_bytes=16 * GIB,
    gpus=(),
    python="3.11",
    platform="test",
    versions={},
    fingerprint="test",
)
GPU_MACHINE = CPU_MACHINE.model_copy(
    update={
        "cores": 32,
        "memory_bytes": 256 * GIB,
        "gpus": (Gpu(name="Test GPU", memory_bytes=80 * GIB, capability="9.0"),),
    }
)
VL_CONFIG: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
        "vocab_size": 16_000,
    },
    "vision_config": {
        "hidden_size": 64,
        "depth": 3,
        "num_heads": 4,
        "intermediate_size": 128,
        "out_hidden_size": 128,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "num_position_embeddings": 576,
        "deepstack_visual_indexes": [0],
    },
}
TEXT_CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 12288,
    "vocab_size": 151936,
}


def timings(
    seconds: dict[str, float],
    parts: dict[tuple[str, str], float] | None = None,
    *,
    peak_bytes: int = 2 * GIB,
    cycle: int = 1,
) -> StageTimings:
    """Three steps around the given seconds by stage: the first a tenth faster, the last a tenth slower."""
    scale = (0.9, 1.0, 1.1)
    rows = []
    for name in STAGES:
        spent = seconds.get(name, 0.0)
        rows.append(
            StageRow(
                name=name,
                per_step_s=[spent * k for k in scale],
                parts={part: [s * k for k in scale] for (stage, part), s in (parts or {}).items() if stage == name},
                calls=1.0 if spent else 0.0,
                seams=[f"{name}_seam"],
                peak_bytes=peak_bytes if spent else None,
            )
        )
    total = sum(seconds.values())
    return StageTimings(
        steps=[3, 4, 5], step_s=[total * k for k in scale], warmup_s=[2 * total], stages=rows, cycle=cycle
    )


def spread(p50: float, p90: float, largest: float) -> Spread:
    return Spread(mean=p50, p50=p50, p90=p90, p99=largest, max=largest)


def trainer_facts(**changes: Any) -> TrainerFacts:
    """A small vision-language run on the CPU, with LoRA and a reference pass."""
    plain: dict[str, Any] = {
        "model_config_json": VL_CONFIG,
        "model_class": "Qwen3VLForConditionalGeneration",
        "parameters": 3_200_000,
        "trainable_parameters": 110_000,
        "peft": {"peft_type": "LORA", "r": 8},
        "dtype": "float32",
        "device": "cpu",
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        "num_generations": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "steps_per_generation": 8,
        "num_iterations": 1,
        "generation_batch_size": 16,
        "max_completion_length": 32,
        "beta": 0.04,
        "loss_type": "dapo",
        "has_ref_model": False,
        "use_vllm": False,
        "vllm_mode": None,
        "dataloader_num_workers": 0,
        "world_size": 1,
        "reward_weights": [1.0, 0.2],
    }
    return TrainerFacts(**plain | changes)


def token_facts(**changes: Any) -> TokenFacts:
    plain: dict[str, Any] = {
        "prompt": spread(160, 165, 170),
        "completion": spread(12, 14, 16),
        "prompt_per_step": 2560.0,
        "completion_per_step": 192.0,
        "padding_share": 0.06,
        "truncated_share": 0.05,
        "groups": 20,
        "dead_groups": 2,
        "pass_rates": [0.5, 0.25, 0.75, 0.375] * 5,
        "reward_mean": 0.42,
    }
    return TokenFacts(**plain | changes)


def image_facts(**changes: Any) -> ImageFacts:
    plain: dict[str, Any] = {
        "pixels": spread(384 * 384, 384 * 384, 512 * 384),
        "per_prompt": 1.0,
        "tokens": spread(144, 144, 192),
        "tokens_at": {"384": 144.0, "512": 256.0, "768": 576.0, "1024": 1024.0},
        "distinct_per_step": 2.0,
        "decodes_per_image": 66.0,
        "processings_per_image": 16.0,
    }
    return ImageFacts(**plain | changes)


def demo_record(**changes: Any) -> ProbeRecord:
    """A small vision-language run on a CPU."""
    plain: dict[str, Any] = {
        "timings": timings(
            {
                "generation": 1.2,
                "policy_logprob": 0.9,
                "reference_logprob": 0.7,
                "reward": 0.01,
                "backward": 1.6,
                "data": 0.3,
                "prompt": 0.25,
                "optimizer": 0.02,
                "log_save_eval": 0.04,
                "other": 0.02,
            },
            {
                ("policy_logprob", "training_forward"): 0.9,
                ("data", "load"): 0.28,
                ("data", "split"): 0.02,
                ("log_save_eval", "log"): 0.04,
            },
        ),
        "trainer": trainer_facts(),
        "tokens": token_facts(),
        "images": image_facts(),
        "rewards": [
            RewardCall(name="right_digit", is_async=False, calls=3, mean_s=0.006, max_s=0.008),
            RewardCall(name="format", is_async=False, calls=3, mean_s=0.004, max_s=0.005),
        ],
        "utilisation": [
            Utilisation(stage=name, samples=8, cpu_percent=240.0, rss_bytes=2 * GIB)
            for name in ("generation", "policy_logprob", "backward")
        ],
        "startup": [
            Phase(name="import", seconds=6.1),
            Phase(name="data", seconds=0.8),
            Phase(name="model", seconds=0.4),
            Phase(name="trainer", seconds=0.3),
            Phase(name="first_step", seconds=9.7),
        ],
        "versions": {"torch": "2.13.0", "trl": "1.16.0"},
    }
    return ProbeRecord(**plain | changes)


def remote_calls(**changes: Any) -> RemoteCalls:
    """A judge on three generations of 16 completions, four at once: each takes a second, the slowest three."""
    plain: dict[str, Any] = {
        "name": "judge",
        "kind": "judge",
        "batches": 3,
        "rows": 48,
        "calls": 48,
        "retries": 0,
        "rate_limited": 0,
        "fallbacks": 0,
        "cache_hits": 0,
        "failures": {},
        "providers": {"gpt": 48},
        "first_call_s": 3.5,
        "wait_s": CallTimes(p50=1.9, p95=4.0, p99=4.4),
        "call_s": CallTimes(p50=1.0, p95=2.5, p99=3.0),
        "retry_s": None,
        "batch_s": 16.5,
        "concurrency": 4,
        "tokens_in": 48_000,
        "tokens_out": 2_400,
        "cost": 0.024,
    }
    return RemoteCalls(**plain | changes)


def judged_record(*calls: RemoteCalls, **changes: Any) -> ProbeRecord:
    """The small run with a judge that it waits 5.5 seconds of a step for, with a reference pass of 0.7."""
    seconds = {"generation": 1.2, "policy_logprob": 0.9, "reference_logprob": 0.7, "reward": 5.5, "backward": 1.6}
    plain: dict[str, Any] = {
        "timings": timings(seconds, {("policy_logprob", "training_forward"): 0.9}),
        "rewards": [RewardCall(name="judge", is_async=True, calls=3, mean_s=5.5, max_s=6.0)],
        "remote": list(calls or (remote_calls(),)),
    }
    return demo_record(**plain | changes)


def stale_fidelity() -> Fidelity:
    """Of an engine that never gets new weights."""
    parts = [
        FidelityPart(rows="text", when=when, seen="new", mean_nats=mean, max_nats=largest, tokens=7200)
        for when, mean, largest in (("first", 0.01, 0.2), ("later", 0.61, 4.2))
    ]
    moved: dict[str, Any] = {"moved": False, "trainer_moved_nats": 0.6, "engine_moved_nats": 0.0}
    evidence = Evidence(
        threshold_nats=0.05,
        parts=tuple(parts),
        text_first=0.01,
        text_later=0.6,
        prompts=48,
        formats=("bfloat16", "bfloat16"),
        **moved,
    )
    cause, causes = diagnose(evidence)
    return Fidelity(
        mean_nats=0.31,
        max_nats=4.2,
        tokens=14400,
        threshold_nats=0.05,
        ok=False,
        dropped_share=0.4,
        dropped_of="samples",
        shift_nats=0.105,
        sampling={"top_p": 0.9},
        text_nats=0.3,
        updates_checked=2,
        parts=parts,
        cause=cause,
        causes=causes,
        **moved,
    )


def vllm_record(**changes: Any) -> ProbeRecord:
    """A text run of 8 B parameters on one GPU with vLLM in the same process, whose samples are off."""
    plain: dict[str, Any] = {
        "timings": timings(
            {
                "generation": 9.0,
                "policy_logprob": 6.0,
                "backward": 11.0,
                "reward": 4.0,
                "weight_sync": 1.5,
                "engine": 1.0,
                "optimizer": 0.3,
                "log_save_eval": 2.0,
                "other": 0.2,
            },
            {
                ("policy_logprob", "old_policy"): 2.8,
                ("policy_logprob", "training_forward"): 3.2,
                ("log_save_eval", "log"): 0.1,
                ("log_save_eval", "evaluate"): 1.9,
            },
            peak_bytes=40 * GIB,
        ),
        "trainer": trainer_facts(
            model_config_json=TEXT_CONFIG,
            model_class="Qwen3ForCausalLM",
            parameters=8_200_000_000,
            trainable_parameters=8_200_000_000,
            peft=None,
            dtype="bfloat16",
            device="cuda",
            gradient_checkpointing=True,
            max_completion_length=1024,
            beta=0.0,
            use_vllm=True,
            vllm_mode="colocate",
        ),
        "tokens": token_facts(
            prompt=spread(150, 220, 300),
            completion=spread(300, 500, 1024),
            prompt_per_step=2400.0,
            completion_per_step=4800.0,
            padding_share=0.55,
        ),
        "rewards": [RewardCall(name="judge", is_async=False, calls=3, mean_s=4.0, max_s=6.0)],
        "utilisation": [
            Utilisation(stage="reward", samples=20, cpu_percent=4.0, gpu_percent=0.0, power_w=110.0),
            Utilisation(stage="backward", samples=50, cpu_percent=100.0, gpu_percent=96.0, power_w=520.0),
        ],
        "fidelity": stale_fidelity(),
        "engine": EngineFacts(
            generations=3,
            prompt_tokens=7200,
            cached_tokens=5400,
            prefill_tokens=1800,
            decode_tokens=14352,
            prefill_s=0.3,
            decode_s=24.1,
            prefill_tokens_per_s=6000.0,
            decode_tokens_per_s=595.5,
            running_mean=11.2,
            running_max=16,
            waiting_max=0,
            kv_use_max=0.38,
            kv_tokens=402_000,
            start_s=41.0,
            sleep_s=0.6,
            wake_s=0.4,
            sync_s=1.5,
            syncs=3,
            sync_bytes=16_400_000_000,
            sync_way="merged",
        ),
        "weight_sync_bytes": 16_400_000_000,
    }
    return ProbeRecord(**plain | changes)


def config_of(record: ProbeRecord, **sections: Any) -> RunConfig:
    """A configuration whose run would have a record's trainer, with keys of its sections changed or added."""
    t = record.trainer
    grpo: dict[str, Any] = {
        "per_device_train_batch_size": t.per_device_train_batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation_steps,
        "num_generations": t.num_generations,
        "num_iterations": t.num_iterations,
        "max_completion_length": t.max_completion_length,
        "gradient_checkpointing": t.gradient_checkpointing,
        "beta": t.beta,
        "loss_type": t.loss_type,
        "use_vllm": t.use_vllm,
        "max_steps": 100,
    }
    values: dict[str, Any] = {
        "model": {"name_or_path": "nowhere/model"},
        "data": {"path": "rows.jsonl"},
        "rewards": [{"name": "exact_match"}],
        "grpo": grpo | sections.pop("grpo", {}),
        "peft": {"r": t.peft["r"]} if t.peft else None,
        "speedups": t.speedups or "none",
    }
    return RunConfig.from_dict(values | sections | {"data": values["data"] | sections.get("data", {})})


def two_rank_record() -> ProbeRecord:
    """The small run on two processes, of which the second is slower at generating."""
    fast = {"generation": 1.2, "policy_logprob": 0.9, "backward": 1.6, "sync_wait": 0.8, "other": 0.02}
    slow = fast | {"generation": 2.0, "sync_wait": 0.0}
    return demo_record(
        timings=timings(fast, {("policy_logprob", "training_forward"): 0.9}),
        trainer=trainer_facts(world_size=2, generation_batch_size=32, beta=0.0),
        ranks=[RankTimings(rank=r, step_s=4.52, stages=s) for r, s in enumerate((fast, slow))],
    )
