"""What the tests of training share: small configurations, rewards that vary, and a child process to kill.

`python -m tests.support.training CONFIG FOLDER...` trains in each folder (`FOLDER+`: resumes there); it exits with the
last code.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_autotune.config.schema import RunConfig

TIMES = (
    "time",
    "step_s",
    "step_time",
    "memory_share",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
)
"""Keys of a log line that no two runs have in common."""

_calls = 0


def uneven(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward with spread in every group; at call `KILL_AT_CALL` of rank `KILL_RANK` it sends itself `KILL_SIGNAL`.
    Each call's prompts are added to the file of its rank that `PROMPTS_TO` names."""
    global _calls
    _calls += 1
    at, rank = os.environ.get("KILL_AT_CALL"), os.environ.get("KILL_RANK", "0")
    if at == str(_calls) and os.environ.get("RANK", "0") == rank:
        os.kill(os.getpid(), int(os.environ["KILL_SIGNAL"]))
    if "PROMPTS_TO" in os.environ:
        with Path(f"{os.environ['PROMPTS_TO']}{os.environ.get('RANK', '0')}").open("a", encoding="utf-8") as file:
            file.write(json.dumps(columns["prompts"]) + "\n")
    return [len(set(ids)) / 8 + (sum(ids) % 7) / 10 for ids in completion_ids]


def arm(monkeypatch: Any, call: int, signum: int) -> None:
    """Make the next run in this process send itself a signal while it computes its `call`-th reward."""
    global _calls
    _calls = 0
    monkeypatch.setenv("KILL_AT_CALL", str(call))
    monkeypatch.setenv("KILL_SIGNAL", str(signum))


def text_config(model: Path, folder: Path, changes: Mapping[str, Any] | None = None, **grpo: Any) -> RunConfig:
    """LoRA on a text model: 8 questions of uneven length, groups of 4, two prompts a step."""
    data = folder / "questions.jsonl"
    lines = [json.dumps({"prompt": f"What is {n} plus {'three ' * (1 + n % 3)}?", "answer": str(n)}) for n in range(8)]
    data.write_text("\n".join(lines), encoding="utf-8")
    return _config({"model": {"name_or_path": str(model)}, "data": {"path": str(data)}}, changes, grpo)


def picture_config(model: Path, folder: Path, changes: Mapping[str, Any] | None = None, **grpo: Any) -> RunConfig:
    """The same on a vision model: four pictures of two sizes."""
    from PIL import Image

    rows = []
    for n in range(4):
        path = folder / f"{n}.png"
        Image.new("RGB", (56 + 28 * (n % 2), 56), (60 * n, 90, 200 - 40 * n)).save(path)
        rows.append(json.dumps({"prompt": f"What is {'here ' * n}?", "image": path.name, "answer": str(n)}))
    data = folder / "pictures.jsonl"
    data.write_text("\n".join(rows), encoding="utf-8")
    return _config({"model": {"name_or_path": str(model)}, "data": {"path": str(data)}}, changes, grpo)


def _config(base: dict[str, Any], changes: Mapping[str, Any] | None, grpo: Mapping[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        **base,
        "peft": {"r": 4, "target_modules": "all-linear"},
        "rewards": [{"name": "tests.support.training:uneven"}],
        "speedups": "none",
        "grpo": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "beta": 0.04,
            "logging_steps": 1,
            "save_steps": 2,
            **grpo,
        },
    }
    for section, keys in (changes or {}).items():
        both = isinstance(keys, Mapping) and isinstance(values.get(section), dict)
        values[section] = {**values[section], **keys} if both else keys
    return RunConfig.from_dict(values)


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of `train_log.jsonl` without what depends on the clock."""
    text = (folder / "train_log.jsonl").read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text.splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log_lines(folder) if line["kind"] == "train"]


def main(config: str, *folders: str) -> int:
    from grpo_autotune.train.trainer import run_training

    code = 0
    for folder in folders:
        run = RunConfig.from_yaml(Path(config).read_text(encoding="utf-8"))
        code = run_training(run, folder.rstrip("+"), resume=folder.endswith("+")).exit_code
        sys.stdout.write(f"{folder} rank {os.environ.get('RANK', '0')} exit code {code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
