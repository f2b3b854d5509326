"""TRL, open-r1, VLM-R1, R1-V and Unsloth to `RunConfig`: batches, defaults by release, traps."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_autotune.config.batch import batch_plan
from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.frameworks import trl, trl_family, trl_keys, trl_script
from grpo_autotune.interop.importing import import_file
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import Translation
from grpo_autotune.records.imported import Imported

BASE = {"model_name_or_path": "m", "dataset_name": "d"}
TRL = {**BASE, "reward_funcs": ["accuracy_reward"]}


def source(framework: str, settings: dict[str, Any], launch: dict[str, Any] | None = None, **more: Any) -> Source:
    lines = {key: Setting(value, line) for line, (key, value) in enumerate(settings.items(), 1)}
    options = {key: Setting(value, 1) for key, value in (launch or {}).items()}
    path = Path(more.pop("path", "grpo.yaml"))
    return Source(framework, path, lines, launch=options, **more)


def imported(translation: Translation, monkeypatch: pytest.MonkeyPatch | None = None) -> Imported:
    """The record, after a check that its configuration loads on the processes it is for."""
    record = translation.finished()
    if monkeypatch is not None:
        monkeypatch.setenv("WORLD_SIZE", str(record.world_size))
    RunConfig.from_dict(record.config)
    return record


def of_trl(settings: dict[str, Any], version: str | None = None) -> Imported:
    return imported(trl.translate(source("trl", {**TRL, **settings}, {"num_processes": 1}), version, None))


def row(record: Imported, key: str) -> Any:
    return next(row for row in record.rows if row.key == key)


BATCHES = {
    # worked examples: framework, settings, launcher -> G, D, pd, GA, steps per generation, prompts, optimizer steps
    "open-r1 demo": (
        "open-r1", {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "num_generations": 16},
        {"num_processes": 7}, (16, 7, 16, 4, 4, 28, 1.0),
    ),
    "open-r1 codeforces": (
        "open-r1", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 32, "num_generations": 16},
        {"num_processes": 8}, (16, 8, 4, 32, 32, 64, 1.0),
    ),
    "VLM-R1": (
        "vlm-r1", {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 8},
        {"nproc_per_node": 8, "nnodes": 1}, (8, 8, 8, 2, 1, 8, 0.5),
    ),
    "R1-V": (
        "r1-v", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_generations": 8},
        {"nproc_per_node": 2}, (8, 2, 8, 2, 1, 2, 0.5),
    ),
    "Unsloth": (
        "unsloth", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_generations": 2}, {},
        (2, 1, 2, 1, 1, 1, 1.0),
    ),
    "Unsloth, whole groups over the accumulation": (
        "unsloth", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_generations": 4}, {},
        (4, 1, 1, 4, 4, 1, 1.0),
    ),
    "TRL, two nodes": (
        trl, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8},
        {"nproc_per_node": 4, "nnodes": 2}, (8, 8, 2, 4, 8, 16, 2.0),
    ),
    "TRL, generation batch": (
        trl, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "generation_batch_size": 32},
        {"num_processes": 2}, (8, 2, 2, 4, 8, 4, 2.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("example", BATCHES, ids=list(BATCHES))
def test_batch_of_a_worked_example(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings, launch, expected = BATCHES[example]
    framework, module = (kind, trl_family) if isinstance(kind, str) else ("x", kind)
    rewards = {"reward_funcs": ["accuracy_reward"]} if kind in (trl, "unsloth") else {}
    rewards |= {"lora_r": 16} if kind == "unsloth" else {}
    path = tmp_path / ("train.py" if kind == "unsloth" else "grpo.yaml")
    path.write_text("from trl.rewards import accuracy_reward")
    translation = module.translate(source(framework, {**BASE, **rewards, **settings}, launch, path=path), None, None)
    record = imported(translation, monkeypatch)
    grpo = record.config["grpo"]
    assert expected == (
        grpo["num_generations"], record.world_size, grpo["per_device_train_batch_size"],
        grpo["gradient_accumulation_steps"], grpo["steps_per_generation"], record.numbers["P"],
        record.steps_per_rollout,
    )  # fmt: skip
    plan = batch_plan(grpo)
    assert plan.completions_per_step == record.numbers["C"]
    assert plan.prompts_per_generation == record.numbers["P"]


@given(
    group=st.integers(2, 16), prompts=st.integers(1, 16), steps=st.integers(1, 8), ranks=st.sampled_from([1, 2, 4, 8]),
    version=st.sampled_from(["0.14.0", "0.15.2", "0.17.0", "0.18.0", "0.22.2", "1.16.0"]), passes=st.integers(1, 3),
)  # fmt: skip
def test_any_batch_keeps_its_completions(
    group: int, prompts: int, steps: int, ranks: int, version: str, passes: int
) -> None:
    """TRL's own arithmetic on the result gives the completions of an optimizer step and of a rollout of the source."""
    counts_prompts, each_micro_step = version.startswith("0.14"), version < "0.18"
    per_device = prompts if counts_prompts else prompts * group
    settings = {
        **TRL, "per_device_train_batch_size": per_device, "gradient_accumulation_steps": steps,
        "num_generations": group, "num_iterations": passes,
    }  # fmt: skip
    record = trl.translate(source("trl", settings, {"num_processes": ranks}), version, None).finished()
    keys = record.config["grpo"]
    per_step = keys["per_device_train_batch_size"] * ranks * keys["gradient_accumulation_steps"]
    per_rollout = keys["per_device_train_batch_size"] * ranks * keys["steps_per_generation"]
    assert per_step == prompts * group * ranks * steps
    assert per_rollout == prompts * group * ranks * (1 if each_micro_step else steps)
    assert keys["num_iterations"] == passes and keys["num_generations"] == group


