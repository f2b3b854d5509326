"""Stage probe_cost: what the probe and its gauge take, and the ceilings of an empty and of a full card."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import SHORT, release_trainer, run_config, trainer_of
from grpo_autotune.hardware.ceilings import measure_ceilings
from grpo_autotune.probe.gauges import gauges_for
from grpo_autotune.probe.probe import Probe
from grpo_autotune.trials.child.fixed_lengths import FixedLengths

READINGS = 200
LEFT_BYTES = 2 * 10**9


def measure(bench: Bench) -> None:
    """Write the rows."""
    gauge = gauges_for(bench.device)[1]
    if gauge is not None:
        begin = time.perf_counter()
        for _ in range(READINGS):
            gauge()
        spent_us = (time.perf_counter() - begin) / READINGS * 1e6
        bench.row("one reading of the memory gauge", spent_us, "us", predicted=(60.0, 200.0))
        gauge.close()
    if not bench.tiny:
        with bench.part("ceilings"):
            tell_ceilings(bench)
    with bench.part("steps with and without a probe"):
        tell_overhead(bench)


def tell_ceilings(bench: Bench) -> None:
    """Rates of the empty card, and with little memory left."""
    device, kind = str(bench.device), "bfloat16"
    empty = measure_ceilings(device, kind, fresh=True)
    bench.row("matrix products", empty.matrix_flops_s / 1e12, "TFLOP/s", predicted=(770.0, 800.0))
    bench.row("copy", empty.memory_bytes_s / 1e12, "TB/s", predicted=(4.1, 4.3))
    if bench.on_gpu:
        held = torch.empty(torch.cuda.mem_get_info()[0] - LEFT_BYTES, dtype=torch.uint8, device=bench.device)
        full = measure_ceilings(device, kind, fresh=True)
        del held
        share = full.matrix_flops_s / empty.matrix_flops_s
        bench.row("matrix products on a full card, over those on an empty one", share, predicted=(0.85, 0.95))
        bench.row("copy on a full card, over that on an empty one", full.memory_bytes_s / empty.memory_bytes_s)


def tell_overhead(bench: Bench) -> None:
    """Seconds of optimizer steps with a probe over those without, pairwise in turns, within one run."""
    from transformers import TrainerCallback

    trainer = trainer_of(bench, run_config(bench))
    lengths = FixedLengths(trainer, [SHORT], trainer.args.seed)
    pairs, seconds = 1 if bench.tiny else 3, {True: [], False: []}  # type: int, dict[bool, list[float]]

    class InTurns(TrainerCallback):  # type: ignore[misc]
        """A probe for every second step."""

        probe: Any = None
        begun = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bench.sync()
            if self.begun and state.global_step > 1:
                seconds[self.probe is not None].append(time.perf_counter() - self.begun)
            if self.probe is not None:
                self.probe.detach()
                self.probe = None
            if state.global_step % 2:
                self.probe = Probe(trainer, warmup=0)
                self.probe.train_began()
            control.should_training_stop = state.global_step > 2 * pairs
            self.begun = time.perf_counter()

    callback = InTurns()
    trainer.add_callback(callback)
    trainer.args.max_steps = 2 * pairs + 2
    try:
        trainer.train()
    finally:
        lengths.remove()
        if callback.probe is not None:
            callback.probe.detach()
    shares = [a / b for a, b in zip(seconds[True], seconds[False], strict=False)]
    bench.row("steps with a probe over those without", sorted(shares)[len(shares) // 2], predicted=(1.01, 1.03))
    release_trainer(trainer)
