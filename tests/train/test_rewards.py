"""Rewards judge text as a strict reader would, and a broken reward is one line with its name and the first sample."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import AutotuneError, ConfigError, DataError, RewardError
from grpo_autotune.registry import resolve
from grpo_autotune.train.rewards.answers import completion_text, final_answer, read_box, read_letter, read_number
from grpo_autotune.train.rewards.build import build_rewards
from grpo_autotune.train.rewards.guard import PATIENCE, blaming_layer, guard

GSM8K = Path(__file__).parents[2] / "../shared/data/gsm8k/test.jsonl"


def judge(name: str, completion: Any, params: dict[str, Any] | None = None, **columns: Any) -> float | None:
    """One completion's reward, through the function behind a registered name."""
    batch = {key: [value] for key, value in columns.items()}
    values = resolve("reward", name)(
        prompts=["p"], completions=[completion], completion_ids=[[1, 2, 3]], **batch, **(params or {})
    )
    assert isinstance(values, list)
    return values[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72),
        ("48/2 = <<48/2=24>>24 clips.\n#### 1,072", 1072),
        ("#### 5\nQuestion: what is 9?", 5),
        ("$1,234.50", 1234.5),
        ("1,000,000", 1e6),
        ("1{,}000", 1000),
        ("12,34", 34),
        ("3, 4", 4),
        ("-5", -5),
        ("$-5", -5),
        ("-$5", -5),
        ("\N{MINUS SIGN}7", -7),
        ("(-3)", -3),
        ("16-3-4=9", 9),
        ("10-5", 5),
        ("x = -5", -5),
        (".5", 0.5),
        ("18.", 18),
        ("It is 18 dollars.", 18),
        ("5 m^2", 5),
        ("5 cm2", 5),
        ("50%", 50),
        ("145\N{DEGREE SIGN}", 145),
        ("**72**", 72),
        ("1/2", 0.5),
        ("1 1/2", 1.5),
        (r"\frac{1}{2}", 0.5),
        (r"\boxed{\frac{3}{4}}", 0.75),
        (r"<answer>\boxed{72}</answer>", 72),
        (r"\$18", 18),
        ("2.5e3", 2500),
        ("2^10=1024", 1024),
        ("<answer>7</answer> not 9", 7),
        ("<answer>1</answer> no, <answer>2</answer>", 2),
        ("1 2 3 4 5", 5),
        ("H2O", None),
        ("5/0", None),
        ("none", None),
        ("", None),
        (72, 72),
        (True, None),
    ],
)
def test_reading_a_number(text: object, number: float | None) -> None:
    assert read_number(text) == number


def test_numeric_match() -> None:
    assert judge("numeric_match", "So she makes $18.00 every day.", answer="9 * 2 = 18\n#### 18") == 1.0
    assert judge("numeric_match", "It is 18, no: 19", answer="#### 18") == 0.0
    assert judge("numeric_match", "no number", answer="#### 18") == 0.0
    assert judge("numeric_match", "0", answer="0") == 1.0
    assert judge("numeric_match", "1e-9", answer="0") == 0.0
    assert judge("numeric_match", "18", answer="unknown") is None
    assert judge("numeric_match", "100", {"relative_tolerance": 0.05}, answer=104) == 1.0
    assert judge("numeric_match", "1e400", answer="5") == 0.0
    assert judge("numeric_match", "18", {"column": "target"}, target=18) == 1.0
    assert judge("numeric_match", "1450001", answer="1,450,000") == 0.0
    assert judge("numeric_match", "0.1", answer=1 / 10) == 1.0
    with pytest.raises(ConfigError, match=r"no column answer.*Columns: target\."):
        judge("numeric_match", "18", target=18)


