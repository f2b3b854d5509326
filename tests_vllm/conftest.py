"""Tiny models that vLLM's CPU build can serve, and trainers that generate with it inside their own process."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.train.models.random_init import build_tokenizer, save_random_model
from tests.conftest import picture_rows, text_rows  # noqa: F401
from tests.support.tiny import CONFIGS, TEXTS

ENV_FOLDER = Path(__file__).parent.parent / "tests" / "env"

HEADS = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
"""vLLM's attention on CPU has no kernel for heads of 16; its Qwen2.5 derives that size from hidden size and count."""
SECTIONS = {"qwen2_5_vl": [4, 6, 6], "qwen3_vl": [8, 4, 4]}
"""Rotary sections of the vision models, which must sum to half a head."""
LARGEST_IMAGE = 112 * 112
"""Pixels. vLLM warms up with the largest image that the saved processor lets through."""

THEIR_WARNINGS = r"default:::(?!grpo_autotune|tests)"
"""vLLM and what it brings warn much and differ from release to release; errors are the warnings in our own modules."""

TRL_SETS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""With these in the environment the next trainer of the process would take itself for one of several."""


def pytest_configure(config: pytest.Config) -> None:
    if str(ENV_FOLDER) not in {str(Path(entry).resolve()) for entry in sys.path}:
        pytest.exit("tests_vllm runs by `make test-vllm`, which puts tests/env on PYTHONPATH", returncode=3)
    if importlib.util.find_spec("vllm") is None:
        pytest.exit("tests_vllm needs vLLM: `make test-vllm` makes the environment that has it", returncode=3)
    config.addinivalue_line("filterwarnings", THEIR_WARNINGS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.vllm)


def pytest_collection_finish() -> None:
    """Keep the libraries out of the collector's sight for good: an engine's start and end bring them back, and collect
    six times, which is two thirds of what it costs."""
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`served(kind)`: path of a saved tiny model (qwen2_5_vl, qwen3_vl, qwen3 or llama) that vLLM can load."""
    folder = tmp_path_factory.mktemp("served")
    built: dict[str, Path] = {}

    def path(kind: str) -> Path:
        if kind not in built:
            built[kind] = save_random_model(
                _config(kind), folder / kind, tokenizer=build_tokenizer(TEXTS), min_pixels=28 * 28
            )
            _cap_images(built[kind] / "processor_config.json")
        return built[kind]

    return path


def _config(kind: str) -> dict[str, Any]:
    config = copy.deepcopy(CONFIGS[kind])
    text = config.get("text_config", config)
    text.update(HEADS)
    if kind in SECTIONS:
        text["rope_parameters"]["mrope_section"] = SECTIONS[kind]
    return config


def _cap_images(processor_config: Path) -> None:
    if not processor_config.exists():
        return
    settings = json.loads(processor_config.read_text())
    for part in ("image_processor", "video_processor"):
        settings[part]["size"] = {"shortest_edge": 28 * 28, "longest_edge": LARGEST_IMAGE}
    processor_config.write_text(json.dumps(settings))


@pytest.fixture
def colocated(served: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`colocated(kind, rows, **grpo)`: a `GRPOTrainer` whose engine lives in this process.

    vLLM keeps one process group a process, which TRL announces in the environment: one engine ends before the next
    starts.
    """
    from tests.support.trainers import make_trainer

    environment = dict(os.environ)
    running: list[Any] = []

    def end_engine() -> None:
        while running:
            running.pop().vllm_generation.llm.llm_engine.engine_core.shutdown()
        gc.collect()  # an engine whose trainer was refused ends now, not in the middle of the next one's start
        for name in TRL_SETS:
            os.environ.pop(name, None)
        os.environ.update(environment)

    def trainer(kind: str, rows: list[dict[str, Any]], **settings: Any) -> Any:
        end_engine()
        engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 256}
        running.append(make_trainer(served(kind), rows, tmp_path, **{**engine, **settings}))
        return running[-1]

    yield trainer
    end_engine()
