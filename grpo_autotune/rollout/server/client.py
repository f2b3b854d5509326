"""Server mode: adapters sent as files, one line for a server that cannot be used, and no waiting for one that is gone.

TRL pushes every weight to a server over NCCL, which needs a GPU on the trainer's side. An adapter is all that LoRA
trains, and a server that was started for it loads one from a folder while it runs (`/v1/load_lora_adapter`). TRL's
client names a model in every request: from then on the adapter's. Each has a name of its own, since vLLM keys cached
prefixes by it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.rollout.colocate.unlock import engine_of
from grpo_autotune.rollout.options import EngineOptions
from grpo_autotune.rollout.sync import lora
from grpo_autotune.rollout.sync.sync import PART, Sync, Way
from grpo_autotune.rollout.sync.weights import is_4bit
from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, wrap

RESET_IMAGES = "/reset_encoder_cache"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ANSWER_S = 10.0
"""For what a server answers without computing."""

LOADING_S = 120.0
START = "Start the server with `grpo-autotune serve`"


def connected(generation: Any, client: Any, options: EngineOptions) -> list[Handle]:
    """Decide how weights reach the server, before TRL opens its own way there.

    Raises:
        ConfigError: As `ServerLink`.
        EnvironmentProblem: As `ServerLink`.
    """
    link = ServerLink(generation, client, options)
    engine = engine_of(generation)
    assert engine is not None
    engine.parts[PART] = link

    def opened(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        if link.way == "merged":
            call_next(*args, **kwargs)

    return [wrap(AttributeSlot(client, "init_communicator"), opened, INNER)]


def install(generation: Any, options: EngineOptions) -> list[Handle]:
    """Layers on a finished `VLLMGeneration` of server mode; none on a colocated one."""
    if generation.mode != "server":
        return []
    from accelerate.utils import broadcast_object_list

    link = link_of(generation)  # only the first rank has the client
    way = broadcast_object_list([link.way if link is not None else ""], from_process=0)[0]

    def synced(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        if way == "merged":
            _asked(link, call_next, *args, **kwargs)
            if link is not None:
                link.forget_images()  # TRL resets the prefix cache alone
            return
        tensors = lora.tensors(generation)  # on every rank: it may have to be gathered
        if link is not None:
            link.send(tensors)

    def generated(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return _asked(link, call_next, *args, **kwargs)

    return [
        wrap(AttributeSlot(generation, "sync_weights"), synced, INNER),
        wrap(AttributeSlot(generation, "generate"), generated, INNER),
    ]


def link_of(generation: Any) -> ServerLink | None:
    """The first rank's way to the server; null on other ranks, and without a server."""
    engine = engine_of(generation)
    found = None if engine is None else engine.parts.get(PART)
    return found if isinstance(found, ServerLink) else None


def _asked(link: ServerLink | None, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call what asks the server, once it is known to be there: TRL's client tries for a minute."""
    if link is None:
        return call_next(*args, **kwargs)
    link.alive()
    with told(link.client.base_url):
        return call_next(*args, **kwargs)


def why_no_adapter(model: Any) -> str | None:
    """What keeps a model's adapter from being sent as a file; null where it can be."""
    reason = lora.refusal(model)
    if reason is not None:
        return reason
    if any(is_4bit(parameter) for parameter in model.parameters()):
        return "the adapter belongs to a base in 4 bits, and the server holds another one"
    seeing = lora.tower_layers(model)
    return f"a server takes no adapter on the vision tower ({seeing[0]})" if seeing else None


def save_adapter(model: Any, tensors: Mapping[str, Any], folder: Path) -> int:
    """Write an adapter as PEFT would; its scales are in the tensors already. Answers its bytes."""
    from safetensors.torch import save_file

    rank = lora.largest_rank(model)
    config = model.peft_config[lora.active_adapter(model)].to_dict()
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config, default=_plain), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return sum(file.stat().st_size for file in folder.iterdir())


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _forget(address: str, folder: Path) -> None:
    """Take an adapter out of the server, and its file off the disk."""
    import requests

    requests.post(f"{address}{UNLOAD}", json={"lora_name": folder.name}, timeout=ANSWER_S)
    shutil.rmtree(folder, ignore_errors=True)


def _leave(address: str, folder: Path) -> None:
    import requests

    with contextlib.suppress(requests.RequestException):  # it may have ended before
        for adapter in folder.iterdir():
            _forget(address, adapter)
    shutil.rmtree(folder, ignore_errors=True)


def _message(answer: Any) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}"


