"""A linear layer and its LoRA adapter as one step of the graph.

PEFT computes `W x`, `A x`, `B (A x)`, its scaling and the sum one after the other, and autograd their gradients too.
Here the adapter's product is added into the layer's output where that lies, and its gradient into that of the input: a
training pass starts 3 kernels forward instead of 5 and 5 backward instead of 7, and makes one matrix of the output's
size instead of four. The same sums in another order: equal up to rounding (the formulas are those of Unsloth's
`LoRA_W`, 2024).

T: tokens, I: inputs, O: outputs, R: rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from grpo_autotune.seams.layers import INNER, AttributeSlot, Next, wrap
from grpo_autotune.seams.trainer_access import models_of
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.conditions import in_copies, is_seen, replaced
from grpo_autotune.speedups.selfcheck import SelfCheck, autocast_dtype

CHECKED_TOKENS = 64


class FusedLora:
    """As `speedups.base.SpeedUp`."""

    name = "fused_lora"
    summary = "a linear layer and its adapter in one step, forward and backward"
    stands_for = ()

    def applies(self, trainer: Any) -> str | None:
        zero = trainer.accelerator.state.deepspeed_plugin
        if trainer.is_fsdp_enabled or (zero is not None and zero.zero_stage == 3):
            return "weights in shards (FSDP, ZeRO 3) are gathered for modules that are called by themselves"
        if trainer.args.torch_compile:
            return "a compiled model is fused by its compiler (grpo.torch_compile)"
        reasons = [_foreign(layer) or why_not(layer, _autocast(trainer)) for layer in _adapted(trainer)]
        if None not in reasons:
            return next(iter(reasons), "the model has no linear layer with a LoRA adapter (peft) that is not quantized")
        return in_copies(trainer)

    def install(self, trainer: Any) -> Installed:
        return _Fusing(self.name, trainer)


def _autocast(trainer: Any) -> bool:
    return bool(trainer.args.bf16 or trainer.args.fp16)


def _adapted(trainer: Any) -> Iterator[nn.Module]:
    """The linear layers with adapters that are PEFT's, quantized ones aside."""
    from peft.tuners.lora import Linear

    for model in models_of(trainer):
        yield from (layer for layer in model.modules() if type(layer) is Linear and layer.lora_A)


def why_not(layer: Any, autocast: bool) -> str | None:
    """The reason why a layer, as it is now, is not `W x + scale B (A x)` alone in types that are or, with `autocast`,
    are brought to one; None where it is."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return "a layer has several adapters on, or none, or a merged one"
    name = active[0]
    base, a, b, drop = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if name in layer.lora_variant:
        return "DoRA and other variants of LoRA (peft.use_dora) are more than a product of two matrices"
    if (rate := getattr(drop, "p", None)) is not None and rate > 0.0:
        return f"peft.lora_dropout is {rate:g}"
    if type(drop) not in (nn.Identity, nn.Dropout) or any(type(part) is not nn.Linear for part in (base, a, b)):
        return "a layer or its adapter is made of other modules than torch's own (peft, quantized weights)"
    if any(type(part.weight) is not nn.Parameter for part in (base, a, b)):
        return "a layer's weight is a kind of tensor of its own (quantized weights)"
    if any(map(is_seen, (base, a, b, drop))):
        return "a layer or a part of it has hooks, or a forward of its own"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "a layer's own weights or bias are trained beside its adapter (peft.bias)"
    if a.bias is not None or b.bias is not None:
        return "adapters have a bias (peft.lora_bias)"
    types = {part.weight.dtype for part in (base, a, b)}
    if torch.float64 in types if autocast else len(types) > 1:
        return (
            "a layer and its adapter are of several types (model.dtype) that autocast (grpo.bf16) does not bring to one"
        )
    return None


def _foreign(layer: Any) -> str | None:
    """The code of somebody else's that runs in a layer, in words."""
    return next(filter(None, (replaced(part, "forward") for part in layer.modules())), None)


def _forwards() -> list[Any]:
    """The code of the modules that a layer is made of, as their classes have it now."""
    from peft.tuners.lora import Linear

    return [kind.forward for kind in (Linear, nn.Linear, nn.Dropout, nn.Identity)]


class Parts(NamedTuple):
    """Weights of a layer and of its one active adapter."""

    weight: torch.Tensor  # (O, I)
    bias: torch.Tensor | None  # (O)
    a: torch.Tensor  # (R, I)
    b: torch.Tensor  # (O, R)
    scale: float


