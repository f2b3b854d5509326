"""Checks of what a run takes of its machine, and of what it reaches over a network."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from grpo_autotune.doctor.checks import check_shared_memory
from grpo_autotune.doctor.finding import Findings, fail, ok, warn
from grpo_autotune.doctor.run import Run
from grpo_autotune.errors import ConfigError
from grpo_autotune.estimate.adapters import adapter_sizes
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.hardware.nvml import ask, driver, visible_handles
from grpo_autotune.knobs import engine
from grpo_autotune.probe.sampler import load_between, others_s
from grpo_autotune.rollout.server.command import listens_at
from grpo_autotune.units import seconds, size

TRIED_BYTES = 2**25
LOOK_S, ANSWER_S = 0.25, 5.0
"""Shortest look at others' work, and longest wait for an answer."""
SLOW_S, LONG_SAVE_S, FILE_SKEW_S, HTTP_SKEW_S = 2.0, 60.0, 5.0, 60.0
"""Seconds of an answer, seconds of a checkpoint, and differences of clocks from which on they are told."""
SUBMITTED_FROM = ("SLURM_SUBMIT_DIR", "PBS_O_WORKDIR", "SGE_O_WORKDIR", "LS_SUBCWD")
"""Variables in which schedulers keep the folder that a job was submitted from."""

TRACKERS = {
    "wandb": (("WANDB_API_KEY", "WANDB_MODE"), "~/.netrc", "wandb login"),
    "comet_ml": (("COMET_API_KEY",), "~/.comet.config", "comet login"),
    "neptune": (("NEPTUNE_API_TOKEN",), "~/.neptune", "export NEPTUNE_API_TOKEN=..."),
    "swanlab": (("SWANLAB_API_KEY", "SWANLAB_MODE"), "~/.swanlab/.netrc", "swanlab login"),
    "clearml": (("CLEARML_API_ACCESS_KEY",), "~/clearml.conf", "clearml-init"),
}
"""Value of `grpo.report_to` -> variables and file of which one must be there, and the command that makes it."""


def room(run: Run) -> Findings:
    """Weights, gradients, optimizer and engine, by formula, leave room in memory for activations."""
    gpus, config, (parameters, trained) = run.machine.gpus, run.config, _parameters(run)
    whole = gpus[0].memory_bytes if gpus else run.machine.memory_bytes // run.ranks
    stored = str(
        run.model.get("dtype") or run.model.get("torch_dtype") if config.model.dtype == "auto" else config.model.dtype
    )
    weight = 0.5 if config.model.load_in_4bit else 2.0 if stored.endswith("float16") else 4.0
    awake = gpus and config.use_vllm and not config.vllm.at_server and not engine.sleep_level(config)
    stays = parameters * weight + trained * 12.0 + (engine.share_of(config) * whole if awake else 0.0)
    told = f"{size(stays)} of {size(whole)} are taken before any activation"
    if stays > 0.9 * whole:
        yield warn(told, "choose a smaller model, peft, model.load_in_4bit, a smaller engine, or more memory")
    if parameters:
        yield ok(told)


