"""Models of middling size for the benchmarks: Qwen3-VL with random weights, about 16 or 116 million parameters.

    python -m benchmarks.midsize [14m|100m] [FOLDER]

writes the model into the cache folder and a configuration `FOLDER/midsize-14m.yaml` that has the habits of a first
script: large images, micro batch 1, evaluation every few steps, nothing shared. Speed does not depend on the weights'
values; the reward grades what random tokens differ in, so that groups have spread.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_autotune import demo
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.files import cache_dir
from grpo_autotune.seams.torchvision_compat import ensure_torchvision
from grpo_autotune.train.models.random_init import build_tokenizer, built_once, save_random_model

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "14m": {
        "text_config": {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
        },
        "vision_config": {"hidden_size": 256, "intermediate_size": 768, "depth": 4, "out_hidden_size": 384},
    },
    "100m": {
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 9,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 64,
        },
        "vision_config": {"hidden_size": 512, "intermediate_size": 2048, "depth": 6, "out_hidden_size": 768},
    },
}


def midsize_model(size: str = "14m") -> Path:
    """Folder of the model, built on first use and kept in the cache folder."""
    config = copy.deepcopy(demo.CONFIG)
    for section, sizes in SIZES[size].items():
        config[section] |= sizes
    head = config["text_config"]["head_dim"] // 2
    config["text_config"]["rope_parameters"] |= {"mrope_section": [head - 2 * (head // 3), head // 3, head // 3]}
    config["text_config"]["max_position_embeddings"] = 8192
    config["vision_config"]["num_position_embeddings"] = 48 * 48
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir() / "benchmarks" / f"qwen3-vl-{size}-{key}"
    ensure_torchvision()
    with built_once(folder) as missing:
        if missing:
            texts = [demo.QUESTION, "system user assistant", "0 1 2 3 4 5 6 7 8 9 It is <answer></answer>."] * 3
            save_random_model(config, folder, tokenizer=build_tokenizer(texts))
    return folder


def midsize_config(
    size: str = "14m", *, pixels: int = 768, completion: int = 64, grpo: Mapping[str, Any] | None = None
) -> RunConfig:
    """Digits on a canvas of `pixels` a side, LoRA on the text model, answers of `completion` tokens at most."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": str(midsize_model(size))},
            "peft": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": targets},
            "data": {"path": "digits", "params": {"canvas": pixels, "count": 64}, "max_eval_samples": 4}
            | {"eval_split": "test"},
            "rewards": [{"name": "benchmarks.midsize:variety"}],
            "speedups": "none",
            "grpo": {
                "max_steps": 200,
                "learning_rate": 1e-5,
                "beta": 0.04,
                "num_generations": 8,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 8,
                "max_completion_length": completion,
                "eval_strategy": "steps",
                "eval_steps": 5,
                "per_device_eval_batch_size": 4,
                "num_generations_eval": 1,
                "save_steps": 50,
                "logging_steps": 1,
                **(grpo or {}),
            },
        }
    )


def variety(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Share of a completion's tokens that are odd numbers: something that random answers differ in."""
    return [sum(token % 2 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def main() -> None:
    """Build the model and write its configuration."""
    size = sys.argv[1] if len(sys.argv) > 1 else "14m"
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else ".")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"midsize-{size}.yaml"
    path.write_text(midsize_config(size).to_yaml(), encoding="utf-8")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
