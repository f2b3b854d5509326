"""Python scripts around `GRPOTrainer`: their calls in the names of TRL's command line, and their own reward functions,
which are copied, with what they use, into a module beside the configuration: importing a script would train."""

import ast
import builtins
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from grpo_autotune.interop.reading import python_source
from grpo_autotune.interop.reading.files import beside, text_of
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import Translation

PROCESSOR = r"(.*\.)?\w*Processor\.from_pretrained"
LORA = {"r": "lora_r", "target_modules": "lora_target_modules", "task_type": "lora_task_type", "bias": "lora_bias",
        "modules_to_save": "lora_modules_to_save", "target_parameters": "lora_target_parameters"}  # fmt: skip
NAMES: Mapping[str, Mapping[str, str]] = {  # call -> its arguments in the names of TRL's command line
    r"(.*\.)?(LoraConfig|get_peft_model)": LORA,
    PROCESSOR: {}, r"(.*\.)?PeftModel\.from_pretrained": {"1": "adapter", "model_id": "adapter"},
    r".*\.from_pretrained": {
        "0": "model_name_or_path", "model_name": "model_name_or_path", "revision": "model_revision",
        "pretrained_model_name_or_path": "model_name_or_path", "torch_dtype": "dtype",
    },
    r"(.*\.)?load_dataset": {"0": "dataset_name", "path": "dataset_name", "1": "dataset_config",
                             "name": "dataset_config", "split": "dataset_train_split"},
    r"(.*\.)?GRPOTrainer": {"0": "model_name_or_path", "model": "model_name_or_path", "1": "reward_funcs"},
    r"(.*\.)?(BitsAndBytes|Model)Config": {}, **{key: {} for key in python_source.OF_PROCESSOR},
    r"(.*\.)?resize": {"0": "resize"},
}  # fmt: skip
FIRST = ("from_pretrained", "BitsAndBytesConfig", "resize")  # of several such calls the first counts, else the last
OBJECTS = ("args", "train_dataset", "eval_dataset", "processing_class", "tokenizer", "peft_config", "callbacks",
           "model", "device_map", "quantization_config", "reward_processing_classes", "optimizers")  # fmt: skip
"""Arguments that hand over what other calls made."""
FILES = ("json", "csv", "parquet")  # first argument of `load_dataset` where `data_files` names the data
LIGHT = re.compile(r"re\.compile|(int|float|str|len|dict|list|set|tuple|os\.getenv|os\.environ\.get|.*\.(join|format))")
"""Calls that cost nothing."""
CHANGING = (ast.For, ast.While, ast.AugAssign)  # statements after which only a run can tell what a name holds
MESSAGE = re.compile(r"""['"]content['"]""")
MANY_TURNS = ("rollout_func", "environment_factory", "tools")


def is_script(source: Source) -> bool:
    """True for a Python script or notebook, whose calls are the settings."""
    return source.path.suffix in (".py", ".ipynb") and source.program in (None, source.path.name)


def unknown(setting: Setting) -> bool:
    """True for a value that only a run of its program can tell."""
    return isinstance(setting.value, str) and setting.text == setting.value


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
    calls = enumerate(python_source.read(path).called(r"(.*\.)?(GRPOTrainer|load_dataset)"))
    inside = {f"{call.name}({number}).{key}": one for number, call in calls for key, one in call.arguments.items()}
    made = unified(replace(source, settings=inside)).settings
    if not isinstance(getattr(made.get("reward_funcs"), "value", None), list):
        return source
    wanted = ("reward_funcs", "dataset_name", "dataset_config", "dataset_train_split", *MANY_TURNS)
    named = {key: replace(one, file=path.name) for key, one in made.items() if key in wanted}
    given = dict(source.settings)
    for key, one in named.items():  # `load_dataset(script_args.data)` takes the command's own --data
        option = re.fullmatch(r"\w*args\.(\w+)", str(one.text))
        named[key] = given.pop(option[1]) if option and option[1] in given.keys() - named.keys() else one
    return replace(source, settings={**named, **given})


NOT_HANDED_ON = "the script does not hand it to the trainer"
OF_MODEL = ("torch_dtype", "dtype", "attn_implementation", "model_revision", "trust_remote_code")
LOADED = re.compile(r".*\.from_pretrained")
OF_BITS = ("load_in_4bit", "load_in_8bit")


