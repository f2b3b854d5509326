"""The rules of the layout, checked on the source: layers, sizes, handlers, and what an import may load."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "grpo_autotune"

LAYERS = (
    {"errors"},
    {"config", "registry", "hardware", "seams"},
    {"engine"},
    {"probe", "speedups", "estimate"},
    {"knobs", "interop"},
    {"train"},
    {"search"},
    {"verdict"},
    {"report"},
    {"render", "doctor", "demo"},
    {"commands"},
    {"cli", "plugin"},
)
ENTRANCES = ("__init__", "__main__")
"""Of the package itself: they may reach for anything, since nothing imports from them."""
HEAVY = ("torch", "transformers", "trl", "vllm", "datasets", "optuna")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit(dotted: str) -> str:
    """`grpo_autotune.train.rewards` -> `train`; the modules `config_*` are parts of `config`."""
    name = dotted.split(".")[1]
    return "config" if name.startswith("config_") else name


def dotted_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module of this package that is imported, at the top, inside a function or for type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            if base == "grpo_autotune":
                yield from (f"{base}.{alias.name}" for alias in node.names)
            else:
                yield base


def layer_of(name: str) -> int | None:
    return next((level for level, names in enumerate(LAYERS) if name in names), None)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_module_belongs_to_a_layer() -> None:
    homeless = [path.name for path in modules() if layer_of(unit(dotted_name(path))) is None]
    assert set(homeless) == {f"{name}.py" for name in ENTRANCES}


def test_imports_go_strictly_down() -> None:
    wrong = []
    for path in modules():
        own = unit(dotted_name(path))
        level = layer_of(own)
        if level is None:
            continue
        package = dotted_name(path) if path.name == "__init__.py" else dotted_name(path).rpartition(".")[0]
        for name in imported_names(ast.parse(path.read_text()), package):
            if not name.startswith("grpo_autotune."):
                continue
            target = layer_of(unit(name))
            if unit(name) != own and (target is None or target >= level):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "package", "found"),
    [
        ("def f():\n    from grpo_autotune.cli import main", "grpo_autotune.train", ["grpo_autotune.cli"]),
        ("from grpo_autotune import cli", "grpo_autotune.train", ["grpo_autotune.cli"]),
        ("from ..report import build", "grpo_autotune.train", ["grpo_autotune.report"]),
        ("from . import rewards", "grpo_autotune.train", ["grpo_autotune.train"]),
        ("import grpo_autotune.plugin", "grpo_autotune", ["grpo_autotune.plugin"]),
    ],
)
def test_the_import_reader_sees_every_form(line: str, package: str, found: list[str]) -> None:
    assert list(imported_names(ast.parse(line), package)) == found


def test_no_drawer_for_odds_and_ends() -> None:
    assert not [path for path in modules() if {"utils", "util", "helpers", "misc", "common"} & set(path.parts)]
    assert not [path for path in modules() if path.stem in {"utils", "util", "helpers", "misc", "common"}]


def test_sizes() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in modules()}
    assert not [f"{path.name}: {length}" for path, length in lengths.items() if length > 400]
    assert statistics.median(length for length in lengths.values() if length > 5) <= 150
    spans = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in modules()
        for node in functions(ast.parse(path.read_text()))
    ]
    assert statistics.quantiles(spans, n=10)[-1] <= 40


def test_modules_and_public_functions_tell_their_idea() -> None:
    silent = []
    for path in modules():
        tree = ast.parse(path.read_text())
        if ast.get_docstring(tree) is None:
            silent.append(str(path.relative_to(ROOT)))
        silent += [
            f"{path.relative_to(ROOT)}: {node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ]
    assert not silent


def test_nothing_is_caught_blindly() -> None:
    """A handler for everything may only add to the error, and raise; a trial's boundary is the one exception."""
    swallowed = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
                caught = (
                    {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"all"}
                )
                if caught & {"all", "Exception", "BaseException"}:
                    swallowed.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert [place.rpartition(":")[0] for place in swallowed] == ["grpo_autotune/search/serve.py"]


@pytest.mark.parametrize("entrance", [["-c", "import grpo_autotune"], ["-m", "grpo_autotune", "--help"]])
def test_import_and_help_stay_light(entrance: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *entrance],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "grpo_autotune" in loaded
    assert not loaded & set(HEAVY)