def parts_of(layer: Any) -> Parts:
    """Of a layer that `why_not` says nothing against."""
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    base = layer.base_layer
    return Parts(base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


class _Fusing(Installed):
    """Layers of one trainer, and the calls that were fused or left to PEFT."""

    def __init__(self, name: str, trainer: Any) -> None:
        super().__init__(name)
        self._check = SelfCheck(self)
        self._forwards = _forwards()
        self._left: str | None = None  # why the last call was that was left to PEFT
        for layer in _adapted(trainer):
            if _foreign(layer) is None and why_not(layer, _autocast(trainer)) is None:
                self.handles.append(wrap(AttributeSlot(layer, "forward"), self._layer(layer), INNER))
        self.counts = {"layers": float(len(self.handles)), "calls": 0.0}

    @property
    def note(self) -> str:
        """The reason why no call was fused so far; empty where one was."""
        return "" if self.counts["calls"] or self._left is None else f"left to PEFT so far: {self._left}"

    def _layer(self, layer: Any) -> Callable[..., Any]:
        def forward(call_next: Next, /, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs or self.fell_back is not None or not torch.is_grad_enabled():
                return call_next(x, *args, **kwargs)
            cast = autocast_dtype(x.device.type)
            reason = why_not(layer, cast is not None)
            if _forwards() != self._forwards:
                reason = "the forward of a class of PEFT's or torch's was replaced"
            if (
                reason is None
                and x.dtype != layer.base_layer.weight.dtype
                and (cast is None or x.dtype == torch.float64)
            ):
                reason = f"its input is of type {x.dtype}"
            if reason is not None:
                self._left = reason
                return call_next(x)

            def fused(x: torch.Tensor) -> torch.Tensor:
                x_TI = x.to(cast or x.dtype).reshape(-1, x.shape[-1])
                output_TO: torch.Tensor = _Fused.apply(x_TI, *parts_of(layer))  # type: ignore[no-untyped-call]
                return output_TO.view(*x.shape[:-1], output_TO.shape[-1])

            if not self._agree(layer, x, call_next, fused, cast or x.dtype):
                return call_next(x)
            self.counts["calls"] += 1
            return fused(x)

        return forward

    def _agree(self, layer: Any, x: torch.Tensor, plain: Next, fused: Next, dtype: torch.dtype) -> bool:
        """True if both give the same output, adapter's part of it and gradients for some tokens of the first call."""
        if self._check.passed is not None or not x.numel():
            return self._check.passed is not False
        x_TI = x.detach().reshape(-1, x.shape[-1])[:CHECKED_TOKENS]
        sizes: list[float] = []  # each of the values counts by its own

        def values(compute: Next) -> torch.Tensor:
            results = _results(layer, x_TI, compute)
            if not sizes:
                sizes.extend(float(result.square().mean().sqrt()) or 1.0 for result in results)
            return torch.cat([(result / size).flatten() for result, size in zip(results, sizes, strict=True)])

        with _as_trained(layer, x_TI):
            what = "a layer's output and gradients"
            return self._check.run(lambda: values(plain), lambda: values(fused), dtype, what)


def _results(layer: Any, x_TI: torch.Tensor, compute: Next) -> list[torch.Tensor]:
    """The output, what the adapter has of it, and the gradients of input, A and B for a gradient drawn once."""
    parts, x_TI = parts_of(layer), x_TI.clone().requires_grad_()
    # whoever keeps tensors meanwhile (gradient checkpointing counts them) sees none of these
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        output_TO = compute(x_TI)
        given_TO = torch.randn(output_TO.shape, generator=torch.Generator().manual_seed(0)).to(output_TO)
        gradients = torch.autograd.grad(output_TO, [x_TI, parts.a, parts.b], given_TO)
    results = output_TO, output_TO - layer.base_layer(x_TI), *gradients
    return [result.detach().double() for result in results]


@contextmanager
def _as_trained(layer: Any, x_TI: torch.Tensor) -> Iterator[None]:
    """Inside it an adapter whose product is as large as the layer's: a fresh one's is zero."""
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    a, b = layer.lora_A[name], layer.lora_B[name]
    before = a.weight, b.weight
    with torch.no_grad():
        of_layer, low_TR = layer.base_layer(x_TI).double(), (x_TI.double() @ a.weight.double().T)
        drawn_OR = torch.randn(b.weight.shape, generator=torch.Generator().manual_seed(1)).to(low_TR)
        product = layer.scaling[name] * (low_TR @ drawn_OR.T)
        drawn_OR *= of_layer.norm() / product.norm().clamp(min=1e-30)
    try:
        a.weight, b.weight = nn.Parameter(a.weight.detach().clone()), nn.Parameter(drawn_OR.to(b.weight.dtype))
        yield
    finally:
        a.weight, b.weight = before


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
        """Scaled by the kernels, which sum in float32: half precision holds the result where it holds PEFT's."""
        x_TI, weight_OI, a_RI, b_OR, low_TR = ctx.saved_tensors
        for_x, _, _, for_a, for_b, _ = ctx.needs_input_grad
        # with beta 0 the first is not read
        low_gradient_TR = torch.addmm(gradient_TO.new_empty(1), gradient_TO, b_OR, beta=0, alpha=ctx.scale)
        x_gradient = a_gradient = b_gradient = None
        if for_x:
            x_gradient = (gradient_TO @ weight_OI).addmm_(low_gradient_TR, a_RI)
        if for_a:
            a_gradient = low_gradient_TR.T @ x_TI
        if for_b:
            b_gradient = torch.addmm(b_OR, gradient_TO.T, low_TR, beta=0, alpha=ctx.scale)
        return x_gradient, None, None, a_gradient, b_gradient, None
