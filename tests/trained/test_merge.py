"""Merging: what was trained is in the new folder, to the last digits; whatever fails is one line and leaves nothing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from grpo_autotune.cli.main import main
from grpo_autotune.errors import AutotuneError, ConfigError, EnvironmentProblem, MergeError
from grpo_autotune.records.trained import Difference, Merged, Proof
from grpo_autotune.trained import merge as merging
from grpo_autotune.trained import shards
from grpo_autotune.trained.proof import flaw
from grpo_autotune.trained.source import find_trained
from tests.support.adapters import adapted, read_json, rewrite, run_folder, saved_adapter
from tests.support.training import picture_config, text_config

Tiny = Callable[[str], Path]


def merge(place: Path, out: Path, *, dtype: str | None = None, adapter: str | None = None) -> Merged:
    trained = find_trained(place, adapter=adapter)
    return merging.merge(trained, out, dtype=dtype, rows=2, step=lambda what: None)


@pytest.fixture
def llama(tiny: Tiny, tmp_path: Path) -> Path:
    return saved_adapter(tiny("llama"), "lora", tmp_path / "llama")


def fails(kind: type[AutotuneError], told: str, place: Path, out: Path, **options: Any) -> None:
    """Merging is refused in one line, and beside what was there is nothing."""
    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    with pytest.raises(kind, match=told) as refusal:
        merge(place, out, **options)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 380
    assert {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("kind", "shape", "tied"),
    [
        ("qwen2_5_vl", "lora", True),
        ("qwen2_5_vl", "tower", True),
        ("qwen2_5_vl", "head", False),
        ("qwen3_vl", "lora", True),
        ("qwen3_vl", "tower", True),
        ("qwen3_vl", "saved embeddings", False),
        ("qwen3", "rslora", True),
        ("qwen3", "saved head", False),
        ("qwen3", "both ends", True),
        ("qwen3", "tokens", True),
        ("llama", "dora", False),
        ("llama", "bias", False),
    ],
)
def test_merged_is_trained_and_not_base(kind: str, shape: str, tied: bool, tiny: Tiny, tmp_path: Path) -> None:
    receipt = merge(saved_adapter(tiny(kind), shape, tmp_path / "adapter"), tmp_path / "out")
    proof = receipt.proof
    assert proof.base is not None and (proof.dtype, receipt.dtype) == ("float32", "float32")
    assert proof.merged.max <= 1e-4 and proof.base.max >= 10 * proof.merged.max and proof.base.max > 0.05
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in load_file(tmp_path / "out" / "model.safetensors")}
    assert receipt.tied == tied == ("lm_head" not in names)
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] == tied


def test_a_run_s_pictures_prove_and_its_processor_comes_along(tiny: Tiny, tmp_path: Path) -> None:
    elsewhere = {"model": {"attn_implementation": "flash_attention_2"}}  # of the GPU that it was trained on
    run = run_folder(picture_config(tiny("qwen2_5_vl"), tmp_path, elsewhere), tmp_path / "run")
    saved_adapter(tiny("qwen2_5_vl"), "tower", run / "model")
    receipt = merge(run, tmp_path / "out")
    assert receipt.proof.prompts == "2 training prompts" and receipt.base == str(tiny("qwen2_5_vl"))
    names = {"config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "processor_config.json"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_the_command_leaves_a_receipt_with_hashes(
    llama: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / ".out.merging"  # by a process that was killed
    (left / "sub").mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert main(["merge", str(llama), str(tmp_path / "out"), "--rows", "1", "--json"]) == 0
    receipt = Merged.model_validate_json(capsys.readouterr().out)
    assert receipt == Merged.model_validate_json((tmp_path / "out" / "merged.json").read_text())
    assert receipt.proof.prompts == "1 fixed sequences of tokens" and not left.exists()
    places = ((llama, receipt.trained_files), (tiny("llama"), receipt.base_files), (tmp_path / "out", receipt.files))
    for folder, hashes in places:
        assert any(name.endswith(".safetensors") for name in hashes)
        for name, digest in hashes.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert main(["merge", str(llama), str(tmp_path / "out")]) == 2
    assert "there is something here already" in capsys.readouterr().err


def test_a_merge_that_is_not_the_trained_model_fails(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = merging._write

    def broken(model: Any, processor: Any, folder: Path) -> None:
        whole(model, processor, folder)
        name = "model.layers.1.mlp.down_proj.weight"
        weight = load_file(folder / "model.safetensors")[name].clone()
        weight[3] += 0.01
        rewrite(folder / "model.safetensors", {name: weight})

    monkeypatch.setattr(merging, "_write", broken)
    fails(MergeError, "not the trained one: log-probs differ by 0.0", llama, tmp_path / "out")


def test_bfloat16_is_held_to_what_rounding_does(tiny: Tiny, llama: Path, tmp_path: Path) -> None:
    proof = merge(llama, tmp_path / "out", dtype="bfloat16").proof
    assert proof.dtype == "float32" and 1e-4 < proof.merged.max < 0.1 < proof.limit and proof.base is not None
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    faint = saved_adapter(tiny("llama"), "lora", tmp_path / "faint", 1e-5)
    fails(MergeError, "rounding hides what was learned.* try --dtype float32", faint, tmp_path / "no", dtype="bfloat16")


def test_an_adapter_that_learned_nothing_fails(tiny: Tiny, tmp_path: Path) -> None:
    place = saved_adapter(tiny("llama"), "lora", tmp_path / "adapter", 0.0)
    fails(MergeError, r"nothing was learned.* Nothing was written\.$", place, tmp_path / "out", dtype="bfloat16")


def test_one_of_several_adapters(tiny: Tiny, tmp_path: Path) -> None:
    model = adapted(tiny("llama"), "lora")
    model.add_adapter("second", model.peft_config["default"])
    model.save_pretrained(tmp_path / "two")
    assert find_trained(tmp_path / "two").path == tmp_path / "two"
    fails(MergeError, "nothing was learned", tmp_path / "two", tmp_path / "out", adapter="second")
    with pytest.raises(ConfigError, match=r"no adapter third\. Name one with --adapter: default, second"):
        find_trained(tmp_path / "two", adapter="third")


def test_whole_weights_are_copied_and_checked(tiny: Tiny, tmp_path: Path) -> None:
    run = run_folder(text_config(tiny("llama"), tmp_path, {"peft": None}), tmp_path / "run")
    shutil.copytree(tiny("llama"), run / "model")
    fails(MergeError, "nothing was learned", run, tmp_path / "out")
    weights = load_file(tiny("llama") / "model.safetensors")
    tuned = {name: weight + 0.01 * torch.randn_like(weight) for name, weight in weights.items()}
    rewrite(run / "model" / "model.safetensors", tuned)
    proof = merge(run, tmp_path / "out").proof
    assert proof.merged.max == 0 and proof.base is not None and proof.base.max > 0.01
    alone = merge(run / "model" / ".", tmp_path / "alone", dtype="bfloat16")
    assert alone.proof.merged.max > 1e-4
    shutil.move(tmp_path / "run" / "model", tmp_path / "moved")
    assert merge(tmp_path / "moved", tmp_path / "elsewhere").proof.base is None


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_parts_of_fsdp_are_put_together(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as parts
    from peft import get_peft_model_state_dict

    config = text_config(tiny("llama"), tmp_path, {} if kind == "adapter" else {"peft": None})
    run = run_folder(config, tmp_path / "run")
    if kind == "adapter":
        state = get_peft_model_state_dict(adapted(tiny("llama"), "lora"))
    else:
        weights = load_file(tiny("llama") / "model.safetensors")
        state = {name: weight + 0.01 * torch.randn_like(weight) for name, weight in weights.items()}
    saved = run / "checkpoints" / "checkpoint-2"
    writer = parts.FileSystemWriter(saved / "pytorch_model_fsdp_0")
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        parts.save({"model": state}, storage_writer=writer, no_dist=True)
    (saved / "trainer_state.json").write_text("{}")
    receipt = merge(run, tmp_path / "out")
    assert receipt.proof.base is not None and receipt.proof.base.max > 0.01 > 1e-4 > receipt.proof.merged.max
    assert any(name.endswith(".distcp") for name in receipt.trained_files)
    assert not (tmp_path / "out" / merging.PARTS).exists()


def test_parts_of_zero_need_deepspeed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deepspeed.utils.zero_to_fp32", None)
    (tmp_path / "run" / "global_step2").mkdir(parents=True)
    shutil.copy(tiny("llama") / "config.json", tmp_path / "run")
    assert shards.parts_of(tmp_path / "run") == tmp_path / "run" / "global_step2"
    fails(EnvironmentProblem, "read by DeepSpeed. pip install deepspeed", tmp_path / "run", tmp_path / "out")


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({A.replace("layers.0", "layers.7"): torch.ones(4, 64)}, "the model has no .*layers.7"),
        ({A: None}, "the adapter has no .*q_proj.lora_A"),
        ({A: torch.ones(4, 128)}, "size mismatch for .*q_proj.lora_A"),
        ("cut", "the adapter does not fit: Error while"),
        ("gone", "adapter_model.safetensors is missing"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(llama: Path, tmp_path: Path, damage: Any, told: str) -> None:
    weights = llama / "adapter_model.safetensors"
    if damage == "gone":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        rewrite(weights, damage)
    fails(ConfigError, told, llama, tmp_path / "out")


def test_a_base_that_is_gone_and_an_adapter_without_its_name(llama: Path, tmp_path: Path) -> None:
    file = llama / "adapter_config.json"
    values = read_json(file)
    for base, told in ((str(tmp_path / "gone"), "is not a folder with a model"), (None, "does not name its base")):
        file.write_text(json.dumps(values | {"base_model_name_or_path": base}))
        fails(ConfigError, told, llama, tmp_path / "out")


def test_an_adapter_that_peft_cannot_merge(tiny: Tiny, tmp_path: Path) -> None:
    place = saved_adapter(tiny("llama"), "no place", tmp_path / "adapter")
    fails(MergeError, "PEFT cannot merge this adapter: .*no bias", place, tmp_path / "out")


def test_a_full_disk(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_write", full)
        fails(EnvironmentProblem, "the disk is full", llama, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    fails(EnvironmentProblem, r"the merged model takes 428 KiB, and the disk has 1000 B", llama, tmp_path / "out")


@pytest.mark.slow
def test_two_processes_do_not_write_one_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.merging").mkdir()
    handle = os.open(tmp_path / ".out.merging", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    fails(ConfigError, "another process merges into it", llama, tmp_path / "out")
    os.close(handle)


def test_a_place_that_cannot_be_written(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    fails(ConfigError, "something here already", llama, tmp_path / "file")
    fails(EnvironmentProblem, f"cannot be made.*{os.strerror(errno.ENOTDIR)}", llama, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("merged", "base", "told"),
    [
        ((1e-7, 1e-6), (0.1, 1.0), None),
        ((1e-7, 1e-6), None, None),
        ((1e-7, 2e-4), (0.1, 1.0), "not the trained one: log-probs differ by 0.0002 nats, and may by 0.0001"),
        ((1e-7, float("inf")), (0.1, 1.0), "not the trained one"),
        ((1e-6, 1e-5), (9e-6, 9e-5), "rounding hides"),
        ((0.0, 0.0), (0.0, 0.0), "nothing was learned"),
    ],
)
def test_what_a_proof_must_show(
    merged: tuple[float, float], base: tuple[float, float] | None, told: str | None
) -> None:
    kinds = [None if pair is None else Difference(mean=pair[0], max=pair[1]) for pair in (merged, base)]
    assert kinds[0] is not None
    proof = Proof(prompts="1", tokens=1, dtype="float32", limit=1e-4, factor=10, merged=kinds[0], base=kinds[1])
    reason = flaw(proof)
    assert (reason is None) == (told is None) and (told or "") in (reason or "")
