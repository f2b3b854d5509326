"""What the decoding loop saves: seconds per token in turns with an earlier commit's loop, and kernels per token.

    python -m benchmarks.decoding [--models 16m FOLDER ...] [--rounds 5] [--tokens 256] [--before f02716b]
                                  [--name decoding]

Rows continue one prompt; completions have a fixed length. A round runs, one after another in one process and with one
seed, the loop of the commit `before` and this one, for full weights, LoRA, and LoRA merged for the generation; which
comes first turns from round to round. Seconds are of the CPU. A model is the one of `benchmarks.midsize` (`16m`) or a
folder. Kernels are counted at the depth and heads of Qwen3-VL-2B with narrow layers, since their number does not
depend on the width: operators of one token that are neither views nor allocations, `rms_norm` as the one that it is on
CUDA. Waits are operators that read a number; the flags of eight tokens, read in one go, are none on a CPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.result import ratio, write
from grpo_autotune.commands.imports import mend_torchvision

mend_torchvision()

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from benchmarks.midsize import midsize_model  # noqa: E402
from grpo_autotune.speedups.generation.decoding import Decoder  # noqa: E402
from grpo_autotune.speedups.generation.merge_for_generation import merged, to_merge  # noqa: E402
from tests.support.kernel_count import per_token  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS, PROMPT = 8, 100
IDS = torch.randint(10, 50, (1, PROMPT), generator=torch.Generator().manual_seed(0))
QWEN3_VL_2B = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
NARROW = {"head_dim": 16, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512}


def loop_of(commit: str) -> Any:
    """The `Decoder` of a commit whose loop is one module."""
    path = "grpo_autotune/speedups/generation/decoding.py"
    source = subprocess.run(["git", "show", f"{commit}:{path}"], check=True, capture_output=True, text=True).stdout
    module = types.ModuleType("loop_before")
    sys.modules[module.__name__] = module
    exec(compile(source, path, "exec"), vars(module))
    return module.Decoder


def lora(model: Any) -> Any:
    """Adapters as users have them, with factors that are not zero."""
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return adapted


def generate(model: Any, decoder: Any, tokens: int) -> torch.Tensor:
    """Ids of completions of that many tokens each."""
    torch.manual_seed(0)
    with torch.no_grad():
        ids: torch.Tensor = model.generate(
            input_ids=IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            custom_generate=decoder(torch.zeros(ROWS, dtype=torch.long)),
        )
    return ids


@contextmanager
def merged_in(model: Any) -> Iterator[None]:
    """The adapters in the weights; the merging itself counts."""
    with merged(list(to_merge(model))):
        yield


def race(name: str, model: Any, before: Any, options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Rows and ratios of one model: full weights, then LoRA."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Any] = {}
    for weights in ("full", "lora"):
        model = lora(model) if weights == "lora" else model
        ways: dict[str, tuple[Any, Callable[[Any], Any]]] = {
            "before": (before, nullcontext),
            "now": (Decoder, nullcontext),
        }
        if weights == "lora":
            ways["now, merged"] = (Decoder, merged_in)
        generate(model, Decoder, 8)
        found: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(options.rounds):
            ids = {}
            for way in list(ways) if number % 2 else list(ways)[::-1]:
                decoder, around = ways[way]
                start = time.process_time()
                with around(model):
                    ids[way] = generate(model, decoder, options.tokens)
                found[way].append((time.process_time() - start) / options.tokens)
            same = {way: bool(torch.equal(ids[way], ids["before"])) for way in ways}
            rows.append({"model": name, "weights": weights, "round": number, "same_tokens": same})
            rows[-1]["seconds_per_token"] = {way: seconds[-1] for way, seconds in found.items()}
            sys.stderr.write(f"{rows[-1]}\n")
        for way in list(ways)[1:]:
            pairs = zip(found["before"], found[way], strict=True)
            ratios[f"{name}, {weights}: seconds per token, before over {way}"] = ratio([a / b for a, b in pairs])
    return rows, ratios


def kernels(before: Any) -> list[dict[str, Any]]:
    """Kernels and waits of the host per token, at the depth of Qwen3-VL-2B, with LoRA."""
    config = transformers.AutoConfig.from_pretrained(midsize_model())
    for key, value in {**QWEN3_VL_2B, **NARROW}.items():
        setattr(config.text_config, key, value)
    config.text_config.rope_parameters |= {"mrope_section": [4, 2, 2]}
    config.vision_config.out_hidden_size = NARROW["hidden_size"]
    model = lora(transformers.AutoModelForImageTextToText.from_config(config))

    def late(rows: torch.Tensor) -> Decoder:
        return Decoder(rows, look_every=8)

    ways: dict[str, tuple[Any, Any]] = {"before": (before, nullcontext), "now": (late, nullcontext)}
    ways["now, merged"] = (late, merged_in)
    rows = []
    for way, (decoder, around) in ways.items():
        with around(model):
            count, waits = per_token(lambda tokens, decoder=decoder: generate(model, decoder, tokens))
        rows.append({"model": "qwen3-vl-2b", "way": way, "kernels_per_token": count, "waits_per_token": waits})
        sys.stderr.write(f"{rows[-1]}\n")
    return rows


def main() -> None:
    """Measure and write `docs/benchmarks/<name>.json`."""
    parser = argparse.ArgumentParser(description="What the decoding loop saves.")
    parser.add_argument("--models", nargs="+", default=["16m"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--before", default="f02716b")
    parser.add_argument("--name", default="decoding")
    options = parser.parse_args()
    before = loop_of(options.before)
    rows = kernels(before)
    ratios: dict[str, Any] = {}
    shown = " ".join(["decoding", *(Path(word).name for word in sys.argv[1:])])
    for name in options.models:
        folder = midsize_model() if name == "16m" else Path(name)
        kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
        model = kind.from_pretrained(folder, dtype=torch.float32)
        found, more = race(Path(name).name, model, before, options)
        rows, ratios = rows + found, ratios | more
        write(options.name, f"python -m benchmarks.{shown}", rows, ratios)
    for what, value in ratios.items():
        sys.stdout.write(f"{value['median']:7.2f}  {value['low']:.2f} .. {value['high']:.2f}  {what}\n")


if __name__ == "__main__":
    main()
