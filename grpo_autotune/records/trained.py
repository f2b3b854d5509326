"""The types of `infer` (the lines of its file, the settings beside it, the JSON of its summary) and of `merge`: its
receipt `merged.json` with the log-probs that prove it."""

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


class Difference(Frozen):
    """|difference| of the log-probs that two models give the same tokens, in nats."""

    mean: float
    max: float


class Proof(Frozen):
    """The merged model, read from its folder, held against the trained one and against the base."""

    prompts: str  # what was asked: `8 held-out prompts`
    tokens: int  # log-probs compared, of prompts and greedy answers
    dtype: str  # in which all models computed
    limit: float  # most nats that `merged.max` may have
    factor: float  # `base.mean` is at least so many times `merged.mean`
    merged: Difference  # the merged model from the trained one
    base: Difference | None  # the base model from the trained one; None where a full fine-tune's base is not known


class Merged(Document):
    """A folder with a model that needs no adapter any more. Files are named with their SHA-256."""

    schema_: Literal["grpo-autotune/merged/1"] = Field(default="grpo-autotune/merged/1", alias="schema")
    trained: str  # folder of the trained weights
    base: str | None  # name or folder of the base model
    dtype: str  # of the merged weights
    tied: bool  # True if output and input embeddings are one matrix
    notes: list[str]  # sentences to know about the merged model
    proof: Proof
    trained_files: dict[str, str]
    base_files: dict[str, str]
    files: dict[str, str]  # of the merged folder, this receipt apart
    versions: dict[str, str | None]
