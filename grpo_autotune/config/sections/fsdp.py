"""FSDP2 as it is asked for: in `grpo.fsdp_config`, in the older words of `grpo.fsdp`, or by `accelerate launch`.

transformers takes every key without a word (`TrainingArguments._process_fsdp_args`, 5.23). accelerate has other names
for the same in its file, and hands them to the processes that it starts as variables (accelerate/utils/launch.py).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from grpo_autotune.config.foreign_keys import ForeignKey, check_values
from grpo_autotune.errors import ConfigError, nearest_hint

WHERE = "grpo.fsdp_config"
USE = "ACCELERATE_USE_FSDP"


class Key(NamedTuple):
    """A key of `grpo.fsdp_config`."""

    accepts: str  # as `ForeignKey.accepts`, with spaces between
    variable: str = ""  # of accelerate, `FSDP_` left out; empty for the key in capitals
    file: str = ""  # the key in accelerate's file, `fsdp_` left out; empty for the same


KEYS = {
    "version": Key("2"),
    "reshard_after_forward": Key("bool"),
    "cpu_offload": Key("bool", "OFFLOAD_PARAMS", "offload_params"),
    "activation_checkpointing": Key("bool"),
    "cpu_ram_efficient_loading": Key("bool"),
    "state_dict_type": Key("'FULL_STATE_DICT' 'SHARDED_STATE_DICT'"),
    "auto_wrap_policy": Key("'TRANSFORMER_BASED_WRAP' 'SIZE_BASED_WRAP' 'NO_WRAP'"),
    "transformer_layer_cls_to_wrap": Key("list", "TRANSFORMER_CLS_TO_WRAP"),
    "min_num_params": Key("int"),
}
FSDP1 = (
    "sharding_strategy", "backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states",
    "limit_all_gathers",
)  # fmt: skip
"""Keys that FSDP2 has nothing for."""
STRATEGIES = {"full_shard": True, "shard_grad_op": False}
"""Words of FSDP1 -> `reshard_after_forward`."""
WORDS = {"true": True, "false": False, **STRATEGIES}


def variable(name: str) -> str:
    """accelerate's variable for a key."""
    return f"FSDP_{KEYS[name].variable or name.upper()}"


def checked(options: Mapping[str, Any], where: str = WHERE) -> dict[str, Any]:
    """The keys of `grpo.fsdp_config` as transformers has them, without `fsdp_`, in the types that they have; ConfigError
    for one that FSDP2 lacks, for a wrong value, and for two that exclude each other."""
    options = {str(name).removeprefix("fsdp_"): _plain(value) for name, value in options.items()}
    accelerates = {key.file: name for name, key in KEYS.items() if key.file}
    for name in options:
        if name in FSDP1:
            fix = f"Remove it; the keys are {', '.join(KEYS)}."
            raise ConfigError(
                "FSDP1 alone has this key, and FSDP2 is what shards here", where=f"{where}.{name}", fix=fix
            )
        if name not in KEYS:
            fix = (
                f"Use {accelerates[name]}." if name in accelerates else nearest_hint(name, KEYS, f"{', '.join(KEYS)}.")
            )
            raise ConfigError("unknown key", where=f"{where}.{name}", fix=fix)
    if options.get("version", 2) == 1:
        fix = "Set it to 2 (accelerate to-fsdp2 converts accelerate's own file), or leave it out."
        raise ConfigError("FSDP1 is not supported", where=f"{where}.version", fix=fix)
    if isinstance(layers := options.get("transformer_layer_cls_to_wrap"), str):
        options["transformer_layer_cls_to_wrap"] = layers.split(",")
    foreign = {name: ForeignKey(name, frozenset(key.accepts.split()), None) for name, key in KEYS.items()}
    check_values(where, options, foreign)
    if options.get("activation_checkpointing") and options.get("auto_wrap_policy") == "NO_WRAP":
        what = "activation_checkpointing is done layer by layer, and NO_WRAP names none"
        raise ConfigError(what, where=where, fix="Leave auto_wrap_policy out.")
    return options


