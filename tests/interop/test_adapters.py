"""Reward files of other frameworks, unchanged, through the module that is written for them, called as TRL calls."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.adapters import formulas
from grpo_autotune.interop.adapters.called import Called
from grpo_autotune.interop.adapters.named import NAMED, adapter, overlong_penalty
from grpo_autotune.registry import resolve
from grpo_autotune.train.rewards.build import build_rewards
from grpo_autotune.train.trainer import run_training
from tests.support.training import log_lines, text_config

TEXTS = ["It is 4.", "It is 5."]
BATCH: dict[str, Any] = {
    "prompts": [[{"role": "user", "content": "2 + 2?"}]] * 2,
    "completions": [[{"role": "assistant", "content": text}] for text in TEXTS],
    "completion_ids": [[1, 2, 3], [1, 2]],
    "ground_truth": ["4", "4"],
    "data_source": ["sums", "sums"],
    "extra_info": [{"index": 7}, None],
    "trainer_state": None,
}

VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, weight=1.0):
    assert data_source == "sums" and "num_turns" in extra_info
    score = weight * (f" {ground_truth}." in solution_str) + extra_info.get("index", 0)
    return {RETURNED}
"""
VERL_BATCH = """
def compute_score(data_sources, solution_strs, ground_truths, extra_infos):
    return [{"score": float(t in s), "acc": 1} for s, t in zip(solution_strs, ground_truths)]
"""
VERL_BUILT_IN = """
def compute_score(solution_str, ground_truth, score=1.0):
    return score if ground_truth in solution_str else 0
"""
EASYR1_BATCH = """
REWARD_NAME, REWARD_TYPE = "sums", "batch"
def compute_score(reward_inputs, format_weight=0.1):
    assert [one["response_length"] for one in reward_inputs] == [3, 2]
    return [
        {"overall": (1 - format_weight) * (one["ground_truth"] in one["response"]), "format": 0.0}
        for one in reward_inputs
    ]
"""
EASYR1_SEQUENTIAL = """
REWARD_TYPE = "sequential"
def compute_score(reward_input, **kwargs):
    return {"overall": float(reward_input["ground_truth"] in reward_input["response"])}
"""
EASYR1_OLD = """
def compute_score(predict_str: str, ground_truth: str, format_weight: float = 0.1):
    return {"overall": float(ground_truth in predict_str)}
"""
EASYR1_LISTS = """
def compute_score(predicts, ground_truths):
    return [{"overall": float(t in p)} for p, t in zip(predicts, ground_truths)]
"""
SWIFT = """
from swift.infer_engine import RequestConfig
from swift.plugin import ORM, orms, rm_plugins
from swift.plugin.multi_turn import MultiTurnScheduler, multi_turns
from swift.utils import get_logger
logger = get_logger()

class Sums(ORM):
    def __call__(self, completions, ground_truth, **kwargs):
        assert len(kwargs["response_token_ids"][0]) == 3
        return [float(t in c) * self.args.scale for c, t in zip(completions, ground_truth)]

class Later(MultiTurnScheduler):
    pass

class Asking(ORM):
    def __init__(self):
        self.config = RequestConfig(temperature=0.7)

orms['sums'] = Sums
orms['asking'] = Asking
multi_turns['later'] = Later
"""
SWIFT_ASYNC = """
import asyncio
from swift.rewards import AsyncORM, orms
class Sums(AsyncORM):
    async def __call__(self, completions, ground_truth, **kwargs):
        await asyncio.sleep(0)
        return [float(t in c) for c, t in zip(completions, ground_truth)]
orms['async_sums'] = Sums
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Writes a reward file and its adapter, and gives the function that `rewards` names."""
    monkeypatch.chdir(tmp_path)
    modules, path, finders = set(sys.modules), list(sys.path), list(sys.meta_path)

    def written(style: str, text: str, function: str = "compute_score", **arguments: Any) -> Any:
        (tmp_path / "math.py").write_text(text)
        made = adapter(style, "math.py", function, arguments)
        (tmp_path / made.name).write_text(made.text)
        compile(made.text, made.name, "exec")
        importlib.invalidate_caches()
        return resolve("reward", made.reward["name"])

    yield written
    sys.path[:], sys.meta_path[:] = path, finders
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] == "swift" or name.startswith(("rewards_of_", *("verl_", "easyr1_", "swift_"))):
            del sys.modules[name]


@pytest.mark.parametrize("returned", ["score", '{"score": score, "acc": 1.0}', "(score, 'why')"])
def test_verl(returned: str, write: Callable[..., Any]) -> None:
    reward = write("verl", VERL.replace("{RETURNED}", returned), weight=0.5)
    assert reward(**BATCH) == [7.5, 0.0]
    assert reward(**{**BATCH, "completions": TEXTS}) == [7.5, 0.0]
    assert list(inspect.signature(reward).parameters)[2:5] == ["ground_truth", "data_source", "extra_info"]


@pytest.mark.parametrize("text", [VERL_BATCH, VERL_BUILT_IN])
def test_verls_other_signatures(text: str, write: Callable[..., Any]) -> None:
    assert write("verl", text)(**BATCH) == [1.0, 0.0]


