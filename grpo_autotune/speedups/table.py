"""The table of speed-ups, in the order in which they are installed; third parties register theirs beside it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from grpo_autotune import registry
from grpo_autotune.errors import ConfigError
from grpo_autotune.speedups.base import SpeedUp

TABLE: dict[str, str] = {
    "shared_prefix": "grpo_autotune.speedups.shared_prefix.speedup:SharedPrefix",
    "shared_prefill": "grpo_autotune.speedups.generation.shared_prefill:SharedPrefill",
    "images_once": "grpo_autotune.speedups.images.images_once:ImagesOnce",
    "vision_cache": "grpo_autotune.speedups.images.vision_cache:VisionCache",
    "length_sort": "grpo_autotune.speedups.batches.length_sort:LengthSort",
    "skip_dead": "grpo_autotune.speedups.batches.skip_dead:SkipDead",
    "patch_embed": "grpo_autotune.speedups.images.patch_embed:PatchEmbed",
    "reward_overlap": "grpo_autotune.speedups.reward_overlap:RewardOverlap",
}
"""Name -> the class, imported when it is asked for."""

AUTO, NONE = "auto", "none"


def names() -> list[str]:
    """Every known speed-up, in installation order."""
    return [*TABLE, *registry.names("speedup")]


def chosen(wanted: str | Sequence[str]) -> list[str]:
    """The names that `auto`, `none`, one name or a list of names stands for, in installation order.

    Raises:
        ConfigError: A name is not known (a reference `package.module:Class` is).
    """
    if wanted == AUTO:
        return names()
    asked = [] if wanted == NONE else [wanted] if isinstance(wanted, str) else list(wanted)
    known = names()
    for name in asked:
        if name not in known and not registry.is_reference(name):
            raise ConfigError(
                f"there is no speed-up {name!r}",
                where="speedups",
                fix=f"Accepted: {AUTO}, {NONE}, or a list of: {', '.join(known)}.",
            )
    return [name for name in known if name in asked] + [name for name in dict.fromkeys(asked) if name not in known]


def load(name: str) -> SpeedUp:
    """The speed-up called `name`."""
    if name in TABLE:
        module, _, attribute = TABLE[name].partition(":")
        found: SpeedUp = getattr(importlib.import_module(module), attribute)()
        return found
    made: SpeedUp = registry.resolve("speedup", name)()
    return made


def resolve(wanted: str | Sequence[str]) -> list[SpeedUp]:
    """The speed-ups that `wanted` stands for, as `chosen`."""
    return [load(name) for name in chosen(wanted)]


SERVED = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Values of `attn_implementation`. Flash kernels align a causal mask to the last query."""
