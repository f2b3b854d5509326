"""The rules of the layout, checked on the source: layers, sizes, handlers, and what an import may load."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tools.architecture import tree

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "grpo_autotune"

LAYERS = (
    ("errors",),
    ("files", "units", "processes"),
    ("console",),
    ("records", "registry", "hardware", "seams"),
    ("config", "speedups"),
    ("rollout", "runs", "interop"),
    ("probe", "estimate"),
    ("knobs", "train"),
    ("predict", "scripts", "trained"),
    ("advice",),
    ("report",),
    ("search", "trials"),
    ("render", "doctor", "demo"),
    ("commands",),
    ("cli", "plugin"),
)
"""Rooms of the package, from the ground up: a room imports only from those below its own row."""
FLOORS = {
    "commands": (
        ("early", "imports", "page", "probe", "serve", "sweep"),
        ("checkpoints", "compare", "data", "doctor", "infer", "ladder", "merge", "plan", "run", "search"),
        ("train", "watch"),
        ("interop",),
    ),
    "config": (
        ("addresses", "foreign_keys", "renamed_keys", "template_text", "vllm_names"),
        ("messages",),
        ("sections",),
        ("batch", "places", "reward_arguments", "sampling", "sources", "yaml_text"),
        ("registry_file", "zero"),
        ("schema",),
        ("packages",),
    ),
    "interop": (
        ("source",),
        ("reading", "translation"),
        ("adapters", "logs"),
        ("frameworks",),
        ("importing",),
        ("writing",),
    ),
    "rollout": (
        ("options", "failures"),
        ("parts",),
        ("sync", "fidelity"),
        ("server", "metrics"),
        ("colocate",),
    ),
    "speedups": (
        ("base", "selection", "conditions", "selfcheck", "sdpa"),
        ("batches",),
        ("shared_prefix", "generation"),
        ("images",),
        ("reward_overlap", "lora_input", "fused_lora", "step_check"),
        ("install",),
    ),
    "train": (
        ("advantages", "arguments", "branches", "data", "eval_sampling", "models", "resample", "rewards", "runs"),
        ("monitors",),
        ("trainer",),
        ("trial_trainer",),
    ),
    "trials": (("exit_codes", "heartbeat", "block_limit", "endings"), ("child",), ("parent",)),
}
"""Rooms with rooms inside: the same, one level further down."""
ENTRANCES = ("__init__", "__main__")
"""Of the package itself: they may reach for anything, since nothing imports from them."""
HEAVY = ("torch", "transformers", "trl", "vllm", "datasets", "optuna")
MOST_MODULES = 20


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(dotted: str, depth: int = 1) -> str:
    """`grpo_autotune.train.data.images` -> `train`; with depth 2 -> `data`."""
    parts = dotted.split(".")
    return parts[depth] if len(parts) > depth else ""


def dotted_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def package_of(path: Path) -> str:
    return dotted_name(path) if path.name == "__init__.py" else dotted_name(path).rpartition(".")[0]


NAMES = {dotted_name(path) for path in modules()}


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
            whole = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if base == "grpo_autotune" or name in NAMES else base for name in whole)


@cache
def imports() -> tuple[tuple[str, str], ...]:
    """Pairs of modules of this package: who imports, and what."""
    return tuple(
        (dotted_name(path), name)
        for path in modules()
        for name in imported_names(tree(path), package_of(path))
        if name.startswith("grpo_autotune.")
    )


REFERENCE = re.compile(r"grpo_autotune(\.\w+)+(:\w+(\.\w+)*)?")


def texts(tree: ast.AST) -> Iterator[str]:
    """Modules that a text names, `package.module` or `package.module:name`; docstrings are left out."""
    silent = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            name = node.value.partition(":")[0]
            if REFERENCE.fullmatch(node.value) and name in NAMES:
                yield name


@cache
def named_by_text() -> tuple[tuple[str, str], ...]:
    """Pairs of modules of this package: who names one in a text, and which."""
    speakers = {dotted_name(path): path for path in modules() if room(dotted_name(path)) not in (*ENTRANCES, "")}
    return tuple((name, named) for name, path in speakers.items() for named in texts(tree(path)))


def level_of(name: str, floors: tuple[tuple[str, ...], ...] = LAYERS) -> int | None:
    return next((level for level, names in enumerate(floors) if name in names), None)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_room_has_its_place() -> None:
    homeless = {room(dotted_name(path)) for path in modules() if level_of(room(dotted_name(path))) is None}
    assert homeless == set(ENTRANCES)
    for outer, floors in FLOORS.items():
        inside = {room(name, 2) for name in NAMES if room(name) == outer} - {""}
        assert inside == {name for floor in floors for name in floor}, outer
    nested = {room(name) for name in NAMES if name.count(".") > 2}
    assert nested == set(FLOORS)


def test_imports_go_strictly_down() -> None:
    wrong = []
    for importer, imported in imports():
        own, other = room(importer), room(imported)
        if own in ENTRANCES or not own:
            continue
        mine, theirs = level_of(own), level_of(other)
        if own != other and (mine is None or theirs is None or theirs >= mine):
            wrong.append(f"{importer} imports {imported}")
        if own == other and own in FLOORS and room(importer, 2) not in ("", room(imported, 2)):
            mine, theirs = (level_of(room(name, 2), FLOORS[own]) for name in (importer, imported))
            if mine is None or theirs is None or theirs > mine:
                wrong.append(f"{importer} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_itself_through_others() -> None:
    above: dict[str, set[str]] = {name: set() for name in NAMES}
    for importer, imported in [*imports(), *named_by_text()]:
        if imported in above and imported != importer:
            above[importer].add(imported)
    try:
        TopologicalSorter(above).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_what_some_rooms_leave_alone() -> None:
    reached: dict[str, set[str]] = {}
    for importer, imported in imports():
        reached.setdefault(room(importer), set()).add(room(imported))
        reached.setdefault(importer, set()).add(room(imported))
    assert reached["render"] <= {"render", "records", "report", "units"}
    assert not reached["search"] & {"probe", "seams", "train", "rollout", "speedups", "trials"}
    assert "search" not in reached["grpo_autotune.commands.train"] | reached["grpo_autotune.commands.probe"]


def test_no_room_is_crowded() -> None:
    crowd = Counter(path.parent for path in modules() if path.stem != "__init__")
    assert not [folder.name for folder, count in crowd.items() if count > MOST_MODULES]


@pytest.mark.parametrize(
    ("line", "package", "found"),
    [
        ("def f():\n    from grpo_autotune.cli import main", "grpo_autotune.train", ["grpo_autotune.cli.main"]),
        ("from grpo_autotune import cli", "grpo_autotune.train", ["grpo_autotune.cli"]),
        ("from ..report import build", "grpo_autotune.train", ["grpo_autotune.report.build"]),
        ("from . import rewards", "grpo_autotune.train", ["grpo_autotune.train.rewards"]),
        ("from ..train import nothing", "grpo_autotune.probe", ["grpo_autotune.train"]),
        ("import grpo_autotune.plugin", "grpo_autotune", ["grpo_autotune.plugin"]),
    ],
)
def test_the_import_reader_sees_every_form(line: str, package: str, found: list[str]) -> None:
    assert list(imported_names(ast.parse(line), package)) == found


def test_the_reader_of_texts_sees_references_and_no_docstring() -> None:
    source = (
        '"""grpo_autotune.cli"""\nA = "grpo_autotune.cli:main"\nB = f"{A} grpo_autotune.cli", "grpo_autotune.errors"'
    )
    assert list(texts(ast.parse(source))) == ["grpo_autotune.cli", "grpo_autotune.errors"]
    assert ("grpo_autotune.registry", "grpo_autotune.speedups.reward_overlap") in set(named_by_text())


def test_no_drawer_for_odds_and_ends() -> None:
    assert not [path for path in modules() if {"utils", "util", "helpers", "misc", "common"} & set(path.parts)]
    assert not [path for path in modules() if path.stem in {"utils", "util", "helpers", "misc", "common"}]


def test_sizes() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in modules()}
    assert not [f"{path.name}: {length}" for path, length in lengths.items() if length > 400]
    assert statistics.median(length for length in lengths.values() if length > 5) <= 150
    spans = [(node.end_lineno or node.lineno) - node.lineno + 1 for path in modules() for node in functions(tree(path))]
    assert statistics.median(spans) <= 6 and statistics.quantiles(spans, n=10)[-1] <= 20


def test_modules_and_public_functions_tell_their_idea() -> None:
    silent = []
    for path in modules():
        module = tree(path)
        if ast.get_docstring(module) is None:
            silent.append(str(path.relative_to(ROOT)))
        silent += [
            f"{path.relative_to(ROOT)}: {node.name}"
            for node in module.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ]
    assert not silent


def test_nothing_is_caught_blindly() -> None:
    """A handler for everything may only add to the error, and raise, but at three boundaries: to a report, to a user's
    reward and to a trial."""
    swallowed = []
    for path in modules():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
                caught = (
                    {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"all"}
                )
                if caught & {"all", "Exception", "BaseException"}:
                    swallowed.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    boundaries = ["console.py", "train/rewards/remote/timed.py", "trials/child/execute.py"]
    assert [place.rpartition(":")[0] for place in swallowed] == [f"grpo_autotune/{name}" for name in boundaries]


@pytest.mark.slow
@pytest.mark.parametrize(
    "entrance",
    [
        ["-c", "import grpo_autotune"],
        ["-m", "grpo_autotune", "--help"],
        ["-m", "grpo_autotune", "report", "tests/stored"],
    ],
)
def test_import_help_and_a_stored_report_stay_light(entrance: list[str]) -> None:
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
    rooms = {room(name) for name in loaded if name.startswith("grpo_autotune.")}
    assert rooms <= {"cli", "console", "errors", "files", "processes", "records", "render", "report", "units"}
