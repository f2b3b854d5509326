"""accelerate's configuration (`accelerate launch --config_file`) beside that of a framework."""

from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.frameworks import deepspeed
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import Translation

PREFIX = "accelerate."
PROCESSES = ("num_processes", "num_machines", "machine_rank", "gpu_ids")
LAUNCH = "how processes are started, which the launcher says"
"""Note of the keys that decide nothing of the run."""


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """ConfigError: alone, such a file says nothing of what is trained."""
    what = "a configuration of accelerate says how processes are started, and not what is trained"
    fix = "Name the training configuration or script that goes with it; accelerate launch --config_file takes this one."
    raise ConfigError(what, where=str(source.path), fix=fix)


def with_launch(source: Source) -> Source:
    """The source with the settings of accelerate, `accelerate.` before their names: of the file that
    `accelerate launch` is given, of the DeepSpeed file that this one names, and of the launcher's options."""
    named = source.launch.get("config_file")
    source = source if named is None else deepspeed.with_file(source, named.value, PREFIX)
    file = source.settings.get(f"{PREFIX}deepspeed_config.deepspeed_config_file")
    return source if file is None else deepspeed.with_file(source, file.value, "deepspeed.")


def processes(to: Translation) -> int | None:
    """Training processes by the launcher's option, else by its file; None where neither says."""
    option = to.source.launch.get("num_processes")
    count = option.value if option is not None else to.value(f"{PREFIX}num_processes")
    return count if isinstance(count, int) and count > 0 else None


def apply(to: Translation, *, adapter: bool) -> None:
    """Give each setting of accelerate its verdict. Call it when the batch and the other keys are set; `adapter` as in
    `deepspeed.apply`."""
    keys = {name.removeprefix(PREFIX): name for name in to.source.settings if name.startswith(PREFIX)}
    for name, key in keys.items():
        section = name.partition(".")[0]
        if name == "mixed_precision":
            _precision(to, key)
        elif section in ("deepspeed_config", "fsdp_config"):
            to.speed(key, "how GPUs share the work" if (to.world_size or 1) > 1 else "nothing to share on one process")
        else:
            to.speed(key, "the number of processes" if name in PROCESSES else LAUNCH)
    if (stage := keys.get("deepspeed_config.zero_stage")) is not None:
        deepspeed.apply(to, stage, _zero(to), adapter=adapter)
    elif (file := keys.get("deepspeed_config.deepspeed_config_file")) is not None:
        deepspeed.apply(to, file, str(to.value(file)), adapter=adapter)
    sharded = {name.partition(".")[2]: to.value(key) for name, key in keys.items() if name.startswith("fsdp_config.")}
    if sharded and to.value(f"{PREFIX}distributed_type") == "FSDP":
        fully_sharded(to, next(key for name, key in keys.items() if name.startswith("fsdp_config.")), sharded)


def fully_sharded(to: Translation, key: str, options: dict[str, Any]) -> None:
    """The verdict of `key`, which asks for FSDP with these options (a prefix `fsdp_` is transformers' to strip)."""
    if (to.world_size or 1) > 1:
        to.speed(key, "FSDP", {"grpo.fsdp": "full_shard auto_wrap", "grpo.fsdp_config": options})
    else:
        to.speed(key, "nothing to share on one process: dropped")


def _precision(to: Translation, key: str) -> None:
    """The run's own bf16 or fp16 wins over the launcher's (transformers/training_args.py)."""
    value = str(to.value(key))
    if to.value("bf16") is None or to.values.get("grpo.bf16") or to.values.get("grpo.fp16") or to.given("bf16"):
        to.inert(key, "the run's own bf16 or fp16 wins")
    elif value in ("bf16", "fp16"):
        to.same(key, f"grpo.{value}", True)
    else:
        to.converted(key, {"grpo.bf16": False}, "TRL's default is bf16")


def _zero(to: Translation) -> dict[str, Any]:
    """DeepSpeed's configuration that accelerate makes of its own keys (accelerate/utils/dataclasses.py)."""

    def said(name: str, default: Any) -> Any:
        value = to.value(f"{PREFIX}deepspeed_config.{name}")
        return default if value is None else value

    more = {"stage3_gather_16bit_weights_on_model_save": True} if said("zero3_save_16bit_model", False) else {}
    devices = {
        "optimizer": said("offload_optimizer_device", "none"),
        "parameters": said("offload_param_device", "none"),
    }
    config = deepspeed.zero(said("zero_stage", 2), **devices, **more)
    clip = said("gradient_clipping", "auto")
    return config if clip == "auto" else {**config, "gradient_clipping": clip}
