"""The framework that a file was written for, and the file as its `Source`."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.reading import python_source
from grpo_autotune.interop.reading.arguments import options, overrides
from grpo_autotune.interop.reading.beside import beside, text_of
from grpo_autotune.interop.reading.launches import Launch, launched
from grpo_autotune.interop.reading.python_source import PIN
from grpo_autotune.interop.reading.shell import evaluate
from grpo_autotune.interop.reading.words import Word
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
    reader = READERS.get(path.suffix.lower(), _of_shell)
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


PROGRAMS: Sequence[tuple[str, str, str]] = (
    ("easyr1", r"verl\.trainer\.main|.*verl/trainer/main\.py", ""),
    ("easyr1", r"", r"worker\.(actor|rollout)\."),
    ("verl", r"(verl|recipe)\..*\bmain\w*|.*main_(ppo|dapo)\w*\.py", ""),
    ("verl", r"", r"actor_rollout_ref\."),
    ("ms-swift", r"(swift|megatron) rlhf|.*swift/cli/(_megatron/)?rlhf\.py|swift\.cli\.(_megatron\.)?rlhf", ""),
    ("openrlhf", r"openrlhf\.cli\.train_(ppo|grpo)\w*", ""),
    ("nemo-rl", r".*run_\w*grpo\w*\.py", r"(policy|grpo|cluster|loss_fn)\."),
    ("prime-rl", r"rl @.*|prime_rl\..*", ""),
    ("llama-factory", r"llamafactory-cli .*", ""),
    ("vlm-r1", r".*open_r1[/.]\w*grpo_(jsonl|rec|gui)\w*(\.py)?", ""),
    ("vlm-r1", r".*grpo\w*\.py", r"--(data_file_paths|image_folders)"),
    ("r1-v", r".*open_r1[/.]grpo\w*\.py", r"--max_pixels"),
    ("open-r1", r".*open_r1[/.]grpo\w*(\.py)?", r"--config"),
    ("trl", r"trl grpo|.*trl[/.]scripts[/.]grpo(\.py)?|.*/grpo_vlm\.py", ""),
    ("?", r".*open_r1[/.]\w*grpo\w*(\.py)?", ""),
    ("trl", r".*\.py", r"--num_generations"),
)
"""Framework, whole name of the program, and start of one of its arguments; the first that fits is it."""
UNTRAINED = re.compile(
    r"(swift|trl|megatron) \w+|.*\b(sft|dpo|kto|rm|eval|infer|generat|merge|preprocess|data)\w*(\.py)?"
)
"""Programs that are no GRPO training, to be named where a script has nothing else."""


def _of_shell(path: Path, text: str, framework: str | None, environment: Mapping[str, str]) -> Source:
    """The one GRPO command of a script."""
    script = evaluate(text, path.name, environment)
    launches = [launch for command in script.commands if (launch := launched(command))]
    trainings = [(name, launch) for launch in launches if (name := started(launch, framework))]
    trainings = [(name, launch) for name, launch in trainings if framework in (None, name) or name == "?"]
    first = {launch.command.line: (name, launch) for name, launch in reversed(trainings)}
    warnings = list(script.warnings)
    if len(first) > 1:
        lines = ", ".join(f"{line} ({name})" for line, (name, _) in sorted(first.items()))
        what = f"{len(first)} commands that train: lines {lines}"
        raise ConfigError(what, where=path.name, fix="Leave one in a copy of the file, or name one with --from.")
    if not first:
        raise _nothing(path, text, launches)
    ((name, launch),) = first.values()
    if name in UNREAD:
        raise ConfigError(UNREAD[name], where=f"{path.name}, line {launch.command.line}")
    if name == "?":
        what = f"{launch.program} is the program of open-r1, of R1-V and of VLM-R1"
        raise ConfigError(what, where=f"{path.name}, line {launch.command.line}", fix="Name one with --from.")
    if len(trainings) > 1:
        warnings.append(f"line {launch.command.line} trains {len(trainings)} times; the first is read")
    return _of_launch(path, name, launch, script.files, warnings, dict(PIN.findall(text)))


def started(launch: Launch, framework: str | None) -> str | None:
    """The framework of a command; `framework` where the command does not tell."""
    for name, program, argument in PROGRAMS:
        if (
            re.fullmatch(program or ".*", launch.program)
            and any(
                re.match(
                    argument,
                    word.text.replace("-", "_").replace("__", "--", 1).lstrip("+~")
                    if argument[0] == "-"
                    else word.text.lstrip("+~"),
                )
                for word in launch.arguments
            )
            if argument
            else re.fullmatch(program, launch.program)
        ):
            return framework if name == "?" and framework else name
    return None


def _nothing(path: Path, text: str, launches: Sequence[Launch]) -> ConfigError:
    """The reason why a script holds no training."""
    names = ", ".join(dict.fromkeys(f"{launch.program} (line {launch.command.line})" for launch in launches))
    if names:
        return ConfigError(f"no GRPO training of a framework that is known; it starts {names}", where=path.name)
    fix = f"Name the script or the YAML of a GRPO run of {', '.join(FRAMEWORKS)}."
    return ConfigError("no command that trains, and no configuration, is in this file", where=path.name, fix=fix)


def _of_launch(
    path: Path, framework: str, launch: Launch, files: Mapping[str, str], warnings: list[str], hints: dict[str, str]
) -> Source:
    """A command's settings over those of the YAML that it names."""
    given, first = options(launch.arguments)
    settings = overrides(launch.arguments) if framework in HYDRA else given
    named = _configured(framework, settings, given, first)
    for file in named:
        settings = _named(path, file, framework, files, hints, warnings) | settings
    launcher = dict(launch.options)
    if "config_file" in launcher:
        launcher = _named(path, str(launcher["config_file"].value), "accelerate", files, hints, warnings) | launcher
    warnings += [
        f"line {word.line}: {name} is set nowhere; give it with --env {name}=VALUE"
        for word in launch.arguments
        for name in re.findall(r"\$\{?(\w+)\}?", word.text)
        if name in word.text and not re.search(r"\$\(|`", word.text)
    ]
    environment = {name: word.setting(word.text) for name, word in launch.command.environment.items()}
    return Source(
        framework, path, settings, environment, launcher, launch.program, hints, tuple(dict.fromkeys(warnings))
    )


