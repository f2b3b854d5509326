"""A frozen vision tower runs once on each distinct image: for all copies, all passes, and later steps.

Generation, the old-policy, reference and training passes all run the tower on G copies of each image, although nothing
in it changes. Features are kept under a 128-bit hash of all pixels that they were computed from, taken where the pixels
are: on a host XXH3, on a device two random linear forms modulo 2^64 (Dietzfelbinger, STACS 1996), which are both equal
for two images that differ with a chance below 2^-50. One read of the hashes is all that a call waits for. Where ranks
are in step, all run the tower if one of them has to.
"""

import math
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

import torch
import xxhash
from cachetools import LRUCache

from grpo_autotune.seams.layers import INNER, AttributeSlot, Layer, Next, wrap
from grpo_autotune.seams.ranks import InStep
from grpo_autotune.seams.trainer_access import towers_of
from grpo_autotune.speedups.base import FEATURE_BYTES, Installed
from grpo_autotune.speedups.conditions import active_dropout, in_parts, replaced, waits
from grpo_autotune.speedups.selfcheck import SelfCheck, autocast_dtype
from grpo_autotune.speedups.shared_prefix.attention import ARGUMENT

LIMIT_BYTES = FEATURE_BYTES
FORMS = 2
"""Random linear forms of a hash."""

PATCHES = ("last_hidden_state",)
"""Outputs of one row a patch."""

TOKENS = ("pooler_output", "deepstack_features")
"""Outputs of one row per image token (a square of patches)."""


class VisionCache:
    """The speed-up."""

    name = "vision_cache"
    summary = "the frozen vision tower runs once on each distinct image"
    stands_for = ()

    def applies(self, trainer: Any) -> str | None:
        """None where the model has a vision tower that nothing changes."""
        tower = next(towers_of(trainer.model), None)
        if tower is None:
            return "the model (model.name_or_path) has no vision tower of Qwen-VL's kind"
        if (other := replaced(tower, "forward")) is not None:
            return other
        if any(weight.requires_grad for weight in tower.parameters()):
            return "the vision tower is trained (model.freeze_vision_tower, peft.target_modules)"
        if (reason := in_parts(trainer)) is not None:
            return reason
        dropout = active_dropout(tower)
        return None if dropout is None else f"{dropout}: the tower's features are drawn anew each time"

    def install(self, trainer: Any) -> Installed:
        """Put a layer on the tower of the policy, and on that of a reference model that stays as it is."""
        installed = _Features(self.name, trainer)
        models = [trainer.model]
        if getattr(trainer, "ref_model", None) is not None and not trainer.args.sync_ref_model:
            models.append(trainer.ref_model)
        for model in models:
            for tower in towers_of(model):
                installed.handles.append(wrap(AttributeSlot(tower, "forward"), installed.layer(tower), INNER))
        return installed


def _asks_for_more(tower: Any, options: dict[str, Any]) -> bool:
    """True if a call wants something other than the tower's named outputs, or brings its own inner numbers.

    Models hand their own keywords on to the tower, the layout of a shared prefix too, which is the text's alone."""
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    named = options.get("return_dict", getattr(tower.config, "return_dict", True))
    return not named or not given.keys() <= {"grid_thw", "return_dict", "use_cache", ARGUMENT}


Features = dict[str, Any]
"""The tower's outputs for one image, and under `type` the class that holds them."""


