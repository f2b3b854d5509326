"""A linear layer and its LoRA adapter as one step of the graph.

PEFT computes `W x`, `A x`, `B (A x)`, its scaling and the sum one after the other, and autograd their gradients too.
Here the adapter's product is added into the layer's output where that lies, and its gradient into that of the input: a
training pass starts 3 kernels forward instead of 5 and 5 backward instead of 7, and writes no matrix of the output's
size twice. The same sums in another order: equal up to rounding (the formulas are those of Unsloth's `LoRA_W`, 2024).

T: tokens, I: inputs, O: outputs, R: rank.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from grpo_autotune.seams.layers import INNER, AttributeSlot, Layer, Next, wrap
from grpo_autotune.seams.trainer_access import models_of
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.conditions import HOOKS, in_copies, replaced
from grpo_autotune.speedups.selfcheck import SelfCheck, autocast_dtype


class FusedLora:
    """As `speedups.base.SpeedUp`."""

    name = "fused_lora"
    summary = "a linear layer and its adapter in one step, forward and backward"
    stands_for = ()

    def applies(self, trainer: Any) -> str | None:
        if trainer.is_fsdp_enabled or any(hasattr(weight, "ds_id") for weight in trainer.model.parameters()):
            return "weights in shards (FSDP, ZeRO 3) are gathered for modules that are called by themselves"
        if trainer.args.torch_compile:
            return "a compiled model is fused by its compiler (grpo.torch_compile)"
        if next(_adapted(trainer), None) is None:
            plain = "one plain LoRA adapter (peft), without dropout, on frozen weights that are not quantized"
            return f"the model has no linear layer with {plain}"
        return in_copies(trainer)

    def install(self, trainer: Any) -> Installed:
        installed = Installed(self.name)
        check = SelfCheck(installed)
        for layer in _adapted(trainer):
            installed.handles.append(wrap(AttributeSlot(layer, "forward"), _layer(layer, installed, check), INNER))
        installed.counts = {"layers": float(len(installed.handles)), "calls": 0.0}
        return installed


def _adapted(trainer: Any) -> Iterator[nn.Module]:
    """The layers that this can stand in for, whose code is PEFT's."""
    from peft.tuners.lora import Linear

    autocast = bool(trainer.args.bf16 or trainer.args.fp16)
    for model in models_of(trainer):
        for layer in model.modules():
            if type(layer) is Linear and replaced(layer, "forward") is None and parts_of(layer, autocast) is not None:
                yield layer


class Parts(NamedTuple):
    """Weights of a layer and of its one active adapter."""

    weight: torch.Tensor  # (O, I)
    bias: torch.Tensor | None  # (O)
    a: torch.Tensor  # (R, I)
    b: torch.Tensor  # (O, R)
    scale: float


def parts_of(layer: Any, autocast: bool) -> Parts | None:
    """Of a layer as it is now; None where more than `W x + scale B (A x)` happens in it, somebody looks on, its own
    weights are trained, or its types differ without autocast to bring them together."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] in layer.lora_variant:
        return None
    name = active[0]
    base, a, b = modules = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    drop = layer.lora_dropout[name]
    idle = type(drop) is nn.Identity or (type(drop) is nn.Dropout and drop.p == 0.0)
    if not idle or _is_seen(drop) or not all(map(_is_plain, modules)):
        return None
    trained = any(weight.requires_grad for weight in base.parameters())
    several = not autocast and len({part.weight.dtype for part in modules}) > 1
    if trained or several or a.bias is not None or b.bias is not None:
        return None
    return Parts(base.weight, base.bias, a.weight, b.weight, layer.scaling[name])


def _is_plain(part: nn.Module) -> bool:
    """True of a linear layer as torch has it, that nobody has put a hook on."""
    return type(part) is nn.Linear and type(part.weight) is nn.Parameter and not _is_seen(part)


def _is_seen(part: nn.Module) -> bool:
    return "forward" in vars(part) or any(vars(part).get(kind) for kind in HOOKS)


def _layer(layer: Any, installed: Installed, check: SelfCheck) -> Layer:
    def forward(call_next: Next, /, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or installed.fell_back is not None or not torch.is_grad_enabled():
            return call_next(x, *args, **kwargs)
        cast = autocast_dtype(x.device.type)
        parts = parts_of(layer, cast is not None)
        if parts is None or (cast is None and x.dtype != parts.weight.dtype):
            return call_next(x)

        def fused() -> torch.Tensor:
            x_TI = x.to(cast or x.dtype).reshape(-1, x.shape[-1])
            output_TO: torch.Tensor = _Fused.apply(x_TI, *parts)  # type: ignore[no-untyped-call]
            return output_TO.view(*x.shape[:-1], output_TO.shape[-1])

        if not check.run(lambda: call_next(x), fused, cast or x.dtype, "a layer's output"):
            return call_next(x)
        installed.counts["calls"] += 1
        return fused()

    return forward


class _Fused(torch.autograd.Function):
    """`W x + bias + scale B (A x)` in the type of `x`."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, a_RI: torch.Tensor,
        b_OR: torch.Tensor, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        weight_OI, a_RI, b_OR = (weight.to(x_TI.dtype) for weight in (weight_OI, a_RI, b_OR))
        bias_O = None if bias_O is None else bias_O.to(x_TI.dtype)
        low_TR = x_TI @ a_RI.T
        output_TO = nn.functional.linear(x_TI, weight_OI, bias_O).addmm_(low_TR, b_OR.T, alpha=scale)
        for_x, _, _, for_a, for_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x_TI if for_a else None, weight_OI if for_x else None, a_RI, b_OR, low_TR if for_b else None
        )
        ctx.scale = scale
        return output_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, weight_OI, a_RI, b_OR, low_TR = ctx.saved_tensors
        for_x, _, _, for_a, for_b, _ = ctx.needs_input_grad
        low_gradient_TR = gradient_TO @ b_OR
        x_gradient = a_gradient = b_gradient = None
        if for_x:
            x_gradient = (gradient_TO @ weight_OI).addmm_(low_gradient_TR, a_RI, alpha=ctx.scale)
        if for_a:  # with beta 0 the first is but a shape
            a_gradient = torch.addmm(a_RI, low_gradient_TR.T, x_TI, beta=0, alpha=ctx.scale)
        if for_b:
            b_gradient = torch.addmm(b_OR, gradient_TO.T, low_TR, beta=0, alpha=ctx.scale)
        return x_gradient, None, None, a_gradient, b_gradient, None
