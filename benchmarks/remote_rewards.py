"""What a reward over a network costs: waiting beyond the ideal, CPU of the client, seconds left beside log-probs.

    python -m benchmarks.remote_rewards [--rounds 5] [--steps 2]

*Calls*: a server in a process of its own answers after 100 ms; 256 rows, 16 calls at once, ideal 256 / 16 x 0.1 s =
1.6 s. The rewards `service` and `judge` and a bare `httpx2` loop with a semaphore take turns; the client's CPU seconds
are those of its process, over the calls, with one client for all and what was imported frozen, as in a run. *Beside
log-probs*: the demo with a reward whose answers take 3 s, with
`reward_overlap` and, in two rounds, without. Its log-probs are made to last 3 s by repeating the real pass, on one
torch thread, until they have: so the client shares the interpreter with a training that is busy, not asleep.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.result import ratio, write
from grpo_autotune.commands.imports import mend_torchvision
from grpo_autotune.config.schema import load_config
from grpo_autotune.console import say

mend_torchvision()

import torch  # noqa: E402

from grpo_autotune.probe.startup import Startup  # noqa: E402
from grpo_autotune.seams.table import find, wrap_rows  # noqa: E402
from grpo_autotune.speedups.install import speed_up  # noqa: E402
from grpo_autotune.train.rewards.remote.batch import RemoteReward  # noqa: E402
from grpo_autotune.train.rewards.remote.judge import Judge  # noqa: E402
from grpo_autotune.train.rewards.remote.replies import aclose, client  # noqa: E402
from grpo_autotune.train.rewards.remote.service import Service  # noqa: E402
from grpo_autotune.train.trial_trainer import quiet_trainer  # noqa: E402
from tests.support.fault_server import FaultServer  # noqa: E402

ROWS, AT_ONCE, ANSWER_S, LONG_S = 256, 16, 0.1, 3.0
IDEAL_S = ROWS / AT_ONCE * ANSWER_S
BATCH = {"prompts": ["Which digit?"] * ROWS, "completions": ["<answer>7</answer>"] * ROWS}


def _serve(delay_s: float, port: Any, done: Any) -> None:
    verdict = {"message": {"content": '{"reason": "-", "score": 0.5}'}, "finish_reason": "stop"}
    answer = {"score": 0.5, "choices": [verdict], "usage": {"prompt_tokens": 90, "completion_tokens": 12}}
    with FaultServer(answer=lambda call: answer, delay_s=delay_s) as server:
        port.send(server.url)
        done.wait()


@contextmanager
def server(delay_s: float) -> Iterator[str]:
    """The address of a server in another process, whose answers take so long."""
    spawn = multiprocessing.get_context("spawn")
    port, sent, done = *spawn.Pipe(duplex=False), spawn.Event()
    process = spawn.Process(target=_serve, args=(delay_s, sent, done))
    process.start()
    try:
        yield port.recv()
    finally:
        done.set()
        process.join()


async def ours(reward: RemoteReward) -> None:
    """A reward of this package."""
    reward.set_up(reward.kind, "rewards[0]", concurrency=AT_ONCE)
    reward.warmup = 0
    scores = await reward(**BATCH)
    assert len(scores) == ROWS and min(scores) >= 0.0


async def service(url: str) -> None:
    """A score in JSON."""
    await ours(Service(url=url))


async def judge(url: str) -> None:
    """A verdict in a chat completion."""
    await ours(Judge(providers=[{"base_url": url, "model": "m"}], prompt="{{ completion }}", cache=False))


async def bare(url: str) -> None:
    """The same calls by `httpx2` alone."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(completion: str) -> float:
        async with slots:
            answer = await client().post(url, json={"prompt": "Which digit?", "completion": completion})
            return float(answer.json()["score"])

    await asyncio.gather(*map(one, BATCH["completions"]))


