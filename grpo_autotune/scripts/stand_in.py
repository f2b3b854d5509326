"""A configuration that stands in for a user's TRL script: it has the trainer's settings, for the knobs to turn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.config.schema import RunConfig, override
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import is_file
from grpo_autotune.knobs import TABLE
from grpo_autotune.knobs.apply import SERVER
from grpo_autotune.records.probe import ProbeRecord, TrainerFacts
from grpo_autotune.scripts.values import IMAGE_SIZE, SPEEDUPS

SECTIONS = ("grpo", "vllm")
"""Sections whose keys reach a script's `GRPOConfig`."""
AS_READ = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "num_iterations"),
    *("max_completion_length", "beta", "loss_type", "gradient_checkpointing", "dataloader_num_workers"),
)
"""`GRPOConfig` keys that a trainer's facts hold by their own names."""


def load_stand_in(script: list[str], settings: Sequence[str] = ()) -> RunConfig:
    """A configuration for a script (its path and arguments) whose trainer is not known yet. ConfigError where there is
    none, or one of the settings, `search.key=value` and `output.key=value`, is not legal."""
    if not script or not is_file(script[0]):
        fix = "Give the path of a Python file that builds a GRPOTrainer."
        raise ConfigError("no such script", where=f"--script {' '.join(script)}", fix=fix)
    values: dict[str, Any] = {
        "model": {"name_or_path": script[0]},
        "data": {"path": script[0]},
        "rewards": [{"name": script[0]}],
        "output": {"name": Path(script[0]).stem},
        "speedups": "none",  # a script has none of its own
    }
    for item in settings:
        if item.partition(".")[0] not in ("search", "output"):
            fix = "Only search and output can be set."
            raise ConfigError("a script brings its own settings", where=f"--set {item}", fix=fix)
        override(values, item)
    return RunConfig.from_dict(values)


def config_of_script(config: RunConfig, record: ProbeRecord) -> RunConfig:
    """The stand-in with the settings of the script's trainer as the probe read them, and the knobs that reach a script.
    The number of steps of its run is not known: its wall time is judged by its seconds per step."""
    values = config.to_dict()
    values["grpo"] = {**_grpo(record.trainer), **values.get("grpo", {})}
    search = values.setdefault("search", {})
    out = {row.key: None for row in TABLE if not _reaches(row.key, record)}
    search["knobs"] = {**search.get("knobs", {}), **out}
    return RunConfig.from_dict(values)


def overrides(config: RunConfig, turned: RunConfig) -> dict[str, Any]:
    """Key path -> value that a script's trainer is given for a turned configuration: every key that differs from the
    script's own `config`, those that follow from the knobs, such as accumulation, included."""
    before, after = config.to_dict(), turned.to_dict()
    changed = {
        f"{section}.{key}": value
        for section in SECTIONS
        for key, value in after.get(section, {}).items()
        if before.get(section, {}).get(key) != value
    }
    if turned.data.image_size != config.data.image_size:
        changed[IMAGE_SIZE] = turned.data.image_size
    if turned.speedups != config.speedups:
        changed[SPEEDUPS] = turned.speedups
    return changed


def _grpo(t: TrainerFacts) -> dict[str, Any]:
    values = {"max_steps": 1, **{name: getattr(t, name) for name in AS_READ}}
    if not grpo_keys()["loss_type"].allows(t.loss_type):  # of a subclass
        del values["loss_type"]
    if t.use_vllm:
        values["use_vllm"] = True
    if t.steps_per_generation != t.gradient_accumulation_steps:
        values["steps_per_generation"] = t.steps_per_generation
    return values


def _reaches(key: str, record: ProbeRecord) -> bool:
    if key == IMAGE_SIZE:
        return record.images is not None
    if key == SPEEDUPS:
        return True
    if key in (SERVER, "grpo.advantages"):
        return False  # nobody would start it when the script runs by itself
    return key.partition(".")[0] in SECTIONS and not (key.startswith("vllm.") and not record.trainer.use_vllm)
