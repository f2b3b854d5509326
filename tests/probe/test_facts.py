"""Facts of generations as pure arithmetic: what is counted, over which steps, and what stays bounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from grpo_autotune.probe.facts import KEEP, ImageCollector, RewardCollector, TokenCollector
from grpo_autotune.records.probe import TrainerFacts

END = 9


def trainer_facts(group: int = 2) -> TrainerFacts:
    return TrainerFacts(
        model_config_json={}, model_class="M", parameters=1, trainable_parameters=1, peft=None, dtype="float32",
        device="cpu", attn_implementation=None, gradient_checkpointing=False, num_generations=group,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, steps_per_generation=1, num_iterations=1,
        generation_batch_size=2, max_completion_length=8, beta=0.0, loss_type="dapo", has_ref_model=False,
        use_vllm=False, vllm_mode=None, dataloader_num_workers=0, world_size=1, reward_weights=[1.0, 1.0],
    )  # fmt: skip


def see(collector: TokenCollector, step: int, prompts: list[list[int]], completions: list[list[int]]) -> None:
    widths = max(map(len, prompts)), max(map(len, completions))
    output = {
        "prompt_ids": torch.zeros(len(prompts), widths[0]),
        "completion_ids": torch.zeros(len(completions), widths[1]),
        "completion_mask": torch.zeros(len(completions), widths[1]),
    }
    collector.see_output(step, prompts, completions, output, [END])


def test_lengths_are_those_that_were_sampled_though_truncated_rows_are_masked():
    collector = TokenCollector()
    see(collector, 0, [[1, 1], [1, 1]], [[5, 5, 5, 5, 5, 5], [5, END]])
    facts = collector.facts(0, 1, 1, trainer_facts())
    assert facts is not None
    assert facts.completion.max == 6 and facts.completion_per_step == 8 and facts.prompt_per_step == 4
    assert facts.truncated_share == 0.5
    assert facts.padding_share == pytest.approx(1 - 12 / 16)


def test_tokens_a_step_are_counted_over_whole_cycles():
    collector = TokenCollector()
    for step in range(0, 7, 2):
        see(collector, step, [[1] * 10], [[5] * 90])
    facts = collector.facts(2, 5, 2, trainer_facts())
    assert facts is not None and facts.completion_per_step == 45 and facts.prompt_per_step == 5


def test_what_a_step_under_way_generated_counts_nowhere():
    """As at the end of a script whose training fails: the record is taken before the probe hears of it."""
    collector, images = TokenCollector(), ImageCollector()
    for step, length in enumerate((1, 2, 90)):
        see(collector, step, [[1]] * 2, [[5] * length] * 2)
        collector.see_rewards(step, torch.tensor([[1.0], [0.0]]))
        images.see(step, [{"image": picture(step).resize((length, length))}], {}, 2)
    facts, seen = collector.facts(1, 1, 1, trainer_facts()), images.facts(1, 1, 1, lambda width, height: None)
    assert facts is not None and (facts.completion.max, facts.groups) == (2, 1)
    assert seen is not None and seen.pixels.max == 4


def test_a_long_run_is_judged_by_what_is_kept():
    collector = TokenCollector()
    for step in range(KEEP + 500):
        see(collector, step, [[1]], [[5] * 99])
    facts = collector.facts(1, KEEP + 499, 1, trainer_facts())
    assert facts is not None and facts.completion_per_step == pytest.approx(99)


def test_a_row_without_any_reward_gives_its_group_no_spread():
    collector = TokenCollector()
    see(collector, 0, [[1]] * 2, [[5]] * 2)
    collector.see_rewards(0, torch.tensor([[1.0, 0.0], [float("nan")] * 2, [1.0, 0.0], [0.0, float("nan")]]))
    facts = collector.facts(0, 1, 1, trainer_facts())
    assert facts is not None and (facts.groups, facts.dead_groups) == (2, 1)
    assert facts.reward_mean == pytest.approx(2 / 3)


def test_a_step_is_judged_by_the_newest_generation() -> None:
    collector, nan = TokenCollector(), float("nan")
    assert collector.without_signal(2, [1.0, 1.0]) == {"all_cut": False, "all_equal": False, "failed": False}
    wanted = {  # of all columns of both groups, (all_equal, failed)
        (False, False): [[1.0, 0.0], [0.0, nan], [1.0, 0.0], [0.0, 1.0]],
        (True, False): [[1.0, 0.0], [0.0, 1.0], [nan, nan], [nan, 1.0]],
        (True, True): [[nan, nan], [nan, nan], [nan, nan], [nan, 1.0]],
    }
    for step, ((equal, failed), rows) in enumerate(wanted.items()):
        see(collector, step, [[1]] * 4, [[5, END if step else 5]] * 4)
        collector.see_rewards(step, torch.tensor(rows))
        found = collector.without_signal(2, [1.0, 1.0])
        assert found == {"all_cut": step == 0, "all_equal": equal, "failed": failed}
    assert not collector.without_signal(8, [1.0, 1.0])["all_equal"], "there is no whole group"


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8))


def test_images_that_differ_only_in_pixels_are_distinct_and_the_window_is_that_of_the_generations_seen():
    collector = ImageCollector()
    for step in range(0, 20, 2):
        rows = [{"image": picture(step)}] * 4 + [{"image": picture(step + 1)}] * 4
        collector.see(step, rows, {}, 2)
        for during in (step, step + 1):
            if not collector.full:
                collector.decoded[during] += 8
    facts = collector.facts(2, 18, 2, lambda width, height: width * height)
    assert facts is not None
    assert facts.distinct_per_step == 1.0 and facts.decodes_per_image == 8.0
    assert facts.tokens is None and facts.tokens_at["384"] == 384 * 384


def test_arrays_are_no_pictures():
    collector = ImageCollector()
    collector.see(0, [{"image": np.zeros((8, 8, 3))}], {}, 2)
    assert collector.facts(0, 1, 1, lambda width, height: None) is None


def test_reward_calls_are_summed_not_kept():
    collector = RewardCollector()
    for seconds in (1.0, 3.0):
        collector.see("judge", True, seconds)
    collector.see("format", False, 0.5)
    slow, fast = collector.facts()
    assert (slow.name, slow.calls, slow.mean_s, slow.max_s) == ("judge", 2, 2.0, 3.0)
    assert fast.name == "format"
