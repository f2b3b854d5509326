"""The engine's image processor makes the trainer's pixels, and the engine is sized for the images there are.

vLLM loads its own processor from the model's folder. Where its settings are not those of the trainer's, or the first
image comes out with other pixels, training stops with what differs.

vLLM reserves memory for as many tokens as the largest image that the processor lets through has (16,384 for Qwen-VL),
and for videos. Where the largest image of the data is known, the engine's processor is given it as its limit: images
within it come out the same.
"""

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.rollout.colocate.placeholders import MEDIA
from grpo_autotune.rollout.parts import Part
from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, Next, wrap

SETTINGS = (
    "do_resize", "size", "min_pixels", "max_pixels", "resample", "crop_size", "do_center_crop", "do_rescale",
    "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb", "do_pad", "patch_size",
    "temporal_patch_size", "merge_size",
)  # fmt: skip
"""Settings of an image processor on which its pixels, or the number of image tokens, depend."""

PIXELS_APART = 0.02
"""Mean difference of normalized pixel values (standard deviations about 0.27, so 1.4 of 255) from which two processors
do not make the same image; backends (Pillow, torchvision) that resize the same way are within a tenth of it."""

SPELLINGS = frozenset({"size", "min_pixels", "max_pixels"})
"""Settings of which a processor may have two spellings."""

NORMALIZING = frozenset({"do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"})
"""Settings that vLLM takes from the saved files alone where its vision tower normalizes (`mm_device_do_normalize`)."""

KEY = "mm_processor_kwargs"


class TrainerProcessor(Part):
    """The image processor of a colocated engine, sized for the data and compared with the trainer's."""

    def llm_keys(self, generation: Any) -> dict[str, Any]:
        """The limit of the engine's processor, where the data's images are known and the user gave none."""
        processor = getattr(generation.processing_class, "image_processor", None)
        if processor is None or not self.options.image_sizes:
            return {}
        keys: dict[str, Any] = {"limit_mm_per_prompt": {"video": 0}}  # TRL sends none, and it is the largest item
        size = size_limit(processor, self.options.image_sizes)
        if size is not None and KEY not in self.options.keys:
            keys[KEY] = {"images_kwargs": {"size": size}}
        return keys

    def started(self, generation: Any, llm: Any) -> list[Handle]:
        """Compare the settings of the two processors (ConfigError), and later the pixels of the first image."""
        ours = getattr(generation.processing_class, "image_processor", None)
        model = llm.llm_engine.vllm_config.model_config
        if ours is None or model.multimodal_config is None:
            return []
        from vllm.transformers_utils.processor import cached_get_processor

        # the engine's own object leaves rescaling and normalizing to the vision tower, with the values of the saved
        # files
        saved = cached_get_processor(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
        theirs, given = saved.image_processor, dict(self.options.keys.get(KEY) or {})
        given |= given.pop("images_kwargs", {})
        if model.multimodal_config.mm_device_do_normalize:
            given = {name: value for name, value in given.items() if name not in NORMALIZING}
        engines = settings(theirs, given)
        compare_settings(settings(ours), engines)
        state = {"checked": False}

        def generate(call_next: Next, /, prompts: Any, *args: Any, **kwargs: Any) -> Any:
            image = None if state["checked"] else _first_image(prompts)
            if image is not None:
                state["checked"] = True
                compare_pixels(ours, theirs, {name: engines[name] for name in engines.keys() & {*given, "size"}}, image)
            return call_next(prompts, *args, **kwargs)

        return [wrap(AttributeSlot(llm, "generate"), generate, INNER)]


def size_limit(processor: Any, image_sizes: Iterable[tuple[int, int]]) -> dict[str, int] | None:
    """The `size` of an image processor that goes by pixel counts (Qwen-VL) for images of these widths and heights; None
    for a processor that does not, or whose own limit is no larger."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    saved = _plain(processor.size)
    if not isinstance(saved, Mapping) or not {"shortest_edge", "longest_edge"} <= saved.keys():
        return None
    unit, least, most = processor.patch_size * processor.merge_size, saved["shortest_edge"], saved["longest_edge"]
    resized = (smart_resize(height, width, unit, least, most) for width, height in image_sizes)
    limit = max(least, *(height * width for height, width in resized))
    return None if limit >= most else {"shortest_edge": least, "longest_edge": limit}


def settings(processor: Any, given: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The settings of an image processor that matter, with those that are given to every call in their place."""
    values = {name: _plain(getattr(processor, name, None)) for name in SETTINGS}
    size = values["size"]
    if isinstance(size, dict):  # processors of Qwen-VL keep both spellings of their limits
        edges = {"shortest_edge": given.get("min_pixels"), "longest_edge": given.get("max_pixels")}
        values["size"] = size | (given.get("size") or {}) | {k: v for k, v in edges.items() if v is not None}
        if "longest_edge" in size:
            values |= {"min_pixels": None, "max_pixels": None}
    return values | {name: _plain(value) for name, value in given.items() if name in SETTINGS and name not in SPELLINGS}


def compare_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """ConfigError for the first setting that differs, with both values and what to do."""
    for name, value in ours.items():
        if value != theirs[name]:
            raise ConfigError(
                f"the trainer's image processor has {name} {value}, and the engine's, from the model's folder, "
                f"{theirs[name]}",
                where=f"vllm.{KEY}",
                fix=f"Set {name} there to the trainer's value, or resize the data (data.image_size) and leave the "
                "processor as it was saved.",
            )


def compare_pixels(ours: Any, theirs: Any, given: Mapping[str, Any], image: Any) -> None:
    """ConfigError where the two processors make another number of patches, or other pixels, of one image."""
    given = {name: value for name, value in given.items() if value is not None}
    a = ours(images=[image], return_tensors="pt")["pixel_values"].float()
    b = theirs(images=[image], return_tensors="pt", **given)["pixel_values"].float()
    apart = float((a - b).abs().mean()) if a.shape == b.shape else None
    if apart is None or apart > PIXELS_APART:
        told = f"{list(a.shape)} and {list(b.shape)} values" if apart is None else f"values {apart:.3g} apart"
        raise ConfigError(
            f"{type(ours).__name__} of the trainer and {type(theirs).__name__} of the engine make {told} of one image",
            where=f"vllm.{KEY}",
            fix="Give the trainer the processor that is saved with the model.",
        )


def _first_image(prompts: Any) -> Any:
    for prompt in prompts:
        media = prompt.get(MEDIA, {}).get("image") if isinstance(prompt, dict) else None
        if media is not None:
            return media[0] if isinstance(media, list) else media
    return None


def _plain(value: Any) -> Any:
    """A setting as Python values that compare: sizes are classes of their own, lists may be tuples."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value
