"""`grpo-autotune infer`: completions and rewards of data with trained weights."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_autotune.commands.early import check_rewards
from grpo_autotune.commands.imports import mend_torchvision, set_environment
from grpo_autotune.config.batch import of_other_processes
from grpo_autotune.config.registry_file import named_section
from grpo_autotune.config.schema import RunConfig, load_config, override
from grpo_autotune.console import Heartbeat, ProgressBar, is_live, say
from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.files import full_disk_told
from grpo_autotune.hardware.out_of_memory import is_of_the_machine
from grpo_autotune.knobs.table import grpo_value
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.trained import Inference, Settings
from grpo_autotune.report.inference import summarize
from grpo_autotune.rollout.server.process import need_vllm
from grpo_autotune.trained.source import find_whole
from grpo_autotune.units import plural

BATCH = {False: 32, True: 256}
"""Completions of a batch by `generate`, and by vLLM, which schedules them itself."""
KEPT = ("prompt", "image", "images")
PLAIN_INTERVAL_S = 10.0


@dataclass(frozen=True)
class Request:
    """The options of `infer`."""

    place: Path  # run folder, checkpoint or folder of weights
    out: Path
    data: str | None = None
    split: str | None = None
    limit: int | None = None
    n: int = 1
    greedy: bool = False
    in_vllm: bool = False
    longest: int | None = None  # tokens of a completion
    batch_size: int | None = None
    config: str | None = None
    scored: bool = True
    overrides: Sequence[str] = ()


def infer(asked: Request) -> Inference:
    """Write what is missing of the completions asked for, and sum the whole file up.

    Raises:
        AutotuneError: The weights, the configuration, the data or a reward cannot be used, the file was begun
            otherwise, or memory or disk ran out.
    """
    if asked.greedy and asked.n > 1:
        raise ConfigError("greedy completions of a prompt are all the same", where="--n", fix="Leave it out.")
    if asked.out.is_dir() or not asked.out.absolute().parent.is_dir():
        raise ConfigError("this is no place for a file", where=f"--out {asked.out}", fix="Name a file in a folder.")
    if asked.in_vllm:
        need_vllm()
    trained = find_whole(asked.place)
    with of_other_processes():
        config = _configuration(asked, trained.config)
    config, data, split = _with_data(config, asked.data, asked.split)
    config = config if asked.scored else _unscored(config)
    check_rewards(config)
    startup = Startup()
    set_environment()
    told = "Make room, and give the same command again."
    with ExitStack() as ended, full_disk_told(asked.out.absolute().parent, told), Heartbeat(startup.now):
        with startup.imports():
            mend_torchvision()
            from grpo_autotune.train.runs.quiet import quieten
            from grpo_autotune.trained.completions import alone_with
            from grpo_autotune.trained.engine import generating
            from grpo_autotune.trained.infer import Scorer, Work, rows_to_complete
        quieten(bars=is_live())
        with startup.phase("data"):
            rows, read = rows_to_complete(config, data, split, asked.limit)
            scorer = ended.enter_context(Scorer(config, rows, read))
            rows, processor = _fitted(rows, trained, config, read)
            scorer.sort(config, rows, read)
        config = generating(config, in_vllm=asked.in_vllm, longest=asked.longest)
        ended.enter_context(alone_with(asked.out))
        file = _file(asked, config, trained, rows, read)
        prompts = max(1, (asked.batch_size or BATCH[asked.in_vllm]) // asked.n)
        work = Work(rows, asked.n, prompts, config.grpo["seed"], scorer, file)
        written, rate = _work(work, asked, startup, (trained, config, processor))
        file.sort()
    return summarize(file.completions, file.settings, out=str(asked.out), written=written, tokens_per_s=rate)


def _configuration(asked: Request, of_run: RunConfig | None) -> RunConfig:
    """The run's configuration, or the one that was named, with what the options change."""
    config = load_config(asked.config) if asked.config is not None else of_run
    if config is None:
        fix = "Name the run's: --config RUN_DIR/config.yaml."
        raise ConfigError("no config.yaml of a run says how to read data and score", where=str(asked.place), fix=fix)
    if asked.overrides:
        values = config.to_dict()
        if asked.in_vllm:  # else its section would be refused
            values["grpo"] = {**values.get("grpo", {}), "use_vllm": True}
        for item in asked.overrides:
            override(values, item)
        config = RunConfig.from_dict(values)
    return config


