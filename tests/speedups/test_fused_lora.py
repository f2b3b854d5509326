"""A layer and its adapter in one step: equal up to rounding, fewer kernels, and PEFT's where it is more than that."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.exactness import generation, loss_and_gradients, ready
from tests.support.pairs import patched

from grpo_autotune.speedups.install import speed_up  # isort: skip

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Kernels(TorchDispatchMode):
    """Counts what is given to a device, views and empty tensors aside."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in str(function) and "detach" not in str(function):
            self.count[str(function)] += 1
        return function(*args, **(kwargs or {}))


def lora(**given):
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ALL, **given})


def row_of(speedups):
    return next(row for row in speedups.table() if row.name == "fused_lora")


def adapted(dtype=torch.float64, bias=False, **given):
    """A layer with an adapter that is not zero."""
    torch.manual_seed(0)
    layer = Linear(torch.nn.Linear(8, 6, bias=bias, dtype=dtype), "default", config=lora(**given), r=2, lora_alpha=6)
    layer.base_layer.requires_grad_(False)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer.to(dtype)


def far(found, wanted):
    found, wanted = found.detach(), wanted.detach()
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("kind", "grpo"),
    [
        ("qwen3", {}),
        ("qwen3", {"gradient_checkpointing": True}),
        ("qwen3", {"gradient_checkpointing": True, "reentrant": True}),
        ("qwen3_vl", {"beta": 0.04}),
        ("llama", {}),
    ],
)
@pytest.mark.parametrize("names", [["fused_lora"], ["fused_lora", "shared_prefix"]])
def test_loss_and_gradients_are_plain_ones(tiny, tmp_path, text_rows, picture_rows, kind, grpo, names):
    rows = picture_rows if kind.endswith("vl") else text_rows
    reentrant = {"use_reentrant": True} if "reentrant" in grpo else None
    trainer = ready(tiny(kind), rows, tmp_path, lora=lora(), **{k: v for k, v in grpo.items() if k != "reentrant"})
    if reentrant:
        trainer.model.gradient_checkpointing_enable(reentrant)
    batch = generation(trainer)
    wanted_loss, wanted = loss_and_gradients(trainer, batch)
    speedups = speed_up(trainer, names)
    loss, found = loss_and_gradients(trainer, batch)
    assert speedups.facts()["fused_lora"]["calls"] >= speedups.facts()["fused_lora"]["layers"] > 0
    assert far(loss, wanted_loss) < 1e-5
    assert found.keys() == wanted.keys() and all(far(found[name], wanted[name]) < 1e-5 for name in wanted)
    assert row_of(speedups).on


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_half_precision_is_no_further_off_than_plain_half_precision(tiny, tmp_path, text_rows, base):
    def of(**grpo):
        return ready(tiny("qwen3"), text_rows, tmp_path, lora=lora(), **grpo)

    exact, half = of(bf16=False), of(bf16=True, model_init_kwargs={"dtype": base})
    batch = generation(exact)
    (_, exact_gradients), (_, wanted) = loss_and_gradients(exact, batch), loss_and_gradients(half, batch)
    speedups = speed_up(half, ["fused_lora"])
    _, found = loss_and_gradients(half, batch)
    assert speedups.facts()["fused_lora"]["calls"] > 0

    def median(first, second):
        return sorted(far(first[name], second[name]) for name in second)[len(second) // 2]

    assert median(found, wanted) < median(wanted, exact_gradients)
    assert all(found[name].dtype == wanted[name].dtype for name in wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,), (0, 8)])
def test_a_layer_in_double_precision(bias, shape, tiny, tmp_path, text_rows):
    layer, x = adapted(bias=bias), torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weights = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def computed():
        output = layer(x)
        return [output, *torch.autograd.grad((output**3).sum(), weights)]

    wanted = computed()
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    trainer.model.base_model.model.added = layer
    speedups = speed_up(trainer, ["fused_lora"])
    found = computed()
    assert speedups.facts()["fused_lora"]["calls"] == 1
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    layer(x).mul_(2.0).sum().backward()  # what comes out may be written over


def test_a_training_pass_starts_fewer_kernels(tiny, tmp_path, text_rows):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    batch = generation(trainer)

    def kernels():
        with Kernels() as seen:
            loss_and_gradients(trainer, batch)
        return sum(seen.count.values())

    plain = kernels()
    speedups = speed_up(trainer, ["fused_lora"])
    kernels()  # the self-check's
    layers = speedups.facts()["fused_lora"]["layers"]
    assert layers == 7 * trainer.model.config.num_hidden_layers
    assert plain - kernels() >= 4 * layers


