"""The monitors section of a configuration, and the table of the rules: what each waits for, and what to do then."""

from typing import Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from grpo_autotune.config.foreign_keys import wrong_type
from grpo_autotune.config.sections.section import Section

NATS = "nats per token"
MONITORS: dict[str, tuple[dict[str, Any], str, str]] = {
    "not_finite": ({"steps": 1}, "", "look at the rewards and rows of that step"),
    "loss_spike": ({"above": 6.0, "steps": 1}, "", "lower grpo.learning_rate or grpo.max_grad_norm if it comes again"),
    "kl_high": ({"above": 1.0, "steps": 5}, NATS, "lower grpo.learning_rate, or raise grpo.beta"),
    "kl_low": ({"below": 0.0, "steps": 5}, NATS, "lower grpo.beta if the reward falls with it"),
    "entropy_collapse": ({"below": 0.3, "steps": 20}, NATS, "raise grpo.temperature: completions become alike"),
    "length_drift": ({"above": 0.5, "steps": 10}, "tokens", "read some (grpo.log_completions): is length rewarded?"),
    "dead_groups": ({"above": 0.75, "steps": 10}, "share", "take other prompts, or raise grpo.num_generations"),
    "truncated": ({"above": 0.2, "steps": 10}, "share", "raise grpo.max_completion_length, or reward short answers"),
    "reward_ceiling": ({"above": 0.95, "steps": 10, "maximum": 0.0}, "", "end here, or take harder prompts"),
    "held_out_gap": ({"steps": 2}, "", "keep the checkpoint of that step, and read what is rewarded"),
    "judge_failures": ({"above": 0.05, "steps": 3}, "share", "look at its endpoint, limits and log"),
    "stall": ({"times": 5.0, "at_least_s": 60.0, "first_s": 1800.0}, "seconds", "look there for what it waits on"),
    "memory_creep": ({"above": 0.95, "steps": 8}, "share", "save soon (grpo.save_steps): it grows from step to step"),
    "nothing_learned": ({"steps": 5}, "", "look at the rewards and at what is masked"),
}
"""Monitor -> its keys and their defaults (0: not known, and so not watched), its unit, and the remedy."""


def _monitor(name: str) -> Any:
    """The section of a monitor, and its default; a step that hangs can neither be stopped nor saved."""
    keys: dict[str, Any] = {k: (type(n), Field(n, ge=0, gt=0 if n else None)) for k, n in MONITORS[name][0].items()}
    if name != "stall":
        more = ("skip_step",) if name == "loss_spike" else ()
        keys["action"] = (Literal[("tell", "checkpoint", "stop", *more)], "tell")
    section = create_model(name, __base__=Section, **keys)
    return section | None, section()


class MonitorsSection(create_model("Rules", __base__=Section, **{name: _monitor(name) for name in MONITORS})):  # type: ignore[misc]
    """Rules over what a training logs, each by name: a mapping of its keys, or `false`. `none` turns all off."""

    command: str | None = None
    """Shell command that gets each alert as JSON on standard input; it has 30 seconds, and training goes on."""

    @model_validator(mode="before")
    @classmethod
    def _none(cls, values: Any) -> Any:
        if not isinstance(values, dict | cls) and values != "none":
            raise wrong_type("monitors", values, "none, or a mapping of monitors")
        return dict.fromkeys(MONITORS) if values == "none" else values

    @field_validator(*MONITORS, mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    def items_on(self) -> dict[str, Any]:
        """The monitors that are on, each with its keys."""
        return {name: item for name in MONITORS if (item := getattr(self, name)) is not None}
