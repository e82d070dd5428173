"""Token ids of more texts than memory should hold."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class TokenLists(Sequence[list[int]]):
    """Token ids of many texts, each a list when it is asked for.

    They lie in a file without a name in TMPDIR, 4 bytes each, of which the page cache holds what is
    in use; a list of Python's takes 36 for each, and all of the time.

    Args:
        rows: the ids of each text; taken one after the other, so they may come from a generator.
    Raises:
        OSError: the disk is full.
    """

    def __init__(self, rows: Iterable[Sequence[int]]):
        self.lengths: list[int] = []
        with tempfile.TemporaryFile(prefix="unimoer-tokens-") as file:
            for row in rows:
                self.lengths.append(len(row))
                file.write(np.asarray(row, np.int32).tobytes())
            file.flush()
            # The pages outlive the file's name and handle.
            self._flat = np.memmap(file, np.int32, "r") if any(self.lengths) else np.empty(0)
        self._ends = np.cumsum([0, *self.lengths])

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, at: int) -> list[int]: ...

    @overload
    def __getitem__(self, at: slice) -> list[list[int]]: ...

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]  # counts from the end, and raises IndexError
        return self._flat[self._ends[at] : self._ends[at + 1]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[i] for i in range(len(self)))
