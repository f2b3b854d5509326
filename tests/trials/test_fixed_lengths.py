"""Completion lengths and prompts that are the same for every split of a batch, on a real trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from grpo_autotune.errors import ConfigError
from grpo_autotune.seams.layers import AttributeSlot, wrap
from grpo_autotune.trials.child.fixed_lengths import FixedLengths, length_of, lengths_seen, why_free
from grpo_autotune.trials.child.reward_only import measure_rewards
from grpo_autotune.trials.child.worst_case import keep_worst_rows
from grpo_autotune.trials.heartbeat import HeartbeatWriter
from tests.support.trainers import make_trainer

CHOICE = [1, 2, 4, 5, 9]


class Seen:
    """Prompts and completions of each generation."""

    def __init__(self, trainer: Any) -> None:
        self.prompts: list[list[int]] = []
        self.completions: list[list[int]] = []
        wrap(AttributeSlot(trainer, "_generate_single_turn"), self._turn)

    def _turn(self, call_next: Callable[..., Any], /, prompt_ids: Any, *args: Any) -> Any:
        found = call_next(prompt_ids, *args)
        self.prompts += prompt_ids
        self.completions += found[0]
        return found


@pytest.fixture
def sampled(tiny: Callable[[str], Path], text_rows: list[dict[str, Any]], tmp_path: Path) -> Callable[..., Seen]:
    """Train on the four rows with fixed lengths, and give back what was sampled."""

    def run(fixed: Sequence[list[int]] | None = (), **grpo: Any) -> Seen:
        trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, max_completion_length=6, **grpo)
        lengths = None if fixed is None else FixedLengths(trainer, CHOICE, seed=7, seen=fixed)
        seen = Seen(trainer)
        trainer.train()
        if lengths is not None:
            assert not lengths.notes
            lengths.remove()
        assert "generate" not in vars(trainer.model)
        return seen

    return run


def by_place(seen: Seen, group: int) -> dict[tuple[int, int], int]:
    return {divmod(row, group): len(ids) for row, ids in enumerate(seen.completions)}


def test_lengths_and_prompts_do_not_depend_on_how_the_batch_is_split(sampled: Callable[..., Seen]) -> None:
    """One generation batch of eight in three splits: the same rows in the same order."""
    splits = [
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2},
    ]
    runs = [sampled(num_generations=4, max_steps=2, **split) for split in splits]
    shortest = min(len(seen.prompts) for seen in runs)
    for seen in runs[1:]:
        assert seen.prompts[:shortest] == runs[0].prompts[:shortest]
        assert [*map(len, seen.completions)][:shortest] == [*map(len, runs[0].completions)][:shortest]


def test_rows_keep_their_lengths_across_group_and_batch_sizes(sampled: Callable[..., Seen]) -> None:
    small = sampled(num_generations=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    large = sampled(num_generations=4, per_device_train_batch_size=16, gradient_accumulation_steps=1, max_steps=1)
    distinct = [prompts[::group] for prompts, group in ((small.prompts, 2), (large.prompts, 4))]
    assert distinct[0] == distinct[1] and len(distinct[0]) == 4  # one epoch, the same stream of prompts
    in_both = by_place(small, 2).keys() & by_place(large, 4).keys()
    assert len(in_both) == 8
    assert all(by_place(small, 2)[place] == by_place(large, 4)[place] for place in in_both)


def test_lengths_that_a_run_had_are_had_again_and_further_ones_are_drawn(sampled: Callable[..., Seen]) -> None:
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 2}
    free = sampled(fixed=None, num_generations=4, **batch)
    lengths = [len(ids) for ids in free.completions]
    seen = [lengths[first : first + 4] for first in range(0, len(lengths), 4)]
    assert len(seen) == 4 and len(set(lengths)) > 1
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    again = sampled(fixed=seen, num_generations=4, **split)
    assert [len(ids) for ids in again.completions] == lengths
    larger = by_place(sampled(fixed=seen[:2], num_generations=8, **batch), 8)
    assert [larger[prompt, member] for prompt in range(2) for member in range(4)] == lengths[:8]
    assert all(length == min(6, length_of(CHOICE, 7, *at)) for at, length in larger.items() if at[0] > 1 or at[1] > 3)


def test_what_a_run_had_tells_others_where_lengths_can_be_fixed() -> None:
    alone = SimpleNamespace(num_processes=1)
    trainer = SimpleNamespace(accelerator=alone, num_generations=2, use_vllm=False)
    assert lengths_seen(trainer, [[3, 1, 4, 1], [5, 9]]) == [[3, 1], [4, 1], [5, 9]]
    assert lengths_seen(SimpleNamespace(**vars(trainer), tools=[print]), [[3, 1]]) == []
    trainer.accelerator = SimpleNamespace(num_processes=2)
    assert lengths_seen(trainer, [[3, 1]]) == []


def test_each_row_ends_where_it_should_and_a_length_beyond_the_limit_is_cut(sampled: Callable[..., Seen]) -> None:
    seen = sampled(num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=2)
    eos = next(ids[-1] for ids in seen.completions if len(ids) < 6)
    wanted = {place: length_of(CHOICE, 7, *place) for place in by_place(seen, 4)}
    assert len(set(wanted.values())) > 2 and max(wanted.values()) > 6
    for (place, length), ids in zip(wanted.items(), seen.completions, strict=True):
        assert len(ids) == min(6, length), place
        assert (eos in ids) == (length < 6)


def test_evaluation_is_left_alone(sampled: Callable[..., Seen]) -> None:
    alone = sampled(num_generations=2, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=2)
    with_eval = sampled(
        num_generations=2, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=2,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    lengths = [len(ids) for ids in alone.completions]
    assert len(with_eval.completions) > len(lengths)
    assert [len(ids) for ids in with_eval.completions[:4]] == lengths[:4]
    assert [len(ids) for ids in with_eval.completions if ids] != lengths


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ({"rollout_func": print}, "a rollout function generates them"),
        ({"tools": [print]}, "tool calls make several turns of one completion"),
        ({"use_vllm": True, "vllm_generation": SimpleNamespace()}, "a vLLM server takes one length for a whole group"),
        ({"use_transformers_continuous_batching": True}, "continuous batching takes one length for all"),
        ({}, None),
    ],
)
def test_where_lengths_cannot_be_fixed(trainer: dict[str, Any], reason: str | None) -> None:
    assert why_free(SimpleNamespace(**{"use_vllm": False, **trainer})) == reason


@pytest.mark.parametrize("by_keyword", [True, False])
def test_each_request_of_an_engine_has_its_length(by_keyword: bool) -> None:
    class Params(SimpleNamespace):
        def clone(self) -> Params:
            return Params(**vars(self))

    def turn(prompts: list[str], asked: Params) -> Any:
        generate = trainer.vllm_generation.llm.generate
        if by_keyword:
            return generate(prompts, sampling_params=asked, use_tqdm=False)
        return generate(prompts, asked, use_tqdm=False)

    engine = SimpleNamespace(generate=lambda prompts, sampling_params=None, *, use_tqdm=True: sampling_params)
    trainer = SimpleNamespace(
        use_vllm=True, vllm_generation=SimpleNamespace(llm=engine), _generate_single_turn=turn, num_generations=2,
        model=SimpleNamespace(training=True), max_completion_length=8,
        accelerator=SimpleNamespace(process_index=0, num_processes=1),
    )  # fmt: skip
    asked = Params(n=1, max_tokens=8, ignore_eos=False)
    lengths = FixedLengths(trainer, CHOICE, seed=7, seen=[[3, 5], [6, 2]])
    found = trainer._generate_single_turn(["a", "a", "b", "b"], asked)
    assert [(params.max_tokens, params.ignore_eos) for params in found] == [(n, True) for n in (3, 5, 6, 2)]
    lengths.remove()
    assert trainer._generate_single_turn(["a"], asked) is asked and not asked.ignore_eos


def test_the_worst_rows_are_those_with_the_most_tokens(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from PIL import Image

    rows = [
        {
            "prompt": [{"role": "user", "content": "What is shown? " * words}],
            "image": Image.new("RGB", (side, side)),
            "answer": "",
        }
        for words, side in ((1, 56), (3, 56), (1, 224), (2, 112))
    ]
    trainer = make_trainer(
        tiny("qwen3_vl"), rows, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    assert keep_worst_rows(trainer) == []
    assert [row["image"].size[0] for row in trainer.train_dataset] == [224, 112]


def test_streamed_rows_have_no_numbers_to_compare_rewards_by(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "a"}]).to_iterable_dataset()
    trainer = SimpleNamespace(
        num_generations=2, train_dataset=rows, args=SimpleNamespace(generation_batch_size=2, output_dir=str(tmp_path))
    )
    with pytest.raises(ConfigError, match="a streamed data set has no numbered prompts"):
        measure_rewards(trainer, 1, HeartbeatWriter(tmp_path, silent=True))
