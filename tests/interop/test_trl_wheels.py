"""The table of TRL's defaults against its wheels: `GRPO_AUTOTUNE_TRL_WHEELS` names a folder with them unpacked, each in
a folder `VERSION/trl`."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.interop.frameworks.trl_keys import DEFAULTS, LAST_WITH, defaults

FOLDER = Path(os.environ.get("GRPO_AUTOTUNE_TRL_WHEELS", "/nowhere"))
FILES = ("trainer/base_config.py", "trainer/grpo_config.py")
VERSIONS = sorted((folder.name for folder in FOLDER.glob("*.*.*") if folder.is_dir()), key=lambda v: [*v.split(".")])
pytestmark = pytest.mark.skipif(not VERSIONS, reason="no wheels of TRL at hand")
SPELLED = {"top_k": {None: 0}}


def fields(version: str, files: tuple[str, ...] = FILES) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for file in files:
        path = FOLDER / version / "trl" / file
        tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
        for node in (entry for top in tree.body if isinstance(top, ast.ClassDef) for entry in top.body):
            if not isinstance(node, ast.AnnAssign):
                continue
            value = node.value
            if isinstance(value, ast.Call):
                value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
            try:
                values[ast.unparse(node.target)] = None if value is None else ast.literal_eval(value)
            except ValueError:
                continue
    return values


def release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@pytest.mark.parametrize("version", VERSIONS)
def test_table_has_the_defaults_of_the_wheel(version: str) -> None:
    wheel, table = fields(version), defaults(release(version))
    compared = [key for key in DEFAULTS if key in wheel and not (wheel[key] is None and key.startswith("vllm_gpu"))]
    assert len(compared) > 4
    assert {key: SPELLED.get(key, {}).get(wheel[key], wheel[key]) for key in compared} == {
        key: table[key] for key in compared
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_keys_go_with_the_release_that_the_table_says(version: str) -> None:
    present = fields(version, (*FILES, "trainer/model_config.py", "scripts/utils.py", "scripts/grpo.py"))
    present |= fields(version, ("trainer/utils.py",))
    for last, names in LAST_WITH.items():
        for name in names.split():
            if release(version) > release(last):
                assert name not in present
            elif release(version) == release(last):
                assert name in present
