"""Gated MLPs that keep half of their matrices for the backward pass.

Of `down(act(gate(x)) * up(x))` a training pass keeps the gate, its activation, the up projection and the product. Here
the activation and the product are computed again when the backward pass asks for them, by the same two kernels on the
same numbers: the bits are the same. Small matrices are kept: they cost more time than memory. Where checkpointing or
somebody's hooks keep tensors, or see the activation, all is left to them.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, Next, wrap
from grpo_autotune.speedups.conditions import is_seen, replaced

ACTIVATIONS = {
    "torch.nn.modules.activation": {"SiLU"},
    "transformers.activations": {"SiLUActivation", "GELUActivation", "GELUTanh"},
}
"""Those of one kernel, which autocast leaves alone and which keeps its input, not its result; by their modules."""


def _returned(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _named(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504


def _code(function: Any) -> tuple[bytes, tuple[str, ...]] | None:
    """All that a function does, whatever its variables are called; None of one that is not Python's."""
    code = getattr(function, "__code__", None)
    return code and (code.co_code, code.co_names)


LEAST_BYTES = 4 << 20
"""Size of a matrix from which it is computed again: on a CPU that takes 2 % of a pass whose matrices are smaller."""
FORMS = {_code(_returned), _code(_named)}
"""The two ways in which transformers writes the formula."""


def wrap_gated(model: nn.Module, is_on: Callable[[], bool]) -> Iterator[Handle]:
    """Put a layer on each MLP of the formula, which acts while `is_on`."""
    for module in model.modules():
        if hasattr(module, "down_proj") and hasattr(module, "act_fn") and _is_gated(module):
            yield wrap(AttributeSlot(module, "forward"), _layer(module, is_on), INNER)


def _is_gated(module: nn.Module) -> bool:
    act = module.act_fn
    if type(act).__name__ not in ACTIVATIONS.get(type(act).__module__, ()) or getattr(act, "inplace", False):
        return False
    return replaced(act, "forward") is None and "forward" not in vars(module) and _code(type(module).forward) in FORMS


def _layer(mlp: Any, is_on: Callable[[], bool]) -> Callable[..., torch.Tensor]:
    def forward(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        hooked = is_seen(mlp.act_fn) or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if kwargs or len(args) != 1 or hooked or not (torch.is_grad_enabled() and is_on()):
            return call_next(*args, **kwargs)
        gate, up = mlp.gate_proj(*args), mlp.up_proj(*args)
        if gate.nbytes < LEAST_BYTES:
            return mlp.down_proj(mlp.act_fn(gate) * up)
        kept = _Kept(mlp.act_fn.forward, gate.detach(), up.detach())
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, _unpack):
            activated = kept.recognize(mlp.act_fn(gate))
            return mlp.down_proj(kept.recognize(activated * up))

    return forward


class _Again(NamedTuple):
    """A view of the activation, or of the product, that is to be computed again."""

    kept: "_Kept"
    product: bool
    view: tuple[Any, ...]  # size, stride and offset


class _Kept:
    """The two matrices that are kept of an MLP, and how to recognize the two that are not, while it runs."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor) -> None:
        self._act, self._gate, self._up = act, gate, up
        self._places: list[int] = []
        self._activated: torch.Tensor | None = None  # from the product's turn to its own, which comes next

    def recognize(self, made: torch.Tensor) -> torch.Tensor:
        """The activation first, then the product."""
        self._places.append(made.untyped_storage().data_ptr())
        return made

    def pack(self, tensor: torch.Tensor) -> "torch.Tensor | _Again":
        place = tensor.untyped_storage().data_ptr()
        if place not in self._places:  # of ZeRO 3 a view of a weight would hold what was gathered
            return tensor if tensor.is_leaf else tensor.detach()  # itself it would be kept by what made it
        view = tensor.shape, tensor.stride(), int(tensor.storage_offset())
        return _Again(self, self._places.index(place) == 1, view)

    def made(self, product: bool) -> torch.Tensor:
        with torch.no_grad():
            activated = self._act(self._gate) if self._activated is None else self._activated
            self._activated = activated if product else None
            return activated * self._up if product else activated


def _unpack(packed: "torch.Tensor | _Again") -> torch.Tensor:
    return packed if isinstance(packed, torch.Tensor) else packed.kept.made(packed.product).as_strided(*packed.view)
