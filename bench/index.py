"""BM25's index: memory and time by the number of documents.

Documents of as many words as a passage of MS MARCO has, drawn after Zipf's law (exponent 1) from a
million words and made when they are asked for, so that what grows is the index and the ids alone.
Each size runs in a process of its own, since a peak of memory is a process's.
"""

import json
import resource
import subprocess
import sys
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


def resident_bytes() -> int:
    """Of this process, now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def one(count: int) -> dict[str, float]:
    """What is measured of one index, in this process."""
    texts, ids = Drawn(count), [str(i) for i in range(count)]
    BM25(ids[:100], texts[:100])  # what the first index loads is not the corpus's
    before, started = resident_bytes(), time.perf_counter()
    index = BM25(ids, texts)
    seconds, made, peak = time.perf_counter() - started, resident_bytes(), peak_bytes("cpu")
    size = {"before_bytes": before, "peak_bytes": peak, "made_bytes": made}
    return {"documents": len(index.ids), "seconds": seconds, **size}


def run(counts: tuple[int, ...] = COUNTS) -> list[dict]:
    """One row for each count: seconds, and bytes before, at the peak and once the index is made.

    Raises:
        ValueError: a process ended with an error.
    """
    rows = []
    for count in counts:
        words = [sys.executable, "-m", "bench.index", str(count)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ValueError(f"indexing {count} documents ended with an error, see above")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def growth(rows: list[dict], key: str) -> float:
    """Bytes that one more document takes: between the smallest and the largest corpus."""
    first, last = rows[0], rows[-1]
    return (last[key] - first[key]) / (last["documents"] - first["documents"])


if __name__ == "__main__":
    print(json.dumps(one(int(sys.argv[1]))))
