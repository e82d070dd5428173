"""model/token_lists.py: the lists that went in, and none of them in memory."""

import tracemalloc
from collections.abc import Iterator

import pytest

from model.prefix import TextSet
from model.token_lists import TokenLists

ROWS = [[1, 2, 3], [], [2**31 - 1], [7] * 50]


def test_what_goes_in_comes_out() -> None:
    found = TokenLists(row for row in ROWS)
    assert list(found) == ROWS and len(found) == 4 and found.lengths == [3, 0, 1, 50]
    assert (found[0], found[-1], found[1:3]) == (ROWS[0], ROWS[3], ROWS[1:3])
    assert all(type(token) is int for row in found for token in row)
    for outside in (4, -5):
        with pytest.raises(IndexError):
            found[outside]
    assert list(TokenLists([])) == [] and list(TokenLists([[], []])) == [[], []]
    with pytest.raises(OverflowError):
        TokenLists([[2**31]])


def test_a_set_of_texts_keeps_them_where_they_are() -> None:
    found = TokenLists(ROWS[::2])
    texts, plain = TextSet(found), TextSet(ROWS[::2])
    assert texts.ids is found and texts.lengths == plain.lengths
    for depth in (0.0, 1.0):
        assert texts.batches(2, depth) == plain.batches(2, depth)


def test_memory_does_not_hold_them() -> None:
    """20 MB of tokens, which lists would take 180 MB for; 8 bytes for each text."""
    count, length = 50_000, 100

    def rows() -> Iterator[list[int]]:
        for i in range(count):
            yield [1000 + i + k for k in range(length)]

    tracemalloc.start()
    found = TokenLists(rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
    assert found[count - 1][-1] == 1000 + count - 1 + length - 1
