"""ms-swift's configurations: batches, defaults of versions, and what each key becomes."""

import json
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_autotune.config.batch import batch_plan
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.importing import import_file
from grpo_autotune.records.imported import Imported

NEEDED = {"rlhf_type": "grpo", "model": "org/Model-7B", "dataset": "rows.jsonl", "reward_funcs": "format"}


def command(program: str = "swift rlhf", variables: str = "NPROC_PER_NODE=8", **keys: Any) -> str:
    """A shell script; a key that is None is left out."""
    options = [f"    --{key} {value}" for key, value in {**NEEDED, **keys}.items() if value is not None]
    return " \\\n".join([f"{variables} \\\n{program}" if variables else program, *options]) + "\n"


def imported(folder: Path, text: str, name: str = "run.sh", **how: Any) -> Imported:
    """The result of importing a text, which loads on as many processes as it is written for."""
    (folder / name).write_text(text)
    result = import_file(folder / name, **how).finished()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(result.world_size))
        RunConfig.from_dict(result.config)
    for row in result.rows:
        assert {path: value_of(result.config, path) for path in row.to} == row.to, row
    return result


def value_of(config: dict[str, Any], path: str) -> Any:
    return reduce(lambda section, key: section[key], path.split("."), config)


def rows(result: Imported) -> dict[str, Any]:
    return {row.key: row for row in result.rows}


