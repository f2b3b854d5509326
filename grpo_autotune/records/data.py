"""The types of `data --json`; `docs/data.md` explains every key."""

from typing import Literal

from pydantic import Field

from grpo_autotune.records.base import Document, Frozen


class ShownImage(Frozen):
    """An image as the processor gets it, resized where `data.image_size` says so."""

    width: int  # pixels
    height: int
    tokens: int | None  # of the prompt; None where the model's processor cannot tell


class ShownRow(Frozen):
    """One row as the model sees it."""

    row: int  # among the training rows, counted from 0
    text: str  # the prompt's tokens as text, the chat template's included; of an image's, the first and their number
    images: list[ShownImage]
    columns: dict[str, str]  # those that rewards read -> value as text


class ReferenceScores(Frozen):
    """Scores that one reward gives to the data's reference answers, each as if it were the completion."""

    name: str
    reads: list[str]  # columns of the data
    reference: str | None  # the column that was scored; None where there is none, or nothing was asked
    scores: dict[int, float | None]  # row -> score, of all that were looked at
    note: str | None  # why it was not scored, or of rows whose own reference has less than the best score


class DataView(Document):
    """A configuration's data as the model will see it, and scores of its reference answers."""

    schema_: Literal["grpo-autotune/data/1"] = Field(default="grpo-autotune/data/1", alias="schema")
    source: str  # `data.path`
    rows: int  # to train on; of a mixture or of branches with shares, those of an epoch
    held_out: dict[str, int]  # rows by set; one that is not named has an empty name
    columns: list[str]
    prompt_tokens: dict[int, int]  # row -> tokens, images included, of all that were looked at
    shown: list[ShownRow]
    rewards: list[ReferenceScores]
