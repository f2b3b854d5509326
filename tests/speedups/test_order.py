"""The order of rows behind TRL's shuffle: two sort keys, one window, one owner."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.pairs import patched
from tests.support.trainers import make_trainer

from grpo_autotune.speedups.batches.order import sort_rows, sorted_inside, steps_line_up, window  # isort: skip


@given(st.lists(st.integers(0, 4), min_size=1, max_size=24), st.integers(1, 8))
def test_rows_stay_inside_their_optimizer_step(groups, size):
    order = sorted_inside(size, groups, None)
    assert [row // size for row in order] == [row // size for row in range(len(groups))]
    for begin in range(0, len(groups), size):
        inside = [groups[row] for row in order[begin : begin + size]]
        assert len(list(itertools.groupby(inside))) == len(set(inside))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=24), st.integers(1, 8))
def test_both_keys_are_length_and_then_group(rows, size):
    groups, lengths = [list(column) for column in zip(*rows, strict=True)]
    by_length = sorted_inside(size, None, lengths)
    for begin in range(0, len(rows), size):
        inside = [lengths[row] for row in by_length[begin : begin + size]]
        assert inside == sorted(inside, reverse=True)
    then_by_group = sorted_inside(size, [groups[row] for row in by_length], None)
    assert sorted_inside(size, groups, lengths) == [by_length[place] for place in then_by_group]


def test_equal_rows_keep_trls_order():
    assert sorted_inside(4, None, [2, 2, 2, 2]) == [0, 1, 2, 3]
    assert sorted_inside(4, [1, 0, 1, 0], [2, 2, 2, 2]) == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("generation", "step", "expected"), [(4, 2, (2, True)), (2, 4, (2, True)), (4, 4, (4, True)), (3, 4, (1, False))]
)
def test_the_window_is_what_always_shares_a_step(tiny, tmp_path, text_rows, generation, step, expected):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    trainer.args.steps_per_generation, trainer.args.gradient_accumulation_steps = generation, step
    assert (window(trainer), steps_line_up(trainer)) == expected


def test_the_last_key_to_go_takes_the_layer_along(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    before = patched(trainer)
    (group,), (length,) = sort_rows(trainer, "group"), sort_rows(trainer, "length")
    group.remove()
    group.remove()
    assert patched(trainer) != before
    length.remove()
    assert patched(trainer) == before
