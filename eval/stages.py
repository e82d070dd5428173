"""A result that takes hours, in pieces that outlive the process."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from eval.provenance import sources
from model import parallel
from model.files import locked, read_json, write_array, write_json, write_text

SOURCES = "sources"
AGAIN = "remove it, it is made again"


class Stages:
    """The pieces of one result: what is there is not computed again, and `finish` removes them.

    Attributes:
        begun: the sources (`eval.provenance`) that made pieces, this call's among them.
    Args:
        place: of the result; the pieces lie in `<place>.part/` beside it.
        identity: what they are of, as JSON.
        renew: remove those of something else.
    Raises:
        ValueError: those that are there are of something else, without `renew`.

    Of several processes of a job each calls the same, and the first writes. Between a look for a
    piece and its writing lies work that all of them do together, so they see the same.
    """

    def __init__(self, place: Path, identity: dict[str, Any], renew: bool = False):
        self.place, self.folder = place, _folder(place)
        of, note = json.loads(json.dumps(identity)), self.folder / "of.json"
        begun = self.folder.is_dir() and any(p != note for p in self.folder.glob("[!.]*"))
        was = read_json(note, AGAIN) if begun and note.exists() else {}
        self.begun = sorted({*was.pop(SOURCES, ()), sources()})
        if renew and was != of:
            self.begun = [sources()]
            parallel.wait()  # all have read what was there
            if self.writes:
                shutil.rmtree(self.folder, ignore_errors=True)
            parallel.wait()
        elif was and was != of:
            other = [key for key in of.keys() | was.keys() if of.get(key) != was.get(key)]
            raise ValueError(
                f"{self.folder} holds pieces of a run that was stopped, with another "
                f"{', '.join(sorted(other))}: remove it, or give the same command again"
            )
        if self.writes:
            write_json(note, of | {SOURCES: self.begun})

    @property
    def writes(self) -> bool:
        return parallel.rank() == 0

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A piece, read or made and written; a JSON value."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return read_json(path, AGAIN)["made"]
        made = make()
        if self.writes:
            write_json(path, {"made": made})
        return json.loads(json.dumps(made))

    def latest(self, name: str) -> tuple[int, np.ndarray] | None:
        """The last array of `advance`, and how far it had come."""
        found = sorted(self.folder.glob(f"{name}-[0-9]*.npy"))
        return (int(found[-1].stem.rpartition("-")[2]), np.load(found[-1])) if found else None

    def advance(self, name: str, end: int, array: np.ndarray) -> None:
        """Keep an array in place of the one before; `end`: how far it has come."""
        if not self.writes:
            return
        mine = self.folder / f"{name}-{end:012}.npy"
        write_array(mine, array)
        for path in self.folder.glob(f"{name}-[0-9]*.npy"):
            if path.name < mine.name:  # of a process that came further, where two do the same
                path.unlink(missing_ok=True)

    def rows(self, name: str) -> list[Any]:
        """What `append` has kept, in its order."""
        path = self.folder / f"{name}.jsonl"
        if not path.exists():
            return []
        whole = path.read_text().rpartition("\n")[0]  # of the last line a kill may leave a part
        write_text(path, whole + "\n" if whole else "")
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, name: str, row: Any) -> None:
        """Keep one more JSON value."""
        self.folder.mkdir(parents=True, exist_ok=True)  # `finish` in a process that did the same
        with open(self.folder / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


@contextmanager
def held(place: Path) -> Iterator[None]:
    """Hold a result while it is looked for and made: another process that wants it waits, and finds
    it. Of a job of several the first holds it for all.

    Raises:
        ValueError: in such a job, where another process holds it: the others cannot wait.
    """
    if parallel.rank() or place.exists():
        parallel.wait()  # so that all look for it when the first has it, or knows that it is there
        yield
        return
    busy = f"another process makes {place.name}: wait for it" if parallel.world() > 1 else ""
    with locked(place.parent, busy, _lock(place).name):
        parallel.wait()
        yield
        if place.exists():
            discard(place)


def _folder(place: Path) -> Path:
    return place.with_name(f"{place.name}.part")


def _lock(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def finish(place: Path, result: dict[str, Any]) -> None:
    """Store a result, once for all processes, before any of them looks for the next."""
    parallel.wait()  # nobody is still to ask whether it is there
    if parallel.rank() == 0:
        write_json(place, result)
        discard(place)
    parallel.wait()


def discard(place: Path) -> None:
    """Remove the pieces of a result, if there are any, and the lock, for which nobody asks again
    once the result is there."""
    shutil.rmtree(_folder(place), ignore_errors=True)
    if place.exists():
        _lock(place).unlink(missing_ok=True)
