"""Weights that no engine takes: packed ones of the trainer, and those pushed into quantized layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_autotune.errors import ConfigError
from grpo_autotune.rollout.options import EngineOptions
from grpo_autotune.rollout.server.client import ServerSync
from grpo_autotune.rollout.sync import adapters, lora
from grpo_autotune.rollout.sync.sync import ColocateSync, choose


class Params4bit(torch.nn.Parameter):
    """As bitsandbytes calls its own."""


def model_with(weight: torch.nn.Parameter) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].weight = weight
    return model


PACKED = [
    Params4bit(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False),
    Params4bit(torch.zeros(2, 1), requires_grad=False),  # `bnb_4bit_quant_storage` of FSDP
    torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False),
]


@pytest.mark.parametrize("way", ["auto", "merged", "adapter"])
@pytest.mark.parametrize("weight", PACKED, ids=["4 bits", "4 bits in float", "8 bits"])
def test_packed_weights_never_go_to_a_server(weight: torch.nn.Parameter, way: Any) -> None:
    device = SimpleNamespace(device=torch.device("cuda"))
    generation = SimpleNamespace(accelerator=device, model=model_with(weight))
    with pytest.raises(ConfigError, match=r"^vllm\.mode: a server takes no weights that are packed"):
        ServerSync(EngineOptions(way)).connected(generation, SimpleNamespace(model="base"))


@pytest.mark.parametrize("way", ["auto", "merged"])
def test_weights_never_go_to_a_server_that_quantizes_its_own(way: Any) -> None:
    device = SimpleNamespace(device=torch.device("cuda"))
    generation = SimpleNamespace(accelerator=device, model=torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"^vllm\.quantization: fp8 layers of vLLM take no weights"):
        ServerSync(EngineOptions(way, keys={"quantization": "fp8"})).connected(generation, SimpleNamespace(model="b"))


def test_weights_in_8_bits_never_go_to_an_engine() -> None:
    with pytest.raises(ConfigError, match="packed in 8 bits"):
        choose(SimpleNamespace(model=model_with(PACKED[2])), EngineOptions("auto"))


class Engine:
    """What a colocated engine is asked to do."""

    def __init__(self, quantization: str | None) -> None:
        config = SimpleNamespace(model_config=SimpleNamespace(quantization=quantization))
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        executor = SimpleNamespace(driver_worker=worker)
        self.llm_engine = SimpleNamespace(vllm_config=config, model_executor=executor, reset_encoder_cache=print)
        self.pushed: list[str] = []
        self.sent: list[dict[str, Any]] = []

    def load_weights(self, pairs: Any) -> None:
        self.pushed += [name for name, _ in pairs]

    def sleep(self, level: int = 1) -> None: ...
    def wake_up(self, tags: Any = None) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def install(self) -> list[Any]:
        return []

    def send(self, tensors: Any) -> None:
        self.sent.append(tensors)


def synced(
    quantization: str | None, monkeypatch: pytest.MonkeyPatch, sleep_level: Any = None, **options: Any
) -> Engine:
    """An engine after two syncs of a model with an adapter."""
    engine = Engine(quantization)
    monkeypatch.setattr(adapters, "Adapters", lambda llm: engine)
    monkeypatch.setattr(lora, "tensors", lambda generation: {"a.lora_A.weight": torch.zeros(1)})
    generation = SimpleNamespace(
        enable_sleep_mode=False,
        model=torch.nn.Linear(2, 2),
        _dist=SimpleNamespace(is_fsdp=False, gather_params=lambda weights: torch.no_grad()),
        sync_weights=lambda: None,
        generate=lambda: None,
        _iter_named_params=lambda: (),
    )
    part = ColocateSync(EngineOptions("adapter", sleep_level, **options))
    part.way = "adapter"
    part.started(generation, engine)
    part.install(generation)
    monkeypatch.setattr("grpo_autotune.rollout.sync.sync.reset_caches", lambda llm, pushed: ("prefix",))
    generation.sync_weights()
    generation.sync_weights()
    return engine


@pytest.mark.parametrize(("quantization", "pushed"), [(None, ["weight", "bias"]), ("fp8", [])])
def test_an_engine_that_has_quantized_its_weights_is_sent_the_adapter_alone(
    quantization: str | None, pushed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = synced(quantization, monkeypatch)
    assert engine.pushed == pushed
    assert len(engine.sent) == 2


def test_weights_that_cannot_come_back_are_not_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    synced("fp8", monkeypatch, sleep_level=1)
    with pytest.raises(ConfigError, match=r"^vllm\.sleep_level: asleep at level 2"):
        synced("fp8", monkeypatch, sleep_level=2)


def test_a_whole_model_is_not_pushed_into_a_quantized_engine() -> None:
    model = torch.nn.Linear(2, 2)
    generation = SimpleNamespace(
        model=model,
        enable_sleep_mode=False,
        _dist=SimpleNamespace(is_fsdp=False),
        accelerator=SimpleNamespace(device=torch.device("cuda")),
    )
    with pytest.raises(ConfigError, match=r"^vllm\.quantization: fp8 layers of vLLM take no weights"):
        ColocateSync(EngineOptions("auto", keys={"quantization": "fp8"})).llm_keys(generation)
