"""The speed-ups against plain TRL at one seed: every loss, gradient and log-prob, whole runs, and two processes.

    python -m benchmarks.exact [--architectures qwen3_vl ...] [--losses dapo ...] [--speedups auto shared_prefix=split]
                               [--steps 50] [--skip batches windows runs branches ranks decoding lora_input sharded
                               bf16] [--only sharded] [--merge]

*Batches*: one generation batch is scored and trained on by both, for every architecture, LoRA and full weights,
gradient checkpointing on and off, every `loss_type`, with and without a reference; differences are relative to the
largest value. *Windows*: the same for an accumulation whose micro batches split the groups, so that passes are merged.
*Runs*: 50 such optimizer steps by plain gradient descent; rewards must be equal, and final weights within the
tolerance. *Branches*: runs again, with two branches of unequal weights, with ranks for advantages, and without
speed-ups plain TRL against branches of equal weights. *Ranks*: three steps under DistributedDataParallel on two
processes. *Decoding*: completions of the loop of `shared_prefill`, greedy and drawn, adapters left apart and merged,
must be those of `generate`. *lora_input*: one batch under autocast to bfloat16, with and without PEFT's casts.
*Sharded*: five steps on two processes that share weights or gradients by ZeRO or FSDP2, and plain TRL on two such
processes (with `.venv-scale/bin/python`, which has DeepSpeed). Exits with 1 where anything is further off than the
tolerance. Models are those of the tests (two layers, float32).

*bf16*: batches that plain TRL generated in float32 are scored and trained on under autocast to bfloat16, where two
orders of the same sums differ by rounding. The yardstick is what rounding does by itself: how far plain TRL under
autocast (`_of_autocast`) is from plain TRL in float32. A row has medians over its batches, and the bar is on the median
over the rows: for log-probs, loss and gradients, the speed-ups must not be further from plain TRL, both under autocast,
than that. Beside it (`_from_float32`) stands how far the speed-ups under autocast are from plain TRL in float32.

`--merge` keeps the rows that the written file has of the parts that are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.result import FOLDER, write
from grpo_autotune.commands.imports import mend_torchvision
from grpo_autotune.processes.fresh import free_port

mend_torchvision()

import torch  # noqa: E402
from peft import LoraConfig  # noqa: E402

from grpo_autotune.config.sections.branches import Branches  # noqa: E402
from grpo_autotune.probe.trainer_facts import versions  # noqa: E402
from grpo_autotune.speedups.install import speed_up  # noqa: E402
from grpo_autotune.train.advantages import put_ranks_on  # noqa: E402
from grpo_autotune.train.branches.control import BranchControl  # noqa: E402
from tests.support.exactness import (  # noqa: E402
    accumulated,
    apart,
    asked,
    differences,
    drawn,
    generation,
    gradients_apart,
    micro_batches,
    numbers,
    numbers_apart,
    ready,
    under_autocast,
)
from tests.support.exactness_ranks import rows_of  # noqa: E402
from tests.support.pairs import rewards_of, trained, weights_of  # noqa: E402
from tests.support.sharded_ranks import CASES, SHARDINGS  # noqa: E402
from tests.support.tiny import CONFIGS, VISION_KINDS, tiny_model  # noqa: E402
from tests.support.trainers import make_trainer, spread_reward  # noqa: E402

TOLERANCE = 1e-5
LOSSES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
GROUPS = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
HALF_GROUPS: dict[str, Any] = {"num_generations": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
CONTEXT = ("fact.",)
ROUNDED = ("log_probs", "loss", "gradients")
BATCHES = 5
"""Under autocast, of each combination."""
NAME = "exact"


class Models:
    """Saved tiny models, each built once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}

    def of(self, kind: str) -> tuple[Path, list[dict[str, Any]]]:
        """Path and data of an architecture."""
        if kind not in self._paths:
            self._paths[kind] = tiny_model(kind, self.folder)
        return self._paths[kind], rows_of("picture" if kind in VISION_KINDS else "text")


