"""Checks of what a run reads: the model's files and sampling, rows and answers, tokenizer and template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from grpo_autotune.doctor.finding import Findings, ok, warn
from grpo_autotune.doctor.run import Run
from grpo_autotune.errors import ConfigError, DataError, shortened
from grpo_autotune.units import listing, percent, size

SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Keys with which TRL samples, whatever the model's `generation_config.json` says; `generate` alone takes `min_p` from
there where it is not set (`GRPOTrainer.__init__`, TRL 1.16)."""

TAKEN = {
    "min_p": 0.0,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "min_length": 0,
    "num_beams": 1,
}
"""Keys that `generate` takes from that file where nobody sets them, and the values that change nothing
(`_prepare_generation_config` in transformers/generation/utils.py)."""

GREEDY = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
"""Keys that mean nothing without `do_sample`, and their defaults (`GenerationConfig.validate`, transformers 5)."""

MARK = "8f3a-mark"
"""A text that no template has by itself."""


def weights(run: Run) -> Findings:
    """The model's config.json is read, every shard of its index is there, each file as long as its header says."""
    name = run.config.model.name_or_path or ""
    if (folder := run.folder) is None:
        if "/" in name and ":" not in name:
            yield warn("not on this machine yet, so not looked at", f"hf download {name}, then doctor again")
        return
    index = run.stored("model.safetensors.index.json").get("weight_map") or {}
    files = [folder / name for name in sorted(set(index.values()))] or sorted(folder.glob("*.safetensors"))
    flaws = [] if run.model else ["config.json is missing or is no JSON"]
    flaws += [] if files or any(folder.glob("*.bin")) else ["there are no weights"]
    if flaws := flaws or [flaw for path in files if (flaw := _flaw(path))]:
        what = f"{flaws[0]}{f' (and {len(flaws) - 1} more)' if flaws[1:] else ''}"
        raise ConfigError(what, where=str(folder), fix="Copy it again, or: hf download OWNER/NAME --local-dir DIR.")
    yield ok(f"{len(files)} files of {size(sum(path.stat().st_size for path in files))}")


def _flaw(path: Path) -> str:
    try:
        with safe_open(path, framework="numpy"):  # compares the file's length with what its header says
            return ""
    except (SafetensorError, OSError) as error:
        return f"{path.name} is no whole file of weights: {error}" if path.is_file() else f"{path.name} is missing"


def sampling(run: Run) -> Findings:
    """Generation flags that will be ignored, and those that the model's generation_config.json adds."""
    grpo, file, name = run.config.grpo, run.stored("generation_config.json"), "the model's generation_config.json"
    further = grpo.get("generation_kwargs") or {}
    further = further if isinstance(further, Mapping) else json.loads(further)
    for key in (key for key in SAMPLED if key in grpo and key in further):
        yield warn(f"grpo.{key} is ignored: grpo.generation_kwargs has {key} {further[key]}", "remove one of the two")
    given = {key: file[key] for key in file if file[key] is not None and key not in {*grpo, *further}}
    added = {k: given[k] for k, none in TAKEN.items() if given.get(k, none) != none and not run.config.use_vllm}
    ignored = [key for key in SAMPLED if key in given.keys() - added and given[key] != run.value(key)]
    if ignored:
        detail = f"{name} says {_pairs(ignored, given.get)}: ignored, {_pairs(ignored, run.value)} will be used"
        yield warn(detail, f"write {listing([f'grpo.{key}' for key in ignored])} as wanted, which ends this line")
    if added:
        detail = f"generate takes {_pairs(added, given.get)} from {name}, and the training pass does not"
        yield warn(detail, f"set grpo.generation_kwargs: {json.dumps({key: TAKEN[key] for key in added})}")
    senseless = [k for k, none in GREEDY.items() if not file.get("do_sample") and file.get(k) not in (None, none)]
    if senseless and run.config.peft is None:
        detail = f"{name} has {_pairs(senseless, file.get)} without do_sample: transformers refuses to save it"
        yield warn(detail, "write do_sample: true into that file, or take these keys out of it")


def _pairs(keys: Iterable[str], value: Callable[[str], Any]) -> str:
    return ", ".join(f"{key} {value(key)}" for key in keys)


def data(run: Run) -> Findings:
    """Data sets are read, and columns, prompts and images of their first, last and 50 random rows made as in the run;
    reward functions are imported, and the data has the columns that they read."""
    from grpo_autotune.train.rewards.build import build_rewards

    if run.sample is not None:
        columns = run.sample.column_names
        build_rewards(run.config, columns)
        yield ok(f"{len(run.sample)} of {run.numbers[-1] + 1} rows looked at: {', '.join(columns)}")
    else:
        fix = f"hf download --repo-type dataset {run.config.data.path}, then doctor again"
        yield warn("not on this machine yet, so not looked at", fix)


