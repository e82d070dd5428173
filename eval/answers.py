"""Exact match and F1 of answers, with the normalisation of each benchmark's own script."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
CLOSED = ("yes", "no", "noanswer")  # of HotpotQA: right or wrong, nothing between


def squad(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces (SQuAD; NQ-open, HotpotQA)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", text).split())


def triviaqa(text: str) -> str:
    """TriviaQA's: underscores and punctuation become spaces, and more of it is punctuation."""
    gone = set(string.punctuation + "\u2018\u2019\u00b4`")
    text = "".join(" " if c in gone else c for c in text.replace("_", " ").lower())
    return " ".join(ARTICLES.sub(" ", text).split())


NORMALISERS: dict[str, Callable[[str], str]] = {
    "nq": squad, "hotpotqa": squad, "triviaqa": triviaqa,
}  # fmt: skip


def exact_match(answer: str, gold: Sequence[str], normalise: Callable[[str], str]) -> float:
    """1 if the answer is one of the gold ones after normalisation."""
    return float(normalise(answer) in {normalise(text) for text in gold})


def f1(
    answer: str, gold: Sequence[str], normalise: Callable[[str], str], closed: bool = False
) -> float:
    """The best F1 of the answer's words against a gold answer's.

    closed: HotpotQA's rule, by which yes, no and noanswer match whole or not at all.
    """
    return max((_f1(normalise(answer), normalise(text), closed) for text in gold), default=0.0)


def _f1(answer: str, gold: str, closed: bool) -> float:
    if closed and answer != gold and (answer in CLOSED or gold in CLOSED):
        return 0.0
    said, asked = answer.split(), gold.split()
    if not said or not asked:
        return float(said == asked)
    same = sum((Counter(said) & Counter(asked)).values())
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(asked)
    return 2 * precision * recall / (precision + recall)
