"""What reports share: how they name seeds, and what they say was not run."""

import pytest

from analysis import page


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([1], "seed 1"),
        ([0, 1, 2], "seeds 0 to 2"),
        ([0, 2], "seeds 0 and 2"),
        ([0, 2, 5], "seeds 0, 2, 5"),
    ],
)
def test_seeds_have_names(numbers: list[int], words: str) -> None:
    assert page.seed_names(numbers) == words


def test_what_was_not_run_is_said_once() -> None:
    rows = {
        "full": {"seeds": [], "missing_seeds": [0, 1]},
        "task": {"seeds": [0], "missing_seeds": [1]},
        "uniform": {"seeds": [0], "missing_seeds": [1]},
        "sparsegen": {"seeds": [0, 1], "missing_seeds": []},
    }
    assert page.missing(rows) == [
        "Anything about what was not run: Full.",
        "Anything that needs seeds that were not run: seed 1 of Task, Uniform.",
    ]
    assert page.missing({"task": rows["sparsegen"]}) == []
