"""The framework that a file was written for, and the file as its `Source`."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.reading import python_source
from grpo_autotune.interop.reading.beside import text_of
from grpo_autotune.interop.reading.python_source import PIN
from grpo_autotune.interop.reading.yaml_lines import yaml_settings
from grpo_autotune.interop.redact import redacted
from grpo_autotune.interop.source import Setting, Source

FRAMEWORKS: Final = (
    "verl", "easyr1", "ms-swift", "trl", "open-r1", "vlm-r1", "r1-v", "unsloth", "deepspeed", "accelerate",
)  # fmt: skip
"""Names of `--from`."""
HYDRA = ("verl", "easyr1")


def _has(*needed: str) -> Callable[[Iterable[str]], bool]:
    """True of keys where each pattern matches the start of one."""
    return lambda keys: all(any(re.match(pattern, key) for key in keys) for pattern in needed)


KEYS: Mapping[str, Callable[[Iterable[str]], bool]] = {
    "easyr1": _has(r"worker\.(actor|rollout)\.", r"(data|algorithm|trainer)\."),
    "verl": _has(r"actor_rollout_ref\."),
    "ms-swift": _has(r"rlhf_type$"),
    "nemo-rl": _has(r"grpo\.", r"policy\.", r"loss_fn\."),
    "prime-rl": _has(r"orchestrator\b"),
    "llama-factory": _has(r"stage$", r"model_name_or_path$"),
    "deepspeed": _has(r"zero_optimization\b|train_micro_batch_size_per_gpu$"),
    "accelerate": _has(r"(compute_environment|distributed_type)$"),
    "open-r1": _has(
        r"(benchmarks|callbacks|dataset_prompt_column|chat_template|dataset_mixture|code_provider|wandb_entity"
        r"|push_to_hub_revision|overwrite_hub_revision|cosine_\w+|system_prompt)$",
        r"model_name_or_path$",
    ),
    "trl": _has(r"(model_name_or_path|output_dir)$", r"(num_generations|reward_funcs|max_completion_length|beta)\b"),
}
"""Framework -> True for the keys of its YAML or JSON; the first that fits is it."""
UNREAD: Final = {
    "openrlhf": "a configuration of OpenRLHF, which is not read yet",
    "nemo-rl": "a configuration of NeMo-RL, which is not read yet",
    "prime-rl": "a configuration of prime-rl, which is not read yet",
    "llama-factory": "a configuration of LLaMA-Factory, which has no GRPO",
}


def read_source(path: Path, framework: str | None = None, environment: Mapping[str, str] | None = None) -> Source:
    """A file as the settings of its framework, secrets taken out. ConfigError for one of no framework, of several, or
    of one that is not read; `framework` decides where the file does not tell, and `environment` is what a script is
    started with."""
    if framework is not None and framework not in FRAMEWORKS:
        raise ConfigError(f"no framework {framework!r}", where="--from", fix=f"One of: {', '.join(FRAMEWORKS)}.")
    text = text_of(path)
    reader = READERS.get(path.suffix.lower(), _of_yaml)
    return redacted(reader(path, text, framework, environment or {}))


def _of_yaml(path: Path, text: str, framework: str | None, environment: Mapping[str, str]) -> Source:
    settings = yaml_settings(text, path.name)
    framework = framework or recognised(settings, path)
    if framework not in HYDRA and framework not in ("deepspeed", "accelerate"):
        settings = yaml_settings(text, path.name, nested=False)
    return Source(framework, path, settings, hints=dict(PIN.findall(text)))


def recognised(keys: Iterable[str], path: Path) -> str:
    """The framework of the keys of a YAML or JSON."""
    name = next((name for name, fits in KEYS.items() if fits(keys)), None)
    if name is None:
        fix = f"Name it with --from: {', '.join(FRAMEWORKS)}."
        raise ConfigError("no framework's GRPO configuration is recognised in this file", where=path.name, fix=fix)
    if name in UNREAD:
        raise ConfigError(UNREAD[name], where=path.name)
    return name


CALLS = re.compile(
    r"(GRPOConfig|GRPOTrainer|LoraConfig|BitsAndBytesConfig|load_dataset|SamplingParams|(\w+\.)?get_peft_model"
    r"|(\w*Fast\w+|AutoModel\w*|\w+For(CausalLM|ConditionalGeneration|ImageTextToText))\.from_pretrained|.*\.resize)"
)
"""Calls of a script that say something about its training."""


def _of_python(path: Path, text: str, framework: str | None, environment: Mapping[str, str]) -> Source:
    """A script's settings: `GRPOConfig`'s under their own names, those of other calls behind the call's name, such as
    `FastVisionModel.get_peft_model.r`; a second call of a name is `load_dataset(2)`."""
    script = python_source.read(path, environment)
    configs = script.called("(.*\\.)?GRPOConfig")
    if not configs:
        what = "a Python program that makes no GRPOConfig; its settings are not in it"
        raise ConfigError(what, where=path.name, fix="Import the script or command that starts it.")
    settings: dict[str, Setting] = {}
    counts: Counter[str] = Counter()
    for call in script.called(CALLS.pattern):
        counts[call.name] += 1
        place = call.name if counts[call.name] == 1 else f"{call.name}({counts[call.name]})"
        settings |= {f"{place}.{name}": setting for name, setting in call.arguments.items() if call not in configs}
    settings |= configs[-1].arguments
    warnings = [f"{len(configs)} GRPOConfig calls: the last one, of line {configs[-1].line}, is read"]
    name = framework or ("unsloth" if "unsloth" in script.imports else "trl")
    return Source(
        name, path, settings, environment=script.environment, program=path.name, hints=script.pins,
        warnings=tuple(warnings[: len(configs) - 1]),
    )  # fmt: skip


READERS: Mapping[str, Callable[[Path, str, str | None, Mapping[str, str]], Source]] = {
    ".yaml": _of_yaml, ".yml": _of_yaml, ".json": _of_yaml, ".py": _of_python, ".ipynb": _of_python,
}  # fmt: skip
"""Ending of a file's name -> its reader."""
