"""Packages that keys of a configuration need beside the required ones: looked for, never imported."""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.hardware.versions import check_versions

TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",),
    "mlflow": ("mlflow",), "comet_ml": ("comet_ml",), "swanlab": ("swanlab",), "clearml": ("clearml",),
    "neptune": ("neptune",), "dvclive": ("dvclive",), "codecarbon": ("codecarbon",),
}  # fmt: skip
"""`grpo.report_to` -> packages of which one must be there (transformers/integrations/integration_utils.py)."""

KERNELS: dict[str, tuple[str, ...]] = {
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("kernels", "flash_attn_interface"),  # no index has a package of this module
    "flash_attention_4": ("kernels", "flash_attn"),
}
"""`model.attn_implementation` -> the same; a name with a slash is a kernel on the hub, and needs `kernels`
(transformers/modeling_flash_attention_utils.py)."""

OPTIMIZERS = {
    "galore": ("galore_torch",), "apollo": ("apollo_torch",), "lomo": ("lomo_optim",), "adalomo": ("lomo_optim",),
    "grokadamw": ("grokadamw",), "adamw_torch_4bit": ("torchao",), "adamw_torch_8bit": ("torchao",),
    "schedule_free": ("schedulefree",), "stable_adamw": ("optimi",), "ademamix": ("bitsandbytes",),
    "adamw_bnb": ("bitsandbytes",), "adamw_8bit": ("bitsandbytes",), "lion": ("bitsandbytes",),
    "paged": ("bitsandbytes",), "rmsprop_bnb": ("bitsandbytes",),
}  # fmt: skip
"""Beginning of `grpo.optim` -> the same (transformers/trainer_optimizer.py)."""


class Need(NamedTuple):
    """A key whose value needs one of several packages."""

    where: str  # key path
    value: str  # its value, as a message shows it
    packages: tuple[str, ...]  # names to import, of which one must be there
    install: str  # requirement for pip
    otherwise: str  # what else the user can do


def check_packages(config: RunConfig, overrides: Mapping[str, Any]) -> None:
    """EnvironmentProblem for a key that needs a package which is not installed, and for a package too old or too new;
    `overrides` win over `grpo`'s keys."""
    check_versions()
    for need in _needs(config, {**config.grpo, **overrides}):
        if not any(importlib.util.find_spec(package) for package in need.packages):
            what = f"{need.value} needs the package {need.packages[0]}, which is not installed"
            fix = f"Install it (pip install {need.install}), or {need.otherwise}."
            raise EnvironmentProblem(what, where=need.where, fix=fix)


def _needs(config: RunConfig, grpo: Mapping[str, Any]) -> Iterator[Need]:
    kernel = config.model.attn_implementation or ""
    if config.use_vllm:
        yield Need("grpo.use_vllm", "true", ("vllm",), "'grpo-autotune[vllm]'", "set the key to false")
    if config.model.load_in_4bit:
        extra = "'grpo-autotune[quantization]'"
        yield Need("model.load_in_4bit", "true", ("bitsandbytes",), extra, "set the key to false")
    if grpo.get("deepspeed"):
        yield Need("grpo.deepspeed", "this key", ("deepspeed",), "'grpo-autotune[deepspeed]'", "remove the key")
    if grpo.get("use_liger_kernel"):
        yield Need("grpo.use_liger_kernel", "true", ("liger_kernel",), "liger-kernel", "set the key to false")
    if packages := KERNELS.get(kernel.removeprefix("paged|"), ("kernels",) if "/" in kernel else None):
        yield Need("model.attn_implementation", kernel, packages, packages[0].replace("_", "-"), "write sdpa")
    report_to = grpo.get("report_to")
    for tracker in [report_to] if isinstance(report_to, str) else report_to or []:
        if packages := TRACKERS.get(tracker):
            yield Need("grpo.report_to", tracker, packages, packages[0], f"remove {tracker}")
    optim = str(grpo.get("optim", ""))
    for start, packages in OPTIMIZERS.items():
        if optim.startswith(start):
            install = "torch-optimi" if packages == ("optimi",) else packages[0].replace("_", "-")
            yield Need("grpo.optim", optim, packages, install, "write adamw_torch_fused")