class ServerLink:
    """The way to one server.

    Attributes:
        way: `adapter`: as a file; `merged`: TRL's push, over NCCL.
        why: Why so.
        syncs: Every adapter that was sent.
    """

    def __init__(self, generation: Any, client: Any, options: EngineOptions) -> None:
        self.client, self.options = client, options
        self.base = client.model
        self.syncs: list[Sync] = []
        self._model, self._device = generation.model, generation.accelerator.device
        self._folder: Path | None = None
        self._leave: Callable[[], object] = lambda: None
        self._run = uuid.uuid4().hex[:8]
        self.way = self._choose()
        self.why = "a server takes an adapter from a file" if self.way == "adapter" else "TRL's push over NCCL"

    def _choose(self) -> Way:
        """How weights are sent.

        Raises:
            ConfigError: The adapter cannot be sent as a file, or there is none.
            EnvironmentProblem: The trainer has no GPU, or the server takes no adapters.
        """
        asked, cuda = self.options.weight_sync, self._device.type == "cuda"
        if asked in ("merged", "batched") or (asked == "auto" and cuda):
            if cuda:
                return "merged"
            raise EnvironmentProblem(
                f"all weights go to a server over NCCL, which needs a GPU, and this trainer is on the {self._device}",
                where="vllm.weight_sync",
                fix="Set it to adapter with a peft section, or vllm.mode to colocate.",
            )
        reason = why_no_adapter(self._model)
        if reason is not None:
            raise ConfigError(
                f"{reason}, so that there is none to send"
                + ("" if cuda else ", and pushing all weights to a server needs a GPU"),
                where="vllm.weight_sync",
                fix="Set it to merged on a GPU, or vllm.mode to colocate.",
            )
        if not self._takes_adapters():
            raise EnvironmentProblem(
                f"the vLLM server at {self.client.base_url} loads no adapters while it runs",
                where="vllm.weight_sync",
                fix=f"{START}, or with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.",
            )
        return "adapter"

    def _takes_adapters(self) -> bool:
        import requests

        with told(self.client.base_url):
            found = requests.post(f"{self.client.base_url}{UNLOAD}", json={"lora_name": ""}, timeout=ANSWER_S)
        return bool(found.status_code == requests.codes.bad_request)  # it knows the route, and misses a name

    def send(self, tensors: Mapping[str, Any]) -> None:
        """Give the server the adapter as it is now, and generate with that one from here on.

        Raises:
            EnvironmentProblem: The server is gone, or does not take it.
        """
        import requests

        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="grpo-autotune-adapters-"))
            self._leave = weakref.finalize(self.client, _leave, self.client.base_url, self._folder)
        begun, before = time.monotonic(), self.client.model
        name = f"grpo-{self._run}-{len(self.syncs)}"
        folder = self._folder / name
        size = save_adapter(self._model, tensors, folder)
        with told(self.client.base_url):
            order = {"lora_name": name, "lora_path": str(folder)}
            answer = requests.post(f"{self.client.base_url}{LOAD}", json=order, timeout=LOADING_S)
            if answer.status_code != requests.codes.ok:
                raise EnvironmentProblem(
                    f"the vLLM server at {self.client.base_url} did not load the adapter: {_message(answer)}",
                    where="vllm.weight_sync",
                    fix=f"{START}: it must see {self._folder}, and have room for the adapter's rank.",
                )
            self.client.model = name
            if before != self.base:
                _forget(self.client.base_url, folder.with_name(before))
        self.syncs.append(Sync("adapter", time.monotonic() - begun, size, len(tensors), False, ()))

    def forget_images(self) -> None:
        """Let the server compute images anew: the weights that it computed them with may have been trained."""
        import requests

        with told(self.client.base_url):
            requests.post(f"{self.client.base_url}{RESET_IMAGES}", timeout=ANSWER_S).raise_for_status()

    def on_generation(self) -> list[Handle]:
        """As `sync.WeightSync`, whose place this takes; every rank's layers come from `install`."""
        return []

    def alive(self) -> None:
        """Ask whether the server is there.

        Raises:
            EnvironmentProblem: It is not.
        """
        import requests

        with told(self.client.base_url):
            requests.get(f"{self.client.base_url}/health", timeout=ANSWER_S).raise_for_status()

    def close(self) -> None:
        """Let the server forget the adapter, and delete what was written; at the latest when this process ends."""
        self._leave()


class told:  # noqa: N801 - reads as a function in `with`
    """Turns what goes wrong on the way to a server into one line.

    Raises:
        EnvironmentProblem: For anything of `requests`.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        import requests

        if isinstance(error, requests.RequestException):
            raise EnvironmentProblem(
                f"the vLLM server at {self.address} does not answer any more ({type(error).__name__})",
                where="vllm.mode server",
                fix="Look into its log, and go on with --resume once it is started again (a run's own starts with it).",
            ) from error
