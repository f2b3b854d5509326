"""Imports of public files: each becomes a loadable configuration, or the one line that is expected of it.

The files are named in `public/*.json` (repository, commit, path, outcome, and where they are needed `from`,
`world_size` and `env`) and read from mirrors, bare git folders `OWNER+NAME/repo` under `GRPO_AUTOTUNE_MIRRORS`.
As a script it prints a line for each: `python tests/interop/public_files.py [WORD OF A PATH]`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import AutotuneError
from grpo_autotune.interop.importing import import_file

LISTS = Path(__file__).parent / "public"
BESIDE = ("yaml", "yml", "json", "jinja", "txt")
LARGEST = 50_000


@dataclass(frozen=True)
class Public:
    """One file of a public repository."""

    repository: str
    commit: str
    path: str
    outcome: str  # "imports", or a part of the line that refuses it
    framework: str | None = None
    world_size: int | None = None
    environment: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return f"{self.repository}@{self.commit[:7]}:{self.path}"


def git(repository: str, *arguments: str) -> bytes:
    folder = Path(os.environ["GRPO_AUTOTUNE_MIRRORS"]) / repository.replace("/", "+") / "repo"
    return subprocess.run(["git", f"--git-dir={folder}", *arguments], check=True, capture_output=True).stdout


def listed() -> list[Public]:
    """The files of every list."""
    entries = [entry for path in sorted(LISTS.glob("*.json")) for entry in json.loads(path.read_text())]
    return [
        Public(
            entry["repository"].replace("+", "/"), entry["commit"], entry["path"], entry["outcome"], entry.get("from"),
            entry.get("world_size"), entry.get("env", {}),
        )
        for entry in entries
    ]  # fmt: skip


def small_files(repository: str, commit: str, endings: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each small file with such an ending; a mirror may lack the large ones."""
    for line in git(repository, "ls-tree", "-r", "-z", "-l", commit).decode().split("\0")[:-1]:
        facts, _, name = line.partition("\t")
        kind, size = facts.split()[1::2]
        if kind == "blob" and name.rpartition(".")[2] in endings and size.isdigit() and int(size) < LARGEST:
            yield name, git(repository, "show", f"{commit}:{name}")


def scripts() -> Iterator[tuple[str, str]]:
    """Name and text of every shell script of the mirrors, at their newest commits."""
    for folder in sorted(Path(os.environ["GRPO_AUTOTUNE_MIRRORS"]).glob("*/repo")):
        for name, content in small_files(folder.parent.name, "HEAD", ("sh", "slurm")):
            yield f"{folder.parent.name}:{name}", content.decode(errors="replace")


@cache
def checked_out(repository: str, commit: str) -> Path:
    """A folder with the configurations of a commit; other files are added as they are asked for."""
    folder = Path(tempfile.mkdtemp())
    for name, content in small_files(repository, commit, BESIDE):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def outcome(file: Public) -> str:
    """ "imports", or the line that refuses the file."""
    path = checked_out(file.repository, file.commit) / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(git(file.repository, "show", f"{file.commit}:{file.path}"))
    try:
        done = import_file(
            path, framework=file.framework, world_size=file.world_size, environment=file.environment
        ).finished()
        os.environ["WORLD_SIZE"] = str(done.world_size)  # as torchrun sets it for the processes that it is for
        RunConfig.from_dict(done.config)
    except AutotuneError as error:
        return str(error)
    finally:
        os.environ.pop("WORLD_SIZE", None)
    return "imports"


def main() -> int:
    wrong = 0
    for file in [file for file in listed() if all(word in file.name for word in sys.argv[1:])]:
        came = outcome(file)
        good = came == "imports" if file.outcome == "imports" else file.outcome in came
        wrong += not good
        sys.stdout.write(f"{'ok   ' if good else 'WRONG'} {file.name}: {came}\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
