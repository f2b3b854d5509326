"""`grpo-autotune serve RUN_DIR`: a vLLM server of what was trained, its first answer held against the trainer's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_autotune.commands.imports import mend_torchvision, set_environment
from grpo_autotune.commands.serve import named, stay_with
from grpo_autotune.config.schema import override
from grpo_autotune.config.sections.vllm import VllmSection, vllm_section
from grpo_autotune.console import Heartbeat, say, warn
from grpo_autotune.errors import ConfigError
from grpo_autotune.rollout.server.own import LOG
from grpo_autotune.rollout.server.process import need_vllm
from grpo_autotune.trained.agreement import check_answer
from grpo_autotune.trained.serving import served_name, served_weights, serving_trained
from grpo_autotune.trained.source import base_section, find_whole


def serve_trained(
    place: str, *, out_dir: Path | None, gpus: Sequence[int], dry_run: bool, check: bool, settings: Sequence[str]
) -> int:
    """Serve the trained weights at `place` on these `gpus`, or all, and stay with the server until it ends or a signal
    comes; the exit code: 0, or 128 + the signal.

    With `check` the trainer's model answers one prompt before the server starts, and the server the same one after.
    `settings` are of the form `vllm.KEY=VALUE`. A `dry_run` only prints the command.

    Raises:
        ConfigError: There are no such weights, or vLLM cannot run the adapter.
        EnvironmentProblem: vLLM is missing, the server does not start, or answers as another model.
    """
    if not dry_run:
        need_vllm()
    set_environment()
    mend_torchvision()
    trained = find_whole(place)
    if trained.adapter is not None and trained.config is not None and trained.config.model.load_in_4bit:
        say("the base is served as it is stored, and was in 4 bits in training (model.load_in_4bit)")
    wanted = serving_trained(trained, served_weights(base_section(trained)), _section(settings), named(gpus))
    answer = None
    if check and not dry_run:
        with Heartbeat(lambda: "the trainer's model answers one prompt, to compare"):
            from grpo_autotune.trained.answer import trainers_answer

            answer = trainers_answer(trained, say)

    def ready() -> None:
        if answer is not None:
            say(check_answer(wanted.address, served_name(trained), answer, warn))
        _say_how(wanted.address, served_name(trained))

    return stay_with(wanted, (out_dir or trained.run or Path("runs") / trained.name) / LOG, ready, dry_run=dry_run)


def _say_how(address: str, name: str) -> None:
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "..."}]})
    say("ask it, from another terminal:")
    say(f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    say("Ctrl-C ends it")


def _section(settings: Sequence[str]) -> VllmSection:
    values: dict[str, Any] = {"vllm": {}}
    for item in settings:
        if not item.startswith("vllm."):
            raise ConfigError("only keys of the vllm section can be set here", where=f"--set {item}")
        override(values, item)
    return vllm_section(values["vllm"])
