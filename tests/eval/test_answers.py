"""Answers against gold ones, by hand and by the rules of each benchmark's script."""

import pytest

from eval.answers import exact_match, f1, squad, triviaqa


@pytest.mark.parametrize(
    ("text", "normal", "trivia"),
    [
        ("The  Eiffel Tower!", "eiffel tower", "eiffel tower"),
        ("U.S.A.", "usa", "u s"),  # with the dots as spaces an article appears
        ("an_apple-pie", "anapplepie", "apple pie"),
        ("\u2018Hamlet\u2019", "\u2018hamlet\u2019", "hamlet"),
        ("Theatre", "theatre", "theatre"),
        ("...", "", ""),
    ],
)
def test_normalisation(text: str, normal: str, trivia: str) -> None:
    assert (squad(text), triviaqa(text)) == (normal, trivia)


def test_the_best_gold_answer_counts() -> None:
    gold = ["Mason Alan Dinehart", "Dinehart"]
    assert exact_match("the dinehart.", gold, squad) == 1
    assert exact_match("Alan", gold, squad) == 0
    assert f1("Mason Dinehart", gold, squad) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert f1("nobody", gold, squad) == 0 and f1("x", [], squad) == 0


def test_words_count_as_often_as_they_occur() -> None:
    assert f1("new new york", ["new york york"], squad) == pytest.approx(2 / 3)


def test_hotpotqa_s_closed_answers() -> None:
    assert f1("yes it is", ["yes"], squad) == 0.5
    assert f1("yes", ["yes it is"], squad, closed=True) == 0
    assert f1("yes", ["Yes."], squad, closed=True) == 1


def test_empty_answers() -> None:
    assert f1("the", ["a"], squad) == 1 and f1("", ["x"], squad) == 0
    assert exact_match("", ["the"], squad) == 1
