"""A file of another framework to a `RunConfig`: the framework that it was written for, the file as its `Source`, and
the translation by the module of that framework."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Final

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.frameworks import swift_keys
from grpo_autotune.interop.reading import python_source
from grpo_autotune.interop.reading.arguments import Launch, launched, options, overrides
from grpo_autotune.interop.reading.files import beside, resolved, text_of, with_defaults, yaml_settings
from grpo_autotune.interop.reading.python_source import PIN
from grpo_autotune.interop.reading.shell import Shell, evaluate
from grpo_autotune.interop.source import Setting, Source, Word, redacted
from grpo_autotune.interop.translation import Translation

FRAMEWORKS: Final = (  # names of `--from`
    "verl", "easyr1", "ms-swift", "trl", "open-r1", "vlm-r1", "r1-v", "unsloth", "deepspeed", "accelerate",
)  # fmt: skip
MODULES: Final = {  # framework -> its module, where that has another name
    "ms-swift": "swift", **dict.fromkeys(("deepspeed", "accelerate"), "sharding"),
    **dict.fromkeys(("open-r1", "r1-v", "vlm-r1", "unsloth"), "trl_family"),
}  # fmt: skip
NESTED: Final = ("verl", "easyr1", "deepspeed", "accelerate")  # frameworks whose keys lie inside each other
OPENED: Final[Mapping[str, Sequence[str] | None]] = {  # framework -> mappings that hold settings of its own; None: all
    **dict.fromkeys(NESTED), "ms-swift": (*swift_keys.GROUPS, *swift_keys.VARIABLES),
}  # fmt: skip
SHIPPED: Final[Mapping[str, Mapping[str, Mapping[str, str]]]] = {  # framework -> its own file -> what it sets anew
    "verl": {
        r"(\./)?(config/)?ppo_trainer\.yaml": {},
        r"(\./)?(config/)?ppo_megatron_trainer\.yaml": {"actor_rollout_ref.actor.strategy": "megatron"},
    },
}
KEYS: Final[Mapping[str, Sequence[str]]] = {  # framework -> beginnings of keys that it has, all of them; the first wins
    "easyr1": (r"worker\.(actor|rollout)\.", r"(data|algorithm|trainer)\."),
    "verl": (r"actor_rollout_ref\.",),
    "ms-swift": (r"rlhf_type$",),
    "nemo-rl": (r"grpo\.", r"policy\.", r"loss_fn\."),
    "prime-rl": (r"orchestrator\b",),
    "llama-factory": (r"stage$", r"model_name_or_path$"),
    "deepspeed": (r"zero_optimization\b|train_micro_batch_size_per_gpu$",),
    "accelerate": (r"(compute_environment|distributed_type)$",),
    "vlm-r1": (r"(data_file_paths|image_folders)$",),
    "open-r1": (
        r"(benchmarks|callbacks|dataset_prompt_column|chat_template|dataset_mixture|code_provider|wandb_entity"
        r"|push_to_hub_revision|overwrite_hub_revision|cosine_\w+|system_prompt)\b",
        r"model_name_or_path$",
        r"(num_generations|reward_funcs|max_completion_length)\b",
    ),
    "trl": (r"(model_name_or_path|output_dir)$", r"(num_generations|reward_funcs|max_completion_length|beta)\b"),
}
TRAINERS: Final = ("easyr1", "verl", "ms-swift", "nemo-rl")
PROGRAMS: Final[Sequence[tuple[str, str, str]]] = (  # framework, program, start of an argument; first wins
    ("easyr1", r"verl\.trainer\.main|.*verl/trainer/main\.py", ""),
    ("easyr1", r".*", r"worker\.(actor|rollout)\."),
    ("verl", r"(verl|recipe)\..*\bmain\w*|.*main_(ppo|dapo)\w*\.py", r"[+~]*[\w.]+=|--config"),
    ("verl", r".*", r"[+~]*actor_rollout_ref\."),
    ("ms-swift", r"(swift|megatron) rlhf|.*swift[/.]cli[/.](_megatron[/.])?rlhf(\.py)?", ""),
    ("openrlhf", r"openrlhf\.cli\.train_(ppo|grpo)\w*", ""),
    ("nemo-rl", r"(.*/)?run_(vlm_)?grpo\w*\.py", r"(\+*(policy|grpo|cluster|loss_fn)\.|--config)"),
    ("prime-rl", r"rl @.*|prime_rl\..*", ""),
    ("llama-factory", r"llamafactory-cli train", ""),
    ("vlm-r1", r".*open_r1[/.]\w*grpo_(jsonl|rec)\w*(\.py)?", ""),
    ("vlm-r1", r".*grpo\w*\.py", r"--(data_file_paths|image_folders)"),
    ("r1-v", r".*open_r1[/.]grpo\w*\.py", r"--max_pixels"),
    ("open-r1", r".*open_r1[/.]grpo\w*(\.py)?", r"--config"),
    ("trl", r"trl grpo|.*trl[/.]scripts[/.]grpo(\.py)?", ""),
    ("?", r".*open_r1[/.]\w*grpo\w*(\.py)?", ""),
    ("trl", r".*g[rs]po\w*\.py", r"--(per_device_train_batch_size|num_generations|config|model_name_or_path)"),
    ("trl", r".*\.py", r"--(max_completion_length|reward_funcs)"),
)
SERVERS: Final[Mapping[str, tuple[str, Sequence[str]]]] = {  # framework -> its server, and its keys of a training
    "ms-swift": (
        r"(swift|megatron) rollout|.*swift[/.]cli[/.]rollout(\.py)?",
        ("multi_turn_scheduler", "use_gym_env", "gym_env"),
    ),
}
UNREAD: Final = {
    "openrlhf": "a run of OpenRLHF, which is not read yet",
    "nemo-rl": "a run of NeMo-RL, which is not read yet",
    "prime-rl": "a run of prime-rl, which is not read yet",
    "llama-factory": "a run of LLaMA-Factory, which has no GRPO",
    "?": "this starts the program of open-r1, of R1-V or of VLM-R1, and does not tell which",
}
CALLS = re.compile(  # calls of a script that say something about its training
    r"(.*\.)?(GRPOConfig|GRPOTrainer|LoraConfig|BitsAndBytesConfig|ModelConfig|load_dataset|SamplingParams"
    rf"|get_peft_model|resize)|{'|'.join(python_source.OF_PROCESSOR)}"
    r"|(\w*Fast\w+|AutoModel\w*|\w+Processor|PeftModel|\w+For(CausalLM|ConditionalGeneration|ImageTextToText))\.from_pretrained"
)
PASSED_ON = ("model", "args", "processing_class", "tokenizer", "train_dataset", "0")  # made by other calls
LONGEST_SCRIPT = 2_000_000
MOST_NAMED = 5


def read_source(path: Path, framework: str | None = None, environment: Mapping[str, str] | None = None) -> Source:
    """A file as its framework's settings, without secrets; `framework` decides where the file does not tell.
    ConfigError for a file of no framework, of several, or of one that is not read."""
    if framework is not None and framework not in FRAMEWORKS:
        raise ConfigError(f"no framework {framework!r}", where="--from", fix=f"One of: {', '.join(FRAMEWORKS)}.")
    text, kind = text_of(path), path.suffix.lower()
    if kind == ".toml":
        name = recognised([f"{section}." for section in re.findall(r"(?m)^\[+([\w.]+)", text)], path)
        raise ConfigError(f"{name} has no configuration in TOML", where=path.name)
    yaml, python = kind in (".yaml", ".yml", ".json"), kind in (".py", ".ipynb")
    reader = _of_yaml if yaml else _of_python if python else _of_shell
    return redacted(reader(path, text, framework, environment or {}))


def _of_yaml(path: Path, text: str, framework: str | None, environment: Mapping[str, str]) -> Source:
    settings = yaml_settings(text, path.name)
    framework = framework or recognised(settings, path)
    given = {name.removeprefix("env."): setting for name, setting in settings.items() if name.startswith("env.")}
    flat = yaml_settings(text, path.name, OPENED.get(framework, ()))
    settings = resolved(with_defaults(flat, path), environment)
    return Source(framework, path, settings, environment=given, hints=dict(PIN.findall(text)))


def recognised(keys: Iterable[str], path: Path) -> str:
    """The framework of the keys of a YAML or JSON."""
    fits = [name for name, parts in KEYS.items() if all(any(re.match(part, key) for key in keys) for part in parts)]
    several = [name for name in fits if name in TRAINERS]
    if len(several) > 1:
        what = f"this has keys of {' and of '.join(several)}"
        raise ConfigError(what, where=path.name, fix="Name one with --from.")
    if not fits:
        fix = f"Name it with --from: {', '.join(FRAMEWORKS)}."
        raise ConfigError("no framework's GRPO configuration is recognised in this file", where=path.name, fix=fix)
    if fits[0] in UNREAD:
        raise ConfigError(UNREAD[fits[0]], where=path.name)
    return fits[0]


def _of_python(path: Path, text: str, framework: str | None, environment: Mapping[str, str]) -> Source:
    """A script's settings; those of other calls than `GRPOConfig` as `get_peft_model.r`, or `load_dataset(2).path`."""
    script = python_source.read(path, environment)
    configs = script.called(r"(.*\.)?GRPOConfig")
    if not configs:
        if commands := _commands_in(text, script.docstring or range(0)):
            source = _of_shell(path, commands[0], framework, environment)
            more = f"its docstring has {len(commands)} commands: the first is read"
            return replace(source, warnings=(*source.warnings, *[more] * (len(commands) > 1)))
        what = "a Python program that makes no GRPOConfig: its settings are not in it"
        raise ConfigError(what, where=path.name, fix="Name the script or command that starts it.")
    settings: dict[str, Setting] = {}
    counts: Counter[str] = Counter()
    for call in script.called(CALLS.pattern):
        name = re.sub(r"^.*\.(?=resize$)|^(trl|peft|datasets|vllm)\.", "", call.name)
        counts[name] += 1
        place = name if counts[name] == 1 else f"{name}({counts[name]})"
        for argument, setting in call.arguments.items():
            if call not in configs and not (argument in PASSED_ON and setting.value == setting.text):
                settings[f"{place}.{argument}"] = setting
    warnings = list(script.warnings)
    trainers = [call.name.rpartition(".")[2] for call in script.called(r"(.*\.)?(SFT|GRPO)Trainer")]
    if trainers[:1] == ["SFTTrainer"]:
        warnings.append("SFTTrainer trains the model before GRPO: import goes on from the model as it was before that")
    if len(configs) > 1:
        warnings.append(f"{len(configs)} GRPOConfig calls: the last one, of line {configs[-1].line}, is read")
    return Source(
        framework or ("unsloth" if "unsloth" in script.imports else "trl"), path, settings | configs[-1].arguments,
        environment=script.environment, program=path.name, hints=script.pins, warnings=tuple(warnings),
    )  # fmt: skip


