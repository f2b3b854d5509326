"""The file of completions: a JSON line each, added batch by batch, so that whatever ends a run loses at most a batch.

The settings stand beside it, in `FILE.meta.json`: a file is only gone on with by the same ones.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grpo_autotune.errors import ConfigError, shortened
from grpo_autotune.files import sha256_of, write_whole
from grpo_autotune.records.stored import read_stored
from grpo_autotune.records.trained import Completion, Settings

DIGESTS = {
    "rows": "it was begun with other rows: the data has changed, or --limit",
    "weights": "it was begun with other weights: training has gone on in that folder",
}
"""Settings whose values would tell nobody anything."""
MODEL_FILE = re.compile(r".*model.*\.(safetensors|bin)|(adapter_)?config\.json")
SHOWN = 60


class CompletionFile:
    """The file at `path`, made or gone on with by these settings.

    Raises:
        ConfigError: There is a file that other settings made, or that is none of completions.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings
        side = path.with_name(f"{path.name}.meta.json")
        is_begun = path.exists() and path.stat().st_size > 0
        if is_begun:
            _check(path, side, settings)
        else:
            write_whole(side, settings.model_dump_json(indent=1))
        self.completions = self._read() if is_begun else []

    def add(self, completions: Sequence[Completion]) -> None:
        """Add completions, which are on the disk afterwards."""
        with self.path.open("ab") as file:
            file.write(_lines(completions))
            file.flush()
            os.fsync(file.fileno())
        self.completions += completions

    def sort(self) -> None:
        """Put the lines in the order of rows and samples."""
        ordered = sorted(self.completions, key=lambda one: (one.row, one.sample))
        if ordered != self.completions:
            write_whole(self.path, _lines(ordered))
            self.completions = ordered

    def _read(self) -> list[Completion]:
        """The whole lines; a last one that was cut short is taken off the file."""
        content, completions = self.path.read_bytes(), list[Completion]()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                completions.append(Completion.model_validate_json(line))
            except ValidationError as error:
                what = f"line {number} is no completion"
                raise ConfigError(what, where=str(self.path), fix="Remove it, or give another --out.") from error
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return completions


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Keep other processes from writing the file meanwhile, which is removed if nothing was written; ConfigError where
    another one is at it."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError("another process writes it", where=str(path), fix="Give another --out.") from error
        try:
            yield
        finally:
            if not path.stat().st_size:
                path.unlink()


def weights_digest(folder: Path) -> str:
    """A digest of the model in a folder: names and content of its files of weights and settings, wherever it lies."""
    files = sorted(path for path in folder.iterdir() if MODEL_FILE.fullmatch(path.name))
    return rows_digest(f"{path.name} {sha256_of(path)}" for path in files)


def rows_digest(rows: Iterable[Any]) -> str:
    """A digest of rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def _check(path: Path, side: Path, settings: Settings) -> None:
    fix = "Give another --out, or the settings that it was begun with."
    absent, again = "this file is there, and not begun by `infer`", "Give another --out."
    stored = read_stored(side, Settings, absent=absent, written_by="`infer` with another --out", again=again)
    before, asked = (_flat(json.loads(one.model_dump_json())) for one in (stored, settings))
    for name in (name for name in {**asked, **before} if before.get(name) != asked.get(name)):
        was, is_ = (shortened(json.dumps(one.get(name), ensure_ascii=False), SHOWN) for one in (before, asked))
        what = DIGESTS.get(name, f"it was begun with {name} {was}, and {is_} is asked for")
        raise ConfigError(what, where=str(path), fix=fix)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by name, but for the place of the weights, which a run folder that was moved has elsewhere."""
    sampling = settings.pop("sampling")
    return {**settings, **sampling, "checkpoint": None}


def _lines(completions: Iterable[Completion]) -> bytes:
    return b"".join(f"{one.model_dump_json(fallback=str)}\n".encode() for one in completions)
