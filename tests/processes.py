"""Processes of our own that begin at once: a server has imported `run` and forks.

Each is told its whole environment that matters: the server's is that of its first start.
"""

import multiprocessing
import os
import socket
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
        self._process.start()

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def code(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float = JOINS) -> int:
        self._process.join(seconds)
        assert self.code is not None, f"it still runs: {self.text}"
        return self.code

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def ranks(processes: int, folder: Path, main: Callable[..., int], *words: object) -> list[Child]:
    """A job as Slurm starts one, without `torchrun`, which ends the others by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        Child(folder / f"rank{rank}.txt", main, *words, RANK=rank, LOCAL_RANK=rank,
              WORLD_SIZE=processes, MASTER_ADDR="localhost", MASTER_PORT=port)
        for rank in range(processes)
    ]  # fmt: skip


def _run(output: Path, told: Mapping[str, str], main: Callable[..., int], words: tuple) -> None:
    to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(to, 1)
    os.dup2(to, 2)
    os.chdir(ROOT)
    os.environ.update(told)
    sys.exit(main(*words))
