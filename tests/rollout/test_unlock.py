"""TRL's engine is built through the parts: each hook at its time, and nothing of them left behind."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from grpo_autotune.errors import ConfigError
from grpo_autotune.rollout.colocate import unlock as module
from grpo_autotune.rollout.colocate.unlock import PARTS, Unlocked, unlock_vllm
from grpo_autotune.rollout.options import EngineOptions
from grpo_autotune.rollout.parts import Part, engine_of, part_of
from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, wrap


class Noted(Part):
    """Writes down its hooks, and puts a layer on `generate`."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.hooks: list[str] = []

    def llm_keys(self, generation: Any) -> dict[str, Any]:
        self.hooks.append("llm_keys")
        return {"dtype": "float32", "seed": 1}

    def started(self, generation: Any, llm: Any) -> list[Handle]:
        self.hooks.append("started")
        return []

    def connected(self, generation: Any, client: Any) -> list[Handle]:
        self.hooks.append("connected")
        return []

    def install(self, generation: Any) -> list[Handle]:
        self.hooks.append("install")
        return [wrap(AttributeSlot(generation, "generate"), lambda call_next: [*call_next(), "layer"], INNER)]


class Other(Part):
    """Defines nothing."""


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that builds engines as TRL's does."""
    trl = ModuleType("engine")

    class LLM:
        def __init__(self, **keys: Any) -> None:
            self.keys = keys

    class VLLMClient:
        pass

    class VLLMGeneration:
        def __init__(
            self, model: Any, mode: str = "colocate", max_model_length: int = 8, enable_sleep_mode: bool = False
        ) -> None:
            self.given = (max_model_length, enable_sleep_mode)
            if mode == "colocate":
                self.llm = trl.LLM(model=model, seed=0, dtype="auto")
            else:
                self.client = trl.VLLMClient()

        def generate(self) -> list[str]:
            return ["trl"]

    vars(trl).update(LLM=LLM, VLLMClient=VLLMClient, VLLMGeneration=VLLMGeneration)
    monkeypatch.setattr(module, "PARTS", {"colocate": (Other, Noted), "server": (Noted,)})
    return trl


def test_the_hooks_of_a_colocated_engine(trl: ModuleType) -> None:
    options = EngineOptions(sleep_level=1, keys={"max_model_len": 64, "block_size": 32, "dtype": "bfloat16"})
    with Unlocked(options) as unlocked:
        unlocked.enter(trl)
        generation = trl.VLLMGeneration("m")
    assert generation.given == (64, True)
    assert generation.llm.keys == {"model": "m", "seed": 1, "dtype": "bfloat16", "block_size": 32, "max_model_len": 64}
    engine, part = engine_of(generation), part_of(generation, Noted)
    assert engine is engine_of(generation.llm) and engine is not None and engine.llm_keys == generation.llm.keys
    assert part is not None and part.hooks == ["llm_keys", "started", "install"] and part.options.sleep_level == 1
    assert generation.generate() == ["trl", "layer"]
    unlocked.remove()
    assert generation.generate() == ["trl"] and engine_of(generation) is None and engine.parts == ()
    assert engine_of(trl.VLLMGeneration("m")) is None


def test_the_hooks_of_a_server(trl: ModuleType) -> None:
    with Unlocked(EngineOptions()) as unlocked:
        unlocked.enter(trl)
        generation = trl.VLLMGeneration("m", "server")
    part = part_of(generation, Noted)
    assert part is not None and part.hooks == ["connected", "install"] and part_of(generation, Other) is None


def test_every_part_is_made_of_the_options_alone() -> None:
    for kinds in PARTS.values():
        assert len(set(kinds)) == len(kinds) and all(kind(EngineOptions()).options.weight_sync for kind in kinds)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"server_port": 1}, "server_port: this is an argument of GRPOConfig.* Give GRPOConfig vllm_server_port"),
        ({"server_gpus": 1}, "server_gpus: unlock_vllm starts no server. Start one with `grpo-autotune serve`"),
    ],
)
def test_what_unlock_vllm_cannot_do_is_said(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        unlock_vllm(**keys)
