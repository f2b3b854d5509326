"""The `data` section: the prompts, held-out ones, and the columns that rewards read."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from grpo_autotune.config.sections.section import Section
from grpo_autotune.config.template_text import prompt_template_text
from grpo_autotune.errors import ConfigError

Overflow = Literal["filter", "error", "left"]


class HeldOut(Section):
    """One held-out set, as `eval_path` and `eval_split` of the data section name it."""

    path: str | None = None
    split: str | None = None


class Source(Section):
    """One data set: where its rows are, and how they are read."""

    path: str
    """Registered data-set name, .json/.jsonl/.csv/.parquet file, image folder, saved `datasets` folder, hub id, or a
    name in the registry (docs/data.md)."""
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
    split_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Instead of these two, the share of the rows of `split` that is drawn with `seed` and held out."""
    columns: dict[str, str] = {}
    """Our column -> the data's column: `prompt`, `image`, `images`, and what rewards read (`answer`); a dot goes into
    what a column holds: `reward_model.ground_truth`, `messages.0.content`, `conversations.:-1` (all but the last)."""
    prompt_template: Annotated[str | None, AfterValidator(prompt_template_text)] = None
    """Prompt over columns as a format string, `"{question} Answer with a number."`, or in Jinja, `"{{ question }}"`, or
    a file of Jinja (`.jinja`, `.j2`), which is read right away."""
    prompt_format: Literal["messages", "text"] = "messages"
    """Text as a user message, to which the chat template is applied; `text` gives the model the text as it is."""
    system_prompt: str | None = None
    """System message put before every prompt."""
    subsample: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Number of rows to train on, or (below 1) their share, drawn with `seed` after `split_ratio`."""
    max_samples: int | None = Field(default=None, ge=1)
    """Number of rows to use, from the first."""
    max_eval_samples: int | None = Field(default=None, ge=1)
    """The same for held-out data."""
    image_size: int | None = Field(default=None, ge=1)
    """Longest side of an image in pixels; larger ones are resized once, aspect kept, and none is enlarged."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Most pixels of an image, width times height; larger ones are shrunk, aspect kept, after `image_size`."""
    min_pixels: int | None = Field(default=None, ge=1)
    """Least pixels of an image; smaller ones are enlarged, aspect kept, whatever `image_size` says."""
    image_root: str | None = None
    """Folder that relative image paths start from; by default that of the data file."""
    params: dict[str, Any] = {}
    """Arguments of a registered data-set function."""

    @property
    def held_out(self) -> dict[str, HeldOut]:
        """Held-out sets by name; the one of `eval_path` and `eval_split`, or of `split_ratio`, has an empty name."""
        one = HeldOut(path=self.eval_path, split=self.eval_split)
        return {} if one == HeldOut() and self.split_ratio is None else {"": one}

    @model_validator(mode="after")
    def _draws_are_possible(self) -> Self:
        if self.split_ratio is not None and (self.eval_path, self.eval_split) != (None, None):
            raise ConfigError("it takes the place of eval_path and eval_split", where="data.split_ratio")
        if self.subsample is not None and self.subsample >= 1 and self.subsample % 1:
            what = f"{self.subsample} is neither a number of rows nor a share below 1"
            raise ConfigError(what, where="data.subsample")
        _check_area(self.max_pixels, self.min_pixels, "data.min_pixels")
        return self


class Part(Source):
    """One data set of a mixture."""

    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Its part of an epoch's rows, against the weights of the others; by default its number of rows, so that data sets
    without weights are one, each row of which an epoch has once."""


class DataSection(Source):
    """The prompts, and the columns that rewards read."""

    eval: dict[str, HeldOut] = {}
    """Instead of `eval_path` and `eval_split`, several held-out sets: name -> mapping of `path` and `split`. Each
    reports its own `eval_<name>_loss`; TRL names its metrics (`eval_reward`) alike for all: the best model is the last
    set's."""
    mix: dict[str, Part] = {}
    """A mixture instead of one data set, or several files: name -> weight (a name in the registry), or mapping of
    `weight`, `path` and these keys; the section's `path` then is its title. A row's column `dataset` holds the name."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a prompt as the model gets it: chat template applied, each image counted in its tokens."""
    prompt_overflow: Overflow = "filter"
    """For longer prompts: `filter` leaves their rows out, training and held-out ones, and tells how many; `error` ends
    with the first one's row; `left` keeps a prompt's last tokens, and ends where its row has an image."""
    seed: int = Field(default=0, ge=0)
    """Seed of `split_ratio`, `subsample` and the order of a mixture; that of training (`grpo.seed`) leaves it alone."""
    registry: str | None = None
    """File of named data sets; by default `datasets.yaml`, beside the configuration or in the current folder."""

    @property
    def sources(self) -> dict[str, Source]:
        """Data sets that are read, by their place in a configuration: this one, or the parts of the mixture."""
        return {f"data.mix.{name}": part for name, part in self.mix.items()} or {"data": self}

    @property
    def held_out(self) -> dict[str, HeldOut]:
        """Held-out sets by name; the one that is not named, a mixture's for instance, has an empty name."""
        of_parts = {"": HeldOut()} if any(part.held_out for part in self.mix.values()) else {}
        return self.eval or of_parts or super().held_out

    @model_validator(mode="after")
    def _sets_are_named(self) -> Self:
        for key in self.model_fields_set & set(OF_PARTS) if self.mix else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                fix = f"Write data.mix.{next(iter(self.mix))}.{'eval_path' if key == 'eval' else key}."
                raise ConfigError(
                    "the data sets of a mixture have this key, each its own", where=f"data.{key}", fix=fix
                )
        for name, part in self.mix.items():
            area = self.max_pixels or part.max_pixels, self.min_pixels or part.min_pixels
            _check_area(*area, f"data.mix.{name}.min_pixels")
        if self.eval and (self.split_ratio, self.eval_path, self.eval_split) != (None, None, None):
            raise ConfigError(
                "it takes the place of data.eval_path, data.eval_split and data.split_ratio", where="data.eval"
            )
        for name, one in self.eval.items():
            if not name or one == HeldOut():
                raise ConfigError("a set needs a name, and a path or a split", where=f"data.eval.{name}")
        return self


def _check_area(most: int | None, least: int | None, where: str) -> None:
    if most is not None and least is not None and least > most:
        raise ConfigError(f"{least} is more than max_pixels {most}", where=where)


IMAGE_LIMITS = ("image_size", "max_pixels", "min_pixels")
OF_PARTS = (*sorted(Source.model_fields.keys() - {"path", "subsample", "max_samples", *IMAGE_LIMITS}), "eval")
"""Keys of the section that a mixture leaves to its parts."""
