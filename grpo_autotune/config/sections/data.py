"""The `data` section: the prompts, held-out ones, and the columns that rewards read."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from grpo_autotune.config.sections.section import Section
from grpo_autotune.errors import ConfigError


class HeldOut(Section):
    """One held-out set, as `eval_path` and `eval_split` of the data section name it."""

    path: str | None = None
    split: str | None = None


class DataSection(Section):
    """The prompts, and the columns that rewards read."""

    path: str
    """Registered data-set name, .json/.jsonl/.csv/.parquet file, image folder, saved `datasets` folder, or hub id."""
    name: str | None = None
    """Configuration of a hub data set (`main` of openai/gsm8k)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    split: str = "train"
    """Split to train on; slices as in `datasets` (`train[:90%]`). A file has the one split `train`."""
    eval_path: str | None = None
    """Held-out data, where it is not a split of `path`."""
    eval_split: str | None = None
    """Held-out split of `eval_path` (there by default `test`, or a file's one split), or of `path` (`train[90%:]`)."""
    eval: dict[str, HeldOut] = {}
    """Instead of these two, several held-out sets: name -> mapping of `path` and `split`. Each reports its own
    `eval_<name>_loss`; TRL names its metrics (`eval_reward`) alike for all: the best model is the last set's."""
    columns: dict[str, str] = {}
    """Our column -> the data's column: `prompt`, `image`, `images`, and what rewards read (`answer`)."""
    prompt_template: str | None = None
    """Prompt as a format string over columns: `"{question} Answer with a number."`"""
    prompt_format: Literal["messages", "text"] = "messages"
    """Text as a user message, to which the chat template is applied; `text` gives the model the text as it is."""
    system_prompt: str | None = None
    """System message put before every prompt."""
    max_samples: int | None = Field(default=None, ge=1)
    """Number of rows to use, from the first."""
    max_eval_samples: int | None = Field(default=None, ge=1)
    """The same for held-out data."""
    image_size: int | None = Field(default=None, ge=1)
    """Longest side of an image in pixels; larger ones are resized once, aspect kept, and none is enlarged."""
    params: dict[str, Any] = {}
    """Arguments of a registered data-set function."""

    @property
    def held_out(self) -> dict[str, HeldOut]:
        """Held-out sets by name; the one of `eval_path` and `eval_split` has an empty name."""
        one = HeldOut(path=self.eval_path, split=self.eval_split)
        return self.eval or ({} if one == HeldOut() else {"": one})

    @model_validator(mode="after")
    def _sets_are_named(self) -> Self:
        if self.eval and (self.eval_path, self.eval_split) != (None, None):
            raise ConfigError("it takes the place of data.eval_path and data.eval_split", where="data.eval")
        for name, one in self.eval.items():
            if not name or one == HeldOut():
                raise ConfigError("a set needs a name, and a path or a split", where=f"data.eval.{name}")
        return self
