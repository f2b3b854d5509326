"""accelerate's configuration (`accelerate launch --config_file`) beside that of a framework."""

from dataclasses import replace
from typing import Any

from grpo_autotune.config.sections.fsdp import of_file
from grpo_autotune.interop.frameworks import deepspeed
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import Translation

PREFIX = "launch."
ZERO = f"{PREFIX}deepspeed_config."
FSDP = f"{PREFIX}fsdp_config."
translate = deepspeed.translate


def with_launch(source: Source) -> Source:
    """The source with the launcher's options under `PREFIX`, over accelerate's file, and with its DeepSpeed file."""
    options = {PREFIX + key: setting for key, setting in source.launch.items() if key != "config_file"}
    source = replace(source, settings={**options, **source.settings})
    source = deepspeed.with_file(source, source.launch.get("config_file"), PREFIX)
    return deepspeed.with_file(source, source.settings.get(f"{ZERO}deepspeed_config_file"), deepspeed.PREFIX)


def processes(to: Translation) -> int | None:
    """Training processes by the launcher: of `accelerate launch`, its option or its file, or of torchrun."""
    if to.given(f"{PREFIX}nproc_per_node"):
        return int(to.number(f"{PREFIX}nproc_per_node") * (to.number(f"{PREFIX}nnodes") or 1))
    count = to.number(f"{PREFIX}num_processes")
    return None if count is None else int(count)


def apply(to: Translation, *, adapter: bool) -> None:
    """Verdicts of the launcher's settings. Call it when all else is set; `adapter` as in `deepspeed.apply`."""
    for key in [key for key in to.source.settings if key.startswith(PREFIX)]:
        if key == f"{PREFIX}mixed_precision":
            _precision(to, key)
        else:
            to.speed(key, "how processes are started and share the work")
    if (stage := to.value(f"{ZERO}zero_stage")) is not None:
        names = {"optimizer": "offload_optimizer_device", "parameters": "offload_param_device"}
        options: dict[str, Any] = {ours: str(to.value(f"{ZERO}{name}") or "none") for ours, name in names.items()}
        if to.value(f"{ZERO}zero3_save_16bit_model"):
            options["stage3_gather_16bit_weights_on_model_save"] = True
        clip = {"gradient_clipping": to.value(f"{ZERO}gradient_clipping", "auto")}
        deepspeed.apply(to, f"{ZERO}zero_stage", deepspeed.zero(int(stage), **options) | clip, adapter=adapter)
    elif to.given(f"{ZERO}deepspeed_config_file"):
        deepspeed.apply(to, f"{ZERO}deepspeed_config_file", to.value(f"{ZERO}deepspeed_config_file"), adapter=adapter)
    elif to.value(f"{PREFIX}distributed_type") == "FSDP":
        sharing = {key.removeprefix(FSDP): to.value(key) for key in to.source.settings if key.startswith(FSDP)}
        fully_sharded(to, f"{PREFIX}distributed_type", sharing)


def fully_sharded(to: Translation, key: str, options: dict[str, Any]) -> None:
    """The verdict of `key`, which asks for FSDP with these options of accelerate's file."""
    if (to.world_size or 1) > 1:
        options = of_file(options)
        checkpointing = {"grpo.gradient_checkpointing": False} if options.get("activation_checkpointing") else {}
        to.speed(key, "FSDP2", {"grpo.fsdp_config": options, **checkpointing})
    else:
        to.speed(key, deepspeed.ALONE)


def _precision(to: Translation, key: str) -> None:
    """bf16 and fp16 of the run win over the launcher's (transformers/training_args.py); TRL's default is bf16."""
    if to.given("bf16") or to.given("fp16") or to.value("bf16") is None:
        return to.inert(key, "the run's own bf16 or fp16 wins")
    return to.converted(key, {f"grpo.{name}": str(to.value(key)) == name for name in ("bf16", "fp16")})
