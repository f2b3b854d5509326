"""A model that needs no adapter any more: trained weights merged into their base, written, read again and proven.

The models are in memory one after the other, in float32 where that has room: the trained one answers the prompts and
is merged and written, then the folder that was written is loaded, then the base.
"""

import fcntl
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.console import say
from grpo_autotune.errors import AutotuneError, ConfigError, EnvironmentProblem, MergeError
from grpo_autotune.files import full_disk_told, sha256_of, write_whole
from grpo_autotune.hardware.ceilings import free_bytes
from grpo_autotune.hardware.machine import package_version
from grpo_autotune.hardware.out_of_memory import is_of_the_machine
from grpo_autotune.records.trained import Merged, Proof
from grpo_autotune.train.models.load import model_source
from grpo_autotune.trained.load import free_memory, load_section, load_trained, load_trained_processor
from grpo_autotune.trained.proof import FACTOR, LIMITS, Exam, flaw, prompts_of
from grpo_autotune.trained.shards import in_one_piece
from grpo_autotune.trained.source import Trained, base_section
from grpo_autotune.units import size

RECEIPT = "merged.json"
PARTS = ".parts"
"""Folder of weights that were saved in parts, while they are needed in one piece."""
WEIGHTS = ("*.safetensors", "*model*.bin")
PACKAGES = ("grpo-autotune", "transformers", "peft", "torch")
ROOM = 1.3
"""Memory that a model needs, in sizes of its weights: activations, logits, and a matrix of the merge beside them."""
NO_SPACE = "Make room, or give a folder on another disk."

Step = Callable[[str], None]


def steps_of(rows: int) -> int:
    """Number of steps that a merge with so many prompts has at most."""
    return 4 * rows + 6


@dataclass(frozen=True)
class Plan:
    """The weights to merge, and the dtypes."""

    trained: Trained  # in one piece
    stored: str  # dtype of the merged weights
    computed: str  # dtype in which the models are compared
    rounds: bool  # False for weights that are stored as they are
    notes: list[str]


def merge(trained: Trained, out: Path, *, dtype: str | None, rows: int, step: Step) -> Merged:
    """Merge into the folder `out`, which exists whole and proven afterwards or not at all, in `dtype` (None: that of
    the base's files); `rows` prompts prove it, `step` is told what comes next, `steps_of(rows)` times at most.

    Raises:
        ConfigError: There is something at `out`; the base is gone, or the adapter is another's.
        EnvironmentProblem: The disk is full, or DeepSpeed is missing for what it saved.
        MergeError: The folder that was written does not prove to be the trained model.
    """
    with _draft_of(out) as draft, full_disk_told(out, NO_SPACE):
        step("reading the outline of the weights")
        plan = _plan(in_one_piece(trained, draft / PARTS), draft, dtype)
        processor = load_trained_processor(plan.trained)
        prompts = prompts_of(trained.config, processor, rows, say)
        step("loading the trained model")
        model = load_trained(plan.trained, dtype=plan.computed)
        exam = Exam(model, prompts, step)
        step("merging and writing")
        model, tied = _merged(model, trained)
        _write(model.to(getattr(torch, plan.stored)), processor, draft)
        del model
        base = _base_of(plan.trained)
        proof = _proof(plan, exam, draft, base, step)
        if (why := flaw(proof)) is not None:
            equal = proof.base is not None and proof.base.max == 0 and plan.computed == "float32"
            finer = "" if plan.stored == "float32" or equal else "; try --dtype float32"
            raise MergeError(why, where=str(trained.path), fix=f"Nothing was written{finer}.")
        step("hashing files")
        shutil.rmtree(draft / PARTS, ignore_errors=True)
        source = None if base is None else model_source(base, say)
        receipt = Merged(
            trained=str(trained.path),
            base=source,
            dtype=plan.stored,
            tied=tied,
            notes=plan.notes,
            proof=proof,
            trained_files=_hashes(trained.path, "adapter_config.json", *WEIGHTS, "global_step*/*", "*fsdp_*/*"),
            base_files={} if base is None or source is None else _hashes(_folder(source, base.revision), *WEIGHTS),
            files=_hashes(draft, "*"),
            versions={name: package_version(name) for name in PACKAGES},
        )
        write_whole(draft / RECEIPT, receipt.model_dump_json(indent=2))
    return receipt


