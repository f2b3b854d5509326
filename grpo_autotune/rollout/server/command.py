"""The `vllm serve` that a configuration asks for: its words and its environment, as TRL's client needs the server.

Nothing is started here, and nothing heavy imported. The keys of the `vllm` section become the options of the same name;
what TRL's server mode cannot do without (trl/generation/vllm_client.py, TRL 1.16) is added.
"""

import importlib.metadata
import importlib.util
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from grpo_autotune.config.schema import RunConfig, packed_at_server
from grpo_autotune.config.sections.vllm import OURS, VLLM_TO_TRL
from grpo_autotune.config.vllm_names import NAMES
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware.nvml import ORDER, PCI, VISIBLE, names_of_gpus

HOST, PORT = "127.0.0.1", 8000
"""Of a server whose address the configuration leaves open: TRL looks for it on this machine, at vLLM's own port."""

CLIENT_KEYS = OURS | (VLLM_TO_TRL.keys() - NAMES) | {"enable_sleep_mode"}
"""Keys of the `vllm` section that speak of the training process, or of the way to the server."""

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM keeps room for (`MaxLoRARanks` in vllm/config/lora.py)."""

TRL_BATCHED_TOKENS = 4096
"""`max_num_batched_tokens` where nothing is said (trl/generation/vllm_generation.py)."""

SERVER_MODULE = "vllm.entrypoints.openai.api_server"
"""The server without the command `vllm`."""

ADAPTERS_KEPT = 2
"""The one that generates, and the next while it is loaded."""


class Serving(NamedTuple):
    """The command that starts a server."""

    model: str  # what it serves: a folder or the name of a hub repository
    options: tuple[str, ...]  # options of `vllm serve`, in words
    environment: dict[str, str]  # variables beside those that are there
    host: str  # where it listens
    port: int  # the port there
    notes: tuple[str, ...]  # what was derived rather than written, a sentence each

    @property
    def address(self) -> str:
        """URL for a client on this machine, or on any that reaches the host by that name."""
        return f"http://{HOST if self.host == '0.0.0.0' else self.host}:{self.port}"

    def line(self) -> str:
        """The command as a person would type it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        program = ["vllm", "serve"] if has_command() else ["python", "-m", SERVER_MODULE, "--model"]
        return " ".join([*variables, shlex.join([*program, self.model, *self.options])])

    def words(self, python: Sequence[str]) -> list[str]:
        """The command for this interpreter."""
        program = ["vllm.entrypoints.cli.main", "serve"] if has_command() else [SERVER_MODULE, "--model"]
        return [*python, "-m", *program, self.model, *self.options]


def split_gpus(config: RunConfig, there: int) -> tuple[list[str], list[str]]:
    """The GPUs that serve and those that train, as `CUDA_VISIBLE_DEVICES` names them, where the run starts its own
    server: the last `vllm.server_gpus` of the GPUs `there`, which this process sees, serve. ConfigError where too few
    are left to train on, or none was asked for although there are some."""
    wanted, seen = config.vllm.server_gpus or 0, names_of_gpus(there)
    if wanted == 0 and there == 0:
        return [], []
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", config.batch.processes))
    if processes != config.batch.processes:
        what = "a run on several machines cannot start a server of its own"
        fix = "Start one with `grpo-autotune serve` and give vllm.server_base_url."
        raise ConfigError(what, where="vllm.server_gpus", fix=fix)
    left = len(seen) - wanted
    if wanted == 0 or left < processes:
        raise ConfigError(
            f"{wanted} of the {len(seen)} GPUs here would serve, and {processes} must be left to train on",
            where="vllm.server_gpus",
            fix=_nearest(len(seen), processes),
        )
    return seen[left:], seen[:left]


def _nearest(there: int, training: int) -> str:
    most = there - training
    if there == 0:
        return "Set it to 0."
    if most < 1:
        return "Set it to null (the engine in the training process), or start fewer training processes."
    return f"Set it to {1 if most == 1 else f'1 to {most}'}, or start fewer training processes."


def serving(config: RunConfig, source: str, model: Mapping[str, Any], gpus: Sequence[str] = ()) -> Serving:
    """The command by which a configuration's model is served so that it can be trained against.

    Its weights are at `source`, and `model` is its config.json, empty where nobody has it yet. The server has `gpus`,
    as `CUDA_VISIBLE_DEVICES` names them, or all that are visible. ConfigError where `vllm.server_base_url` is no
    address to listen at, the adapter's rank has no room in vLLM, or the base is in 4 bits."""
    if config.model.load_in_4bit:
        raise packed_at_server()
    keys = {name: value for name, value in given_keys(config).items() if name not in CLIENT_KEYS}
    notes: list[str] = []
    environment = {"VLLM_SERVER_DEV_MODE": "1", **gpu_keys(gpus, keys, notes)}
    if config.model.revision is not None:
        keys.setdefault("revision", config.model.revision)
    if config.model.trust_remote_code:
        keys.setdefault("trust_remote_code", True)
    if "dtype" not in keys and (dtype := trained_dtype(config, model)) is not None:
        keys["dtype"] = dtype
        notes.append(f"the server computes in {dtype}, as the trainer does")
    keys.setdefault("logprobs_mode", "processed_logprobs")  # temperature and cut-offs included, as TRL reckons
    keys.setdefault("max_logprobs", -1)
    if "vision_config" in model:
        keys.setdefault("enable_scale_out", True)  # the route by which images reach it
    if config.vllm.server_gpus is not None:  # as an engine in the training process would have it
        keys.setdefault("max_num_seqs", config.batch.generation_batch)
        keys.setdefault("max_num_batched_tokens", max(TRL_BATCHED_TOKENS, keys["max_num_seqs"]))
    keys |= _sync_keys(config, notes, environment)
    host, port = listens_at(config)
    words = (*option("host", host), *option("port", port))
    options = [word for name, value in keys.items() for word in option(name, value)]
    return Serving(source, (*words, *options), environment, host, port, tuple(notes))