LOSSES = {
    "0.14.0": ("grpo", 0.04, 0.9, 50), "0.16.1": ("bnpo", 0.04, 0.9, 50), "0.18.0": ("bnpo", 0.04, 1.0, 0),
    "0.20.0": ("bnpo", 0.0, 1.0, 0), "0.22.2": ("dapo", 0.0, 1.0, 0), "1.16.0": ("dapo", 0.0, 1.0, 0),
}  # fmt: skip


@pytest.mark.parametrize("version", LOSSES)
def test_defaults_of_a_release_are_written_where_trl_differs(version: str) -> None:
    grpo = of_trl({"per_device_train_batch_size": 8}, version).config["grpo"]
    values = {name: grpo.get(name, grpo_keys()[name].default_value()) for name in grpo_keys()}
    assert (values["loss_type"], values["beta"], values["temperature"], values["top_k"]) == LOSSES[version]
    assert values["max_completion_length"] == (512 if version == "1.16.0" else 256)
    if values["beta"]:
        assert grpo["use_bias_correction_kl"] is False


def test_the_newest_release_has_the_installed_defaults() -> None:
    newest = trl_keys.defaults(trl_keys.NEWEST)
    differing = {
        name: (newest[name], key.default_value())
        for name, key in grpo_keys().items()
        if newest[name] != key.default_value()
    }
    assert differing == {}


@pytest.mark.parametrize(
    ("settings", "hints", "asked", "version"),
    [
        ({}, {}, None, "TRL 1.16"),
        ({}, {}, "0.17.0", "TRL 0.17.0"),
        ({}, {"trl": "0.22.2"}, None, "TRL 0.22.2"),
        ({"max_prompt_length": 512}, {}, None, "TRL 0.27"),
        ({"vllm_device": "auto", "max_prompt_length": 512}, {}, None, "TRL 0.17"),
        ({"torch_dtype": "bfloat16"}, {}, None, "TRL 0.26"),
    ],
)
def test_release_by_question_pin_or_keys(settings: dict, hints: dict, asked: str | None, version: str) -> None:
    one = source("trl", {**TRL, **settings}, {"num_processes": 8}, hints=hints)
    assert trl.translate(one, asked, None).version == version


def test_a_recipe_with_keys_that_the_pinned_release_has_not() -> None:
    for settings, version in (({}, "TRL 0.18.0"), ({"vllm_device": "auto"}, "TRL 0.17"), ({"x": 1}, "TRL 0.18.0")):
        one = source("open-r1", {**BASE, **settings}, {"num_processes": 8})
        assert trl_family.translate(one, None, None).version == version
    assert trl_family.translate(one, "0.15.2", None).version == "TRL 0.15.2"


@pytest.mark.parametrize(("version", "fails"), [("0.9.6", "has no GRPO"), ("new", "no version of TRL")])
def test_release_that_is_none(version: str, fails: str) -> None:
    with pytest.raises(ConfigError, match=fails):
        trl.translate(source("trl", TRL), version, None)


@pytest.mark.parametrize(
    ("key", "value", "verdict", "targets"),
    [
        ("warmup_ratio", 0.1, "converted", {"grpo.warmup_steps": 0.1}),
        ("torch_dtype", "bfloat16", "same", {"model.dtype": "bfloat16"}),
        ("max_prompt_length", 300, "converted", {"data.max_prompt_tokens": 300, "data.prompt_overflow": "left"}),
        ("scale_rewards", False, "same", {"grpo.scale_rewards": "none"}),
        ("evaluation_strategy", "no", "same", {"grpo.eval_strategy": "no"}),
        ("lora_r", 64, "same", {}),  # inert: use_peft is off
        ("vllm_gpu_memory_utilization", 0.5, "same", {}),  # inert: vLLM is off
        ("dataset_test_split", "dev", "same", {}),  # inert: no evaluation
        ("hub_model_id", "me/it", "none", {}),
        ("load_in_8bit", True, "none", {}),
        ("no_such_key", 1, "none", {}),
        ("output_dir", "$(pwd)/runs/it", "converted", {"output.dir": "runs/it"}),
        ("ds3_gather_for_generation", False, "speed", {}),
        ("gradient_checkpointing", 0, "same", {"grpo.gradient_checkpointing": False}),
        ("bf16", "yes", "same", {"grpo.bf16": True}),
        ("lr_scheduler_type", "transformers.SchedulerType.COSINE", "same", {"grpo.lr_scheduler_type": "cosine"}),
        ("config", "recipe.yaml", "same", {}),
    ],
)
def test_verdict_of_a_key(key: str, value: Any, verdict: str, targets: dict[str, Any]) -> None:
    one = row(of_trl({key: value}), key)
    assert (one.kind, one.to) == (verdict, targets)
    assert one.line == len(TRL) + 1


