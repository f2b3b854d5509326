"""Storage of a study: a journal in the run folder, or a database that several machines share."""

import json
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend

from grpo_autotune.errors import ConfigError, EnvironmentProblem

HEARTBEAT_S = 10
GRACE_S = 60
"""A machine that is silent for so long has lost its trial."""
RETRIES, RETRY_S = 4, 0.5
"""Machines that start together make the tables together, and the database refuses all but one."""


def journal_storage(path: Path) -> JournalStorage:
    """The journal of a folder that this process has locked, mended first: a kill in mid-write leaves a torn last line,
    which Optuna would append to and then refuse, and a symbolic link that it uses as a lock, for which it would
    wait."""
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    mend_journal(path)
    return JournalStorage(JournalFileBackend(str(path)))


def mend_journal(path: Path) -> int:
    """Cut a journal at its first line that is not whole; the rest is kept beside it. Returns the bytes cut."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    good = 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n") or not _is_json(line):
            break
        good += len(line)
    if good < len(data):
        path.with_name(f"{path.name}.torn").write_bytes(data[good:])
        with path.open("r+b") as file:
            file.truncate(good)
    return len(data) - good


def shared_storage(url: str) -> RDBStorage:
    """A database for several machines. ConfigError where it is not a database URL, or nothing answers there;
    EnvironmentProblem where the database's driver is not installed."""
    from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

    try:
        with quiet():
            for _ in range(RETRIES):
                with suppress(IntegrityError, ProgrammingError):
                    return _database(url)
                time.sleep(RETRY_S)
            return _database(url)
    except ImportError as error:
        what = f"the driver of this database is not installed: {error}"
        raise EnvironmentProblem(what, where="--storage", fix="Install the extra `rdb`.") from error
    except (ArgumentError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        what = f"this database does not answer: {str(error).splitlines()[0]}"
        fix = "Give a URL such as postgresql://user:password@host/database."
        raise ConfigError(what, where="--storage", fix=fix) from error


def _database(url: str) -> RDBStorage:
    return RDBStorage(
        driver_url(url),
        heartbeat_interval=HEARTBEAT_S,
        grace_period=GRACE_S,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=2),
    )


def driver_url(url: str) -> str:
    """`postgresql://` by the driver of the extra `rdb`; SQLAlchemy's own choice is psycopg2."""
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's warnings that a feature is experimental, or made for `optimize`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        yield
