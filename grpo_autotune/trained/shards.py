"""Trained weights in one piece, where DeepSpeed's ZeRO-3 or FSDP had each rank save its part."""

import io
import json
import shutil
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path

from accelerate.utils import merge_fsdp_weights
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import say
from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.train.models.load import model_source
from grpo_autotune.trained.source import ADAPTER, MODEL, Trained, parts_of

WHOLE, ADAPTED = "model.safetensors", "adapter_model.safetensors"
LARGE = (".pt", ".bin", ".pth", ".safetensors")
"""Endings of files that are not taken along: pieces, and the optimizer's state."""


def in_one_piece(trained: Trained, folder: Path) -> Trained:
    """The trained weights, put together in `folder` where they were saved in parts (float32 of ZeRO-3): whole weights
    with their config.json, or an adapter with its configuration.

    Raises:
        EnvironmentProblem: DeepSpeed, which reads its own parts, is not installed.
        ConfigError: A folder outside of its run does not say what the parts are of.
    """
    parts = parts_of(trained.path)
    if parts is None:
        return trained
    say(f"putting the parts of {trained.path} together")
    folder.mkdir()
    for file in trained.path.iterdir():
        if file.is_file() and file.suffix not in LARGE:
            shutil.copy(file, folder)
    if parts.name.startswith("global_step"):
        _of_deepspeed(trained.path, folder)
    else:
        merge_fsdp_weights(str(parts), str(folder))
    if not _is_adapter(folder):
        _describe_model(trained, folder)
        return replace(trained, path=folder)
    (folder / WHOLE).rename(folder / ADAPTED)
    if not (folder / ADAPTER).is_file():
        LoraConfig(**_run_of(trained).lora or {}).save_pretrained(str(folder))
    return replace(trained, path=folder, adapter=json.loads((folder / ADAPTER).read_text(encoding="utf-8")))


def _of_deepspeed(source: Path, folder: Path) -> None:
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        fix = "pip install deepspeed (with DS_BUILD_OPS=0 where there is no compiler)."
        raise EnvironmentProblem("the parts of ZeRO-3 are read by DeepSpeed", where=str(source), fix=fix) from error
    with redirect_stdout(io.StringIO()):
        weights = get_fp32_state_dict_from_zero_checkpoint(str(source))
    save_torch_state_dict(weights, folder)  # which writes tied weights once; DeepSpeed's own writer fails on them


def _is_adapter(folder: Path) -> bool:
    if not (folder / WHOLE).is_file():
        return False  # whole weights in several files
    with safe_open(str(folder / WHOLE), framework="pt") as file:
        return all(name.startswith("base_model.model.") for name in file.keys())  # noqa: SIM118 - it is no mapping


def _describe_model(trained: Trained, folder: Path) -> None:
    if (folder / MODEL).is_file():
        return
    section = _run_of(trained).model
    how = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    source = model_source(section, say)
    AutoConfig.from_pretrained(source, **how).save_pretrained(folder)
    with suppress(OSError):  # a model may have none
        GenerationConfig.from_pretrained(source, revision=section.revision).save_pretrained(folder)


def _run_of(trained: Trained) -> RunConfig:
    if trained.config is None:
        fix = "Give its run folder, or put the file that says it beside the parts."
        raise ConfigError("these parts do not say what they are of", where=str(trained.path), fix=fix)
    return trained.config
