"""Files that are written whole or not at all, and read with a word on what is wrong with them."""

import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


@contextmanager
def whole(path: Path, mark: str = "") -> Iterator[BinaryIO]:
    """A file to write bytes into, which takes its name once all of it is on the disk.

    A write that fails leaves nothing behind; what a killed process leaves, the next one overwrites.

    Args:
        mark: part of the temporary name; tells apart processes that may write the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}{mark}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as problem:
        part.unlink(missing_ok=True)
        if isinstance(problem, OSError) and problem.filename is None:
            problem.filename = str(path)  # a write does not say of what
        raise
    os.replace(part, path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Put a folder's names on the disk: a rename outlives a loss of power only after this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put(part: Path, place: Path) -> None:
    """Give a folder its name once all of its files are on the disk."""
    for path in part.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    os.replace(part, place)
    sync(place.parent)


def put_over(part: Path, place: Path) -> None:
    """`put` in place of the folder that has the name, which waits aside meanwhile: a killed process
    leaves it as `.<name>.old`, and the next call removes that once the new one is in place."""
    old = place.with_name(f".{place.name}.old")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
    put(part, place)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(folder: Path, busy: str = "", name: str = ".lock") -> Iterator[None]:
    """Hold a folder's lock, which the system frees however the process ends.

    Args:
        busy: what another process does that holds it; "": wait for that one.
    Raises:
        ValueError: with `busy`, where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise ValueError(f"{folder}: {busy}") from None
        yield


def write_array(path: Path, array: np.ndarray, mark: str = "") -> None:
    """As numpy writes it, whole or not at all."""
    buffer = io.BytesIO()  # np.save into a file says nothing of why a write failed
    np.save(buffer, array, allow_pickle=False)
    with whole(path, mark) as file:
        file.write(buffer.getbuffer())


def write_text(path: Path, text: str, mark: str = "") -> None:
    """Whole or not at all: a temporary name, then renamed."""
    with whole(path, mark) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, content: dict, mark: str = "") -> None:
    """`write_text` of JSON; a NaN or infinity is an error."""
    write_text(path, json.dumps(content, allow_nan=False), mark)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        remedy: what to do about a file that is missing or damaged, the end of the error's message.
    Raises:
        ValueError: with the file's name, if it cannot be read or holds no JSON object.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): {remedy}") from error
    if not isinstance(found, dict):
        what = f"{path} holds a {type(found).__name__}, expected a JSON object"
        raise ValueError(f"{what}: {remedy}")
    return found