def _plan(trained: Trained, draft: Path, dtype: str | None) -> Plan:
    """The dtypes, from weights that are not loaded; the disk has room, and nothing is stored quantized."""
    outline = load_trained(trained, dtype="auto", adapted=False, placement={"device_map": "meta"})
    if getattr(outline.config, "quantization_config", None) is not None:
        fix = "Write the name of its unquantized original as model.name_or_path in the run's config.yaml."
        raise ConfigError("the base is stored quantized, nothing is merged into that", where=str(trained.path), fix=fix)
    files = str(outline.dtype).removeprefix("torch.")
    stored, count = dtype or files, sum(weight.numel() for weight in outline.parameters())
    needed, free = count * getattr(torch, stored).itemsize, shutil.disk_usage(draft).free
    if free < needed:
        what = f"the merged model takes {size(needed)}, and the disk has {size(free)}"
        raise EnvironmentProblem(what, where=str(draft.parent), fix=NO_SPACE)
    has_room = 4 * count * ROOM < free_bytes("cuda" if torch.cuda.is_available() else "cpu")
    computed, notes = "float32" if has_room else stored, []
    if not has_room and stored != "float32":
        notes.append(f"compared in {computed}: there is no memory for float32")
    if trained.adapter is not None and trained.config is not None and trained.config.model.load_in_4bit:
        notes.append(f"trained on the base in 4 bits, merged into the base in {stored}: what 4 bits lose comes back")
    rounds = trained.adapter is not None or stored != files or draft in trained.path.parents
    return Plan(trained, stored, computed, rounds, notes)


def _proof(plan: Plan, exam: Exam, draft: Path, base: ModelSection | None, step: Step) -> Proof:
    """The folder that was written, read again, and the base, both held against the trained model."""
    free_memory()
    step("loading the merged model")
    trusted = base_section(plan.trained).trust_remote_code
    written = ModelSection(name_or_path=str(draft), trust_remote_code=trusted)
    merged = exam.difference(load_section(written, plan.computed), "the merged model")
    free_memory()
    if base is not None:
        step("loading the base")
    return Proof(
        prompts=exam.told,
        tokens=exam.tokens,
        dtype=plan.computed,
        limit=max(LIMITS[plan.stored], LIMITS[plan.computed]) if plan.rounds else LIMITS["float32"],
        factor=FACTOR,
        merged=merged,
        base=None if base is None else exam.difference(load_section(base, plan.computed), "the base"),
    )


@contextmanager
def _draft_of(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its name in the end, or is removed where anything fails. What a killed
    process left is removed first; the lock on it tells that none is at work."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError("there is something here already", where=str(out), fix="Give a folder that does not exist.")
    draft = out.with_name(f".{out.name}.merging")
    try:
        draft.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"the folder cannot be made ({error.strerror})", where=str(draft)) from error
    handle = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ConfigError("another process merges into it", where=str(out), fix="Give another folder.") from error
    try:
        for path in draft.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield draft
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(handle)


def _merged(model: Any, trained: Trained) -> tuple[Any, bool]:
    """The model without an adapter, and whether its output and input embeddings are one matrix. They are parted for the
    merge, which would add to both what only one of them learned, and joined again where they are still equal."""
    text = model.config.get_text_config()
    was_tied = bool(text.tie_word_embeddings)
    if hasattr(model, "merge_and_unload"):
        _part(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the embeddings are no longer tied: they are looked at below
            try:
                model = model.merge_and_unload(safe_merge=True)
            except (ValueError, RuntimeError) as error:
                if is_of_the_machine(error):
                    raise
                raise MergeError(f"PEFT cannot merge this adapter: {error}", where=str(trained.path)) from error
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    tied = was_tied and torch.equal(inner.weight, outer.weight)
    if tied:
        outer.weight = inner.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
    return model, tied


def _part(model: Any) -> None:
    """Give each name of a shared weight a weight of its own."""
    seen = set()
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        if id(weight) in seen:
            parent, _, leaf = name.rpartition(".")
            copy = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            setattr(model.get_submodule(parent), leaf, copy)
        seen.add(id(weight))


def _write(model: Any, processor: Any, folder: Path) -> None:
    """Write the model with generation config, tokenizer, processor and chat template. Sampling settings without
    `do_sample`, which some models come with and transformers refuses to save, are meant for sampling."""
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:
            settings.do_sample = True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _base_of(trained: Trained) -> ModelSection | None:
    """The section of the base; of a full fine-tune the run's model, None where that is not known or gone."""
    if trained.adapter is not None:
        return base_section(trained)
    if trained.config is None:
        return None
    section = trained.config.model.model_copy(update={"load_in_4bit": False})
    try:
        model_source(section, say)
    except AutotuneError as error:
        say(f"not held against the base, which is not there: {error.what}")
        return None
    return section


def _folder(source: str, revision: str | None) -> Path:
    """The folder of a model's files: itself, or that of the hub's cache."""
    local = Path(source).is_dir()
    return Path(source) if local else Path(snapshot_download(source, revision=revision, local_files_only=True))


def _hashes(folder: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 of the files of a folder that fit one of the patterns."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}
