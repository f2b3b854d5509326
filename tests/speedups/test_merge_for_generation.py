"""Adapters added to weights for a generation and taken out again: same tokens, same weights to the last bit."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
from peft import LoraConfig

from grpo_autotune.estimate.adapters import adapter_sizes
from grpo_autotune.estimate.memory import Sizes, memory
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.predict.speedups import weight_copies
from tests.estimate.test_cost import run_facts, training
from tests.support.exactness import set_to_train
from tests.support.kernel_count import per_token
from tests.support.trainers import make_trainer

from grpo_autotune.speedups.generation import decoding, weights  # isort: skip
from grpo_autotune.speedups.generation.decoding import Decoder  # isort: skip
from grpo_autotune.speedups.generation.merge_for_generation import to_merge, merged  # isort: skip
from grpo_autotune.speedups.generation.step import FixedStep  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip
import torch  # isort: skip

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 6, 7]] * 4)


def trainer_of(tiny, tmp_path, rows, kind="qwen3", **lora):
    config = LoraConfig(r=4, target_modules=TARGETS, **lora)
    return set_to_train(make_trainer(tiny(kind), rows, tmp_path, lora=config))


def row_of(trainer, names):
    speedups = speed_up(trainer, names)
    return speedups, next(row for row in speedups.table() if row.name == "merge_for_generation")


def greedy(trainer, **kwargs):
    with torch.no_grad():
        return trainer.model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False, **kwargs)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_vl"])
def test_same_tokens_and_weights_to_the_last_bit(tiny, tmp_path, text_rows, kind):
    trainer = trainer_of(tiny, tmp_path, text_rows, kind)
    before = {name: (parameter, parameter.clone()) for name, parameter in trainer.model.named_parameters()}
    wanted = greedy(trainer)
    speedups, row = row_of(trainer, ["merge_for_generation"])
    assert row.on and torch.equal(greedy(trainer), wanted)
    assert speedups.facts()["merge_for_generation"] == {"generations": 1.0, "layers": 14.0}
    for name, parameter in trainer.model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert len(list(to_merge(trainer.model))) == 14, "nothing stays merged"


def test_the_adapter_is_in_the_weights_while_it_generates(tiny, tmp_path, text_rows):
    trainer = trainer_of(tiny, tmp_path, text_rows)
    layer = next(to_merge(trainer.model))
    states = torch.randn(5, layer.in_features)
    with torch.no_grad():
        wanted = layer(states)
        assert not torch.allclose(layer.base_layer(states), wanted, atol=1e-3)
        with merged([layer]):
            assert torch.allclose(layer.base_layer(states), wanted, atol=1e-5)
            assert torch.equal(layer(states), layer.base_layer(states))


def test_the_estimate_knows_the_copies_of_weights(tiny, tmp_path, text_rows, monkeypatch):
    monkeypatch.setattr(weights, "WIDE", 1)
    trainer = trainer_of(tiny, tmp_path, text_rows)
    model, layers = trainer.model.get_base_model(), list(to_merge(trainer.model))
    shape = ModelShape.from_config(trainer.model.config.to_dict())
    sizes = adapter_sizes(shape, {"r": 4, "target_modules": TARGETS})
    for dtype, value_bytes in ((torch.float32, 4), (torch.bfloat16, 2)):
        with torch.no_grad(), merged(layers):
            with torch.autocast("cpu", dtype, enabled=value_bytes == 2), weights.products(model) as dtypes:
                model(IDS)
            copies = [layer.get_base_layer().weight for layer in layers]
            copies += [weight for _, weight in weights.for_decoding(model, dtypes)]
        how = training(shape, text_weights=False, adapters=sizes, value_bytes=value_bytes)
        names = {"shared_prefill", "merge_for_generation"}
        assert weight_copies(shape, how, names, on_gpu=False) == sum(weight.nbytes for weight in copies)
        found = memory(shape, run_facts(shape, training=how), Sizes(10.0, 10.0, 0.0, weight_copies=7.0))
        assert found.phases["generation"] == replace(found, copies=0.0).phases["generation"] + 7.0


def test_a_failed_generation_leaves_the_weights_too(tiny, tmp_path, text_rows):
    trainer = trainer_of(tiny, tmp_path, text_rows)
    layer = next(to_merge(trainer.model))
    weight = layer.base_layer.weight
    with pytest.raises(ZeroDivisionError), merged([layer]):
        raise ZeroDivisionError
    assert layer.base_layer.weight is weight and not layer.merged


def test_an_adapter_that_is_off_stays_off(tiny, tmp_path, text_rows):
    trainer = trainer_of(tiny, tmp_path, text_rows)
    with trainer.model.disable_adapter():
        assert list(to_merge(trainer.model)) == []


def test_a_wrong_sum_is_noticed(tiny, tmp_path, text_rows, monkeypatch, caplog):
    trainer = trainer_of(tiny, tmp_path, text_rows)
    wanted = greedy(trainer)
    layer = next(to_merge(trainer.model))
    monkeypatch.setattr(layer, "get_delta_weight", lambda name: torch.zeros_like(layer.base_layer.weight))
    row_of(trainer, ["merge_for_generation"])
    assert torch.equal(greedy(trainer), wanted) and "speed-up merge_for_generation is off" in caplog.text


@pytest.mark.parametrize(
    ("lora", "reason"), [({"use_dora": True}, "use_dora"), ({"lora_dropout": 0.1}, "peft.lora_dropout is 0.1")]
)
def test_it_says_where_it_does_not_apply(tiny, tmp_path, text_rows, lora, reason):
    _, row = row_of(trainer_of(tiny, tmp_path, text_rows, **lora), ["merge_for_generation"])
    assert not row.on and reason in row.reason


def test_without_an_adapter_there_is_nothing_to_merge(tiny, tmp_path, text_rows):
    _, row = row_of(make_trainer(tiny("qwen3"), text_rows, tmp_path, lora=False), ["merge_for_generation"])
    assert not row.on and "no LoRA adapter" in row.reason


@pytest.mark.parametrize(("weights", "on"), [("float32", False), ("any", True)])
def test_weights_that_round_have_to_be_asked_for(tiny, tmp_path, text_rows, weights, on):
    trainer = trainer_of(tiny, tmp_path, text_rows)
    for parameter in trainer.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    _, row = row_of(trainer, [{"name": "merge_for_generation", "weights": weights}])
    assert row.on is on and (on or "model.dtype is bfloat16" in row.reason)


def test_a_token_takes_half_the_kernels_of_transformers_own_steps(tiny, tmp_path, text_rows, monkeypatch):
    trainer = trainer_of(tiny, tmp_path, text_rows, "qwen3_vl")
    trainer.model.gradient_checkpointing_disable()

    def run(tokens):
        decoder = Decoder(torch.zeros(4, dtype=torch.long), look_every=8)
        trainer.model.generate(input_ids=IDS[:1], max_new_tokens=tokens, do_sample=True, custom_generate=decoder)

    with torch.no_grad(), merged(list(to_merge(trainer.model))):
        ours, waits = per_token(run)
    monkeypatch.setattr(FixedStep, "fits", staticmethod(lambda model, state: False))
    monkeypatch.setattr(decoding, "one_kernel_norms", lambda model: nullcontext())
    before, _ = per_token(run)
    assert ours <= before / 2 and waits <= 1 / 8