def test_weights_are_in_32_bits_where_a_command_says_nothing() -> None:
    assert of_trl({}).config["model"]["dtype"] == "float32"
    assert of_trl({"model_init_kwargs": {"dtype": "bfloat16"}}).config["model"]["dtype"] == "bfloat16"


def test_adapter_of_a_command_line() -> None:
    record = of_trl({"use_peft": True, "lora_target_modules": ["all-linear"]})
    assert record.config["peft"] == {
        "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "task_type": "CAUSAL_LM", "target_modules": "all-linear"
    }  # fmt: skip


def test_further_keys_of_sampling_win_over_the_plain_ones() -> None:
    further = {"top_k": 50, "do_sample": True, "pad_token_id": "tokenizer.pad_token_id", "typical_p": 0.9}
    record = of_trl({"top_k": 3, "generation_kwargs": further})
    assert record.config["grpo"]["top_k"] == 50 and row(record, "generation_kwargs").kind == "converted"
    assert record.config["grpo"]["generation_kwargs"] == {"do_sample": True, "typical_p": 0.9}
    empty = {"temperature": None, "top_k": -1, "typical_p": 0.9}
    grpo = of_trl({"generation_kwargs": empty, "temperature": 0.9, "top_k": 3}).config["grpo"]
    assert (grpo["temperature"], grpo["top_k"], grpo["generation_kwargs"]) == (0.9, 0, {"typical_p": 0.9})
    record = of_trl({"generation_kwargs": {"temperature": 0.3, "max_new_tokens": 9}, "temperature": 0.9})
    assert record.config["grpo"]["temperature"] == 0.3 and "generation_kwargs" not in record.config["grpo"]
    assert "max_new_tokens: Use" in row(record, "generation_kwargs").why
    assert row(record, "generation_kwargs").kind == "changes" and row(record, "temperature").to == {}
    assert row(of_trl({"generation_kwargs": "top_k=5"}), "generation_kwargs").kind == "none"


@pytest.mark.parametrize(("bf16", "dtype", "kind"), [(False, "float32", "changes"), (None, "float32", "same"),
                                                      (False, "float16", "same")])  # fmt: skip
def test_type_that_4_bits_are_computed_in(bf16: bool | None, dtype: str, kind: str) -> None:
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "torch.float16", "use_peft": True, "dtype": dtype}
    assert row(of_trl({**four, **({} if bf16 is None else {"bf16": bf16})}), "bnb_4bit_compute_dtype").kind == kind


def test_adapter_in_words_of_the_command_line_and_of_peft() -> None:
    record = of_trl({"use_peft": 1, "lora_task_type": "TaskType.CAUSAL_LM"})
    assert record.config["peft"]["task_type"] == "CAUSAL_LM"


def test_commas_between_layers_are_part_of_their_names() -> None:
    record = of_trl({"use_peft": True, "lora_target_modules": ["q_proj,", "v_proj"]})
    one = row(record, "lora_target_modules")
    assert one.kind == "changes" and one.to == {"peft.target_modules": ["q_proj", "v_proj"]}
    assert "['v_proj'] alone" in record.warnings[-1]


def test_engine_of_old_releases() -> None:
    settings = {"use_vllm": True, "vllm_max_model_len": 2048, "vllm_device": "cuda:1"}
    record = of_trl({**settings, "per_device_train_batch_size": 8}, "0.15.2")
    assert record.config["vllm"] == {"max_model_len": 2048, "server_gpus": 1, "gpu_memory_utilization": 0.9}
    assert record.config["grpo"]["vllm_importance_sampling_correction"] is False
    assert record.config["grpo"].get("top_k", 0) == 0
    server = of_trl({"use_vllm": True, "vllm_gpu_memory_utilization": 0.7}, "0.18.0")
    assert server.config["vllm"] == {"mode": "server"}
    assert of_trl({"use_vllm": True}, "0.16.1").config["vllm"] == {"mode": "server", "server_timeout": 120.0}
    assert "vllm" not in of_trl({"use_vllm": True}, "1.16.0").config


