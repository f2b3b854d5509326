"""The `vllm serve` for trained weights: an adapter beside its base, or whole weights. Nothing is started."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.config.sections.vllm import VllmSection
from grpo_autotune.console import say
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import is_folder
from grpo_autotune.knobs.context import model_config
from grpo_autotune.rollout.server.command import CLIENT_KEYS, HOST, PORT, Serving, gpu_keys, option, room_for
from grpo_autotune.rollout.server.process import Weights
from grpo_autotune.rollout.sync.lora import TOWERS
from grpo_autotune.trained.source import Trained


def served_weights(section: ModelSection, say: Callable[[str], None] = say) -> Weights:
    """The weights of a `model` section as a server reads them, built or downloaded first where they are missing;
    ConfigError where there are none. A folder is served without torch being loaded."""
    if section.name_or_path is not None and is_folder(section.name_or_path):
        source = str(Path(section.name_or_path).expanduser())
    else:
        from grpo_autotune.train.models.load import model_source

        source = model_source(section, say)
    return Weights(source, model_config(section) or model_config(section.model_copy(update={"name_or_path": source})))


def served_name(trained: Trained) -> str:
    """The name by which clients ask for the weights: the run's, with the checkpoint's where it is one."""
    if trained.run is None:
        return trained.name
    run = trained.run.resolve().name
    return run if trained.name == "model" else f"{run}-{trained.name}"


def serving_trained(trained: Trained, weights: Weights, section: VllmSection, gpus: Sequence[str]) -> Serving:
    """The command that serves trained weights: `weights` are those of the base, or the trained ones where they are
    whole; `section` holds further options. ConfigError where vLLM cannot run the adapter as one: it is to be merged."""
    notes: list[str] = []
    keys = {name: value for name, value in section.model_dump(exclude_none=True).items() if name not in CLIENT_KEYS}
    environment = gpu_keys(gpus, keys, notes)
    keys = {**_as_trained(trained, weights), **keys}
    if trained.adapter is None:
        keys["served_model_name"] = served_name(trained)
    else:
        keys |= _adapter_keys(trained, trained.adapter, weights.config_json)
    host, port = section.server_host or HOST, section.server_port or PORT
    given = {"host": host, "port": port, **keys}.items()
    options = [word for name, value in given for word in option(name, value)]
    return Serving(weights.source, tuple(options), environment, host, port, tuple(notes))


def _as_trained(trained: Trained, weights: Weights) -> dict[str, Any]:
    """Options that make the server read the model and its prompts as the trainer did."""
    dtype = _stored_dtype(weights.config_json)
    keys: dict[str, Any] = {} if dtype is None else {"dtype": dtype}  # vLLM alone would make float32 bfloat16
    if trained.config is not None:
        section = trained.config.model
        if trained.adapter is not None:
            keys |= {"dtype": section.dtype} if section.dtype != "auto" else {}
            keys |= {"revision": section.revision} if section.revision is not None else {}
        keys |= {"trust_remote_code": True} if section.trust_remote_code else {}
        if options := trained.config.grpo.get("chat_template_kwargs"):
            keys["default_chat_template_kwargs"] = options
    beside = (folder / "chat_template.jinja" for folder in (trained.path, trained.path.parent))  # of several adapters
    template = next((path for path in beside if path.is_file()), None)
    return {**keys, "chat_template": str(template)} if trained.adapter is not None and template is not None else keys


def _stored_dtype(model: Mapping[str, Any]) -> str | None:
    return model.get("dtype") or model.get("torch_dtype") or (model.get("text_config") or {}).get("dtype")


def _adapter_keys(trained: Trained, adapter: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Options by which vLLM serves an adapter beside its base, whose config.json is `model`."""
    names = _tensors(trained.path)
    seeing = "vision_config" in model and any("language_model." not in name for name in names)
    remedy = f"Merge it, and serve what comes out: grpo-autotune merge {trained.path} OUT."
    reason = _refusal(adapter, any("lora_embedding_" in name for name in names))
    if seeing and model.get("model_type") not in TOWERS:
        reason = f"it is on the vision tower of {model.get('model_type')}, which works for {' and '.join(TOWERS)}"
    if reason is not None:
        raise ConfigError(f"vLLM cannot serve this adapter: {reason}", where=str(trained.path), fix=remedy)
    room = room_for(adapter, where=str(trained.path), fix=remedy)
    modules = [f"{served_name(trained)}={trained.path}"]
    keys = {"enable_lora": True, "lora_modules": modules, "max_lora_rank": room, "max_loras": 1}
    return {**keys, "enable_tower_connector_lora": True} if seeing else keys


def _tensors(folder: Path) -> list[str]:
    try:
        with safe_open(str(folder / "adapter_model.safetensors"), framework="np") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        fix = "The folder was not saved whole, or not as safetensors."
        raise ConfigError(f"the adapter cannot be read: {error}", where=str(folder), fix=fix) from error


def _refusal(adapter: Mapping[str, Any], has_embeddings: bool) -> str | None:
    """The reason why vLLM refuses an adapter (vllm/lora/peft_helper.py, vLLM 0.31), or would run it otherwise than it
    was trained: it reads one scale for all layers."""
    if adapter.get("peft_type") != "LORA":
        return f"it is {adapter.get('peft_type')}, not LoRA"
    if adapter.get("use_dora"):
        return "it is DoRA (peft.use_dora)"
    if whole := adapter.get("modules_to_save"):
        return f"{', '.join(whole)} is trained whole (peft.modules_to_save)"
    if adapter.get("bias", "none") != "none" or adapter.get("lora_bias"):
        return "it has biases (peft.bias, peft.lora_bias)"
    if has_embeddings or adapter.get("target_parameters") or adapter.get("trainable_token_indices"):
        return "not only linear layers are adapted"
    return "its layers have different scales (peft.rank_pattern, peft.alpha_pattern)" if _has_scales(adapter) else None


def _has_scales(adapter: Mapping[str, Any]) -> bool:
    ranks, alphas = adapter.get("rank_pattern") or {}, adapter.get("alpha_pattern") or {}
    size = math.sqrt if adapter.get("use_rslora") else float
    r, alpha = adapter.get("r") or 8, adapter.get("lora_alpha") or 8
    return len({alphas.get(name, alpha) / size(ranks.get(name, r)) for name in ("", *ranks, *alphas)}) > 1
