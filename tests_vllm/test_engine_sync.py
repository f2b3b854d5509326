"""Weight syncs into the real engine: each way gives the trainer's log-probs after every optimizer step.

What is plainly trained, on every architecture, is in `test_engine_matrix`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig, TrainerCallback

from grpo_autotune.errors import ConfigError
from grpo_autotune.rollout.colocate.unlock import unlock
from grpo_autotune.rollout.options import EngineOptions
from grpo_autotune.rollout.parts import part_of
from grpo_autotune.rollout.sync import adapters, lora, sync
from tests_vllm.scoring import BLOCK, apart_nats

EXACT = 1e-4
"""Nats, between two implementations in float32."""
VISIBLE = 1e-3
"""Nats that the log-probs move at least in an optimizer step of these tests: what a stale engine would be off by."""

FLOAT32 = {"model_init_kwargs": {"dtype": "float32"}}
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_LAYERS = r".*(attn\.qkv|attn\.proj|linear_fc\d|mlp\.[02]|[qkvo]_proj|gate_proj|up_proj|down_proj)"
WAYS = ("merged", "batched", "adapter")

Rows = list[dict[str, Any]]
Trainers = Callable[..., Any]


def adapter(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TEXT_LAYERS, **settings})


def way_of(trainer: Any) -> tuple[str, str]:
    part = part_of(trainer.vllm_generation, sync.WeightSync)
    assert part is not None
    return part.way, part.why


def alternating(completions: list[Any], **columns: Any) -> list[float]:
    """Different within every group of two."""
    return [float(index % 2) for index in range(len(completions))]


@pytest.fixture
def unlocked(colocated: Trainers) -> Iterator[Trainers]:
    """`unlocked(kind, rows, way, level, keys={...}, lora=..., **grpo)`: a trainer whose engine is synced this way.

    The CPU build refuses to start with sleep mode but takes its calls: TRL is told of it, the engine is not.
    """
    made = []

    def trainer(
        kind: str, rows: Rows, way: Any, level: Any = None, keys: dict[str, Any] | None = None, **settings: Any
    ) -> Any:
        options = EngineOptions(way, level, {"enable_sleep_mode": False, "block_size": BLOCK, **(keys or {})})
        made.append(unlock(options))
        settings = {"learning_rate": 1e-2, "rewards": [alternating], **FLOAT32, **settings}
        return colocated(kind, rows, **settings)

    yield trainer
    for unlocking in made:
        unlocking.remove()


class AfterSteps(TrainerCallback):
    """Compares engine and trainer after every optimizer step, before the engine is told of it and afterwards."""

    def __init__(self, trainer: Any, images: list[Any]) -> None:
        self.trainer, self.images = trainer, images
        self.stale: list[float] = []
        self.synced: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        generation = self.trainer.vllm_generation
        if not generation.llm.llm_engine.is_sleeping():  # asleep it takes no requests
            self.stale.append(apart_nats(self.trainer, self.images))
        generation.sync_weights()
        generation.llm.wake_up(tags=["kv_cache"])
        self.synced.append(apart_nats(self.trainer, self.images))


def trained(trainer: Any, rows: Rows) -> AfterSteps:
    compared = AfterSteps(trainer, [rows[0]["image"], rows[1]["image"]] if "image" in rows[0] else [])
    trainer.add_callback(compared)
    trainer.train()
    return compared


def check(trainer: Any, rows: Rows) -> None:
    compared = trained(trainer, rows)
    assert len(compared.synced) == 3
    assert min(compared.stale) > VISIBLE, "nothing moved, so that a sync has nothing to show"
    assert max(compared.synced) <= EXACT


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
def test_adapter_on_the_vision_tower_too(unlocked: Trainers, picture_rows: Rows, kind: str) -> None:
    trainer = unlocked(kind, picture_rows, "adapter", lora=adapter(target_modules=ALL_LAYERS))
    assert way_of(trainer) == ("adapter", "asked for")
    assert len(lora.tower_layers(trainer.model)) > 4
    check(trainer, picture_rows)


def test_ranks_and_scales_that_differ_between_layers(unlocked: Trainers, text_rows: Rows) -> None:
    config = adapter(r=9, use_rslora=True, rank_pattern={"v_proj": 3}, alpha_pattern={"o_proj": 32})
    trainer = unlocked("llama", text_rows, "adapter", lora=config)
    check(trainer, text_rows)


def test_without_its_reset_the_encoder_cache_is_stale(
    unlocked: Trainers, picture_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same image twice with trained vision weights, as TRL 1.16 leaves it."""
    monkeypatch.setattr(sync, "changes_images", lambda model, pushed: False)
    trainer = unlocked("qwen3_vl", picture_rows, "merged", lora=False, learning_rate=1e-3)
    assert max(trained(trainer, picture_rows).synced) > 10 * EXACT


