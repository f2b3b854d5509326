"""`grpo-autotune serve`: a vLLM server that a configuration can be trained against, watched until it ends.

The server runs behind a guardian in a session of its own: whatever ends this command ends the server and all that it
started. Its output goes to a log; here is said what it was started with, when it answers, and why it did not.
"""

from __future__ import annotations

import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from grpo_autotune.commands.console import say, show
from grpo_autotune.commands.imports import mend_torchvision
from grpo_autotune.config import RunConfig
from grpo_autotune.engine.serving import Serving, serving
from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.hardware import detect
from grpo_autotune.knobs.given import model_config
from grpo_autotune.knobs.rules import installed
from grpo_autotune.probe.startup import Heartbeat
from grpo_autotune.search.processes import PYTHON, Guarded, without_rank

LOOK_S = 0.5
ANSWER_S = 5.0
GRACE_S = 20.0
"""What a server has to shut down after a signal before it is killed."""

RAISED = re.compile(r"(?:^|\s)((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)): (\S.*)$")
"""The last line of a traceback, behind whatever a logger puts in front of it."""

OF_PYDANTIC = "1 validation error for "
"""How pydantic begins; what is wrong stands in the next line."""
MOST_SAID = 400

SECOND_HAND = "Engine core initialization failed"
"""vLLM's word from the process that did not fail itself."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def serve_config(config: RunConfig, *, out_dir: Path, gpus: Sequence[int], dry_run: bool) -> int:
    """Start a server for `config` and stay with it until it ends or a signal comes.

    Args:
        config: The run.
        out_dir: The log goes to `serve.log` there.
        gpus: GPUs of the server; all that are visible without.
        dry_run: Only print the command.

    Returns:
        0, or 128 + the signal.

    Raises:
        ConfigError: The model, the address or a GPU is not there.
        EnvironmentProblem: vLLM is missing, or the server did not start, or ended by itself.
    """
    if not dry_run and not installed("vllm"):
        raise EnvironmentProblem(
            "serving needs the package vllm, which is not installed", where="serve", fix="Install the extra `vllm`."
        )
    wanted = _wanted(config, gpus)
    for note in wanted.notes:
        say(note)
    if dry_run:
        show(wanted.line())
        return 0
    _check_port(wanted)
    out_dir.mkdir(parents=True, exist_ok=True)
    log = out_dir / "serve.log"
    log.write_bytes(b"")
    say(wanted.line())
    try:
        with _signals():
            _stay(config, wanted, gpus, log)
    except Stopped as stopped:
        return 128 + stopped.signum
    return 0


def _stay(config: RunConfig, wanted: Serving, gpus: Sequence[int], log: Path) -> None:
    """Start the server and watch it.

    Raises:
        EnvironmentProblem: It did not start, or ended by itself.
        Stopped: A signal came, and it was shut down.
    """
    server = Guarded(wanted.words(PYTHON), log, {**without_rank(), **wanted.environment})
    try:
        _until_healthy(server, wanted, log)
        _say_how(wanted, gpus)
        while (code := server.wait(LOOK_S)) is None:
            pass
        raise EnvironmentProblem(f"the server ended by itself ({_ending(code)})", where=str(log), fix=_last(log))
    except Stopped as stopped:
        say(f"{signal.Signals(stopped.signum).name}: the server shuts down")
        server.signal(signal.SIGINT)
        server.wait(GRACE_S)
        raise
    finally:
        server.end()


def _wanted(config: RunConfig, gpus: Sequence[int]) -> Serving:
    there = len(detect().gpus)
    if unknown := [index for index in gpus if index >= there]:
        raise ConfigError(f"there is no GPU {unknown[0]}: this machine has {there}", where="--gpus")
    source = _source(config)
    at = config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": source})})
    return serving(config, source, model_config(config) or model_config(at), gpus)


def _source(config: RunConfig) -> str:
    """Where the weights are; only for a folder it is known without loading torch."""
    folder = Path(config.model.name_or_path or "").expanduser()
    if config.model.name_or_path and folder.is_dir():
        return str(folder)
    mend_torchvision()
    from grpo_autotune.train.models import model_source

    return model_source(config, say)


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


def _until_healthy(server: Guarded, wanted: Serving, log: Path) -> None:
    """Wait until the server answers.

    Raises:
        EnvironmentProblem: It ended before.
    """
    begun = time.monotonic()
    with Heartbeat(lambda: f"the server starts, {time.monotonic() - begun:.0f} s (its log: {log})", say):
        while not _answers(wanted):
            code = server.wait(LOOK_S)
            if code is not None:
                raise EnvironmentProblem(f"the server did not start ({_ending(code)})", where=str(log), fix=_last(log))
    say(f"the server answers at {wanted.address} after {time.monotonic() - begun:.0f} s")


def _answers(wanted: Serving) -> bool:
    try:
        with urllib.request.urlopen(f"{wanted.address}/health", timeout=ANSWER_S):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _say_how(wanted: Serving, gpus: Sequence[int]) -> None:
    say("train against it with these keys, from another terminal:")
    say(f"  grpo: {{use_vllm: true}}   vllm: {{mode: server, server_base_url: {wanted.address}}}")
    if gpus:
        others = [index for index in range(len(detect().gpus)) if index not in gpus]
        left = f"CUDA_VISIBLE_DEVICES={','.join(map(str, others))}" if others else "no GPU is left for the trainer"
        say(f"  and on the other GPUs: {left}")
    say("Ctrl-C ends it")


def _last(log: Path) -> str:
    """The error that the log ends with: the first-hand one, where a process tells of another's."""
    lines = log.read_text(errors="replace").splitlines()
    found = [(at, match) for at, line in enumerate(lines) if (match := RAISED.search(line))]
    own = [(at, match) for at, match in found if not match[2].startswith(SECOND_HAND)]
    if not own:
        return "Its log says why."
    at, match = own[-1]
    more = lines[at + 1 : at + 2] if match[2].startswith(OF_PYDANTIC) else []
    return f"{match[1].rpartition('.')[2]}: {' '.join([match[2], *more])}"[:MOST_SAID]


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


@contextmanager
def _signals() -> Iterator[None]:
    """Meanwhile the first Ctrl-C or SIGTERM raises `Stopped`; what comes after it changes nothing."""

    def stop(signum: int, frame: FrameType | None) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise Stopped(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
