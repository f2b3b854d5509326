"""Tuned values in the user's own text: imported again, it has them, and nothing else has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.importing import import_file
from grpo_autotune.interop.writing.export import Original, export
from grpo_autotune.records.imported import Exported
from tests.support.tuned import tuned_values

VERL = """#!/bin/bash
# GRPO on our cluster
set -x
GROUP=${GROUP:-8}
ENGINE=(
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6   # leaves room
    actor_rollout_ref.rollout.n=$GROUP
)
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files=train.parquet \\
    data.train_batch_size=${BATCH:-64} \\
    data.max_response_length=512 \\
    actor_rollout_ref.model.path=Qwen/Qwen2.5-1.5B-Instruct \\
    actor_rollout_ref.actor.ppo_mini_batch_size=32 \\
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \\
    actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.actor.kl_loss_coef=0.001 \\
    "${ENGINE[@]}" \\
    trainer.n_gpus_per_node=4 \\
    trainer.save_freq=10 \\
    trainer.nnodes=1 "$@"
"""
EASYR1 = """# our settings
data:
  train_files: train.parquet
  rollout_batch_size: 64     # prompts
  max_response_length: 512
algorithm:
  adv_estimator: grpo
  disable_kl: false
  use_kl_loss: true
  kl_coef: 1.0e-2
worker:
  actor:
    global_batch_size: 32
    micro_batch_size_per_device_for_update: 8   # completions
    model: {model_path: Qwen/Qwen2.5-1.5B-Instruct}
  rollout:
    n: 8
    gpu_memory_utilization: 0.6
  reward:
    reward_function: ./r1v.py:compute_score
trainer:
  n_gpus_per_node: 4
  nnodes: 1
  save_freq: 10
"""
SWIFT = """MAX_PIXELS=262144 \\
NPROC_PER_NODE=4 \\
swift rlhf \\
    --rlhf_type grpo \\
    --model Qwen/Qwen2.5-1.5B-Instruct \\
    --dataset train.jsonl \\
    --reward_funcs accuracy \\
    --use_vllm true --vllm_mode colocate \\
    --num_generations 8 \\
    --per_device_train_batch_size 8 \\
    --gradient_accumulation_steps 8 \\
    --steps_per_generation 16 \\
    --vllm_gpu_memory_utilization 0.6 \\
    --beta 0.001