def disk(run: Run) -> Findings:
    """The run's folder can be written, and has room for the checkpoints that will be kept."""
    folder, steps = run.disk, run.value("max_steps") or 0
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError("this cannot be written", where=str(folder), fix="Choose another folder with output.dir.")
    free, one = shutil.disk_usage(folder).free, _checkpoint_bytes(run)
    kept = run.value("save_total_limit") or max(1, steps // max(1, int(run.value("save_steps"))))
    if run.value("save_strategy") != "no" and (kept + 1) * one > free:
        detail = f"{size(free)} free in {folder}, for {kept + 1} checkpoints of {size(one)} at a time"
        yield warn(detail, "make room, set grpo.save_total_limit or save_only_model, or choose another output.dir")
    yield ok(f"{size(free)} free in {folder}")


def disk_speed(run: Run) -> Findings:
    """The disk of the run's folder takes a checkpoint within a minute, and gives a step's images within a second."""
    written, read = disk_rates(run.disk)
    one, told = _checkpoint_bytes(run), f"{run.disk}: {written / 1e6:.0f} MB/s written, {read / 1e6:.0f} MB/s read"
    if one > LONG_SAVE_S * written:
        detail = f"{told}: a checkpoint of {size(one)} takes {seconds(one / written)}"
        yield warn(detail, "choose another output.dir, or raise grpo.save_steps")
    yield ok(told)


def disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes per second that reach the disk of a folder, and that come back from it."""
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        begun = time.perf_counter()
        file.write(os.urandom(TRIED_BYTES))
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the kernel's copy would be read
        Path(file.name).read_bytes()
        return TRIED_BYTES / (written - begun), TRIED_BYTES / (time.perf_counter() - written)


def clock(run: Run) -> Findings:
    """This machine's clock agrees with the one by which the file system of the run's folder dates files."""
    with tempfile.NamedTemporaryFile(dir=run.disk) as file:
        skew = Path(file.name).stat().st_mtime - time.time()
    if abs(skew) > FILE_SKEW_S:
        detail = f"files in {run.disk} are dated {skew:+.0f} s from now: `watch` takes a run for dead or alive by that"
        yield warn(detail, "set both clocks by NTP")


def loader(run: Run) -> Findings:
    """Loader workers have cores, and a /dev/shm to pass batches through."""
    workers, cores = int(run.value("dataloader_num_workers") or 0), max(1, run.machine.cores // run.ranks)
    if workers > cores:
        yield warn(f"{workers} workers of each rank on {cores} cores", f"set grpo.dataloader_num_workers to {cores}")
    if workers or run.ranks > 1:
        yield check_shared_memory()


def launcher(run: Run) -> Findings:
    """Relative paths start from the folder that the job was submitted from."""
    told = SUBMITTED_FROM + (("PWD",) if "TORCHELASTIC_RUN_ID" in os.environ else ())
    moved = [name for name in told if Path(os.environ.get(name, ".")).resolve() != Path.cwd()]
    places = (run.config.data.path, str(run.config.model.name_or_path), str(run.config.run_dir))
    relative = [path for path in places if not Path(path).is_absolute() and (Path(path).exists() or path == places[2])]
    if moved and relative:
        detail = f"{', '.join(relative)} start from {Path.cwd()}, and {moved[0]} is {os.environ[moved[0]]}"
        yield warn(detail, "write absolute paths, or change to that folder first")


def ports(run: Run) -> Findings:
    """Nobody listens yet at MASTER_PORT, nor at the port that sends weights to a vLLM server."""
    wanted = {}
    if run.config.batch.processes > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        wanted["MASTER_PORT"] = int(os.environ.get("MASTER_PORT", "29500"))
    if run.config.use_vllm and run.config.vllm.at_server and run.machine.gpus:
        wanted["vllm.group_port"] = run.config.vllm.group_port or run.value("vllm_group_port")
    for name, port in wanted.items():
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                yield fail(f"somebody listens at {name} {port}", f"end that process, or set {name} to another")


def busy(run: Run) -> Findings:
    """Other processes leave the cores and the GPUs to this run."""
    time.sleep(max(0.0, run.begun[0] + LOOK_S - time.monotonic()))
    with driver() as nvml:
        rates = [ask(nvml, "nvmlDeviceGetUtilizationRates", handle) for handle in visible_handles(nvml)]
    gpu = max((float(rate.gpu) for rate in rates if rate is not None), default=None)
    load = load_between(run.begun, others_s(run.ranks), gpu, on_gpu=bool(run.machine.gpus))
    if load is not None and load.matters:
        detail = f"{load.words}: figures measured beside other work are worth little, and training is slower"
        yield warn(detail, "end it (top and nvidia-smi name it), or wait for its end")
    elif load is not None:
        yield ok(load.words)


def asked(run: Run) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Endpoints of rewards by key path: the `providers` of a `judge`, the `params` of a `service`."""
    for place, item in enumerate(run.config.rewards):
        where, several = f"rewards[{place}].params", item.params.get("providers", ())
        yield from ((f"{where}.providers[{i}]", one) for i, one in enumerate(several if item.name == "judge" else ()))
        yield from [(where, item.params)] if item.name == "service" else ()


def keys(run: Run) -> Findings:
    """The variables that hold the keys of judges and services are set; no key leaves this process."""
    for where, one in asked(run):
        name = str(one.get("api_key_env") or "")
        key = os.environ.get(name, "")
        if name and (not key or key != key.strip()):
            what = "has white space around it" if key else "is not set"
            yield fail(f"{name} ({where}.api_key_env) {what}", f"export {name}=... before the start")


def endpoints(run: Run) -> Findings:
    """Judges, services and the vLLM server answer, and soon; their clocks (HTTP Date) agree with this machine's."""
    import httpx2

    urls = {where: str(one.get("base_url") or one.get("url") or "") for where, one in asked(run)}
    if run.config.use_vllm and run.config.vllm.mode == "server" and run.config.vllm.server_gpus is None:
        urls["vllm"] = "http://{}:{}/health".format(*listens_at(run.config))
    for where, url in urls.items():
        begun = time.perf_counter()
        try:
            answer = httpx2.get(url, timeout=ANSWER_S)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            fix = "start it (grpo-autotune serve CONFIG)" if where == "vllm" else "start it, or correct the URL"
            yield fail(f"{where}: no answer from {url} ({error or type(error).__name__})", fix)
            continue
        took_s, date = time.perf_counter() - begun, answer.headers.get("date")
        skew = parsedate_to_datetime(date).timestamp() - time.time() if date else 0.0
        if answer.status_code >= 500 or took_s > SLOW_S or (where == "vllm" and answer.is_error):
            yield warn(f"{where}: {url} answers {answer.status_code} in {seconds(took_s)}", "look at its log and load")
        if abs(skew) > HTTP_SKEW_S:
            yield warn(f"{where}: its clock is {skew:+.0f} s from this machine's", "set the clock by NTP")
        yield ok(f"{url} answers in {seconds(took_s)}")


def trackers(run: Run) -> Findings:
    """Trackers and the hub have an account where the run is sent to them."""
    to = run.value("report_to")
    for name in [to] if isinstance(to, str) else to or ():
        variables, file, command = TRACKERS.get(name, ((), "", ""))
        if variables and not any(map(os.environ.get, variables)) and not Path(file).expanduser().is_file():
            yield fail(f"{name} has no account here ({variables[0]} is not set)", f"{command}, or grpo.report_to: none")
    if run.value("push_to_hub"):
        from huggingface_hub import get_token

        if get_token() is None:
            yield fail("grpo.push_to_hub is true, and there is no token", "hf auth login, or export HF_TOKEN=...")


def _parameters(run: Run) -> tuple[int, int]:
    """Those of the model, and those that are trained, by formula; 0 where no formula describes it."""
    frozen, peft = run.config.model.freeze_vision_tower, run.config.peft
    try:
        shape = ModelShape.from_config(run.model)
    except ConfigError:
        return 0, 0
    if peft is None:
        return shape.parameters, shape.text_parameters if frozen else shape.parameters
    adapters = adapter_sizes(shape, peft)
    return shape.parameters, adapters.text + (0 if frozen else adapters.blocks + adapters.mergers)


def _checkpoint_bytes(run: Run) -> float:
    """What is trained, in 4 bytes, and Adam's two moments of it."""
    return _parameters(run)[1] * (4.0 if run.value("save_only_model") else 12.0)