def test_an_async_function_stays_one(write: Callable[..., Any]) -> None:
    reward = write("verl", VERL.replace("def ", "async def ").replace("{RETURNED}", "score"))
    assert inspect.iscoroutinefunction(reward) and asyncio.run(reward(**BATCH)) == [8.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [(EASYR1_BATCH, 0.8), (EASYR1_SEQUENTIAL, 1.0), (EASYR1_OLD, 1.0), (EASYR1_LISTS, 1.0)],
)
def test_easyr1(text: str, expected: float, write: Callable[..., Any]) -> None:
    arguments = {"format_weight": 0.2} if text is EASYR1_BATCH else {}
    assert write("easyr1", text, **arguments)(**BATCH) == [pytest.approx(expected), 0.0]


def test_easyr1s_function_of_one_completion_by_the_configuration(write: Callable[..., Any]) -> None:
    assert write("easyr1_each", EASYR1_SEQUENTIAL.replace("REWARD_TYPE", "KIND"))(**BATCH) == [1.0, 0.0]


def test_a_plugin_of_swift(write: Callable[..., Any]) -> None:
    assert write("swift", SWIFT, "sums", scale=3)(**BATCH) == [3.0, 0.0]


def test_an_async_plugin_of_swift(write: Callable[..., Any]) -> None:
    assert asyncio.run(write("swift", SWIFT_ASYNC, "async_sums")(**BATCH)) == [1.0, 0.0]


def test_what_is_not_here_of_swift_refuses_to_be_called(write: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="a plugin calls RequestConfig of ms-swift"):
        write("swift", SWIFT, "asking")


@pytest.mark.parametrize(
    ("text", "function", "told"),
    [
        ("import no_such_package", "compute_score", "cannot be imported: No module named 'no_such_package'"),
        ("def score(): ...", "compute_score", r"has no compute_score.* It has score\."),
    ],
)
def test_a_file_that_cannot_be_called(text: str, function: str, told: str, write: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=told):
        write("verl", text, function)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no Python file .*gone\.py"):
        Called("verl", "gone.py", "f", {}, str(tmp_path / "adapter.py"))
    with pytest.raises(ConfigError, match=r"no style of rewards verle\. Nearest: verl"):
        adapter("verle", "a.py", "f")


def test_formulas() -> None:
    whole = "<think>\n1. First, a\n- b\n</think>\n<answer>\n7\n</answer>"
    texts = [whole, "a b c a b c", ""]
    assert formulas.tag_count(completions=texts) == [1.0, 0.0, 0.0]
    assert formulas.reasoning_steps(completions=texts) == [pytest.approx(2 / 3), 0.0, 0.0]
    assert formulas.repetition_of_words(completions=texts, max_penalty=-2.0) == [0.0, -0.5, 0.0]
    sources, truths = ["openai/gsm8k"] * 3, ["1200", "3", "3"]
    gsm8k = ["#### 7 no, #### 1,200", "3", "#### 3" + "." * 400]
    assert formulas.verl_by_data_source(completions=gsm8k, data_source=sources, ground_truth=truths) == [1.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="verl's built-in reward for lighteval/MATH is not here"):
        formulas.verl_by_data_source(completions=["a"], data_source=["lighteval/MATH"], ground_truth=["a"])


def test_every_named_reward_can_be_built() -> None:
    settings = {"cosine_max_len": 100, "max_completion_len": 90, "soft_punish_cache": 10}
    settings |= {"soft_max_length": 90, "soft_cache_length": 10, "repetition_n_grams": 2}
    items = [one.item(settings) for one in NAMED.values() if one.name] + [overlong_penalty(90, 10, 0.5)]
    config = RunConfig.from_dict({"model": {"name_or_path": "m"}, "data": {"path": "d"}, "rewards": items})
    functions, weights, _ = build_rewards(config)
    assert len(functions) == len(items) and weights[-1] == 0.5
    assert all(one.note for one in NAMED.values() if not one.name)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        (
            ("open-r1", "format"),
            "<think>\na\n</think>\n<answer>\nb\n</answer>",
            "x<think>\na\n</think>\n<answer>\nb\n</answer>",
        ),
        (("swift", "format"), "<think>a</think> <answer>b</answer>", "<think>a</think> <answer>b</answer>\n"),
        (("swift", "react_format"), "<think>a</think> Action: b\nAction Input: c", "Action: b\nAction Input: c"),
    ],
)
def test_formats(name: tuple[str, str], right: str, wrong: str) -> None:
    item = NAMED[name].item({})
    assert resolve("reward", item["name"])(completions=[right, wrong], **item["params"]) == [1.0, 0.0]


@pytest.mark.slow
def test_a_training_with_verls_reward_over_its_parquet(
    tiny: Callable[[str], Path], write: Callable[..., Any], tmp_path: Path
) -> None:
    write("verl", VERL.replace("{RETURNED}", "len(solution_str) / 1000"))
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n} + 1?"}],
            "data_source": "sums",
            "reward_model": {"ground_truth": str(n + 1), "style": "rule"},
            "extra_info": {"index": n},
        }
        for n in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    made = adapter("verl", "math.py", "compute_score")
    changes = {
        "data": {"path": str(tmp_path / "train.parquet"), "columns": made.columns, "params": {}},
        "rewards": [made.reward],
    }
    config = text_config(tiny("qwen3"), tmp_path, changes, max_steps=1)
    run_training(config, tmp_path / "run")
    (line, *_) = [one for one in log_lines(tmp_path / "run") if "rewards/compute_score/mean" in one]
    assert line["rewards/compute_score/mean"] >= 0 and json.dumps(line)
