"""The branches section: several objectives in one run, each with its own weight of the KL term and its own rewards."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import ConfigDict, Field, model_validator

from grpo_autotune.config.foreign_keys import wrong_type
from grpo_autotune.config.sections.rewards import RewardItem
from grpo_autotune.config.sections.section import Section
from grpo_autotune.errors import ConfigError, nearest_hint


class BranchEval(Section):
    """Evaluation of a branch."""

    greedy: bool = False
    """One completion of each held-out prompt, of the most likely tokens, in place of samples as in training."""
    samples: int | None = Field(default=None, ge=1)
    """Held-out rows of the branch that are evaluated, from the first; all by default."""


class Branch(Section):
    """A branch."""

    beta: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Weight of the KL term in its rows at the start; `grpo.beta` by default."""
    kl_band: list[float] | None = None
    """`[low, high]` in nats per token: outside of it the controller changes `beta`."""
    rewards: list[str] = []
    """Labels or names of the rewards that judge its rows, beside those that no branch lists."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Its share of an epoch's prompts, given for all branches or for none; by default as the data has them."""
    eval: BranchEval | None = None
    """Its evaluation; by default all its held-out rows, as `grpo` says."""

    @property
    def samples(self) -> int | None:
        return self.eval.samples if self.eval else None


class Control(Section):
    """The controller of `beta`."""

    every: int = Field(default=20, ge=1)
    """Optimizer steps between two decisions; each looks at the mean KL over them."""
    factor: float = Field(default=0.85, gt=0, lt=1)
    """Below 1: above its band a branch's `beta` is divided by it, below multiplied."""


class Branches(Section):
    """Several objectives in one run: `column`, `control`, and for each branch a mapping under its name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Branch]

    column: str | None = None
    """Column of the data whose values are the branches' names; without it one branch has all rows."""
    control: Control | None = Control()
    """`every` and `factor` of the controller; null leaves every `beta` as it starts."""

    @property
    def by_name(self) -> dict[str, Branch]:
        return self.__pydantic_extra__  # in the order of the file

    @model_validator(mode="before")
    @classmethod
    def _keys(cls, values: Any) -> Any:
        for name in values.keys() - cls.model_fields.keys() if isinstance(values, Mapping) else ():
            if not isinstance(values[name], Mapping) or not isinstance(name, str) or "/" in name:
                raise wrong_type(f"branches.{name}", values[name], "column, control, or a mapping (no slash in names)")
        return values

    @model_validator(mode="after")
    def _together(self) -> Self:
        shares = [branch.share for branch in self.by_name.values() if branch.share is not None]
        if not self.by_name:
            raise ConfigError("there is no branch", where="branches", fix="Example: branches: {all: {beta: 0.1}}.")
        for name, band in ((name, branch.kl_band) for name, branch in self.by_name.items()):
            if band is not None and not (len(band) == 2 and 0 <= band[0] < band[1] < math.inf):
                raise wrong_type(f"branches.{name}.kl_band", band, "[low, high] with 0 <= low < high")
        if self.column is None and (len(self.by_name) > 1 or shares):
            raise ConfigError("several branches, or shares, need it", where="branches.column", fix="Name a column.")
        if shares and (len(shares) < len(self.by_name) or not math.isclose(sum(shares), 1.0, abs_tol=1e-6)):
            what = f"{len(shares)} of {len(self.by_name)} have one, {sum(shares):g} together"
            raise ConfigError(what, where="branches.*.share", fix="Give it to all, 1 together, or to none.")
        return self


def branch_paths(section: Any) -> list[str]:
    """Every key path below the branches that a section, as it was written, names."""
    names = section.keys() - Branches.model_fields.keys() if isinstance(section, Mapping) else ()
    parts = (("", Branch), (".eval", BranchEval))
    return [f"branches.{name}{part}.{key}" for name in names for part, model in parts for key in model.model_fields]


def start_weights(branches: Branches, grpo: Mapping[str, Any]) -> dict[str, float]:
    """Each branch's `beta` at the start; ConfigError for one that is not above 0: it would load no reference model."""
    weights = {name: float(branch.beta or grpo.get("beta") or 0.0) for name, branch in branches.by_name.items()}
    if grpo.get("remove_unused_columns") and branches.column is not None:
        fix = f"Leave it out: {branches.column} would be removed."
        raise ConfigError("branches need a column", where="grpo.remove_unused_columns", fix=fix)
    if grpo.get("beta") == 0 or not all(weights.values()):
        where = next((f"branches.{name}.beta" for name, weight in weights.items() if not weight), "grpo.beta")
        raise ConfigError("it must be above 0 from the start", where=where, fix="Give each branch one, or grpo.beta.")
    return weights


def judged_branches(branches: Branches, rewards: Sequence[RewardItem]) -> list[set[str]]:
    """The branches whose rows each reward judges; ConfigError for a name without a reward, or a branch without any."""
    names = [{item.label} if item.label else {item.name, re.split("[:.]", item.name)[-1]} for item in rewards]
    known = sorted(set().union(*names))
    listed = {branch: section.rewards for branch, section in branches.by_name.items()}
    for branch, name in ((key, name) for key in listed for name in listed[key] if name not in known):
        fix = nearest_hint(name, known, f"There are {', '.join(known)}.")
        raise ConfigError(f"no reward has the label or name {name!r}", where=f"branches.{branch}.rewards", fix=fix)
    judged = [{branch for branch in listed if labels & set(listed[branch])} or set(listed) for labels in names]
    for branch in listed.keys() - set().union(*judged):
        raise ConfigError("other branches list every reward", where=f"branches.{branch}.rewards", fix="List one here.")
    return judged
