"""The vectors of a corpus of any size: encoded window by window into shards on disk.

A folder holds manifest.json (what the vectors are of), and for each window of documents
00000.npy (float16 or float32, (documents, D)) beside 00000.ids.npy (their ids, UTF-8). Each file
is renamed when it is whole, the vectors last: a shard whose vectors are there is finished, and is
not encoded again. Of one that is not, the vectors are put on the disk `FLUSH` documents at a time,
and the next call goes on after them. In memory are one window's texts, token ids and vectors of
`FLUSH`, and 8 bytes for each document while the corpus is looked through.
"""

import hashlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap, write_array_header_1_0
from tqdm import tqdm

from eval.machine import trim_heap
from eval.sources import Sources, documents
from model.files import locked, read_json, sync, write_array, write_json
from model.heads import truncate
from model.unimoer import UniMoER

FORMAT = 1
DTYPES = ("float16", "float32")
MANIFEST = "manifest.json"
WINDOW = 10_000  # documents of a shard
FLUSH = 1_000  # documents that are encoded together; a killed call loses at most so many


def windows(sources: Sources, size: int) -> Iterator[tuple[list[str], list[str]]]:
    """(ids, texts) of `size` documents at a time, in the order of the corpus."""
    rows = documents(sources)
    while window := list(islice(rows, size)):
        yield [key for _, key, _ in window], [text for _, _, text in window]


def survey(sources: Sources) -> tuple[int, str]:
    """The number of documents, and a sha256 (hex) over their ids and texts in order.

    Every row is read, so what is wrong with one is found before anything is computed. Holds 8
    bytes a document: a hash of each id, by which duplicates are found.

    Raises:
        ValueError: a row that is no document, an id for the second time (both rows are named), a
            text that is not Unicode, or no document at all.
    """
    digest, hashes = hashlib.sha256(), bytearray()
    for where, key, text in documents(sources):
        name, content = key.encode(), text.encode()
        if b"\0" in name:
            raise ValueError(f"{where}: document id {key!r} holds a NUL; expected none")
        digest.update(b"%d %d " % (len(name), len(content)) + name + content)
        hashes += hashlib.blake2b(name, digest_size=8).digest()
    if not hashes:
        raise ValueError(f"{', '.join(map(str, sources.corpus))}: no document")
    found = np.frombuffer(hashes, np.uint64)
    found.sort()
    if (twice := found[1:][found[1:] == found[:-1]]).size:
        _name_duplicates(sources, set(twice.tolist()))
    return len(found), digest.hexdigest()


def _name_duplicates(sources: Sources, hashes: set[int]) -> None:
    """Raise ValueError for an id that occurs twice; two ids of one hash are none."""
    first: dict[str, str] = {}
    for where, key, _ in documents(sources):
        mark = hashlib.blake2b(key.encode(), digest_size=8).digest()
        if int.from_bytes(mark, sys.byteorder) not in hashes:
            continue
        if first.setdefault(key, where) != where:
            raise ValueError(
                f"{where}: document id {key!r} occurs a second time, after {first[key]}; expected "
                "unique ids"
            )


