"""Checks of what a run reads: the model's files and sampling, rows and answers, tokenizer and template."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from grpo_autotune.doctor.finding import Findings, ok, warn
from grpo_autotune.doctor.run import Run
from grpo_autotune.errors import ConfigError, DataError, shortened
from grpo_autotune.units import listing, percent, plural, size

SAMPLED = ("temperature", "top_p", "top_k", "repetition_penalty")
"""Keys with which TRL samples, whatever `generation_config.json` says (`GRPOTrainer.__init__`, TRL 1.16)."""

GREEDY = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
"""Keys that mean nothing without `do_sample`, and their defaults (`GenerationConfig.validate`, transformers 5)."""

MARK = "8f3a-mark"  # a text that no template has by itself
ABSENT = "not on this machine yet, and so not looked at"


def weights(run: Run) -> Findings:
    """The model's config.json is read, every shard of its index is there, each file as long as its header says."""
    if (folder := run.folder) is None:
        return
    index = run.stored("model.safetensors.index.json").get("weight_map") or {}
    files = [folder / name for name in sorted(set(index.values()))] or sorted(folder.glob("*.safetensors"))
    flaws = [] if run.model else ["config.json is missing or is no JSON"]
    flaws += [] if files or any(folder.glob("*.bin")) else ["there are no weights"]
    if flaws := flaws + [flaw for path in files if (flaw := _flaw(path))]:
        raise ConfigError("; ".join(flaws[:3]), where=str(folder), fix="Copy or download it again (hf download).")
    yield ok(f"{plural(len(files), 'file')}, {size(sum(path.stat().st_size for path in files))}")


def _flaw(path: Path) -> str:
    try:
        with safe_open(path, framework="numpy"):  # compares the file's length with what its header says
            return ""
    except (SafetensorError, OSError) as error:
        return f"{path.name} is no whole file of weights: {error}" if path.is_file() else f"{path.name} is missing"


def sampling(run: Run) -> Findings:
    """No generation flag will be ignored, and transformers can save the model's generation_config.json again."""
    grpo, file, name = run.config.grpo, run.stored("generation_config.json"), "the model's generation_config.json"

    def pairs(keys: Iterable[str], value: Callable[[str], Any]) -> str:
        return ", ".join(f"{key} {value(key)}" for key in keys)

    further = grpo.get("generation_kwargs") or {}
    further = further if isinstance(further, Mapping) else json.loads(further)
    for key in (key for key in SAMPLED if key in grpo and key in further):
        yield warn(f"grpo.{key} is ignored: grpo.generation_kwargs has {key} {further[key]}", "remove one of the two")
    given = {key: file[key] for key in file if file[key] is not None and key not in {*grpo, *further}}
    ignored = [k for k in SAMPLED if k in given and given[k] != run.value(k)]
    if ignored:
        detail = f"{name} says {pairs(ignored, given.get)}: ignored, {pairs(ignored, run.value)} will be used"
        yield warn(detail, f"write {listing([f'grpo.{key}' for key in ignored])} as wanted, which ends this line")
    senseless = [k for k, none in GREEDY.items() if not file.get("do_sample") and file.get(k) not in (None, none)]
    if senseless and run.config.lora is None:
        detail = f"{name} has {pairs(senseless, file.get)} without do_sample: transformers refuses to save it"
        yield warn(detail, "write do_sample: true into that file, or take these keys out of it")


def data(run: Run) -> Findings:
    """Rows are read, and prompts and images made as in the run: all, or where they have images or are more than 10 000
    the first, the last and 50 others; rewards and branches have their columns."""
    from grpo_autotune.train.branches.rows import branch_of_rows
    from grpo_autotune.train.rewards.build import build_rewards

    if run.rows is None:
        yield warn(ABSENT, f"hf download --repo-type dataset {run.config.data.path}, then doctor again")
        return
    build_rewards(run.config, run.rows.column_names)
    if run.config.branches is not None:
        branch_of_rows(run.config.branches, run.rows, run.config.data.path)
    count, looked_at = run.looked_at[0][-1] + 1, len(run.rows)
    few = f"; {looked_at} were looked at" if looked_at < count else ""
    yield ok(f"{count} rows with {', '.join(run.rows.column_names)}{few}")


