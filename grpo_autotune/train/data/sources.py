"""Reading rows from wherever they are: a registered function, a file, an image folder, a saved data set, the hub."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets

from grpo_autotune.config.places import FILE_BUILDERS, check_data_place, check_split
from grpo_autotune.errors import ConfigError, DataError
from grpo_autotune.registry import is_reference, names, resolve

IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
GZIP = b"\x1f\x8b"  # `datasets` unpacks such a file
TEXT_BYTES = 1 << 20
"""Size of the blocks in which a file's encoding is checked."""
NULL_ROW = re.compile(rb"}[ \t\r]*\n\s*\[?\s*null\b")
NO_ROWS = "corresponds to no data"  # how datasets' reader calls a split of no rows


def read_rows(
    path: str,
    split: str | None,
    *,
    name: str | None = None,
    revision: str | None = None,
    params: Mapping[str, Any] | None = None,
    where: str = "data.path",
) -> datasets.Dataset:
    """Read one split, perhaps with a slice (`train[:90%]`); None takes a file's one split, and `test` of anything else.

    The path is a registered name or `package.module:function`, which takes `params`, a file, an image folder, a saved
    `datasets` folder, or a hub id, which may have a configuration's name and a revision. ConfigError where there is
    nothing of that name, or no such split, DataError where it cannot be read."""
    check_data_place(path, name=name, revision=revision, params=params, where=where)
    check_split(path, split, f"{where.removesuffix('path')}split")
    if path in names("dataset") or is_reference(path):
        rows = resolve("dataset", path)(split or "test", **(params or {}))
        if not isinstance(rows, datasets.Dataset):
            raise ConfigError(f"{path} returned {type(rows).__name__}, not a datasets.Dataset", where=where)
        return rows
    place = Path(path).expanduser()
    if place.is_file():
        builder = FILE_BUILDERS[place.suffix.lower()]
        if builder != "parquet":
            _check_text(place)
        return _load(builder, split or "train", where, path, data_files={"train": str(place)})
    if place.is_dir():
        return _read_folder(place, split, where, name)
    return _load(path, split or "test", where, path, name=name, revision=revision)


def _check_text(place: Path) -> None:
    """Refuse text that is not UTF-8, of which `datasets` makes other letters, and a row of nothing: Arrow crashes."""
    with suppress(OSError), place.open("rb") as file:  # of a file that cannot be read, `datasets` says why
        if file.peek(2).startswith(GZIP):
            return
        before, last = 0, b"}\n"
        while lines := file.readlines(TEXT_BYTES):
            if not _is_text(b"".join(lines)):
                number, line = next(one for one in enumerate(lines, before + 1) if not _is_text(one[1]))
                encoding = ("UTF-16", "UTF-16") if b"\0" in line else ("not UTF-8", "LATIN1")
                fix = f"Convert the file to UTF-8, for instance with iconv -f {encoding[1]} -t UTF-8."
                raise DataError(f"line {number} is {encoding[0]}", where=str(place), fix=fix)
            is_json, text = place.suffix.lower() != ".csv", last + b"".join(lines)
            if is_json and (row := NULL_ROW.search(text)):
                number = before + text.count(b"\n", 0, row.end())
                raise DataError(f"line {number} is null", where=str(place), fix="Remove it: it is no row.")
            before, last = before + len(lines), lines[-1]


def _is_text(content: bytes) -> bool:
    with suppress(UnicodeDecodeError):
        return "\0" not in content.decode()
    return False


def _read_folder(folder: Path, split: str | None, where: str, name: str | None) -> datasets.Dataset:
    if (folder / "dataset_dict.json").is_file():
        return _slice(dict(_from_disk(folder)), split or "test", where)
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return _slice({"train": _from_disk(folder)}, split or "train", where)
    if any(file.suffix.lower() in IMAGE_ENDINGS for file in folder.rglob("*")):
        return _class_names(_load("imagefolder", split or "test", where, str(folder), data_dir=str(folder)))
    return _load(str(folder), split or "test", where, str(folder), name=name)


def _load(builder: str, split: str, where: str, path: str, **arguments: Any) -> datasets.Dataset:
    try:
        with _hushed():
            return datasets.load_dataset(builder, split=split, **arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(f"cannot be read: {error.__cause__ or error}", where=path) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        fix = f"Registered: {', '.join(names('dataset'))}; or give a path."
        raise ConfigError(f"no data set {path}: {error}", where=where, fix=fix) from error
    except ValueError as error:
        if NO_ROWS in str(error):
            raise DataError("the data set is empty", where=path) from error
        raise ConfigError(f"cannot load {path}: {error}", where=where) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error}", where=path) from error


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep `datasets` from logging an error that is raised as well, and told in our own line."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _from_disk(folder: Path) -> Any:
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"this saved data set cannot be read: {error}", where=str(folder)) from error


def _slice(splits: Mapping[str, datasets.Dataset], spec: str, where: str) -> datasets.Dataset:
    """`datasets`' split notation on data sets that are already there."""
    try:
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute({name: len(rows) for name, rows in splits.items()})
    except ValueError as error:
        raise ConfigError(f"split {spec}: {error}", where=f"{where.removesuffix('path')}split") from error
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _class_names(rows: datasets.Dataset) -> datasets.Dataset:
    """Sub-folders of an image folder are its classes: give rewards their names, not their numbers."""
    label = rows.features.get("label")
    if not isinstance(label, datasets.ClassLabel):
        return rows
    labels = [None if number is None else label.int2str(number) for number in rows["label"]]
    return rows.remove_columns("label").add_column("label", labels)
