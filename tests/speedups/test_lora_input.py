"""Adapters read their half-precision input as it is: the same bits, fewer bytes kept, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.support.exactness import generation, loss_and_gradients, ready
from tests.support.live_bytes import LiveBytes
from tests.support.pairs import patched

from grpo_autotune.estimate.cost import training_of  # isort: skip
from grpo_autotune.estimate.memory import kept_bytes  # isort: skip
from grpo_autotune.estimate.passes import Batch  # isort: skip
from grpo_autotune.estimate.shapes import ModelShape  # isort: skip
from grpo_autotune.probe.trainer_facts import facts_of  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def half(tiny, tmp_path, rows, kind="qwen3", base=torch.bfloat16, **grpo):
    """A trainer under autocast, its base in half precision and its adapters in float32, as PEFT makes them."""
    lora = grpo.pop("lora", LoraConfig(r=2, target_modules=ALL))
    return ready(tiny(kind), rows, tmp_path, lora=lora, model_init_kwargs={"dtype": base}, **{"bf16": True, **grpo})


def row_of(speedups):
    return next(row for row in speedups.table() if row.name == "lora_input")


@pytest.mark.parametrize(
    ("kind", "base", "checkpointing"),
    [
        ("qwen3", torch.bfloat16, False),
        ("qwen3", torch.float32, True),
        ("qwen3_vl", torch.bfloat16, True),
        ("llama", torch.bfloat16, False),
    ],
)
def test_loss_and_gradients_are_the_same_bits(tiny, tmp_path, text_rows, picture_rows, kind, base, checkpointing):
    rows = picture_rows if kind.endswith("vl") else text_rows
    trainer = half(tiny, tmp_path, rows, kind, base, gradient_checkpointing=checkpointing)
    batch = generation(trainer)
    wanted_loss, wanted = loss_and_gradients(trainer, batch)
    speedups = speed_up(trainer, ["lora_input"])
    loss, found = loss_and_gradients(trainer, batch)
    assert speedups.facts()["lora_input"]["casts_left_out"] > 0
    assert torch.equal(loss, wanted_loss)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(bool(gradient.any()) for gradient in wanted.values())


def test_inputs_are_kept_once_as_the_memory_formula_says(tiny, tmp_path, text_rows):
    """Query, key and value keep one input between them, so do gate and up; attention's output is kept already."""
    trainer = half(tiny, tmp_path, text_rows, gradient_checkpointing=False)
    batch = generation(trainer)

    def kept():
        with LiveBytes() as live:
            loss = trainer.compute_loss(trainer.model, dict(batch))
            return live.now if loss.requires_grad else 0

    def formula():
        facts = facts_of(trainer)
        shape = ModelShape.from_config(facts.model_config_json)
        how, tokens = training_of(shape, facts), batch["prompt_ids"].numel() + batch["completion_ids"].numel()
        return kept_bytes(shape, Batch(1, tokens, tokens), how, eager=False)

    plain, plain_formula = kept(), formula()
    speed_up(trainer, ["lora_input"])
    config = trainer.model.config
    spared = 2 * config.num_hidden_layers * (3 * config.hidden_size + config.num_attention_heads * config.head_dim)
    tokens = batch["prompt_ids"].numel() + batch["completion_ids"].numel()
    assert plain - kept() == plain_formula - formula() == spared * tokens


def test_it_says_where_it_does_not_apply(tiny, tmp_path, text_rows):
    def why(**given):
        return row_of(speed_up(half(tiny, tmp_path, text_rows, **given), ["lora_input"]))

    assert not why(bf16=False).on and "grpo.bf16" in why(bf16=False).reason
    assert not why(lora=False).on and "peft" in why(lora=False).reason
    assert not why(lora=LoraConfig(r=2, target_modules=ALL, lora_dropout=0.1)).on
    assert not why(lora=LoraConfig(r=2, target_modules=ALL, use_dora=True)).on


def test_it_stands_in_for_nobody_elses_cast(tiny, tmp_path, text_rows, monkeypatch):
    plain = BaseTunerLayer._cast_input_dtype
    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", lambda self, x, dtype: plain(self, x * 2, dtype))
    assert not row_of(speed_up(half(tiny, tmp_path, text_rows), ["lora_input"])).on


def test_outside_autocast_peft_casts(tiny, tmp_path, text_rows):
    """A float32 product needs a float32 input; and removal leaves nothing."""
    trainer = half(tiny, tmp_path, text_rows)
    before = patched(trainer)
    speedups = speed_up(trainer, ["lora_input"])
    layer = next(module for module in trainer.model.modules() if hasattr(module, "lora_A"))
    x = torch.ones(1, layer.in_features, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16 and speedups.facts()["lora_input"]["casts_left_out"] == 0.0
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        layer(x.half())
    assert speedups.facts()["lora_input"]["casts_left_out"] == 1.0
    speedups.remove()
    assert patched(trainer) == before
