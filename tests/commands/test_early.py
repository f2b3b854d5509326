"""A fast no: a mistake that the configuration or the file system shows is said before any heavy library is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import HEAVY

ROOT = Path(__file__).parents[2]

CONFIG = """
model: {name_or_path: demo}
data: {path: rows.jsonl}
rewards: [{name: "judges:good"}]
"""
JUDGES = "import torch\ndef good(completions, **columns):\n    return [0.5 for _ in completions]\n"

MISTAKES = {
    "no-such-profile": ["probe", "no-such-profile"],
    "nope.yaml": ["train", "nope.yaml"],
    "nope.jsonl": ["train", "--set", "data.path=nope.jsonl"],
    "no split test": ["probe", "--set", "data.split=test"],
    "no split held_out": ["probe", "--set", "data.eval_split=held_out"],
    "./nope": ["serve", "--set", "model.name_or_path=./nope"],
    "Nearest: exact_match": ["search", "--set", "rewards=[{name: exact_mach}]"],
    "judges has no bad": ["train", "--set", "rewards=[{name: 'judges:bad'}]"],
    "needs target_tokens and max_tokens": ["search", "--set", "rewards=[{name: length}]"],
    "speedups: there is no speed-up 'nope'": ["probe", "--set", "speedups=[nope]"],
    "cannot import nowhere for this speedup": ["train", "--set", "speedups=['nowhere:Mine']"],
    "cannot import nowhere for this model": ["serve", "--set", "model.name_or_path=nowhere:mine"],
    "search.knobs.grpo.betta": ["search", "--set", "search={knobs: {grpo.betta: [1]}}"],
    "search.accept.nope": ["train", "--set", "search.accept=[nope]"],
    "--budget": ["search", "--budget", "soon"],
    "grpo.temperature": ["probe", "--set", "grpo.temperature=0"],
    "grpo.use_liger_kernel: true needs the package liger_kernel": ["train", "--set", "grpo.use_liger_kernel=true"],
    "no such script": ["run", "nope.py"],
    "nope.ipynb: this is a notebook, and no script. Give what `jupyter nbconvert": ["run", "nope.ipynb"],
    "there is no speed-up 'missing'": ["run", "--speedups", "missing", "judges.py"],
    "--script nope.py": ["search", "--script", "nope.py"],
    "nowhere": ["report", "nowhere"],
    "unknown key. Use model.dtype.": ["train", "--set", "grpo.torch_dtype=float32"],
}

CHILD = f"""
import json, sys
from grpo_autotune.cli.main import main
ends = []
for words in json.loads(sys.argv[1]):
    code = main(words)
    sys.stderr.write("\\0")
    ends.append([code, sorted({set(HEAVY)!r} & set(sys.modules))])
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_a_mistake_is_said_without_a_heavy_import(tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    (tmp_path / "judges.py").write_text(JUDGES, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", CHILD, json.dumps(list(MISTAKES.values()))]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    ends, errors = json.loads(done.stdout), done.stderr.split("\0")
    for expected, (code, loaded), text in zip(MISTAKES, ends, errors, strict=False):
        line = text.strip().splitlines()[-1]
        assert (code in (2, 3), loaded) == (True, []), line
        assert line.startswith("grpo-autotune: ") and expected in line and len(line) < 400, line
