"""Two machines search together with one real PostgreSQL server, and one of them dies."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage

from grpo_autotune.processes.fresh import free_port
from grpo_autotune.search.storage import shared_storage

ROOT = Path(__file__).parents[2]


REPEATS = ("race", "revert", "again", "alone", "shared")
"""Sources of trials that measure what was measured before, here or on another machine."""


def binaries() -> Path | None:
    """The newest PostgreSQL's folder of programs; Debian keeps them off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    return Path(on_path).resolve().parent if on_path and shutil.which("initdb") else None


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an empty database on a server of our own."""
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the extra `rdb` is not installed")
    user = None
    if os.geteuid() == 0:  # the server refuses to run as root
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = next((name for name in ("postgres", "nobody") if name in names), None)
        if user is None:
            pytest.skip("this is root, and there is no other user to run PostgreSQL as")
    folder = Path(tmp_path_factory.mktemp("postgres", numbered=True)).resolve()
    data = Path(tempfile.mkdtemp(prefix="postgres-")) if user else folder  # pytest's folders are closed to others
    if user:
        shutil.chown(data, user)
    port = free_port()
    subprocess.run(
        [programs / "initdb", "-D", data / "db", "-U", "tuner", "--auth=trust", "--no-sync", "-E", "UTF8"],
        user=user, cwd=data, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    server = subprocess.Popen(
        [programs / "postgres", "-D", data / "db", "-p", str(port), "-k", data, "-c", "listen_addresses=127.0.0.1"],
        user=user, cwd=data, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60.0
        ready = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
        while subprocess.run(ready, check=False).returncode and time.monotonic() < deadline:
            time.sleep(0.1)
        yield f"postgresql://tuner@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(data, ignore_errors=True)


@contextmanager
def opened(url: str) -> Iterator[RDBStorage]:
    storage = shared_storage(url)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def opened_schema(url: str, name: str) -> Iterator[None]:
    """A schema of the database, empty, for a study of its own."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
        yield
        connection.execute(f"DROP SCHEMA {name} CASCADE")


def machine(url: str, folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.study_worker", url, str(folder), "400", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()[1]}")
        time.sleep(0.05)


def timed(folder: Path) -> list[str]:
    rows = json.loads((folder / "search.json").read_text())["trials"]
    found = [row for row in rows if row["purpose"] == "timed" and row["source"] not in REPEATS]
    return [json.dumps(row["knobs"], sort_keys=True) for row in found]


@pytest.mark.slow
@pytest.mark.long
def test_two_machines_share_a_study_and_one_is_killed(database: str, tmp_path: Path) -> None:
    first = machine(database, tmp_path / "a", "hang")
    wait_for(tmp_path / "a" / "hanging", first)
    second = machine(database, tmp_path / "b")
    wait_for(tmp_path / "b" / "trials" / "0001" / "outcome.json", second)
    first.kill()
    first.communicate()
    _, error = second.communicate(timeout=120)
    assert second.returncode == 0, error

    with opened(database) as storage:
        trials = optuna.load_study(study_name="grpo-autotune", storage=storage).trials
    states = [trial.state for trial in trials]
    assert optuna.trial.TrialState.RUNNING not in states, "the dead machine's trial is still booked as running"
    lost = [trial for trial in trials if "retry_history" in trial.system_attrs]
    assert len(lost) == 1, "the dead machine's trial was put back once"
    retried = json.dumps(lost[0].user_attrs["knobs"], sort_keys=True)
    done = [trial for trial in trials if trial.state is optuna.trial.TrialState.COMPLETE]
    names = [json.dumps(trial.user_attrs["knobs"], sort_keys=True) for trial in done]
    assert len(names) == len(set(names)), "no combination was measured twice"
    assert retried in timed(tmp_path / "b"), "the other machine ran it"
    own = json.loads((tmp_path / "b" / "search.json").read_text())["baseline"]["number"]
    assert own is not None, "each machine measures its own baseline"


@pytest.mark.slow
@pytest.mark.long
def test_two_machines_of_two_workers_share_a_study(database: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    url = f"{database}?options=-csearch_path%3Dtwo"
    with opened_schema(database, "two"):
        machines = [machine(url, folder, "workers") for folder in folders]
        for process in machines:
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
    names = [name for folder in folders for name in timed(folder)]
    assert len(set(names)) > len(names) / 2 + 1, "alike, they would measure the same if neither knew of the other's"
    for folder in folders:
        rows = json.loads((folder / "search.json").read_text())["trials"]
        assert {row["place"] for row in rows} == {None, "core 0", "core 1"}


@pytest.mark.slow
def test_machines_that_start_together_open_an_empty_database(database: str) -> None:
    with opened_schema(database, "empty"):
        url = f"{database}?options=-csearch_path%3Dempty"
        opens = f"from grpo_autotune.search.storage import shared_storage; shared_storage({url!r})"
        opening = [
            subprocess.Popen([sys.executable, "-c", opens], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        for process in opening:
            _, error = process.communicate(timeout=120)
            assert process.returncode == 0, error


@pytest.mark.slow
def test_another_configuration_does_not_join(database: str) -> None:
    from grpo_autotune.errors import ConfigError
    from grpo_autotune.search.study import Axes, Study

    with opened(database) as storage, pytest.raises(ConfigError, match="another configuration"):
        for configuration in ("one", "other"):
            Study(storage, Axes.of({"grpo.beta": (0.0, 0.1)}), configuration, where="--storage")
