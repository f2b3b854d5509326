"""What single speed-ups save of the stage that they work on, plain TRL and sped up in turns, within one training run.

    python -m benchmarks.speedups_parts [PART ...] [--pairs 5]

Parts: `prefill` (512 px, 32 new tokens: seconds of generation), `images` (768 px: seconds of data and prompt), `dead`
(half of the groups without spread, beta 0: seconds of the training stages), `judge` (an async judge of three seconds
beside a reference pass of at least three: the share of its seconds that is hidden), `patches` (768 px, the patch
embedding alone, forward and backward), `chunks` (768 px, micro batch 1: seconds of the reference pass under
shared_prefix in chunks of TRL's size against larger ones), `merge` (448 px, groups of eight in micro batches of four,
merged or not: seconds of the training stages), `merge_whole` (the same in micro batches of eight, which merge_passes
leaves alone on a CPU: two of them in a pass against one).

The speed-up is installed throughout and is told to leave one step of each pair to TRL, the first and the second in
turn. A ratio is that of plain seconds to those of its neighbouring step. For images, whose loader stays as it is
throughout a run, each member of a pair is a run of its own. Completions have one length.
The judge's share is measured step by step. torch runs on one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

from benchmarks.midsize import midsize_config
from benchmarks.result import FOLDER, ratio, write
from grpo_autotune.commands.imports import mend_torchvision
from grpo_autotune.config.schema import RunConfig

mend_torchvision()

import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from grpo_autotune.probe.probe import Probe  # noqa: E402
from grpo_autotune.probe.startup import Startup  # noqa: E402
from grpo_autotune.speedups.batches import merge_passes, passes  # noqa: E402
from grpo_autotune.speedups.install import SpeedUps, speed_up  # noqa: E402
from grpo_autotune.speedups.shared_prefix import speedup  # noqa: E402
from grpo_autotune.train.trial_trainer import quiet_trainer  # noqa: E402

WARMUP = 2
JUDGE_S = 3.0
AROUND_IMAGES = ("shared_prefix", "shared_prefill", "vision_cache", "patch_embed")
"""On in both members of a pair for `images`: what they save is not looked at, and would take most of the time."""

CHUNK = speedup.NO_GRAD_CHUNK

TRAINING, LOADING = ("policy_logprob", "backward"), ("data", "prompt")

Rows = list[dict[str, Any]]
Ratios = dict[str, dict[str, float]]


def half_dead(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Every second group of eight is given one reward, the others as `midsize.variety`."""
    shares = [sum(token % 2 for token in ids) / max(1, len(ids)) for ids in completion_ids]
    return [0.5 if index // 8 % 2 else share for index, share in enumerate(shares)]


async def judge(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Three seconds of waiting for somebody else."""
    await asyncio.sleep(JUDGE_S)
    return [sum(token % 2 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def config_of(reward: str, *, pixels: int, completion: int, grpo: Mapping[str, Any]) -> RunConfig:
    """The mid-size model with answers of one length; neither evaluated nor saved."""
    fixed = {
        "generation_kwargs": {"min_new_tokens": completion},
        "eval_strategy": "no",
        "save_strategy": "no",
        "learning_rate": 0.0,
    }
    values = midsize_config("14m", pixels=pixels, completion=completion, grpo={**fixed, **grpo}).to_dict()
    del values["data"]["max_eval_samples"], values["data"]["eval_split"]
    return RunConfig.from_dict({**values, "rewards": [{"name": reward}]})


Turn = Callable[[SpeedUps, Sequence[str], bool], None]
"""Makes the next step a plain one, or a fast one."""


def left_to_trl(speedups: SpeedUps, names: Sequence[str], plain: bool) -> None:
    """A plain step is one that the speed-ups leave to TRL."""
    for name in names:
        speedups._installed[name].fell_back = "its turn is over" if plain else None


def small_chunks(speedups: SpeedUps, names: Sequence[str], plain: bool) -> None:
    """A plain step is one whose passes without gradients take as many tokens at once as TRL's."""
    speedup.NO_GRAD_CHUNK = 1 if plain else CHUNK


class BlockSchedule(TrainerCallback):  # type: ignore[misc]
    """Which steps are plain ones."""

    def __init__(self, turn: Callable[[bool], None]) -> None:
        self._turn = turn

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._turn(state.global_step >= WARMUP and is_plain(state.global_step))


def is_plain(done: int) -> bool:
    """Whether the step after `done` steps is left to TRL: plain and sped up, sped up and plain."""
    return (done - WARMUP) % 4 in (0, 3)


def stages_in_turns(
    config: RunConfig, names: Sequence[str], stages: Sequence[str], pairs: int, turn: Turn = left_to_trl
) -> tuple[Rows, Ratios]:
    """Seconds of `stages` in neighbouring steps, and their ratio."""
    config = RunConfig.from_dict({**config.to_dict(), "grpo": {**config.grpo, "max_steps": WARMUP + 2 * pairs}})
    trainer = quiet_trainer(config, Startup(), say)
    speedups = speed_up(trainer, list(names))
    off = [row for row in speedups.table() if row.name in names and not row.on]
    if off:
        raise SystemExit(f"{off[0].name} does not apply: {off[0].reason}")
    trainer.add_callback(BlockSchedule(functools.partial(turn, speedups, names)))
    probe = Probe(trainer, warmup=WARMUP)
    trainer.train()
    timings = probe.record().timings
    seconds = [
        sum(row.per_step_s[index] for row in timings.stages if row.name in stages)
        for index in range(len(timings.steps))
    ]
    rows: Rows = [
        {"speedup": "+".join(names), "step": step, "plain": is_plain(step - 1), "seconds": spent, "step_s": whole}
        for step, spent, whole in zip(timings.steps, seconds, timings.step_s, strict=True)
    ]
    quotients = []
    for begin in range(0, len(rows) - 1, 2):
        by = {row["plain"]: row["seconds"] for row in rows[begin : begin + 2]}
        quotients.append(by[True] / by[False])
    return rows, {f"{'+'.join(names)}: {', '.join(stages)}": ratio(quotients)}


def prefill(pairs: int) -> tuple[Rows, Ratios]:
    """Generation of two prompts' sixteen completions."""
    grpo = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "beta": 0.0}
    config = config_of("benchmarks.midsize:variety", pixels=512, completion=32, grpo=grpo)
    return stages_in_turns(config, ["shared_prefill"], ["generation"], pairs)


def dead(pairs: int) -> tuple[Rows, Ratios]:
    """Training on four groups, two of them dead, in micro batches of four."""
    grpo = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "beta": 0.0}
    config = config_of("benchmarks.speedups_parts:half_dead", pixels=448, completion=32, grpo=grpo)
    return stages_in_turns(config, ["skip_dead"], TRAINING, pairs)


