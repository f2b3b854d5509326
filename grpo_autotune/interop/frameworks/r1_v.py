"""R1-V and its forks: trainers of their own on TRL 0.14, whose batch sizes count prompts.

Source: `src/r1-v/src/open_r1/{grpo.py,trainer/}` of two forks, saccharomycetes/R1-V and zihui-debug/R1-V. Forks differ
in their prompt and rewards.
"""

from typing import Any

from grpo_autotune.interop.frameworks.trl import translated, weighted
from grpo_autotune.interop.frameworks.trl_keys import listed
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import Translation

TEMPLATE = (
    "{problem}  Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags."
)
LIMITS = {"max_pixels": 12845056, "min_pixels": 3136}  # limits of an image by default, in VLM-R1 too
NAMES = ("top_p", "top_k", "reward_weights", "torch_dtype", "max_prompt_length")
UNREAD = dict.fromkeys(NAMES, "R1-V's trainer never reads it")


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """The translation of an R1-V command."""
    engine = "use_vllm" in source.settings and source.settings["use_vllm"].value is True
    fixed = {"top_k": 0} if engine else {"top_k": 50, "temperature": 1.0}
    to = translated(
        source, ((0, 14), "TRL 0.14.0", "the version that R1-V pins"), world_size,
        over={**LIMITS, **fixed, "max_prompt_length": None},
        unread=UNREAD if engine else {**UNREAD, "temperature": "R1-V's trainer samples at 1 without vLLM"},
        rewards=_rewards,
    )  # fmt: skip
    to.set("data.prompt_template", TEMPLATE, "of the column `problem`; forks have others")
    return to


def _rewards(to: Translation) -> tuple[list[dict[str, Any]], str]:
    names = listed(to.value("reward_funcs")) or ["accuracy", "format"]
    to.warnings.append("the rewards are R1-V's own, open_r1.grpo: have its src folder on PYTHONPATH")
    return weighted(to, [{"name": f"open_r1.grpo:{name}_reward"} for name in names]), ""
