"""The `grpo` and `vllm` sections as TRL's own `GRPOConfig`; the few derived values are printed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from trl import GRPOConfig

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.rollout.colocate.unlock import unlock
from grpo_autotune.rollout.failures import engine_failure
from grpo_autotune.rollout.options import EngineOptions

TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "swanlab": ("swanlab",),
    "clearml": ("clearml",),
    "neptune": ("neptune",),
    "dvclive": ("dvclive",),
    "codecarbon": ("codecarbon",),
}
"""`grpo.report_to` -> packages of which one must be there (transformers/integrations/integration_utils.py)."""


@dataclass(frozen=True)
class Arguments:
    """Arguments of TRL, and one line for each value that was derived rather than written."""

    grpo: GRPOConfig
    notes: tuple[str, ...]


def grpo_arguments(
    config: RunConfig, *, output_dir: str, reward_weights: list[float], overrides: Mapping[str, Any]
) -> Arguments:
    """Build the arguments: the user's keys verbatim, then what follows from them and from this machine.

    Args:
        config: The run.
        output_dir: Where checkpoints go.
        reward_weights: One weight per reward function.
        overrides: Keys that take precedence over everything (a probe's `max_steps`, for instance).

    Raises:
        ConfigError: TRL or transformers refuses a value.
        EnvironmentProblem: A tracker of `grpo.report_to` is not installed.
    """
    keys: dict[str, Any] = {**config.grpo, **config.vllm.grpo_kwargs(), **overrides}
    check_trackers(keys.get("report_to"))
    notes = _without_accelerator(keys)
    keys["trust_remote_code"] = config.model.trust_remote_code
    if config.model.revision is not None:  # TRL loads a reference model by name: the same revision, then
        keys["model_init_kwargs"] = {"revision": config.model.revision}
    keys["logging_nan_inf_filter"] = False  # it would replace a NaN loss by the mean of those before
    keys["reward_weights"] = reward_weights
    keys.setdefault("output_dir", output_dir)
    with as_config_errors("grpo"):
        return Arguments(GRPOConfig(**keys), tuple(notes))


@contextmanager
def unlocked_engine(config: RunConfig) -> Iterator[None]:
    """Trainers built inside get the engine that the `vllm` section describes, corrected for images and sized for those
    of their data."""
    if not config.use_vllm:
        yield
        return
    options = EngineOptions.of_section(config.vllm)
    if config.model.revision is not None:  # TRL loads the engine's copy by name
        keys = {"revision": config.model.revision, "tokenizer_revision": config.model.revision}
        options = replace(options, keys={**keys, **options.keys})
    with unlock(options):
        yield


def check_trackers(report_to: str | list[str] | None) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        EnvironmentProblem: Naming tracker and package.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        packages = TRACKERS.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise EnvironmentProblem(
                f"{name} is asked for, and the package {packages[0]} is not installed",
                where="grpo.report_to",
                fix=f"Install it (pip install {packages[0]}), or remove {name}",
            )


@contextmanager
def as_config_errors(where: str) -> Iterator[None]:
    """Turn what TRL, transformers and PEFT raise about their arguments into one line.

    Raises:
        ConfigError: For a `ValueError`, `TypeError` or `NotImplementedError`, and for an engine that finds no memory.
        EnvironmentProblem: For an `ImportError`, or an `OSError`: a vLLM server that cannot be reached, a full disk.
    """
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        if (failure := engine_failure(error)) is not None:
            raise failure.error() from error
        raise ConfigError(str(error).strip() or type(error).__name__, where=where) from error
    except (RuntimeError, AssertionError) as error:
        if (failure := engine_failure(error)) is None:
            raise
        raise failure.error() from error
    except (ImportError, OSError) as error:  # what requests raises is an OSError, not a ConnectionError
        raise EnvironmentProblem(str(error).strip(), where=where) from error


def _without_accelerator(keys: dict[str, Any]) -> list[str]:
    """Fill in what a machine without a GPU needs, where the user left it open; what was written stays."""
    notes = []
    if not torch.accelerator.is_available():
        keys.setdefault("use_cpu", True)
    if keys.get("use_cpu") and keys.get("bf16") is None and not keys.get("fp16"):
        keys["bf16"] = False
        notes.append("training on the CPU without mixed precision (grpo.bf16 false; TRL's default is true on a GPU)")
    return notes