def calls(rounds: int) -> list[dict[str, Any]]:
    """Seconds and CPU milliseconds a call of each side, in turns; the first round warms up and is left out."""
    sides: dict[str, Callable[[str], Awaitable[None]]] = {"service": service, "judge": judge, "httpx2": bare}
    rows: list[dict[str, Any]] = []
    with server(ANSWER_S) as url, asyncio.Runner() as runner:
        gc.collect()
        gc.freeze()
        for number in range(rounds + 1):
            for name in list(sides)[:: 1 if number % 2 else -1]:

                async def timed(name: str = name) -> tuple[float, float]:
                    begin = time.perf_counter(), time.process_time()
                    await sides[name](url)
                    return time.perf_counter() - begin[0], time.process_time() - begin[1]

                seconds, cpu_s = runner.run(timed())
                if number:
                    rows.append(
                        {"side": name, "round": number, "seconds": seconds, "cpu_ms_per_call": cpu_s / ROWS * 1e3}
                    )
        runner.run(aclose())
    return rows


def beside_log_probs(rounds: int, steps: int) -> list[dict[str, Any]]:
    """Seconds that the reward ran and that training waited for it, a step; with `reward_overlap` and without."""
    rows = []
    with server(LONG_S) as url:
        body = {"completion": "{{ completion }}"}
        overrides = [f"grpo.max_steps={steps}", "grpo.beta=0.02", "grpo.eval_strategy=no", "speedups=none"]
        config = load_config("demo", overrides)
        reward = {"name": "service", "params": {"url": url, "body": body, "warmup": 0}, "concurrency": 64}
        config = config.from_dict({**config.to_dict(), "rewards": [reward]})
        for number in range(rounds):
            for overlapped in (True, False) if number < 2 else (True,):
                rows.append({"round": number, "reward_overlap": overlapped, **_train(config, overlapped)})
                say(str(rows[-1]))
    return rows


def _train(config: Any, overlapped: bool) -> dict[str, float]:
    trainer = quiet_trainer(config, Startup(), say)
    speed_up(trainer, ["reward_overlap"] if overlapped else "none")
    seconds = {"waited_s": 0.0, "log_probs_s": 0.0}

    def rewards(score: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return score(*args, **kwargs)
        finally:
            seconds["waited_s"] += time.perf_counter() - begin

    def log_probs(passes: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = passes(*args, **kwargs)
        while not torch.is_grad_enabled() and time.perf_counter() - begin < LONG_S:
            passes(*args, **kwargs)
        seconds["log_probs_s"] += 0.0 if torch.is_grad_enabled() else time.perf_counter() - begin
        return result

    wrap_rows(trainer, [(find("rewards"), rewards), (find("logps"), log_probs)])
    trainer.train()
    steps = trainer.state.global_step
    busy_s = trainer.reward_funcs[0].remote.calls().batch_s
    assert trainer.reward_funcs[0].remote.calls().failures == {}
    hidden = 1 - seconds["waited_s"] / busy_s
    return {
        "busy_s": busy_s / steps,
        "hidden_share": hidden,
        **{name: value / steps for name, value in seconds.items()},
    }


def main() -> None:
    """Measure, and write `docs/benchmarks/remote_rewards.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = calls(options.rounds)
    by = {name: [row for row in rows if row["side"] == name] for name in ("service", "judge", "httpx2")}
    found = {f"{name}_over_ideal": ratio([row["seconds"] / IDEAL_S for row in by[name]]) for name in by} | {
        f"{name}_cpu_ms_per_call": ratio([row["cpu_ms_per_call"] for row in by[name]]) for name in by
    }
    beside = beside_log_probs(max(3, options.rounds // 2), options.steps)
    found |= {
        f"hidden_share_{'with' if on else 'without'}_reward_overlap": ratio(
            [row["hidden_share"] for row in beside if row["reward_overlap"] is on]
        )
        for on in (True, False)
    }
    path = write(
        "remote_rewards",
        f"python -m benchmarks.remote_rewards {' '.join(sys.argv[1:])}".strip(),
        [*rows, *beside],
        found,
    )
    sys.stdout.write(f"{found}\n{path}\n")


if __name__ == "__main__":
    main()