def encode(
    model: UniMoER,
    sources: Sources,
    folder: Path,
    *,
    revision: str,
    window: int = WINDOW,
    dtype: str = "float16",
    dimension: int = 0,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> "Vectors":
    """Encode the documents of a set into `folder`, but for the shards that are finished there.

    The same call goes on where a killed one stopped. Of several processes, each with its `rank`,
    the one with i % world == rank encodes shard i; they share nothing but the folder.

    Args:
        revision: of the model's checkpoint (`weights.revision`); part of the manifest.
        window: documents of a shard, whose texts are in memory.
        dtype: of the vectors on disk. Components of unit vectors lose at most 2^-11 of their size
            in float16 (below 6e-5: 3e-8).
        dimension: how many of their first components are kept, at unit length again (Matryoshka);
            0: all.
    Returns:
        what lies in the folder; `missing` names the shards that other ranks still have to encode.
    Raises:
        ValueError: a corpus that cannot be read (see `survey`), a folder with other vectors, a
            disk without room, another process of the same rank at work, or a vector that is not
            finite.
    """
    if dtype not in DTYPES or window < 1 or not 0 <= rank < world:
        raise ValueError(
            f"dtype={dtype!r}, window={window}, rank={rank} of {world}: expected a dtype of "
            f"{DTYPES}, a window of at least 1 and 0 <= rank < world"
        )
    width = model.decoder.config.hidden_size
    if not 0 <= dimension <= width:
        raise ValueError(f"dimension={dimension}: expected 1 to {width}, or 0 for all")
    mine = f"{rank}-of-{world}"
    busy = f"another process encodes rank {mine} of it: wait for it, or give each its own RANK"
    with locked(folder, busy, f".{mine}.lock"):
        count, mark = survey(sources)
        manifest = {
            "format": FORMAT, "revision": revision, "base": model.identity,
            "prompt": model.config.prompts.filled("document"),
            "document_tokens": model.config.document_tokens, "data": sources.name,
            "documents": count, "fingerprint": mark, "window": window, "dtype": dtype,
            "dimension": dimension or width,
        }  # fmt: skip
        _begin(folder, manifest, f".{mine}")
        stored = Vectors(folder)
        missing = stored.missing()
        _check_room(stored, missing)
        own = {shard for shard in missing if shard % world == rank}
        if own:
            bar = tqdm(total=sum(map(stored.size, own)), unit="document", disable=not progress)
            for shard, (ids, texts) in enumerate(windows(sources, window)):
                if shard in own:
                    _encode(model, stored, shard, ids, texts, f".{mine}", bar)
            bar.close()
    return stored


def _begin(folder: Path, manifest: dict, mark: str) -> None:
    """Write the manifest, or hold this one against the one that is there."""
    path = folder / MANIFEST
    if not path.exists():
        write_json(path, manifest, mark)
    found = read_manifest(folder)
    if other := [name for name in manifest if found.get(name) != manifest[name]]:
        told = "; ".join(f"{n}: {found.get(n)!r} there, {manifest[n]!r} now" for n in other)
        raise ValueError(
            f"{folder} holds other vectors ({told}): remove it, or encode elsewhere (--vectors or "
            "--out)"
        )


def read_manifest(folder: Path) -> dict:
    """Raises ValueError where there is none, or one of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path} is missing: encode the corpus first (make encode)")
    manifest = read_json(path, "give another folder")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}: encode again into another folder")
    return manifest


def _check_room(stored: "Vectors", missing: list[int]) -> None:
    """Raises ValueError where the disk cannot hold what all ranks still have to write."""
    width = stored.dimension * np.dtype(stored.dtype).itemsize
    parts = stored.folder.glob(".*.npy*.part")
    needed = sum(stored.size(shard) * width for shard in missing)
    needed = max(0, needed - sum(path.stat().st_size for path in parts))
    free = shutil.disk_usage(stored.folder).free
    if needed > free:
        raise ValueError(
            f"{stored.folder}: {needed / 1e9:,.2f} GB of vectors are still to be written, and the "
            f"disk has {free / 1e9:,.2f} GB free: make room, choose --dtype float16, or another "
            "folder. Finished shards are kept"
        )


def _encode(
    model: UniMoER, stored: "Vectors", shard: int, ids: list[str], texts: list[str], mark: str,
    bar: tqdm,
) -> None:  # fmt: skip
    """A shard: its ids, then its vectors, in a file that grows and takes its name when it is whole.

    How many of them an earlier call has put there is told by the file's size.
    """
    path, at_ids = stored.path(shard), stored.path(shard, "ids.npy")
    part = path.with_name(f".{path.name}{mark}.part")
    shape, kind, buffer = (len(ids), stored.dimension), np.dtype(stored.dtype), io.BytesIO()
    write_array_header_1_0(buffer, {"descr": kind.str, "fortran_order": False, "shape": shape})
    head, row = buffer.getvalue(), stored.dimension * kind.itemsize
    with _written(at_ids):
        write_array(at_ids, np.array([key.encode() for key in ids]), mark)
    done = 0
    with _written(path):
        if _begins_with(part, head):
            done = (part.stat().st_size - len(head)) // (row * FLUSH) * FLUSH
        else:
            _append(part, 0, head)
    bar.update(done)
    for start in range(done, len(ids), FLUSH):
        vectors = model.encode_document(texts[start : start + FLUSH], progress=False)
        vectors = truncate(vectors, stored.dimension).numpy()
        if not np.isfinite(vectors).all():
            bad = ids[start + int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])]
            raise ValueError(f"document {bad!r}: its vector is not finite")
        with _written(path):
            _append(part, len(head) + start * row, vectors.astype(kind).tobytes())
        trim_heap()
        bar.update(len(vectors))
    os.replace(part, path)
    sync(path.parent)
    for other in path.parent.glob(f".{path.name}.*.part"):  # of another number of processes
        other.unlink(missing_ok=True)


def _begins_with(path: Path, head: bytes) -> bool:
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return file.read(len(head)) == head


def _append(path: Path, end: int, content: bytes) -> None:
    """Put something on the disk behind the first `end` bytes of a file; what a killed call left
    there goes."""
    with open(path, "ab") as file:
        file.truncate(end)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Raises ValueError where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}): make room and start again, what is "
            "finished is kept"
        ) from error


class Vectors:
    """A folder of `encode`, read shard by shard.

    Attributes:
        documents, dimension, window, dtype: as the manifest says; shards: how many there are when
            all are finished.
    Raises:
        ValueError: no manifest, or one of another format.
    """

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, read_manifest(folder)
        self.documents: int = self.manifest["documents"]
        self.dimension: int = self.manifest["dimension"]
        self.window: int = self.manifest["window"]
        self.dtype: str = self.manifest["dtype"]
        self.shards = -(-self.documents // self.window)

    def path(self, shard: int, suffix: str = "npy") -> Path:
        return self.folder / f"{shard:05}.{suffix}"

    def size(self, shard: int) -> int:
        """How many documents a shard has: a window, or what is left of one."""
        return min(self.window, self.documents - shard * self.window)

    def missing(self) -> list[int]:
        """The shards that are not finished."""
        return [
            shard
            for shard in range(self.shards)
            if not (self.path(shard).exists() and self.path(shard, "ids.npy").exists())
        ]

    def require_all(self) -> None:
        """Raises ValueError where a shard is not finished."""
        if missing := self.missing():
            raise ValueError(
                f"{self.folder}: {len(missing)} of {self.shards} shards are missing, the first is "
                f"{self.path(missing[0]).name}: start `encode` again, it goes on where it stopped"
            )

    def shard(self, shard: int) -> np.ndarray:
        """(documents of the shard, D), memory-mapped, read-only.

        Raises:
            ValueError: the file is damaged.
        """
        shape = (self.size(shard), self.dimension)
        return self._open(self.path(shard), np.dtype(self.dtype).str, shape)

    def ids(self) -> np.ndarray:
        """(documents,) ids of all shards in order, as UTF-8 bytes; a NumPy array of S<longest>.

        Raises:
            ValueError: a file is damaged.
        """
        found = np.empty(self.documents, "S1")
        for shard in range(self.shards):  # one open at a time: there may be thousands
            part = self._open(self.path(shard, "ids.npy"), "|S", (self.size(shard),))
            if part.dtype.itemsize > found.dtype.itemsize:
                found = found.astype(part.dtype)
            found[shard * self.window :][: len(part)] = part
        return found

    def _open(self, path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            found = open_memmap(path, mode="r")
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): remove it and start `encode` again"
            ) from error
        if not found.dtype.str.startswith(dtype) or found.shape != shape:
            raise ValueError(
                f"{path} holds {found.dtype} of {found.shape}, expected {dtype} of {shape}: remove "
                "it and start `encode` again"
            )
        return found
