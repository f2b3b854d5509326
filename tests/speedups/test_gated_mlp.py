"""Gated MLPs keep two matrices of four for the backward pass: the same bits, fewer bytes, nothing where others keep."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from torch import nn

from tests.support.exactness import generation, loss_and_gradients, ready
from tests.support.live_bytes import LiveBytes
from tests.support.pairs import patched

from grpo_autotune.speedups.install import speed_up  # isort: skip
from grpo_autotune.speedups.shared_prefix import gated_mlp, speedup  # isort: skip

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def least(monkeypatch):
    """Tiny matrices count."""
    monkeypatch.setattr(gated_mlp, "LEAST_BYTES", 0)


def kept(trainer, batch):
    """Bytes that a training pass leaves for its backward pass."""
    with LiveBytes() as live:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        return live.now if loss.requires_grad else 0


def with_and_without(trainer, monkeypatch):
    """Bytes kept, loss and gradients of one batch of shared_prefix, with all of an MLP kept and with half; and the
    tokens of a pass."""
    found = []
    for wrapping in (lambda model, is_on: iter(()), gated_mlp.wrap_gated):
        monkeypatch.setattr(speedup, "wrap_gated", wrapping)
        speedups = speed_up(trainer, ["shared_prefix", "lora_input"])
        batch = generation(trainer)
        found.append((kept(trainer, batch), *loss_and_gradients(trainer, batch)))
        facts = speedups.facts()["shared_prefix"]
        assert facts["shared_passes"] > 0
        speedups.remove()
    return *found, facts["tokens"] / facts["shared_passes"]


@pytest.mark.parametrize(
    ("kind", "lora", "half"),
    [("qwen3", True, False), ("qwen3_vl", True, True), ("llama", False, False), ("qwen2_5_vl", False, False)],
)
def test_the_same_bits_from_half_of_the_matrices(
    tiny, tmp_path, text_rows, picture_rows, monkeypatch, kind, lora, half
):
    rows = picture_rows if kind.endswith("vl") else text_rows
    grpo = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_checkpointing": False, "bf16": half}
    trainer = ready(tiny(kind), rows, tmp_path, lora=lora, **grpo)
    (all_bytes, loss, gradients), (half_bytes, same_loss, same), _ = with_and_without(trainer, monkeypatch)
    assert torch.equal(loss, same_loss)
    assert gradients.keys() == same.keys() and all(torch.equal(same[name], gradients[name]) for name in gradients)
    assert any(bool(gradient.any()) for gradient in gradients.values())
    assert half_bytes < all_bytes


def test_what_is_spared_is_the_activation_and_the_product(tiny, tmp_path, text_rows, monkeypatch):
    grpo = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=False, **grpo)
    (all_bytes, *_), (half_bytes, *_), tokens = with_and_without(trainer, monkeypatch)
    config, float_bytes = trainer.model.config, 4
    assert all_bytes - half_bytes == 2 * tokens * config.num_hidden_layers * config.intermediate_size * float_bytes


def test_small_matrices_are_kept(tiny, tmp_path, text_rows, monkeypatch):
    grpo = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=False, **grpo)
    monkeypatch.setattr(gated_mlp, "LEAST_BYTES", 1 << 30)
    (all_bytes, *_), (half_bytes, *_), _ = with_and_without(trainer, monkeypatch)
    assert half_bytes == all_bytes


def test_the_activation_is_computed_once_more_not_twice():
    calls = []
    matrices = torch.randn(2, 3), torch.randn(2, 3)
    kept = gated_mlp._Kept(lambda gate: (calls.append(gate), torch.sigmoid(gate))[1], *matrices)
    activated = torch.sigmoid(matrices[0])
    for _ in range(2):  # as for a graph that is gone through twice
        assert torch.equal(kept.made(product=True), activated * matrices[1])
        assert torch.equal(kept.made(product=False), activated)
    assert len(calls) == 2 and kept._activated is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_what_it_keeps(tiny, tmp_path, text_rows, monkeypatch, reentrant):
    """A layer that is computed again would hold both matrices beside its input."""
    grpo = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_checkpointing": True}
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=True, **grpo)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    (plain_bytes, loss, gradients), (bytes_, same_loss, same), _ = with_and_without(trainer, monkeypatch)
    assert bytes_ == plain_bytes and torch.equal(loss, same_loss)
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)


class Gated(nn.Module):
    """As transformers write it, and what looks like it."""

    def __init__(self, act_fn):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Added(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Clipped(Gated):
    def forward(self, x):
        x = x.clamp(max=1.0)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Scaled(Gated):
    def forward(self, x):
        hidden = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return hidden * 2


class Residual(Gated):
    def forward(self, x):
        return x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def doubled(forward):
    return functools.wraps(forward)(lambda self, x: forward(self, x) * 2)


class Decorated(Gated):
    @doubled
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Wrapped(Gated):
    forward = doubled(Gated.forward)


class Named(Gated):
    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        result = self.down_proj(self.act_fn(self.gate_proj(hidden_state)) * self.up_proj(hidden_state))
        return result  # noqa: RET504


class Builtin(Gated):
    forward = len


class SiLU(nn.Module):
    """Another one of this name."""

    def forward(self, x):
        return x * x


def test_other_formulas_are_left_alone():
    def served(module):
        return len(list(gated_mlp.wrap_gated(module, lambda: True)))

    patched_one = Gated(nn.SiLU())
    patched_one.forward = lambda x: x
    assert served(Gated(nn.SiLU())) == served(Named(nn.SiLU())) == 1
    for kind in (Added, Clipped, Scaled, Residual, Decorated, Wrapped, Builtin):
        assert served(kind(nn.SiLU())) == 0, kind
    for other in (Gated(nn.Softplus()), Gated(nn.ReLU()), Gated(SiLU()), Gated(nn.SiLU(inplace=True)), patched_one):
        assert served(other) == 0, other


SEEN = {
    "a hook": lambda act, see: act.register_forward_hook(lambda *given: see()),
    "a hook before it": lambda act, see: act.register_forward_pre_hook(lambda *given: see()),
    "a hook of its gradient": lambda act, see: act.register_full_backward_hook(lambda *given: see()),
    "a forward of its own": lambda act, see: setattr(act, "forward", lambda x: (nn.functional.silu(x), see())[0]),
    "a hook of all modules": lambda act, see: nn.modules.module.register_module_forward_hook(
        lambda module, *given: see() if module is act else None
    ),
}


@pytest.mark.parametrize("how", SEEN)
def test_an_activation_that_somebody_sees_runs_as_often_as_without(how):
    mlp, calls = Gated(nn.SiLU()), []
    (layer,) = gated_mlp.wrap_gated(mlp, lambda: True)
    handle = SEEN[how](mlp.act_fn, lambda: calls.append(how))
    mlp(torch.ones(2, 4)).sum().backward()
    assert calls == [how]
    for one in filter(None, (handle, layer)):
        one.remove()


def test_a_graph_that_nobody_holds_is_freed_at_once():
    """Also where an operation within keeps its own result."""
    mlp = Gated(nn.SiLU())
    mlp.down_proj = nn.Sequential(mlp.down_proj, nn.Sigmoid(), nn.Linear(4, 4))
    (handle,) = gated_mlp.wrap_gated(mlp, lambda: True)
    results = []
    mlp.down_proj[1].register_forward_hook(lambda module, inputs, result: results.append(weakref.ref(result)))
    mlp(torch.ones(2, 4))
    assert len(results) == 1 and results[0]() is None
    handle.remove()


def test_nothing_is_left_behind(tiny, tmp_path, text_rows):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path)
    before = patched(trainer)
    speedups = speed_up(trainer, ["shared_prefix"])
    layers = [module for module in trainer.model.modules() if "forward" in vars(module)]
    assert len([layer for layer in layers if hasattr(layer, "act_fn")]) == trainer.model.config.num_hidden_layers
    speedups.remove()
    assert patched(trainer) == before
