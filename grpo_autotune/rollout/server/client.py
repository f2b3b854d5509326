"""Server mode: adapters sent as files, one line for a server that cannot be used, and no waiting for one that is gone.

TRL pushes every weight to a server over NCCL, which needs a GPU on the trainer's side. An adapter is all that LoRA
trains, and a server that was started for it loads one from a folder while it runs (`/v1/load_lora_adapter`). TRL's
client names a model in every request: from then on the adapter's. Each has a name of its own, since vLLM keys cached
prefixes by it.
"""

import contextlib
import json
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2

from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.rollout.options import EngineOptions
from grpo_autotune.rollout.server.http import http_client
from grpo_autotune.rollout.sync import lora
from grpo_autotune.rollout.sync.sync import WHERE, Sync, Way, WeightSync, check_quantized
from grpo_autotune.rollout.sync.weights import packed
from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, Next, wrap

RESET_IMAGES = "/reset_encoder_cache"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ANSWER_S = 10.0
"""Seconds for what a server answers without computing."""

LOADING_S = 120.0
START = "Start the server with `grpo-autotune serve`"


class ServerSync(WeightSync):
    """The weight syncs of a server: `adapter`, as a file, or `merged`, TRL's push over NCCL."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.client: Any = None  # TRL's, on the first rank alone; the others take no part but in gathering
        self.base = ""  # name of the model that the server was started with
        self._model: Any = None
        self._folder: Path | None = None
        self._leave: Callable[[], object] = lambda: None
        self._run = uuid.uuid4().hex[:8]

    def connected(self, generation: Any, client: Any) -> list[Handle]:
        """Decide on the way to the server, before TRL opens its own. ConfigError where the adapter cannot be sent as a
        file, there is none, or weights of the model or the server are packed; EnvironmentProblem where the trainer has
        no GPU, or the server takes no adapters."""
        self.client, self.base, self._model = client, client.model, generation.model
        self.way = self._choose(generation.accelerator.device)
        check_quantized(self.options.keys.get("quantization"), self.way, 0)
        self.why = "a server takes an adapter from a file" if self.way == "adapter" else "TRL's push over NCCL"

        def opened(call_next: Next, /, *args: Any, **kwargs: Any) -> None:
            if self.way == "merged":
                call_next(*args, **kwargs)

        return [wrap(AttributeSlot(client, "init_communicator"), opened, INNER)]

    def install(self, generation: Any) -> list[Handle]:
        from accelerate.utils import broadcast_object_list

        way = broadcast_object_list([self.way], from_process=0)[0]  # only the first rank has decided

        def synced(call_next: Next, /, *args: Any, **kwargs: Any) -> None:
            if way == "merged":
                self._asked(call_next, *args, **kwargs)
                if self.client is not None:  # TRL resets the prefix cache alone, and images may be of older weights
                    with one_line(self.client.base_url):
                        self._post(RESET_IMAGES).raise_for_status()
                return
            tensors = lora.tensors(generation)  # on every rank: it may have to be gathered
            if self.client is not None:
                self.send(tensors)

        return [
            wrap(AttributeSlot(generation, "sync_weights"), synced, INNER),
            wrap(AttributeSlot(generation, "generate"), self._asked, INNER),
        ]

    def _asked(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        """Call what asks the server, once it is known to answer: TRL's client tries for a minute."""
        if self.client is None:
            return call_next(*args, **kwargs)
        self.alive()
        with one_line(self.client.base_url):
            return call_next(*args, **kwargs)

    def _choose(self, device: Any) -> Way:
        asked, cuda = self.options.weight_sync, device.type == "cuda"
        if (kind := packed(self._model)) is not None:
            what = f"a server takes no weights that are packed in 4 or 8 bits ({kind}), and no adapter on them"
            fix = "Set it to colocate, or train on a base that is not quantized."
            raise ConfigError(what, where="vllm.mode", fix=fix)
        if asked in ("merged", "batched") or (asked == "auto" and cuda):
            if cuda:
                return "merged"
            what = f"all weights go to a server over NCCL, which needs a GPU, and this trainer is on the {device}"
            fix = "Set it to adapter with a peft section, or vllm.mode to colocate."
            raise EnvironmentProblem(what, where=WHERE, fix=fix)
        reason = no_adapter_because(self._model)
        if reason is not None:
            other = "Set it to merged," if cuda else "Train a plain LoRA adapter (sending all weights needs a GPU),"
            fix = f"{other} or set vllm.mode to colocate."
            raise ConfigError(f"no adapter can be sent to the vLLM server: {reason}", where=WHERE, fix=fix)
        with one_line(self.client.base_url):
            answer = self._post(UNLOAD, {"lora_name": ""})
        if answer.status_code != httpx2.codes.BAD_REQUEST:  # it knows the route, and misses a name
            what = f"the vLLM server at {self.client.base_url} loads no adapters while it runs"
            fix = f"{START}, or with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
            raise EnvironmentProblem(what, where=WHERE, fix=fix)
        return "adapter"

    def _post(self, route: str, body: Mapping[str, str] | None = None, timeout: float = ANSWER_S) -> httpx2.Response:
        return http_client().post(f"{self.client.base_url}{route}", json=body, timeout=timeout)

    def send(self, tensors: Mapping[str, Any]) -> None:
        """Give the server the adapter as it is now, and generate with that one from here on; EnvironmentProblem where
        the server is gone, or does not take it."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="grpo-autotune-adapters-"))
            self._leave = weakref.finalize(self.client, _leave, self.client.base_url, self._folder)
        begun, before = time.monotonic(), self.client.model
        name = f"grpo-{self._run}-{len(self.syncs)}"
        folder = self._folder / name
        size = save_adapter(self._model, tensors, folder)
        with one_line(self.client.base_url):
            answer = self._post(LOAD, {"lora_name": name, "lora_path": str(folder)}, LOADING_S)
            if answer.status_code != httpx2.codes.OK:
                what = f"the vLLM server at {self.client.base_url} did not load the adapter: {_message(answer)}"
                fix = f"{START}: it must see {self._folder}, and have room for the adapter's rank."
                raise EnvironmentProblem(what, where=WHERE, fix=fix)
            self.client.model = name
            if before != self.base:
                _forget(self.client.base_url, folder.with_name(before))
        self.syncs.append(Sync("adapter", time.monotonic() - begun, size, len(tensors), False, ()))

    def alive(self) -> None:
        """Ask the server for a sign of life; EnvironmentProblem where it gives none."""
        with one_line(self.client.base_url):
            http_client().get(f"{self.client.base_url}/health", timeout=ANSWER_S).raise_for_status()

    def close(self) -> None:
        """Let the server forget the adapter, and delete what was written; at the latest when this process ends."""
        self._leave()


def no_adapter_because(model: Any) -> str | None:
    """The reason that keeps a model's adapter from being sent as a file; None where it can be."""
    if (reason := lora.refusal(model)) is not None:
        return reason
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


@contextlib.contextmanager
def one_line(address: str) -> Iterator[None]:
    """Make any error of HTTP, of our requests (httpx2) or TRL's (requests), an EnvironmentProblem of one line."""
    import requests

    try:
        yield
    except (httpx2.HTTPError, requests.RequestException) as error:
        what = f"the vLLM server at {address} does not answer any more ({type(error).__name__})"
        fix = "Look into its log, and go on with --resume once it is started again (a run's own starts with it)."
        raise EnvironmentProblem(what, where="vllm.mode server", fix=fix) from error


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _forget(address: str, folder: Path) -> None:
    """Take an adapter out of the server, and its file off the disk."""
    http_client().post(f"{address}{UNLOAD}", json={"lora_name": folder.name}, timeout=ANSWER_S)
    shutil.rmtree(folder, ignore_errors=True)


def _leave(address: str, folder: Path) -> None:
    with contextlib.suppress(httpx2.HTTPError):  # it may have ended before
        for adapter in folder.iterdir():
            _forget(address, adapter)
    shutil.rmtree(folder, ignore_errors=True)


def _message(answer: httpx2.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}"
