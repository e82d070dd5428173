"""BM25's index: memory, disk and time by the number of documents.

Documents of as many words as a passage of MS MARCO has, drawn after Zipf's law (exponent 1) from a
million words and made when they are asked for, so that what grows is the index and the ids alone.
Each size runs in a process of its own, since a peak of memory is a process's.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from eval.bm25 import BM25
from eval.machine import peak_bytes

COUNTS = (100_000, 300_000)
WORDS = 56  # of a document: the mean of MS MARCO's passages (arXiv 2104.08663, table 1)
VOCABULARY = 1_000_000


class Drawn(Sequence[str]):
    """`count` documents, each drawn from a seed of its own: nothing is kept."""

    def __init__(self, count: int):
        self.documents = count
        self._sum = np.cumsum(1 / np.arange(1, VOCABULARY + 1))

    def __len__(self) -> int:
        return self.documents

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self.documents))]
        if not 0 <= at < self.documents:
            raise IndexError(at)
        draws = np.random.default_rng(at).random(WORDS) * self._sum[-1]
        return " ".join(f"w{rank}" for rank in np.searchsorted(self._sum, draws))


def own_bytes() -> int:
    """Of this process alone, now: without the pages of files that it maps (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def made(count: int, folder: Path) -> dict[str, float]:
    """An index of so many documents, made and kept by this process."""
    texts, ids = Drawn(count), [str(i) for i in range(count)]
    BM25(ids[:100], texts[:100])  # what the first index loads is not the corpus's
    before, started = own_bytes(), time.perf_counter()
    BM25(ids, texts, folder=folder)
    seconds, peak = time.perf_counter() - started, peak_bytes("cpu")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    sizes = {"before_bytes": before, "peak_bytes": peak, "kept_bytes": size}
    return {"documents": count, "seconds": seconds, **sizes}


def mapped(count: int, folder: Path) -> dict[str, float]:
    """The same in a process that finds it kept: what is its own once it has searched."""
    texts, ids = Drawn(count), [str(i) for i in range(count)]
    BM25(ids[:100], texts[:100]).search({"q": texts[0]}, 10)
    before, started = own_bytes(), time.perf_counter()
    index = BM25(ids, texts, folder=folder)
    seconds = time.perf_counter() - started
    found = index.search({"q": texts[0]}, 10)["q"]
    assert len(found) == min(10, count), found
    return {"opened_seconds": seconds, "own_bytes": own_bytes() - before}


def run(counts: tuple[int, ...] = COUNTS) -> list[dict]:
    """One row for each count: seconds; bytes before, at the peak, of the files that are kept, and
    of a process that maps them.

    Raises:
        ValueError: a process ended with an error.
    """
    rows = []
    for count in counts:
        row = {}
        with tempfile.TemporaryDirectory() as folder:
            for part in (made, mapped):
                words = [sys.executable, "-m", "bench.index", part.__name__, str(count), folder]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
                if done.returncode:
                    raise ValueError(f"indexing {count} documents ended with an error, see above")
                row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
    return rows


def growth(rows: list[dict], key: str) -> float:
    """Bytes that one more document takes: between the smallest and the largest corpus."""
    first, last = rows[0], rows[-1]
    return (last[key] - first[key]) / (last["documents"] - first["documents"])


if __name__ == "__main__":
    part = {"made": made, "mapped": mapped}[sys.argv[1]]
    print(json.dumps(part(int(sys.argv[2]), Path(sys.argv[3]))))
