"""What the probe and the monitors cost: the demo's optimizer steps with and without it, in turns, within one run.

    python -m benchmarks.overhead [CONFIG] [PAIRS]

Every pair is two optimizer steps of one training run, one without the probe and one with it attached, and then the
monitors' rules see its log event, too; which of the two comes first alternates from pair to pair. The step between
them, the first after attaching or detaching, is left out: what is done once is no part of a step's cost. A step is
timed from the end of the step before to its own end, by a callback that is there in both cases. A pair's ratio is that
of its seconds, by the wall clock and by the process's CPU time (all threads). Steps so near differ by several per
cent for reasons of the machine, so it takes hundreds of pairs to tell 1 % from nothing. torch runs on one thread, so
that a core is left for whatever else the machine does. The probe writes its files, as `train` has it.
The images of the first four generating steps are hashed, once a run: the warm-up steps have the probe attached and pay
it, and their collector is handed on.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.result import ratio, write
from grpo_autotune.commands.imports import mend_torchvision
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.console import say
from grpo_autotune.hardware.device import memory_share

mend_torchvision()

import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from grpo_autotune.probe.facts import IMAGE_STEPS, ImageCollector  # noqa: E402
from grpo_autotune.probe.live import LiveFile  # noqa: E402
from grpo_autotune.probe.probe import Probe  # noqa: E402
from grpo_autotune.probe.startup import Startup  # noqa: E402
from grpo_autotune.seams.layers import OUTERMOST, Next  # noqa: E402
from grpo_autotune.seams.table import wrap_seams  # noqa: E402
from grpo_autotune.train.monitors.callback import run_of  # noqa: E402
from grpo_autotune.train.monitors.watch import StallWatch, Watch  # noqa: E402
from grpo_autotune.train.trial_trainer import quiet_trainer  # noqa: E402

WARMUP = IMAGE_STEPS
PAIRS = 400
OVERRIDES = [
    "grpo.eval_strategy=no",
    "grpo.max_steps=10000",
    "grpo.max_completion_length=12",
    "grpo.generation_kwargs={min_new_tokens: 12}",
    "grpo.learning_rate=0.0",
]
"""Completions of one length, so that both steps of a pair do the same work."""


class BlockSchedule(TrainerCallback):  # type: ignore[misc]
    """Attaches and detaches between steps, and times each step from outside."""

    def __init__(self, pairs: int, folder: Path) -> None:
        self.pairs, self.folder = pairs, folder
        self.trainer: Any = None
        self.probe: Probe | None = None
        self.images: ImageCollector | None = None
        self.begun = self.cpu = 0.0
        self.last_step, self.settles = 0, True
        self.watch: Watch | None = None
        self.stall: StallWatch | None = None
        self.rows: list[dict[str, Any]] = []
        self.other: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = len(self.rows) >= 2 * self.pairs

    def monitor(self, config: RunConfig) -> None:
        """Have the monitors see each step that has the probe."""
        self.watch = Watch(config.monitors.items_on(), run_of(config))
        self.stall = StallWatch(self.trainer, config.monitors.stall, Path(), lambda alert: say(alert.line()))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.probe is not None and self.watch is not None and self.stall is not None:
            row = {"kind": "train", "step": state.global_step, "memory_share": memory_share(args.device)}
            self.watch.see({**row, **(logs or {})})
            self.stall.look(self.probe.locate())

    def around(self, call_next: Next, /, *args: Any, **kwargs: Any) -> None:
        """A layer around the probe's own on what ends a step."""
        call_next(*args, **kwargs)
        self.step_ended()

    def step_ended(self) -> None:
        """Close the books on the step that ends, and set the stage for the next; an epoch's end ends no step."""
        if self.trainer.state.global_step == self.last_step:
            return
        self.last_step = self.trainer.state.global_step
        step, now = self.trainer.state.global_step, time.perf_counter()
        if step > WARMUP and not self.settles:
            self.rows.append(
                {
                    "step": step,
                    "probe": self.probe is not None,
                    "seconds": now - self.begun,
                    "cpu_s": time.process_time() - self.cpu,
                }
            )
        wanted = step < WARMUP or (step - WARMUP) % 6 in (2, 3, 4)
        self.settles = wanted != (self.probe is not None)
        if self.probe is not None and not wanted:
            self.other += self._other_shares()
            self.images = self.images or self.probe.images
            self.probe.detach()
            self.probe = None
        if self.probe is None and wanted:
            self.attach().step_ended()
        self.begun, self.cpu = time.perf_counter(), time.process_time()

    def attach(self) -> Probe:
        """Put a probe in; the images seen before stay seen."""
        probe = Probe(self.trainer, warmup=0, out_dir=self.folder, live=LiveFile(self.folder))
        if self.images is not None:
            probe.images, probe.closed = self.images, WARMUP
        self.probe = probe
        return probe

    def _other_shares(self) -> list[float]:
        timings = self.probe.record().timings if self.probe is not None else None
        if timings is None or not timings.step_s:
            return []
        other = next(row for row in timings.stages if row.name == "other")
        return [seconds / whole for seconds, whole in zip(other.per_step_s, timings.step_s, strict=True)]


def main() -> None:
    """Run the pairs and write `docs/benchmarks/overhead.json`."""
    config = load_config(sys.argv[1] if len(sys.argv) > 1 else "demo", OVERRIDES)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    turns = BlockSchedule(int(sys.argv[2]) if len(sys.argv) > 2 else PAIRS, folder)
    turns.trainer = quiet_trainer(config, Startup(), say)
    turns.monitor(config)
    turns.trainer.add_callback(turns)
    wrap_seams(turns.trainer, OUTERMOST, log_save_evaluate=turns.around)
    turns.attach()
    turns.trainer.train()
    rows = turns.rows
    found = {
        "step_with_probe_over_without": ratio(_ratios(rows, "seconds")),
        "cpu_time_with_probe_over_without": ratio(_ratios(rows, "cpu_s")),
        "other_share_of_step": ratio(turns.other),
    }
    path = write("overhead", "python -m benchmarks.overhead", rows, found)
    sys.stdout.write(f"{found}\n{path}\n")


def _ratios(rows: list[dict[str, Any]], what: str) -> list[float]:
    """With the probe over without it, pair by pair."""
    found = []
    for begin in range(0, len(rows) - 1, 2):
        by = {row["probe"]: row[what] for row in rows[begin : begin + 2]}
        found.append(by[True] / by[False])
    return found


if __name__ == "__main__":
    main()