def gpu_keys(gpus: Sequence[str], keys: dict[str, Any], notes: list[str]) -> dict[str, str]:
    """The variables that give a server these `gpus`, as `CUDA_VISIBLE_DEVICES` names them, none for all; several share
    the model where its `keys` say nothing else."""
    if len(gpus) > 1 and "tensor_parallel_size" not in keys:
        keys["tensor_parallel_size"] = len(gpus)
        notes.append(f"the server's {len(gpus)} GPUs share the model (vllm.tensor_parallel_size {len(gpus)})")
    return {VISIBLE: ",".join(gpus), ORDER: os.environ.get(ORDER, PCI)} if gpus else {}


def has_command() -> bool:
    """True if the command `vllm` works: it asks for the package's version under the name `vllm`, which the CPU build on
    the package index has under another. Without vLLM it is what a machine with it would have."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return importlib.util.find_spec("vllm") is None
    return True


def given_keys(config: RunConfig) -> dict[str, Any]:
    """The keys of the `vllm` section, as they were written."""
    return config.vllm.model_dump(exclude_none=True)


def trained_dtype(config: RunConfig, model: Mapping[str, Any]) -> str | None:
    """The type that the trainer computes in: vLLM alone would make float32 checkpoints bfloat16. None if unknown."""
    text = model.get("text_config")
    in_text = text.get("dtype") if isinstance(text, Mapping) else None
    stored = model.get("dtype") or model.get("torch_dtype") or in_text
    dtype = config.model.dtype if config.model.dtype != "auto" else stored
    return str(dtype) if dtype else None


def listens_at(config: RunConfig) -> tuple[str, int]:
    """Host and port of the server that a configuration names; ConfigError for a URL with a path, or not of http."""
    url = config.vllm.server_base_url
    if url is None:
        return config.vllm.server_host or HOST, config.vllm.server_port or PORT
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "http" or not parts.hostname or port is None or parts.path.strip("/"):
        fix = "Give http://HOST:PORT."
        raise ConfigError(f"{url} is no address that a server can listen at", where="vllm.server_base_url", fix=fix)
    return parts.hostname, port


def adapter_room(config: RunConfig) -> int | None:
    """Rank that the server keeps room for, None where no adapters are sent; ConfigError for one above all of vLLM's."""
    if config.lora is None or given_keys(config).get("weight_sync", "auto") not in SENDS:
        return None
    return room_for(config.lora, where="peft.r", fix="Set it lower, or set vllm.weight_sync to merged.")


def room_for(adapter: Mapping[str, Any], *, where: str, fix: str) -> int:
    """The smallest rank of vLLM's that holds an adapter with these `LoraConfig` keys; ConfigError where none does."""
    rank = max([adapter.get("r") or 8, *(adapter.get("rank_pattern") or {}).values()])
    room = next((size for size in ADAPTER_RANKS if size >= rank), None)
    if room is None:
        what = f"vLLM takes adapters up to rank {ADAPTER_RANKS[-1]}, and this one has {rank}"
        raise ConfigError(what, where=where, fix=fix)
    return room


SENDS = ("auto", "adapter")
"""Values of `vllm.weight_sync` with which an adapter may be sent."""


def option(name: str, value: Any) -> tuple[str, ...]:
    """An engine key as words of the command line."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return (flag,) if value else (f"--no-{flag[2:]}",)
    if isinstance(value, list | tuple):
        return (flag, *map(str, value))
    return (flag, json.dumps(value) if isinstance(value, Mapping) else str(value))


def _sync_keys(config: RunConfig, notes: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Keys that the server needs so that weights can reach it."""
    keys: dict[str, Any] = {}
    room = adapter_room(config)
    if room is not None:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        keys |= {"enable_lora": True, "max_lora_rank": room, "max_loras": 1, "max_cpu_loras": ADAPTERS_KEPT}
        notes.append("adapters can be sent to it as files (vllm.weight_sync adapter); the trainer must see its disk")
    if given_keys(config).get("weight_sync") != "adapter":
        keys["weight_transfer_config"] = {"backend": "nccl"}
        if room is None:
            notes.append("weights are sent to it over NCCL: the trainer needs a GPU of its own")
    return keys
