"""The sweep's choice follows its rule, and the report says what was tried."""

import json
from pathlib import Path

import pytest

import experiments
from analysis import sweep

RATES = {
    **{(0.0003, 1.0): 0.30, (0.001, 1.0): 0.50, (0.003, 1.0): 0.40, (0.01, 1.0): 0.10},
    (0.001, 0.1): 0.50,
}


def trial(name: str, scores: dict[str, float]) -> dict:
    config = experiments.config("sweep", name, "small", 0).to_json()
    return {
        **{"base": {"name": "tiny"}, "data": {"name": "toy"}, "device": "cpu", "config": config},
        "git": {"commit": "c" * 40, "dirty": False},
        **{"sources": "s" * 8, "versions": {"torch": "2.13.0"}, "peak_bytes": 10**9},
        "seconds": {"train": 1.0},
        "curve": [{"gradient_norm": norm} for norm in (1.0, 2.0, 9.0)],
        "scores": {
            t: {"q": {"ndcg_cut_10": v}, "r": {"ndcg_cut_10": v}} for t, v in scores.items()
        },
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All trials but those of rank-only; joint arms do best at 0.003 if both tasks count."""
    place = tmp_path / "sweep" / "small"
    for name in experiments.arms("sweep"):
        config = experiments.config("sweep", name, "small", 0)
        value = RATES[config.learning_rate, config.clip]
        scores = dict.fromkeys(config.tasks, value)
        if len(scores) == 2 and config.learning_rate == 0.003:
            scores["reranking"] = 0.7
        if not name.startswith("rank-only"):
            path = place / name / "seed0.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(trial(name, scores)))
    base = trial("joint-single-lr0.001-clip1", {"embedding": 0.1, "reranking": 0.1})
    base |= {"untrained": base["scores"], "bm25": base["scores"]}
    base["ceiling"] = {"reranking": {"q": {"ndcg_cut_10": 0.8}, "r": {"ndcg_cut_10": 0.8}}}
    (place / "baselines.json").write_text(json.dumps(base))
    return place


def test_the_rule(folder):
    choice = sweep.write(folder)
    # The tie of the two clippings goes to the tighter; a joint arm is judged by its mean.
    assert choice["chosen"] == {
        "emb-only": {"learning_rate": 0.001, "clip": 0.1},
        "joint-single": {"learning_rate": 0.003, "clip": 1.0},
        "joint-moe": {"learning_rate": 0.003, "clip": 1.0},
    }
    assert len(choice["missing"]) == len(RATES) and all(
        "rank-only" in name for name in choice["missing"]
    )
    assert json.loads((folder / "choice.json").read_text()) == choice
    row = choice["rows"]["joint-moe"][2]
    assert row["scores"] == {"embedding": 0.4, "reranking": 0.7}
    assert (row["mean"], row["gradient_norm"]) == (pytest.approx(0.55), 2.0)


def test_the_report(folder):
    choice = sweep.write(folder)
    text = (folder / "report.md").read_text()
    assert "| 0.001 | 0.1 | 50.00 | **50.00** | 2.00 |" in text  # emb-only: one task and the mean
    assert "| 0.003 | 1 | 40.00 | 70.00 | **55.00** | 2.00 |" in text
    assert "| BM25 | - | 10.00 | - | - |" in text  # emb-only's table
    assert "| ceiling of the BM25 candidates | - | - | 80.00 | - | - |" in text
    assert "dev split (2 queries for retrieval, 2 queries for reranking)" in text
    assert "Missing: rank-only-lr0.0003-clip1" in text and "**Rank-Only**" not in text
    literal = text.split("```python\n")[1].split("```")[0]
    assert eval("{" + literal + "}") == {"small": choice["chosen"]}
    said = sweep.summary(choice)
    assert "Emb-Only 0.001 and 0.1; Joint-Single 0.003 and 1" in said and "\nmissing: " in said


def test_an_arm_that_is_not_swept(folder):
    (folder / "emb-only-lr0.001-clip1").rename(folder / "older-arm")
    with pytest.raises(ValueError, match="older-arm is of no arm of the sweep"):
        sweep.write(folder)


def test_without_a_trial(folder):
    for path in folder.glob("*/seed0.json"):
        path.unlink()
    with pytest.raises(ValueError, match="has no trial yet"):
        sweep.write(folder)