@pytest.mark.skipif(not GSM8K.is_file(), reason="the real GSM8K text is not here")
def test_numeric_match_on_real_gsm8k() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        gold = float(row["answer"].rpartition("####")[2].replace(",", "").replace("$", ""))
        assert read_number(row["answer"]) == gold
        worked = row["answer"].rpartition("####")[0]
        assert judge("numeric_match", f"{worked}\n<answer>${gold:,.2f}</answer>", answer=row["answer"]) == 1.0
        assert judge("numeric_match", f"{worked}\n<answer>{gold + 1}</answer>", answer=row["answer"]) == 0.0
    assert len(rows) > 1000


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. Paris", "B"),
        ("B) Paris", "B"),
        ("(B) Paris", "B"),
        ("The answer is (B).", "B"),
        ("The answer is B", "B"),
        ("The correct answer is option C", "C"),
        ("answer is **C**", "C"),
        ('Final answer: "B"', "B"),
        ("Answer:\n\nB", "B"),
        ("<answer>E</answer>", "E"),
        (r"$\boxed{\text{B}}$", "B"),
        ("I think A dog is there, so C", "C"),
        ("First the answer is A. But then the answer is C.", "C"),
        ("It must be B.", "B"),
        (1, "B"),
        ("A dog", None),
        ("A and B", None),
        ("The answer is A or B", None),
        ("The answer is (A)/(B)", None),
        ("The answer is not B", None),
        ("(A) is wrong, (B) is right", None),
        ("A: x B: y C: z", None),
        ("A B C D E", None),
        ("The answer is a dog", None),
        ("I'd say D'Artagnan", None),
        ("F", None),
        ("", None),
        (7, None),
    ],
)
def test_reading_a_letter(text: object, letter: str | None) -> None:
    assert read_letter(text) == letter


def test_choice_letter() -> None:
    assert judge("choice_letter", "The answer is (B).", answer="B. Paris") == 1.0
    assert judge("choice_letter", "A, B, C, D", answer="B") == 0.0
    assert judge("choice_letter", "G", {"letters": "ABCDEFG"}, answer=6) == 1.0
    assert judge("choice_letter", "A", answer="") is None


def test_exact_match() -> None:
    assert judge("exact_match", "<answer> New  York. </answer>", answer="new york") == 1.0
    assert judge("exact_match", "<answer>Paris</answer>", {"ignore_case": False}, answer="paris") == 0.0
    assert judge("exact_match", "Paris or Rome", answer="Paris") == 0.0
    assert judge("exact_match", "7", answer=7) == 1.0
    assert judge("exact_match", "", answer="x") == 0.0
    assert judge("exact_match", "x", answer=None) is None
    assert judge("exact_match", "<answer>B</answer>", answer="<think>..</think><answer>B</answer>") == 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<answer>7</answer>", 1.0),
        ("<think>so</think>\n<answer>\n7\n</answer>\n", 1.0),
        ("<answer>7</answer> and more", 0.0),
        ("<answer>7", 0.0),
        ("7</answer>", 0.0),
        ("<answer> </answer>", 0.0),
        ("<answer></answer>", 0.0),
        ("<answer>1</answer><answer>2</answer>", 0.0),
        ("<answer><answer>1</answer></answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(text: str, reward: float) -> None:
    assert judge("format", text) == reward


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    "text", ["<answer>" + "x " * 20000, "answer" + " " * 20000, "1" * 20000, "\\boxed{" + "{" * 20000]
)
def test_degenerate_completions_are_judged_quickly(text: str) -> None:
    for name in ("format", "exact_match", "numeric_match", "choice_letter", "box_iou"):
        assert judge(name, text, answer="[1, 2, 3, 4] B") in (0.0, None)


def test_regex_and_own_format_pattern() -> None:
    assert judge("regex", "one\ntwo", {"pattern": "one.two"}) == 1.0
    assert judge("format", "xone", {"pattern": "one"}) == 0.0
    with pytest.raises(ConfigError, match="is not a pattern"):
        judge("regex", "x", {"pattern": "("})


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[1,2,3,4]", (1, 2, 3, 4)),
        ('{"bbox_2d": [10, 20.5, 30, 40.], "label": "cat"}', (10, 20.5, 30, 40)),
        ("<answer>(0, 0, 1, 1)</answer> [9, 9, 9, 9]", (0, 0, 1, 1)),
        ("[[-1, .5, 3, 4]]", (-1, 0.5, 3, 4)),
        ([1, 2, 3, 4], (1, 2, 3, 4)),
        ([1, 2, 3], None),
        ([1, None, 3, 4], None),
        ("[nan, 1, 2, 3]", None),
        ("[1, 2, 3]", None),
    ],
)
def test_reading_a_box(text: object, box: tuple[float, ...] | None) -> None:
    assert read_box(text) == box


def test_box_iou() -> None:
    assert judge("box_iou", "[0, 0, 2, 2]", answer=[0, 0, 2, 2]) == 1.0
    assert judge("box_iou", "[0, 0, 2, 2]", answer=[1, 1, 3, 3]) == pytest.approx(1 / 7)
    assert judge("box_iou", "[0, 0, 2, 2]", answer="[2, 0, 4, 2]") == 0.0
    assert judge("box_iou", "[2, 2, 0, 0]", answer=[0, 0, 2, 2]) == 0.0
    assert judge("box_iou", "[0, 0, 2, 1]", {"threshold": 0.5}, answer=[0, 0, 2, 2]) == 1.0
    assert judge("box_iou", "[0, 0, 2, 0.9]", {"threshold": 0.5}, answer=[0, 0, 2, 2]) == 0.0
    assert judge("box_iou", "nothing", answer=[0, 0, 2, 2]) == 0.0
    assert judge("box_iou", "[0, 0, 1, 1]", answer=None) is None