COMMAND = re.compile(r"\s*(accelerate launch|torchrun|python3?|trl) ")


def _commands_in(text: str, places: range) -> list[str]:
    """The commands of a script's docstring, each on its own lines; the rest of the script is left out."""
    lines = text.splitlines()
    starts = [n for n in places if COMMAND.match(lines[n - 1])]
    stops = [next((n for n in range(n, len(lines)) if not lines[n - 1].rstrip().endswith("\\")), n) for n in starts]
    return ["\n" * (n - 1) + "\n".join(lines[n - 1 : stop]) for n, stop in zip(starts, stops, strict=True)]


def _of_shell(path: Path, text: str, framework: str | None, environment: Mapping[str, str]) -> Source:
    if len(text) > LONGEST_SCRIPT:
        raise ConfigError("too long for a script, and of no other format that is read", where=path.name)
    script = evaluate(text, environment)
    launches = [launch for command in script.commands if (launch := launched(command))]
    trainings: dict[int, tuple[str, list[Launch]]] = {}
    for launch in launches:
        kind = started(launch)
        kind = framework if kind == "?" and framework else kind
        if kind is not None and framework in (None, kind):
            trainings.setdefault(launch.line, (kind, []))[1].append(launch)
    if len(trainings) > 1:
        lines = ", ".join(f"{line} ({name})" for line, (name, _) in trainings.items())
        fix = "Leave one of them in a copy of the file, or name one's framework with --from."
        raise ConfigError(f"{len(trainings)} commands that train, on lines {lines}", where=path.name, fix=fix)
    if not trainings:
        names = list(dict.fromkeys(f"{launch.program} (line {launch.line})" for launch in launches))
        rest = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        what = f"no GRPO training of a framework that is known; it starts {', '.join(names[:MOST_NAMED])}{rest}"
        fix = f"Name the script or the YAML of a GRPO run of {', '.join(FRAMEWORKS[:-2])}."
        none = "no command that trains, and no configuration, is in this file"
        raise ConfigError(what if names else none, where=path.name, fix=None if names else fix)
    ((line, (name, same)),) = trainings.items()
    if name in UNREAD:
        which = "Name one with --from." if name == "?" else None
        raise ConfigError(UNREAD[name], where=f"{path.name}, line {line}", fix=which)
    if len(same) > 1:
        script.warnings.append(f"line {line} trains {len(same)} times; the first is read")
    source = _of_launch(path, name, same[0], script, dict(PIN.findall(text)), environment)
    server, keys = SERVERS.get(name, ("", ()))
    served = [options(one.arguments)[0] for one in launches if re.fullmatch(server, one.program)]
    said = {key: given[key] for given in served for key in keys if key in given}
    return replace(source, settings={**said, **source.settings})


