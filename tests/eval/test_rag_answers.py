"""eval/rag.py: gold answers, of a folder and of published sets."""

from pathlib import Path

import pytest

from eval import hub, rag
from tests.eval import published
from tests.eval.published import asked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "answers.json cannot be read .*give gold answers"),
        ("{", "answers.json cannot be read as JSON"),
        ("[]", "holds a list"),
        ('{"q0": []}', "query 'q0' has \\[\\], expected a list of answers"),
        ('{"q1": ["a"]}', "query 'q0' has None"),
    ],
)
def test_answers_that_cannot_be_read(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "answers.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        rag.read_answers(tmp_path, ["q0"])


def test_answers_of_nq_are_found_by_the_question(hub_files) -> None:
    """Three questions, of which NQ-open has two, one of them twice, spelt a little otherwise."""
    files, calls = hub_files
    published.beir(files, "nq", 0)
    queries = asked("nq")
    first = queries["q0"]
    published.nq_answers(files, {
        f"The {first.rstrip('.').upper()}?": ["one", "One"], first: ["two", "one"],
        queries["q2"]: ["three"], "what is asked by nobody": ["four"],
    })  # fmt: skip
    gold, of = rag.published_answers("nq", "test", queries, None)
    assert gold == {"q0": ["one", "One", "two"], "q2": ["three"]}
    commit = hub.ANSWERS["nq"].commit
    assert of == {
        "google-research-datasets/nq_open": commit,
        "questions without an answer": "1",
    }
    assert calls[-1][2] == commit


def test_answers_of_hotpotqa_are_found_by_id(hub_files) -> None:
    published.beir(hub_files[0], "hotpotqa", 1)
    published.hotpotqa_answers(hub_files[0], {"q2": "yes", "q1": "Animorphs", "other": "no"})
    gold, of = rag.published_answers("hotpotqa", "test", asked("hotpotqa"), None)
    assert gold == {"q1": ["Animorphs"], "q2": ["yes"]}
    assert of["hotpotqa/hotpot_qa"] == hub.ANSWERS["hotpotqa"].commit


def test_answers_of_triviaqa_stand_beside_its_questions(hub_files) -> None:
    published.triviaqa(hub_files[0])
    gold, of = rag.published_answers("triviaqa", "dev", asked("triviaqa"), None)
    assert gold == {str(i): [f"Answer {i}", f"answer {i}, the other"] for i in range(2)}
    assert of["Tevatron/wikipedia-trivia"] == "commit-of-wikipedia-trivia"


@pytest.mark.parametrize(
    ("answers", "split", "message"),
    [
        ({"q0": "yes"}, "dev", "hotpotqa has answers to its test questions alone .*split 'dev'"),
        ({"q9": "yes"}, "test", "none of the 3 test questions of hotpotqa .* such as 'q0'"),
        ({"q0": 3}, "test", "parquet: row 1: found 'answer': 3, expected 'answer' with a list"),
        (None, "test", "hotpotqa/hotpot_qa: neither in the cache nor to be had"),
    ],
)
def test_published_answers_that_cannot_be_had(hub_files, answers, split, message) -> None:
    published.beir(hub_files[0], "hotpotqa", 1)
    if answers is not None:
        published.hotpotqa_answers(hub_files[0], answers)
    with pytest.raises(ValueError, match=message):
        rag.published_answers("hotpotqa", split, asked("hotpotqa"), None)
