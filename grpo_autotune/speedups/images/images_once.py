"""Each distinct image is decoded once and processed once: for both of TRL's passes, all copies, and later epochs.

TRL runs the processor over all prompts twice a generation, for generation and for log-probs, on G copies of each image.
Images are told apart by their pixels, so that whatever happened to one on the way, what comes out is what the processor
makes of it. Rows are read on generating steps only (`lazy_rows`). To a GPU each distinct image goes once, through
pinned memory and in the vision tower's type, which the model would turn it into first thing; copies are made there.
"""

import hashlib
import weakref
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

import datasets
import torch
from cachetools import LRUCache
from PIL import Image as Pillow
from torch.utils.weak import WeakTensorKeyDictionary

from grpo_autotune.seams.layers import INNER, AttributeSlot, Next, wrap
from grpo_autotune.seams.table import DATALOADER, IMAGE_PROCESSOR, find, wrap_rows
from grpo_autotune.seams.trainer_access import models_of, towers_of
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.conditions import GENERATION, replaced
from grpo_autotune.speedups.images.lazy_rows import Rows, copied, image_bytes, private

DECODED_BYTES = 1 << 29
"""Memory for decoded images."""

PROCESSED_BYTES = 1 << 30
"""Memory for processed ones: about 40 of 1024 x 1024 pixels."""

MADE = {"pixel_values", "image_grid_thw"}
"""What image processors of Qwen-VL's layout make: it can be put together image by image."""

CHECKED_IMAGES = 3

Processed = tuple[torch.Tensor, torch.Tensor]
"""Patches (n, patch size) and grid (1, 3) of one image."""


class ImagesOnce:
    """The speed-up."""

    name = "images_once"
    summary = "each distinct image decoded and processed once, rows read on generating steps only"
    stands_for = (*GENERATION, "_generate", "_get_dataloader", "data_collator", "_prepare_inputs", "training_step")

    def applies(self, trainer: Any) -> str | None:
        """None where images come from rows that do not change."""
        processor = getattr(trainer.processing_class, "image_processor", None)
        if processor is None:
            return "the model (model.name_or_path) has no image processor"
        if not set(processor.model_input_names) >= MADE:
            return f"the image processor {type(processor).__name__} (model.name_or_path) pads images to each other"
        if (other := replaced(processor, "__call__")) is not None:
            return f"{other}, which may make each copy of an image anew"
        if trainer.environment_factories is not None:
            return "environment_factory: environments make the prompts"
        rows = trainer.train_dataset
        if not isinstance(rows, datasets.Dataset):
            return "the data (data.path) is streamed: its rows have no number"
        if not _as_stored(rows):
            return "the data (data.path) has a format or a transform, which may make each copy of a row anew"
        if trainer.args.remove_unused_columns:
            return "grpo.remove_unused_columns takes rows apart"
        return None

    def install(self, trainer: Any) -> Installed:
        installed = _Once(self.name, trainer)
        layers = (
            (DATALOADER, installed.dataloader),
            (IMAGE_PROCESSOR, installed.process),
            (find("rewards"), installed.rewards),
        )
        installed.handles += wrap_rows(trainer, layers, INNER)
        if trainer.accelerator.device.type != "cpu":
            installed.handles.append(wrap(AttributeSlot(trainer, "_prepare_input"), installed.send, INNER))
        return installed