def no_grad_chunks(pairs: int) -> tuple[Rows, Ratios]:
    """The reference pass over one group in micro batches of one."""
    config = config_of("benchmarks.midsize:variety", pixels=768, completion=64, grpo={})
    rows, ratios = stages_in_turns(config, ["shared_prefix"], ["reference_logprob"], pairs, small_chunks)
    return rows, {f"chunks of {CHUNK}, {name}": value for name, value in ratios.items()}


def unmerged(speedups: SpeedUps, names: Sequence[str], plain: bool) -> None:
    """A plain step is one whose micro batches go through the model one by one."""
    left_to_trl(speedups, ["merge_passes"], plain)


def merge(pairs: int) -> tuple[Rows, Ratios]:
    """Training on two groups in four micro batches."""
    grpo = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "beta": 0.0}
    config = config_of("benchmarks.midsize:variety", pixels=448, completion=64, grpo=grpo)
    return stages_in_turns(config, ["shared_prefix", "vision_cache", "merge_passes"], TRAINING, pairs, unmerged)


def _filled(planned: Callable[..., Any], *args: Any, **how: Any) -> Any:
    """Passes as they are planned on a GPU."""
    return planned(*args, **{**how, "by_launches": True})


def merge_whole(pairs: int) -> tuple[Rows, Ratios]:
    """Training on four groups in four micro batches, as merge_passes would do it on a GPU."""
    grpo = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "beta": 0.0}
    config = config_of("benchmarks.midsize:variety", pixels=448, completion=64, grpo=grpo)
    rules = tuple(rule for rule in merge_passes._RULES if rule is not merge_passes._whole_groups)
    filled = functools.partial(_filled, passes.planned)
    with patch.object(merge_passes, "_RULES", rules), patch.object(merge_passes, "planned", filled):
        names = ["shared_prefix", "vision_cache", "merge_passes"]
        rows, ratios = stages_in_turns(config, names, TRAINING, pairs, unmerged)
    return rows, {f"whole groups, {name}": value for name, value in ratios.items()}


