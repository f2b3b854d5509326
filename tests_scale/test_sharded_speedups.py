"""Speed-ups on two processes that share weights or gradients: they learn what plain TRL does, and nobody waits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.sharded_ranks import PATIENCE
from tests.support.wrong_speedups import ALONE, FAILING, WRONG
from tests_scale.launch import launch

EXACT = 1e-5
"""Relative difference of weights that the order of float32 sums explains."""

WORDS = (
    "zero1=text", "zero2=mixed", "zero2=mixed, tower trained", "zero3=text", "zero3=mixed",
    "fsdp2=text", "fsdp2=text, bf16", "fsdp2=images, bf16", "fsdp2=images", "fsdp2=wrong", "fsdp2=failing",
    "zero2=alone",
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, of all combinations in one launch."""
    models, out = tiny("qwen3").parent, tmp_path_factory.mktemp("sharded")
    assert {tiny(kind).parent for kind in ("qwen3_vl", "llama")} == {models}
    done = launch("tests.support.sharded_ranks", str(models), str(out), "2", *WORDS)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.long
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.timeout(600)
def test_weights_and_rewards_are_those_of_plain_trl(found: list[dict[str, Any]], word: str) -> None:
    for told in (ranks[word] for ranks in found):
        assert told["sharded"] and told["same_rewards"], told
        assert told["moved"] <= 1.25 * told["rounded"] if "bf16" in word else told["apart"] < EXACT, told
        off = [name for name, (_, reason) in told["table"].items() if "self-check" in reason]
        assert off == {"fsdp2=wrong": [WRONG], "fsdp2=failing": [FAILING], "zero2=alone": [ALONE]}.get(word, []), told


@pytest.mark.long
@pytest.mark.parametrize("word", ["zero3=early", "fsdp2=alone"])
def test_a_rank_that_fails_alone_in_the_middle_of_a_pass_ends_the_run(
    tiny: Callable[[str], Path], tmp_path: Path, word: str
) -> None:
    begin = time.monotonic()
    done = launch("tests.support.sharded_ranks", str(tiny("qwen3").parent), str(tmp_path), "2", word)
    assert done.returncode == 1 and time.monotonic() - begin < PATIENCE
    assert "rank 1 failed alone where ranks wait for each other: ValueError: no gradient" in done.stderr