def test_passes_without_gradients_are_pefts(tiny, tmp_path, text_rows):
    """So are reference log-probs of a model whose adapters are disabled, and merged weights."""
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    speedups = speed_up(trainer, ["fused_lora"])
    layer = next(module for module in trainer.model.modules() if isinstance(module, Linear))
    x = torch.randn(1, layer.in_features)
    with torch.no_grad():
        layer(x)
    with trainer.model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))
    layer.merge()
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.unmerge()
    assert speedups.facts()["fused_lora"]["calls"] == 0
    layer(x)
    assert speedups.facts()["fused_lora"]["calls"] == 1


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_somebody_who_looks_on_sees_every_module(tiny, tmp_path, text_rows, part):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    speedups = speed_up(trainer, ["fused_lora"])
    layer = next(module for module in trainer.model.modules() if isinstance(module, Linear))
    module, seen = getattr(layer, part), []
    module = module["default"] if part != "base_layer" else module
    handle = module.register_forward_hook(lambda *call: seen.append(call))
    layer(torch.randn(1, layer.in_features))
    assert len(seen) == 1 and speedups.facts()["fused_lora"]["calls"] == 0
    handle.remove()
    layer(torch.randn(1, layer.in_features))
    assert len(seen) == 1 and speedups.facts()["fused_lora"]["calls"] == 1


@pytest.mark.parametrize(
    "given",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}, {"bias": "all"}],
)
def test_it_says_where_a_layer_is_more_than_that(tiny, tmp_path, picture_rows, given):
    trainer = ready(tiny("qwen2_5_vl"), picture_rows, tmp_path, lora=lora(**given))
    row = row_of(speed_up(trainer, ["fused_lora"]))
    trained_in_part = given == {"bias": "all"}  # of query, key and value, which alone have one
    assert row.on is trained_in_part and (row.on or "plain LoRA" in row.reason)


def test_it_is_off_without_adapters(tiny, tmp_path, text_rows):
    row = row_of(speed_up(ready(tiny("qwen3"), text_rows, tmp_path, lora=False), ["fused_lora"]))
    assert not row.on and "peft" in row.reason


def test_it_is_off_in_a_compiled_model(tiny, tmp_path, text_rows):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora(), torch_compile=True)
    row = row_of(speed_up(trainer, ["fused_lora"]))
    assert not row.on and "grpo.torch_compile" in row.reason


def test_layers_follow_their_adapters(tiny, tmp_path, text_rows):
    """Another scaling, another adapter, two at once, adapters that were merged and unloaded."""
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    speedups = speed_up(trainer, ["fused_lora"])
    layer = next(module for module in trainer.model.modules() if isinstance(module, Linear))
    x = torch.randn(2, layer.in_features)

    def by_hand(*names):
        return layer.base_layer(x) + sum(layer.lora_B[n](layer.lora_A[n](x)) * layer.scaling[n] for n in names)

    layer.set_scale("default", 0.5)
    assert far(layer(x), by_hand("default")) < 1e-6
    trainer.model.add_adapter("other", lora())
    torch.nn.init.normal_(layer.lora_B["other"].weight)
    for names in (["other"], ["default", "other"], ["default"]):
        trainer.model.base_model.set_adapter(names)
        assert far(layer(x), by_hand(*names)) < 1e-6
    assert speedups.facts()["fused_lora"]["calls"] == 3  # two at once are PEFT's
    assert not any(isinstance(module, Linear) for module in trainer.model.merge_and_unload().modules())


def test_nobody_elses_forward_is_replaced(tiny, tmp_path, text_rows, monkeypatch):
    plain = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x, *args, **kwargs: 2 * plain(self, x, *args, **kwargs))
    assert not row_of(speed_up(ready(tiny("qwen3"), text_rows, tmp_path, lora=lora()), ["fused_lora"])).on


def test_a_difference_leaves_the_work_to_peft(tiny, tmp_path, text_rows, monkeypatch):
    from grpo_autotune.speedups import fused_lora

    right = fused_lora.parts_of
    monkeypatch.setattr(fused_lora, "parts_of", lambda *of: right(*of)._replace(scale=5.0))
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    batch = generation(trainer)
    _, wanted = loss_and_gradients(trainer, batch)
    speedups = speed_up(trainer, ["fused_lora"])
    _, found = loss_and_gradients(trainer, batch)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not row_of(speedups).on and "a layer's output" in row_of(speedups).reason


def test_removal_leaves_nothing(tiny, tmp_path, text_rows):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    before = patched(trainer)
    speedups = speed_up(trainer, ["fused_lora"])
    assert patched(trainer) != before
    speedups.remove()
    assert patched(trainer) == before