def of_file(options: Mapping[str, Any]) -> dict[str, Any]:
    """The `fsdp_config` of accelerate's file in transformers' keys, FSDP1's strategy translated, its other keys left
    out."""
    options = {name.removeprefix("fsdp_"): _plain(value) for name, value in options.items()}
    options = {"reshard_after_forward": options.get("sharding_strategy", True)} | options
    found = {name: options[key.file or name] for name, key in KEYS.items() if (key.file or name) in options}
    return {**found, "version": 2}


def check_fsdp(grpo: Mapping[str, Any]) -> None:
    """ConfigError for what `asked` refuses of the keys alone: a JSON file need not be at hand yet."""
    asked({**grpo, "fsdp_config": {}} if isinstance(grpo.get("fsdp_config"), str) else grpo, {})


def asked(grpo: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[dict[str, Any] | None, str | None]:
    """The keys of `grpo.fsdp_config` that hold, all ways of asking together, or None where nobody asks for FSDP; and a
    line about words that were read as keys. ConfigError where two ways contradict each other, or as `checked`."""
    words, given = grpo.get("fsdp"), grpo.get("fsdp_config")
    launched = environ.get(USE, "").lower() in ("1", "true")
    if not (words or given is not None or launched):
        return None, None
    if words is False and launched:
        raise ConfigError("false, and accelerate launch asks for FSDP", where="grpo.fsdp", fix="Remove one of the two.")
    if words is False:
        return None, None
    if isinstance(given, str):
        given = _read(given)
    of_words = _of_words(words)
    options = {**of_words, **checked(given or {})}
    if launched:
        theirs = _launched(environ)
        for name in options.keys() & theirs.keys():
            if options[name] != theirs[name]:
                what = f"{options[name]} here, and {theirs[name]} by accelerate launch ({variable(name)})"
                raise ConfigError(what, where=f"{WHERE}.{name}", fix="Say it in one place, or start with torchrun.")
        options = {**theirs, **options}
    if grpo.get("deepspeed") or environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise ConfigError("DeepSpeed and FSDP both shard the model", where="grpo.deepspeed", fix="Ask for one of them.")
    both = [name for name in ("activation_checkpointing", "gradient_checkpointing") if grpo.get(name)]
    if options.get("activation_checkpointing") and both:
        what = f"grpo.{both[0]} is true as well, and every layer would be computed three times"
        raise ConfigError(what, where=f"{WHERE}.activation_checkpointing", fix="Keep one of the two.")
    note = f"grpo.fsdp {words!r}, which transformers deprecates, is read as {WHERE}: {of_words}" if of_words else None
    return options, note


def _of_words(words: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for word in words.lower().split() if isinstance(words, str) else words if isinstance(words, list) else ():
        if word in STRATEGIES:
            options["reshard_after_forward"] = STRATEGIES[word]
        elif word == "offload":
            options["cpu_offload"] = True
        elif word not in ("auto_wrap", "true"):
            fix = f"Write {WHERE}: {{reshard_after_forward: true}} (full_shard), or false (shard_grad_op)."
            raise ConfigError(f"FSDP2 has no {word}", where="grpo.fsdp", fix=fix)
    return options


def _launched(environ: Mapping[str, str]) -> dict[str, Any]:
    found = {name: environ[variable(name)] for name in KEYS if environ.get(variable(name))}
    if "version" not in found:
        found["version"] = "1"  # as accelerate has it
    if found.get("auto_wrap_policy", "").upper() != "SIZE_BASED_WRAP":
        found.pop("min_num_params", None)  # accelerate always sends it
    return checked(found, "accelerate launch, fsdp_config")


def _plain(value: Any) -> Any:
    """A value in the type that its text stands for."""
    if not isinstance(value, str):
        return value
    return int(value) if value.isdecimal() else WORDS.get(value.lower(), value)


def _read(path: str) -> dict[str, Any]:
    try:
        options = json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}", where=WHERE, fix="Name a JSON file, or write its keys."
        ) from error
    if not isinstance(options, dict):
        raise ConfigError(f"{path} is no JSON object", where=WHERE, fix="Name a JSON file, or write its keys.")
    return options