def test_names_of_rewards() -> None:
    names = ["think_format_reward", "get_soft_overlong_punishment", "my.rewards.short"]
    record = of_trl({"reward_funcs": names, "reward_weights": [1, 0.5, 2]})
    assert [(item["name"], item["weight"]) for item in record.config["rewards"]] == [
        ("think_format_reward", 1.0), ("soft_overlong_punishment", 0.5), ("my.rewards:short", 2.0)
    ]  # fmt: skip
    assert record.config["rewards"][1]["params"] == {"max_completion_len": 1280, "soft_punish_cache": 256}


def test_mixture_of_data() -> None:
    settings = {key: value for key, value in TRL.items() if key != "dataset_name"}
    one = source("trl", {**settings, "datasets": [{"path": "a"}, {"path": "b", "split": "dev"}]}, {"num_processes": 1})
    data = imported(trl.translate(one, None, None)).config["data"]
    assert data["mix"] == {"part1": {"path": "a"}, "part2": {"path": "b", "split": "dev"}}


@pytest.mark.parametrize(
    ("settings", "fails"),
    [
        ({"num_generations": 5}, "no whole number of groups of 5"),
        ({"num_generations": 1}, "TRL refuses it"),
        ({"reward_funcs": ["nothing"]}, "TRL has no reward nothing"),
        ({"reward_funcs": []}, "no reward function"),
        ({"reward_weights": [1.0, 2.0]}, "2 weights for 1 rewards"),
        ({"dataset_name": None}, "no data set is named"),
        ({"beta": "much"}, "'much' is not accepted"),
        ({"per_device_train_batch_size": "$(nproc)"}, "a number is needed"),
        ({"environment_factory": "x"}, "several turns"),
    ],
)
def test_bad_input_is_one_line(settings: dict[str, Any], fails: str) -> None:
    with pytest.raises(ConfigError, match=fails) as caught:
        of_trl(settings)
    assert "\n" not in str(caught.value)


def test_deepspeed_of_a_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("x/zero2.json is not at hand" in text for text in of_trl({"deepspeed": "x/zero2.json"}).warnings)
    settings = {**TRL, "deepspeed": "$REPO/local_scripts/zero3.json"}
    record = imported(trl.translate(source("trl", settings, {"num_processes": 8}), None, None), monkeypatch)
    assert record.config["grpo"]["deepspeed"]["zero_optimization"]["stage"] == 3
    alone = imported(trl.translate(source("trl", settings, {"num_processes": 8}), None, 1), monkeypatch)
    assert "deepspeed" not in alone.config["grpo"]


def test_vlm_r1_ignores_what_its_trainer_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "model_name_or_path": "Qwen2.5-VL-3B", "data_file_paths": "a/one.jsonl:two.jsonl", "image_folders": "x:y",
        "dataset_name": "not_used", "temperature": 0.7, "reward_weights": [1.0, 2.0], "task_type": "rec",
        "is_reward_customized_from_vlm_module": True, "use_peft": True, "lora_target_modules": ["q_proj"],
    }  # fmt: skip
    record = imported(trl_family.translate(source("vlm-r1", settings, {"nproc_per_node": 8}), None, None), monkeypatch)
    grpo = record.config["grpo"]
    assert (grpo["top_k"], grpo["loss_type"], grpo["steps_per_generation"]) == (50, "grpo", 1)
    assert "temperature" not in grpo and row(record, "temperature").kind == "same"
    assert all("weight" not in item for item in record.config["rewards"])
    assert record.config["peft"]["target_modules"] == "all-linear"
    assert record.config["model"]["freeze_vision_tower"] is True
    assert list(record.config["data"]["mix"]) == ["one_1", "two_2"]
    assert record.config["data"]["mix"]["two_2"]["image_root"] == "y"
    module = record.files["vlm_r1_rewards.py"]
    assert "Qwen2VLModule.select_reward_func('accuracy', 'rec')" in module
    ast.parse(module)


def test_vlm_r1_adapter_without_named_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**BASE, "use_peft": True, "lora_r": 64}
    record = imported(trl_family.translate(source("vlm-r1", settings, {"nproc_per_node": 8}), None, None), monkeypatch)
    assert record.config["peft"]["target_modules"] == "all-linear" and record.config["peft"]["r"] == 64
    assert row(record, "lora_target_modules").kind == "changes"
    whole = trl_family.translate(source("vlm-r1", BASE, {"nproc_per_node": 8}), None, None).finished()
    assert "peft" not in whole.config


def test_vlm_r1_rewards_are_called_as_its_trainer_does(tmp_path: Path) -> None:
    """The module gives the columns that the functions read, with a stand-in for VLM-R1's registry."""
    settings = {"model_name_or_path": "m", "data_file_paths": "one.jsonl", "reward_method": "all_match"}
    record = imported(trl_family.translate(source("vlm-r1", settings, {"nproc_per_node": 8}), None, 1))
    package = tmp_path / "open_r1"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "grpo_jsonl.py").write_text(
        "def seen(completions, solution, **columns):\n    return [solution, columns['accu_reward_method']]\n\n\n"
        "reward_funcs_registry = {'accuracy': seen, 'format': seen}\n"
    )
    names: dict[str, Any] = {}
    sys.path.insert(0, str(tmp_path))
    try:
        exec(record.files["vlm_r1_rewards.py"], names)
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("open_r1.grpo_jsonl", None)
        sys.modules.pop("open_r1", None)
    assert names["accuracy"](["c"], ["<answer>7</answer>"]) == [["<answer> 7 </answer>"], ["all_match"]]