def plan(result: Imported) -> tuple[int, int, float]:
    """Completions of an optimizer step, prompts of a rollout, and optimizer steps of a rollout, by TRL's arithmetic."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(result.world_size))
        batch = batch_plan(result.config["grpo"])
    steps = batch.steps_per_generation * batch.num_iterations / batch.accumulation
    return batch.completions_per_step, batch.prompts_per_generation, steps


counts = st.sampled_from([1, 2, 3, 4, 6, 8])


@settings(max_examples=60, deadline=None)
@given(group=st.integers(2, 16), micro=counts, ranks=counts, steps=counts, rounds=counts, passes=counts, on=counts)
def test_batches_of_swift(tmp_path_factory, group, micro, ranks, steps, rounds, passes, on) -> None:
    """Whatever its numbers, a run has swift's completions per step, prompts per rollout and steps per rollout."""
    per_rollout = steps * rounds
    rollout = micro * ranks * per_rollout
    text = command(
        variables=f"NPROC_PER_NODE={ranks}", num_generations=group, per_device_train_batch_size=micro,
        gradient_accumulation_steps=steps, steps_per_generation=per_rollout, num_iterations=passes,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("swift")
    if rollout % group:
        with pytest.raises(ConfigError, match="whole groups"):
            imported(folder, text)
        return
    wanted = (micro * ranks * steps, rollout // group, rounds * passes)
    assert plan(imported(folder, text)) == wanted
    if (micro * ranks * steps) % on == 0 and rollout % on == 0:
        assert plan(imported(folder, text, world_size=on)) == wanted


@settings(max_examples=40, deadline=None)
@given(
    group=st.integers(2, 8), micro=counts, ranks=counts, steps=counts, rounds=counts, shared=st.sampled_from([1, 2, 4])
)
def test_batches_of_megatron(tmp_path_factory, group, micro, ranks, steps, rounds, shared) -> None:
    """Its rollout is counted in global batches, on the ranks that parallelism within a sequence leaves."""
    completions = micro * ranks * steps * group
    text = command(
        "megatron rlhf", f"NPROC_PER_NODE={ranks * shared}", num_generations=group, micro_batch_size=micro,
        global_batch_size=completions, steps_per_generation=rounds, tensor_model_parallel_size=shared,
    )  # fmt: skip
    result = imported(tmp_path_factory.mktemp("megatron"), text)
    assert plan(result) == (completions, completions * rounds // group, rounds)
    assert result.world_size == ranks


@pytest.mark.parametrize(
    ("text", "name", "numbers"),
    [
        (command(num_generations=8), "a.sh", (8, 1, 1, 1)),
        (
            command(
                num_generations=16, per_device_train_batch_size=2, gradient_accumulation_steps=8,
                steps_per_generation=32,
            ),
            "b.sh",
            (8, 2, 8, 32),
        ),
        (
            "rlhf_type: grpo\nmodel: org/Model\ndataset: rows.jsonl\nreward_funcs: [format]\nmicro_batch_size: 2\n"
            "global_batch_size: 16\nnum_generations: 8\nsteps_per_generation: 4\nuse_vllm: true\n"
            "colocate_groups: [[train, rollout]]\ntrain:\n  gpus: 4\nrollout:\n  gpus: 4\n",
            "c.yaml",
            (4, 2, 2, 8),
        ),
        (
            command(
                variables="NPROC_PER_NODE=8", num_generations=32, per_device_train_batch_size=4,
                gradient_accumulation_steps=8, sequence_parallel_size=4,
            ),
            "d.sh",
            (2, 4, 32, 32),
        ),
    ],
    ids=["defaults", "gspo", "ray", "sequence parallel"],
)  # fmt: skip
def test_worked_examples(tmp_path, text, name, numbers) -> None:
    result = imported(tmp_path, text, name)
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    assert (result.world_size, *(result.config["grpo"][key] for key in keys)) == numbers


def test_rays_settings_by_their_own_lines(tmp_path) -> None:
    text = "rlhf_type: grpo\nmodel: org/Model\ndataset: rows.jsonl\nreward_funcs: [format]\nglobal_batch_size: 16\n"
    table = rows(imported(tmp_path, text + "train:\n  gpus: 4\n  lora_rank: 4\nENV: {MAX_PIXELS: 784}\n", "ray.yaml"))
    assert [table[key].line for key in ("train.gpus", "train.lora_rank", "ENV.MAX_PIXELS")] == [7, 8, 9]


def test_a_data_set_whose_prompts_are_written_in_code_is_said(tmp_path) -> None:
    kept, written = (
        rows(imported(tmp_path, command(dataset=name))) for name in ("rows.jsonl", "a/clevr_cogen_a_train")
    )
    assert (kept["dataset"].kind, written["dataset"].kind) == ("converted", "changes")


@pytest.mark.parametrize(
    ("version", "key", "value"),
    [
        ("4.5", "top_k", None), ("3.12", "top_k", 50), ("3.12", "top_p", 0.9), ("4.5", "beta", 0.04),
        ("4.5", "temperature", 0.9), ("4.5", "loss_type", "grpo"), ("3.2", "loss_type", "bnpo"),
        ("4.5", "adam_beta2", 0.95), ("3.2", "adam_beta2", None), ("4.5", "weight_decay", 0.1),
        ("4.5", "lr_scheduler_type", "cosine"), ("4.5", "learning_rate", 1e-4),
        ("4.5", "gradient_accumulation_steps", 1), ("3.6", "gradient_accumulation_steps", 2),
        ("3.2", "steps_per_generation", 1), ("3.3", "steps_per_generation", 1), ("3.3", "loss_type", "bnpo"),
        ("3.2.2", "adam_beta2", 0.95), ("4.0", "top_k", 50), ("4.0.4", "top_k", None),
    ],
)  # fmt: skip
def test_defaults_of_versions(tmp_path, version, key, value) -> None:
    """A default that TRL shares is not written."""
    assert imported(tmp_path, command(), version=version).config["grpo"].get(key) == value


@pytest.mark.parametrize(
    ("key", "version"), [("train_type", "3.12"), ("tuner_type", "4.5"), ("num_infer_workers", "3.4")]
)
def test_version_that_only_heeded_a_key(tmp_path, key, version) -> None:
    result = imported(tmp_path, command(**{"tuner_type": "full", key: 8 if key.startswith("num") else "full"}))
    assert result.version == version and rows(result)[key].kind in ("same", "speed")
    assert "peft" not in result.config and result.config["grpo"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(("version", "steps"), [("3.3", 1), ("3.4", 2)])
def test_sleep_took_the_accumulation_away(tmp_path, version, steps) -> None:
    keys = {"use_vllm": "true", "num_infer_workers": 8, "sleep_level": 1, "gradient_accumulation_steps": 2}
    result = imported(tmp_path, command(**keys), version=version)
    assert result.config["grpo"]["gradient_accumulation_steps"] == steps


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rlhf_type": "dpo"}, "dpo is not GRPO"), ({"rlhf_type": None}, "dpo is not GRPO"),
        ({"multi_turn_scheduler": "x"}, "several turns"), ({"use_gym_env": "true"}, "environment"),
        ({"reward_model": "org/RM"}, "reward model"), ({"teacher_model": "org/T"}, "teacher"),
        ({"advantage_estimator": "rloo"}, "rloo is not GRPO"), ({"loss_type": "fipo"}, "fipo is not GRPO"),
        ({"reward_funcs": None}, "no reward function"), ({"reward_funcs": "toolbench"}, "toolbench"),
        ({"num_generations": 3}, "whole groups of 3"), ({"num_generations": 1}, "one completion"),
        ({"per_device_train_batch_size": "$(nproc)"}, "a number is needed"), ({"model": None}, "no model"),
        ({"dataset": None}, "no dataset"), ({"reward_weights": "1 2"}, "2 weights of 1 rewards"),
        ({"reward_funcs": "soft_overlong"}, "needs soft_cache_length"),
    ],
)  # fmt: skip
def test_refused(tmp_path, keys, words) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        imported(tmp_path, command(**keys))
    assert "\n" not in str(raised.value)


def test_each_key_has_its_verdict(tmp_path) -> None:
    """One row for every option, by line, and none that the tables do not know."""
    keys = {
        "system": "'be brief'", "columns": """'{"question": "query", "result": "solution"}'""", "max_length": 900,
        "truncation_strategy": "delete", "overlong_filter": "true", "importance_sampling_level": "sequence_token",
        "scale_rewards": "gdpo", "dynamic_sample": "true", "max_resample_times": 5, "use_vllm": "true",
        "vllm_mode": "colocate", "vllm_enable_lora": "true", "sleep_level": 1, "offload_model": "true",
        "vllm_engine_kwargs": """'{"max_num_seqs": 4, "no_such": 1}'""",
        "rollout_importance_sampling_mode": "sequence_mask", "freeze_aligner": "true",
        "lora_rank": 16, "target_modules": "q_proj v_proj", "async_generate": "true",
        "warmup_ratio": 0.05, "no_save_optim": "true", "made_up": 3,
    }  # fmt: skip
    result = imported(tmp_path, command(**keys))
    table = rows(result)
    assert [row.line for row in result.rows if row.line] == sorted(row.line for row in result.rows if row.line)
    assert all(key in table for key in keys)
    known = {key: row.kind for key, row in table.items() if row.why.startswith("not a key")}
    assert known == {"made_up": "none"}
    verdicts = {key: table[key].kind for key in keys}
    assert [key for key, verdict in verdicts.items() if verdict == "changes"] == [
        "dynamic_sample", "max_resample_times", "vllm_engine_kwargs", "rollout_importance_sampling_mode",
    ]  # fmt: skip
    config = result.config
    assert config["data"]["columns"] == {"prompt": "question", "solution": "result"}
    assert (config["data"]["max_prompt_tokens"], config["data"]["prompt_overflow"]) == (900, "filter")
    assert config["grpo"]["importance_sampling_level"] == "sequence"
    assert config["resample"]["max_rounds"] == 5
    assert config["peft"]["r"] == 16 and config["peft"]["target_modules"] == ["q_proj", "v_proj"]
    assert config["vllm"]["weight_sync"] == "adapter" and config["vllm"]["max_num_seqs"] == 4


def test_data_sets_and_images(tmp_path) -> None:
    (tmp_path / "prompt.txt").write_text("Answer with a number.\n")
    text = command(
        variables="NPROC_PER_NODE=8 IMAGE_MAX_TOKEN_NUM=256 MIN_PIXELS=784", dataset="HF::org/one:main#20 two.parquet",
        system="path/of/prompt.txt", model="org/Qwen3-VL-4B", freeze_vit="false",
    )  # fmt: skip
    data = imported(tmp_path, text).config["data"]
    assert (data["max_pixels"], data["min_pixels"]) == (256 * 1024, 784)
    one, two = data["mix"].values()
    assert one == {"path": "org/one", "name": "main", "subsample": 20, "system_prompt": "Answer with a number.\n"}
    assert two == {"path": "two.parquet", "system_prompt": "Answer with a number.\n"}
    model = imported(tmp_path, command(model="org/Qwen2.5-VL-3B")).config["model"]
    assert model["freeze_vision_tower"] is True
    assert "freeze_vision_tower" not in imported(tmp_path, command()).config["model"]


def row_of(folder: Path, key: str, **keys: Any) -> tuple[str, dict[str, Any]]:
    row = rows(imported(folder, command(**keys)))[key]
    return row.kind, row.to


VISION, SERVER = {"model": "org/Qwen2.5-VL-3B"}, {"use_vllm": "true", "vllm_mode": "server"}


@pytest.mark.parametrize(
    ("keys", "row"),
    [
        ({"repetition_penalty": 1.1}, ("same", {"grpo.repetition_penalty": 1.1})),
        ({"cosine_max_len": 9}, ("same", {})),
        ({"ref_model": "org/Other"}, ("none", {})),
        ({"freeze_aligner": "false", **VISION}, ("none", {})),
        ({"freeze_aligner": "false", "target_modules": "q_proj", **VISION}, ("same", {})),
        ({"tuner_type": "lora_llm", **VISION}, ("same", {})),
        ({"tuner_type": "lora_llm", "freeze_vit": "false", **VISION}, ("changes", {})),
        ({"vllm_server_host": "a b", **SERVER}, ("changes", {"vllm.server_host": "a"})),
        ({"structured_outputs_regex": "a+"}, ("same", {})),
        ({"val_dataset": "a.jsonl"}, ("converted", {"data.eval_path": "a.jsonl"})),
        ({"val_dataset": "a.jsonl#9"}, ("changes", {"data.eval_path": "a.jsonl"})),
        ({"split_dataset_ratio": 0.1, "eval_strategy": "no"}, ("same", {})),
        ({"target_modules": "q_proj", "target_regex": "m.*q_proj"}, ("same", {})),
        ({"max_completion_length": 9, "max_new_tokens": 7, "response_length": 8}, ("same", {})),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_rows_of_single_keys(tmp_path, keys, row) -> None:
    assert row_of(tmp_path, next(iter(keys)), **keys) == row


def test_variables_of_a_yaml(tmp_path) -> None:
    """They may be JSON, and those that are no settings have no effect."""
    text = yaml.safe_dump({**NEEDED, "ENV": {"NPROC_PER_NODE": 8, "OTHER": 1}, "model_kwargs": '{"max_pixels": 784}'})
    result = imported(tmp_path, text, "run.yaml")
    assert result.config["data"]["max_pixels"] == 784 and result.world_size == 8
    assert rows(result)["ENV.OTHER"].kind == "same"


def test_evaluation_needs_held_out_rows(tmp_path) -> None:
    """Swift evaluates wherever it has data to, as often as it saves, in whole groups."""
    off = imported(tmp_path, command(eval_steps=5, eval_strategy="steps"))
    assert rows(off)["eval_steps"].to == {} and "eval_strategy" not in off.config["grpo"]
    grpo = imported(
        tmp_path, command(val_dataset="held.jsonl", save_steps=7, num_generations=16, gradient_accumulation_steps=2)
    ).config["grpo"]
    assert (grpo["eval_strategy"], grpo["eval_steps"], grpo["per_device_eval_batch_size"]) == ("steps", 7, 2)


@pytest.mark.parametrize("loss", ["dapo", "cispo"])
def test_same_updates_where_a_loss_is_smaller(tmp_path, loss) -> None:
    """Clipped AdamW steps of TRL's gradient are those of swift's, which is smaller by the micro steps of a rollout."""
    text = command(loss_type=loss, gradient_accumulation_steps=2, steps_per_generation=6, max_grad_norm=0.5)
    grpo = imported(tmp_path, text).config["grpo"]
    gradients = np.random.default_rng(0).normal(size=(5, 9)) * [[1e-8], [1e-3], [1.0], [3.0], [50.0]]

    def updates(scale: float, clip: float, epsilon: float) -> list[np.ndarray]:
        first = second = np.zeros(9)
        steps = []
        for number, gradient in enumerate(gradients * scale, 1):
            gradient = gradient * min(1.0, clip / (np.linalg.norm(gradient) + 1e-300))
            first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
            steps.append(first / (1 - 0.9**number) / (np.sqrt(second / (1 - 0.95**number)) + epsilon))
        return steps

    there = updates(1 / 6, 0.5, 1e-8)
    here = updates(1.0, grpo["max_grad_norm"], grpo["adam_epsilon"])
    np.testing.assert_allclose(here, there, rtol=1e-9)
    assert not np.allclose(updates(1.0, 0.5, 1e-8), there, rtol=1e-3)


def test_rewards_of_a_plugin(tmp_path) -> None:
    text = command(
        reward_funcs="soft_overlong my_reward", soft_cache_length=64, reward_weights="1 0.5",
        external_plugins="plugins/mine.py",
    )  # fmt: skip
    result = imported(tmp_path, text)
    overlong, mine = result.config["rewards"]
    assert overlong["params"] == {"max_completion_len": 512, "soft_punish_cache": 64} and overlong["weight"] == 1.0
    assert mine["weight"] == 0.5 and f"{mine['name'].partition(':')[0]}.py" in result.files
    assert "'plugins/mine.py'" in next(iter(result.files.values()))
    assert "plugins/mine.py is not here" in rows(result)["external_plugins"].why
    assert rows(result)["reward_funcs"].kind == "converted"


def test_plugins_that_register_a_reward(tmp_path) -> None:
    """It is the one that names it; where none is at hand, the table says that the first is taken."""
    text = command(reward_funcs="mine", external_plugins="model.py rewards.py")
    unsure = imported(tmp_path, text)
    (tmp_path / "model.py").write_text("register()\n")
    (tmp_path / "rewards.py").write_text("orms['mine'] = Mine\n")
    sure = imported(tmp_path, text)
    assert [rows(result)["external_plugins"].kind for result in (unsure, sure)] == ["changes", "converted"]
    assert repr(str(tmp_path / "rewards.py")) in next(iter(sure.files.values()))
    assert "model.py" in unsure.files["swift_mine.py"] and "rewards.py" in sure.files["swift_mine.py"]


def test_older_names_of_megatron(tmp_path) -> None:
    keys = {"log_interval": 7, "save_interval": 9, "num_workers": 2, "save": "out", "use_vllm": "true"}
    result = imported(tmp_path, command("megatron rlhf", **keys))
    assert result.version == "3.12" and result.config["output"]["dir"] == "out"
    said = ("logging_steps", "save_steps", "dataloader_num_workers")
    assert [result.config["grpo"][key] for key in said] == [7, 9, 2]


@pytest.mark.parametrize("program", ["swift rlhf", "megatron rlhf"])
def test_master_weights(tmp_path, program) -> None:
    """Weights that ZeRO or Megatron keeps in 32 bits stay so on one process, where ZeRO is dropped."""
    keys = {"tuner_type": "full", "torch_dtype": "bfloat16", "use_vllm": "true", "num_generations": 8}
    deepspeed = {"deepspeed": "zero2", "gradient_accumulation_steps": 8} if program.startswith("swift") else {}
    config = imported(tmp_path, command(program, **keys, **deepspeed), world_size=1).config
    assert config["model"]["dtype"] == "float32" and config["grpo"]["bf16"] is True
    assert config["vllm"]["dtype"] == "bfloat16" and "deepspeed" not in config["grpo"]


@pytest.mark.parametrize(("workers", "key"), [(1, "server_gpus"), (8, "mode")])
def test_engines_before_version_3_5(tmp_path, workers, key) -> None:
    """They had GPUs of their own, unless there were as many as processes."""
    keys = {"use_vllm": "true", "vllm_device": "auto", "num_infer_workers": workers}
    vllm = imported(tmp_path, command(**keys), version="3.4").config["vllm"]
    assert vllm[key] == {"server_gpus": 1, "mode": "colocate"}[key]


def test_json_is_read_like_yaml(tmp_path) -> None:
    keys = {**NEEDED, "ENV": {"MAX_PIXELS": 1000}, "per_device_train_batch_size": 8, "columns": {"q": "query"}}
    result = imported(tmp_path, json.dumps(keys), "run.json")
    assert result.config["data"]["max_pixels"] == 1000 and result.config["data"]["columns"] == {"prompt": "q"}


@pytest.mark.parametrize("key", ("multi_turn_scheduler", "use_gym_env", "gym_env"))
@pytest.mark.parametrize("server", ("swift rollout", "python -m swift.cli.rollout", "python swift/cli/rollout.py"))
def test_what_the_servers_command_asks_for_is_refused(tmp_path, key, server) -> None:
    (tmp_path / "run.sh").write_text(f"{server} --model org/Model --{key} true --max_turns 6 &\n{command()}")
    with pytest.raises(ConfigError, match=rf"run.sh, line 1: {key}: (rollouts of several turns|rewards of an env)"):
        import_file(tmp_path / "run.sh").finished()
