"""Turning knobs: only keys of the table, exact promises kept, nothing else touched."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given as draw
from hypothesis import settings
from hypothesis import strategies as st

from grpo_autotune.config.schema import RunConfig, known_paths
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware import Gpu, Machine
from grpo_autotune.knobs import (
    PROMPTS,
    TABLE,
    context_of,
    engine,
    engine_knobs,
    kind_of,
    knob,
    knobs_of,
    rules,
    with_knobs,
)
from grpo_autotune.knobs.apply import why_not
from grpo_autotune.knobs.sharding import ZERO_KNOBS
from tests.support.sample_records import judged_record, remote_calls

MICRO, GROUP, STEPS = "grpo.per_device_train_batch_size", "grpo.num_generations", "grpo.steps_per_generation"


def machine(gpus: int = 0, cores: int = 4) -> Machine:
    cards = tuple(Gpu(name="NVIDIA H100 80GB HBM3", memory_bytes=80 * 2**30, capability="9.0") for _ in range(gpus))
    return Machine(
        cpu="test",
        cores=cores,
        memory_bytes=16 * 2**30,
        gpus=cards,
        python="3.11",
        platform="test",
        versions={},
        fingerprint="test",
    )


def config(changes: dict[str, Any] | None = None, **grpo: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"random_init": "qwen3-0.6b"},
        "peft": {"r": 8},
        "data": {"path": "questions.jsonl"},
        "rewards": [{"name": "exact_match"}],
        "grpo": {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "num_generations": 8,
            **grpo,
        },
    }
    return RunConfig.from_dict({**values, **(changes or {})})


@st.composite
def batches(draw_: Any) -> RunConfig:
    micro = draw_(st.integers(1, 12))
    accumulation = draw_(st.integers(1, 12))
    grpo: dict[str, Any] = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    timing = draw_(st.sampled_from(["plain", "steps", "batch"]))
    steps = accumulation if timing == "plain" else draw_(st.integers(1, 12))
    if timing == "steps":
        grpo["steps_per_generation"] = steps
    if timing == "batch":
        grpo["generation_batch_size"] = micro * steps
    groups = [g for g in range(2, micro * steps + 1) if micro * steps % g == 0]
    if not groups:
        grpo = {**grpo, "per_device_train_batch_size": 2 * micro}
        if timing == "batch":
            grpo["generation_batch_size"] = 2 * micro * steps
        groups = [2]
    return config(**(grpo | {"num_generations": draw_(st.sampled_from(groups))}))


@settings(max_examples=300, deadline=None)
@draw(batches(), st.integers(1, 64))
def test_the_micro_batch_keeps_completions_a_step_and_a_generation(user: RunConfig, micro: int) -> None:
    before = user.batch
    try:
        turned = with_knobs(user, {MICRO: micro})
    except ConfigError as error:
        per_step = before.micro_batch * before.accumulation
        per_generation = before.micro_batch * before.steps_per_generation
        assert per_step % micro or per_generation % micro, f"refused although it fits: {error}"
        return
    after = turned.batch
    assert after.micro_batch == micro
    assert after.completions_per_step == before.completions_per_step
    assert after.generation_batch == before.generation_batch
    assert after.num_generations == before.num_generations
    assert knobs_of(turned, [PROMPTS]) == knobs_of(user, [PROMPTS])


@settings(max_examples=300, deadline=None)
@draw(batches(), st.integers(1, 32), st.integers(2, 32), st.integers(1, 8), st.integers(1, 8))
def test_learning_knobs_change_what_they_say_and_no_more(
    user: RunConfig, micro: int, group: int, prompts: int, steps: int
) -> None:
    before = user.batch
    try:
        turned = with_knobs(user, {MICRO: micro, GROUP: group, PROMPTS: prompts, STEPS: steps}).batch
    except ConfigError:
        return
    assert turned.completions_per_step == prompts * group
    assert turned.num_generations == group
    a_micro_step = before.micro_batch * before.processes
    assert turned.generation_batch * before.completions_per_step == a_micro_step * steps * prompts * group


@settings(max_examples=100, deadline=None)
@draw(batches())
def test_the_users_own_values_change_nothing(user: RunConfig) -> None:
    assert with_knobs(user, knobs_of(user, [row.key for row in TABLE])) == user


def test_the_group_keeps_completions_a_step_and_evaluation() -> None:
    user = config(
        {"data": {"path": "q.jsonl", "eval_split": "test"}}, eval_strategy="steps", per_device_eval_batch_size=8
    )
    turned = with_knobs(user, {GROUP: 4})
    assert turned.batch.completions_per_step == 16
    assert turned.batch.eval_generations == 8, "held-out rewards are means over as many completions as before"


def test_prompts_kept_while_the_group_shrinks() -> None:
    turned = with_knobs(config(), {GROUP: 4, PROMPTS: 2})
    assert (turned.batch.completions_per_step, turned.batch.accumulation) == (8, 2)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("data.imagesize", "data.image_size"),
        ("vllm.num_generations", "grpo.num_generations"),
        ("grpo.learning_rate", ""),
        ("gpu_memory_utilization", "vllm.gpu_memory_utilization"),
    ],
)
def test_only_keys_of_the_table(key: str, nearest: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{key}: this knob does not exist. {f'Nearest: {nearest}' if nearest else ''}"
    ):
        with_knobs(config(), {key: 1})


@pytest.mark.parametrize(
    "knobs", [{MICRO: True}, {MICRO: 0}, {GROUP: "8"}, {"grpo.beta": "x"}, {"data.image_size": 0.5}]
)
def test_values_of_a_wrong_type_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        with_knobs(config(), knobs)


def test_every_key_is_one_of_the_configuration() -> None:
    strange = (
        {re.sub(r"\.\d+", "", row.key) for row in TABLE} - set(known_paths()) - {PROMPTS, *ZERO_KNOBS}
    )  # DeepSpeed has many
    assert not strange


def test_a_turned_configuration_survives_yaml() -> None:
    turned = with_knobs(config(), {MICRO: 8, GROUP: 4, "peft.r": 16, "grpo.gradient_checkpointing": False})
    assert RunConfig.from_yaml(turned.to_yaml()) == turned
    assert turned.peft == {"r": 16}


def test_engine_keys_come_and_go_with_the_engine() -> None:
    user = config({"vllm": {"mode": "colocate", "enable_sleep_mode": True}}, use_vllm=True)
    plain = with_knobs(user, {"grpo.use_vllm": False, "vllm.gpu_memory_utilization": 0.5})
    assert plain.vllm.grpo_kwargs() == {} and not plain.use_vllm
    shared = with_knobs(config(), {"grpo.use_vllm": True, "vllm.gpu_memory_utilization": 0.5})
    assert shared.vllm.gpu_memory_utilization == 0.5


def test_the_sleep_level_takes_the_place_of_trls_switch() -> None:
    user = config({"vllm": {"enable_sleep_mode": True}}, use_vllm=True)
    assert knobs_of(user, ["vllm.sleep_level"]) == {"vllm.sleep_level": 2}
    assert with_knobs(user, {"vllm.sleep_level": 2}) == user
    awake = with_knobs(user, {"vllm.sleep_level": 0}).vllm
    assert awake.sleep_level == 0 and awake.enable_sleep_mode is None
    assert awake.grpo_kwargs() == {"vllm_enable_sleep_mode": False}


def test_the_engines_own_values_are_those_of_trl_where_nothing_is_said() -> None:
    keys = ["vllm.max_num_seqs", "vllm.max_num_batched_tokens", "vllm.sleep_level", "vllm.weight_sync"]
    plain, given_ = config(use_vllm=True), config({"vllm": {"max_num_seqs": 3}}, use_vllm=True)
    assert list(knobs_of(plain, keys).values()) == [16, 4096, 0, "auto"]  # 4 a micro batch x 4 of them a generation
    assert knobs_of(given_, keys)["vllm.max_num_seqs"] == 3
    assert with_knobs(plain, knobs_of(plain, keys)) == plain


def test_values_of_the_engine() -> None:
    plain = config(use_vllm=True)
    on = {gpus: context_of(plain, machine(gpus)) for gpus in (0, 1)}
    assert knob("vllm.max_num_seqs").values(on[0]) == (16, 4, 8)
    assert knob("vllm.sleep_level").values(on[0]) == (0,)
    assert knob("vllm.sleep_level").values(on[1]) == (0, 1, 2)
    assert knob("vllm.weight_sync").values(on[0]) == ("auto", "batched")
    whole = context_of(RunConfig.from_dict({**plain.to_dict(), "peft": None}), machine(1))
    assert knob("vllm.weight_sync").values(whole) == ("auto",)
    server = context_of(config({"vllm": {"mode": "server"}}, use_vllm=True), machine(1))
    engine_rows = [row for row in TABLE if row.key.startswith("vllm.")]
    assert len(engine_rows) >= 11 and not any(row.values(server) for row in engine_rows)


def test_gpus_that_do_not_train_may_serve() -> None:
    row, plain = knob("vllm.server_gpus"), config(use_vllm=True)
    assert row.values(context_of(plain, machine())) == (None,)  # it can be asked for
    assert row.values(context_of(plain, machine(1))) == (None,)
    assert row.values(context_of(plain, machine(2))) == (None, 1)
    assert row.values(context_of(plain, machine(8))) == (None, 1, 2, 4)
    turned = with_knobs(plain, {"vllm.server_gpus": 2})
    assert turned.vllm.grpo_kwargs() == {"vllm_mode": "server"} and turned.vllm.at_server
    assert with_knobs(turned, {"vllm.server_gpus": None}) == plain
    assert knobs_of(turned, ["vllm.tensor_parallel_size"]) == {"vllm.tensor_parallel_size": 1}
    spoken = config({"vllm": {"mode": "colocate"}}, use_vllm=True)
    assert with_knobs(spoken, {"vllm.server_gpus": 2}) == turned
    assert with_knobs(config({"vllm": {"mode": "server", "server_gpus": 1}}, use_vllm=True), {row.key: None}) == plain
    assert with_knobs(plain, {row.key: 1, "grpo.use_vllm": False}) == config(use_vllm=False)


def test_a_variable_sizes_the_engine_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    row, plain = knob("vllm.gpu_memory_utilization"), config(use_vllm=True)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert len(row.values(context_of(plain, machine()))) > 3
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert row.values(context_of(plain, machine())) == (0.3,) and len(row.values(context_of(plain, machine(1)))) > 3


@pytest.mark.parametrize(
    "partition",
    [{"loss_type": "bnpo"}, {"top_entropy_quantile": 0.2}, {"entropy_coef": 0.01}, {"use_adaptive_entropy": True}],
)
def test_the_micro_batch_is_a_learning_knob_where_the_loss_depends_on_the_partition(partition: dict[str, Any]) -> None:
    assert kind_of(config(), MICRO) == "exact"
    assert kind_of(config(**partition), MICRO) == "learning"


def test_speed_ups_are_tried_on_and_off() -> None:
    flex = [{"name": "shared_prefix", "form": "flex"}]
    axes = {str(own): knob("speedups").values(context_of(config({"speedups": own}))) for own in ("auto", "none", flex)}
    assert list(axes.values()) == [("auto", "none"), ("none", "auto"), (flex, "auto")]
    assert with_knobs(config(), {"speedups": flex}).speedups == flex
    assert with_knobs(config({"speedups": flex}), {"speedups": flex}) == config({"speedups": flex})


def installed(*packages: str) -> Callable[[str], bool]:
    return lambda package: package in packages


@pytest.mark.parametrize(
    ("packages", "capability", "kernels"),
    [
        ((), "9.0", ("eager",)),
        (("flash_attn",), "9.0", ("eager", "flash_attention_2")),
        (("flash_attn", "flash_attn_interface"), "9.0", ("eager", "flash_attention_2", "flash_attention_3")),
        (("flash_attn", "flash_attn_interface"), "8.0", ("eager", "flash_attention_2")),
        (("kernels",), "9.0", ("eager", "flash_attention_2", "flash_attention_3")),
        (("kernels",), "10.0", ("eager", "flash_attention_2")),
        (("kernels",), "7.5", ("eager",)),
    ],
)
def test_flash_kernels_are_tried_where_they_run(
    monkeypatch: pytest.MonkeyPatch, packages: tuple[str, ...], capability: str, kernels: tuple[str, ...]
) -> None:
    monkeypatch.setattr(rules, "installed", installed(*packages))
    card = machine(1).gpus[0].model_copy(update={"capability": capability})
    here = machine().model_copy(update={"gpus": (card,)})
    row, plain = knob("model.attn_implementation"), config(bf16=True)
    assert row.values(context_of(plain, here)) == (None, *kernels)
    hub = config({"model": {"random_init": "qwen3-0.6b", "attn_implementation": "kernels-community/flash-attn2"}})
    assert "flash_attention_2" not in row.values(context_of(hub, here))[1:], "it is the user's own"


def test_ways_to_generate_are_tried_where_they_run() -> None:
    cache, paged = knob("grpo.cache_implementation"), knob("grpo.use_transformers_continuous_batching")
    plain, whole = config(), config({"peft": None, "model": {"random_init": "qwen3-0.6b", "dtype": "bfloat16"}})
    for user, gpus, caches, ways in (
        (plain, 0, (None,), (False,)),
        (plain, 1, (None, "static"), (False,)),
        (config(bf16=False), 1, (None, "static"), (False, True)),
        (whole, 1, (None, "static"), (False, True)),
        (config(use_vllm=True), 1, (None,), (False,)),
        (config({"model": {"random_init": "qwen3-vl-2b"}}, bf16=False), 1, (None, "static"), (False,)),
    ):
        known = context_of(user, machine(gpus))
        assert (cache.values(known), paged.values(known)) == (caches, ways)
    assert "casts the trained weights" in str(why_not(plain, {paged.key: True}, machine(1)))
    assert "no model with a vision tower" in str(
        why_not(config({"model": {"random_init": "qwen3-vl-2b"}}), {paged.key: True}, machine(1))
    )
    both = {paged.key: True, cache.key: "static"}
    assert "page their caches" in str(why_not(config(bf16=False), both, machine(1)))
    words = {engine.word(with_knobs(plain, {key: value})) for key, value in both.items()}
    assert len({"generate", *words}) == 3, "the models tell them apart"


def test_drafts_are_tried_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_knobs, "installed", installed("vllm"))
    row, plain = knob("vllm.speculative_config"), config(use_vllm=True)
    ngram, suffix = engine_knobs.SPECULATIONS
    assert row.kind == "exact" and row.values(context_of(plain, machine())) == (None,)
    assert row.values(context_of(plain, machine(1))) == (None, ngram)
    assert row.values(context_of(config(use_vllm=True, min_p=0.1), machine(1))) == (None,)
    assert "arctic-inference" in str(why_not(plain, {row.key: suffix}, machine(1)))
    assert "min_p" in str(why_not(config(use_vllm=True, min_p=0.1), {row.key: ngram}, machine(1)))
    monkeypatch.setattr(engine_knobs, "installed", installed("vllm", "arctic_inference"))
    assert row.values(context_of(plain, machine(1))) == (None, ngram, suffix)
    own = config({"vllm": {"speculative_config": suffix}}, use_vllm=True)
    assert row.values(context_of(own, machine(1))) == (suffix, None, ngram)
    assert with_knobs(plain, {row.key: suffix}) == own
    assert own.vllm.engine_kwargs()["speculative_config"] == {"method": "suffix"}


def test_memory_is_pinned_for_a_gpu() -> None:
    row = knob("grpo.dataloader_pin_memory")
    assert row.values(context_of(config(), machine())) == (True,)
    assert row.values(context_of(config(), machine(1))) == (True, False)
    assert "needs a GPU" in str(why_not(config(dataloader_pin_memory=False), {row.key: True}, machine()))


def test_kinds_are_the_designs() -> None:
    learning = {row.key for row in TABLE if row.kind == "learning"}
    assert {"data.image_size", GROUP, PROMPTS, "grpo.max_completion_length", "grpo.beta", "peft.r"} <= learning
    assert {STEPS, "grpo.num_iterations", "model.load_in_4bit"} <= learning
    exact = {row.key for row in TABLE if row.kind == "exact"}
    assert {MICRO, "grpo.gradient_checkpointing", "model.attn_implementation", "vllm.gpu_memory_utilization"} <= exact


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.key)
def test_the_users_own_value_comes_first(row: Any, gpus: int) -> None:
    user = config({"data": {"path": "p", "image_size": 512, "columns": {"image": "image"}}}, use_vllm=True)
    axis = row.values(context_of(user, machine(gpus)))
    assert not axis or axis[0] == row.current(user)
    assert all((type(a), a) != (type(b), b) for i, a in enumerate(axis) for b in axis[:i]), "each value once"
    assert row.why and knob(row.key) is row


@pytest.mark.parametrize("row", [row for row in TABLE if row.key.startswith("vllm.")], ids=lambda row: row.key)
def test_values_of_an_engine_knob_are_told_apart_where_no_formula_does(row: Any) -> None:
    name = row.key.removeprefix("vllm.")
    if name in engine.DESCRIBED - {"weight_sync", "sleep_level", "max_num_batched_tokens", "server_gpus"}:
        return
    user = config(use_vllm=True)
    tried = {"max_num_batched_tokens": 64, "server_gpus": 1, "sleep_level": 1, "weight_sync": "batched"}
    others = {"kv_cache_dtype": "fp8", "quantization": "fp8", "speculative_config": {"method": "ngram"}}
    value = {**tried, **others}.get(name, not row.current(user))
    assert engine.word(with_knobs(user, {row.key: value})) != engine.word(user)


LANES = "rewards.1.concurrency"


def test_calls_at_once_are_a_knob_where_a_probe_saw_calls() -> None:
    user = config({"rewards": [{"name": "exact_match"}, {"name": "format", "concurrency": 4}]})
    assert knob(LANES).values(context_of(user)) == (4,), "nobody knows what the endpoint bears"
    seen = judged_record(remote_calls(place=1))
    assert knob(LANES).values(context_of(user, record=seen)) == (4, 8, 16)
    assert knob("rewards.0.concurrency").values(context_of(user, record=seen)) == (None,)
    limited = judged_record(remote_calls(place=1, rate_limited=1))
    assert knob(LANES).values(context_of(user, record=limited)) == (4, 2)
    turned = with_knobs(user, {LANES: 8})
    assert [item.concurrency for item in turned.rewards] == [None, 8] and turned.grpo == user.grpo
    assert kind_of(user, LANES) == "exact"


def test_calls_at_once_of_a_reward_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.3: there are 1 rewards, counted from 0"):
        with_knobs(config(), {"rewards.3.concurrency": 8})
    with pytest.raises(ConfigError, match=r"rewards\[0\]\.concurrency"):
        with_knobs(config(), {"rewards.0.concurrency": 0})
