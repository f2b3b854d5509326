"""Facts of the measured generations: tokens, rewards and images.

Each collector keeps one small entry per generation, tagged with the number of optimizer steps finished before it, so
that the warm-up can be left out when the facts are read.
"""

import math
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from grpo_autotune.records.probe import ImageFacts, RewardCall, Spread, TokenFacts, TrainerFacts
from grpo_autotune.seams.stored_images import scaled

KEEP = 4096
LIVE_SPREAD = 1e-6
PASSED = 0.5
SIZES = (384, 512, 768, 1024)
SIZE_SAMPLE = 64
IMAGE_STEPS = 4
"""Generating steps whose images are read: telling distinct ones apart reads every pixel."""


def spread(values: Sequence[float]) -> Spread:
    """Mean, percentiles and maximum of a non-empty sequence."""
    array = np.asarray(values, dtype=float)
    p50, p90, p99 = np.percentile(array, [50, 90, 99])
    return Spread(mean=float(array.mean()), p50=float(p50), p90=float(p90), p99=float(p99), max=float(array.max()))


@dataclass(slots=True)
class _Generation:
    step: int
    prompt: list[int]
    completion: list[int]
    grid: int
    truncated: int


@dataclass(slots=True)
class TokenCollector:
    """Lengths, padding, truncation and rewards of each training generation."""

    generations: deque[_Generation] = field(default_factory=lambda: deque(maxlen=KEEP))
    rewards: deque[tuple[int, Any]] = field(default_factory=lambda: deque(maxlen=KEEP))

    def see_output(
        self,
        step: int,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        output: dict[str, Any],
        ends: Sequence[int],
    ) -> None:
        """Take one generation: B lists of token ids each, and the padded tensors (B, P) and (B, C) made of them."""
        grid = output["prompt_ids"].numel() + output["completion_ids"].numel()
        truncated = sum(not ids or ids[-1] not in ends for ids in completion_ids)
        lengths = [len(ids) for ids in prompt_ids], [len(ids) for ids in completion_ids]
        self.generations.append(_Generation(step, *lengths, grid, truncated))

    def see_rewards(self, step: int, rewards_per_function: Any) -> None:
        """Take `_calculate_rewards`' result, shape (all completions of all ranks, functions)."""
        self.rewards.append((step, rewards_per_function.detach().float().cpu().numpy()))

    def from_the_first(self) -> list[list[int]]:
        """Completion lengths of every generation, warm-up included; empty once the first ones were dropped."""
        return [g.completion for g in self.generations] if len(self.generations) < KEEP else []

    def without_signal(self, group: int, weights: Sequence[float]) -> dict[str, bool]:
        """Of the newest generating step, as `SignalWatch.see` takes it: whether every completion was cut off, the
        rewards of no group differ, and most completions have no reward."""
        newest = list(takewhile(lambda one: one.step == self.generations[-1].step, reversed(self.generations)))
        scored = [one[1] for one in takewhile(lambda one: one[0] == self.rewards[-1][0], reversed(self.rewards))]
        equal = any(len(rewards) >= group for rewards in scored) and not any(_live(scored, group, weights))
        return {
            "all_cut": bool(newest) and all(g.truncated == len(g.completion) for g in newest),
            "all_equal": equal,
            "failed": equal and bool(np.isnan(np.concatenate(scored)).all(axis=1).mean() > 0.5),
        }

    def facts(self, first: int, steps: int, cycle: int, trainer: TrainerFacts) -> TokenFacts | None:
        """Facts of the generations of the `steps` optimizer steps from `first` on.

        Tokens per step are counted over whole cycles of generating and reusing, so that each generation is divided by
        all the steps that it serves; of very long runs, over the last `KEEP` generations."""
        measured = range(first, first + steps)  # without the step under way, or one that was broken off
        seen = [g for g in self.generations if g.step in measured] or list(self.generations)
        if not seen:
            return None
        begin, end = max(first, seen[0].step) if seen[0].step >= first else 0, first + steps
        window = range(begin, begin + max(1, (end - begin) // cycle) * cycle)
        inside = [g for g in seen if g.step in window] or seen
        prompt = [n for g in seen for n in g.prompt]
        completion = [n for g in seen for n in g.completion]
        grid = sum(g.grid for g in seen)
        scored = [r for step, r in self.rewards if step in measured] or [r for _, r in self.rewards]
        weights = np.asarray(trainer.reward_weights, dtype=float)
        live, rates, mean = _group_facts(scored, trainer.num_generations, weights)
        return TokenFacts(
            prompt=spread(prompt),
            completion=spread(completion),
            prompt_per_step=sum(sum(g.prompt) for g in inside) / len(window),
            completion_per_step=sum(sum(g.completion) for g in inside) / len(window),
            padding_share=1.0 - (sum(prompt) + sum(completion)) / grid if grid else 0.0,
            truncated_share=sum(g.truncated for g in seen) / len(completion),
            groups=len(rates),
            dead_groups=len(rates) - live,
            pass_rates=rates,
            reward_mean=mean,
        )


def _group_facts(scored: Iterable[Any], group: int, weights: Any) -> tuple[int, list[float], float]:
    """Number of groups with reward spread, pass rate of each group, mean weighted reward.

    A row of NaN alone has no reward and counts nowhere, as in TRL's group means."""
    rates, totals = [], []
    for rewards in scored:
        judges = ~np.isnan(rewards)
        judged, whole = judges.any(axis=1), len(rewards) // group * group
        weighted = np.where(judges, rewards * weights, 0.0).sum(axis=1)
        first = rewards[np.arange(len(rewards)), judges.argmax(axis=1)]  # of those that judge the row, else NaN
        totals.extend(weighted[judged].tolist())
        rates += (first >= PASSED)[:whole].reshape(-1, group).mean(axis=1).tolist()
    return sum(_live(scored, group, weights)), rates, float(np.mean(totals)) if totals else 0.0


def _live(scored: Iterable[Any], group: int, weights: Sequence[float]) -> Iterator[bool]:
    """True for each group whose rewards differ."""
    for rewards in scored:
        for start in range(0, len(rewards) - group + 1, group):
            judged = [row for row in rewards[start : start + group].tolist() if any(n == n for n in row)]
            totals = [sum(n * weight for n, weight in zip(row, weights, strict=False) if n == n) for row in judged]
            yield bool(totals) and max(totals) - min(totals) > LIVE_SPREAD


@dataclass(slots=True)
class _Pictures:
    step: int
    sizes: list[tuple[int, int]]
    prompts: int
    distinct: int
    tokens: list[int]


@dataclass(slots=True)
class ImageCollector:
    """Images of the first generating steps, and how often they were decoded and processed.

    `full` is true once a generation came whose images were not read."""

    generations: list[_Pictures] = field(default_factory=list)
    full: bool = False
    decoded: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    processed: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def see(self, step: int, inputs: Sequence[dict[str, Any]], output: dict[str, Any], merge: int) -> None:
        """Take the rows of a generation and the patch grid that came out (`image_grid_thw`, shape (N, 3))."""
        steps = {generation.step for generation in self.generations}
        if len(steps) >= IMAGE_STEPS and step not in steps:
            self.full = True
            return
        images = [image for row in inputs for image in _images_of(row)]
        if not images:
            return
        grid = output.get("image_grid_thw")
        tokens = [] if grid is None else [int(n) // merge**2 for n in grid.prod(dim=-1).tolist()]
        distinct = len({_fingerprint(image) for image in images})
        sizes = [image.size for image in images]
        self.generations.append(_Pictures(step, sizes, len(inputs), distinct, tokens))

    def facts(self, first: int, steps: int, cycle: int, patches: Callable[[int, int], int | None]) -> ImageFacts | None:
        """Facts of the generations whose images were read, from step `first` on and over at most `steps` steps;
        `patches` gives the tokens of an image of (width, height), or None where that is not known."""
        measured = [g for g in self.generations if first <= g.step < first + steps]
        seen = measured or self.generations
        if not seen:
            return None
        window = range(first if measured else 0, seen[-1].step + cycle)
        sizes = [size for g in seen for size in g.sizes]
        distinct = sum(g.distinct for g in seen)
        tokens = [n for g in seen for n in g.tokens]
        return ImageFacts(
            pixels=spread([width * height for width, height in sizes]),
            per_prompt=len(sizes) / sum(g.prompts for g in seen),
            tokens=spread(tokens) if tokens else None,
            tokens_at=_tokens_at(sizes, patches),
            distinct_per_step=distinct / max(1, min(steps, len(window))),
            decodes_per_image=sum(self.decoded[step] for step in window) / distinct,
            processings_per_image=sum(self.processed[step] for step in window) / distinct,
        )


def _images_of(row: dict[str, Any]) -> list[Any]:
    images = row.get("images") if "images" in row else row.get("image")
    images = images if isinstance(images, list) else [images]
    return [image for image in images if isinstance(getattr(image, "size", None), tuple) and hasattr(image, "tobytes")]


def _fingerprint(image: Any) -> tuple[Any, int]:
    return image.size, zlib.crc32(image.tobytes())


def _tokens_at(sizes: Sequence[tuple[int, int]], patches: Callable[[int, int], int | None]) -> dict[str, float]:
    """Mean tokens of a sample of the images if their longest side were each of `SIZES` pixels, aspect kept."""
    stride = max(1, len(sizes) // SIZE_SAMPLE)
    means = {}
    for side in SIZES:
        counts = [patches(*scaled(size, side)) for size in sizes[::stride]]
        known = [n for n in counts if n is not None]
        if known:
            means[str(side)] = sum(known) / len(known)
    return means


def forget(step: int, tokens: TokenCollector, images: ImageCollector) -> None:
    """Drop what was seen in the newest step, which did not end."""
    tokens.generations = deque((one for one in tokens.generations if one.step < step), KEEP)
    tokens.rewards = deque((one for one in tokens.rewards if one[0] < step), KEEP)
    images.generations = [one for one in images.generations if one.step < step]
    for counts in (images.decoded, images.processed):
        counts.pop(step, None)


@dataclass(slots=True)
class RewardCollector:
    """Seconds of each reward function's calls."""

    spent: dict[tuple[str, bool], list[float]] = field(default_factory=lambda: defaultdict(list))

    def see(self, name: str, is_async: bool, seconds: float) -> None:
        self.spent[name, is_async].append(seconds)

    def facts(self) -> list[RewardCall]:
        """One row per function, slowest first."""
        rows = [
            RewardCall(name=name, is_async=is_async, calls=len(s), mean_s=math.fsum(s) / len(s), max_s=max(s))
            for (name, is_async), s in self.spent.items()
        ]
        return sorted(rows, key=lambda row: -row.mean_s)