def _configured(
    framework: str, settings: dict[str, Setting], given: Mapping[str, Setting], first: list[Word]
) -> list[str]:
    """Names of the YAML files that a command reads."""
    if framework == "easyr1":
        file = settings.pop("config", None)
        return [str(file.value)] if file else []
    if framework == "verl":
        folder, name = (str(given[key].value) if key in given else "" for key in ("config_path", "config_name"))
        return [f"{folder}/{name.removesuffix('.yaml')}.yaml".lstrip("/")] if name else []
    file = settings.pop("config", None)
    ends = (".yaml", ".yml", ".json")
    return [str(file.value)] if file else [word.text for word in first if word.text.endswith(ends)][:1]


def _named(
    path: Path, file: str, framework: str, files: Mapping[str, str], hints: dict[str, str], warnings: list[str]
) -> dict[str, Setting]:
    """Settings of a file that a command names; where it is not at hand, its name is a hint."""
    found_text = next((text for name, text in files.items() if Path(name).name == Path(file).name), None)
    place = None if found_text is not None else beside(path, file)
    if found_text is None and place is None:
        hints["accelerate" if framework == "accelerate" else "config"] = file
        warnings.append(f"{file} is not beside this file: what it sets is not read")
        return {}
    text = found_text if found_text is not None else text_of(place)
    settings = yaml_settings(text, Path(file).name, nested=framework in (*HYDRA, "accelerate"))
    return {key: replace(setting, file=Path(file).name) for key, setting in settings.items()}


def _of_toml(path: Path, text: str, framework: str | None, environment: Mapping[str, str]) -> Source:
    name = recognised((f"{section}." for section in re.findall(r"(?m)^\[+([\w.]+)", text)), path)
    raise ConfigError(f"{name} has no TOML", where=path.name)


READERS: Mapping[str, Callable[[Path, str, str | None, Mapping[str, str]], Source]] = {
    ".yaml": _of_yaml, ".yml": _of_yaml, ".json": _of_yaml, ".py": _of_python, ".ipynb": _of_python, ".toml": _of_toml,
}  # fmt: skip
"""Ending of a file's name -> its reader."""
