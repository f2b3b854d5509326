"""What the speed-ups save: whole optimizer steps and their stages, plain TRL and sped up in turns, within one run.

    python -m benchmarks.speedups [--cases 768px text ...] [--speedups all shared_prefix ...] [--rounds 3]
                                  [--size 14m] [--checkpointing on off] [--name speedups]

For every case there is one trainer a variant: plain TRL, and one with each set of speed-ups (`all` is every one that
fits). A round trains each of them for one optimizer step on a prompt and an image that no round before had, as in a
first epoch, and a round before the first warms up; which comes first turns from round to round. A ratio is that of
the seconds of plain TRL to those of the variant in the same round. Completions have a fixed length. Memory is the
most that torch held at one time of what it allocated in one training pass (forward and backward).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.result import ratio, write
from grpo_autotune.commands.imports import mend_torchvision

mend_torchvision()

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.midsize import midsize_config  # noqa: E402
from grpo_autotune.config.schema import RunConfig  # noqa: E402
from grpo_autotune.probe.probe import Probe  # noqa: E402
from grpo_autotune.probe.startup import Startup  # noqa: E402
from grpo_autotune.speedups.install import SpeedUps, speed_up  # noqa: E402
from grpo_autotune.train.trial_trainer import quiet_trainer  # noqa: E402

PASSES = ("policy_logprob", "reference_logprob", "backward")
"""Stages that score and train."""


class Case(NamedTuple):
    """One workload; `pixels` 0 is a prompt of `words` words without an image."""

    pixels: int
    words: int
    completion: int
    generations: int = 8


CASES = {
    "768px": Case(768, 0, 64),
    "448px": Case(448, 0, 64),
    "text": Case(0, 1000, 64),
    "768px-256": Case(768, 0, 256),
    "short": Case(0, 20, 64, generations=2),
    "long": Case(0, 200, 1024),
}
"""By name; the last two are there to show that nothing becomes slower."""


def config_of(case: Case, size: str, checkpointing: bool) -> RunConfig:
    """One prompt an optimizer step, all of its completions in one micro batch, all of one length."""
    grpo: dict[str, Any] = {
        "max_steps": 1,
        "num_generations": case.generations,
        "per_device_train_batch_size": case.generations,
        "gradient_accumulation_steps": 1,
        "generation_kwargs": {"min_new_tokens": case.completion},
        "gradient_checkpointing": checkpointing,
        "eval_strategy": "no",
    }
    config = midsize_config(size, pixels=case.pixels or 32, completion=case.completion, grpo=grpo).to_dict()
    if not case.pixels:
        config["data"] = {"path": "benchmarks.speedups:words", "params": {"words": case.words}}
    else:
        del config["data"]["max_eval_samples"], config["data"]["eval_split"]
    return RunConfig.from_dict(config)


def words(split: str, words: int) -> Any:
    """A data set of prompts of about `words` tokens."""
    from datasets import Dataset

    rows = [" ".join(str((number + word) % 10) for word in range(words // 2)) for number in range(64)]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in rows])


class Variant:
    """A trainer of one case, with its speed-ups."""

    def __init__(self, name: str, config: RunConfig) -> None:
        self.name = name
        self.trainer = quiet_trainer(config, Startup(), lambda line: None)
        self.speedups: SpeedUps | None = None
        if name != "plain":
            self.speedups = speed_up(self.trainer, "auto" if name == "all" else [name])

    def step(self, number: int) -> dict[str, float]:
        """Train one optimizer step on rows drawn by `number`; its seconds, whole and by stage."""
        torch.manual_seed(0)
        self.trainer.args.seed = number
        probe = Probe(self.trainer, warmup=0)
        self.trainer.train()
        timings = probe.record().timings
        probe.detach()
        stages = {row.name: row.per_step_s[0] for row in timings.stages}
        passes = sum(stages[stage] for stage in PASSES)
        return {"step": timings.step_s[0], "log-probs and backward": passes, **stages}

    def training_pass_bytes(self) -> int:
        """Peak of one forward and backward pass over the last micro batch."""
        trainer = self.trainer
        trainer.model.train()
        trainer.model.zero_grad()
        found = peak_bytes(lambda: trainer.compute_loss(trainer.model_wrapped, trainer._buffered_inputs[0]).backward())
        trainer.model.zero_grad()
        return found


def peak_bytes(work: Callable[[], None]) -> int:
    """Most bytes that torch held at one time of what it allocated while `work` ran: every allocation, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes), default=0)


