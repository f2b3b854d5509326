"""Stage decode: milliseconds and kernels per token of `generate`, of the shared loop, and of what changes either."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import TARGETS, model_folder

import torch  # isort: skip
from peft import LoraConfig, get_peft_model  # isort: skip
from transformers import AutoModelForImageTextToText, GenerationConfig, LogitsProcessorList

from grpo_autotune.hardware.device_memory import ALLOCATOR
from grpo_autotune.probe.kernels import activities, busy, longest
from grpo_autotune.speedups.generation import decoding
from grpo_autotune.speedups.selection import OPTIONS
from grpo_autotune.trials.child.fixed_lengths import _Ends

STEP = "grpo_autotune.speedups.generation.step"
"""Module of a decoding step that can be captured."""

GROUP = 8
FEW = 4
PROFILED = 8
"""Tokens under the profiler."""
BAR_MS = 10.0
"""Of a token at 32 rows, by the fastest way."""


class Sizes(NamedTuple):
    """Tokens of the prompt, rows, and new tokens."""

    prompt: int
    rows: tuple[int, ...]
    tokens: int


SIZES, TINY = Sizes(500, (32, 64), 96), Sizes(12, (8,), 8)


class Ways:
    """A model with adapters, and the ways to generate with it."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.sizes = bench, TINY if bench.tiny else SIZES
        model = AutoModelForImageTextToText.from_pretrained(model_folder(bench), dtype=torch.bfloat16)
        self.model = get_peft_model(model.to(bench.device), LoraConfig(r=32, target_modules=TARGETS))
        self.model.eval()

    def generate(self, rows: int, way: str, tokens: int | None = None) -> Any:
        """Generate with plain transformers (`plain`), or with each prompt read once (`shared`), steps in a graph
        (`captured`); `ragged`: rows end between half and all of the length."""
        tokens = tokens or self.sizes.tokens
        ids = torch.randint(10, 200, (rows // GROUP, self.sizes.prompt), device=self.bench.device)
        end = self.model.config.get_text_config().vocab_size - 1
        shorter = tokens // 2 if "ragged" in way else 0
        lengths = [tokens - row * shorter // rows for row in range(rows)]
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=True, eos_token_id=end, pad_token_id=end, top_k=0, use_cache=True
        )
        inputs = {"input_ids": ids if "shared" in way else ids.repeat_interleave(GROUP, dim=0)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        prompt_of_row = torch.arange(rows) // GROUP
        loop = {"custom_generate": decoding.Decoder(prompt_of_row, **captured(way))} if "shared" in way else {}
        ends = LogitsProcessorList([_Ends(lengths, [end], tokens)])
        autocast = torch.autocast(self.bench.device.type, torch.bfloat16)
        with torch.no_grad(), autocast:
            return self.model.generate(**inputs, generation_config=config, logits_processor=ends, **loop)

    def ms_per_token(self, rows: int, way: str) -> float:
        """Milliseconds per token of the longest completion, beyond the first few, which the prompt is read with."""
        self.generate(rows, way, tokens=FEW)
        few_s, all_s = (
            self.bench.seconds(functools.partial(self.generate, rows, way, tokens))
            for tokens in (FEW, self.sizes.tokens)
        )
        return (all_s - few_s) * 1e3 / (self.sizes.tokens - FEW)


def captured(way: str) -> dict[str, Any]:
    """Arguments of the loop for a way to generate."""
    return {"capture": importlib.import_module(STEP).cuda_graph} if "captured" in way else {}


def measure(bench: Bench) -> None:
    """Write the rows of each way, at each number of rows."""
    ways = Ways(bench)
    for rows in ways.sizes.rows:
        for name, way, around, predicted in variants(bench, ways):
            if bench.left() < 8.0 and not bench.tiny:
                bench.row(f"{rows} rows: {name}", None, note="not begun: no time was left")
                continue
            with bench.part(f"{rows} rows: {name}"), around():
                ms = ways.ms_per_token(rows, way)
                bar = ms <= BAR_MS if rows == 32 and name == "shared loop, captured" else None
                bench.row(f"{rows} rows: {name}", ms, "ms per token", predicted=predicted, ok=bar)
        if bench.on_gpu:
            for way in (
                "plain",
                "shared",
                *(["shared captured"] if "decode" in OPTIONS.get("shared_prefill", {}) else []),
            ):
                with bench.part(f"{rows} rows: kernels, {way}"):
                    tell_kernels(bench, ways, rows, way)
    if bench.on_gpu:
        with bench.part("memory"):
            tell_memory(bench, ways)


Variant = tuple[str, str, Callable[[], Any], tuple[float, float] | None]


def variants(bench: Bench, ways: Ways) -> Iterator[Variant]:
    """Name, way, surroundings and predicted milliseconds per token."""
    slow = (30.0, 45.0)
    yield "generate", "plain", cudnn_off, slow
    yield "shared loop", "shared", cudnn_off, slow
    yield "shared loop, ragged rows", "shared ragged", cudnn_off, slow
    if bench.on_gpu:
        if "decode" in OPTIONS.get("shared_prefill", {}):
            yield "shared loop, captured", "shared captured", cudnn_off, (4.0, 8.0)
            yield "shared loop, captured, adapters merged", "shared captured", lambda: merged(ways.model), (3.0, 6.0)
        yield "generate, torch's order of attention", "plain", nullcontext, slow
        yield "shared loop, ragged rows, torch's order of attention", "shared ragged", nullcontext, (55.0, 80.0)
        yield "generate, no input casting", "plain", lambda: uncast(ways.model), (26.0, 43.0)


def uncast(model: Any) -> AbstractContextManager[None]:
    """Leave out PEFT's cast of every adapter's input, as `lora_input` does."""
    from peft.helpers import disable_input_dtype_casting

    without: AbstractContextManager[None] = disable_input_dtype_casting(model)
    return without


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Add the adapters to the weights, as `merge_for_generation` does."""
    with cudnn_off():
        model.merge_adapter()
        try:
            yield
        finally:
            model.unmerge_adapter()


@contextmanager
def cudnn_off() -> Iterator[None]:
    """Keep attention away from cuDNN."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def tell_kernels(bench: Bench, ways: Ways, rows: int, way: str) -> None:
    """Kernels, host milliseconds and busy share per token: of further tokens, so that the prompt does not count."""
    measured = []
    for tokens in (FEW, FEW + PROFILED):
        ways.generate(rows, way, tokens=tokens)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            seconds = bench.seconds(functools.partial(ways.generate, rows, way, tokens))
        measured.append((seconds, [entry for entry in activities(profiler) if entry.on_device]))
    (less_s, less), (more_s, more) = measured
    label = f"{rows} rows, {way}"
    bench.row(f"{label}: kernels per token", (len(more) - len(less)) / PROFILED, predicted=(2900.0, 3300.0))
    share = (busy(more) - busy(less)) / max(1e-9, more_s - less_s)
    bench.row(f"{label}: busy share of decoding, under the profiler", share, predicted=(0.3, 0.45))
    path = bench.out / "profile.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[f"decode, {label}"] = [row.model_dump(mode="json") for row in longest(more)]
    path.write_text(json.dumps(kept, indent=1))


def tell_memory(bench: Bench, ways: Ways) -> None:
    """Memory that the allocator reserves for a cache that grows, here with segments that grow, in a child without."""
    bench.row("reserved over live, segments that grow", reserved_over_live(ways), predicted=(1.0, 1.2))
    if bench.left() > 20.0:
        environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
        words = [sys.executable, "-m", "benchmarks.gpu.decode", str(bench.out), str(bench.scratch)]
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=bench.left() - 2.0, check=True
        )
        bench.row("reserved over live, torch's default", float(done.stdout.split()[-1]), predicted=(2.0, 30.0))


def reserved_over_live(ways: Ways) -> float:
    """Peaks of one plain generation, beyond what was allocated before it."""
    ways.bench.release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ways.generate(ways.sizes.rows[-1], "plain")
    return (torch.cuda.max_memory_reserved() - before) / max(1, torch.cuda.max_memory_allocated() - before)


def main() -> None:
    """Print `reserved_over_live` of a fresh process."""
    from benchmarks.gpu.bench import Outcome

    out, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    bench = Bench(
        "decode", Outcome(out / "child.json"), device="cuda", tiny=False, out=out, scratch=scratch, until=float("inf")
    )
    sys.stdout.write(f"{reserved_over_live(Ways(bench))}\n")


if __name__ == "__main__":
    main()
