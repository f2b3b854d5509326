"""The types of `infer`: the lines of its file, the settings beside it, and the JSON of its summary."""

from typing import Any, Final, Literal

from pydantic import ConfigDict, Field

from grpo_autotune.records.base import Document, Frozen

TOTAL: Final = "total"
"""Name of the weighted sum among the scores."""


class Completion(Frozen):
    """A line of the file: one completion of one row."""

    model_config = ConfigDict(ser_json_bytes="base64", ser_json_inf_nan="null")

    row: int  # of the data, counted from 0
    sample: int  # of the row, from 0
    prompt: str  # as the chat template makes it, a picture as its placeholder
    completion: str
    rewards: dict[str, float | None]  # None for one that does not apply to the row, or whose score could not be had
    failed: list[str]  # rewards whose score could not be had
    total: float | None  # the rewards by their weights; None where none applies, or one failed
    tokens: int  # of the completion, its end included
    truncated: bool  # True if the limit of tokens ended it
    branch: str | None
    columns: dict[str, Any]  # all columns of the row but prompt and pictures


class Settings(Document):
    """The settings of a file, on which its completions depend: only the same ones may go on with it."""

    schema_: Literal["grpo-autotune/infer-settings/2"] = Field(default="grpo-autotune/infer-settings/2", alias="schema")
    checkpoint: str
    weights: str  # digest of the files that hold them
    backend: Literal["generate", "vllm"]
    data: str
    rows: str  # digest of the rows without their images, in their order
    image_size: int | None
    n: int  # completions of each prompt
    greedy: bool
    sampling: dict[str, Any]  # keys of `grpo`
    prompts: dict[str, Any] = {}  # keys of `data` and `model` that prompts depend on, beside the rows
    rewards: list[dict[str, Any]]  # items of the configuration


class Score(Frozen):
    """One reward, or the total, over the completions of a branch or over all."""

    branch: str | None  # None for all
    reward: str
    mean: float | None  # None where no completion has one
    low: float | None  # ends of the interval of the mean; None below two prompts
    high: float | None
    prompts: int  # those that have a score
    completions: int
    failed: int  # completions whose score could not be had
    truncated: float  # share of the branch's completions


class Inference(Document):
    """The JSON of `infer`: what the whole file holds, and how fast this call wrote its part."""

    schema_: Literal["grpo-autotune/infer/1"] = Field(default="grpo-autotune/infer/1", alias="schema")
    out: str
    settings: Settings
    confidence: float  # of the intervals, by Student's t over the prompts' means
    prompts: int
    completions: int
    truncated: float  # share of them
    tokens: float  # mean of them
    written: int  # completions that this call wrote
    tokens_per_s: float | None  # of this call's generation; None where nothing was left to do
    scores: list[Score]
