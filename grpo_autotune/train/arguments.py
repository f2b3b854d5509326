"""The `grpo` and `vllm` sections as TRL's own `GRPOConfig`; the few derived values are printed."""

import inspect
import linecache
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from transformers import GenerationConfig, ProcessorMixin
from trl import GRPOConfig
from trl.trainer import grpo_trainer

from grpo_autotune.config.messages import from_validation
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.branches import start_weights
from grpo_autotune.config.sections.checkpoints import CheckpointsSection
from grpo_autotune.config.sections.fsdp import USE, VARIABLES, WHERE, asked
from grpo_autotune.config.zero import ADAMW, deepspeed_keys
from grpo_autotune.console import Heartbeat
from grpo_autotune.errors import ConfigError, EnvironmentProblem, nearest_hint, shortened
from grpo_autotune.processes.fresh import free_port
from grpo_autotune.rollout.colocate.unlock import unlock
from grpo_autotune.rollout.failures import engine_failure
from grpo_autotune.rollout.options import EngineOptions
from grpo_autotune.runs.choose import STRATEGIES, mode_of
from grpo_autotune.seams.sharding import asked_for

LAUNCHED = {
    name: value
    for name, value in os.environ.items()
    if name in (USE, "ACCELERATE_USE_DEEPSPEED") or name[:5] == "FSDP_"
}
"""Variables of `accelerate launch`, as they were before a trainer of this process set its own."""

FORCED = "zero_force_ds_cpu_optimizer"
INSTEAD = f"grpo.deepspeed.{FORCED}: false, which keeps torch's own"
BUILDERS = {
    "adam": "CPUAdamBuilder",
    "adamw": "CPUAdamBuilder",
    "adagrad": "CPUAdagradBuilder",
    "lion": "CPULionBuilder",
    "muon": "CPUAdamBuilder",
}
"""DeepSpeed's optimizers for the host -> what compiles them, in `deepspeed.ops.op_builder`."""


@dataclass(frozen=True)
class Arguments:
    """Arguments of TRL, where this process loads its model, and one line for each value that was derived."""

    grpo: GRPOConfig
    placement: dict[str, Any]
    notes: tuple[str, ...]


def grpo_arguments(
    config: RunConfig, *, output_dir: str, reward_weights: list[float], overrides: Mapping[str, Any]
) -> Arguments:
    """Build the arguments: the user's keys verbatim, then what follows from them and from this machine; `overrides` win
    over everything (a probe's `max_steps`, for instance). ConfigError where TRL or transformers refuses a value."""
    keys: dict[str, Any] = {**config.grpo, **config.vllm.grpo_kwargs(), **overrides}
    notes = [*_without_accelerator(keys), *_fully_sharded(keys, config)]
    keys["trust_remote_code"] = config.model.trust_remote_code
    if config.model.revision is not None:  # TRL loads a reference model by name: the same revision, then
        keys["model_init_kwargs"] = {"revision": config.model.revision}
    keys["logging_nan_inf_filter"] = False  # it would replace a NaN loss by the mean of those before
    keys["reward_weights"] = reward_weights
    keys.setdefault("output_dir", output_dir)
    keys.pop("advantages", None)
    if config.branches is not None and "beta" not in keys:
        keys["beta"] = max(start_weights(config.branches, config.grpo).values())
        notes.append(f"grpo.beta {keys['beta']:g}, for a reference model: each branch has its own weight")
    if keys.get("deepspeed"):
        keys["deepspeed"] = deepspeed_keys(keys["deepspeed"])
        _in_a_group()
    with as_config_errors("grpo"):
        grpo = GRPOConfig(**keys)
        check_deepspeed(grpo.deepspeed_plugin)
        check_host_optimizer(grpo)
        if not grpo.use_vllm:  # said now, and not once the model is loaded
            settings = {"do_sample": True, "cache_implementation": grpo.cache_implementation}
            GenerationConfig(**{**settings, **(grpo.generation_kwargs or {})})
    place = placement(keys, config.batch.processes)
    if grpo.n_gpu > 1:
        notes.append(_on_one_gpu(grpo, place))
    return Arguments(grpo, place, tuple(notes))