def answers(run: Run) -> Findings:
    """References that a built-in reward cannot read: their share of the rows looked at, and the first."""
    from grpo_autotune.train.rewards.answers import read_box, read_letter, read_number

    readers: dict[str, tuple[str, Callable[..., Any]]] = {"numeric_match": ("number", read_number)}
    readers |= {"exact_match": ("text", str), "choice_letter": ("letter", read_letter), "box_iou": ("box", read_box)}
    columns = run.sample.column_names if run.sample is not None else ()
    for place, item in enumerate(run.config.rewards):
        (kind, read), column = readers.get(item.name, ("", str)), item.params.get("column", "answer")
        read = partial(read, letters=item.params["letters"]) if "letters" in item.params else read
        values = run.sample[column][:] if kind and column in columns else []
        bad = [row for row, value in enumerate(values) if value is None or read(value) in (None, "")]
        if bad:
            first = f"row {run.numbers[bad[0]]}: {shortened(repr(values[bad[0]]), 60)}"
            what = f"{item.name} reads no {kind} in {percent(len(bad) / len(values))} of {column} ({first})"
            if len(bad) == len(values):
                fix = f"Name the column of the answers in rewards.{place}.params.column."
                raise DataError(what, where=f"rewards[{place}]", fix=fix)
            yield warn(f"{what}: these rows have no score", "correct or remove them, or take another reward")


def tokenizer(run: Run) -> Findings:
    """The tokenizer loads, pads on the left with a token, and has no more tokens than the model."""
    if (one := run.tokenizer) is None:
        return
    if (pad := one.pad_token or one.eos_token) is None:
        fix = "Write pad_token and eos_token into its tokenizer_config.json."
        raise ConfigError("the tokenizer has neither a padding nor an end token", where=str(run.folder), fix=fix)
    if len(one) > (most := (run.model.get("text_config") or run.model).get("vocab_size", len(one))):
        yield warn(f"it has {len(one)} tokens and the model {most}", "take the tokenizer that came with the model")
    yield ok(f"{len(one)} tokens, pads with {pad} on the left")


def template(run: Run) -> Findings:
    """The chat template takes the prompts looked at, and they have not been through one already."""
    from grpo_autotune.train.data.templates import fit_prompts

    lines: list[str] = []
    if run.processor is not None and run.sample is not None:
        fit_prompts(run.sample, run.processor, _options(run), run.config.data.path, lines.append)
    yield from (warn(run.renumbered(line), "correct these rows, or set data.prompt_format") for line in lines)


def system_role(run: Run) -> Findings:
    """The chat template shows the system message."""
    prompt = _prompt(run)
    marked = [{**turn, "content": MARK} if turn["role"] == "system" else turn for turn in prompt]
    if marked != prompt and MARK not in _text(run, marked):
        fix = "put it into the prompts (data.prompt_template), or correct chat_template.jinja"
        yield warn("the chat template drops the system message", fix)


def answer_turn(run: Run) -> Findings:
    """The chat template opens a turn for the answer."""
    if (prompt := _prompt(run)) and _text(run, prompt) == _text(run, prompt, opened=False):
        detail = "the chat template opens no turn for the answer: the model may go on with the question"
        yield warn(detail, "correct chat_template.jinja: it must heed add_generation_prompt")


def end_tokens(run: Run) -> Findings:
    """The token that ends an answer's turn in the chat template is one of those that end generation."""
    if prompt := _prompt(run):
        one, more = run.tokenizer, run.stored("generation_config.json").get("eos_token_id") or []
        ends = {one.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
        rest = _text(run, [*prompt, {"role": "assistant", "content": MARK}], opened=False).rpartition(MARK)[2]
        after = one(rest, add_special_tokens=False)["input_ids"]
        last = [number for number in after if number in one.added_tokens_decoder][:1]
        if set(last) - ends:
            detail = f"an answer's turn ends with {one.decode(last)}, which does not end generation"
            yield warn(detail, f"add {last[0]} to eos_token_id in the model's generation_config.json")
        yield ok(" or ".join(one.convert_ids_to_tokens(sorted(ends))))


def _prompt(run: Run) -> list[Any]:
    prompt = run.sample["prompt"][0] if run.processor is not None and run.sample is not None else ""
    return prompt if isinstance(prompt, list) else []


def _options(run: Run) -> dict[str, Any]:
    return run.value("chat_template_kwargs") or {}


def _text(run: Run, prompt: Any, *, opened: bool = True) -> str:
    try:
        return str(
            run.processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=opened, **_options(run))
        )
    except Exception as error:  # a template is a program, and raises what its author likes
        raise ConfigError(f"the chat template refuses {prompt}: {error}", fix="Correct chat_template.jinja.") from error
