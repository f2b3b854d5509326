"""open-r1: TRL 0.18 with rewards by name, mixtures and a prompt column (`src/open_r1/{configs,rewards,grpo}.py`)."""

from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.adapters.named import NAMED
from grpo_autotune.interop.frameworks.trl import translated, weighted
from grpo_autotune.interop.frameworks.trl_keys import Handler, inert, listed, off
from grpo_autotune.interop.frameworks.trl_versions import choose
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import Translation

REWARDS = {  # settings of its reward functions, with their defaults
    "cosine_min_value_wrong": 0.0, "cosine_max_value_wrong": -0.5, "cosine_min_value_correct": 0.5,
    "cosine_max_value_correct": 1.0, "cosine_max_len": 1000, "repetition_n_grams": 3, "repetition_max_penalty": -1.0,
    "code_language": "python", "code_eval_test_batch_size": 1, "code_eval_scoring_mode": "weighted_sum",
    "parallel_code_exec_per_proc": 2, "code_provider": "e2b", "ioi_provider": "piston", "e2b_router_url": None,
    "morph_router_url": None, "max_completion_len": 16384, "soft_punish_cache": 4096, "enforce_same_language": False,
}  # fmt: skip
NAMES = (
    "accuracy", "format", "reasoning_steps", "cosine", "repetition_penalty", "length", "code", "binary_code",
    "ioi_code", "cf_code", "code_format", "tag_count", "soft_overlong_punishment",
)  # fmt: skip
MODULE = "open_r1_rewards"
MODULE_TEXT = '''"""Reward functions of open-r1, as its recipe has them."""

from types import SimpleNamespace

from open_r1.rewards import get_reward_funcs

{names} = get_reward_funcs(
    SimpleNamespace(
{arguments}    )
)
'''
PUBLISHED = ("benchmarks", "callbacks", "hub_model_revision", "overwrite_hub_revision", "wandb_run_group")


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(PUBLISHED, off("what open-r1 does after a checkpoint: publish, evaluate, log")),
    **dict.fromkeys(REWARDS, inert("a setting of its rewards")),
}


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """The translation of an open-r1 recipe, or of the command that starts one."""
    return translated(
        source, choose(source, version, "0.18.0"), world_size, over={"dataset_prompt_column": "prompt"},
        rewards=_rewards, handlers=HANDLERS,
    )  # fmt: skip


def _rewards(to: Translation) -> tuple[list[dict[str, Any]], str]:
    """Its functions as they are known here; the others by open-r1's own `get_reward_funcs`, in a module beside the
    configuration."""
    names = [str(name) for name in listed(to.value("reward_funcs"))] or ["accuracy", "format", "tag_count"]
    wrong = next((name for name in names if name not in NAMES), None)
    if wrong:
        fix = f"Known: {', '.join(NAMES)}."
        raise ConfigError(f"open-r1 has no reward {wrong}", where=to.where("reward_funcs"), fix=fix)
    settings = {key: to.value(key, default) for key, default in REWARDS.items()}
    known = {name: NAMED["open-r1", name] for name in names if ("open-r1", name) in NAMED}
    items = {name: reward.item(settings) for name, reward in known.items() if reward.name}
    others = [name for name in names if name not in items]
    if others:
        to.files[f"{MODULE}.py"] = _module(others, settings)
        to.warnings.append(f"{', '.join(others)}: open-r1's own, by {MODULE}.py: have open-r1 installed")
    notes = [f"{name}: {reward.note}" for name, reward in known.items() if reward.name and reward.note]
    return weighted(to, [items.get(name) or {"name": f"{MODULE}:{name}"} for name in names]), "; ".join(notes)


def _module(names: list[str], settings: dict[str, Any]) -> str:
    arguments = "".join(f"        {key}={value!r},\n" for key, value in {"reward_funcs": names, **settings}.items())
    return MODULE_TEXT.format(names=", ".join(names) + "," * (len(names) == 1), arguments=arguments)