def unread(source: Source) -> dict[str, str]:
    """Settings of a script's `ModelConfig` that do not reach its trainer: its model is loaded by a name alone."""
    given = source.settings
    bits = () if "GRPOTrainer.quantization_config" in given else OF_BITS
    is_read = "model_init_kwargs" in given or not any(key.startswith("ModelConfig.") for key in given)
    made = (key.rpartition(".") for key in takewhile(lambda key: not key.startswith("GRPOTrainer."), given))
    loads = [name for call, _, name in made if LOADED.match(call) and not re.match(PROCESSOR, call)]
    loaded = [NAMES[LOADED.pattern].get(name, name) for name in loads]
    return {} if is_read else {name: NOT_HANDED_ON for name in (*OF_MODEL, *bits) if name not in loaded}


def unified(source: Source) -> Source:
    """Arguments of calls under the names of TRL's command line: of several calls of a kind those of one."""
    groups: dict[str, dict[str, Setting]] = {}
    for key, setting in source.settings.items():
        groups.setdefault(key.rpartition(".")[0], {})[key] = setting
    plain: dict[str, Setting] = {}
    chosen: dict[str, dict[str, Setting]] = {}
    trained = _training_data(source) if sum("load_dataset" in call for call in groups) > 1 else []
    is_over = False
    for group, members in groups.items():
        call = re.sub(r"\(\d+\)$", "", group)
        kind = next((pattern for pattern in NAMES if re.fullmatch(pattern, call)), None)
        is_late = is_over
        is_over = is_over or call.endswith("GRPOTrainer")
        if kind is None:
            is_unused = call == "SamplingParams" and (is_late or "vllm_sampling_params" not in source.settings)
            plain |= {} if is_unused else members
            continue
        if trained and call.endswith("load_dataset"):
            places = [(one.file, one.line) for one in members.values()]
            is_late = not any(file == cell and line in lines for file, line in places for cell, lines in trained)
        named: dict[str, Setting] = {}
        for argument, setting in ((key.rpartition(".")[2], setting) for key, setting in members.items()):
            name = NAMES[kind].get(argument, argument)
            is_said = not (name == "model_name_or_path" and unknown(setting)) and name not in OBJECTS
            is_said = is_said and (kind != PROCESSOR or name in python_source.OF_PROCESSOR)
            named |= {name: setting} if is_said and not name.isdecimal() else {}
        is_of_training = call.endswith("GRPOTrainer") or not is_late
        if named and is_of_training and (kind not in chosen or not call.endswith(FIRST)):
            chosen[kind] = named
    made = {key: setting for named in chosen.values() for key, setting in named.items()}
    return replace(source, settings={**_from_files(made), **plain})


def _from_files(made: dict[str, Setting]) -> dict[str, Setting]:
    split, files = made.get("dataset_train_split"), made.get("data_files")
    if split is not None and isinstance(split.value, list):
        made["dataset_train_split"] = replace(split, value=split.value[0])
    if files is not None and getattr(made.get("dataset_name"), "value", None) in FILES:
        value = files.value.get("train") if isinstance(files.value, dict) else files.value
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, str):
            made["dataset_name"] = replace(files, value=value)
            del made["data_files"]
    return made


def _training_data(source: Source) -> list[tuple[str | None, range]]:
    """Places of the `load_dataset` calls that the trainer's data come from, by the names that were assigned to."""
    path = program(source)
    trees = enumerate(_trees(path) if path else ())
    nodes = [((place, getattr(node, "lineno", 0)), cell, node)
             for place, (cell, tree) in trees for node in ast.walk(tree)]  # fmt: skip
    trainers = [(at, cell, node.keywords) for at, cell, node in nodes
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("GRPOTrainer")]  # fmt: skip
    if not trainers:
        return []
    over, cell, words = max(trainers, key=lambda one: one[0])
    todo: list[tuple[str | None, ast.AST]] = [(cell, word.value) for word in words if word.arg == "train_dataset"]
    made: dict[str, list[tuple[str | None, ast.AST]]] = {}
    for at, cell, node in nodes:
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.Assign) and at <= over):
            for name in _defined(node):
                made.setdefault(name, []).append((cell, node))
    places: list[tuple[str | None, range]] = []
    while todo:
        cell, part = todo.pop()
        for node in ast.walk(part):
            if isinstance(node, ast.Name):
                todo += made.pop(node.id, [])
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_dataset"):
                places.append((cell, range(node.lineno, (node.end_lineno or node.lineno) + 1)))
    return places


