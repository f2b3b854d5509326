"""The receipt of `grpo-autotune merge`, `merged.json`: what was merged, and the log-probs that prove it."""

from typing import Literal

from pydantic import Field

from grpo_autotune.records.base import Document, Frozen


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