def check_best_metric(
    args: GRPOConfig,
    rewards: Sequence[str],
    modules: Iterable[Any],
    sets: Iterable[str] = (),
    *branches: str,
    checkpoints: CheckpointsSection | None = None,
) -> None:
    """ConfigError for a `metric_for_best_model` or a name to choose checkpoints by that no evaluation of these
    `rewards` reports, on named `sets` or one, of some `branches` or none, unless one of their `modules` speaks of
    `log_metric`. Checkpoints may be chosen by what training reports, too."""
    if args.eval_strategy == "no":
        return
    logged = re.findall(r'_metrics\[mode\]\[f?"([^"]+)"\]', inspect.getsource(grpo_trainer))
    known = {name.format(reward_func_name=reward) for name in logged for reward in rewards}
    by_set = ("loss", "ppo_loss", "runtime", "samples_per_second", "steps_per_second")
    known |= {f"{name}_{key}" for name in sets for key in by_set} or set(by_set)
    known |= {"adv_std", "adv_max", "reward_ci"}
    known -= set() if args.beta else {"kl"}
    known |= {f"branch/{name}/{key}" for name in branches for key in ("kl", "reward", "length", "truncated")}
    texts = ["".join(linecache.getlines(getattr(module, "__file__", None) or "")) for module in modules]
    if any("log_metric" in text for text in texts):
        return
    wishes = {"grpo.metric_for_best_model": (args.metric_for_best_model, known)}
    if checkpoints is not None and checkpoints.choose not in STRATEGIES:
        wishes["checkpoints.choose"] = (checkpoints.choose, known | {"loss", "grad_norm", "learning_rate"})
    for where, (name, names) in wishes.items():
        metric = (name or "").removeprefix("eval_")
        if name is not None and metric not in names:
            fix = nearest_hint(metric, names, f"There are {', '.join(sorted(names))}.")
            raise ConfigError(f"no evaluation reports {metric}", where=where, fix=fix)
    if checkpoints is not None and checkpoints.choose is not None:
        mode_of(checkpoints.choose.removeprefix("eval_"), checkpoints.mode)


def suppress_image_token(grpo: GRPOConfig, processor: Any, model: Any) -> None:
    """Keep the image token among those that are never sampled: before TRL 1.16 it is not, and with it the user's own
    list takes the place of TRL's."""
    given = grpo.generation_kwargs or {}
    if not grpo.use_vllm and isinstance(processor, ProcessorMixin):
        tokens = [*(given.get("suppress_tokens") or []), model.config.image_token_id]
        grpo.generation_kwargs = {**given, "suppress_tokens": tokens}


