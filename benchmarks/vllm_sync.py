"""What a weight sync into a colocated vLLM engine moves and takes: TRL's merged push, batched, and the adapter alone.

    python -m benchmarks.vllm_sync [--size 14m] [--rounds 10] [--name vllm_sync]

Three trainers with LoRA of rank 16 on every linear layer of the language model, each in a process of its own with its
engine, one for each way. In a round each of them changes its adapter, as an optimizer step does, syncs, and generates
eight completions of 32 tokens on a 256 px image; which comes first turns from round to round, and a round before the
first warms up. Ratios are those of the merged push to the other way in the same round: bytes and seconds of the sync,
and seconds of the generation, since vLLM adds an adapter that is not merged to every layer as it computes it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.result import ratio, write
from grpo_autotune.commands.imports import mend_torchvision

mend_torchvision()

WAYS = ("merged", "batched", "adapter")
TOKENS = 32


def serve(orders: Connection, way: str, size: str) -> None:
    """Build the trainer of one way, then sync and generate at every order, until there is none."""
    import torch

    from benchmarks.vllm_rows import requests, vllm_trainer
    from grpo_autotune.rollout.sync import sync

    torch.set_num_threads(1)
    trainer = vllm_trainer(size, prompts=1, pixels=256, completion=TOKENS, vllm={"weight_sync": way})
    trainer.vllm_generation.sync_weights()  # the first one pushes everything, whatever the way
    prompts, images = requests(trainer, range(1))
    adapter = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    orders.send(sum(parameter.numel() for parameter in trainer.model.parameters()))
    while orders.recv():
        with torch.no_grad():
            for parameter in adapter:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        trainer.vllm_generation.sync_weights()
        row = sync.facts(trainer)[-1]
        begun = time.perf_counter()
        _, completions, _, _ = trainer.vllm_generation.generate(prompts, images, len(prompts))
        generation_s = time.perf_counter() - begun
        orders.send(
            {
                "way": row.way,
                "seconds": row.seconds,
                "bytes": row.bytes,
                "tensors": row.tensors,
                "generation_s": generation_s,
                "tokens": sum(map(len, completions)),
            }
        )


def main() -> None:
    """Run the rounds and write `docs/benchmarks/<name>.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="14m")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--name", default="vllm_sync")
    asked = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for way in WAYS:
        ends[way], theirs = spawn.Pipe()
        spawn.Process(target=serve, args=(theirs, way, asked.size), daemon=True).start()
        parameters = ends[way].recv()
        sys.stderr.write(f"{way}: the engine runs\n")
    rows: list[dict[str, Any]] = []
    for number in range(-1, asked.rounds):
        turn = number % len(WAYS)
        for way in (*WAYS[turn:], *WAYS[:turn]):
            ends[way].send(True)
            row = {"round": number, "parameters": parameters, **ends[way].recv()}
            sys.stderr.write(f"{row}\n")
            rows += [row] if number >= 0 else []
    for end in ends.values():
        end.send(False)
    found = {}
    for way in WAYS[1:]:
        for name in ("bytes", "seconds", "generation_s"):
            found[f"merged to {way}: {name}"] = ratio(_quotients(rows, way, name))
    command = f"python -m benchmarks.vllm_sync --size {asked.size} --rounds {asked.rounds}"
    sys.stdout.write(f"{found}\n{write(asked.name, command, rows, found)}\n")


def _quotients(rows: list[dict[str, Any]], way: str, name: str) -> list[float]:
    by = {(row["round"], row["way"]): row[name] for row in rows}
    return [by[number, "merged"] / by[number, way] for number in sorted({row["round"] for row in rows})]


if __name__ == "__main__":
    main()
