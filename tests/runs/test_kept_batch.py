"""A run that goes on with another number of processes: its completions per step stay, or one line says what to set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.errors import ConfigError
from grpo_autotune.runs.checkpoints import batch_of, seal
from grpo_autotune.runs.folder import RunFolder
from grpo_autotune.runs.kept_batch import other_batch, with_kept_batch

GRPO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 8}


def config(monkeypatch: pytest.MonkeyPatch, processes: int, **grpo: Any) -> RunConfig:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    settings = [f"grpo.{key}={value}" for key, value in {**GRPO, **grpo}.items()]
    return load_config("demo", [*settings, "grpo.eval_strategy=no"])


def saved(run: Path, processes: int, completions: int, earlier: tuple[int, ...] = ()) -> RunFolder:
    """A run folder with a whole checkpoint of so many processes."""
    checkpoint = run / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(b"0")
    seal(checkpoint, processes, completions, earlier)
    return RunFolder(run)


@pytest.mark.parametrize(
    ("grpo", "before", "now", "kept"),
    [
        ({}, 2, 1, {"gradient_accumulation_steps": 8}),
        ({}, 2, 4, {"gradient_accumulation_steps": 2}),
        ({"gradient_accumulation_steps": 6}, 2, 3, {"gradient_accumulation_steps": 4}),
        ({"steps_per_generation": 8}, 2, 4, {"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
        ({"generation_batch_size": 64}, 2, 1, {"gradient_accumulation_steps": 8}),
    ],
)
def test_accumulation_takes_the_change(
    grpo: dict[str, int], before: int, now: int, kept: dict[str, int], monkeypatch: Any, tmp_path: Path
) -> None:
    earlier = config(monkeypatch, before, **grpo).batch
    folder, said = saved(tmp_path, before, earlier.completions_per_step), []
    changed = with_kept_batch(config(monkeypatch, now, **grpo), folder, said.append)
    assert {key: changed.grpo[key] for key in kept} == kept
    assert changed.batch.completions_per_step == earlier.completions_per_step
    assert changed.batch.generation_batch == earlier.generation_batch
    assert len(said) == 1 and f"{before} rank" in said[0] and "answers are drawn anew" in said[0]
    assert with_kept_batch(changed, folder, said.append) is changed  # it says so once


def test_a_change_of_a_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """2 processes, then 1, then 1 again with the user's own file: it was written for 2."""
    folder = saved(tmp_path, 1, 32, earlier=(2,))
    assert batch_of(folder.checkpoints / "checkpoint-3") == (32, [1, 2])
    assert with_kept_batch(config(monkeypatch, 1), folder, [].append).grpo["gradient_accumulation_steps"] == 8
    again = config(monkeypatch, 2)
    assert with_kept_batch(again, folder, [].append) is again


def test_what_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No checkpoint, one that plain transformers wrote, as many processes, and a batch that the user has changed."""
    one = config(monkeypatch, 1)
    assert with_kept_batch(one, RunFolder(tmp_path / "none"), [].append) is one
    folder = saved(tmp_path / "run", 1, 16)
    assert with_kept_batch(one, folder, [].append) is one
    two = config(monkeypatch, 2, gradient_accumulation_steps=8)
    assert with_kept_batch(two, folder, [].append) is two
    (folder.checkpoints / "checkpoint-3" / "complete.json").write_text('{"world_size": 2, "files": {}}')
    assert with_kept_batch(one, folder, [].append) is one


@pytest.mark.parametrize(
    ("accumulation", "before", "now", "remedy"),
    [
        (1, 3, 2, "Set grpo.per_device_train_batch_size 3 and grpo.gradient_accumulation_steps 2"),
        (2, 2, 5, "Use a number of processes that divides 16"),
    ],
)
def test_one_line_where_accumulation_cannot(
    accumulation: int, before: int, now: int, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    grpo = {"gradient_accumulation_steps": accumulation, "num_generations": 4}
    folder = saved(tmp_path, before, config(monkeypatch, before, **grpo).batch.completions_per_step)
    with pytest.raises(ConfigError, match=remedy) as caught:
        with_kept_batch(config(monkeypatch, now, **grpo), folder, [].append)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_tuned_configuration_on_more_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = other_batch(config(monkeypatch, 4), 1)
    assert sentence is not None and "1 rank and 16 completions" in sentence and "on 4 with 64" in sentence
    assert sentence.endswith("for as many as there set grpo.gradient_accumulation_steps 1")
    assert other_batch(config(monkeypatch, 2, gradient_accumulation_steps=1), 1) is not None
    assert other_batch(config(monkeypatch, 1), 1) is None