def started(launch: Launch) -> str | None:
    """The framework of a command's program; "?" where several have it, None for no training."""
    spelled = ["", *(re.sub(r"(?<=\w)-", "_", word.text.partition("=")[0]) + "=" for word in launch.arguments)]
    fits = [(name, argument) for name, program, argument in PROGRAMS if re.fullmatch(program, launch.program)]
    return next((name for name, argument in fits if any(re.match(argument, word) for word in spelled)), None)


def _of_launch(
    path: Path, framework: str, launch: Launch, script: Shell, hints: dict[str, str], environment: Mapping[str, str]
) -> Source:
    given, first = options(launch.arguments)
    settings = overrides(launch.arguments) if framework in NESTED else given
    warnings = list(script.warnings)
    if file := _config_of(framework, settings, given, first):
        base = _named(path, file, framework, script)
        if base is None:
            warnings.append(f"{file} is not beside this file: what it sets is not read")
        settings = (base or {}) | settings
    for name, line in {name: word.line for word in launch.arguments for name in word.missing}.items():
        warnings.append(f"line {line}: {name} is set nowhere; give it with --env {name}=VALUE")
    if framework in NESTED:
        values = {name: str(setting.value) for name, setting in launch.environment.items()}
        settings = resolved(settings, {**environment, **values})
    return Source(
        framework, path, settings, environment=launch.environment, launch=launch.options, program=launch.program,
        hints=hints, warnings=tuple(warnings),
    )  # fmt: skip


