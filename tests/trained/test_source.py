"""Trained weights by the words a user gives: a run folder, a checkpoint in it, a folder outside of any run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_autotune.commands.serve import is_trained
from grpo_autotune.config.schema import load_config
from grpo_autotune.errors import ConfigError
from grpo_autotune.trained.source import find_trained, find_whole


def adapter(folder: Path, base: str = "base") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for step in (10, 20):
        saved = adapter(run / "checkpoints" / f"checkpoint-{step}")
        (saved / "complete.json").write_text(json.dumps({"files": {"adapter_config.json": 35}}))
        (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
        (saved / "optimizer.pt").write_bytes(b"")
    return run


def test_a_run_folder_is_its_model_and_before_that_its_newest_whole_checkpoint(run: Path) -> None:
    assert find_trained(run).name == "checkpoint-20"
    (run / "checkpoints" / "checkpoint-20" / "adapter_config.json").write_text("{")
    assert find_trained(run).name == "checkpoint-10"
    model = adapter(run / "model")
    trained = find_trained(str(run))
    assert (trained.path, trained.name, trained.run, trained.base) == (model, "model", run, "base")


@pytest.mark.parametrize("words", ["checkpoint-10", "checkpoints/checkpoint-10", "best"])
def test_a_checkpoint_is_named_with_its_folder_or_without_and_by_a_link(run: Path, words: str) -> None:
    (run / "best").symlink_to("checkpoints/checkpoint-10")
    trained = find_trained(run / words)
    assert (trained.name, trained.run) == ("checkpoint-10", run)


def test_a_checkpoint_is_of_its_run_from_within(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, word in ((run / "checkpoints", "checkpoint-10"), (run / "checkpoints" / "checkpoint-10", ".")):
        monkeypatch.chdir(folder)
        trained = find_trained(word)
        assert (trained.path.resolve(), trained.run) == (run / "checkpoints" / "checkpoint-10", run)


def test_a_run_of_several_processes_is_read_by_one(run: Path) -> None:
    text = "{model: {name_or_path: m}, data: {path: d}, rewards: [{name: format}], grpo: {num_generations: 8, %s}}"
    for batch in ("per_device_train_batch_size: 3", "per_device_train_batch_size: 16, generation_batch_size: 8"):
        (run / "config.yaml").write_text(text % batch)
        config = find_trained(run).config
        assert config is not None and config.grpo["num_generations"] == 8
        with pytest.raises(ConfigError, match="multiple of"):
            load_config(run / "config.yaml")


def test_a_folder_outside_a_run_is_taken_as_it_is(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    trained = find_trained(whole)
    assert (trained.run, trained.config, trained.adapter, trained.base) == (None, None, None, None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("nowhere", "there is no folder"),
        ("run/checkpoint-30", "the run has no checkpoint-30"),
        ("run/checkpoint-20", "torn: adapter_config.json has 1 of 35 bytes"),
        ("empty", "neither a model nor an adapter"),
        ("young", "no whole checkpoint and no model"),
        ("broken", "is no JSON"),
        ("of_zero", r"each rank saved its part.*grpo-autotune merge \S+of_zero OUT"),
        ("of_fsdp", "each rank saved its part"),
    ],
)
def test_what_cannot_be_used_is_one_line(run: Path, tmp_path: Path, words: str, told: str) -> None:
    (run / "checkpoints" / "checkpoint-20" / "adapter_config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    (adapter(tmp_path / "broken") / "adapter_config.json").write_text("{")
    for parts in ("of_zero/global_step2", "of_fsdp/pytorch_model_fsdp_0"):
        (tmp_path / parts).mkdir(parents=True)
    assert find_trained(tmp_path / "of_zero").adapter is None
    with pytest.raises(ConfigError, match=told):
        find_whole(tmp_path / words)


@pytest.mark.parametrize("words", ["run", "run/last", "run/best"])
def test_a_run_that_a_rung_began_again_has_its_older_checkpoints(run: Path, words: str) -> None:
    (run / "config.yaml").write_text(
        "{model: {name_or_path: m}, data: {path: d}, rewards: [{name: format}], on_oom: ladder}"
    )
    (run / "checkpoints").rename(run / "checkpoints-before-rung-1")
    place = run.parent / words
    kept = [f"checkpoints-before-rung-1/checkpoint-{step}" for step in (20, 10)]
    assert is_trained(str(place))
    with pytest.raises(ConfigError, match=rf"the run has no .* There are {', '.join(kept)}\.$"):
        find_trained(place)
    assert find_trained(run / kept[0]).run == run
    (run / "checkpoints" / "checkpoint-20").mkdir(parents=True)
    mistyped = run / "checkpoints-before-rung-2" / "checkpoint-20"
    assert is_trained(str(mistyped))
    with pytest.raises(ConfigError, match="the run has no checkpoint-20"):
        find_trained(mistyped)


def test_a_name_typed_wrongly_is_told_the_nearest_link_and_the_checkpoints(run: Path) -> None:
    (run / "best").symlink_to("checkpoints/checkpoint-10")
    with pytest.raises(ConfigError, match=r"the run has no bset\. Nearest: best\."):
        find_trained(run / "bset")
    with pytest.raises(ConfigError, match=r"There are best, checkpoint-20, checkpoint-10\."):
        find_trained(run / "elsewhere")