"""
TRL = """# trl grpo --config this
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
dataset_name: org/data
reward_funcs: [think_format_reward]
num_generations: 8   # G
per_device_train_batch_size: 8
gradient_accumulation_steps: 32
steps_per_generation: 64
use_vllm: true
vllm_gpu_memory_utilization: 0.6
beta: 0.001
"""
FILES = {"run_verl.sh": VERL, "easyr1.yaml": EASYR1, "run_swift.sh": SWIFT, "trl.yaml": TRL}


def exported(folder: Path, name: str, text: str, knobs: dict[str, Any]) -> Exported:
    (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "4")
        tuned = tuned_values(import_file(folder / name, world_size=4).finished().config, knobs)
    return export(tuned, Original(folder / name), 4)


def test_a_key_without_effect_is_not_written(tmp_path: Path) -> None:
    text = SWIFT.replace("colocate", "server --vllm_server_host h --vllm_server_port 1")
    done = exported(tmp_path, "run.sh", text, {"vllm.gpu_memory_utilization": 0.3, "grpo.beta": 0.02})
    assert [lost.why for lost in done.lost] == ["vllm_gpu_memory_utilization has no effect in this file"]
    assert "utilization 0.6" in done.text and [key.key for key in done.keys] == ["beta"]


def test_processes_that_share_a_sequence_train_on_one_batch(tmp_path: Path) -> None:
    text = SWIFT.replace("--beta", "--sequence_parallel_size 2 --beta")
    done = exported(tmp_path, "run.sh", text, {"grpo.per_device_train_batch_size": 4})
    assert {key.key: (key.before, key.after) for key in done.keys} == {
        "per_device_train_batch_size": (8, 4), "gradient_accumulation_steps": (8, 16), "steps_per_generation": (16, 32),
    }  # fmt: skip


def test_a_warm_up_of_rollouts_stays_as_many_steps(tmp_path: Path) -> None:
    text = VERL.replace(
        "    data.train_files", "    actor_rollout_ref.actor.optim.lr_warmup_steps=6 \\\n    data.train_files"
    )
    done = exported(tmp_path, "run.sh", text, {"grpo.num_iterations": 2})
    assert {key.key: key.after for key in done.keys}["actor_rollout_ref.actor.optim.lr_warmup_steps"] == 3


def test_a_micro_batch_of_tokens_may_follow_the_length(tmp_path: Path) -> None:
    text = VERL.replace("ppo_micro_batch_size_per_gpu=8", "use_dynamic_bsz=True actor_rollout_ref.actor."
                        "ppo_max_token_len_per_gpu=1100")  # fmt: skip
    done = exported(tmp_path, "run.sh", text, {"grpo.max_completion_length": 64})
    assert [key.key for key in done.keys] == ["data.max_response_length"]


def test_what_the_framework_cannot_do_is_told_of_the_users_file(tmp_path: Path) -> None:
    text = TRL.replace("# trl grpo", "# trl==0.17.0")
    with pytest.raises(ConfigError, match=r"trl.yaml: with the tuned batch .* no whole number of groups") as caught:
        exported(tmp_path, "trl.yaml", text, {"grpo.per_device_train_batch_size": 1, "grpo.num_generations": 16})
    assert "/." not in str(caught.value)


def test_an_anchor_is_edited_unless_another_key_hangs_on_it(tmp_path: Path) -> None:
    anchored = "model_name_or_path: &m Qwen/Qwen2.5-1.5B-Instruct\nrun_name: *m\n"
    text = TRL.replace("model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct\n", anchored).replace("# G", "")
    tied = text.replace("num_generations: 8", "num_generations: &g 8").replace("batch_size: 8", "batch_size: *g")
    for one in (text, tied):
        done = exported(tmp_path, "trl.yaml", one, {"grpo.per_device_train_batch_size": 4, "grpo.beta": 0.02})
        assert not done.lost and "&m" in done.text and "per_device_train_batch_size: 4" in done.text
    with pytest.raises(ConfigError, match="to 4 here: per_device_train_batch_size would change with it"):
        exported(tmp_path, "trl.yaml", tied, {"grpo.num_generations": 4})
    tied = text.replace("beta: 0.001", "beta: &b 0.001\nepsilon: *b")
    (lost,) = exported(tmp_path, "trl.yaml", tied, {"grpo.beta": 0.02}).lost
    assert lost.why == "epsilon would change with it: set beta by hand"


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.sampled_from([1, 2, 4]),
    knobs=st.fixed_dictionaries(
        {},
        optional={
            "grpo.num_generations": st.sampled_from([4, 8, 16]),
            "grpo.per_device_train_batch_size": st.sampled_from([1, 2, 4, 8, 16]),
            "grpo.num_iterations": st.sampled_from([1, 2]),
            "grpo.beta": st.sampled_from([0.001, 0.02]),
            "grpo.max_completion_length": st.sampled_from([256, 512]),
            "grpo.gradient_checkpointing": st.booleans(),
            "vllm.gpu_memory_utilization": st.sampled_from([0.3, 0.6]),
        },
    ),
)
def test_an_exported_file_imports_to_the_tuned_values(
    name: str, ranks: int, knobs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("export") / name
    path.write_text(FILES[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(ranks))
        config = import_file(path, world_size=ranks).finished().config
        try:
            tuned = tuned_values(config, knobs)
        except ConfigError:
            assume(False)
        done = export(tuned, Original(path))
        assert not done.lost and path.read_text() == FILES[name] and list(path.parent.iterdir()) == [path]
        path.write_text(done.text)
        again = RunConfig.from_dict(import_file(path, world_size=ranks).finished().config)
        wanted = RunConfig.from_dict({key: value for key, value in tuned.items() if key != "receipt"})
    for section in ("model", "peft", "data", "rewards"):
        assert getattr(again, section) == getattr(wanted, section)
    longest = {"max_model_len": None}  # follows the completions where the source says so
    assert again.vllm.model_copy(update=longest) == wanted.vllm.model_copy(update=longest)
    assert again.grpo == wanted.grpo
    body = [line for line in done.text.splitlines() if not line.startswith("# ")]
    assert len(body) <= len(FILES[name].splitlines()) + 8