class _Once(Installed):
    """Layers of one trainer, and the images they keep."""

    def __init__(self, name: str, trainer: Any) -> None:
        super().__init__(name)
        self.trainer = trainer
        self._decoded: LRUCache[Hashable, Any] = LRUCache(DECODED_BYTES, getsizeof=image_bytes)
        self._processed: LRUCache[Hashable, Processed] = LRUCache(
            PROCESSED_BYTES, getsizeof=lambda made: made[0].nbytes
        )
        self._loaded: weakref.WeakSet[Rows] = weakref.WeakSet()  # each evaluation has a loader of its own
        self._checked = False
        self._made = WeakTensorKeyDictionary()
        self._sent: tuple[tuple[Hashable, ...], tuple[torch.Tensor, ...]] = ((), ())
        self.counts = {"asked": 0.0, "processed": 0.0, "sent": 0.0}

    def facts(self) -> dict[str, float]:
        """Images that the processor was asked for, that it worked on and that went to a GPU, and the memory of all."""
        return {**self.counts, "kept_bytes": float(self._decoded.currsize + self._processed.currsize)}

    def remove(self) -> None:
        super().remove()
        for rows in self._loaded:
            rows.decoded = None  # a loader under way goes on: from here on each of its rows decodes for itself
        self._decoded.clear()
        self._processed.clear()
        self._sent = (), ()

    def dataloader(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        """A loader of rows that are read on first use; of whole rows where worker processes prepare them ahead."""
        rows = kwargs.get("dataset")
        if isinstance(rows, datasets.Dataset) and _as_stored(rows):  # those to evaluate on may have a transform
            lazy = self.trainer.args.dataloader_num_workers == 0
            kwargs["dataset"] = Rows(rows, self._decoded, lazy=lazy)
            self._loaded.add(kwargs["dataset"])
        return call_next(*args, **kwargs)

    def rewards(self, call_next: Next, /, inputs: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        """Reward functions get images of their own, in columns and in prompts."""
        return call_next([private(row) for row in inputs], copied(prompts), *args, **kwargs)

    def process(self, call_next: Next, /, images: Any, *args: Any, **kwargs: Any) -> Any:
        flat = _flat(images)
        if self.fell_back or args or not flat or not all(isinstance(image, Pillow.Image) for image in flat):
            return call_next(images, *args, **kwargs)
        if kwargs.get("return_tensors") not in (None, "pt"):
            return call_next(images, **kwargs)
        settings = self._settings(kwargs)
        keys = [(settings, content) for content in _contents(flat)]
        known = {key: kept for key in keys if (kept := self._processed.get(key)) is not None}
        missing = {key: image for key, image in zip(keys, flat, strict=True) if key not in known}
        if missing:
            made = call_next(list(missing.values()), **kwargs)
            parts = _apart(made, len(missing))
            if parts is None:
                self.fall_back(f"the image processor made {', '.join(sorted(made))}, not images side by side")
                return call_next(images, **kwargs)
            known.update(zip(missing, parts, strict=True))
        self.counts["asked"] += len(flat)
        self.counts["processed"] += len(missing)
        for key in missing:
            with suppress(ValueError):  # larger than the whole cache
                self._processed[key] = known[key]
        whole = _together([known[key] for key in keys])
        self._made[whole[0]] = keys, known
        return self._checked_once(call_next, flat, kwargs, whole)

    def send(self, call_next: Next, /, data: Any) -> Any:
        """As the trainer puts a tensor on its device; patches made here go there once per image."""
        if not isinstance(data, torch.Tensor) or data not in self._made or self.fell_back:
            return call_next(data)
        keys, known = self._made[data]
        distinct = tuple(dict.fromkeys(keys))
        if self._sent[0] != distinct:
            sizes = [len(known[key][0]) for key in distinct]
            patches = torch.cat([known[key][0] for key in distinct]).to(_tower_type(self.trainer, data.dtype))
            patches = patches.pin_memory() if torch.cuda.is_available() else patches
            patches = patches.to(self.trainer.accelerator.device, non_blocking=True)
            self._sent = distinct, torch.split(patches, sizes)
            self.counts["sent"] += len(distinct)
        arrived = dict(zip(*self._sent, strict=True))
        return call_next(torch.cat([arrived[key] for key in keys]))

    def _settings(self, kwargs: dict[str, Any]) -> str:
        """The settings that the outcome depends on: the call's options and the processor's own."""
        settings = vars(self.trainer.processing_class.image_processor)
        asked = {name: value for name, value in kwargs.items() if name != "return_tensors"}
        return repr((sorted(asked.items(), key=str), sorted(settings.items(), key=str)))

    def _checked_once(self, call_next: Next, images: list[Any], kwargs: dict[str, Any], whole: Processed) -> Any:
        """The outcome as the processor would return it; compared with what it does return, once, to the last bit."""
        from transformers import BatchFeature

        patches, grid = whole
        if not self._checked:
            self._checked = True
            some = images[:CHECKED_IMAGES]
            plain = call_next(some, **kwargs)
            size = len(plain["pixel_values"])
            same = torch.equal(patches[:size], plain["pixel_values"]) and torch.equal(
                grid[: len(some)], torch.as_tensor(plain["image_grid_thw"])
            )
            if not same:
                self.fall_back("its self-check found images that depend on those they are processed with")
                return call_next(images, **kwargs)
        return BatchFeature(data={"pixel_values": patches, "image_grid_thw": grid})


def _as_stored(rows: datasets.Dataset) -> bool:
    """True if each copy of a row is what is stored, all of it."""
    return rows.format["type"] is None and set(rows.format["columns"]) == set(rows.column_names)


def _tower_type(trainer: Any, otherwise: torch.dtype) -> torch.dtype:
    """The type of the vision towers, which images are turned into (`get_image_features` of Qwen-VL's models)."""
    types = {tower.dtype for model in models_of(trainer) for tower in towers_of(model)}
    return types.pop() if len(types) == 1 else otherwise


def _flat(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flat(item)]
    return [] if images is None else [images]


def _contents(images: Sequence[Any]) -> list[Hashable]:
    """Keys that tell images apart, pixel for pixel; copies of one object are looked at once."""
    known: dict[int, Hashable] = {}
    for image in images:
        if id(image) not in known:
            palette = image.palette.getdata() if image.palette is not None else None
            pixels = hashlib.blake2b(image.tobytes(), digest_size=20).digest()
            known[id(image)] = (image.size, image.mode, repr(palette), repr(image.info.get("transparency")), pixels)
    return [known[id(image)] for image in images]


def _apart(made: Any, count: int) -> list[Processed] | None:
    """The outcome image by image; None where it is not made of images side by side."""
    if set(made) != MADE or not all(isinstance(value, torch.Tensor) for value in made.values()):
        return None
    patches, grid = made["pixel_values"], made["image_grid_thw"]
    sizes = grid.prod(dim=-1).tolist()
    if len(sizes) != count or sum(sizes) != len(patches):
        return None
    parts = [part.clone() for part in torch.split(patches, sizes)]  # a part would keep the whole in memory
    return list(zip(parts, torch.split(grid, 1), strict=True))


def _together(parts: Sequence[Any]) -> Processed:
    patches, grids = zip(*parts, strict=True)
    return torch.cat(patches), torch.cat(grids)
