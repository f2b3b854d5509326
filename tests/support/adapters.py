"""Adapters that a training could have saved: random weights, large enough to move log-probs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.train.models.load import load_model

SHAPES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 8}},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "bias": {"target_modules": "all-linear", "bias": "all"},
    "tower": {"target_modules": r".*visual.*(qkv|proj|fc1|fc2|gate_proj|up_proj|down_proj)"},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both ends": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "no place": {"target_modules": ["q_proj"], "lora_bias": True},
}
"""Names -> keys of `LoraConfig`."""


def adapted(base: Path, shape: str, scale: float = 0.1) -> Any:
    """A `PeftModel` of a shape on the model at `base`, its weights drawn around their beginnings."""
    model = load_model(ModelSection(name_or_path=str(base)), str(base), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **SHAPES[shape]))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight.add_(torch.randn(weight.shape, generator=noise) * scale)
    return model


def saved_adapter(base: Path, shape: str, folder: Path, scale: float = 0.1) -> Path:
    """The adapter alone in `folder`, as PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(base, shape, scale).save_pretrained(folder)
    return folder


def run_folder(config: RunConfig, run: Path) -> Path:
    """The folder of a finished run without its model: `run/model` is to be filled."""
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return run


def rewrite(file: Path, changes: Mapping[str, Any]) -> None:
    """Change tensors of a safetensors file: name -> tensor, None removes."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