def answers(run: Run) -> Findings:
    """References that a built-in reward cannot read: their share of the same rows, and the first."""
    from grpo_autotune.train.rewards.answers import read_box, read_letter, read_number

    readers: dict[str, Callable[..., Any]] = {"numeric_match": read_number, "exact_match": str, "box_iou": read_box}
    for place, item in enumerate(run.config.rewards if run.rows is not None else ()):
        letters = partial(read_letter, letters=item.params.get("letters", "ABCDE"))
        read, column = (readers | {"choice_letter": letters}).get(item.name), item.params.get("column", "answer")
        values = run.rows[column][:] if read is not None and column in run.rows.column_names else []
        bad = [row for row, value in enumerate(values) if value is None or (read or str)(value) in (None, "")]
        if bad:
            first, share = f"row {bad[0]}: {shortened(repr(values[bad[0]]), 60)}", percent(len(bad) / len(values))
            what = f"{item.name} cannot read {share} of {column} in {len(values)} rows ({first})"
            if len(bad) == len(values):
                raise DataError(what, where=f"rewards[{place}]", fix="Name another column in its params.column.")
            yield warn(f"{what}: these rows have no score", "correct or remove them, or take another reward")


def tokenizer(run: Run) -> Findings:
    """The tokenizer loads, pads on the left with a token, and has no more tokens than the model."""
    name, one = run.config.model.name_or_path or "", getattr(run.processor, "tokenizer", run.processor)
    if one is None:
        yield from [warn(ABSENT, f"hf download {name}, then doctor again")] if "/" in name and ":" not in name else ()
        return
    if (pad := one.pad_token or one.eos_token) is None:
        fix = "Write pad_token and eos_token into its tokenizer_config.json."
        raise ConfigError("the tokenizer has neither a padding nor an end token", where=str(run.folder), fix=fix)
    if len(one) > (most := (run.model.get("text_config") or run.model).get("vocab_size", len(one))):
        yield warn(f"it has {len(one)} tokens and the model {most}", "take the tokenizer that came with the model")
    yield ok(f"{len(one)} tokens, pads with {pad} on the left")


def template(run: Run) -> Findings:
    """The chat template takes prompts that have not been through one, shows the system message, opens a turn for the
    answer, and ends it with a token that ends generation."""
    from grpo_autotune.train.data.templates import fit_prompts

    if run.processor is None or run.rows is None:
        return
    lines: list[str] = []
    options, prompt = run.value("chat_template_kwargs") or {}, run.rows["prompt"][0]
    fit_prompts(run.rows, run.processor, options, run.config.data.path, lines.append)
    yield from (warn(line, "correct these rows, or set data.prompt_format") for line in lines)
    if isinstance(prompt, str):
        return

    def text(prompt: Any, *, opened: bool = True) -> str:
        return str(run.processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=opened, **options))

    marked = [{**turn, "content": MARK} if turn["role"] == "system" else turn for turn in prompt]
    if marked != prompt and MARK not in text(marked):
        yield warn("it drops the system message", "correct chat_template.jinja, or write it into data.prompt_template")
    if text(prompt) == text(prompt, opened=False):
        fix = "correct chat_template.jinja: it must heed add_generation_prompt"
        yield warn("it opens no turn for the answer: the model may go on with the question", fix)
    more = run.stored("generation_config.json").get("eos_token_id") or []
    one = getattr(run.processor, "tokenizer", run.processor)
    ends = {one.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    rest = text([*prompt, {"role": "assistant", "content": MARK}], opened=False).rpartition(MARK)[2]
    last = [n for n in one(rest, add_special_tokens=False)["input_ids"] if n in one.added_tokens_decoder][:1]
    if set(last) - ends:
        fix = f"add {last[0]} to eos_token_id in the model's generation_config.json"
        yield warn(f"an answer's turn ends with {one.decode(last)}, which does not end generation", fix)
    yield ok(f"generation ends at {' or '.join(one.convert_ids_to_tokens(sorted(ends)))}")


def lengths(run: Run) -> Findings:
    """The same rows' prompts within `data.max_prompt_tokens`, or what becomes of those beyond."""
    from grpo_autotune.train.data.templates import fit_prompts

    data, lines = run.config.data, list[str]()
    if run.processor is None or run.rows is None or data.max_prompt_tokens is None:
        return
    fit_prompts(run.rows, run.processor, run.value("chat_template_kwargs") or {}, data.path, lines.append, data)
    beyond = [line for line in lines if "data.max_prompt_tokens" in line]
    yield ok(*beyond or (f"none has more than {data.max_prompt_tokens} tokens",))
