"""Checks of what a run takes of its machine, and of what it reaches over a network."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import psutil

from grpo_autotune.console import is_first_rank
from grpo_autotune.doctor.checks import check_shared_memory
from grpo_autotune.doctor.finding import Findings, fail, ok, warn
from grpo_autotune.doctor.run import Run
from grpo_autotune.errors import AutotuneError, ConfigError
from grpo_autotune.estimate.adapters import adapter_sizes
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.hardware.nvml import ask, driver, visible_handles
from grpo_autotune.hardware.places import THREADS
from grpo_autotune.knobs import engine
from grpo_autotune.probe.sampler import load_between, others_s
from grpo_autotune.rollout.server.command import listens_at
from grpo_autotune.seams.stored_images import image_column, image_columns
from grpo_autotune.units import plural, seconds, size

TRIED_BYTES = 2**25
LOOK_S, LONGER_LOOK_S, ANSWER_S, SLOW_S, LONG_SAVE_S, LONG_READ_S, SKEW_S = 0.25, 1.0, 5.0, 2.0, 60.0, 1.0, 5.0
"""Look at others' work, longest wait for an answer; of answers, checkpoints, images and clocks, what is told."""
SUBMITTED_FROM = ("SLURM_SUBMIT_DIR", "PBS_O_WORKDIR", "SGE_O_WORKDIR", "LS_SUBCWD")
"""Variables in which schedulers keep the folder that a job was submitted from."""

TRACKERS = {
    "wandb": ("WANDB_API_KEY", "~/.netrc", "wandb login, or export WANDB_MODE=offline"),
    "neptune": ("NEPTUNE_API_TOKEN", "", "export NEPTUNE_API_TOKEN=..."),
    "push_to_hub": ("HF_TOKEN", "~/.cache/huggingface/token", "hf auth login"),
}
"""Value of `grpo.report_to` -> the variable or file with the account, and the command that makes it."""


def room(run: Run) -> Findings:
    """Weights, gradients, optimizer and engine, by formula, leave room in memory for activations."""
    gpus, config, stays = run.machine.gpus, run.config, _needs(run)[0]
    whole = gpus[0].memory_bytes if gpus else run.machine.memory_bytes // run.ranks
    if gpus and config.use_vllm and not config.vllm.at_server and not engine.sleep_level(config):
        stays += engine.share_of(config) * whole
    told = f"at least {size(stays)} of {size(whole)} before any activation"
    if stays > 0.9 * whole:
        yield warn(told, "choose a smaller model, peft, model.load_in_4bit, a smaller engine, or more memory")
    yield from [ok(told)] if stays else ()


