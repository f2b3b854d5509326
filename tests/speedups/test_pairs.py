"""Speed-ups two by two and all together: the same rewards and the same weights as plain TRL at the same seed."""

from __future__ import annotations

import itertools

import pytest

from grpo_autotune.registry import names
from tests.support.pairs import gap, patched, rewards_of, trained, weights_of
from tests.support.trainers import SAME, make_trainer

from grpo_autotune.speedups.install import speed_up  # isort: skip

NAMES = tuple(name for name in names("speedup") if name != "lora_input")
"""All but the one that needs half precision, whose numbers are the same bits (`test_lora_input`)."""

RUNS = 6
FOURS = dict(zip(NAMES, itertools.combinations(range(RUNS), 4), strict=False))
SOME = [[name for name in NAMES if run in FOURS[name]] for run in range(RUNS)]
"""Each speed-up is on in four runs of six, no two in the same four: with the plain run, every two of them are on
together, each without the other, and both off (Kleitman and Spencer 1973, Families of k-independent sets)."""
PAIRS = list(itertools.combinations(NAMES, 2))

EVERYWHERE = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_generations": 4,
    "num_iterations": 2,
    "beta": 0.0,
    "max_completion_length": 8,
    "max_steps": 5,
}
"""Where all of them apply: reuse of completions makes an old-policy pass, and without KL a dead row has no gradient."""


def half_dead(completions, **kwargs):
    return [float(index % 8 == 0) for index in range(len(completions))]


def run(names, tiny, tmp_path, rows, kind):
    return trained(names, tiny(kind), rows, tmp_path, rewards=[half_dead, zero], **EVERYWHERE)


async def zero(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory, picture_rows):
    trainer, _ = run("none", tiny, tmp_path_factory.mktemp("plain"), picture_rows, "qwen3_vl")
    return rewards_of(trainer), weights_of(trainer)


def test_every_two_are_met():
    states = {frozenset([(one, one in run), (other, other in run)]) for run in [*SOME, []] for one, other in PAIRS}
    assert len(states) == 4 * len(PAIRS)


@pytest.mark.parametrize("names", [*SOME, list(NAMES)], ids="+".join)
def test_two_by_two(tiny, tmp_path, picture_rows, plain, names):
    trainer, speedups = run(names, tiny, tmp_path, picture_rows, "qwen3_vl")
    off = [row for row in speedups.table() if row.name in names and not row.on]
    assert not off
    assert rewards_of(trainer) == plain[0]
    assert gap(weights_of(trainer), plain[1]) < SAME


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3", "llama"])
def test_all_that_fit_on_other_models(tiny, tmp_path, picture_rows, text_rows, kind):
    rows = picture_rows if kind.endswith("vl") else text_rows
    wanted, _ = run("none", tiny, tmp_path, rows, kind)
    trainer, speedups = run("auto", tiny, tmp_path, rows, kind)
    assert rewards_of(trainer) == rewards_of(wanted)
    assert gap(weights_of(trainer), weights_of(wanted)) < SAME
    on = {row.name for row in speedups.table() if row.on}
    images = {"images_once", "vision_cache", "patch_embed"}
    assert on == set(NAMES) - (set() if kind.endswith("vl") else images)


def test_removal_of_all_leaves_nothing(tiny, tmp_path, picture_rows):
    trainer = make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path, rewards=[half_dead, zero], **EVERYWHERE)
    before = patched(trainer)
    speed_up(trainer).remove()
    assert patched(trainer) == before
