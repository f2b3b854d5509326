"""`grpo-autotune serve`: a vLLM server that a CONFIG can be trained against, or of what was trained in a RUN_DIR, its
first answer held against the trainer's; watched until it ends.

The server runs behind a guardian in a session of its own: whatever ends this command ends the server and all that it
started. Its output goes to a log; here is said what it was started with, when it answers, and why it did not.
"""

import json
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_autotune.commands.imports import mend_torchvision, set_environment
from grpo_autotune.config.schema import RunConfig, override
from grpo_autotune.config.sections.vllm import VllmSection, vllm_section
from grpo_autotune.config.sources import SUFFIXES, profile_names
from grpo_autotune.console import Heartbeat, say, show, warn
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import detect
from grpo_autotune.hardware.nvml import ORDER, VISIBLE, names_of_gpus
from grpo_autotune.processes.ending import Stopped, raising
from grpo_autotune.rollout.server.command import Serving, split_gpus
from grpo_autotune.rollout.server.own import LOG
from grpo_autotune.rollout.server.process import LOOK_S, VllmServer, need_vllm, serving_at
from grpo_autotune.runs.folder import RunFolder
from grpo_autotune.trained.agreement import check_answer
from grpo_autotune.trained.serving import served_name, served_weights, serving_trained
from grpo_autotune.trained.source import base_section, find_whole
from grpo_autotune.units import duration

GRACE_S = 20.0
"""What a server has to shut down after a signal before it is killed."""


def numbers(text: str | None) -> list[int]:
    """Indices of GPUs, from text such as `0,1`."""
    words = [word.strip() for word in text.split(",")] if text is not None else []
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise ConfigError(f"{text!r} is not a list of GPUs", where="--gpus", fix="Give their numbers: 0,1.")
    return [int(word) for word in words]


def is_trained(place: str | None) -> bool:
    """True for a folder, or a name in a run folder that may be a checkpoint's; anything else is a configuration: a
    file, the name of one, and a shipped profile."""
    path = Path(place or "").expanduser()
    if place is None or path.exists() or path.suffix in SUFFIXES or place in profile_names():
        return path.is_dir() and place is not None
    runs = map(RunFolder, path.parents[:2])
    return any(run.checkpoints.is_dir() or run.before_rungs() for run in runs)


def serve_config(config: RunConfig, *, out_dir: Path, gpus: Sequence[int], dry_run: bool) -> int:
    """Start a server for `config`, and stay with it until it ends or a signal comes; the exit code: 0, or 128 + the
    signal.

    It has the `gpus`, numbered among those that this process sees, or all of them, and a log in `out_dir`. A `dry_run`
    only prints the command.
    """
    if not dry_run:
        need_vllm()
    set_environment()
    wanted = _wanted(config, gpus)
    return stay_with(wanted, out_dir / LOG, lambda: _say_how(wanted, gpus), dry_run=dry_run)


def stay_with(wanted: Serving, log: Path, ready: Callable[[], None], *, dry_run: bool) -> int:
    """Start a server, call `ready` once it answers, and watch it until it ends, which is an error, or a signal shuts it
    down; the exit code: 0, or 128 + the signal. A `dry_run` only prints the command."""
    for note in wanted.notes:
        say(note)
    if dry_run:
        show(wanted.line())
        return 0
    _check_port(wanted)
    say(wanted.line())
    try:
        with raising(more=[signal.SIGINT]):
            _stay(wanted, log, ready)
    except Stopped as stopped:
        return 128 + stopped.signum
    return 0


def _stay(wanted: Serving, log: Path, ready: Callable[[], None]) -> None:
    server = VllmServer(wanted, log)
    try:
        with Heartbeat(lambda: f"the server starts, {duration(server.age_s)} (its log: {log})", say):
            server.until_healthy()
        say(f"the server answers at {server.wanted.address} after {duration(server.age_s)}")
        ready()
        while (code := server.wait(LOOK_S)) is None:
            pass
        raise server.ended("the server ended by itself", code)
    except Stopped as stopped:
        say(f"{signal.Signals(stopped.signum).name}: the server shuts down")
        server.signal(signal.SIGINT)
        server.wait(GRACE_S)
        raise
    finally:
        server.end()


def _wanted(config: RunConfig, gpus: Sequence[int]) -> Serving:
    names = named(gpus)
    if not gpus and config.vllm.server_gpus is not None:
        names, _ = split_gpus(config, len(detect().gpus))
    return serving_at(config, served_weights(config.model), names)


def named(gpus: Sequence[int]) -> list[str]:
    """These of the visible GPUs as `CUDA_VISIBLE_DEVICES` names them; ConfigError for one that is not there."""
    count = len(detect().gpus)
    if unknown := [index for index in gpus if index >= count]:
        raise ConfigError(f"there is no GPU {unknown[0]}: {count} can be seen here", where="--gpus")
    return [names_of_gpus(count)[index] for index in gpus]


def _check_port(wanted: Serving) -> None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended is in nobody's way
        try:
            trial.bind((wanted.host, wanted.port))
        except OSError as error:
            what = f"nothing can listen at {wanted.host}:{wanted.port}: {error.strerror}"
            fix = "Give another port, or end what listens there."
            raise ConfigError(what, where="vllm.server_port", fix=fix) from error


def _say_how(wanted: Serving, gpus: Sequence[int]) -> None:
    say("train against it with these keys, from another terminal:")
    say(f"  grpo: {{use_vllm: true}}   vllm: {{mode: server, server_base_url: {wanted.address}}}")
    if gpus:
        others = [name for index, name in enumerate(names_of_gpus(len(detect().gpus))) if index not in gpus]
        order = f"{ORDER}={wanted.environment[ORDER]}"
        left = f"{order} {VISIBLE}={','.join(others)}" if others else "no GPU is left for the trainer"
        say(f"  and on the other GPUs: {left}")
    say("Ctrl-C ends it")


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
        _say_how_to_ask(wanted.address, served_name(trained))

    return stay_with(wanted, (out_dir or trained.run or Path("runs") / trained.name) / LOG, ready, dry_run=dry_run)


def _say_how_to_ask(address: str, name: str) -> None:
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
