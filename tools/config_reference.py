"""The configuration reference as a page, written from the schema itself so that it cannot fall behind.

`python -m tools.config_reference > docs/configuration.md` writes it; a test holds the page to this.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpo_autotune.config.batch import COUNTS
from grpo_autotune.config.foreign_keys import OWN_GRPO_KEYS, WORDS
from grpo_autotune.config.schema import OWNED_ELSEWHERE, PEFT_FIXED, RunConfig
from grpo_autotune.config.sections.branches import Branch, Branches, BranchEval, Control
from grpo_autotune.config.sections.checkpoints import CheckpointsSection
from grpo_autotune.config.sections.data import DataSection
from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.config.sections.monitors import MonitorsSection
from grpo_autotune.config.sections.rewards import RewardItem
from grpo_autotune.config.sections.sampled import EvalSampling, Resample
from grpo_autotune.config.sections.section import OutputSection, SearchSection
from grpo_autotune.config.sections.vllm import ENGINE_FIXED, VllmSection
from grpo_autotune.records.receipt import Receipt
from grpo_autotune.speedups.selection import OPTIONS

TRL_DOCS = "https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig"
TRAINING_ARGUMENTS_DOCS = "https://huggingface.co/docs/transformers/main_classes/trainer"
PEFT_DOCS = "https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig"
VLLM_DOCS = "https://docs.vllm.ai/en/latest/configuration/engine_args.html"

INTRODUCTION = """\
# Configuration

A run is one YAML file. Its sections hold the keys of the library that uses them, verbatim; an unknown key, a wrong
type or numbers that do not fit together are errors before anything is loaded.

- On the command line `CONFIG` is a path or the name of a shipped profile; without it `./grpo.yaml` is taken, else the
  profile `demo`.
- `--set section.key=value` overrides, the value in YAML: `--set grpo.beta=0.04`, `--set peft=null`,
  `--set rewards.0.weight=2`.
- YAML is read by the rules of YAML 1.2: `1e-6` is a number, `no` is text, and a key given twice is an error.

```yaml
model: {name_or_path: Qwen/Qwen3-1.7B, dtype: bfloat16}
peft: {r: 32, lora_alpha: 64, target_modules: all-linear}
data: {path: openai/gsm8k, name: main, columns: {prompt: question}}
rewards: [{name: numeric_match}, {name: format, weight: 0.2}]
grpo: {num_generations: 8, per_device_train_batch_size: 8, max_completion_length: 512, learning_rate: 1e-5}
```
"""

DATA_NOTES = """\
- Named data sets, mixtures and several files, drawn rows, long prompts, areas of images, templates, files of other
  trainers, and the command that shows what the model will see: [data.md](data.md).
