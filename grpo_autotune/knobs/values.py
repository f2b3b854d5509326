"""The values a knob takes when the user names none: near the user's own, and only what the machine can do."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from grpo_autotune.knobs import engine
from grpo_autotune.knobs.context import Given
from grpo_autotune.knobs.rules import FLASH_KERNELS, compile_rule, engine_rule, kernel_rule
from grpo_autotune.rollout.failures import CPU_SPACE

IMAGE_SHARES = (0.5, 0.625, 0.75)
"""Sides tried, as shares of the present one: a quarter, two fifths and half of its tokens."""

UNIT_PX = 32
"""Pixels of a language-model token's side where the model does not tell (Qwen3-VL: 16-pixel patches, two by two)."""

LARGEST_GROUP = 32
MOST_MICRO_BATCHES = 8
BATCHED_TOKENS = (2048, 4096, 8192, 16384)
MEMORY_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def image_sizes(given: Given) -> tuple[int | None, ...]:
    """The user's own, and smaller sides on the grid of the model's tokens."""
    own, unit = given.config.data.image_size, _unit(given)
    side = own or _seen_side(given)
    if side is None:
        return (own,)
    smaller = sorted({int(share * side) // unit * unit for share in IMAGE_SHARES if share * side >= unit})
    return (own, *(s for s in smaller if s < side))


def group_sizes(given: Given) -> tuple[int, ...]:
    """Half and double the user's own, and the usual ones, where the generation batch holds whole groups of them."""
    plan = given.config.batch
    g = plan.num_generations
    wanted = {max(2, g // 2), 2 * g, 4, 8, 16}
    return (g, *sorted(n for n in wanted - {g} if n <= LARGEST_GROUP and plan.generation_batch % n == 0))


def micro_batches(given: Given) -> tuple[int, ...]:
    """Divisors of what a device trains on in a step, nearest to the user's own."""
    plan = given.config.batch
    own, device_step = plan.micro_batch, plan.micro_batch * plan.accumulation
    device_generation = own * plan.steps_per_generation
    legal = [m for m in range(1, device_step + 1) if device_step % m == 0 and device_generation % m == 0]
    near = sorted(legal, key=lambda m: (abs(math.log2(m / own)), m))[:MOST_MICRO_BATCHES]
    return (own, *sorted(m for m in near if m != own))


def prompts_per_step(given: Given) -> tuple[int, ...]:
    """Half and double the user's own; nothing where a step does not hold whole groups."""
    plan = given.config.batch
    own, rest = divmod(plan.completions_per_step, plan.num_generations)
    return () if rest or not own else _near(own, halves=1, doubles=1)


def kernels(given: Given) -> tuple[str | None, ...]:
    """The user's own, and every other kernel that runs here; null is transformers' choice, `sdpa`."""
    own = given.config.model.attn_implementation
    same = {own, "sdpa"} if own is None else {own}
    others = [name for name in ("sdpa", "eager", *FLASH_KERNELS[:1]) if name not in same]
    return (own, *(name for name in others if kernel_rule(given, name) is None))


def switch(own: Any) -> tuple[bool, bool]:
    """The user's own, and the other."""
    return (True, False) if own else (False, True)


def engines(given: Given) -> tuple[bool, ...]:
    """`generate`, and vLLM in the training process where it runs; a server stays what it is."""
    own = given.config.use_vllm
    if own and _elsewhere(given):
        return (True,)
    return switch(own) if own or engine_rule(given, True) is None else (False,)


def memory_shares(given: Given, own: float) -> tuple[float, ...]:
    """The user's own, and the usual shares."""
    if not colocates(given):
        return ()
    return (own, *(share for share in MEMORY_SHARES if share != own and sized_by_share(given)))


def sized_by_share(given: Given) -> bool:
    """Whether the engine's share decides its size: not under the variable by which vLLM's CPU build is told."""
    return given.gpus > 0 or not os.environ.get(CPU_SPACE)


def running_counts(given: Given, own: int) -> tuple[int, ...]:
    """The user's own, every completion of a generation at once, half and a quarter of them."""
    rows = engine.rows_of_generation(given.config)
    return (own, *sorted({max(1, rows // 4), max(1, rows // 2), rows} - {own})) if colocates(given) else ()


def batched_tokens(given: Given, own: int) -> tuple[int, ...]:
    """The user's own, and the usual ones; on a CPU, where a step is long, they wait to be asked for."""
    if not colocates(given):
        return ()
    return (own, *(n for n in BATCHED_TOKENS if n != own)) if given.gpus else (own,)


def engine_switch(given: Given, own: bool) -> tuple[bool, ...]:
    """Both, where an engine can be in the training process."""
    return switch(own) if colocates(given) else ()


def sleep_levels(given: Given, own: int) -> tuple[int, ...]:
    """The three levels, where there is a GPU to give memory back to."""
    return (own, *(n for n in (0, 1, 2) if n != own and given.gpus)) if colocates(given) else ()


def syncs(given: Given, own: str) -> tuple[str, ...]:
    """The user's own; beside an adapter, whose layers every token passes, the push of merged weights in batches."""
    if not colocates(given):
        return ()
    adapter = given.config.peft is not None
    if own == "auto":
        return (own, "batched") if adapter else (own,)
    return (own, *(way for way in (("batched", "adapter") if adapter else ("batched",)) if way != own))


def cache_types(given: Given, own: str) -> tuple[str, ...]:
    """The user's own, and 8 bits on a GPU."""
    return (own, *(("fp8",) if given.gpus and own != "fp8" else ())) if colocates(given) else ()


def quantizations(given: Given, own: str | None) -> tuple[str | None, ...]:
    """The user's own, and 8 bits on a GPU."""
    return (own, *(("fp8",) if given.gpus and own != "fp8" else ())) if colocates(given) else ()


def tensor_parallel_sizes(given: Given, own: int) -> tuple[int, ...]:
    """Divisors of the world size."""
    processes = given.config.batch.processes
    return (own, *(n for n in _divisors(processes) if n != own)) if colocates(given) and processes > 1 else ()


def server_gpus(given: Given, own: int | None) -> tuple[int | None, ...]:
    """The engine in the training process, and a server on one, two, four ... of the GPUs that do not train; on a
    machine without a GPU a server waits to be asked for."""
    if not colocates(given):
        return ()
    free = given.gpus - given.config.batch.processes
    counts = [2**k for k in range(free.bit_length()) if 2**k <= free] if free > 0 else []
    return (own, *(n for n in (None, *counts) if n != own))


def workers(given: Given, own: int) -> tuple[int, ...]:
    """None, one, and as many as leave a core to the training process."""
    cores = given.machine.cores if given.machine is not None else 1
    room = max(0, cores // given.config.batch.processes - 1)
    return (own, *(n for n in (0, 1, 2, 4) if n != own and n <= room))


def compiling(given: Given, own: bool) -> tuple[bool, ...]:
    """Both on a GPU; on a CPU it compiles longer than a trial runs, so it waits to be asked for."""
    return switch(own) if own or (given.gpus > 0 and compile_rule(given, True) is None) else (False,)


def completion_lengths(given: Given, own: int | None) -> tuple[int | None, ...]:
    """The user's own, three quarters and half of it."""
    return (own,) if own is None else (own, *sorted({max(1, own // 2), max(1, 3 * own // 4)} - {own}))


def ranks(given: Given, own: int) -> tuple[int, ...]:
    """Half and double LoRA's rank."""
    return _near(own, halves=1, doubles=1) if given.config.peft is not None else ()


def steps_per_generation(given: Given) -> tuple[int, ...]:
    """Half and double the user's own, in the user's own micro steps."""
    plan = given.config.batch
    device = plan.micro_batch * plan.processes
    return tuple(
        s for s in _near(plan.steps_per_generation, halves=1, doubles=1) if s * device % plan.num_generations == 0
    )


def iterations(given: Given, own: int) -> tuple[int, ...]:
    """The user's own, one and two."""
    return (own, *(n for n in (1, 2) if n != own))


def betas(given: Given, own: float) -> tuple[float, ...]:
    """The user's own, and none: no reference pass is made then."""
    return (own,) if own == 0 else (own, 0.0)


def precisions(given: Given, own: bool) -> tuple[bool, ...]:
    """Both, where 4-bit weights can be trained on."""
    return switch(own) if given.config.peft is not None and given.gpus else (own,)


def speed_ups(given: Given, own: Any) -> tuple[Any, ...]:
    """The user's own, and all that apply; beside `auto`, none."""
    return (own, "none") if own == "auto" else (own, "auto")


def colocates(given: Given) -> bool:
    """Whether an engine is, or can be, in the training process or in a server of the run's own."""
    return not _elsewhere(given) and any(engines(given))


def _elsewhere(given: Given) -> bool:
    """Whether completions come from a server that somebody else has started."""
    return given.config.vllm.at_server and given.config.vllm.server_gpus is None


def unique(values: Iterable[Any]) -> tuple[Any, ...]:
    """The values in order, each once; values may be lists. 1 and true are two values."""
    seen: list[tuple[type, Any]] = []
    for value in values:
        if (type(value), value) not in seen:
            seen.append((type(value), value))
    return tuple(value for _, value in seen)


def _near(own: int, *, halves: int, doubles: int) -> tuple[int, ...]:
    below = [own // 2**k for k in range(halves, 0, -1) if own % 2**k == 0]
    return (own, *(n for n in below if n >= 1), *(own * 2**k for k in range(1, doubles + 1)))


def _divisors(number: int) -> Sequence[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _unit(given: Given) -> int:
    vision = given.model.get("vision_config") or {}
    patch, merge = vision.get("patch_size"), vision.get("spatial_merge_size")
    return int(patch) * int(merge) if isinstance(patch, int) and isinstance(merge, int) else UNIT_PX


def _seen_side(given: Given) -> int | None:
    """Side of the images that the probe saw, taken as square."""
    images = given.record.images if given.record is not None else None
    return None if images is None else round(math.sqrt(images.pixels.p50))
