"""One decoding step: the newest token of each row through the model, to the logits of the next.

`GeneralStep` asks transformers to prepare each step's inputs. `FixedStep` prepares them once and moves them on, which
is exact where a step's inputs differ in nothing but ids, positions and the length of the mask. `GraphStep` keeps every
shape within a bucket of tokens, so that a step can be captured in a CUDA graph and replayed. RMS norms are the one
kernel that PyTorch has for them; transformers writes them as six to eight.

Legend: A rows that the model runs, T tokens of a row so far, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, GenerationMixin

from grpo_autotune.speedups.conditions import replaced
from grpo_autotune.speedups.generation.cache import RoomyLayer, make_room
from grpo_autotune.speedups.generation.weights import is_compiled

CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer)
"""Kinds of cache whose rows can be selected without loss."""

PROMPT_ONLY = frozenset(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)
"""What the model takes with the prompt and never again."""

Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], Any], torch.Tensor]]
"""Of a function without arguments that always writes the same memory: how to run it again, and its result."""


class Unsupported(RuntimeError):
    """The model keeps something in its cache, or wants something at each step, whose rows are not known here."""


class GeneralStep:
    """A step as transformers' own loop runs it, from the state that `generate` carries on after reading the prompts."""

    def __init__(self, model: Any, state: dict[str, Any]) -> None:
        self.model, self.state = model, state

    def __call__(self, ids_AT: torch.Tensor) -> torch.Tensor:
        """Logits (A, V) in float32 after the last of the tokens, all but which have been through the model."""
        inputs = self.model.prepare_inputs_for_generation(ids_AT, next_sequence_length=1, **self.state)
        outputs = self.model(**inputs, return_dict=True)
        self.state = self.model._update_model_kwargs_for_generation(outputs, self.state)
        return _last(outputs.logits)

    def keep(self, rows: torch.Tensor, before: int) -> None:
        """Go on with these rows out of `before`."""
        self.state = select(self.state, rows, before)


class FixedStep(GeneralStep):
    """A step whose inputs are prepared once; the longest row has `longest` tokens, once done."""

    def __init__(self, model: Any, state: dict[str, Any], longest: int) -> None:
        super().__init__(model, state)
        self.inputs: dict[str, Any] | None = None
        self.mask_AL: torch.Tensor | None = None
        self.longest = longest
        all_roomy = make_room(state["past_key_values"], longest)
        self.mask_is_final = all_roomy and model.config.get_text_config()._attn_implementation == "sdpa"

    @staticmethod
    def fits(model: Any, state: Mapping[str, Any]) -> bool:
        """True where transformers' own preparation is all that happens to the inputs of a step."""
        preparation = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
        return (
            all(getattr(type(model), name) is getattr(GenerationMixin, name) for name in preparation)
            and isinstance(state.get("past_key_values"), DynamicCache)
            and isinstance(state.get("position_ids"), torch.Tensor)
        )

    def __call__(self, ids_AT: torch.Tensor) -> torch.Tensor:
        inputs = self._moved_on(ids_AT)
        inputs |= {"input_ids": ids_AT[:, -1:], "attention_mask": self._mask(ids_AT.shape[1])}
        return _last(self.model(**inputs, return_dict=True).logits)

    def keep(self, rows: torch.Tensor, before: int) -> None:
        if self.inputs is None:
            super().keep(rows, before)
            return
        self.inputs = select(self.inputs, rows, before)
        if self.mask_AL is not None:
            self.mask_AL = self.mask_AL.index_select(0, rows)

    def _moved_on(self, ids_AT: torch.Tensor) -> dict[str, Any]:
        """The inputs of this step, but for ids and mask."""
        if self.inputs is not None:
            self.inputs["position_ids"] += 1
            return self.inputs
        inputs = self.model.prepare_inputs_for_generation(ids_AT, next_sequence_length=1, **self.state)
        mask_AT = inputs.pop("attention_mask", None)
        if mask_AT is not None and not bool(mask_AT.all()):  # prompts of different lengths: padding on the left
            dtype = torch.bool if self.mask_is_final else mask_AT.dtype
            self.mask_AL = torch.ones(len(mask_AT), self.longest, dtype=dtype, device=mask_AT.device)
            self.mask_AL[:, : mask_AT.shape[1]] = mask_AT
        self.inputs = {**inputs, "position_ids": inputs["position_ids"].clone()}
        return self.inputs

    def _mask(self, tokens: int) -> torch.Tensor | None:
        """The mask of the padding: None, (A, 1, 1, T) as attention takes it, or (A, T) for the model to work out."""
        if self.mask_AL is None:
            return None
        mask_AT = self.mask_AL[:, :tokens]
        return mask_AT[:, None, None] if self.mask_is_final else mask_AT