def rewards(to: Translation, names: Iterable[Any]) -> list[dict[str, Any]]:
    """Items of `rewards` for functions of a script: imported ones by their module, its own in one that is written."""
    path = program(to.source)
    if path is None:
        return []
    script = _Functions(path)
    items, wanted = [], []
    module = re.sub(r"[\W_]+", "_", path.stem).strip("_").lower() + "_rewards"
    for text in map(str, names):
        if origin := script.origin(text):
            items.append({"name": origin.partition(":")[2] if origin.startswith("trl.rewards") else origin})
        elif text in script.statements:
            wanted.append(text)
            items.append({"name": f"{module}:{text}"})
        else:
            to.warnings.append(f"{to.where('reward_funcs')}: {text} is made where only a run can tell; it is left out")
    if wanted:
        text, missing = script.module(wanted)
        to.files[f"{module}.py"] = text
        if texts := [name for name in wanted if not MESSAGE.search(script.module([name])[0])]:
            what = "completions are lists of messages here, and nothing in it reads their 'content'"
            to.warnings.append(f"{module}.py, {', '.join(texts)}: {what}")
        if missing:
            to.warnings.append(f"{module}.py uses {', '.join(missing)}, which the script makes while it runs: add it")
    return items


def _trees(path: Path) -> Iterator[tuple[str | None, ast.Module]]:
    return ((cell, python_source.parsed(text, path.name)[0]) for cell, text in python_source.cells(path, text_of(path)))


class _Functions:
    """The statements of a script, outside of functions and in the one that trains, by the names that they define."""

    def __init__(self, path: Path) -> None:
        self.body = [statement for _, tree in _trees(path) for statement in _flat(tree.body)]
        self.statements: dict[str, ast.stmt] = {name: one for one in self.body for name in _defined(one)}
        self.changed = {node.id for one in self.body if isinstance(one, CHANGING) for node in _stored(one)}

    def origin(self, text: str) -> str:
        """`module:function` of an imported one, else empty."""
        name, _, attribute = text.rpartition(".")
        statement = self.statements.get(name or attribute)
        for alias in statement.names if isinstance(statement, ast.Import | ast.ImportFrom) else ():
            if (alias.asname or alias.name) == (name or attribute):
                whole = [getattr(statement, "module", None), alias.name, attribute if name else None]
                parts = ".".join(part for part in whole if part).rpartition(".")
                return f"{parts[0]}:{parts[2]}" if parts[0] else ""
        return ""

    def module(self, names: list[str]) -> tuple[str, list[str]]:
        kept: set[int] = set()
        missing: list[str] = []
        todo, met = list(names), set(names)
        while todo:
            name = todo.pop()
            statement = self.statements.get(name)
            if statement is None or name in self.changed or (name not in names and _runs(statement)):
                missing.append(name)
                continue
            kept.add(id(statement))
            used = _used(statement) - met
            todo += sorted(used)
            met |= used
        parts = [node for node in self.body if id(node) in kept]
        imports = [ast.unparse(node) for node in parts if isinstance(node, ast.Import | ast.ImportFrom)]
        others = [ast.unparse(node) for node in parts if not isinstance(node, ast.Import | ast.ImportFrom)]
        return "\n\n\n".join(["\n".join(imports), *others] if imports else others) + "\n", sorted(missing)


def _flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements with those inside of `if`, `with` and `try`, and of a function that trains."""
    for statement in body:
        yield statement
        is_block = isinstance(statement, ast.If | ast.With | ast.Try)
        if is_block or (isinstance(statement, ast.FunctionDef) and "GRPOTrainer(" in ast.unparse(statement)):
            for part in ("body", "orelse", "finalbody"):
                yield from _flat(getattr(statement, part, ()))


def _defined(statement: ast.AST) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        yield from (node.id for node in _stored(statement))


def _stored(statement: ast.AST) -> Iterator[ast.Name]:
    return (node for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


def _used(statement: ast.AST) -> set[str]:
    """Names that a statement reads from around it; those that it makes itself are its own, unless `global`."""
    nodes = list(ast.walk(statement))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    shared = {name for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names}
    local = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {"__name__", *dir(builtins)}
    local |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    local |= {getattr(node, "name", None) or "" for node in nodes if not isinstance(node, ast.alias)}
    local |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return ({node.id for node in names} - local) | shared


def _runs(statement: ast.stmt) -> bool:
    """True for an assignment that calls more than a pattern's compiler: it would load a model or data."""
    calls = [ast.unparse(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return isinstance(statement, ast.Assign | ast.AnnAssign) and not all(map(LIGHT.fullmatch, calls))
