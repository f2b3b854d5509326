"""The values a knob takes when the user names none: near the user's own, and only what the machine can do."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from grpo_autotune.knobs.context import KnobContext
from grpo_autotune.knobs.rules import FLASH_KERNELS, cache_rule, compile_rule, continuous_rule, kernel_rule
from grpo_autotune.speedups.base import kernel_name

IMAGE_SHARES = (0.5, 0.625, 0.75)
"""Sides tried, as shares of the present one: a quarter, two fifths and half of its tokens."""

UNIT_PX = 32
"""Pixels of a language-model token's side where the model does not tell (Qwen3-VL: 16-pixel patches, two by two)."""

LARGEST_GROUP = 32
MOST_MICRO_BATCHES = 8


def image_sizes(context: KnobContext, own: int | None) -> tuple[int | None, ...]:
    """The user's own, and smaller sides on the grid of the model's tokens."""
    unit, side = _unit(context), own or _observed_side(context)
    if side is None:
        return (own,)
    smaller = sorted({int(share * side) // unit * unit for share in IMAGE_SHARES if share * side >= unit})
    return (own, *(s for s in smaller if s < side))


def group_sizes(context: KnobContext, own: int) -> tuple[int, ...]:
    """Half and double the user's own, and the usual ones, where the generation batch holds whole groups of them."""
    wanted, whole = {max(2, own // 2), 2 * own, 4, 8, 16} - {own}, context.config.batch.generation_batch
    return (own, *sorted(n for n in wanted if n <= LARGEST_GROUP and whole % n == 0))


def micro_batches(context: KnobContext, own: int) -> tuple[int, ...]:
    """Divisors of what a device trains on in a step, nearest to the user's own."""
    plan = context.config.batch
    device_step, device_generation = own * plan.accumulation, own * plan.steps_per_generation
    legal = [m for m in range(1, device_step + 1) if device_step % m == 0 and device_generation % m == 0]
    near = sorted(legal, key=lambda m: (abs(math.log2(m / own)), m))[:MOST_MICRO_BATCHES]
    return (own, *sorted(m for m in near if m != own))


def prompts_per_step(context: KnobContext, own: int | None) -> tuple[int, ...]:
    """Half and double the user's own; nothing where a step does not hold whole groups."""
    return _near(own) if own else ()


def kernels(context: KnobContext, own: str | None) -> tuple[str | None, ...]:
    """The user's own, and every other kernel that runs here; None is transformers' choice, `sdpa`."""
    others = (name for name in ("sdpa", "eager", *FLASH_KERNELS) if name != kernel_name(own))
    return (own, *(name for name in others if kernel_rule(context, name) is None))


def as_users(context: KnobContext, key: str, own: Any, value: Any) -> Any:
    """The user's own value of a knob for another that means the same: the attention kernel that its probe ran with."""
    if key != "model.attn_implementation":
        return value
    runs = own if context.record is None else context.record.trainer.attn_implementation
    return own if kernel_name(value) == kernel_name(runs) else value


def switch(own: Any) -> tuple[bool, bool]:
    """The user's own, and the other."""
    return (True, False) if own else (False, True)


def caches(context: KnobContext, own: str | None) -> tuple[str | None, ...]:
    """The user's own, and on a GPU the one that `generate` is compiled over."""
    return (own, *(name for name in ("static",) if context.gpus and name != own and not cache_rule(context, name)))


def continuous(context: KnobContext, own: bool) -> tuple[bool, ...]:
    """Both on a GPU, where transformers can generate so."""
    return switch(own) if own or (context.gpus and continuous_rule(context, True) is None) else (False,)


def workers(context: KnobContext, own: int) -> tuple[int, ...]:
    """No worker, one, and as many as leave a core to the training process."""
    cores = context.machine.cores if context.machine is not None else 1
    room = max(0, cores // context.config.batch.processes - 1)
    return (own, *(n for n in (0, 1, 2, 4) if n != own and n <= room))


def compiling(context: KnobContext, own: bool) -> tuple[bool, ...]:
    """Both on a GPU; on a CPU it compiles longer than a trial runs, so it waits to be asked for."""
    return switch(own) if own or (context.gpus > 0 and compile_rule(context, True) is None) else (False,)


def completion_lengths(context: KnobContext, own: int | None) -> tuple[int | None, ...]:
    """The user's own, three quarters and half of it."""
    return (own,) if own is None else (own, *sorted({max(1, own // 2), max(1, 3 * own // 4)} - {own}))


def ranks(context: KnobContext, own: int) -> tuple[int, ...]:
    """Half and double LoRA's rank."""
    return _near(own) if context.config.peft is not None else ()


def steps_per_generation(context: KnobContext, own: int) -> tuple[int, ...]:
    """Half and double the user's own, in the user's own micro steps."""
    plan = context.config.batch
    device = plan.micro_batch * plan.processes
    return tuple(steps for steps in _near(own) if steps * device % plan.num_generations == 0)


def betas(context: KnobContext, own: float) -> tuple[float, ...]:
    """The user's own, and 0, where no branches need it: no reference pass is made then."""
    return (own,) if own == 0 or context.config.branches is not None else (own, 0.0)


def concurrencies(place: int, context: KnobContext, own: int | None) -> tuple[int | None, ...]:
    """The user's own; twice and four times what a probe ended with, up to a generation's rows; half where an endpoint
    asked for fewer."""
    plan, record = context.config.batch, context.record
    for one in record.remote if record is not None else ():
        if one.place == place and one.concurrency:
            now = own or one.concurrency * plan.processes
            others = (max(1, now // 2),) if one.rate_limited else (min(n * now, plan.generation_batch) for n in (2, 4))
            return unique((own, *(n for n in others if one.rate_limited or n > now)))
    return (own,)


def unique(values: Iterable[Any]) -> tuple[Any, ...]:
    """The values in order, each once; values may be lists. 1 and true are two values."""
    seen: list[tuple[type, Any]] = []
    for value in values:
        if (type(value), value) not in seen:
            seen.append((type(value), value))
    return tuple(value for _, value in seen)


def _near(own: int) -> tuple[int, ...]:
    """A positive number, its half where that is whole, and its double."""
    return (own, 2 * own) if own % 2 else (own, own // 2, 2 * own)


def divisors(number: int) -> Sequence[int]:
    """Divisors in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _unit(context: KnobContext) -> int:
    vision = context.model.get("vision_config") or {}
    patch, merge = vision.get("patch_size"), vision.get("spatial_merge_size")
    return int(patch) * int(merge) if isinstance(patch, int) and isinstance(merge, int) else UNIT_PX


def _observed_side(context: KnobContext) -> int | None:
    """Side of the images that the probe saw, taken as square."""
    images = context.record.images if context.record is not None else None
    return None if images is None else round(math.sqrt(images.pixels.p50))
