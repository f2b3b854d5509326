"""Python scripts around `GRPOTrainer`: their calls in the names of TRL's command line, and their own reward functions.

A script is never imported, as that would train. Its reward functions are copied, with what they use of it, into a
module of their own beside the configuration.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_autotune.interop.reading import python_source
from grpo_autotune.interop.reading.beside import beside, text_of
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import Translation

PLACE = re.compile(r"(?P<call>.+?)(\((?P<number>\d+)\))?\.(?P<argument>\w+)")
MODEL = {"0": "model_name_or_path", "model_name": "model_name_or_path", "torch_dtype": "dtype",
         "pretrained_model_name_or_path": "model_name_or_path", "revision": "model_revision"}  # fmt: skip
LORA = {"r": "lora_r", "target_modules": "lora_target_modules", "task_type": "lora_task_type", "bias": "lora_bias",
        "modules_to_save": "lora_modules_to_save", "target_parameters": "lora_target_parameters"}  # fmt: skip
NAMES: Mapping[str, Mapping[str, str]] = {
    r"(.*\.)?LoraConfig": LORA,
    r".*get_peft_model": LORA,
    r".*\.from_pretrained": MODEL,
    r"(.*\.)?load_dataset": {"0": "dataset_name", "path": "dataset_name", "1": "dataset_config",
                             "name": "dataset_config", "split": "dataset_train_split"},
    r"(.*\.)?GRPOTrainer": {"0": "model_name_or_path", "model": "model_name_or_path", "1": "reward_funcs"},
    r"(.*\.)?BitsAndBytesConfig": {},
    r"(.*\.)?resize": {"0": "resize"},
}  # fmt: skip
"""Call -> its arguments in the names of TRL's command line; the others keep theirs."""
LAST = ("load_dataset", "GRPOTrainer", "get_peft_model")
"""Of several calls, the one that counts is the last; of the others, such as of a model, the first."""
OBJECTS = ("args", "train_dataset", "eval_dataset", "processing_class", "tokenizer", "peft_config", "callbacks",
           "model", "device_map", "quantization_config", "reward_processing_classes", "optimizers")  # fmt: skip
"""Arguments that hand over what other calls made."""


MANY_TURNS = ("rollout_func", "environment_factory", "tools")


def is_script(source: Source) -> bool:
    """True for a Python script or notebook, whose calls are the settings."""
    return source.path.suffix in (".py", ".ipynb") and source.program in (None, source.path.name)


def program(source: Source) -> Path | None:
    """The Python file that makes the data and the rewards, if it is at hand."""
    if source.path.suffix in (".py", ".ipynb"):
        return source.path
    name = source.program or ""
    return beside(source.path, name) if name.endswith(".py") else None


def with_program(source: Source) -> Source:
    """A command with the data and the rewards that are written in the program which it starts."""
    path = program(source)
    if path is None or is_script(source) or "reward_funcs" in source.settings:
        return source
    calls = python_source.read(path).called(r"(.*\.)?(GRPOTrainer|load_dataset)")
    made = unified(replace(source, settings={f"{c.name}.{key}": s for c in calls for key, s in c.arguments.items()}))
    wanted = ("reward_funcs", "dataset_name", "dataset_config", "dataset_train_split", *MANY_TURNS)
    inside = {key: replace(s, file=path.name) for key, s in made.settings.items() if key in wanted}
    is_known = isinstance(getattr(inside.get("reward_funcs"), "value", None), list)
    return replace(source, settings={**inside, **source.settings}) if is_known else source