- `digits` is the one registered data set that comes with the package (the demo's).
- Relative paths start from the current folder; image paths inside a data file start from that file's folder, or from
  `image_root`.
- A prompt is text (it becomes a user message) or a list of messages, also as JSON in a table of text; the content of a
  message is text or a list of parts (`{type: text, text: ...}`, `{type: image}`). One column may mix them; keys that
  are null do not count.
- With `prompt_format: text` the model reads the text as it is, without a chat template: for data that has been through
  one, and for models without one. Rewards then get completions as text. Such prompts have no pictures.
- A row's pictures stand where its `<image>` markers and image parts are, as many as there are pictures; without any,
  before the text of the first user message (which then is no list of parts).
- A prompt that ends with an assistant turn is taken as TRL does: the turn is closed, and the model begins a new one.
- Before the model loads, the shape of every row is checked, and the chat template is tried on the first, the last and
  50 other rows.
- `columns` renames: the column keeps our name only. Every column that is not mapped is passed to the rewards as it is.
- `prompt_template` may use the data's names and ours; a format string's literal brace is written twice.
- An image folder has one sub-folder per class (the column `label` then holds the class's name), or a `metadata.csv`
  with `file_name`.
- With `image_size`, each distinct image is resized once and kept in the cache folder, so later runs find it there.
  Boxes in answers are not rescaled. The short side of an image thinner than 100 to 1 is rounded up, so that none
  becomes thinner than the model's processor takes (Qwen-VL: 200 to 1); one that is too thin by itself is refused with
  its row.
- Images stand in `image` or `images`, one or a list, or inside the parts of a message (`image`, `image_url`, `url`,
  `path`, `base64`); each is a path (or `file://`), bytes, base64 or a data URI. A URL is refused: nothing is
  downloaded. Rewards get the column `image` where each row has one, and `images` where they are lists.
- Images of 16 bits, of 32-bit integers and of floats become grey of 8 bits: their values where all lie in 0 to 255
  (those of floats in 0 to 1 times 255), else stretched from the image's least value (black) to its largest (white). Of
  several frames (TIFF, GIF, APNG, WebP) the model sees the first, which is said.
- Text files (.json, .jsonl, .csv) are in UTF-8; another encoding is refused with the line.
"""


def markdown() -> str:
    """The whole page."""
    return "\n".join(
        [
            INTRODUCTION,
            *_section("model", ModelSection),
            *_peft(),
            *_section("data", DataSection),
            DATA_NOTES,
            *_section("rewards", RewardItem, "A list; each item:"),
            "The built-in rewards, and how to add one: [rewards.md](rewards.md).\n",
            *_section("branches", Branches, f"{Branches.__doc__} See [branches.md](branches.md)."),
            *_section("branches.NAME", Branch),
            *_section("branches.NAME.eval", BranchEval),
            *_section("branches.control", Control),
            *_grpo(),
            *_section("resample", Resample, f"{Resample.__doc__} See [sampling.md](sampling.md#dynamic-sampling)."),
            *_section(
                "eval_sampling", EvalSampling, f"{EvalSampling.__doc__} See [sampling.md](sampling.md#evaluation)."
            ),
            *_section("vllm", VllmSection, VllmSection.__doc__),
            *_engine(),
            *_speedups(),
            *_section("search", SearchSection, SearchSection.__doc__),
            *_monitors(),
            *_section(
                "checkpoints", CheckpointsSection, f"{CheckpointsSection.__doc__} See [checkpoints.md](checkpoints.md)."
            ),
            *_section("output", OutputSection),
            *_section("receipt", Receipt, f"{Receipt.__doc__} Written by the search, not by hand."),
        ]
    )


@cache
def described(section: type[BaseModel]) -> dict[str, str]:
    """The text under each field of a section in its source, those of its bases included."""
    bases = [described(base) for base in reversed(section.__bases__) if issubclass(base, BaseModel)]
    texts = {key: text for inherited in bases for key, text in inherited.items()}
    if getattr(sys.modules[section.__module__], section.__name__, None) is section:  # not one that is made of a table
        body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
        for field, text in pairwise(getattr(body, "body", [])):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(text.value))
    return texts


def _section(name: str, section: type[BaseModel], introduction: str | None = None) -> Iterator[str]:
    yield f"## `{name}`\n"
    yield f"{introduction or section.__doc__}\n"
    yield "| key | accepts | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in section.model_fields.items():
        default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
        yield f"| `{key}` | {_accepts(field)} | {default} | {' '.join(described(section).get(key, '').split())} |"
    yield ""


def _peft() -> Iterator[str]:
    yield "## `peft`\n"
    yield f"Null (full fine-tuning), or keys of PEFT's [`LoraConfig`]({PEFT_DOCS}) as installed.\n"
    yield f"Filled in by PEFT itself, and refused here: {_codes(sorted(PEFT_FIXED))}.\n"


def _engine() -> Iterator[str]:
    yield f"Every other engine key of vLLM's [`EngineArgs`]({VLLM_DOCS}) passes through as it is, but these:\n"
    yield "| key | why |"
    yield "|---|---|"
    for key, why in ENGINE_FIXED.items():
        yield f"| `{key}` | {why} |"
    yield ""


def _speedups() -> Iterator[str]:
    yield "## `speedups`\n"
    field = RunConfig.model_fields["speedups"]
    yield f"{described(RunConfig)['speedups']} Default: `{field.default}`.\n"
    yield "| speed-up | option | accepts | default |"
    yield "|---|---|---|---|"
    for name, options in OPTIONS.items():
        for option, accepted in options.items():
            words = ", ".join(f"`{value}`" for value in accepted)
            yield f"| `{name}` | `{option}` | {words} | `{accepted[0]}` |"
    yield ""
    for name in ("speedups_check", "stop_signals", "on_oom", "on_oom_allow"):
        yield f"## `{name}`\n"
        field = RunConfig.model_fields[name]
        yield f"{described(RunConfig)[name]} Default: `{field.default}`.\n"


def _monitors() -> Iterator[str]:
    yield "## `monitors`\n"
    yield f"{MonitorsSection.__doc__} When each fires, and what its keys mean: [monitors.md](monitors.md).\n"
    yield "| key | its keys and their defaults, each to be given alone |"
    yield "|---|---|"
    for name, item in MonitorsSection().items_on().items():
        keys = (f"`{key}: {_yaml(value)}`" if value else f"`{key}`" for key, value in item)
        yield f"| `{name}` | {', '.join(keys)} |"
    yield f"| `command` | {' '.join(described(MonitorsSection)['command'].split())} |\n"
    yield "`steps` is a whole number, `action` one of `tell`, `checkpoint`, `stop` and, of `loss_spike` alone,"
    yield "`skip_step`; all others are numbers above 0.\n"


def _grpo() -> Iterator[str]:
    yield "## `grpo`\n"
    yield (
        f"Keys of TRL's [`GRPOConfig`]({TRL_DOCS}) as installed, those it takes from transformers'\n"
        f"[`TrainingArguments`]({TRAINING_ARGUMENTS_DOCS}) included. Defaults are TRL's.\n"
    )
    own = "; ".join(f"`{name}` ({key.accepted()}, default {key.default})" for name, key in OWN_GRPO_KEYS.items())
    yield f"Beside them, of our own: {own}, see [rank advantages](branches.md#rank-advantages).\n"
    yield "Keys that another section owns are refused here:\n"
    yield "| key | where it is |"
    yield "|---|---|"
    for key, owner in OWNED_ELSEWHERE.items():
        yield f"| `{key}` | {f'`{owner}`' if '(' not in owner and ' ' not in owner else owner} |"
    yield ""
    yield "Rules of the batch arithmetic, with the world size as torchrun sets it:\n"
    yield "- generation batch = `per_device_train_batch_size` x world size x `steps_per_generation`"
    yield "  (`gradient_accumulation_steps` where that is not given), a multiple of `num_generations`;"
    yield "- `generation_batch_size` and `steps_per_generation` are not given together;"
    yield "- with evaluation on, `per_device_eval_batch_size` x world size is a multiple of `num_generations_eval`"
    yield "  (`num_generations` where that is not given), and the data section names held-out data;"
    least = ", ".join(f"`{key}` {count}" for key, count in COUNTS.items())
    yield f"- smallest values: {least}.\n"


def _accepts(field: FieldInfo) -> str:
    kinds = " or ".join(dict.fromkeys(_kinds(field.annotation)))
    limits = [
        f"{words} {getattr(limit, bound)}"
        for limit in field.metadata
        for bound, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"))
        if hasattr(limit, bound)
    ]
    return ", ".join([kinds, *limits])


def _kinds(annotation: Any) -> list[str]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    if origin is Literal:
        return [f"`{value}`" for value in get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [WORDS["dict"]]
    name = (origin or annotation).__name__
    return [WORDS["None" if name == "NoneType" else name]]


def _yaml(value: object) -> str:
    if isinstance(value, BaseModel):
        return f"{{{', '.join(f'{name}: {_yaml(part)}' for name, part in value)}}}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _codes(values: list[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


if __name__ == "__main__":
    sys.stdout.write(markdown())
