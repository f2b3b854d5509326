"""Random models: they load by path like real ones, every id decodes, and nothing half-written is ever found."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.estimate.architectures import ARCHITECTURES, Architecture, architecture
from grpo_autotune.hardware.seeded import seeded
from grpo_autotune.train.models import random_init
from grpo_autotune.train.models.random_init import (
    FIRST_SPECIAL_ID,
    SPECIAL_TOKENS,
    WORDS,
    build_tokenizer,
    built_once,
    empty_model,
    random_model,
    random_model_path,
    save_random_model,
)
from tests.support.tiny import CONFIGS, TEXTS, VISION_KINDS

MESSAGES = [{"role": "user", "content": "What is shown?"}]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_shapes_have_the_published_number_of_parameters(name: str) -> None:
    row = architecture(name)
    counted = sum(weight.numel() for weight in empty_model(row.config).parameters())
    assert counted / 1e9 == pytest.approx(row.published_parameters, rel=0.02)
    assert row.source.startswith("https://huggingface.co/Qwen/") and row.source.endswith("/config.json")


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model\.random_init: unknown architecture 'qwen3-vl-2B'.*qwen3-vl-2b"):
        architecture("qwen3-vl-2B")


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_model_is_complete_and_names_its_tokens(tiny, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    folder = tiny(kind)
    loader = AutoModelForImageTextToText if kind in VISION_KINDS else AutoModelForCausalLM
    model = loader.from_pretrained(folder)
    tokenizer = getattr(processor := AutoProcessor.from_pretrained(folder), "tokenizer", processor)
    assert type(model).__name__ == CONFIGS[kind]["architectures"][0]
    assert tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    stored = json.loads((folder / "config.json").read_text())
    if kind in VISION_KINDS:
        assert stored["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_a_picture_becomes_as_many_tokens_as_its_grid_says(tiny, picture_rows, kind: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny(kind), padding_side="left")
    content = [{"type": "image", "image": picture_rows[0]["image"]}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    image_tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert image_tokens == int(inputs["image_grid_thw"].prod()) // 4 > 0
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")
    assert text.endswith("<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n")
    with torch.no_grad():
        logits_BTV = AutoModelForImageTextToText.from_pretrained(tiny(kind))(**inputs).logits
    assert torch.isfinite(logits_BTV).all()


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    folders = [
        save_random_model(CONFIGS["qwen3"], tmp_path / str(i), tokenizer=build_tokenizer(TEXTS), seed=i // 2)
        for i in range(3)
    ]
    assert torch.equal(before, torch.get_rng_state())
    first, again, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == again != other


def test_a_seed_of_ours_is_no_seed_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds every GPU, and what forks the host's stream alone does not put theirs back."""
    seeds: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: seeds.append(("all", seed)))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeds.append(("one", seed)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext(seeds.append(("kept", len(devices)))))
    random_model(SMALL)
    with seeded(7, torch.device("cuda", 1)):
        pass
    assert seeds == [("kept", 0), ("kept", 1), ("one", 7)]


def test_a_gpu_in_use_draws_the_weights_where_it_has_room(
    small_architecture: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str] = []

    def save(config: object, folder: Path, *, dtype: str, device: Any = None) -> None:
        places.append(str(device))
        if device is not None and dtype == "float32":
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(random_init, "save_random_model", save)
    random_model_path("small")
    for name, answer in {"is_initialized": True, "current_device": 3, "empty_cache": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    random_model_path("small")
    random_model_path("small", "float32")
    assert places == ["None", "cuda:3", "cuda:3", "None"]


def test_compact_tokenizer_round_trips_any_text() -> None:
    tokenizer = build_tokenizer(TEXTS)
    for text in ("<answer>7</answer>", "Größe → 12 µm", "  two  spaces\n\nand lines"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(tokenizer) - 14, len(tokenizer)))


def test_padded_tokenizer_has_the_real_ids_and_decodes_every_one(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    build_tokenizer(WORDS, vocab_size=151936).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 151936
    assert tokenizer.pad_token_id == FIRST_SPECIAL_ID == 151643
    assert tokenizer.eos_token_id == 151645
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == 151655
    assert None not in tokenizer.convert_ids_to_tokens(list(range(151936)))
    assert tokenizer.decode([100_000, 151_900])
    assert tokenizer.decode(tokenizer("The answer is 42 <|im_end|>").input_ids) == "The answer is 42 <|im_end|>"


def test_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        build_tokenizer(TEXTS, vocab_size=200)


def test_chat_template_takes_strings_and_parts() -> None:
    tokenizer = build_tokenizer(TEXTS)
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is shown?"}]}]
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == tokenizer.apply_chat_template(
        parts, tokenize=False
    )


SMALL = CONFIGS["qwen3"] | {"vocab_size": 2048, "eos_token_id": 2036, "pad_token_id": 2034}


@pytest.fixture
def small_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path))
    monkeypatch.setitem(ARCHITECTURES, "small", Architecture(SMALL, "https://example.org/config.json", 0.0))


def test_random_model_path_builds_once_and_says_so(small_architecture: None) -> None:
    said: list[str] = []
    folder = random_model_path("small", notify=said.append)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert random_model_path("small", notify=said.append) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert len(said) == 1 and "small with random weights" in said[0]
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert random_model_path("small", "float32") != folder


def test_full_disk_is_one_line(small_architecture: None, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1))
    with pytest.raises(EnvironmentProblem, match=r"small needs .* GB of disk .* GRPO_AUTOTUNE_CACHE"):
        random_model_path("small")


def test_a_build_that_fails_leaves_nothing(small_architecture: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(folder: Path) -> None:
        assert (Path(folder) / "model.safetensors").exists()
        raise OSError("no space left on device")

    def without_room(config: object, tokenizer: Any, **options: object) -> Any:
        tokenizer.save_pretrained = disk_full
        return tokenizer

    with monkeypatch.context() as patched:
        patched.setattr(random_init, "build_processor", without_room)
        with pytest.raises(OSError, match="no space left"):
            random_model_path("small")
    folder = random_model_path("small")
    assert (folder / "tokenizer.json").exists()
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def _build(folder: str, log: str) -> None:
    with built_once(Path(folder)) as missing:
        if missing:
            with Path(log).open("a") as lines:
                lines.write("built\n")
            Path(folder).mkdir()


@pytest.mark.slow
def test_of_several_processes_one_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    folder, log = str(tmp_path / "model"), str(tmp_path / "log")
    children = [context.Process(target=_build, args=(folder, log)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0, 0]
    assert Path(log).read_text() == "built\n"