class GraphStep(FixedStep):
    """A step of constant shapes: captured for each number of rows and bucket of tokens, and replayed; by `cuda_graph`,
    or on other devices a stand-in that runs it again."""

    def __init__(self, model: Any, state: dict[str, Any], longest: int, capture: Capture) -> None:
        super().__init__(model, state, longest)
        if not self.mask_is_final:
            raise Unsupported("decode: graph needs sdpa and layers that see the whole text")
        if (kind := _dynamic_rope(model)) is not None:
            raise Unsupported(f"decode: graph replays one step, and rope_type {kind} looks at the length at each")
        self.capture = capture
        self.replay: Callable[[], Any] | None = None

    def __call__(self, ids_AT: torch.Tensor) -> torch.Tensor:
        inputs = self._moved_on(ids_AT)
        if self.replay is None or ids_AT.shape[1] > self.mask_A11R.shape[-1]:
            self._capture(ids_AT, inputs)
        else:
            self.tokens_A1.copy_(ids_AT[:, -1:])
            self.place.add_(1)
            self.mask_A11R.index_fill_(3, self.place, True)
        assert self.replay is not None
        self.replay()
        return _last(self.logits)

    def keep(self, rows: torch.Tensor, before: int) -> None:
        super().keep(rows, before)
        self.replay = None

    def _capture(self, ids_AT: torch.Tensor, inputs: dict[str, Any]) -> None:
        tokens, layers = ids_AT.shape[1], inputs["past_key_values"].layers
        self.place = torch.full((1,), tokens - 1, device=ids_AT.device)
        for layer in layers:
            room = layer.reserve(tokens)
            layer.place = self.place
        self.tokens_A1 = ids_AT[:, -1:].clone()
        self.mask_A11R = torch.zeros(len(ids_AT), 1, 1, room, dtype=torch.bool, device=ids_AT.device)
        self.mask_A11R[:, 0, 0, :tokens] = True if self.mask_AL is None else self.mask_AL[:, :tokens]
        inputs = {**inputs, "input_ids": self.tokens_A1, "attention_mask": self.mask_A11R}
        self.replay, self.logits = self.capture(lambda: self.model(**inputs, return_dict=True).logits)


def _dynamic_rope(model: Any) -> str | None:
    """The kind of rotary positions whose frequencies the host chooses by the length of the text; None without."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)  # of each kind of layer, or one
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if "dynamic" in str(kind):  # as `dynamic_rope_update` asks (transformers/modeling_rope_utils.py)
                return str(kind)
    return None


def cuda_graph(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], Any], torch.Tensor]:
    """Capture a step after two runs that let libraries choose kernels; its replay, and the tensor that it fills."""
    ahead: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    here = torch.cuda.current_stream()
    ahead.wait_stream(here)
    with torch.cuda.stream(ahead):
        for _ in range(2):
            step()
    here.wait_stream(ahead)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def select(state: Mapping[str, Any], rows: torch.Tensor, before: int) -> dict[str, Any]:
    """The state that `generate` carries from step to step, for the given rows out of `before`; `Unsupported` is raised
    where something in it is not known to have rows, or none."""
    selected: dict[str, Any] = {}
    for name, value in state.items():
        if name in PROMPT_ONLY:
            continue
        if isinstance(value, torch.Tensor) and value.ndim:
            selected[name] = _select_tensor(name, value, rows, before)
        elif isinstance(value, DynamicCache) and all(type(layer) in CACHE_LAYERS for layer in value.layers):
            value.batch_select_indices(rows)
            selected[name] = value
        elif value is None or isinstance(value, bool | int | float | str):
            selected[name] = value
        else:
            raise Unsupported(f"`{name}` ({type(value).__name__}) of the model is not known to be made of rows")
    return selected


def _select_tensor(name: str, value: torch.Tensor, rows: torch.Tensor, before: int) -> torch.Tensor:
    axis = 1 if name == "position_ids" and value.ndim == 3 else 0
    if value.shape[axis] != before:
        if value.shape[axis] == 1:
            return value
        raise Unsupported(f"`{name}` of the model has shape {tuple(value.shape)} for {before} rows")
    return value.index_select(axis, rows.to(value.device))


def _last(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].to(copy=True, dtype=torch.float32)


@contextmanager
def one_kernel_norms(model: Any) -> Iterator[None]:
    """Inside it, norms of the kind `weight * x / sqrt(mean(x^2) + eps)` are one call of `rms_norm`, but in a compiled
    model. The sum is taken in float32 as there; in bfloat16 the result is rounded once in place of twice."""
    norms = [] if is_compiled(model) else [module for module in model.get_decoder().modules() if _is_such(module)]
    try:
        for norm in norms:
            norm.forward = partial(_normed, norm, norm.forward)
        yield
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)


def _is_such(module: nn.Module) -> bool:
    """True for the class that most models copy from Llama; a forward that somebody replaced is left alone."""
    copied = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    untouched = "forward" not in vars(module) and replaced(module, "forward") is None
    return copied and untouched and getattr(module, "weight", None) is not None


def _normed(norm: Any, forward: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or states.dtype != norm.weight.dtype:
        return forward(states, *args, **kwargs)
    return nn.functional.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)
