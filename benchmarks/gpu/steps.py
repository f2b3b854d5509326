"""Stage steps: GRPO steps through the product, plain TRL against the speed-ups, and kernels by stage."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.memory import allocated, tell_memory
from benchmarks.gpu.models import fixed, release_trainer, run_config, stage_s, train, trainer_of

import torch  # isort: skip

from grpo_autotune import registry
from grpo_autotune.probe.probe import Probe
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.seams.trainer_access import SPEED_UPS
from grpo_autotune.speedups.selection import OPTIONS

PASSES = ("policy_logprob", "reference_logprob", "backward")
LARGE = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
STEPS = 2


class Variant(NamedTuple):
    """A run: its speed-ups, its changed keys, and whether cuDNN may do attention.

    Attributes:
        passes: How many times faster than plain TRL log-probs and backward are predicted to be.
        profiled: Whether a further step goes under the profiler.
    """

    name: str
    speedups: Any
    grpo: dict[str, int]
    cudnn: bool = True
    passes: tuple[float, float] | None = None
    profiled: bool = False


ASKED = {
    "shared_prefix": {"form": "cascade"},
    "shared_prefill": {"decode": "graph"},
    "merge_for_generation": {"weights": "any"},
}
"""Options that stay opt-in until a GPU's figures are there."""


def every() -> list[Any]:
    """All speed-ups, with those options of `ASKED` that there are."""
    chosen: list[Any] = []
    for name in registry.names("speedup"):
        accepted = OPTIONS.get(name, {})
        options = {key: value for key, value in ASKED.get(name, {}).items() if value in accepted.get(key, ())}
        chosen.append({"name": name, **options} if options else name)
    return chosen


VARIANTS = (
    Variant("plain", "none", {}, profiled=True),
    Variant("speed-ups", "auto", {}, passes=(0.5, 3.0), profiled=True),
    Variant("all speed-ups, micro batch 16", every(), LARGE, passes=(2.0, 4.0), profiled=True),
    Variant("all speed-ups", every(), {}, passes=(1.1, 4.0)),
    Variant("plain, micro batch 16", "none", LARGE, passes=(1.0, 1.5)),
    Variant("speed-ups, cuDNN off", "auto", {}, cudnn=False, passes=(1.1, 3.0)),
)
"""In order of worth; `all` has what has to be asked for on a GPU."""


def measure(bench: Bench) -> None:
    """Write some rows for every variant, and how many times faster it is than plain TRL."""
    seconds: dict[str, dict[str, float]] = {}
    longest = 0.0
    for variant in VARIANTS[: 2 if bench.tiny else None]:
        if bench.left() < 1.1 * longest:
            bench.row(variant.name, None, note="not begun: no time was left")
            continue
        begin = bench.left()
        with bench.part(variant.name):
            seconds[variant.name] = run(bench, variant)
            tell_faster(bench, variant, seconds)
        longest = max(longest, begin - bench.left())


def run(bench: Bench, variant: Variant) -> dict[str, float]:
    """Seconds of a step, of its passes and of its generation under one variant."""
    config = run_config(bench, variant.speedups, **({} if bench.tiny else variant.grpo))
    torch.backends.cuda.enable_cudnn_sdp(variant.cudnn)
    idle_bytes = allocated(bench)
    trainer = trainer_of(bench, config)
    lengths = fixed(bench, trainer)
    probe = Probe(trainer, out_dir=bench.out / f"spans-{slug(variant.name)}", profile=variant.profiled)
    probe.warmup = 2 if variant.profiled and bench.on_gpu else 1
    try:
        wall_s = train(trainer, 1 if bench.tiny else STEPS, probe)
        record = probe.record()
    finally:
        probe.detach()
        lengths.remove()
        torch.backends.cuda.enable_cudnn_sdp(True)
    steps = record.timings.step_s
    seconds = {
        "step": sum(steps) / len(steps),
        "log-probs and backward": stage_s(record, PASSES),
        "generation": stage_s(record, ("generation",)),
    }
    speedups = getattr(trainer, SPEED_UPS, None)
    table = (
        []
        if speedups is None
        else [f"{row.name} {'on' if row.on else 'off: ' + row.reason}" for row in speedups.table()]
    )
    for name, value in seconds.items():
        bench.row(f"{variant.name}: {name}", value, "s", note="; ".join(table) if name == "step" else "")
    share = sum(steps) / sum(wall_s)
    bench.row(f"{variant.name}: spans over the wall clock", share, predicted=(0.99, 1.01))
    tell_kernels(bench, variant.name, record)
    tell_memory(bench, variant.name, config, record, idle_bytes)
    release_trainer(trainer)
    return seconds


def tell_faster(bench: Bench, variant: Variant, seconds: dict[str, dict[str, float]]) -> None:
    """Rows of plain seconds over those of this variant; the bars are those of the defaults and of exact knobs."""
    if variant.name == "plain" or "plain" not in seconds:
        return
    for what, predicted in (("step", None), ("log-probs and backward", variant.passes), ("generation", None)):
        times = seconds["plain"][what] / seconds[variant.name][what]
        bar = times >= 2.0 if variant.speedups != "none" and variant.grpo and what != "generation" else None
        bench.row(
            f"{variant.name}: {what}, plain over this", times, "x", predicted=predicted, ok=None if bench.tiny else bar
        )


def tell_kernels(bench: Bench, name: str, record: ProbeRecord) -> None:
    """Rows of how busy the GPU was and how many kernels it ran, and `profile.json`."""
    profiled = record.profiled
    if profiled is None:
        return
    path = bench.out / "profile.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(kept | {name: profiled.model_dump(mode="json")}, indent=1))
    predicted = {"plain": (0.35, 0.5), "all speed-ups, micro batch 16": (0.75, 0.9)}.get(name)
    bench.row(f"{name}: busy share of the passes", profiled.busy_share(*PASSES), "", predicted=predicted)
    bench.row(f"{name}: busy share of generation", profiled.busy_share("generation"), "", predicted=(0.3, 0.45))
    bench.row(f"{name}: kernels per micro batch", profiled.per_micro_batch(PASSES), "", predicted=(9e3, 15e3))
    bench.row(f"{name}: kernels per token", profiled.per_token(), "", predicted=(2900, 3300))


def slug(name: str) -> str:
    """A variant's name as part of a file's."""
    return name.replace(",", "").replace(" ", "-")