def images(pairs: int) -> tuple[Rows, Ratios]:
    """Loading, decoding and processing for two prompts at eight micro steps a step, of images not seen before."""
    grpo = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "beta": 0.0, "max_steps": 2}
    config = config_of("benchmarks.midsize:variety", pixels=768, completion=4, grpo=grpo)
    rows: Rows = []
    for pair in range(pairs):
        for plain in (True, False) if pair % 2 else (False, True):
            trainer = quiet_trainer(config, Startup(), say)
            speed_up(trainer, [*AROUND_IMAGES, *([] if plain else ["images_once"])])
            probe = Probe(trainer, warmup=1)
            trainer.train()
            record = probe.record()
            assert record.images is not None
            rows.append(
                {
                    "speedup": "images_once",
                    "pair": pair,
                    "plain": plain,
                    "seconds": sum(sum(row.per_step_s) for row in record.timings.stages if row.name in LOADING),
                    "decodes_per_image": record.images.decodes_per_image,
                    "processings_per_image": record.images.processings_per_image,
                }
            )
    return rows, {f"images_once: {', '.join(LOADING)}": ratio(_quotients(rows))}


def _quotients(rows: Rows) -> list[float]:
    """Plain seconds over those of its neighbour, pair by pair."""
    by = {(row["pair"], row["plain"]): row["seconds"] for row in rows}
    return [by[pair, True] / by[pair, False] for pair in sorted({row["pair"] for row in rows})]


def overlap(pairs: int) -> tuple[Rows, Ratios]:
    """Hidden share of a judge beside the reference pass over sixteen completions."""
    grpo = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "beta": 0.04}
    config = config_of("benchmarks.speedups_parts:judge", pixels=512, completion=32, grpo=grpo)
    config = RunConfig.from_dict({**config.to_dict(), "grpo": {**config.grpo, "max_steps": WARMUP + pairs}})
    trainer = quiet_trainer(config, Startup(), say)
    speedups = speed_up(trainer, ["reward_overlap"])
    probe = Probe(trainer, warmup=WARMUP)
    trainer.train()
    stages = {row.name: row for row in probe.record().timings.stages}
    rows: Rows = [
        {"speedup": "reward_overlap", "judge_s": JUDGE_S, "exposed_s": exposed, "reference_s": reference}
        for exposed, reference in zip(stages["reward"].per_step_s, stages["reference_logprob"].per_step_s, strict=True)
    ]
    hidden = [1 - row["exposed_s"] / JUDGE_S for row in rows]
    facts = speedups.facts()["reward_overlap"]
    rows.append({"speedup": "reward_overlap", "probe_hidden_s": stages["reward"].hidden_s, **facts})
    return rows, {"reward_overlap: hidden share of the judge": ratio(hidden)}


def patches(pairs: int) -> tuple[Rows, Ratios]:
    """A convolution over the patches of one image, as it is and as a product, forward and backward, alone."""
    trainer = quiet_trainer(
        config_of("benchmarks.midsize:variety", pixels=64, completion=4, grpo={"max_steps": 1}), Startup(), say
    )
    layer = next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Conv3d))
    patches_N = torch.randn(48 * 48, layer.in_channels, *layer.kernel_size, requires_grad=True)

    def once() -> float:
        begin = time.perf_counter()
        layer(patches_N).sum().backward()
        return time.perf_counter() - begin

    rows: Rows = []
    for pair in range(4 * pairs):
        for plain in (True, False) if pair % 2 else (False, True):
            speedups = speed_up(trainer, "none" if plain else ["patch_embed"])
            once()
            rows.append({"speedup": "patch_embed", "pair": pair, "plain": plain, "seconds": once()})
            speedups.remove()
    return rows, {"patch_embed: the layer": ratio(_quotients(rows))}


PARTS: dict[str, Callable[[int], tuple[Rows, Ratios]]] = {
    "prefill": prefill,
    "dead": dead,
    "images": images,
    "judge": overlap,
    "patches": patches,
    "chunks": no_grad_chunks,
    "merge": merge,
    "merge_whole": merge_whole,
}


def say(*lines: object) -> None:
    """Progress, on standard error."""
    sys.stderr.write(" ".join(str(line) for line in lines) + "\n")


def main() -> None:
    """Measure the parts and write `docs/benchmarks/speedups_parts.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--name", default="speedups_parts")
    parser.add_argument("--add", action="store_true", help="keep the other parts of a file that is there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    file = FOLDER / f"{asked.name}.json"
    before = json.loads(file.read_text()) if asked.add and file.exists() else {"rows": [], "ratios": {}}
    rows: Rows = before["rows"]
    ratios: Ratios = before["ratios"]
    for part in asked.parts or list(PARTS):
        found, quotients = PARTS[part](asked.pairs)
        rows += found
        ratios |= quotients
        say(part, quotients)
        write(asked.name, "python -m benchmarks.speedups_parts", rows, ratios)


if __name__ == "__main__":
    main()
