"""The folder of a training run: `config.yaml`, `train_log.jsonl`, `checkpoints/`, and `model/` when it has finished.

Nothing that was trained is overwritten: a folder that holds checkpoints is only entered to resume.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import write_whole
from grpo_autotune.runs.checkpoints import WEIGHTS_ONLY, Checkpoint, set_aside, survey

CHECKPOINTS = "checkpoints"


class RunFolder:
    """The places inside one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self.log = path / "train_log.jsonl"
        self.config = path / "config.yaml"
        self.model = path / "model"

    def before_rung(self, number: int | str) -> Path:
        """Checkpoints of before a rung of `on_oom: ladder` with which training began again."""
        return self.path / f"{CHECKPOINTS}-before-rung-{number}"

    def before_rungs(self) -> list[Path]:
        """All that are there of `before_rung`."""
        return sorted(self.path.glob(self.before_rung("*").name))


@dataclass(frozen=True)
class Start:
    """The start of a run: at a whole checkpoint, or (None) at step 0; `torn` are the newer ones that cannot be used."""

    checkpoint: Checkpoint | None
    torn: tuple[Checkpoint, ...]

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def find_start(folder: RunFolder, resume: bool) -> Start:
    """Decide where to begin; reads only, so that every rank finds the same.

    Raises:
        ConfigError: The folder holds a run already and `resume` was not asked for; or it was, and what the folder holds
            cannot be gone on with. Or there is a file in its place.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise ConfigError("this is a file, not a folder", where=str(folder.path), fix="Give another folder with --out.")
    saved = survey(folder.checkpoints)
    if not resume:
        if saved or folder.model.exists():
            what = f"checkpoints up to step {saved[0].step}" if saved else "a trained model"
            raise ConfigError(
                f"this folder holds {what} already, which a new run would overwrite",
                where=str(folder.path),
                fix="Go on with --resume, or give another folder with --out",
            )
        return Start(None, ())
    weights_only = next((checkpoint for checkpoint in saved if checkpoint.flaw == WEIGHTS_ONLY), None)
    if weights_only is not None and all(checkpoint.flaw is not None for checkpoint in saved):
        raise ConfigError(
            f"{weights_only.path.name}: {WEIGHTS_ONLY}, so training cannot go on from it",
            where=str(folder.path),
            fix="Start a new run in another folder with --out; its model.name_or_path may be that checkpoint.",
        )
    if not saved and folder.model.exists():
        raise ConfigError(
            "this folder holds a trained model and no checkpoint to go on from; training again would overwrite it",
            where=str(folder.path),
            fix="Give another folder with --out.",
        )
    whole = next((index for index, checkpoint in enumerate(saved) if checkpoint.flaw is None), len(saved))
    return Start(saved[whole] if whole < len(saved) else None, tuple(saved[:whole]))


def enter(folder: RunFolder, config: RunConfig, start: Start, say: Callable[[str], None]) -> None:
    """Prepare the folder, on one process only: torn checkpoints aside, log cut to the start, configuration saved."""
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    for checkpoint in start.torn:
        say(f"{checkpoint.path.name} is torn ({checkpoint.flaw}); set aside as {set_aside(checkpoint).name}")
    cut_log(folder.log, start.step)
    text = config.to_yaml()
    if start.checkpoint and folder.config.exists() and folder.config.read_text(encoding="utf-8") != text:
        say(f"the configuration differs from the one this run was started with; {folder.config} is replaced")
    write_whole(folder.config, text)


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after a step (and a line that was cut short), so that a resumed run's log reads as one run."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if 0 <= _step_of(line) <= step]
    write_whole(path, "".join(f"{line}\n" for line in kept if step))


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
