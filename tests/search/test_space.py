"""The space of a search: legal combinations only, every other one explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.errors import ConfigError
from grpo_autotune.knobs import engine_knobs, knobs_of, with_knobs
from grpo_autotune.knobs.apply import SERVER, why_not
from grpo_autotune.search.space import points, space
from tests.knobs.test_knobs import GROUP, MICRO, config, machine
from tests.support.sample_records import demo_record, trainer_facts


def searching(knobs: dict[str, Any], accept: list[str] | None = None, **grpo: Any) -> RunConfig:
    return config({"search": {"knobs": knobs, "accept": accept or []}}, **grpo)


def test_points_are_legal_distinct_and_begin_with_the_users_own() -> None:
    user, here = load_config("demo"), machine()
    found = space(user, here)
    every = list(points(found, user, here))
    assert every[0] == found.baseline
    assert with_knobs(user, every[0]) == user
    assert len(every) == len({repr(point) for point in every}) > 50
    for point in every:
        assert why_not(user, point, here) is None
        assert with_knobs(user, point).batch.completions_per_step == user.batch.completions_per_step
    changes = [sum(point[key] != found.baseline[key] for key in found.keys) for point in every]
    assert changes == sorted(changes), "one change before two"


def test_the_default_space_holds_what_the_design_says() -> None:
    user = config({"data": {"path": "p", "image_size": 512, "columns": {"image": "picture"}}})
    found = space(user, machine())
    assert {"data.image_size", GROUP, MICRO, "grpo.gradient_checkpointing", "model.attn_implementation"} <= set(
        found.keys
    )
    assert not {"grpo.beta", "peft.r", "grpo.max_completion_length"} & set(found.keys), (
        "learning knobs wait to be named"
    )
    assert set(found.values["data.image_size"]) == {512, 256, 320, 384}


def test_a_probe_tells_the_size_of_images_that_are_left_as_they_are() -> None:
    user = config({"model": {"name_or_path": "demo"}})
    assert "data.image_size" not in space(user, machine()).keys
    found = space(user, machine(), demo_record())
    assert found.values["data.image_size"] == (None, 192, 224, 288)


def test_the_user_restricts_and_extends() -> None:
    user = searching({GROUP: None, MICRO: [2, 4, 8], "grpo.beta": [0.0, 0.04]}, accept=["peft.r"])
    found = space(user, machine())
    assert GROUP not in found.keys
    assert found.values[MICRO] == (4, 2, 8)
    assert found.values["grpo.beta"] == (0.0, 0.04)
    assert found.values["peft.r"] == (8, 4, 16)


def test_the_kernel_that_transformers_chose_is_the_users_own_by_any_name() -> None:
    kernel = "model.attn_implementation"
    user = searching({kernel: ["eager", "sdpa"]})
    for record in (None, demo_record()):
        assert space(user, machine(), record).values[kernel] == (None, "eager")
    record = demo_record(trainer=trainer_facts(attn_implementation="eager"))
    assert space(user, machine(), record).values[kernel] == (None, "sdpa")


def test_a_restriction_that_leaves_the_users_own_out_is_kept() -> None:
    user, here = searching({MICRO: [2, 8]}), machine()
    assert {point[MICRO] for point in points(space(user, here), user, here)} == {2, 8}


@pytest.mark.parametrize("section", ["knobs", "accept"])
def test_an_unknown_knob_is_refused_with_the_nearest(section: str) -> None:
    search = {section: {"data.img_size": [256]} if section == "knobs" else ["data.img_size"]}
    with pytest.raises(ConfigError, match=rf"search.{section}.*data.img_size.*Nearest: data.image_size"):
        space(config({"search": search}), machine())


def test_an_empty_space_names_the_rule() -> None:
    with pytest.raises(ConfigError, match=r"no combination of these knobs is legal.*multiple of num_generations"):
        space(searching({GROUP: [7, 9]}), machine())
    with pytest.raises(ConfigError, match=r"no combination.*flash_attention_2 needs an NVIDIA GPU"):
        space(searching({"model.attn_implementation": ["flash_attention_2"]}), machine())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({MICRO: []}, "a knob needs a value"),
        ({MICRO: ["many"]}, "'many' is not accepted"),
        ({"data.image_size": [0]}, "at least 1"),
        ({"vllm.gpu_memory_utilization": [1.5]}, "at most 1"),
        ({"model.attn_implementation": [3]}, "text"),
    ],
)
def test_values_that_no_combination_makes_legal_are_refused_at_once(knobs: dict[str, Any], message: str) -> None:
    key = next(iter(knobs))
    with pytest.raises(ConfigError, match=f"search.knobs.{key}: .*{message}"):
        space(searching(knobs), machine())


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({MICRO: 3}, "the 16 completions per step and device are not a multiple of per_device_train_batch_size 3"),
        ({GROUP: 5}, "the generation batch must be a multiple of num_generations 5"),
        ({"data.image_size": 256}, "the prompts hold no images"),
        ({"grpo.use_vllm": True}, "needs the package vllm"),
        ({"vllm.gpu_memory_utilization": 0.5}, "mean nothing with grpo.use_vllm false"),
        ({"model.attn_implementation": "flash_attention_2"}, "needs an NVIDIA GPU"),
        ({"grpo.dataloader_num_workers": 64}, "more than the 4 cores"),
        ({"grpo.nothing": 1}, "this knob does not exist"),
    ],
)
def test_every_illegal_combination_is_explained_in_one_sentence(knobs: dict[str, Any], reason: str) -> None:
    said = why_not(config(), knobs, machine())
    assert said is not None and reason in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("vllm", "knobs", "reason"),
    [
        ({}, {"vllm.max_num_seqs": 17}, "max_num_seqs 17 is more than the 16 completions of a generation"),
        ({}, {"vllm.max_num_batched_tokens": 8}, "max_num_batched_tokens 8 is less than vllm.max_num_seqs 16"),
        (
            {"max_model_len": 512, "enable_chunked_prefill": False},
            {"vllm.max_num_batched_tokens": 256},
            "256 is less than vllm.max_model_len 512, which needs vllm.enable_chunked_prefill",
        ),
        (
            {"max_model_len": 5000},
            {"vllm.enable_chunked_prefill": False},
            "4096 is less than vllm.max_model_len 5000",
        ),
        ({}, {"vllm.sleep_level": 1}, "vLLM's CPU build has no sleep mode"),
        ({}, {"vllm.gpu_memory_utilization": 0.97}, "leaves no memory to the trainer"),
        ({}, {"vllm.kv_cache_dtype": "fp8"}, "vllm.kv_cache_dtype fp8 needs a GPU"),
        ({}, {"vllm.quantization": "fp8"}, "vllm.quantization fp8 needs a GPU"),
        ({"mode": "server"}, {"vllm.max_num_seqs": 8}, "the server was started with its own"),
        ({"mode": "server"}, {"vllm.weight_sync": "batched"}, "vllm.weight_sync batched to a server needs a GPU"),
    ],
)
def test_what_an_engine_refuses_is_never_run(vllm: dict[str, Any], knobs: dict[str, Any], reason: str) -> None:
    said = why_not(config({"vllm": vllm}, use_vllm=True), knobs, machine())
    assert said is not None and reason in said and "\n" not in said


@pytest.mark.parametrize(
    ("vllm", "gpus", "knobs", "reason"),
    [
        ({}, 1, {SERVER: 1}, "1 of the 1 GPUs here would serve, and 1 must be left to train on"),
        ({}, 4, {SERVER: 0}, "0 of the 4 GPUs here would serve"),
        ({"weight_sync": "merged"}, 0, {SERVER: 0}, "all weights are sent over NCCL"),
        ({}, 4, {SERVER: 2, "vllm.sleep_level": 1}, "means nothing to a server"),
        ({}, 4, {SERVER: 2, "vllm.max_num_seqs": 17}, "more than the 16 completions of a generation"),
        ({}, 4, {SERVER: 3}, None),
        ({}, 0, {SERVER: 0}, None),
        ({}, 4, {SERVER: 3, "vllm.gpu_memory_utilization": 0.5}, "means nothing to a server"),
        ({"gpu_memory_utilization": 0.97}, 4, {SERVER: 3}, None),
        ({"gpu_memory_utilization": 0.97, "server_gpus": 1}, 4, {SERVER: None}, "leaves no memory to the trainer"),
        ({"tensor_parallel_size": 2}, 4, {SERVER: 1}, "2 GPUs would share one engine, and the server has 1"),
        ({"weight_sync": "merged"}, 4, {SERVER: 3}, None),
        ({"server_gpus": 2}, 4, {SERVER: None, "vllm.sleep_level": 1}, None),
    ],
)
def test_where_a_server_may_stand(
    vllm: dict[str, Any], gpus: int, knobs: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(engine_knobs, "installed", lambda package: True)
    said = why_not(config({"vllm": vllm}, use_vllm=True), knobs, machine(gpus))
    assert said is None if reason is None else reason in str(said)


def test_an_image_that_the_processor_enlarges_again_saves_nothing(tmp_path: Path) -> None:
    bounds = {"image_processor": {"size": {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(bounds))
    data = {"path": "p", "image_size": 512, "columns": {"image": "picture"}}
    user = config({"model": {"name_or_path": str(tmp_path)}, "data": data})
    assert why_not(user, {"data.image_size": 256}, machine()) is None
    assert "enlarges images below 256 x 256" in str(why_not(user, {"data.image_size": 255}, machine()))


def test_ways_to_sync_need_what_they_send() -> None:
    whole = config({"peft": None}, use_vllm=True)
    assert "there is no adapter to send" in str(why_not(whole, {"vllm.weight_sync": "adapter"}, machine()))
    packed = config({"model": {"random_init": "qwen3-0.6b", "load_in_4bit": True}}, use_vllm=True)
    assert "in weights of 4 bits" in str(why_not(packed, {"vllm.weight_sync": "merged"}, machine(1)))
    quantized = {"vllm.quantization": "fp8"}
    assert "needs vllm.weight_sync adapter" in str(why_not(config(use_vllm=True), quantized, machine(1)))
    adapter = {**quantized, "vllm.weight_sync": "adapter"}
    assert why_not(config(use_vllm=True), adapter, machine(1)) is None
    assert "take no new ones" in str(why_not(config(use_vllm=True), {**adapter, "vllm.sleep_level": 2}, machine(1)))
    own = config({"vllm": {"quantization": "fp8", "weight_sync": "adapter"}}, use_vllm=True)
    assert "take none" in str(why_not(own, {"vllm.weight_sync": "batched"}, machine(1)))
    assert "take no new ones" in str(why_not(own, {"vllm.sleep_level": 2}, machine(1)))
    served = {"vllm.server_gpus": 1}
    assert "takes no weights of a base in 4 bits" in str(why_not(packed, served, machine(2)))


def test_an_engine_that_its_share_cannot_hold_is_not_run() -> None:
    """Qwen3-0.6B in bfloat16: 1.1 GiB of weights, and 112 KiB a token of keys and values."""
    user, gpu = config({"vllm": {"gpu_memory_utilization": 0.5}}, use_vllm=True), machine(1)
    assert why_not(user, {"vllm.gpu_memory_utilization": 0.3}, gpu) is None
    said = str(why_not(user, {"vllm.gpu_memory_utilization": 0.05}, gpu))
    assert said.startswith("vllm.gpu_memory_utilization 0.05 is 4.0 GiB, and the engine needs")
    assert "weights 1.1" in said and "one request of 40960 tokens 4.4" in said
    short = config({"vllm": {"gpu_memory_utilization": 0.5, "max_model_len": 1024}}, use_vllm=True)
    assert why_not(short, {"vllm.gpu_memory_utilization": 0.05}, gpu) is None


def test_images_are_no_reason_against_vllm() -> None:
    seeing = config({"data": {"path": "p", "columns": {"image": "image"}}})
    assert "images" not in str(why_not(seeing, {"grpo.use_vllm": True}, machine(1)))


def test_missing_extras_are_named_where_the_machine_could(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = machine(gpus=1)
    assert "flash-attn, which is not installed" in str(
        why_not(config(), {"model.attn_implementation": "flash_attention_2"}, gpu)
    )
    hub = {"model.attn_implementation": "kernels-community/flash-attn2"}
    assert "needs the package kernels" in str(why_not(config(), hub, gpu))
    third = {"model.attn_implementation": "flash_attention_3"}
    assert "flash-attn-3, which is not installed" in str(why_not(config(), third, gpu))
    assert "vllm, which is not installed" in str(why_not(config(), {"grpo.use_vllm": True}, gpu))


def test_the_users_own_values_are_never_questioned() -> None:
    user = config({"model": {"random_init": "qwen3-0.6b", "attn_implementation": "flash_attention_2"}})
    assert why_not(user, knobs_of(user, ["model.attn_implementation"]), machine()) is None
