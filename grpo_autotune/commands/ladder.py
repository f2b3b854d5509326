"""`on_oom: ladder` of `grpo-autotune train`: where memory runs out, a rung down and the same command anew with it.

A process that has run out of memory is not gone on with: a failed call of CUDA leaves it in no known state, and frames,
caches and holes in the heap keep what the next attempt needs. The rungs stand in the run folder, so that every later
`--resume` begins at their foot.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from grpo_autotune.config.batch import world_size
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import complain, is_first_rank, say
from grpo_autotune.errors import TrainingError, shortened
from grpo_autotune.files import write_whole
from grpo_autotune.hardware import detect
from grpo_autotune.hardware.device_memory import cuda_in_use
from grpo_autotune.hardware.out_of_memory import causes
from grpo_autotune.knobs import knobs_of
from grpo_autotune.knobs.ladder import RANK, Stage, descended, kind_of_rung, next_rung
from grpo_autotune.processes.fresh import start_anew
from grpo_autotune.records.alerts import ALERTS_FILE, LADDER_FILE, Rung, load_rungs
from grpo_autotune.rollout.failures import engine_failure, frames
from grpo_autotune.runs.checkpoints import link
from grpo_autotune.runs.folder import RunFolder
from grpo_autotune.trials.child.memory import available_bytes, in_use, most_bytes
from grpo_autotune.trials.endings import ending_of_error
from grpo_autotune.units import size

LONGEST_WHY = 120

OTHERWISE: dict[Stage | None, str] = {
    "training": "on_oom_allow admits rungs that change what is learned.",
    "generation": "on_oom_allow admits rungs that change what is learned.",
    "engine": "What is loaded before the first step does not fit: model.load_in_4bit, a smaller model.",
    None: "grpo.per_device_eval_batch_size is an evaluation's, vllm.max_model_len an engine's.",
}
"""Stage that ran out -> what the user can do where no rung is left."""


class Ladder:
    """The ladder of one training, entered around it; `config` is what to train with, the user's own and the rungs so
    far. TrainingError where memory runs out and no rung is left."""

    def __init__(self, config: RunConfig, folder: Path, *, resume: bool) -> None:
        self._folder, self._environment, self._resumes = folder, dict(os.environ), resume
        self._rungs = load_rungs(folder) if resume else []
        self.config, held = descended(config, self._rungs)
        self._step: Callable[[], int] = lambda: 0
        self._ranks: Any = None
        for rung in held:
            say(f"{folder / LADDER_FILE}: {rung.change}, since memory ran out in step {rung.step}")

    def begin(self, trainer: Any) -> None:
        """Follow a trainer that is about to train in the folder."""
        self._step = lambda: int(trainer.state.global_step) + 1
        if is_first_rank() and not self._resumes:
            (self._folder / LADDER_FILE).unlink(missing_ok=True)  # of a run that saved nothing

    def __enter__(self) -> Ladder:
        if self.config.on_oom == "ladder" and world_size() > 1:
            from grpo_autotune.train.runs.leaving import Ranks

            self._ranks = Ranks(self._leave)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.config.on_oom == "ladder" and isinstance(error, Exception):
            ending = ending_of_error(error, available_bytes)
            if ending.status == "oom":
                self._descend(error, shortened(ending.why, LONGEST_WHY))
        if self._ranks is not None:
            self._ranks.close()

    def _descend(self, error: Exception, why: str) -> None:
        if self._ranks is None or self._ranks.claim():
            self._write(self._next(error, why))
            if self._ranks is None:
                self._leave({})
            self._ranks.call()
        self._ranks.wait()
        complain("warning: another rank does not answer, so that none can begin anew", everywhere=True)

    def _next(self, error: Exception, why: str) -> Rung:
        stage, taken = stage_of(error, begun=bool(self._step())), [rung.knobs for rung in self._rungs]
        knobs = next_rung(self.config, detect(), stage, taken) if stage is not None else None
        if knobs is None:
            tried = "; ".join(rung.change for rung in self._rungs) or "none"
            what = f"memory ran out ({why}), and no rung of on_oom ladder helps here (taken: {tried})"
            raise TrainingError(what, where=f"step {self._step()}", fix=OTHERWISE[stage]) from error
        held, limit = memory_of_process()
        before, kind = knobs_of(self.config, knobs), kind_of_rung(self.config, knobs)
        place = f"in step {self._step()}" if self._step() else "before the first step"
        begins = "begins again" if RANK in knobs else "goes on from the newest checkpoint"
        learns = "the same is learned" if kind == "exact" else "on_oom_allow lets it change what is learned"
        rung = Rung(
            step=self._step(),
            value=held,
            limit=limit,
            text=f"memory ran out {place} with {size(held)} of {size(limit)} held: {why}",
            remedy="",
            rank=int(os.environ.get("RANK", "0")),
            time=round(time.time(), 3),
            run=str(self._folder),
            knobs=knobs,
            before=before,
            kind=kind,
        )
        remedy = f"training {begins} in a fresh process with {rung.change} ({learns})"
        return rung.model_copy(update={"remedy": remedy})

    def _write(self, rung: Rung) -> None:
        """Keep a rung before anything else happens: a process killed from here on is resumed at it."""
        complain(f"warning: {rung.line()}", everywhere=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = RunFolder(self._folder)
        if RANK in rung.knobs and folder.checkpoints.exists():
            places = (folder.before_rung(number) for number in count(len(self._rungs) + 1))
            folder.checkpoints.rename(next(place for place in places if not place.exists()))
            for name in ("best", "last"):
                link(self._folder / name, None)
        lines = (f"{one.model_dump_json()}\n" for one in (*self._rungs, rung))
        write_whole(self._folder / LADDER_FILE, "".join(lines))
        with (self._folder / ALERTS_FILE).open("a", encoding="utf-8") as file:
            file.write(rung.alert().model_dump_json() + "\n")

    def _leave(self, meeting: Mapping[str, str]) -> None:
        start_anew(["--resume"], {**self._environment, **meeting})


def stage_of(error: Exception, *, begun: bool) -> Stage | None:
    """The part of a run whose memory ran out; None for an evaluation, and for an engine that needs a larger share."""
    if (engine := engine_failure(error)) is not None:
        return "engine" if engine.too_large else None
    inside = {function for cause in causes(error) for _, function in frames(cause)}
    if "evaluation_loop" in inside:  # of transformers' trainer
        return None
    return "engine" if not begun else "generation" if "_generate_single_turn" in inside else "training"


def memory_of_process() -> tuple[int, int]:
    """Bytes that this process holds, and that there are for it: on its GPU, else on the host."""
    if (cuda := cuda_in_use()) is not None:
        return int(cuda.memory_reserved()), int(cuda.mem_get_info()[1])
    return in_use(), most_bytes() or int(psutil.virtual_memory().total)