def measure(case: str, checkpointing: bool, options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Rows and ratios of one case."""
    config = config_of(CASES[case], options.size, checkpointing)
    variants = [Variant(name, config) for name in ("plain", *options.speedups)]
    label = f"{case}{', checkpointing' if checkpointing else ''}"
    rows: list[dict[str, Any]] = []
    for number in range(options.rounds + 1):
        order = variants if number % 2 else variants[::-1]
        found = {variant.name: variant.step(number) for variant in order}
        told = "  ".join(f"{name} {steps['step']:.2f} s" for name, steps in found.items())
        sys.stderr.write(f"{label}, round {number}: {told}\n")
        if number:  # the first round warms up: self-checks, caches, the allocator
            rows += [{"case": label, "round": number, "variant": name, **steps} for name, steps in found.items()]
    memory = {variant.name: variant.training_pass_bytes() for variant in variants}
    ratios: dict[str, Any] = {}
    for variant in variants[1:]:
        for what in ("step", "log-probs and backward", "generation"):
            pairs = zip(_of(rows, "plain", what), _of(rows, variant.name, what), strict=True)
            ratios[f"{label}: {variant.name}: {what}, plain over sped up"] = ratio(
                [plain / ours for plain, ours in pairs]
            )
        share = memory[variant.name] / max(1, memory["plain"])
        ratios[f"{label}: {variant.name}: memory of the training pass, sped up over plain"] = alone(share)
        on = [row.name for row in variant.speedups.table() if row.on] if variant.speedups else []
        rows.append({"case": label, "variant": variant.name, "on": on, "training_pass_bytes": memory[variant.name]})
        rows[-1]["facts"] = variant.speedups.facts() if variant.speedups else {}
    rows.append({"case": label, "variant": "plain", "training_pass_bytes": memory["plain"]})
    return rows, ratios


def alone(value: float) -> dict[str, float]:
    """A figure that was measured once."""
    return {"median": value, "low": value, "high": value, "n": 1}


def _of(rows: Sequence[dict[str, Any]], variant: str, what: str) -> list[float]:
    return [row[what] for row in rows if row["variant"] == variant and what in row]


def main() -> None:
    """Measure every case asked for and write `docs/benchmarks/<name>.json`."""
    parser = argparse.ArgumentParser(description="What the speed-ups save.")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--speedups", nargs="+", default=["all"])
    parser.add_argument("--checkpointing", nargs="+", choices=["on", "off"], default=["on", "off"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=["14m", "100m"], default="14m")
    parser.add_argument("--name", default="speedups")
    options = parser.parse_args()
    rows: list[Any] = []
    ratios: dict[str, Any] = {}
    for case in options.cases:
        for checkpointing in options.checkpointing:
            found, more = measure(case, checkpointing == "on", options)
            rows, ratios = rows + found, ratios | more
            for name, value in more.items():
                sys.stdout.write(f"{value['median']:7.2f}  {value['low']:.2f} .. {value['high']:.2f}  {name}\n")
            sys.stdout.flush()
            write(options.name, f"python -m benchmarks.{' '.join(['speedups', *sys.argv[1:]])}", rows, ratios)
    seconds = [row["step"] for row in rows if "step" in row]
    sys.stdout.write(f"{len(seconds)} steps, median {statistics.median(seconds):.2f} s\n")


if __name__ == "__main__":
    main()
