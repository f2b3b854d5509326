"""FSDP2 as it is asked for: in `grpo.fsdp_config`, in the older words of `grpo.fsdp`, or by `accelerate launch`.

transformers takes every key without a word (`TrainingArguments._process_fsdp_args`, 5.23). accelerate has other names
for some in its file, and hands them to the processes that it starts as variables (accelerate/utils/launch.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_autotune.config.foreign_keys import ForeignKey, check_values
from grpo_autotune.errors import ConfigError, nearest_hint

WHERE = "grpo.fsdp_config"
USE = "ACCELERATE_USE_FSDP"
KEYS = {
    name: ForeignKey(name, frozenset(accepts.split()), None)
    for name, accepts in {
        "version": "2", "reshard_after_forward": "bool", "cpu_offload": "bool", "activation_checkpointing": "bool",
        "cpu_ram_efficient_loading": "bool", "state_dict_type": "'FULL_STATE_DICT' 'SHARDED_STATE_DICT'",
        "auto_wrap_policy": "'TRANSFORMER_BASED_WRAP' 'SIZE_BASED_WRAP' 'NO_WRAP'",
        "transformer_layer_cls_to_wrap": "list", "min_num_params": "int",
    }.items()
}  # fmt: skip
IN_FILE = {"cpu_offload": "offload_params"}
"""Key -> its name in accelerate's file, where that is another one (`fsdp_` left out)."""
VARIABLES = {name: f"FSDP_{IN_FILE.get(name, name).upper().replace('LAYER_', '')}" for name in KEYS}
FSDP1 = (
    "sharding_strategy", "backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states",
    "limit_all_gathers",
)  # fmt: skip
"""Keys that FSDP2 has nothing for."""
STRATEGIES = {"full_shard": True, "shard_grad_op": False}
"""Words of FSDP1 -> `reshard_after_forward`."""
WORDS = {"true": True, "false": False, **STRATEGIES}


def checked(options: Mapping[str, Any], where: str = WHERE) -> dict[str, Any]:
    """The keys as transformers has them, without `fsdp_`, in the types that they have; ConfigError for a key that FSDP2
    lacks, for a wrong value, and for two that exclude each other."""
    options = {str(name).removeprefix("fsdp_"): _plain(value) for name, value in options.items()}
    names = {theirs: f"Use {ours}." for ours, theirs in IN_FILE.items()}
    for name in options.keys() - KEYS.keys():
        what = "FSDP1 alone has this key, and FSDP2 is what shards here" if name in FSDP1 else "unknown key"
        fix = names.get(name) or nearest_hint(name, KEYS, f"There are {', '.join(KEYS)}.")
        raise ConfigError(what, where=f"{where}.{name}", fix="Remove it." if name in FSDP1 else fix)
    if options.get("version") == 1:
        fix = "Set it to 2 (accelerate to-fsdp2 converts accelerate's own file), or leave it out."
        raise ConfigError("FSDP1 is not supported", where=f"{where}.version", fix=fix)
    if isinstance(layers := options.get("transformer_layer_cls_to_wrap"), str):
        options["transformer_layer_cls_to_wrap"] = [name.strip() for name in layers.split(",")]
    check_values(where, options, KEYS)
    if options.get("activation_checkpointing") and options.get("auto_wrap_policy") == "NO_WRAP":
        what = "activation_checkpointing is done layer by layer, and NO_WRAP names none"
        raise ConfigError(what, where=where, fix="Leave auto_wrap_policy out.")
    return options


def of_file(options: Mapping[str, Any]) -> dict[str, Any]:
    """The `fsdp_config` of accelerate's file in transformers' keys: FSDP1's strategy translated, its other keys left
    out."""
    options = {name.removeprefix("fsdp_"): _plain(value) for name, value in options.items()}
    options = {"reshard_after_forward": options.get("sharding_strategy", True)} | options | {"version": 2}
    return {name: options[IN_FILE.get(name, name)] for name in KEYS if IN_FILE.get(name, name) in options}


def check_fsdp(grpo: Mapping[str, Any]) -> None:
    """ConfigError for what `asked` refuses of the keys alone: a JSON file need not be at hand yet."""
    asked({**grpo, "fsdp_config": {}} if isinstance(grpo.get("fsdp_config"), str) else grpo, {})


def asked(grpo: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[dict[str, Any] | None, str | None]:
    """The keys that hold, all ways of asking together, or None where nobody asks for FSDP; and a line about words that
    were read as keys. ConfigError where two ways contradict each other, or as `checked`."""
    words, given = grpo.get("fsdp"), grpo.get("fsdp_config")
    launched = _is_on(environ, USE)
    if words is False and launched:
        raise ConfigError("false, and accelerate launch asks for FSDP", where="grpo.fsdp", fix="Remove one of the two.")
    if words is False or not (words or given is not None or launched):
        return None, None
    of_words = _of_words(words)
    options = {**of_words, **checked(_read(given) if isinstance(given, str) else given or {})}
    theirs = _launched(environ) if launched else {}
    for name in options.keys() & theirs.keys():
        if options[name] != theirs[name]:
            what = f"{options[name]} here, and {theirs[name]} by accelerate launch ({VARIABLES[name]})"
            raise ConfigError(what, where=f"{WHERE}.{name}", fix="Say it in one place, or start with torchrun.")
    options = {**theirs, **options}
    if grpo.get("deepspeed") or _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError("DeepSpeed and FSDP both shard the model", where="grpo.deepspeed", fix="Ask for one of them.")
    both = [name for name in ("activation_checkpointing", "gradient_checkpointing") if grpo.get(name)]
    if options.get("activation_checkpointing") and both:
        what = f"grpo.{both[0]} is true as well, and each layer would be computed three times"
        raise ConfigError(what, where=f"{WHERE}.activation_checkpointing", fix="Keep one of the two.")
    keys = ", ".join(f"{name}: {str(value).lower()}" for name, value in of_words.items())
    note = f"grpo.fsdp {words!r}, which transformers deprecates, is read as {WHERE} {{{keys}}}"
    return options, note if of_words else None


def _of_words(words: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    given = words.split() if isinstance(words, str) else words if isinstance(words, list) else ()
    for word in (str(word).lower() for word in given):
        if word in STRATEGIES:
            options["reshard_after_forward"] = STRATEGIES[word]
        elif word == "offload":
            options["cpu_offload"] = True
        elif word not in ("auto_wrap", "true"):
            fix = f"Write {WHERE}: {{reshard_after_forward: true}} (full_shard), or false (shard_grad_op)."
            raise ConfigError(f"FSDP2 has no {word}", where="grpo.fsdp", fix=fix)
    return options


def _launched(environ: Mapping[str, str]) -> dict[str, Any]:
    launched = {"version": "1"} | {name: environ[key] for name, key in VARIABLES.items() if environ.get(key)}
    if launched.get("auto_wrap_policy") != "SIZE_BASED_WRAP":
        launched.pop("min_num_params", None)  # accelerate always sends it
    return checked(launched, "accelerate launch, fsdp_config")


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true")


def _plain(value: Any) -> Any:
    """A value in the type that its text stands for."""
    if not isinstance(value, str):
        return value
    return int(value) if value.isdecimal() else WORDS.get(value.lower(), value)


def _read(path: str) -> dict[str, Any]:
    try:
        return dict(json.loads(Path(path).expanduser().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        fix = "Name a file with a JSON object, or write its keys."
        raise ConfigError(f"cannot read {path}: {error}", where=WHERE, fix=fix) from error