def placement(keys: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """The option of `from_pretrained` that puts a process's model on the GPU it trains on; empty where TRL decides.

    TRL alone would spread the model of one process over every GPU it sees, one of which works at a time, and load
    those of several through the host's memory. What is sharded is placed by what shards it.
    """
    sharded = asked_for(keys) is not None
    on_host = not torch.cuda.is_available() or keys.get("use_cpu")
    if sharded or on_host:
        return {"device_map": None} if sharded or processes > 1 else {}
    return {"device_map": {"": int(os.environ.get("LOCAL_RANK", "0"))}}


def packed_in(grpo: GRPOConfig) -> torch.dtype | None:
    """The type of the numbers that weights in 4 bits lie in; None for bitsandbytes' own. FSDP2 shares floating ones
    alone, and gathers them in the type of mixed precision: another one would be converted, and what is packed lost.
    With vLLM each rank keeps them whole, as the engine gets the numbers that they stand for."""
    gathered = torch.bfloat16 if grpo.bf16 else torch.float16 if grpo.fp16 else torch.float32
    return gathered if grpo.fsdp and not grpo.use_vllm else None


def _fully_sharded(keys: dict[str, Any], config: RunConfig) -> list[str]:
    """Write FSDP2, where it is asked for, in transformers' keys, and in accelerate's variables as its launcher does:
    what lies on the CPU needs a process group of its own, which is made before transformers reads its keys."""
    options, note = asked(keys, LAUNCHED)
    for name in (USE, *VARIABLES.values()):
        os.environ.pop(name, None)
    os.environ.update(LAUNCHED)
    if options is None:
        return []
    if config.batch.processes == 1:
        fix = "Start several: torchrun --nproc-per-node N -m grpo_autotune train ..."
        raise ConfigError("one process has nobody to share the weights with", where=WHERE, fix=fix)
    if options.get("activation_checkpointing") and (config.lora or {}).get("lora_dropout"):
        what = (
            "accelerate computes a layer again without the random numbers of its dropout, so that gradients are wrong"
        )
        fix = "Set it to false (grpo.gradient_checkpointing does the same), or peft.lora_dropout to 0."
        raise ConfigError(what, where=f"{WHERE}.activation_checkpointing", fix=fix)
    notes = [] if note is None else [note]
    os.environ[USE] = "true"
    for name, value in options.items():
        words = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        os.environ[VARIABLES[name]] = words.lower() if isinstance(value, bool) else words
    if options.get("activation_checkpointing"):
        keys["gradient_checkpointing"] = False
        notes.append(f"{WHERE}.activation_checkpointing takes the place of grpo.gradient_checkpointing")
    if config.lora is None:  # else each rank would hold the gradients of all weights until the last micro batch
        keys.setdefault("accelerator_config", {"gradient_accumulation_kwargs": {"sync_each_batch": True}})
    keys.update(fsdp=True, fsdp_config={**options})
    return notes


def check_deepspeed(plugin: Any) -> None:
    """ConfigError for a key of DeepSpeed's that is unknown or says other than `grpo` does: found out here, and not by
    the engine once the model is loaded. `plugin` is accelerate's, None without DeepSpeed."""
    if plugin is None:
        return
    from deepspeed import init_distributed
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, get_zero_config

    if torch.distributed.is_initialized():  # on a CPU by accelerate, and DeepSpeed would take itself for one of one
        init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    settings = plugin.hf_ds_config
    for mismatch in getattr(settings, "mismatches", ()):
        ours, theirs = re.findall(r"\b(?:ds|hf) ([^\s=]+)", mismatch)
        fix = f"Write auto there, or remove one of the two: {mismatch.removeprefix('- ')}."
        raise ConfigError(f"differs from grpo.{theirs}", where=f"grpo.deepspeed.{ours}", fix=fix)
    try:
        get_zero_config(settings.config)
    except ValidationError as error:
        told = from_validation(error, list(DeepSpeedZeroConfig.model_fields))
        raise ConfigError(told.what, where=f"grpo.deepspeed.zero_optimization.{told.where}", fix=told.fix) from error


def check_host_optimizer(grpo: GRPOConfig, plugin: Any = None) -> None:
    """Have DeepSpeed's optimizer for the host ready, where one is to stay in its memory. `plugin` is accelerate's,
    where a launcher asked for DeepSpeed.

    Raises:
        ConfigError: It would stand in for another one.
        EnvironmentProblem: It is not compiled, and cannot be here."""
    plugin = plugin or grpo.deepspeed_plugin
    optimizer = None if plugin is None else _on_host(grpo, plugin.hf_ds_config.config)
    if optimizer not in BUILDERS:
        return
    from deepspeed.ops import op_builder
    from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException

    name = BUILDERS[optimizer].removeprefix("CPU").removesuffix("Builder")
    try:
        with Heartbeat(lambda: f"DeepSpeed compiles its {name} for the host, once, minutes"):
            getattr(op_builder, BUILDERS[optimizer])().load()
    except (RuntimeError, OSError, ImportError, CUDAMismatchException, MissingCUDAException) as error:
        told = shortened(" ".join(str(error).split()), 150)
        what = f"DeepSpeed's {name} for the host cannot be compiled here: {told}"
        instead = f"offload_optimizer.device: none, or without an optimizer key {INSTEAD}"
        fix = f"Install a C++ compiler and ninja, or set {instead}."
        raise EnvironmentProblem(what, where="grpo.deepspeed.zero_optimization.offload_optimizer", fix=fix) from error


def _on_host(grpo: GRPOConfig, keys: Mapping[str, Any]) -> str | None:
    """DeepSpeed's own optimizer that keeps its state in the host's memory, small letters, None where torch's does or
    none is: the one that `optimizer` names (`DeepSpeedEngine._configure_basic_optimizer`), else what accelerate puts in
    the place of `grpo.optim` (`map_pytorch_optim_to_deepspeed`): ConfigError where that is no AdamW."""
    moved = keys.get("zero_optimization", {}).get("offload_optimizer") or {}
    if moved.get("device", "none") == "none":
        return None
    if named := keys.get("optimizer"):
        return None if (named.get("params") or {}).get("torch_adam") else str(named.get("type")).lower()
    if not keys.get(FORCED, True):
        return None
    name = getattr(grpo.optim, "value", grpo.optim)
    if name not in ADAMW:
        what = f"accelerate would put an optimizer of DeepSpeed's in the place of {name}, since offload_optimizer is on"
        raise ConfigError(what, where="grpo.optim", fix=f"Take {ADAMW[0]}, or {INSTEAD}.")
    return "adamw"


def _in_a_group() -> None:
    """Make this process a group of one where no launcher did: DeepSpeed would look for MPI."""
    if "RANK" not in os.environ:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in alone.items()})


def _on_one_gpu(grpo: GRPOConfig, place: dict[str, Any]) -> str:
    """Keep the trainer from `nn.DataParallel`, which TRL refuses, and its reference model beside the policy."""
    count, grpo._n_gpu = grpo.n_gpu, 1
    grpo.model_init_kwargs = {**(grpo.model_init_kwargs or {}), **place}
    return (
        f"{count - 1} of {count} GPUs stay unused: a process trains on one; "
        f"`torchrun --nproc-per-node {count} -m grpo_autotune train ...` uses all"
    )


@contextmanager
def unlocked_engine(config: RunConfig) -> Iterator[None]:
    """Trainers built inside get the engine that the `vllm` section describes, corrected and sized for their images."""
    if not config.use_vllm:
        yield
        return
    options = EngineOptions.of_section(config.vllm)
    if config.model.revision is not None:  # TRL loads the engine's copy by name
        keys = {"revision": config.model.revision, "tokenizer_revision": config.model.revision}
        options = replace(options, keys={**keys, **options.keys})
    with unlock(options):
        yield


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
