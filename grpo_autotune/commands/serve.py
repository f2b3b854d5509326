"""`grpo-autotune serve CONFIG`: a vLLM server that a configuration can be trained against, watched until it ends.

The server runs behind a guardian in a session of its own: whatever ends this command ends the server and all that it
started. Its output goes to a log; here is said what it was started with, when it answers, and why it did not.
"""

import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from grpo_autotune.commands.imports import set_environment
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import Heartbeat, say, show
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import detect
from grpo_autotune.hardware.nvml import ORDER, VISIBLE, names_of_gpus
from grpo_autotune.processes.ending import Stopped, raising
from grpo_autotune.rollout.server.command import Serving, split_gpus
from grpo_autotune.rollout.server.own import LOG
from grpo_autotune.rollout.server.process import LOOK_S, VllmServer, need_vllm, serving_at
from grpo_autotune.trained.serving import served_weights
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
    """True for a folder, or a name in a run folder that may be a checkpoint's; anything else is a configuration."""
    path = Path(place or "").expanduser()
    in_run = not path.exists() and any(beside.is_dir() for beside in path.parent.glob("checkpoints*"))
    return place is not None and (path.is_dir() or in_run)


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
            raise ConfigError(
                f"nothing can listen at {wanted.host}:{wanted.port}: {error.strerror}",
                where="vllm.server_port",
                fix="Give another port, or end what listens there.",
            ) from error


def _say_how(wanted: Serving, gpus: Sequence[int]) -> None:
    say("train against it with these keys, from another terminal:")
    say(f"  grpo: {{use_vllm: true}}   vllm: {{mode: server, server_base_url: {wanted.address}}}")
    if gpus:
        others = [name for index, name in enumerate(names_of_gpus(len(detect().gpus))) if index not in gpus]
        order = f"{ORDER}={wanted.environment[ORDER]}"
        left = f"{order} {VISIBLE}={','.join(others)}" if others else "no GPU is left for the trainer"
        say(f"  and on the other GPUs: {left}")
    say("Ctrl-C ends it")