def _config_of(
    framework: str, settings: Mapping[str, Setting], given: Mapping[str, Setting], first: Sequence[Word]
) -> str | None:
    if framework == "verl":
        values = [given[key].value if key in given else "" for key in ("config_path", "config_name")]
        folder, name = (str(value[0] if isinstance(value, list) else value) for value in values)
        return f"{folder}/{name.removesuffix('.yaml')}.yaml".lstrip("/") if name else None
    if "config" in settings:
        return str(settings["config"].value)
    return next((word.text for word in first if re.search(r"\.(ya?ml|json)$", word.text)), None)


def _named(path: Path, file: str, framework: str, script: Shell) -> dict[str, Setting] | None:
    """Settings of a file that a command names: a here-document of the script first, then the file, then one that the
    framework has; None where it is not at hand."""
    name = Path(file).name
    text = next((text for place, text in script.files.items() if Path(place).name == name), None)
    place = path if text is not None else beside(path, file)
    if place is None:
        shipped = (given for pattern, given in SHIPPED.get(framework, {}).items() if re.fullmatch(pattern, file))
        return next(({key: Setting(value, file=file) for key, value in given.items()} for given in shipped), None)
    settings = yaml_settings(text_of(place) if text is None else text, name, OPENED.get(framework, ()))
    settings = with_defaults(settings, place)
    return {key: replace(setting, file=setting.file or name) for key, setting in settings.items()}


def import_file(
    path: Path, *, framework: str | None = None, version: str | None = None, world_size: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Translation:  # fmt: skip
    """A file read and translated, with a `version`'s defaults, for `world_size` processes (None: the file's own)."""
    source = read_source(path, framework, environment)
    name = MODULES.get(source.framework, source.framework)
    translation: Translation = import_module(f"{__package__}.frameworks.{name}").translate(source, version, world_size)
    return translation
