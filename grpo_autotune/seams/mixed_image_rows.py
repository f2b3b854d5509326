"""Rows without images among rows with some, in a generation, in a micro batch, or by themselves.

TRL 1.16 hands the processor None for the images of such a row, which Qwen-VL's processors do not take; and for a micro
batch wholly of such rows it hands the model image tensors of no rows, which its vision tower does not take. Here such a
row has an empty list of images, a generation wholly of them has tensors of no images, and the model gets none of those.

Several processes add up the gradients of all trained weights, and wait for those of a tower that has seen no image on
one of them; a sharded tower, trained or not, runs on all of them or on none. So such a micro batch, and the prompts of
such a generation, are given a blank image whose features are multiplied by zero, in the place where the others run the
tower. And a process whose rows all have an empty list of images takes part where TRL gathers those of the others.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from grpo_autotune.seams.fully_sharded import gathers
from grpo_autotune.seams.layers import INNER, AttributeSlot, ClassSlot, Handle, Layer, Next, wrap
from grpo_autotune.seams.stored_images import image_columns
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.seams.trainer_access import base_of, models_of

PATCHES, GRID = "pixel_values", "image_grid_thw"
"""What TRL cuts into micro batches and hands to models of Qwen-VL's kind: patches (n, values) and a row per image."""


def mend(trainer: Any) -> list[Handle]:
    """Put layers on a trainer's processor and models; none where its images are no grids of patches: models of other
    layouts take no micro batch without images either, and TRL's own error says that there are none."""
    processor = trainer.processing_class
    if GRID not in getattr(getattr(processor, "image_processor", None), "model_input_names", ()):
        return []
    handles = [wrap(ClassSlot(processor, "__call__"), _process, INNER)]
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    if trainer.accelerator.num_processes > 1 and image_columns(columns):
        handles += wrap_seams(trainer, rollout=_rollout)
    for model in models_of(trainer):
        backbone = base_of(model).base_model
        layer = _forward(trainer, backbone, with_images=bool(image_columns(columns)))
        handles.append(wrap(AttributeSlot(backbone, "forward"), layer, INNER))
    return handles


def without_empty(inputs: dict[str, Any]) -> dict[str, Any]:
    """A model's inputs, its image tensors left out where they hold no image."""
    if inputs.get(GRID) is None or len(inputs[GRID]):
        return inputs
    return {name: value for name, value in inputs.items() if name not in (PATCHES, GRID)}


def _process(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
    import torch

    images = kwargs.get("images")
    if not isinstance(images, list) or all(row is not None for row in images):
        return call_next(*args, **kwargs)
    if any(images):
        return call_next(*args, **{**kwargs, "images": [[] if row is None else row for row in images]})
    inputs = call_next(*args, **{**kwargs, "images": None})
    inputs[PATCHES], inputs[GRID] = torch.zeros(0, 0), torch.zeros(0, 3, dtype=torch.long)
    return inputs


def _rollout(call_next: Next, /, prompts: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Images None for each row where this process has none: TRL gathers them from the processes that have some."""
    *others, images, of_tools = call_next(prompts, *args, **kwargs)
    return *others, [None] * len(prompts) if images is None else images, of_tools


def _forward(trainer: Any, backbone: Any, *, with_images: bool) -> Layer:
    tower = getattr(backbone, "visual", None)
    waited_for = trainer.accelerator.num_processes > 1 and tower is not None

    def with_nothing(embedding: Any, inputs: Any, states: Any) -> Any:
        return states + _nothing(tower).to(states.dtype)

    def forward(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        kwargs = without_empty(kwargs)
        others_run = waited_for and (_is_trained(tower) or (with_images and _is_shared(tower, kwargs)))
        if not others_run or kwargs.get(PATCHES) is not None:
            return call_next(*args, **kwargs)
        handle = backbone.get_input_embeddings().register_forward_hook(with_nothing)
        try:
            return call_next(*args, **kwargs)
        finally:
            handle.remove()

    return forward


def _is_trained(tower: Any) -> bool:
    import torch

    return torch.is_grad_enabled() and any(weight.requires_grad for weight in tower.parameters())


def _is_shared(tower: Any, kwargs: Mapping[str, Any]) -> bool:
    past = kwargs.get("past_key_values")  # beyond the prompt no rank has images
    return gathers(tower) and not (past is not None and past.get_seq_length())


def _nothing(tower: Any) -> Any:
    """Zero, computed from every weight of the tower."""
    import torch

    sizes, side, weight = tower.config, tower.spatial_merge_size, next(tower.parameters())
    values = sizes.in_channels * sizes.temporal_patch_size * sizes.patch_size**2
    output = tower(
        torch.zeros(side * side, values, dtype=weight.dtype, device=weight.device),
        grid_thw=torch.tensor([[1, side, side]], device=weight.device),
        return_dict=True,
    )
    return 0.0 * sum(tensor.sum() for tensor in _tensors((output.pooler_output, output.get("deepstack_features"))))


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif value is not None:
        yield value
