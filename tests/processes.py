"""Processes of our own that begin at once: a server has imported `run` and forks.

Each is told its whole environment that matters: the server's is that of its first start.
"""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["run"])
JOINS = 300  # seconds, at the most


class Child:
    """`main(*words)` in a process; what it prints is `text`. `code` is None while it runs, -9 after
    `kill` (SIGKILL)."""

    def __init__(
        self, output: Path, main: Callable[..., int], *words: object, **environment: object
    ):
        self.output = output
        told = {name: str(value) for name, value in environment.items()}
        self._process = CONTEXT.Process(target=_run, args=(output, told, main, words))
        with contextlib.chdir(ROOT):  # where the server finds what it imports
            self._process.start()

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def code(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float = JOINS) -> int:
        self._process.join(seconds)
        if (code := self.code) is None:
            self.kill()  # or pytest would wait for it at its end
            raise AssertionError(f"it still ran after {seconds} s: {self.text}")
        return code

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


class Command(Child):
    """`python -m run words`, whose interpreter also ends as a user's does; a fork just stops."""

    def __init__(self, output: Path, *words: str, **environment: object):
        self.output = output
        told = {name: str(value) for name, value in environment.items()}
        with open(output, "wb") as to:
            self._command = subprocess.Popen(
                [sys.executable, "-m", "run", *words], cwd=ROOT, env=os.environ | told,
                stdout=to, stderr=to,
            )  # fmt: skip

    @property
    def code(self) -> int | None:
        return self._command.poll()

    def wait(self, seconds: float = JOINS) -> int:
        return self._command.wait(seconds)

    def kill(self) -> None:
        self._command.kill()
        self._command.wait()


def environments(processes: int) -> list[dict[str, object]]:
    """Of each rank of a job as Slurm starts one, without `torchrun`, which ends the others by
    itself."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [{**job, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]


def ranks(processes: int, folder: Path, main: Callable[..., int], *words: object) -> list[Child]:
    """Such a job of forks."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        Child(folder / f"rank{rank}.txt", main, *words, **told)
        for rank, told in enumerate(environments(processes))
    ]


def _run(output: Path, told: Mapping[str, str], main: Callable[..., int], words: tuple) -> None:
    to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(to, 1)
    os.dup2(to, 2)
    os.chdir(ROOT)
    os.environ.update(told)
    sys.exit(main(*words))
