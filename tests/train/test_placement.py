"""Where a process loads its model on a machine with GPUs on paper: one GPU each, and nothing spread over the rest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.seams.sharding import SHARDING
from grpo_autotune.train import arguments
from grpo_autotune.train.arguments import grpo_arguments, placement
from grpo_autotune.train.models import load


def config(**grpo: Any) -> RunConfig:
    values = {"model": {"name_or_path": "m"}, "data": {"path": "d"}, "rewards": [{"name": "format"}], "grpo": grpo}
    return RunConfig.from_dict(values)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("keys", "processes", "rank", "place"),
    [
        ({}, 1, None, {"device_map": {"": 0}}),
        ({}, 8, "3", {"device_map": {"": 3}}),
        ({"use_cpu": True}, 1, None, {}),
        ({"use_cpu": True}, 2, "1", {"device_map": None}),
        ({"deepspeed": "zero3.json"}, 8, "3", {"device_map": None}),
        ({"fsdp": "full_shard"}, 1, None, {"device_map": None}),
    ],
)
def test_a_process_loads_to_its_own_gpu(
    keys: dict[str, Any], processes: int, rank: str | None, place: dict[str, Any], gpus: None, monkeypatch: Any
) -> None:
    for name in ("LOCAL_RANK", *SHARDING.values()):
        monkeypatch.delenv(name, raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert placement(keys, processes) == place
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert placement(keys, processes) == {"device_map": None}


def test_gpus_without_a_process_are_told_and_left_alone(
    gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Eight(SimpleNamespace):
        """TRL's arguments as they are where one process sees eight GPUs."""

        model_init_kwargs: Any = None
        deepspeed_plugin: Any = None
        use_vllm = True
        _n_gpu = 8

        @property
        def n_gpu(self) -> int:
            return self._n_gpu

    monkeypatch.setattr(arguments, "GRPOConfig", lambda **keys: Eight(**keys))
    found = grpo_arguments(config(), output_dir=str(tmp_path), reward_weights=[1.0], overrides={})
    assert found.grpo.n_gpu == 1, "else TRL refuses nn.DataParallel"
    assert found.grpo.model_init_kwargs == found.placement == {"device_map": {"": 0}}
    (note,) = [note for note in found.notes if "GPUs" in note]
    assert note.startswith("7 of 8 GPUs stay unused") and "torchrun --nproc-per-node 8" in note


def test_the_model_is_loaded_where_it_was_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(load, "create_model_from_path", lambda source, **options: asked.append(options))
    load.load_model(config().model, "m", {"device_map": {"": 3}})
    load.load_model(config().model, "m", {})
    assert asked[0]["device_map"] == {"": 3} and "device_map" not in asked[1]