@pytest.mark.parametrize(
    ("framework", "program", "module"),
    [
        ("r1-v", "src/open_r1/grpo.py", "open_r1.grpo"), ("r1-v", "open_r1.grpo_lisa", "open_r1.grpo_lisa"),
        ("r1-v", "/x/open_r1/grpo_classification.py", "open_r1.grpo_classification"),
        ("vlm-r1", "src/open_r1/grpo_own.py", "open_r1.grpo_own"), ("r1-v", "open_r1/my-grpo.py", "open_r1.grpo"),
    ],
)  # fmt: skip
def test_rewards_are_those_of_the_program(framework: str, program: str, module: str) -> None:
    one = source(framework, {**BASE, "num_generations": 8}, {"nproc_per_node": 8}, program=program)
    record = imported(trl_family.translate(one, None, 1))
    files = record.files.get("vlm_r1_rewards.py", "")
    assert f"from {module} import" in files or record.config["rewards"][0]["name"] == f"{module}:accuracy_reward"


def test_vlm_r1_program_of_one_task() -> None:
    settings = {"model_name_or_path": "Qwen-VL", "dataset_name": "rec.yaml", "image_root": "images"}
    one = source("vlm-r1", settings, {"nproc_per_node": 8}, program="src/open_r1/grpo_rec.py")
    record = imported(trl_family.translate(one, None, 1))
    assert (record.config["data"]["image_root"], row(record, "dataset_name").kind) == ("images", "changes")
    assert record.config["data"]["prompt_template"].endswith("JSON format.")
    assert "Qwen2VLModule.select_reward_func('accuracy', 'rec')" in record.files["vlm_r1_rewards.py"]
    assert "image_grid_thw" in row(record, "reward_funcs").why
    other = {**settings, "model_name_or_path": "OpenGVLab/InternVL3-2B"}
    one = source("vlm-r1", other, {"nproc_per_node": 8}, program="src/open_r1/grpo_rec.py")
    assert imported(trl_family.translate(one, None, 1)).config["data"]["prompt_template"].endswith("</answer> tags.")


def test_r1_v_samples_at_its_own_temperature() -> None:
    settings = {**BASE, "temperature": 0.3, "max_prompt_length": 512, "max_pixels": 401408, "num_generations": 4}
    plain = imported(trl_family.translate(source("r1-v", settings, {"nproc_per_node": 1}), None, None)).config
    assert "temperature" not in plain["grpo"] and plain["grpo"]["top_k"] == 50
    assert "max_prompt_tokens" not in plain["data"] and plain["data"]["max_pixels"] == 401408
    for other in (settings, {key: value for key, value in settings.items() if key != "max_prompt_length"}):
        record = trl_family.translate(source("r1-v", other, {"nproc_per_node": 1}), None, None).finished()
        assert (row(record, "max_prompt_length").kind, row(record, "max_prompt_length").value) == ("changes", 512)
    engine = {**settings, "use_vllm": True}
    with_engine = imported(trl_family.translate(source("r1-v", engine, {"nproc_per_node": 1}), None, None)).config
    assert with_engine["grpo"]["temperature"] == 0.3 and with_engine["grpo"].get("top_k", 0) == 0


def test_open_r1_rewards_by_name() -> None:
    settings = {
        **BASE, "reward_funcs": ["format", "cosine", "cf_code"], "reward_weights": [1.0, 1.0, 0.1],
        "cosine_max_len": 2000, "code_eval_test_batch_size": -1, "dataset_prompt_column": "problem",
    }  # fmt: skip
    record = imported(trl_family.translate(source("open-r1", settings, {"num_processes": 1}), None, None))
    names = [item["name"] for item in record.config["rewards"]]
    assert names == ["regex", "cosine_scaled_reward", "open_r1_rewards:cf_code"]
    assert record.config["rewards"][1]["params"]["max_len"] == 2000
    assert row(record, "reward_funcs").kind == "changes"
    module = record.files["open_r1_rewards.py"]
    assert "code_eval_test_batch_size=-1" in module and ast.parse(module)
    assert record.config["data"]["columns"] == {"prompt": "problem"}
    with pytest.raises(ConfigError, match="open-r1 has no reward best"):
        trl_family.translate(source("open-r1", {**BASE, "reward_funcs": ["best"]}), None, None)


