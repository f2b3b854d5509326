"""How much faster a colocated vLLM engine generates when a group is one request, and its prompt is computed once.

    python -m benchmarks.vllm_groups [--size 14m] [--rounds 5] [--pixels 768] [--tokens 32] [--name vllm_groups]

One engine, two prompts with images that it has not seen, eight completions each, all of one length. In a round
it generates them in three ways, which comes first turns from round to round, and a round before the first warms up:

    copies         TRL's eight copies of a prompt; keys and values shared by none (a salt of its own on each)
    cached copies  TRL's eight copies; vLLM's prefix cache as TRL leaves it
    groups         one request with n = 8

Ratios are those of the seconds of the copies to those of the groups in the same round. Beside them the seconds outside
the engine's steps: image processing (vLLM keeps what it has processed, so that copies of an image cost a hash each),
tokens in and out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.result import ratio, write
from grpo_autotune.commands.imports import mend_torchvision

mend_torchvision()

import torch  # noqa: E402

from benchmarks.vllm_rows import requests, vllm_trainer  # noqa: E402
from grpo_autotune.rollout.colocate.requests import JoinedRequests  # noqa: E402
from grpo_autotune.rollout.parts import part_of  # noqa: E402
from grpo_autotune.seams.layers import OUTER, AttributeSlot, wrap  # noqa: E402

PROMPTS = 2
WAYS = ("copies", "cached copies", "groups")


class Ways:
    """Sends one batch in each of the ways, by a layer on `LLM.generate` outside of the one that joins requests."""

    def __init__(self, trainer: Any) -> None:
        self.generation, self.way = trainer.vllm_generation, "groups"
        joined = part_of(self.generation, JoinedRequests)
        if joined is None:
            raise SystemExit("the engine is TRL's plain one")
        self.joined = joined
        self.engine_s = 0.0
        wrap(AttributeSlot(self.generation.llm, "generate"), self._generate, OUTER)
        wrap(AttributeSlot(self.generation.llm.llm_engine, "step"), self._step, OUTER)

    def _generate(self, call_next: Callable[..., Any], /, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        if self.way != "groups":
            self.joined._rows = 0  # not a batch to join
        if self.way == "copies":
            prompts = [{**prompt, "cache_salt": str(index)} for index, prompt in enumerate(prompts)]
        return call_next(prompts, *args, **kwargs)

    def _step(self, call_next: Callable[..., Any], /) -> Any:
        begun = time.perf_counter()
        outputs = call_next()
        self.engine_s += time.perf_counter() - begun
        return outputs

    def row(self, way: str, prompts: Any, images: Any) -> dict[str, Any]:
        """Seconds of one generation from cold caches."""
        self.way, self.engine_s = way, 0.0
        llm = self.generation.llm
        llm.reset_prefix_cache()
        llm.llm_engine.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()
        begun = time.perf_counter()
        _, completions, _, _ = self.generation.generate(prompts, images, len(prompts) // PROMPTS)
        seconds = time.perf_counter() - begun
        tokens = sum(map(len, completions))
        return {
            "way": way,
            "seconds": seconds,
            "before_the_engine_s": seconds - self.engine_s,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "prompt_tokens": len(prompts[0]),
        }


def main() -> None:
    """Run the rounds and write `docs/benchmarks/<name>.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="14m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pixels", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--name", default="vllm_groups")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keys = {"weight_sync": "batched"}
    trainer = vllm_trainer(asked.size, prompts=PROMPTS, pixels=asked.pixels, completion=asked.tokens, vllm=keys)
    trainer.vllm_generation.sync_weights()
    ways = Ways(trainer)
    rows: list[dict[str, Any]] = []
    for number in range(-1, asked.rounds):
        first = (number + 1) * PROMPTS
        prompts, images = requests(trainer, range(first, first + PROMPTS))
        turn = number % len(WAYS)
        for way in (*WAYS[turn:], *WAYS[:turn]):
            row = {"round": number, **ways.row(way, prompts, images)}
            sys.stderr.write(f"{row}\n")
            rows += [row] if number >= 0 else []
    by = {(row["round"], row["way"]): row["seconds"] for row in rows}
    found = {
        f"{way} to groups": ratio([by[number, way] / by[number, "groups"] for number in range(asked.rounds)])
        for way in WAYS[:-1]
    }
    command = (
        f"python -m benchmarks.vllm_groups --size {asked.size} --rounds {asked.rounds} --pixels {asked.pixels} "
        f"--tokens {asked.tokens}"
    )
    sys.stdout.write(f"{found}\n{write(asked.name, command, rows, found)}\n")


if __name__ == "__main__":
    main()