def test_length_falls_from_target_to_maximum() -> None:
    function = resolve("reward", "length")
    ids = [[0] * tokens for tokens in (0, 10, 15, 20, 30)]
    assert function(completion_ids=ids, target_tokens=10, max_tokens=20) == [1.0, 1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ConfigError, match="must be above target_tokens"):
        function(completion_ids=ids, target_tokens=20, max_tokens=20)


def test_text_of_a_completion() -> None:
    assert completion_text("x") == "x"
    assert completion_text([{"role": "assistant", "content": "x"}]) == "x"
    assert (
        completion_text([{"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}]) == "x"
    )
    turns = [
        {"role": "assistant", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "3"},
    ]
    assert completion_text(turns) == "3"
    assert completion_text([{"role": "assistant", "content": None}]) == "" and completion_text([]) == ""
    assert judge("exact_match", [{"role": "assistant", "content": "<answer>7</answer>"}], answer="7") == 1.0
    assert final_answer("a #### b\nc") == "b"


# The guard

BATCH: dict[str, Any] = {
    "prompts": [[{"role": "user", "content": "two plus two?"}]] * 2,
    "completions": ["four", "five"],
    "completion_ids": [[1], [2]],
    "answer": ["4", "4"],
    "trainer_state": object(),
}


def ones(completions: list[str], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


async def async_ones(completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return [1.0 for _ in completions]


def raises(completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("gold")


async def async_raises(completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("gold")


def short(completions: list[str], **columns: Any) -> list[float]:
    return [1.0]


def scalar(completions: list[str], **columns: Any) -> float:
    return 1.0


def words(completions: list[str], **columns: Any) -> list[str]:
    return ["good", "bad"]


def nones(completions: list[str], **columns: Any) -> list[None]:
    return [None for _ in completions]


def scaled(completions: list[str], answer: list[str], scale: float = 1.0, **columns: Any) -> list[float]:
    return [scale * len(answer) for _ in completions]


class Instance:
    async def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [3.0 for _ in completions]


instance = Instance()
bound = functools.partial(scaled, scale=4.0)


def rewards(*items: Any) -> list[dict[str, Any]]:
    return [item if isinstance(item, dict) else {"name": item} for item in items]


def built(*items: Any, columns: list[str] | None = None) -> tuple[list[Any], list[float], list[str]]:
    values = {"model": {"name_or_path": "m"}, "data": {"path": "d"}, "rewards": rewards(*items)}
    return build_rewards(RunConfig.from_dict(values), columns)


HERE = __name__


def test_functions_weights_and_unique_names() -> None:
    functions, weights, names = built(
        {"name": "format", "weight": 0.5}, f"{HERE}:ones", {"name": "format", "params": {"pattern": "four"}}
    )
    assert names == ["format", "ones", "format_2"] == [function.__name__ for function in functions]
    assert weights == [0.5, 1.0, 1.0]
    assert [function(**BATCH) for function in functions] == [[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]]


def test_sync_stays_sync_and_async_async() -> None:
    functions, _, _ = built(f"{HERE}:ones", f"{HERE}:async_ones", f"{HERE}:instance", f"{HERE}:bound")
    assert [inspect.iscoroutinefunction(function) for function in functions] == [False, True, True, False]
    assert asyncio.run(functions[1](**BATCH)) == [1.0, 1.0]
    assert asyncio.run(functions[2](**BATCH)) == [3.0, 3.0]
    assert functions[3](**BATCH) == [8.0, 8.0]


def closed(
    prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, log_extra: Any, log_metric: Any, gold: Any
) -> list[float]:
    return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("item", "columns", "expected"),
    [
        (f"{HERE}:closed", ["prompt", "completion", "gold"], None),  # TRL keeps the first two
        (f"{HERE}:closed", ["prompt", "gold", "image"], "takes no image, which TRL gives"),
        (f"{HERE}:closed", ["prompt", "completion"], "needs gold"),
        ("exact_match", ["prompt", "answer"], None),
        ("exact_match", ["prompt", "completion"], "the data has no column answer"),
        ({"name": "regex", "params": {"pattern": "("}}, ["prompt"], "pattern"),
    ],
)
def test_the_columns_of_the_data_are_those_that_trl_gives(item: Any, columns: list[str], expected: str | None) -> None:
    with nullcontext() if expected is None else pytest.raises(ConfigError, match=expected):
        built(item, columns=columns)


def test_params_win_over_a_column_of_the_same_name() -> None:
    (function,), _, _ = built({"name": f"{HERE}:scaled", "params": {"scale": 3.0}})
    assert function(**BATCH, scale=[7.0, 7.0]) == [6.0, 6.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raises", "reward raises: raised KeyError: 'gold'. First sample: prompt "),
        ("short", "reward short: returned 1 values for 2 completions. First sample: prompt "),
        ("scalar", "reward scalar: returned float, not a list of numbers. First sample: prompt "),
        ("words", "reward words: returned 'good' (str), which is not a number. First sample: prompt "),
        ("nones", "reward nones: returned only None, so there is nothing to learn from. First sample: prompt "),
    ],
)
def test_a_broken_reward_is_named_with_the_first_sample(name: str, expected: str) -> None:
    (function,), _, _ = built(f"{HERE}:{name}")
    with pytest.raises(RewardError) as caught:
        function(**BATCH)
    text = str(caught.value)
    assert text.startswith(expected) and "\n" not in text
    assert "two plus two?" in text and "completion four" in text and "answer 4" in text


@pytest.mark.parametrize(
    ("values", "told"), [([float("inf"), 0.0], "infinite reward"), ([float("nan"), None], "returned only None")]
)
def test_rewards_that_are_no_numbers_are_refused(values: list[float | None], told: str) -> None:
    with pytest.raises(RewardError, match=told):
        guard(lambda **batch: values, "odd", {}, alone=True)(**BATCH)


def test_a_broken_async_reward_is_named_too() -> None:
    (function,), _, _ = built(f"{HERE}:async_raises")
    with pytest.raises(RewardError, match="reward async_raises: raised KeyError"):
        asyncio.run(function(**BATCH))


def test_our_own_errors_keep_their_kind() -> None:
    (function,), _, _ = built({"name": "numeric_match", "params": {"column": "gold"}})
    with pytest.raises(ConfigError, match="the data has no column gold"):
        function(**BATCH)


def test_one_reward_of_several_may_abstain_from_batches_but_not_for_ever() -> None:
    functions, _, _ = built(f"{HERE}:nones", f"{HERE}:ones")
    for _ in range(PATIENCE - 1):
        assert functions[0](**BATCH) == [None, None]
    with pytest.raises(RewardError, match="reward nones: returned only None"):
        functions[0](**BATCH)
    judges_some, _, _ = built({"name": "numeric_match"}, f"{HERE}:ones")
    assert judges_some[0](**BATCH) == [0.0, 0.0]
    for _ in range(2 * PATIENCE):
        assert judges_some[0](**(BATCH | {"answer": ["x", "y"]})) == [None, None]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (
            {"name": "numeric_match", "params": {"relative_tolerence": 1}},
            "no such parameter. Nearest: relative_tolerance.",
        ),
        ({"name": "regex", "params": {"zzz": 1}}, "Parameters: pattern."),
        ({"name": "exact_mach"}, "Nearest: exact_match."),
    ],
)
def test_a_wrong_parameter_or_name_is_found_before_training(item: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(item)
    assert expected in str(caught.value)


def test_trl_sees_name_and_kind_of_guarded_rewards() -> None:
    from trl.trainer.utils import get_callable_name, is_async_callable

    functions, _, names = built("format", f"{HERE}:async_ones")
    assert [get_callable_name(function) for function in functions] == names
    assert [is_async_callable(function) for function in functions] == [False, True]


def test_a_scripts_reward_is_blamed_by_name_and_keeps_our_own_errors():
    def run(error, awaited):
        def fails():
            raise error

        async def fails_later():
            fails()

        layer = blaming_layer("judge", awaited=awaited)
        with pytest.raises(AutotuneError) as caught:
            asyncio.run(layer(fails_later)) if awaited else layer(fails)
        return caught.value

    for awaited in (False, True):
        blamed, ours = run(KeyError("score"), awaited), run(DataError("row 3"), awaited)
        assert str(blamed) == "reward judge: raised KeyError: 'score'" and isinstance(blamed.__cause__, KeyError)
        assert str(ours) == "row 3" and ours.__cause__ is None  # its own cause would be a chain without an end