SCRIPT = """
import re
from unsloth import FastVisionModel
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from vllm import SamplingParams

# pip install trl==0.22.2
longest, whole = 256, 1024
model, tokenizer = FastVisionModel.from_pretrained(
    model_name="unsloth/some-VL", max_seq_length=whole, load_in_4bit=True, fast_inference=True,
    gpu_memory_utilization=0.8, dtype=None,
)
model = FastVisionModel.get_peft_model(model, finetune_vision_layers=False, r=16, lora_alpha=16)
dataset = load_dataset("some/other", split="cot")
dataset = load_dataset("some/data", "main", split="train").map(lambda row: row["image"].resize((512, 512)))
OPEN = "<a>"
PATTERN = re.compile(OPEN + "(.*)")


def tag(text):
    return bool(PATTERN.search(text))


def format_reward(completions, **columns):
    return [float(tag(text)) for text in completions]


sampling = SamplingParams(min_p=0.1, top_k=-1, stop=[tokenizer.eos_token])
args = GRPOConfig(
    vllm_sampling_params=sampling, num_generations=4, per_device_train_batch_size=1, gradient_accumulation_steps=2,
    max_prompt_length=longest, max_completion_length=whole - longest, loss_type="dapo", unsloth_num_chunks=-1,
    bf16=is_bfloat16_supported(), fp16=not is_bfloat16_supported(),
)
trainer = GRPOTrainer(model=model, args=args, train_dataset=dataset, reward_funcs=[format_reward])
later = SamplingParams(temperature=0.1)
"""


def test_unsloth_script(tmp_path: Path) -> None:
    path = tmp_path / "some_GRPO.py"
    path.write_text(SCRIPT)
    record = imported(import_file(path))
    assert (record.source, record.version, record.numbers["C"]) == ("unsloth", "TRL 0.22.2", 8)
    grpo = record.config["grpo"]
    assert (grpo["epsilon_high"], grpo["mask_truncated_completions"], grpo["min_p"]) == (0.28, True, 0.1)
    assert (grpo["max_completion_length"], grpo["beta"], grpo["learning_rate"]) == (768, 0.001, 5e-5)
    assert grpo["vllm_importance_sampling_correction"] is False and "temperature" not in grpo
    assert record.config["vllm"] == {"max_model_len": 1024, "gpu_memory_utilization": 0.8}
    assert record.config["peft"] == {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}
    assert record.config["model"]["freeze_vision_tower"] is True
    data = record.config["data"]
    assert (data["path"], data["name"], data["image_size"]) == ("some/data", "main", 512)
    assert (data["max_prompt_tokens"], data["prompt_overflow"]) == (256, "filter")
    assert row(record, "unsloth_num_chunks").kind == "speed"
    assert record.config["model"]["dtype"] == "bfloat16"
    assert row(record, "bf16").kind == row(record, "fp16").kind == "same"


def test_rewards_of_a_script_are_copied_with_what_they_use(tmp_path: Path) -> None:
    path = tmp_path / "some_GRPO.py"
    path.write_text(SCRIPT)
    record = imported(import_file(path))
    assert record.config["rewards"] == [{"name": "some_grpo_rewards:format_reward"}]
    names: dict[str, Any] = {}
    exec(record.files["some_grpo_rewards.py"], names)
    assert names["format_reward"](["<a>1", "1"]) == [1.0, 0.0]
    assert "tokenizer" not in record.files["some_grpo_rewards.py"]


LONG = """
from datasets import load_dataset
from my.rewards import fancy as good
import my.more as more
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, SFTTrainer
from trl.rewards import accuracy_reward

CALLS = 0
tokenizer = load()


class Judge:
    def __call__(self, completions, **columns):
        return [tokenizer(text) for text in completions]


def main():
    from re import search

    def inner(completions, **columns):
        global CALLS
        CALLS += 1 if completions else tokenizer()
        return [float(CALLS) if search("x", text) else 0.0 for text in completions]

    SFTTrainer("m", train_dataset=load_dataset("first", "cot"), peft_config=LoraConfig(r=4, lora_dropout=0.1))
    rows = load_dataset("json", data_files={"train": "rows.jsonl"}, split=["train", "validation"])
    test = load_dataset("d", split="test")
    config = GRPOConfig(learning_rate=2e-6, eval_strategy="steps")
    functions = [inner, good, more.second, accuracy_reward]
    peft_config = LoraConfig(r=8)
    GRPOTrainer("m", functions, args=config, train_dataset=rows[0], eval_dataset=test, peft_config=peft_config)
    load_dataset("later", split="test")
"""