def unified(source: Source) -> Source:
    """The source with the arguments of calls under the names of TRL's command line."""
    settings: dict[str, Setting] = {}
    is_over = False
    for key, setting in source.settings.items():
        place = PLACE.fullmatch(key)
        call = place["call"] if place else ""
        is_made = bool(re.search(r"from_pretrained|SamplingParams|^(.*\.)?resize$", call))
        is_over = is_over or call.endswith("GRPOTrainer")
        if is_made and (is_over or (call == "SamplingParams" and "vllm_sampling_params" not in source.settings)):
            continue
        names = next((names for pattern, names in NAMES.items() if re.fullmatch(pattern, call)), None)
        if place is None or names is None:
            settings[key] = setting
            continue
        name = names.get(place["argument"], place["argument"])
        is_text = not (isinstance(setting.value, str) and setting.text == setting.value)
        if (name == "model_name_or_path" and not is_text) or name in OBJECTS or name.isdecimal():
            continue
        if name not in settings or call.endswith(LAST):
            settings[name] = setting
    return replace(source, settings=settings)


def rewards(to: Translation, names: Iterable[Any]) -> list[dict[str, Any]]:
    """Items of `rewards` for functions of a script: TRL's own and imported ones by their module, those that the script
    defines in a module that is written beside the configuration."""
    path = program(to.source)
    if path is None:
        return []
    script = _Functions(path)
    items, wanted = [], []
    module = re.sub(r"[\W_]+", "_", path.stem).strip("_").lower() + "_rewards"
    for name in map(str, names):
        origin = script.imported.get(name)
        if origin:
            known = origin.startswith("trl.rewards")
            items.append({"name": name if known else f"{origin}:{name}"})
        elif name in script.statements:
            wanted.append(name)
            items.append({"name": f"{module}:{name}"})
        else:
            to.warnings.append(f"{to.where('reward_funcs')}: {name} is made where only a run can tell; it is left out")
    if wanted:
        text, missing = script.module(wanted)
        to.files[f"{module}.py"] = text
        if missing:
            to.warnings.append(f"{module}.py uses {', '.join(missing)}, which the script makes while it runs: add it")
    return items


class _Functions:
    """The statements at the top of a script, by the names that they define."""

    def __init__(self, path: Path) -> None:
        cells = python_source.cells(path, text_of(path))
        self.body = [node for _, source in cells for node in python_source.parsed(source, path.name)[0].body]
        self.statements: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, ast.stmt] = {}
        self.imported: dict[str, str] = {}  # name -> its module, of `from module import name`
        for statement in self.body:
            for name in _defined(statement):
                if isinstance(statement, ast.Import | ast.ImportFrom):
                    self.imports[name] = statement
                    if isinstance(statement, ast.ImportFrom) and statement.module:
                        self.imported[name] = statement.module
                else:
                    self.statements.setdefault(name, []).append(statement)

    def module(self, names: list[str]) -> tuple[str, list[str]]:
        """The text of a module with these functions and all that they use, and the names that are not to be had."""
        kept: set[int] = set()
        missing: list[str] = []
        todo, met = list(names), set(names)
        while todo:
            name = todo.pop()
            definitions = self.statements.get(name, [])[-1:] or [self.imports[name]] * (name in self.imports)
            if definitions and not _runs(definitions[0]):
                kept.add(id(definitions[0]))
                used = [used for used in _used(definitions[0]) if used in self.statements or used in self.imports]
                todo += [one for one in used if one not in met]
                met |= set(used)
            else:
                missing.append(name)
        ordered = [node for node in self.body if id(node) in kept]
        ordered.sort(key=lambda node: not isinstance(node, ast.Import | ast.ImportFrom))
        return "\n\n\n".join(ast.unparse(node) for node in ordered) + "\n", sorted(missing)


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        yield from (
            node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and node.ctx.__class__ is ast.Store
        )


def _used(statement: ast.stmt) -> set[str]:
    """Names that a statement reads from around it; those that a function makes itself are its own."""
    names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    local = {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        local |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - local


def _runs(statement: ast.stmt) -> bool:
    """True for an assignment that calls more than a pattern's compiler: it would load a model or data."""
    calls = [ast.unparse(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)]
    light = re.compile(
        r"re\.compile|(int|float|str|len|dict|list|set|tuple|os\.getenv|os\.environ\.get|.*\.(join|format))"
    )
    return isinstance(statement, ast.Assign | ast.AnnAssign) and not all(light.fullmatch(call) for call in calls)
