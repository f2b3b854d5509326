"""Batch sizes of any framework as six numbers that do not depend on it, and TRL's keys for them.

TRL's keys follow from the six numbers by

    per_device_train_batch_size = m                  gradient_accumulation_steps = C / (D m)
    steps_per_generation        = P G / (D m)        num_iterations              = E

and a rollout is followed by P G E / C optimizer steps. `C` and `P` decide what is learned, so another number of ranks
leaves them alone.
"""

from dataclasses import dataclass

from grpo_autotune.errors import ConfigError


@dataclass(frozen=True)
class SixNumbers:
    """The batch of a GRPO run."""

    num_generations: int  # G: completions of a prompt
    prompts: int  # P: prompts of a rollout, over all ranks
    completions: int  # C: completions of an optimizer step, over all ranks
    passes: int  # E: times a rollout is trained on
    ranks: int  # D: data-parallel processes of the source
    micro_batch: int  # m: completions of a forward pass, on one device

    @property
    def rollout(self) -> int:
        return self.prompts * self.num_generations

    @property
    def steps_per_rollout(self) -> float:
        """Optimizer steps for each rollout; below 1 where several rollouts go into one step."""
        return self.rollout * self.passes / self.completions

    def on(self, ranks: int, where: str) -> "TrlBatch":
        """TRL's keys on so many ranks. The micro batch is the largest divisor of a rank's completions, of a step and of
        a rollout, that is not above the source's. ConfigError, `where` named, if no such keys exist."""
        if self.num_generations < 2:
            what = "one completion a prompt has no group to be compared with, and TRL refuses it"
            raise ConfigError(what, where=where, fix="Sample at least 2 completions of each prompt.")
        if min(self.prompts, self.completions, self.passes, ranks, self.micro_batch) < 1:
            raise ConfigError("a batch size that is not positive", where=where)
        for count, name in ((self.completions, "an optimizer step"), (self.rollout, "a rollout")):
            if count % ranks:
                what = f"the {count} completions of {name} cannot be divided among {ranks} processes"
                fix = f"Choose a number of processes that divides {count} (--world-size)."
                raise ConfigError(what, where=where, fix=fix)
        step, rollout = self.completions // ranks, self.rollout // ranks
        micro = next(m for m in range(min(self.micro_batch, step), 0, -1) if step % m == 0 and rollout % m == 0)
        return TrlBatch(self.num_generations, micro, step // micro, rollout // micro, self.passes)


@dataclass(frozen=True)
class TrlBatch:
    """TRL's names for the batch."""

    num_generations: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_iterations: int
