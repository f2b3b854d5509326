"""A layer and its adapter in one step: equal up to rounding, fewer kernels, and PEFT's where it is more than that."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.exactness import generation, loss_and_gradients, ready
from tests.support.pairs import patched

from grpo_autotune.speedups import fused_lora  # isort: skip
from grpo_autotune.speedups.fused_lora import FusedLora  # isort: skip
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


def layer_of(trainer):
    return next(module for module in trainer.model.modules() if isinstance(module, Linear))


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
    layer = layer_of(trainer)
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


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B", "lora_dropout", "all"])
def test_somebody_who_looks_on_sees_every_module(tiny, tmp_path, text_rows, part):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    speedups = speed_up(trainer, ["fused_lora"])
    layer = layer_of(trainer)
    seen = []
    module = {"base_layer": layer.base_layer}.get(part) or getattr(layer, part, {"default": None})["default"]
    register = torch.nn.modules.module.register_module_forward_hook if part == "all" else module.register_forward_hook
    handle = register(lambda *call: seen.append(call))
    layer(torch.randn(1, layer.in_features))
    assert seen and speedups.facts()["fused_lora"]["calls"] == 0
    assert row_of(speedups).on and "left to PEFT so far: a layer or a part of it has hooks" in row_of(speedups).reason
    handle.remove()
    count = len(seen)
    layer(torch.randn(1, layer.in_features))
    assert len(seen) == count and speedups.facts()["fused_lora"]["calls"] == 1
    assert "left to PEFT" not in row_of(speedups).reason


@pytest.mark.parametrize("part", [torch.nn.Linear, Linear])
def test_a_forward_that_is_replaced_later_is_called(tiny, tmp_path, text_rows, monkeypatch, part):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    speedups = speed_up(trainer, ["fused_lora"])
    layer, plain = layer_of(trainer), part.forward
    x = torch.randn(2, layer.in_features)
    layer(x)
    monkeypatch.setattr(part, "forward", lambda self, x: plain(self, x) * 0.0)
    assert not layer(x).any() and speedups.facts()["fused_lora"]["calls"] == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lora_dropout": 0.1}, "peft.lora_dropout is 0.1"),
        ({"use_dora": True}, "peft.use_dora"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "peft.lora_bias"),
        ({"bias": "all", "target_modules": ["q_proj"]}, "peft.bias"),
    ],
)
def test_it_says_where_a_layer_is_more_than_that(tiny, tmp_path, picture_rows, given, told):
    trainer = ready(tiny("qwen2_5_vl"), picture_rows, tmp_path, lora=lora(**given))
    row = row_of(speed_up(trainer, ["fused_lora"]))
    assert not row.on and told in row.reason


def test_a_bias_that_is_trained_is_trained(tiny, tmp_path, picture_rows):
    """Of query, key and value, which alone have one: the other layers are fused beside them."""
    trainer = ready(tiny("qwen2_5_vl"), picture_rows, tmp_path, lora=lora(bias="all"))
    batch = generation(trainer)
    _, wanted = loss_and_gradients(trainer, batch)
    speedups = speed_up(trainer, ["fused_lora"])
    _, found = loss_and_gradients(trainer, batch)
    assert speedups.facts()["fused_lora"]["calls"] > 0
    assert any(name.endswith("q_proj.base_layer.bias") for name in wanted) and found.keys() == wanted.keys()
    assert all(far(found[name], wanted[name]) < 1e-5 for name in wanted)


def test_types_that_nothing_brings_together_are_pefts(tiny, tmp_path, text_rows):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora(), model_init_kwargs={"dtype": torch.bfloat16})
    row = row_of(speed_up(trainer, ["fused_lora"]))
    assert not row.on and "model.dtype" in row.reason
    layer, x = adapted(torch.float32), torch.randn(2, 8)
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    trainer.model.base_model.model.added = layer
    speedups = speed_up(trainer, ["fused_lora"])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        layer(x.double())  # as plain PEFT
    assert speedups.facts()["fused_lora"]["calls"] == 1


def test_a_dropout_that_is_somebodys_own_is_called(tiny, tmp_path, text_rows):
    class Halving(torch.nn.Module):
        def forward(self, x):
            return x / 2

    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora(target_modules=["q_proj"]))
    for layer in (module for module in trainer.model.modules() if isinstance(module, Linear)):
        layer.lora_dropout["default"] = Halving()
    row = row_of(speed_up(trainer, ["fused_lora"]))
    assert not row.on and "other modules than torch's own" in row.reason


@pytest.mark.parametrize(
    ("lacking", "told"), [("adapters", "peft"), ("FSDP", "shards"), ("ZeRO 3", "shards"), ("copies", "DataParallel")]
)
def test_it_is_off_where_there_is_nothing_to_fuse(tiny, tmp_path, text_rows, monkeypatch, lacking, told):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lacking != "adapters" and lora())
    if lacking == "FSDP":
        monkeypatch.setattr(type(trainer), "is_fsdp_enabled", True, raising=False)
        trainer.is_fsdp_enabled = True
    if lacking == "ZeRO 3":
        plugin = SimpleNamespace(zero_stage=3)
        monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    if lacking == "copies":
        trainer.args._n_gpu = 2
    why = FusedLora().applies(trainer)
    assert why is not None and told in why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_a_keeps_no_inputs(tiny, tmp_path, text_rows, dtype):
    """LoRA-FA trains B alone: the layer's input is needed by nobody, as in PEFT."""
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    layer = adapted(torch.float32)
    layer.lora_A["default"].requires_grad_(False)
    trainer.model.base_model.model.added = layer

    def kept():
        x, bytes_ = torch.randn(512, 8, requires_grad=True).mul(1.0), []
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda t: (bytes_.append(t.nbytes), t)[1], lambda t: t),
        ):
            layer(x)
        return sum(bytes_)

    plain = kept()
    speedups = speed_up(trainer, ["fused_lora"])
    assert kept() <= plain + 1024  # of A and B themselves
    assert speedups.facts()["fused_lora"]["calls"] == 1