def test_an_adapters_name_used_again_finds_older_prefixes(
    unlocked: Trainers, text_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompt twice: vLLM knows an adapter's blocks by its name."""
    monkeypatch.setattr(adapters, "_NUMBERS", itertools.repeat(10_000))
    trainer = unlocked("qwen3", text_rows, "adapter", lora=adapter())
    assert max(trained(trainer, text_rows).synced) > 10 * EXACT


def test_frozen_weights_are_pushed_once(unlocked: Trainers, picture_rows: Rows) -> None:
    trainer = unlocked("qwen3_vl", picture_rows, "batched", lora=False, learning_rate=1e-3)
    trainer.model.model.visual.requires_grad_(False)
    check(trainer, picture_rows)
    first, *later = sync.facts(trainer)
    assert {row.reset for row in later} == {("prefix",)}
    assert {first.tensors - row.tensors for row in later} == {len(list(trainer.model.model.visual.parameters()))}


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("way", ["merged", "adapter"])
def test_sleep_levels(unlocked: Trainers, text_rows: Rows, way: str, level: int) -> None:
    trainer = unlocked("qwen3", text_rows, way, level, lora=adapter())
    generation = trainer.vllm_generation
    compared = trained(trainer, text_rows)
    assert max(compared.synced) <= EXACT
    before = len(sync.facts(trainer))
    for _ in range(2):  # as evaluations would, with nothing trained meanwhile
        generation.generate([[5, 6, 7]] * 2, None, 2)
        assert generation.llm.llm_engine.is_sleeping() == (level > 0)
    again = [(row.full, row.bytes > 0) for row in sync.facts(trainer)[before:]]
    assert again == {0: [], 1: [(False, False)], 2: [(True, True)]}[level]
    generation.sync_weights()
    generation.llm.wake_up(tags=["kv_cache"])
    assert apart_nats(trainer) <= EXACT


def test_what_vllm_cannot_run_as_an_adapter(served: Callable[[str], Any]) -> None:
    def refused(**settings: Any) -> str | None:
        model = AutoModelForCausalLM.from_pretrained(served("qwen3"), dtype=torch.float32)
        return lora.refusal(get_peft_model(model, adapter(**settings)))

    assert refused() is None
    assert refused(use_rslora=True) is None
    for settings, key in [
        ({"use_dora": True}, "peft.use_dora"),
        ({"modules_to_save": ["embed_tokens"]}, "peft.modules_to_save"),
        ({"lora_bias": True}, "peft.lora_bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "peft.target_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "peft.target_modules: lm_head"),
        ({"r": 1000}, "peft.r"),
    ]:
        reason = refused(**settings)
        assert reason is not None and f"({key})" in reason, settings
    assert lora.refusal(AutoModelForCausalLM.from_pretrained(served("qwen3"))) == "the model has no adapter (peft)"
    other = AutoModelForCausalLM.from_config(
        GPTNeoXConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    adapted = get_peft_model(other, adapter(target_modules=["query_key_value"]))
    assert lora.refusal(adapted) == "vLLM's GPTNeoXForCausalLM takes none"


def test_auto(served: Callable[[str], Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(served("qwen3"), dtype=torch.float32)

    def chosen(model: Any, device: str) -> tuple[str, str]:
        accelerator = SimpleNamespace(device=torch.device(device))
        return sync.choose(SimpleNamespace(model=model, accelerator=accelerator), EngineOptions("auto"))

    assert chosen(model, "cuda") == ("batched", "no adapter can be sent: the model has no adapter (peft)")
    adapted = get_peft_model(model, adapter())
    assert chosen(adapted, "cuda") == ("adapter", "the adapter is all that training changes")
    assert chosen(adapted, "cpu") == ("batched", sync.SLOW_ON_CPU)


def test_dora_is_batched_with_the_reason(unlocked: Trainers, text_rows: Rows) -> None:
    trainer = unlocked("qwen3", text_rows, "auto", lora=adapter(use_dora=True))
    way, why = way_of(trainer)
    assert way == "batched" and "peft.use_dora" in why
    check(trainer, text_rows)


def test_modules_to_save_are_pushed(unlocked: Trainers, text_rows: Rows) -> None:
    trainer = unlocked("qwen3", text_rows, "batched", lora=adapter(modules_to_save=["norm"]))
    check(trainer, text_rows)
    pushed = sum("base_layer" in name or "modules_to_save" in name for name, _ in trainer.model.named_parameters())
    assert sync.facts(trainer)[-1].tensors == pushed


def test_an_adapter_that_is_asked_for_in_vain_is_one_line(unlocked: Trainers, text_rows: Rows) -> None:
    with pytest.raises(ConfigError) as error:
        unlocked("qwen3", text_rows, "adapter", lora=False)
    assert str(error.value) == (
        "vllm.weight_sync: vLLM cannot run the adapter: the model has no adapter (peft). Set it to batched or auto."
    )


def four_bits() -> dict[str, Any]:
    """QLoRA: the engine holds what the 4-bit weights stand for, and the adapter in full."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {"model_init_kwargs": {"dtype": "float32", "quantization_config": quantized}}


class TestFourBits:
    """What a base in 4 bits does not allow; what it does is in the matrix of `test_engine_matrix`."""

    def test_merging_is_refused(self, unlocked: Trainers, text_rows: Rows) -> None:
        with pytest.raises(ConfigError, match=r"^vllm.weight_sync: an adapter merged into 4-bit weights"):
            unlocked("qwen3", text_rows, "merged", lora=adapter(), **four_bits())

    def test_quantized_layers_of_vllm_are_refused(self, unlocked: Trainers, text_rows: Rows) -> None:
        keys = {"quantization": "bitsandbytes"}
        with pytest.raises(ConfigError, match=r"^vllm.quantization: "):
            unlocked("qwen3", text_rows, "auto", keys=keys, lora=adapter(), **four_bits())
