"""The keys of sections that belong to another library, read from its installed source text.

`GRPOConfig` and `LoraConfig` change with every release, so a copied list would soon be wrong; importing them takes
seconds and loads torch. Reading the class bodies with `ast` gives names, accepted types and defaults as *installed*.
"""

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType

from grpo_autotune.errors import ConfigError, EnvironmentProblem

GRPO_SOURCES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/grpo_config.py", "GRPOConfig"),
)
"""Bases first: a later class overrides annotation and default of an earlier one."""

PEFT_SOURCES = (
    ("peft", "config.py", "PeftConfigMixin"),
    ("peft", "config.py", "PeftConfig"),
    ("peft", "tuners/lora/config.py", "LoraConfig"),
)

ENGINE_SOURCES = (("vllm", "engine/arg_utils.py", "EngineArgs"),)
SAMPLING_SOURCES = (("vllm", "sampling_params.py", "SamplingParams"),)

ANYTHING = "anything"

WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "None": "null",
}
"""Python type that YAML can hold -> its name in a message."""

ALSO_ACCEPTED: Mapping[str, frozenset[str]] = MappingProxyType(
    {"scale_rewards": frozenset({"bool"}), "fsdp": frozenset({"bool", "list"})}
)
"""Key -> types accepted beyond its annotation: GRPOConfig.__post_init__ maps true to "group" and false to "none", and
TrainingArguments._process_fsdp_args takes all three."""

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "importance_sampling_level": ("token", "sequence"),
        "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
        "scale_rewards": ("group", "batch", "none"),
        "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    }
)
"""Key annotated as text -> the texts that TRL's step knows; it refuses others after the first generation
(trl/trainer/grpo_trainer.py, TRL 1.16)."""


@dataclass(frozen=True)
class ForeignKey:
    """One key of another library's configuration class."""

    name: str  # the key, verbatim
    accepts: frozenset[str]  # names of accepted types (keys of `WORDS`), literal values as their `repr`, or `ANYTHING`
    # the default as Python source, for instance `"8"` or `"None"`; None where the class computes it
    default: str | None

    def default_value(self) -> object:
        """The default as a value; None where the class computes it."""
        return None if self.default is None else _value_of(self.default)

    def accepted(self) -> str:
        """The accepted values, in words."""
        order = [WORDS[name] for name in WORDS if name in self.accepts]
        literals = sorted(word for word in self.accepts if word not in WORDS)
        return " or ".join(dict.fromkeys([*literals, *order]))

    def allows(self, value: object) -> bool:
        """Return whether a value read from YAML has an accepted type (a whole number is a number; true is not)."""
        if ANYTHING in self.accepts or repr(value) in self.accepts:
            return True
        if isinstance(value, bool):
            return "bool" in self.accepts
        if isinstance(value, int):
            return bool({"int", "float"} & self.accepts)
        if isinstance(value, (list, tuple)):
            return bool({"list", "tuple"} & self.accepts)
        return ("None" if value is None else type(value).__name__) in self.accepts


@lru_cache(maxsize=1024)
def _value_of(source: str) -> object:
    """A default as a value, cached because a search reads the same ones thousands of times. Mutable defaults do not
    occur: dataclasses take those from factories, whose results the class computes."""
    return ast.literal_eval(source)


@lru_cache(maxsize=4)
def _keys(sources: tuple[tuple[str, str, str], ...]) -> Mapping[str, ForeignKey]:
    """Keys of an installed class, its bases included; raises as `class_in_source`."""
    keys: dict[str, ForeignKey] = {}
    for package, path, class_name in sources:
        fields = (_field(entry) for entry in class_in_source(package, path, class_name).body)
        keys |= {key.name: key for key in fields if key is not None}
    return MappingProxyType(keys)


grpo_keys = partial(_keys, GRPO_SOURCES)
peft_keys = partial(_keys, PEFT_SOURCES)
engine_keys = partial(_keys, ENGINE_SOURCES)
sampling_keys = partial(_keys, SAMPLING_SOURCES)
"""Keys of the installed `GRPOConfig`, `LoraConfig`, `EngineArgs` and `SamplingParams`."""

OWN_GRPO_KEYS = {"advantages": ForeignKey("advantages", frozenset({"'group'", "'rank'"}), "'group'")}  # not TRL's


def check_values(section: str, values: Mapping[str, object], keys: Mapping[str, ForeignKey]) -> None:
    """ConfigError for the first value of a wrong type; unknown keys are left to the caller."""
    for name, value in values.items():
        key = keys.get(name)
        if key is not None and not key.allows(value):
            raise wrong_type(f"{section}.{name}", value, key.accepted())


def wrong_type(where: str, value: object, accepted: str) -> ConfigError:
    """The error for a value of a wrong type."""
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return ConfigError(f"{shown} is not accepted", where=where, fix=f"Accepted: {accepted}.")


def class_in_source(package: str, path: str, class_name: str) -> ast.ClassDef:
    """A class in an installed package's source text; EnvironmentProblem where package or class is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise EnvironmentProblem(f"the package {package} is not installed", fix=f"Install it: pip install {package}.")
    source = Path(spec.origin).parent / path
    tree = ast.parse(source.read_text(encoding="utf-8")) if source.is_file() else ast.Module(body=[], type_ignores=[])
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return node
    fix = "Install the versions that grpo-autotune's package metadata asks for."
    raise EnvironmentProblem(f"{source} has no class {class_name}", fix=fix)


def _field(entry: ast.stmt) -> ForeignKey | None:
    """The key that a class-body line such as `beta: float = field(default=0.0)` declares."""
    if not isinstance(entry, ast.AnnAssign) or not isinstance(entry.target, ast.Name):
        return None
    name, value = entry.target.id, entry.value
    if name.startswith("_"):
        return None
    if isinstance(value, ast.Call):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        init = given.get("init")
        if isinstance(init, ast.Constant) and init.value is False:
            return None
        value = given.get("default")
    accepts = accepted_types(entry.annotation) | ALSO_ACCEPTED.get(name, frozenset())
    if name in CHOICES:
        accepts = accepts - {"str"} | {repr(choice) for choice in CHOICES[name]}
    return ForeignKey(name, accepts, _literal(value))


def _literal(node: ast.expr | None) -> str | None:
    if node is None:
        return None
    text = ast.unparse(node)
    try:
        ast.literal_eval(text)
    except ValueError:
        return None
    return text


def accepted_types(node: ast.expr) -> frozenset[str]:
    """The types and literals of an annotation, as `ForeignKey.accepts` has them. Enumerations are written as text;
    other foreign classes accept anything."""
    if isinstance(node, ast.BinOp):
        accepted = accepted_types(node.left) | accepted_types(node.right)
    elif isinstance(node, ast.Subscript):
        accepted = _subscript(ast.unparse(node.value).rpartition(".")[2], node.slice)
    else:
        name = ast.unparse(node).rpartition(".")[2]
        accepted = frozenset({name} if name in WORDS else {ANYTHING})
    return accepted - {ANYTHING} if "str" in accepted else accepted


def _subscript(outer: str, inner: ast.expr) -> frozenset[str]:
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if outer == "Literal":
        words = {repr(ast.literal_eval(part)) for part in parts}
        # a bracket marks a placeholder, such as "pissa_niter_[number of iters]"
        return frozenset("str" if "[" in word else word for word in words)
    if outer == "Optional":
        return accepted_types(inner) | {"None"}
    if outer == "Union":
        return frozenset().union(*map(accepted_types, parts))
    return frozenset({outer} if outer in WORDS else {ANYTHING})