def test_scaling_does_not_overflow_half_precision(tiny, tmp_path, text_rows):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    layer = adapted(torch.float16)
    layer.set_scale("default", 1 / 64 / 3)
    torch.nn.init.constant_(layer.lora_B["default"].weight, 60.0)
    trainer.model.base_model.model.added = layer
    speedups = speed_up(trainer, ["fused_lora"])
    x = torch.randn(4, 8, dtype=torch.float16, requires_grad=True)
    layer(x).backward(torch.full((4, 6), 500.0, dtype=torch.float16))
    assert speedups.facts()["fused_lora"]["calls"] == 1
    assert bool(x.grad.isfinite().all()) and bool(layer.lora_A["default"].weight.grad.isfinite().all())


def test_it_is_off_in_a_compiled_model(tiny, tmp_path, text_rows):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora(), torch_compile=True)
    row = row_of(speed_up(trainer, ["fused_lora"]))
    assert not row.on and "grpo.torch_compile" in row.reason


def test_layers_follow_their_adapters(tiny, tmp_path, text_rows):
    """Another scaling, another adapter, two at once, adapters that were merged and unloaded."""
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    speedups = speed_up(trainer, ["fused_lora"])
    layer = layer_of(trainer)
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


class Wrong:
    """Stands for a formula with a mistake: of the scale, or of one gradient."""

    def __init__(self, what):
        self._what, self._right = what, fused_lora._Fused.apply

    def apply(self, x, weight, bias, a, b, scale):
        if self._what == "scale":
            return self._right(x, weight, bias, a, b, 2.0 * scale)
        tensors = {"input": x, "A": a, "B": b}
        wrong = tensors[self._what]
        tensors[self._what] = 1.5 * wrong - 0.5 * wrong.detach()  # the same values, another gradient
        return self._right(tensors["input"], weight, bias, tensors["A"], tensors["B"], scale)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("what", ["scale", "input", "A", "B"])
def test_a_difference_leaves_the_work_to_peft(tiny, tmp_path, text_rows, monkeypatch, what, bf16):
    """A fresh adapter's product is zero, and so is A's gradient; both are compared as in a trained one."""
    monkeypatch.setattr(fused_lora, "_Fused", Wrong(what))
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora(), spread=0.0, bf16=bf16)
    batch = generation(trainer)
    _, wanted = loss_and_gradients(trainer, batch)
    weights = dict(trainer.model.named_parameters())
    speedups = speed_up(trainer, ["fused_lora"])
    _, found = loss_and_gradients(trainer, batch)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted) and found.keys() == wanted.keys()
    assert not row_of(speedups).on and "a layer's output and gradients off by" in row_of(speedups).reason
    assert all(weight is weights[name] for name, weight in trainer.model.named_parameters())


def test_removal_leaves_nothing(tiny, tmp_path, text_rows):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=lora())
    before = patched(trainer)
    speedups = speed_up(trainer, ["fused_lora"])
    assert patched(trainer) != before
    speedups.remove()
    assert patched(trainer) == before
