"""Properties of what the speed-ups do to batches, over group sizes, lengths, paddings and numbers of images."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_autotune.seams.torchvision_compat import ensure_torchvision

ensure_torchvision()

from grpo_autotune.speedups.batches.rows import lengths, one_token, take, trim  # noqa: E402
from grpo_autotune.speedups.batches.skip_dead import ROUNDING, living_rows  # noqa: E402
from grpo_autotune.speedups.generation.shared_prefill import _alike, _first_rows  # noqa: E402

LIMITS = settings(max_examples=60, deadline=None)


@st.composite
def batches(draw):
    """A batch of rows with ragged prompts and completions, wider than needed, and up to three images a row."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=6))
    spare_P, spare_C = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    width_P = max(prompt for prompt, _ in sizes) + spare_P
    width_C = max(1, max(completion for _, completion in sizes)) + spare_C
    prompt_mask = torch.tensor([[0] * (width_P - p) + [1] * p for p, _ in sizes])
    completion_mask = torch.tensor([[1] * c + [0] * (width_C - c) for _, c in sizes])
    images = draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)))
    count = sum(images)
    grid = torch.tensor(
        draw(st.lists(st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 3)), min_size=count, max_size=count))
    ).view(-1, 3)
    numbered = torch.arange(1, len(sizes) * (width_P + width_C) + 1).view(len(sizes), -1)
    batch = {
        "prompt_ids": numbered[:, :width_P] * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": numbered[:, width_P:] * completion_mask,
        "completion_mask": completion_mask,
        "old_per_token_logps": -numbered[:, width_P:].float(),
        "mm_token_type_ids": numbered,
        "advantages": torch.arange(len(sizes)).float(),
        "num_items_in_batch": torch.tensor(7),
    }
    if count:
        batch |= {
            "pixel_values": torch.arange(int(grid.prod(dim=-1).sum())).float()[:, None],
            "image_grid_thw": grid,
            "num_images": images,
        }
    return batch


def used(ids, mask):
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


@LIMITS
@given(batches(), st.sampled_from([None, 2, 4]), st.booleans())
def test_trimming_loses_nothing_that_is_used(batch, multiple, prompts):
    cut = trim(batch, multiple, prompts=prompts)
    for side in ("prompt", "completion"):
        ids, mask = f"{side}_ids", f"{side}_mask"
        assert used(cut[ids], cut[mask]) == used(batch[ids], batch[mask])
    assert torch.equal(lengths(cut), lengths(batch))
    both = torch.cat([cut["prompt_mask"], cut["completion_mask"]], dim=1)
    whole = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    assert used(cut["mm_token_type_ids"], both) == used(batch["mm_token_type_ids"], whole)
    assert used(cut["old_per_token_logps"], cut["completion_mask"]) == used(
        batch["old_per_token_logps"], batch["completion_mask"]
    )
    if multiple is None:
        assert not prompts or cut["prompt_mask"][:, 0].any()
        assert cut["completion_ids"].shape[1] == 1 or cut["completion_mask"][:, -1].any()


@LIMITS
@given(batches(), st.data())
def test_taken_rows_bring_their_own_images(batch, data):
    rows = data.draw(st.lists(st.integers(0, len(batch["prompt_ids"]) - 1), min_size=1, max_size=4))
    part = take(batch, rows)
    assert part["advantages"].tolist() == [float(row) for row in rows] and part["num_items_in_batch"] == 7
    if "num_images" not in batch:
        return
    patches = batch["image_grid_thw"].prod(dim=-1).tolist()
    owners = [row for row, count in enumerate(batch["num_images"]) for _ in range(count)]
    pixels = torch.split(batch["pixel_values"], patches)
    wanted = [pixels[image] for row in rows for image, owner in enumerate(owners) if owner == row]
    assert part["num_images"] == [batch["num_images"][row] for row in rows]
    assert part["pixel_values"].tolist() == (torch.cat(wanted).tolist() if wanted else [])


@LIMITS
@given(batches(), st.booleans())
def test_one_token_is_one_token(batch, whole_prompt):
    row = one_token(take(batch, [0]), whole_prompt=whole_prompt)
    assert row["completion_ids"].shape == row["old_per_token_logps"].shape == (1, 1)
    assert row["prompt_ids"].shape[1] == (batch["prompt_ids"].shape[1] if whole_prompt else 1)
    assert row["mm_token_type_ids"].shape[1] == row["prompt_ids"].shape[1] + 1
    assert ("pixel_values" in row) == (whole_prompt and "pixel_values" in batch)


rewards = st.one_of(st.none(), st.sampled_from([0.0, 0.3, 1.0, 1e-8, 100.0, 100.00001]))


@LIMITS
@given(st.integers(2, 8), st.integers(1, 4), st.data())
def test_a_group_lives_by_its_spread(group, groups, data):
    values = data.draw(st.lists(st.tuples(rewards, rewards), min_size=group * groups, max_size=group * groups))
    weights = torch.tensor([1.0, 0.5])
    table = torch.tensor([[float("nan") if value is None else value for value in row] for row in values])
    found = living_rows(table, weights, group).tolist()
    for begin in range(0, len(values), group):
        scored = [row != (None, None) for row in values[begin : begin + group]]
        totals = [float((table[begin + n] * weights).nansum()) for n in range(group) if scored[n]]
        largest = max(float((table[begin + n] * weights).abs().nansum()) for n in range(group))
        lives = bool(totals) and max(totals) - min(totals) > ROUNDING * largest  # the sum of two functions rounds once
        assert found[begin : begin + group] == [lives and s for s in scored]


@LIMITS
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.data())
def test_rows_of_a_group_that_differ_in_one_pixel_are_noticed(groups, data):
    first_rows, prompt_of_row = _first_rows(torch.tensor(groups))
    assert [groups[first_rows[prompt]] for prompt in prompt_of_row] == groups
    patches = torch.tensor(groups).float().repeat_interleave(4)[:, None].repeat(1, 2)
    batch = {
        "input_ids": torch.ones(len(groups), 3, dtype=torch.long),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 2, 2]] * len(groups)),
        "num_images": [1] * len(groups),
    }
    assert _alike(batch, first_rows, prompt_of_row)
    row = data.draw(st.integers(0, len(groups) - 1))
    changed = patches.clone()
    changed[4 * row + data.draw(st.integers(0, 3)), 1] += 0.5
    alone = groups.count(groups[row]) == 1
    assert _alike({**batch, "pixel_values": changed}, first_rows, prompt_of_row) is alone