class _Features(Installed):
    """Layers of one trainer's towers, and the features they keep."""

    def __init__(self, name: str, trainer: Any) -> None:
        super().__init__(name)
        self._ranks = InStep(trainer)
        self._kept: LRUCache[Hashable, Features] = LRUCache(LIMIT_BYTES, getsizeof=_size)
        self._hash = _Hash()
        self.counts = {"asked": 0.0, "computed": 0.0}

    def facts(self) -> dict[str, float]:
        """Images that towers were asked for and that they ran on, and the memory their features take."""
        return {**self.counts, "kept_bytes": float(self._kept.currsize)}

    def remove(self) -> None:
        super().remove()
        self._kept.clear()

    def layer(self, tower: Any) -> Layer:
        check = SelfCheck(self, self._ranks)

        def encode(call_next: Next, /, patches: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            grid = kwargs.get("grid_thw")
            if self.fell_back or args or grid is None or _asks_for_more(tower, kwargs):
                self._ranks.any(True)
                return call_next(patches, *args, **kwargs)
            weight, shapes = next(tower.parameters()), grid.tolist()
            parts = torch.split(patches, [math.prod(shape) for shape in shapes])
            dtype: torch.dtype = autocast_dtype(weight.device.type) or weight.dtype
            images = self._images(tower, call_next, parts, grid, [(dtype, *shape) for shape in shapes])
            self.counts["asked"] += len(parts)
            if images is None:
                self.fall_back("the vision tower returned something that is not made of images side by side")
                return call_next(patches, **kwargs)
            some = len(parts[:2])
            if not check.run(
                lambda: call_next(torch.cat(parts[:some]), **{**kwargs, "grid_thw": grid[:some]}).pooler_output,
                lambda: _joined(images[:some])["pooler_output"],
                dtype,
                "image features",
            ):
                return call_next(patches, **kwargs)
            return images[0]["type"](**_joined(images))

        return encode

    def _images(
        self, tower: Any, call_next: Next, parts: Sequence[torch.Tensor], grid: torch.Tensor, kinds: Sequence[Hashable]
    ) -> list[Features] | None:
        """The features of each image, which has a `kind` beside its pixels, the tower run on those that are missing;
        None where its output cannot be taken apart."""
        written = sum(weight._version for weight in tower.parameters())  # a loaded checkpoint writes into them
        keys = [
            (id(tower), written, kind, part.dtype, hashed)
            for part, kind, hashed in zip(parts, kinds, self._hash.of(parts), strict=True)
        ]
        images = {key: kept for key in keys if (kept := self._kept.get(key)) is not None}
        missing = {key: index for index, key in enumerate(keys) if key not in images}
        if self._ranks.any(bool(missing)):
            missing = missing or {keys[0]: 0}
            rows = list(missing.values())
            with torch.no_grad():
                output = call_next(torch.cat([parts[row] for row in rows]), grid_thw=grid[rows], return_dict=True)
            separate = _apart(output, [len(parts[row]) for row in rows], tower.spatial_merge_size**2)
            if separate is None:
                return None
            self.counts["computed"] += len(rows)
            for key, features in zip(missing, separate, strict=True):
                images[key] = {**features, "type": type(output)}
                with suppress(ValueError):  # larger than the whole cache
                    self._kept[key] = images[key]
        return [images[key] for key in keys]


class _Hash:
    """Hashes of images; on a device random linear forms of their bits, over patches and over the numbers of each."""

    def __init__(self) -> None:
        self._factors: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, images: Sequence[torch.Tensor]) -> list[Hashable]:
        """Hashes of images, each (n, size) numbers of two or four bytes."""
        if waits(images[0].device):
            return [tuple(hashed) for hashed in torch.stack([self._forms(patches) for patches in images]).tolist()]
        bits = (patches.detach().contiguous().view(torch.uint8) for patches in images)
        return [xxhash.xxh3_128_digest(numbers.numpy().data) for numbers in bits]

    def _forms(self, patches: torch.Tensor) -> torch.Tensor:
        """`FORMS` 64-bit integers, on the device."""
        bits = patches.contiguous().view(torch.int16 if patches.element_size() == 2 else torch.int32)
        of_rows, of_columns = self._at_least(bits.shape[0], bits.shape[1], patches.device)
        rows = torch.stack([(bits * factors).sum(dim=1) for factors in of_columns[:, : bits.shape[1]]])
        return (rows * of_rows[:, : bits.shape[0]]).sum(dim=1)

    def _at_least(self, rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors for so many rows and columns: the same ones whatever was asked for before."""
        known = self._factors.get(device)
        if known is None or known[0].shape[1] < rows or known[1].shape[1] < columns:
            known = _random(rows, 0).to(device), _random(columns, 1).to(device)
            self._factors[device] = known
        return known


def _random(count: int, seed: int) -> torch.Tensor:
    """Factors of `FORMS` linear forms, (FORMS, at least count): a power of two of them, so that they seldom change."""
    generator = torch.Generator().manual_seed(seed)
    width = 1 << (count - 1).bit_length()
    return torch.randint(-(1 << 63), (1 << 63) - 1, (width, FORMS), generator=generator).T.contiguous()


def _apart(output: Any, sizes: list[int], merged: int) -> list[dict[str, Any]] | None:
    """The tower's output image by image, given each one's patches."""
    images: list[dict[str, Any]] = [{} for _ in sizes]
    for name, value in output.items():
        if name not in PATCHES + TOKENS:
            return None
        rows = sizes if name in PATCHES else [size // merged for size in sizes]
        several = isinstance(value, list | tuple)
        for tensor in value if several else [value]:
            if not isinstance(tensor, torch.Tensor) or len(tensor) != sum(rows):
                return None
            for features, part in zip(images, torch.split(tensor, rows), strict=True):
                if several:
                    features.setdefault(name, []).append(part.clone())
                else:
                    features[name] = part.clone()
    return images


def _joined(images: Sequence[Features]) -> dict[str, Any]:
    """The output of a tower that ran on `images`, in their order."""
    joined: dict[str, Any] = {}
    for name, value in images[0].items():
        if isinstance(value, list):
            layers = range(len(value))
            joined[name] = [torch.cat([image[name][layer] for image in images]) for layer in layers]
        elif name != "type":
            joined[name] = torch.cat([image[name] for image in images])
    return joined


def _size(image: Features) -> int:
    values = (value if isinstance(value, list) else [value] for name, value in image.items() if name != "type")
    return sum(tensor.numel() * tensor.element_size() for tensors in values for tensor in tensors)