def batches(models: Models, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a combination: how far one batch's numbers are apart."""
    switches = itertools.product(options.architectures, [True, False], [True, False], options.losses, [0.05, 0.0])
    for kind, lora, checkpointing, loss, beta in switches:
        path, data = models.of(kind)

        def build(
            path: Path = path, data: Any = data, lora: bool = lora, on: bool = checkpointing, loss: str = loss,
            beta: float = beta,
        ) -> Any:  # fmt: skip
            out = models.folder / "out"
            twice: dict[str, Any] = {"num_iterations": 2, "loss_type": loss, "beta": beta, "gradient_checkpointing": on}
            return ready(path, data, out, lora=lora, **GROUPS, **twice)

        for names in options.speedups:
            found = differences(build, names)
            yield {
                "part": "batches", "architecture": kind, "lora": lora, "checkpointing": checkpointing,
                "loss_type": loss, "beta": beta, "speedups": names,
                **{key: value for key, value in found.items() if not key.startswith(CONTEXT)},
            }  # fmt: skip


def windows(models: Models, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a combination: an accumulation of four micro batches of half a group, each or merged."""
    switches = itertools.product(options.architectures, [True, False], [True, False], options.losses, [0.05, 0.0])
    for kind, lora, checkpointing, loss, beta in switches:
        path, data = models.of(kind)
        grpo: dict[str, Any] = {"num_iterations": 2, "loss_type": loss, "beta": beta, **HALF_GROUPS}
        trainer = ready(path, data, models.folder / "out", lora=lora, gradient_checkpointing=checkpointing, **grpo)
        speedups = speed_up(trainer, "auto")
        parts = micro_batches(trainer)
        fast, facts = accumulated(trainer, parts), speedups.facts().get("merge_passes", {})
        speedups.remove()
        plain = accumulated(trainer, parts)
        yield {
            "part": "windows", "architecture": kind, "lora": lora, "checkpointing": checkpointing, "loss_type": loss,
            "beta": beta, "speedups": "auto", "passes": int(facts.get("passes", 0)),
            "loss": apart(torch.tensor(fast.loss), torch.tensor(plain.loss)), "gradients": gradients_apart(fast, plain),
        }  # fmt: skip


def runs(models: Models, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a run: rewards equal or not, and how far the final weights are apart."""
    for kind, lora, names in itertools.product(options.architectures, [True, False], options.speedups):
        path, data = models.of(kind)
        found = []
        for wanted in ("none", names):
            trainer = make_trainer(
                path, data, models.folder / "out", lora=lora, max_steps=options.steps, beta=0.05, optim="sgd",
                learning_rate=0.02, **HALF_GROUPS,
            )  # fmt: skip
            speedups = speed_up(trainer, asked(wanted))
            trainer.train()
            speedups.remove()
            rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
            found.append((rewards, {name: value.detach() for name, value in trainer.model.named_parameters()}))
        (rewards, weights), (fast_rewards, fast) = found
        yield {
            "part": "runs", "architecture": kind, "lora": lora, "speedups": names, "steps": len(rewards),
            "equal_rewards": sum(a == b for a, b in zip(rewards, fast_rewards, strict=True)) / len(rewards),
            "weights": max(apart(fast[name], weights[name]) for name in weights),
        }  # fmt: skip


def branches(models: Models, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a run: with branches of unequal weights or rank advantages, plain and sped up; and branches of equal
    weights against plain TRL."""

    def weighed(trainer: Any, weights: tuple[float, float]) -> None:
        named = {"even": {"beta": weights[0]}, "odd": {"beta": weights[1]}}
        BranchControl(trainer, Branches.model_validate({"column": "answer", **named}), {}, print)

    unequal, equal = partial(weighed, weights=(0.4, 0.01)), partial(weighed, weights=(0.05, 0.05))
    cases = {
        "unequal": (0.05, (unequal, "none"), (unequal, "auto")),
        "rank": (0.0, (put_ranks_on, "none"), (put_ranks_on, "auto")),
        "equal": (0.05, (None, "none"), (equal, "none")),
    }
    for kind, lora, (case, (beta, *sides)) in itertools.product(options.architectures, [True, False], cases.items()):
        path, data = models.of(kind)
        rows = [{**row, "answer": "odd" if place % 2 else "even"} for place, row in enumerate(data)]
        ended = []
        for change, names in sides:
            trainer, speedups = trained(
                names, path, rows, models.folder / "out", change=change, lora=lora, max_steps=options.steps, beta=beta,
                learning_rate=0.02, rewards=[spread_reward], **HALF_GROUPS,
            )  # fmt: skip
            speedups.remove()
            ended.append((rewards_of(trainer), weights_of(trainer)))
        (rewards, weights), (other_rewards, others) = ended
        yield {
            "part": "branches", "architecture": kind, "lora": lora, "case": case, "speedups": sides[1][1],
            "equal_rewards": sum(a == b for a, b in zip(rewards, other_rewards, strict=True)) / len(rewards),
            "weights": max(apart(others[name], weights[name]) for name in weights),
        }  # fmt: skip


def ranks(models: Models, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a combination under torchrun."""
    for kind, lora, names in itertools.product(options.architectures, [True, False], options.speedups):
        path, _ = models.of(kind)
        grpo = {"max_steps": 3, "beta": 0.05, "num_generations": 4, "per_device_train_batch_size": 4}
        data = "picture" if kind in VISION_KINDS else "text"
        words = [str(path), str(models.folder / "out"), data, str(int(lora)), json.dumps(grpo), names]
        for line in on_two_processes("tests.support.exactness_ranks", *words).splitlines():
            if line.startswith('{"ranks'):
                told = json.loads(line)
                yield {
                    "part": "ranks", "architecture": kind, "lora": lora, "speedups": names, "ranks": told["ranks"],
                    "equal_rewards": float(told["rewards"]), "weights": told["apart"], "on": told["on"],
                }  # fmt: skip


def decoding(models: Models, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a combination: the share of completions that are those of `generate`."""
    ways = [("left apart", True), ("merged", True), ("without adapters", False)]
    for kind, (adapters, lora), greedy in itertools.product(options.architectures, ways, [True, False]):
        path, data = models.of(kind)
        names = ["shared_prefill", *(["merge_for_generation"] if adapters == "merged" else [])]
        completions = []
        for wanted in ("none", names):
            long: dict[str, Any] = {"max_completion_length": 64, "generation_kwargs": {"do_sample": not greedy}}
            trainer = ready(path, data, models.folder / "out", lora=lora, **GROUPS, **long)
            speedups = speed_up(trainer, wanted)
            completions.append(drawn(generation(trainer)))
            facts = speedups.facts()
            speedups.remove()
        assert facts["shared_prefill"]["rows"] and all(facts.get("merge_for_generation", {"none": 1}).values())
        plain, ours = completions
        yield {
            "part": "decoding", "architecture": kind, "adapters": adapters, "greedy": greedy,
            "speedups": "+".join(names), "tokens": sum(map(len, plain)),
            "equal_completions": sum(map(list.__eq__, plain, ours)) / len(plain),
        }  # fmt: skip


def lora_input(models: Models, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a combination: how far one batch's numbers are apart without PEFT's casts, all under autocast."""
    for kind, checkpointing in itertools.product(options.architectures, [True, False]):
        path, data = models.of(kind)
        grpo: dict[str, Any] = {"num_iterations": 2, "beta": 0.05, "gradient_checkpointing": checkpointing, **GROUPS}
        half: dict[str, Any] = {"bf16": True, "model_init_kwargs": {"dtype": torch.bfloat16}}
        every = LoraConfig(r=2, target_modules="all-linear")
        plain, fast = (ready(path, data, models.folder / "out", lora=every, **grpo, **half) for _ in range(2))
        batch, speedups = generation(plain), speed_up(fast, ["lora_input"])
        found = numbers_apart(numbers(fast, batch), numbers(plain, batch))
        assert speedups.facts()["lora_input"]["casts_left_out"]
        yield {
            "part": "lora_input", "architecture": kind, "lora": True, "checkpointing": checkpointing,
            "speedups": "lora_input", **found,
        }  # fmt: skip


def sharded(models: Models, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each way to share and each case of `tests.support.sharded_ranks`, of the first process; FSDP2 refuses
    mixed rows."""
    for sharding in options.shardings:
        chosen = [name for name in options.cases if sharding != "fsdp2" or not CASES[name].get("mixed")]
        cases = {name: CASES[name] for name in chosen if CASES[name]["kind"] in options.architectures}
        for kind in {case["kind"] for case in cases.values()}:
            models.of(kind)
        if not cases:
            continue
        words = [f"{sharding}={name}" for name in cases]
        on_two_processes("tests.support.sharded_ranks", str(models.folder), str(models.folder), "5", *words)
        told = json.loads((models.folder / "rank0.json").read_text(encoding="utf-8"))
        for name, case in cases.items():
            found = told[f"{sharding}={name}"]
            yield {
                "part": "sharded", "sharding": sharding, "case": name, "architecture": case["kind"],
                "lora": case["lora"], "speedups": "auto", "ranks": 2, "steps": len(found["rewards"]),
                "equal_rewards": float(found["same_rewards"]), "weights": found["apart"],
                "on": [row for row, (on, _) in found["table"].items() if on],
            }  # fmt: skip


def on_two_processes(*words: str) -> str:
    """What `torchrun -m WORDS` on two gloo processes writes."""
    port = free_port()
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    return subprocess.run(
        [sys.executable, *launch, "-m", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def bf16(models: Models, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a combination: how far speed-ups and rounding move a batch's numbers under autocast."""
    for kind, lora, checkpointing in itertools.product(options.architectures, [True, False], [True, False]):
        path, data = models.of(kind)

        def build(
            autocast: bool, path: Path = path, data: Any = data, lora: bool = lora, on: bool = checkpointing
        ) -> Any:
            twice: dict[str, Any] = {"num_iterations": 2, "beta": 0.05, "gradient_checkpointing": on, "bf16": autocast}
            return ready(path, data, models.folder / "out", lora=lora, **GROUPS, **twice)

        for names, found in under_autocast(build, options.speedups, BATCHES).items():
            row = {"part": "bf16", "architecture": kind, "lora": lora, "checkpointing": checkpointing}
            row |= {"speedups": names, "batches": len(found)}
            for what in ROUNDED:
                row[what] = statistics.median(batch.fast[what] for batch in found)
                row[f"{what}_of_autocast"] = statistics.median(batch.plain[what] for batch in found)
                row[f"{what}_from_float32"] = statistics.median(batch.fast_from_float32[what] for batch in found)
            yield row


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and range of each difference over all rows that have it, by part."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float) and key != "beta":
                found.setdefault(f"{row['part']}: {key}", []).append(value)
    return {
        name: {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}
        for name, values in found.items()
    }


def judged(ratios: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, float, bool]]:
    """Each difference that has a bar: its name, its value, and whether it is within."""
    for name, value in ratios.items():
        part, _, what = name.partition(": ")
        if part != "bf16":
            equal = what.startswith("equal")
            worst = value["low"] if equal else value["high"]
            yield name, worst, worst == 1.0 if equal else worst <= TOLERANCE
        elif what in ROUNDED:
            yield name, value["median"], value["median"] <= ratios[f"{name}_of_autocast"]["median"]


def written(skipped: list[str], shardings: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """The command of the file that there is, and its rows of the skipped parts, and of other ways to share.

    Raises:
        ValueError: There is none, or it was measured with other versions.
    """
    path = FOLDER / f"{NAME}.json"
    if not path.exists():
        raise ValueError(f"there is no {path} to merge with")
    before = json.loads(path.read_text())
    if before["versions"] != versions():
        raise ValueError(f"{path} was measured with other versions: {before['versions']}, here {versions()}")
    other = [row for row in before["rows"] if row.get("sharding", shardings[0]) not in shardings]
    return before["command"], other + [row for row in before["rows"] if row["part"] in skipped and row not in other]


PARTS = {
    "batches": batches, "windows": windows, "runs": runs, "branches": branches, "ranks": ranks,
    "decoding": decoding, "lora_input": lora_input, "sharded": sharded, "bf16": bf16,
}  # fmt: skip


def main() -> int:
    """Run the matrix and write `docs/benchmarks/exact.json`; 1 where something is further off than its bar."""
    parser = argparse.ArgumentParser(description="The speed-ups against plain TRL.")
    parser.add_argument("--architectures", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--speedups", nargs="+", default=["auto", "shared_prefix", "shared_prefix=split"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--skip", nargs="*", choices=list(PARTS), default=[])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="skip all others")
    parser.add_argument("--shardings", nargs="+", choices=list(SHARDINGS), default=["zero2", "zero3", "fsdp2"])
    cases = [name for name, case in CASES.items() if "names" not in case and "bf16" not in case["grpo"]]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    parser.add_argument("--merge", action="store_true", help="keep the written rows of the parts that are skipped")
    options = parser.parse_args()
    options.skip += [name for name in PARTS if name not in options.only]
    command = f"python -m benchmarks.{' '.join([NAME, *sys.argv[1:]])}"
    rows: list[dict[str, Any]] = []
    if options.merge:
        try:
            first, rows = written(options.skip, options.shardings)
        except ValueError as error:
            parser.error(f"--merge: {error}")
        command = " && ".join(dict.fromkeys([*first.split(" && "), command]))
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        for name, part in PARTS.items():
            if name not in options.skip:
                for row in part(models, options):
                    rows.append(row)
                    sys.stderr.write(f"{json.dumps(row)}\n")
    ratios = summary(rows)
    write(NAME, command, rows, ratios)
    verdicts = list(judged(ratios))
    for name, value, within in verdicts:
        sys.stdout.write(f"{'ok' if within else 'WRONG':<6}{value:.1e}  {name}\n")
    return int(not all(within for *_, within in verdicts))


if __name__ == "__main__":
    sys.exit(main())
