"""A corpus larger than memory: its texts on disk, each read when it is asked for.

One pass over the files of the collection, whatever their format, writes in the cache

    texts.bin    id and text of each document, one after the other, UTF-8
    starts.npy   int64 (2 n + 1,): where each id and each text begins, and the end
    hashes.npy   uint64 (n,): 8 bytes of a hash of each id, ascending
    order.npy    int64 (n,): which document each of these hashes is of
    note.json    how many documents, and their digest

which are memory-mapped from then on. While it is written 24 bytes a document are in memory,
afterwards none: the system keeps the pages that are read, and takes them back when it needs them.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from tqdm import tqdm

from model.files import locked, write_array

FORMAT = 1
MODULUS = 2**256


class StoredIds(Sequence[str]):
    """The ids of a stored corpus in the order of its files."""

    def __init__(self, texts: "StoredTexts"):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        places = range(len(self))[at]
        if isinstance(places, int):
            return self._texts.id_at(places)
        return [self._texts.id_at(place) for place in places]


class StoredTexts(Mapping[str, str]):
    """document id -> text. `ids`: in the order of the files. `digest`: of the content, hex.

    Args:
        folder: what `stored` has written.
    """

    def __init__(self, folder: Path):
        note = json.loads((folder / "note.json").read_text())
        self.digest: str = note["digest"]
        self._count: int = note["count"]
        self._bytes = np.memmap(folder / "texts.bin", np.uint8, "r")
        self._starts, self._hashes, self._order = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("starts", "hashes", "order")
        )
        self.ids = StoredIds(self)

    def _read(self, piece: int) -> str:
        start, end = int(self._starts[piece]), int(self._starts[piece + 1])
        return self._bytes[start:end].tobytes().decode()

    def id_at(self, place: int) -> str:
        """The id of the document at a place in the order of the files."""
        return self._read(2 * place)

    def _place(self, key: object) -> int:
        """Where a document is, -1 if it is not there."""
        if not isinstance(key, str):
            return -1
        wanted = np.uint64(_hash(key))
        at = int(np.searchsorted(self._hashes, wanted))
        while at < self._count and self._hashes[at] == wanted:
            place = int(self._order[at])
            if self.id_at(place) == key:
                return place
            at += 1
        return -1

    def __contains__(self, key: object) -> bool:
        return self._place(key) >= 0

    def __getitem__(self, key: str) -> str:
        place = self._place(key)
        if place < 0:
            raise KeyError(key)
        return self._read(2 * place + 1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return self._count


def stored(
    files: Sequence[Path], documents: Iterable[tuple[str, str]], folder: Path
) -> StoredTexts:
    """The stored texts of some files, written by the first call.

    Args:
        files: what they come from; one that has changed in size or time is stored anew.
        documents: (id, text) of each, read only if they are not stored yet.
        folder: of all stored corpora. Of several processes one writes, the others wait for it.
    Raises:
        ValueError: there is no document, or an id occurs twice.
    """
    facts = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    name = hashlib.sha256(json.dumps([FORMAT, facts]).encode()).hexdigest()[:32]
    place = folder / name
    if not place.exists():
        with locked(folder, name=f".{name}.lock"):
            if not place.exists():  # another process may have stored it while this one waited
                part = folder / f".{name}.part"  # of this one, or of one that was killed
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                try:
                    _write(part, documents)
                    _check_unique(StoredTexts(part), files)
                    os.replace(part, place)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    return StoredTexts(place)


def _write(folder: Path, documents: Iterable[tuple[str, str]]) -> None:
    starts, hashes, digest = array("q", [0]), array("Q"), 0
    with open(folder / "texts.bin", "wb") as file:
        bar = tqdm(documents, desc="store texts", unit="document", leave=False)
        for key, text in bar:
            for piece in (key.encode(), text.encode()):
                file.write(piece)
                starts.append(starts[-1] + len(piece))
            hashes.append(_hash(key))
            # A sum, so that it does not depend on the order.
            one = hashlib.sha256(json.dumps([key, text]).encode()).digest()
            digest = (digest + int.from_bytes(one, "big")) % MODULUS
        file.flush()
        os.fsync(file.fileno())
    if not hashes:
        raise ValueError("the corpus has no document to store")
    values = np.frombuffer(hashes, np.uint64)
    order = np.argsort(values, kind="stable")
    for name, found in (("starts", np.frombuffer(starts, np.int64)), ("hashes", values[order]),
                        ("order", order)):  # fmt: skip
        write_array(folder / f"{name}.npy", found)
    note = {"count": len(hashes), "digest": f"{digest:064x}"}
    (folder / "note.json").write_text(json.dumps(note))


def _check_unique(texts: StoredTexts, files: Sequence[Path]) -> None:
    """Equal ids have equal hashes, which lie side by side."""
    for at in np.flatnonzero(texts._hashes[1:] == texts._hashes[:-1]):
        run = texts._hashes[at] == texts._hashes
        ids = [texts.id_at(int(place)) for place in texts._order[run]]
        if len(set(ids)) < len(ids):
            twice = next(key for key in ids if ids.count(key) > 1)
            names = ", ".join(map(str, files))
            raise ValueError(
                f"{names}: document id {twice!r} occurs a second time; expected unique ids"
            )


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
