"""What somebody gets who installs the package instead of cloning the repository, and what the build files promise."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = {"vllm", "bitsandbytes", "requests", "openai", "tenacity", "deepspeed"}
"""Extras, imported only where they are needed."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as built:
        return set(built.namelist())


@pytest.mark.slow
def test_wheel_holds_every_module_and_profile(wheel: set[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grpo_autotune").rglob("*.py")}
    profiles = {f"grpo_autotune/profiles/{path.name}" for path in (ROOT / "profiles").glob("*.yaml")}
    assert profiles and modules | profiles | {"grpo_autotune/py.typed"} <= wheel
    assert not [name for name in wheel if name.startswith(("tests", "docs"))]
    assert [name for name in wheel if name.endswith("licenses/LICENSE")]


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_the_package_leaves_the_choice_of_torch_to_the_user() -> None:
    requirements = [str(line) for line in project()["dependencies"]]  # type: ignore[attr-defined]
    assert not [line for line in requirements if "==" in line]
    assert [line for line in requirements if line.startswith("torch>=")]
    pinned = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==", pinned, re.MULTILINE)


def test_every_import_is_declared_as_a_dependency() -> None:
    declared = {re.split(r"[<>=\[ ;]", str(line))[0] for line in project()["dependencies"]}  # type: ignore[attr-defined]
    providers = importlib.metadata.packages_distributions()
    undeclared = []
    for path in (ROOT / "grpo_autotune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in (
                {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"", "grpo_autotune"}
            ):
                owners = {owner.lower() for owner in providers.get(top, [top])}
                if not owners & (declared | OPTIONAL):
                    undeclared.append(f"{path.relative_to(ROOT)}: {top}")
    assert not undeclared


def test_the_installed_version_is_the_one_written_down() -> None:
    assert importlib.metadata.version("grpo-autotune") == project()["version"]


@pytest.mark.slow
def test_make_help_lists_every_target() -> None:
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    declared = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None
    for target in declared[1].split():
        assert re.search(rf"^make {target} +\w", told, re.MULTILINE), target