def _with_data(config: RunConfig, data: str | None, split: str | None) -> tuple[RunConfig, str | None, str | None]:
    """The configuration with the section of data that are asked for by name, its path, and a split; None for both
    where that has held-out rows, and no split is asked for."""
    section = None if data is None or data in config.data.held_out else named_section(config.data, data)
    if section is None:
        return config, data, split
    config, is_held_out = config.model_copy(update={"data": section}), split is None and section.held_out
    return (config, None, None) if is_held_out else (config, section.path, split or section.split)


def _unscored(config: RunConfig) -> RunConfig:
    """The configuration without rewards, and without the columns that only they read."""
    named = {*KEPT, *re.findall(r"\w+", config.data.prompt_template or "")}
    columns = {ours: theirs for ours, theirs in config.data.columns.items() if ours in named}
    section = config.data.model_copy(update={"columns": columns})
    return config.model_copy(update={"rewards": [], "branches": None, "data": section})


def _fitted(rows: Any, trained: Any, config: RunConfig, where: str) -> tuple[Any, Any]:
    from grpo_autotune.train.data.templates import fit_prompts
    from grpo_autotune.train.models.load import check_images
    from grpo_autotune.trained.load import load_trained_processor

    processor = load_trained_processor(trained)
    check_images(processor, rows.column_names)
    options = grpo_value("chat_template_kwargs", config) or {}
    return fit_prompts(rows, processor, options, where, say, config.data), processor


def _file(asked: Request, config: RunConfig, trained: Any, rows: Any, data: str) -> Any:
    from grpo_autotune.seams.stored_images import IMAGE_COLUMNS
    from grpo_autotune.trained.completions import CompletionFile, rows_digest, weights_digest
    from grpo_autotune.trained.engine import SAMPLED

    limits = config.data.model_dump(include={"max_pixels", "min_pixels", "max_prompt_tokens", "prompt_overflow"})
    limits["chat_template"] = config.model.chat_template
    pictures = [name for name in rows.column_names if name in IMAGE_COLUMNS]

    settings = Settings(
        checkpoint=str(trained.path.resolve()),
        weights=weights_digest(trained.path),
        backend="vllm" if asked.in_vllm else "generate",
        data=data,
        rows=rows_digest(rows.remove_columns(pictures)),
        n=asked.n,
        greedy=asked.greedy,
        image_size=config.data.image_size,
        sampling={name: config.grpo.get(name) for name in (*SAMPLED, "generation_kwargs", "chat_template_kwargs")},
        prompts={name: value for name, value in limits.items() if value is not None},
        rewards=[item.model_dump(mode="json", exclude_defaults=True) for item in config.rewards],
    )
    return CompletionFile(asked.out, settings)


def _work(work: Any, asked: Request, startup: Startup, of_engine: tuple[Any, ...]) -> tuple[int, float | None]:
    """Write what is missing, if anything is; completions written, and tokens per second."""
    from grpo_autotune.train.trial_trainer import engine_time
    from grpo_autotune.trained.engine import Engine

    count, before = len(work.batches()), len(work.file.completions)
    if before:
        say(f"{asked.out} holds {plural(before, 'completion')} of {len(work.rows) * asked.n} already")
    if not count:
        return 0, None
    try:
        trained, config, processor = of_engine
        with startup.phase("model"), engine_time(startup):
            engine = Engine(trained, config, processor, work.rows, n=asked.n, prompts=work.prompts, greedy=asked.greedy)
        with ProgressBar("inferring", count) as bar:
            result: tuple[int, float | None] = work.write(
                engine, lambda done: bar.tick(done, f"batch {done} of {count}", PLAIN_INTERVAL_S)
            )
        return result
    except KeyboardInterrupt:
        say(f"{asked.out} holds {plural(len(work.file.completions), 'completion')}; the same command goes on")
        raise
    except Exception as error:
        if not is_of_the_machine(error):
            raise
        size, fix = work.prompts * asked.n, "Lower --batch-size; what was written stays."
        raise EnvironmentProblem(f"memory ran out, with {size} completions at once", where="infer", fix=fix) from error