def test_a_program_with_two_trainers(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(LONG)
    record = imported(import_file(path))
    assert record.config["data"] == {"path": "rows.jsonl", "split": "train"}
    assert record.config["peft"] == {"r": 8}
    assert any("SFTTrainer trains the model before" in warning for warning in record.warnings)
    assert record.config["grpo"]["learning_rate"] == 2e-6 and record.config["model"]["name_or_path"] == "m"
    assert row(record, "eval_strategy").kind == "changes"
    assert [item["name"] for item in record.config["rewards"]] == [
        "train_rewards:inner", "my.rewards:fancy", "my.more:second", "accuracy_reward",
    ]  # fmt: skip
    assert any("uses tokenizer" in warning for warning in record.warnings)
    names: dict[str, Any] = {}
    exec(record.files["train_rewards.py"], names)
    assert [names["inner"](["x", "y"]) for _ in range(2)] == [[1.0, 0.0], [2.0, 0.0]]


MADE = """
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config

mark, sign = None, "x"
rows = load_dataset("train/rows", split="train")
for token in tokenizer.get_added_vocab():
    mark = token


def marked(completions, **columns):
    return [float(mark in text and sign in text) for text in completions]


config = ModelConfig(model_name_or_path="org/m", torch_dtype="bfloat16", use_peft=True, lora_r=4, load_in_4bit=True)
args = GRPOConfig(num_generations=8{more})
GRPOTrainer(config.model_name_or_path, marked, args=args, train_dataset=rows, peft_config=get_peft_config(config))
rows = load_dataset("test/rows", split="test")
"""


def test_a_program_with_a_model_config(tmp_path: Path) -> None:
    """Of `ModelConfig` only what the script hands on counts; data that are loaded after the training do not."""
    path = tmp_path / "train.py"
    path.write_text(MADE.replace("{more}", ""))
    record = imported(import_file(path))
    assert record.config["peft"] == {"r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
    assert record.config["model"] == {"name_or_path": "org/m", "dtype": "float32"}
    assert row(record, "load_in_4bit").why == row(record, "torch_dtype").why == trl_script.NOT_HANDED_ON
    assert record.config["data"] == {"path": "train/rows", "split": "train"}
    assert any("uses mark, which" in warning for warning in record.warnings)
    assert any("train_rewards.py, marked: completions are lists of messages" in text for text in record.warnings)
    path.write_text(MADE.replace("{more}", "").replace("in text and", "in text[0]['content'] and"))
    assert not any("lists of messages" in warning for warning in imported(import_file(path)).warnings)
    assert "mark = None" not in record.files["train_rewards.py"]
    path.write_text(MADE.replace("{more}", ", model_init_kwargs={'dtype': 'bfloat16'}"))
    assert imported(import_file(path)).config["model"]["dtype"] == "bfloat16"
    path.write_text(MADE.replace("{more}", ", generation_kwargs=make()"))
    assert row(imported(import_file(path)), "generation_kwargs").why == trl_keys.RUNS
    further = "{'temperature': own.t, 'typical_p': own.p, 'cache_implementation': 'static', 'top_k': 5}"
    path.write_text(MADE.replace("{more}", f", generation_kwargs={further}"))
    record = imported(import_file(path))
    assert row(record, "generation_kwargs").why.startswith(f"temperature, typical_p: {trl_keys.RUNS}")
    assert row(record, "generation_kwargs").to == {
        "grpo.top_k": 5, "grpo.generation_kwargs": {"cache_implementation": "static"},
    }  # fmt: skip
    static_p = "{'typical_p': own.p, 'suppress_tokens': [1, own.s], 'cache_implementation': 'static', 'top_k': 5}"
    named = MADE.replace("{more}", ", generation_kwargs=static_p").replace(
        "\nargs =", f"\nstatic_p = {static_p}\nargs ="
    )
    for text in (named, MADE.replace("{more}", f", **dict(generation_kwargs={static_p})")):
        path.write_text(text)
        again = row(imported(import_file(path)), "generation_kwargs")
        assert again.why.startswith(f"suppress_tokens, typical_p: {trl_keys.RUNS}")
        assert again.to == row(record, "generation_kwargs").to


LOADED = (
    """AutoModelForCausalLM.from_pretrained("org/m", torch_dtype="bfloat16", attn_implementation="flash_attention_2")"""
)


def test_a_model_config_that_asks_for_no_adapter(tmp_path: Path) -> None:
    """A `LoraConfig` beside it does; and the trainer's model is as the script itself loads it."""
    path = tmp_path / "train.py"
    whole = MADE.replace("{more}", "").replace("use_peft=True, ", "").replace(", load_in_4bit=True", "")
    path.write_text(whole)
    record = imported(import_file(path))
    assert "peft" not in record.config and "without use_peft" in row(record, "lora_r").why
    path.write_text(whole.replace("get_peft_config(config)", "LoraConfig(r=2)"))
    assert imported(import_file(path)).config["peft"]["r"] == 2
    path.write_text(whole.replace("GRPOTrainer(config.model_name_or_path", f"GRPOTrainer({LOADED}"))
    model = {"name_or_path": "org/m", "dtype": "bfloat16", "attn_implementation": "flash_attention_2"}
    assert imported(import_file(path)).config["model"] == model


def test_a_deepspeed_file_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.3}')
    one = source("trl", {**TRL, "deepspeed": "ds.json"}, {"num_processes": 2}, path=tmp_path / "grpo.yaml")
    grpo = imported(trl.translate(one, None, None)).config["grpo"]
    assert grpo["max_grad_norm"] == 0.3 and grpo["deepspeed"]["zero_optimization"] == {"stage": 2}


GOING_ON = """# trl=={version}
base = AutoModelForCausalLM.from_pretrained("org/m", dtype="bfloat16")
processor = AutoProcessor.from_pretrained("org/m", max_pixels=512 * 512, padding_side="left", revision="dev")
processor.image_processor.min_pixels = 3136
processor.tokenizer.chat_template = "{{ messages }}"
model = PeftModel.from_pretrained(base, "sft/final", is_trainable=True)
args = GRPOConfig(eval_strategy="steps", eval_steps=5, load_best_model_at_end=True)
GRPOTrainer(model=model, reward_funcs=accuracy_reward, args=args, train_dataset=load_dataset("d"))
model = PeftModel.from_pretrained(base, "out")
processor = AutoProcessor.from_pretrained("org/m", max_pixels=9)
from trl.rewards import accuracy_reward
"""


@pytest.mark.parametrize(("version", "reference"), [("0.26.2", "base"), ("0.27.0", "adapter")])
def test_a_script_that_goes_on_from_an_adapter(version: str, reference: str, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(GOING_ON.replace("{version}", version))
    config = imported(import_file(path)).config
    assert (config["data"]["max_pixels"], config["data"]["min_pixels"]) == (262144, 3136)
    assert config["model"]["chat_template"].startswith("{{") and "revision" not in config["model"]
    assert config["model"]["adapter"] == "sft/final" and "peft" not in config
    assert config["model"].get("adapter_reference", "adapter") == reference
    assert (config["grpo"]["eval_strategy"], config["grpo"]["load_best_model_at_end"]) == ("no", False)


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("def go(found): GRPOTrainer('m', found, args=GRPOConfig(), train_dataset=load_dataset('d'))", "what found is"),
        ("GRPOTrainer(x, len, args=GRPOConfig(), train_dataset=load_dataset('d'))", "no reward"),
        ("GRPOTrainer(x, a, args=GRPOConfig(), train_dataset=load_dataset('d'))\ndef a(completions): 0", "no model"),
    ],
)
def test_a_program_without_what_is_needed(text: str, fails: str, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(f"from trl import GRPOConfig, GRPOTrainer\n{text}")
    with pytest.raises(ConfigError, match=fails):
        import_file(path)


PROGRAM = """
from datasets import load_dataset
from trl import GRPOTrainer
from trl.rewards import think_format_reward


def short(completions, **columns):
    return [float(len(text) < 9) for text in completions]


GRPOTrainer(model=name, args=args, reward_funcs=[think_format_reward, short], train_dataset=load_dataset("d"), {more})
"""


def test_a_command_takes_data_and_rewards_of_its_program(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM.format(more=""))
    settings = {"model_name_or_path": "m", "num_generations": 8}
    one = source("trl", settings, {"num_processes": 1}, path=tmp_path / "run.sh", program="train.py")
    record = imported(trl.translate(one, None, None))
    assert [item["name"] for item in record.config["rewards"]] == ["think_format_reward", "train_rewards:short"]
    assert row(record, "dataset_name").file == "train.py" and "def short" in record.files["train_rewards.py"]
    (tmp_path / "train.py").write_text(PROGRAM.format(more="").replace('"d"', "script_args.rows"))
    with pytest.raises(ConfigError, match="no data set is named"):
        trl.translate(one, None, None)
    named = replace(one, settings={**one.settings, "rows": Setting("org/rows", 9)})
    record = imported(trl.translate(named, None, None))
    assert record.config["data"]["path"] == "org/rows" and "rows" not in {row.key for row in record.rows}
    assert (row(record, "dataset_name").line, row(record, "dataset_name").kind) == (9, "changes")
    (tmp_path / "train.py").write_text(PROGRAM.format(more="tools=[search]"))
    with pytest.raises(ConfigError, match="several turns"):
        trl.translate(one, None, None)


@pytest.mark.parametrize(("version", "verdict"), [("1.8.0", "changes"), ("1.9.0", "same")])
def test_token_loss_before_one_window(version: str, verdict: str) -> None:
    settings = {"loss_type": "dapo", "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    one = row(of_trl(settings, version), "loss_type")
    assert one.kind == verdict
    assert ("2 times as large" in one.why) == (verdict != "same")


@pytest.mark.slow
def test_import_loads_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "some_GRPO.py"
    path.write_text(SCRIPT)
    code = (
        "import sys; from pathlib import Path; from grpo_autotune.interop.importing import import_file;"
        f"import_file(Path({str(path)!r})).finished();"
        "print([n for n in ('torch', 'transformers', 'trl', 'vllm', 'datasets') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
