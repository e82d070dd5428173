"""The records side by side: which there are, and what is said to be sure."""

import json
from pathlib import Path
from typing import Any

import pytest

from analysis import forest


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    def task(p_holm: float | None, interval: list[float] | None) -> dict[str, Any]:
        return {"interference": 3.0, "interval": interval, "measurable": True, "p_holm": p_holm}

    def gate(name: str, data: str, **more: Any) -> None:
        tasks = {"embedding": task(0.03, [1.0, 5.0]), "reranking": task(0.01, [1.0, 5.0])}
        verdict = {"data": {"name": data}, "base": {"name": "/b/tiny"}, "seeds": 3, "alpha": 0.02}
        _write(tmp_path / "kill_gate" / name / "verdict.json", verdict | {"tasks": tasks} | more)

    ways = {"embedding": {"ways": {"paired": {"interval": [2.0, 4.0]}}}}
    gate("small", "one", sensitivity=ways)
    gate("small-two", "two", tasks={"embedding": task(None, None)})  # one seed
    gate("smoke", "else")
    size = {"size": "8l", "task": "reranking", "layers": 8, "rank": 16, "name": "tiny", "seeds": 3}
    rows = [size | task(0.04, [1.0, 5.0]), {"size": "12l", "task": "reranking", "missing": True}]
    _write(
        tmp_path / "scale_study" / "small" / "scale.json", {"rows": rows, "data": {"name": "one"}}
    )
    return tmp_path


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))


def test_entries(runs: Path) -> None:
    found = forest.entries(runs, "small")
    assert list(found) == ["one, 3 seeds", "one, 8 layers, 3 seeds"]
    one, size = found.values()
    # At its own record's level: .02 there, .05 of the scale study.
    assert [one[t]["sure"] for t in ("embedding", "reranking")] == [False, True]
    assert size["reranking"]["sure"] and "embedding" not in size
    assert one["embedding"]["paired"] == [2.0, 4.0] and one["reranking"]["paired"] is None


def test_two_records_of_one_name_both_stand(runs: Path) -> None:
    first = (runs / "kill_gate" / "small" / "verdict.json").read_text()
    _write(runs / "kill_gate" / "small-on-one" / "verdict.json", json.loads(first))
    found = forest.entries(runs, "small")
    assert list(found)[:2] == ["one, 3 seeds", "one, 3 seeds (small-on-one)"]


def test_several_bases_are_named(runs: Path) -> None:
    path = runs / "scale_study" / "small" / "scale.json"
    path.write_text(path.read_text().replace('"tiny"', '"large"'))
    names = list(forest.entries(runs, "small"))
    assert names == ["tiny, one, 3 seeds", "large, one, 8 layers, 3 seeds"]


def test_the_picture_has_a_row_a_record(runs: Path) -> None:
    figure = forest.draw(forest.entries(runs, "small"))
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == list(
        forest.entries(runs, "small")
    )
    assert len(left.lines) == 3 + 1 and len(right.lines) == 4 + 1  # intervals, points, paired; 0
