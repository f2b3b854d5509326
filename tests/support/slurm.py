"""A Slurm of one's own on this machine, from the system's packages: munged, slurmctld, and a slurmd for each node.

All nodes are this machine, at ports of their own; each says that it has 4 GPUs, which no CPU build of torch looks at.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

CONF = """
ClusterName=own
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
ProctrackType={proctrack}
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
KillWait=30
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=1000 Gres=gpu:4"


def wanting() -> str | None:
    """Why no Slurm can be started here; None where one can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path()) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "slurmd has to be root"


def path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"


class Slurm:
    """A running one; `folder` has its state and logs."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def ask(self, *words: str) -> str:
        """Standard output of a command of Slurm's, which must end well."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str, output: Path) -> str:
        """Number of a job that `sbatch WORDS` makes, its output in a file."""
        return self.ask("sbatch", "--parsable", f"--output={output}", *words).strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of a job as `scontrol show job` has them."""
        text = self.ask("scontrol", "--oneliner", "show", "job", number)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def until(self, condition: Callable[[], bool], limit_s: float = 240.0) -> None:
        until = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < until, f"{self.ask('squeue')}\n{self.ask('sinfo')}"
            time.sleep(0.2)

    def ended(self, number: str, limit_s: float = 240.0) -> dict[str, str]:
        """A job's fields once it has ended for good."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.job(number)["JobState"] in over, limit_s)
        return self.job(number)


@contextmanager
def slurm(folder: Path, *, more: Sequence[str] = (), proctrack: str = "proctrack/linuxproc") -> Iterator[Slurm]:
    """Start one with two nodes and those named, in the order of their names, and end it with all that it runs."""
    host = socket.gethostname().partition(".")[0]
    names = [host, f"{host}-2", *more]  # a job may look up the first; Slurm wants it first here
    nodes, first = len(names), free_ports(len(names) + 1)
    lines = [NODE.format(name=name, host=host, port=first + at) for at, name in enumerate(names, 1)]
    (folder / "state").mkdir(parents=True)
    settings = {"host": host, "folder": folder, "nodes": "\n".join(lines), "proctrack": proctrack, "port": first}
    (folder / "slurm.conf").write_text(CONF.format(**settings), encoding="utf-8")
    gpus = "".join(f"NodeName={name} Name=gpu File=/dev/tty[0-3]\n" for name in names)
    (folder / "gres.conf").write_text(gpus, encoding="utf-8")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    environment = {**os.environ, "PATH": path(), "SLURM_CONF": str(folder / "slurm.conf")}
    places = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    daemons = [["munged", "--force", *(f"--{name}={folder}/munge.{end}" for name, end in places.items())]]
    daemons += [["slurmctld", "-c"], *(["slurmd", "-N", name] for name in names)]
    try:
        for words in daemons:
            subprocess.run(words, env=environment, check=True, capture_output=True)
        own = Slurm(folder, environment)
        own.until(lambda: own.ask("sinfo", "--noheader", "--Node", "--states=idle").count("low") == nodes, 30.0)
        yield own
        own.ask("scancel", "--user=root", "--full", "--signal=KILL")
    finally:
        for file in sorted(folder.glob("*.pid"), key=lambda file: file.name == "munge.pid"):
            os.kill(int(file.read_text()), signal.SIGTERM)


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nothing listens on."""
    for first in range(21000 + os.getpid() % 5000, 31000):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise OSError("no ports are free")