def disk(run: Run) -> Findings:
    """The run's folder can be written, has room for the checkpoints that will be kept, and this machine's clock."""
    folder, steps, every = run.disk, run.value("max_steps") or 0, run.value("save_steps")
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            skew = Path(file.name).stat().st_mtime - time.time()
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=str(folder), fix="Set output.dir.") from error
    free, one, kept = shutil.disk_usage(folder).free, _needs(run)[1], run.value("save_total_limit")
    count = 1 + (kept or max(1, steps // max(1, int(every if every >= 1 else every * steps))))
    if run.value("save_strategy") != "no" and count * one > free:
        detail = f"{size(free)} free in {folder}, for {count} checkpoints of {size(one)} at a time"
        yield warn(detail, "make room, set grpo.save_total_limit or save_only_model, or choose another output.dir")
    if abs(skew) > SKEW_S:
        yield warn(f"files in {folder} are dated {skew:+.0f} s from now, by which `watch` judges", "set clocks by NTP")
    yield ok(f"{size(free)} free in {folder}")


def disk_speed(run: Run) -> Findings:
    """The disk of the run's folder takes a checkpoint within a minute, and gives a step's images within a second."""
    with suppress(OSError, AutotuneError), tempfile.TemporaryFile(dir=run.disk, buffering=0) as file:  # told elsewhere
        begun = time.perf_counter()
        file.write(os.urandom(TRIED_BYTES))
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else the kernel's copy would be read
        os.pread(file.fileno(), TRIED_BYTES, 0)
        read, rate = TRIED_BYTES / (time.perf_counter() - written), TRIED_BYTES / (written - begun)
        one, images, told = _needs(run)[1], _images_bytes(run), f"{read / 1e6:.0f} MB/s read, {rate / 1e6:.0f} written"
        if one > LONG_SAVE_S * rate or images > LONG_READ_S * read:
            told += f": {size(one)} per checkpoint, and {size(images)} of images per step"
            yield warn(f"{run.disk}: {told}", "put output.dir and data on a local disk")
        yield ok(f"{run.disk}: {told}")


def loader(run: Run) -> Findings:
    """Loader workers have cores, and a /dev/shm to pass batches through."""
    workers, cores = int(run.value("dataloader_num_workers") or 0), max(1, run.machine.cores // run.ranks)
    if workers > cores:
        yield warn(
            f"{workers} workers of each rank on {plural(cores, 'core')}", f"set grpo.dataloader_num_workers to {cores}"
        )
    yield from [check_shared_memory()] if workers or run.ranks > 1 else ()


def launcher(run: Run) -> Findings:
    """Relative paths start where the job was submitted, and nobody listens at the ports that it will listen at."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    moved = [n for n in (*SUBMITTED_FROM, *["PWD"] * launched) if Path(os.environ.get(n, ".")).resolve() != Path.cwd()]
    places = (run.config.data.path, str(run.config.model.name_or_path), str(run.config.run_dir))
    relative = [path for path in places if not Path(path).is_absolute() and (Path(path).exists() or path == places[2])]
    if moved and relative:
        detail = f"{', '.join(relative)} start from {Path.cwd()}, and {moved[0]} is {os.environ[moved[0]]}"
        yield warn(detail, "write absolute paths, or change to that folder first")
    ports: dict[str, Any] = {}
    if run.ranks > 1 and not launched:
        ports["MASTER_PORT"] = os.environ.get("MASTER_PORT", "29500")
    if run.config.use_vllm and run.config.vllm.at_server and run.machine.gpus:
        ports["vllm.group_port"] = run.config.vllm.group_port or run.value("vllm_group_port")
    for name, port in ports.items() if is_first_rank() else ():  # which may listen at them by now
        with socket.socket() as trial:
            try:
                if trial.connect_ex(("127.0.0.1", int(port))) == 0:
                    yield fail(f"somebody listens at {name} {port}", f"end that process, or set {name} to another")
            except (ValueError, OverflowError):
                yield fail(f"{name} is {port!r}", "set it to a port from 1024 to 65535")


def busy(run: Run) -> Findings:
    """Other processes leave the cores and the GPUs to this run; where a CPU computes, torch leaves them theirs."""
    begun = others_s(run.ranks)
    time.sleep(LOOK_S)
    with driver() as nvml:
        rates = [ask(nvml, "nvmlDeviceGetUtilizationRates", handle) for handle in visible_handles(nvml)]
    gpu = max((float(rate.gpu) for rate in rates if rate is not None), default=None)
    load = load_between(begun, others_s(run.ranks), gpu, on_gpu=bool(run.machine.gpus))
    if load is not None and load.matters:
        remedy = "end it (top and nvidia-smi name it), or wait for its end"
        if not run.machine.gpus and run.ranks == 1 and THREADS not in os.environ:
            time.sleep(LONGER_LOOK_S)  # not for one that is just ending
            stays = load_between(begun, others_s(run.ranks), None, on_gpu=False)
            free = max(1, round(load.of - stays.cores)) if stays is not None else load.of
            if free < min(load.of, psutil.cpu_count(logical=False) or load.of):  # of which torch would take no more
                run.threads = free
                remedy += f"; this run gets {plural(free, 'thread')} to its end ({THREADS} sets another number)"
        yield warn(load.warning, remedy)
    yield from [ok(load.words)] if load is not None else ()


def asked(run: Run) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Endpoints of rewards by key path: the `providers` of a `judge`, the `params` of a `service`."""
    for place, item in enumerate(run.config.rewards):
        where, several = f"rewards[{place}].params", item.params.get("providers", ())
        yield from ((f"{where}.providers[{i}]", one) for i, one in enumerate(several if item.name == "judge" else ()))
        yield from [(where, item.params)] if item.name == "service" else ()


def accounts(run: Run) -> Findings:
    """Keys of services are set (those of judges: `configuration`), and trackers and the hub have an account."""
    names = [(str(name), where) for where, one in asked(run) for name in (one.get("headers_env") or {}).values()]
    for name, where in names:
        if not os.environ.get(name, "").strip():
            yield fail(f"{name} ({where}.headers_env) is not set", f"export {name}=... before the start")
    to = run.value("report_to") or ()
    for sent in [*([to] if isinstance(to, str) else to), "push_to_hub" if run.value("push_to_hub") else ""]:
        name, file, command = TRACKERS.get(sent, ("", "", ""))
        away = os.environ.get("WANDB_MODE") in ("offline", "disabled") and sent == "wandb"
        if name and not (os.environ.get(name) or Path(file).expanduser().is_file() or away):
            yield fail(f"{sent} has no account here ({name} is not set)", f"{command}, or do not send the run there")


def endpoints(run: Run) -> Findings:
    """Judges, services and the vLLM server answer, and soon, and by the same clock; no key is sent."""
    import httpx2

    urls = {where: str(one.get("base_url") or one.get("url") or "") for where, one in asked(run)}
    if run.config.use_vllm and run.config.vllm.mode == "server" and run.config.vllm.server_gpus is None:
        urls["vllm"] = "http://{}:{}/health".format(*listens_at(run.config))
    for where, url in ((where, url) for where, url in urls.items() if url.startswith("http")):  # else: `configuration`
        begun, fix = time.perf_counter(), "grpo-autotune serve CONFIG" if where == "vllm" else "start it, or correct it"
        bare = url.partition("?")[0].rpartition("@")[2]  # without what may be a key
        try:
            answer = httpx2.get(url, timeout=ANSWER_S)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            yield fail(f"{where}: no answer from {bare} ({error or type(error).__name__})", fix)
            continue
        took_s = time.perf_counter() - begun
        if answer.status_code >= 500 or took_s > SLOW_S or (where == "vllm" and answer.is_error):
            yield warn(f"{where}: {bare} answers {answer.status_code} in {seconds(took_s)}", "look at its log and load")
        with suppress(ValueError, KeyError):  # whose clock it is a second more or less
            skew = parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()
            if abs(skew) > SKEW_S + took_s:
                yield warn(f"the clock of {bare} is {skew:+.0f} s from this machine's", "set clocks by NTP")
        yield ok(f"{bare} answers in {seconds(took_s)}")


def _images_bytes(run: Run) -> float:
    """Of a step's prompts, as the first rows of the data have them."""
    columns, plan = image_columns(run.rows.column_names) if run.rows else [], run.config.batch
    rows = next(image_column(run.rows, columns[0]).batches())[1] if columns else [[]]
    images = [one for row in rows for one in row if one]
    bytes_ = sum(len(one["bytes"]) if one["bytes"] else Path(one["path"]).stat().st_size for one in images)
    return bytes_ / len(rows) * plan.completions_per_step / plan.num_generations


def _needs(run: Run) -> tuple[float, float]:
    """Bytes of weights, gradients and optimizer, and of a checkpoint, by formula; 0 where none describes the model."""
    try:
        shape = ModelShape.from_config(run.model)
    except ConfigError:
        return 0.0, 0.0
    adapters, section = adapter_sizes(shape, run.config.lora or {}), run.config.model
    trained = shape.parameters if run.config.lora is None else adapters.text + adapters.blocks + adapters.mergers
    weight = 0.5 if section.load_in_4bit else 4.0 if section.dtype == "float32" else 2.0
    moments = 0.0 if run.value("save_only_model") else 8.0  # of Adam, and what is trained in 4 bytes, as its gradient
    return shape.parameters * weight + trained * 12.0, trained * (4.0 + moments)
