"""The pilot's rule, what it is held against, and what its report says."""

import json
from pathlib import Path
from typing import Any

import pytest

import experiments
import scales
from analysis import pilot

SCORES = {  # setting -> (score, tokens of training) by arm; all untrained bases have .10
    "as-is": {"emb-only": (0.40, 300), "rank-only": (0.30, 600)},
    "4-layers": {"emb-only": (0.50, 400), "rank-only": (0.15, 500)},  # one task does not learn
    "160-steps": {"emb-only": (0.60, 600), "rank-only": (0.50, 1200)},  # too much
    "32-tokens": {"emb-only": (0.21, 100), "rank-only": (0.20, 300)},  # at the limit
    "bce": {"rank-only": (0.45, 750)},  # retrieval as it is
}
FACTS: dict[str, Any] = {
    **{"base": {"name": "tiny"}, "data": {"name": "toy"}, "device": "cpu", "sources": "s"},
    **{"git": {"commit": "c" * 40, "dirty": False}, "versions": {}, "peak_bytes": 1},
}


def rows(value: float) -> dict[str, dict[str, float]]:
    return {"q": {"ndcg_cut_10": value - 0.1}, "r": {"ndcg_cut_10": value + 0.1}}


def put(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**FACTS, **content}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pilot" / "small"
    names = {"baselines.json"}
    for setting, arms in SCORES.items():
        for arm, (score, tokens) in arms.items():
            name = f"{arm}-{setting}"
            task = {"emb-only": "embedding", "rank-only": "reranking"}[arm]
            losses = [*[4.0] * 2, *[2.0] * 16, *[1.0] * 2]
            config = experiments.config("pilot", name, "small", 0).to_json()
            put(place / name / "seed0.json", {
                "arm": name,
                "config": config,
                "layers": config["layers"],
                "scores": {task: rows(score)},
                "curve": [{f"loss_{task}": loss, "tokens": tokens} for loss in losses],
                "seconds": {"prepare": 30.0, "train": tokens / 10, "test": 5.0},
            })  # fmt: skip
            names.add(experiments.baselines_name(experiments.size_of("pilot", name, "small")))
    for name in names:
        both = {task: rows(0.10) for task in ("embedding", "reranking")}
        put(place / name, {
            "config": experiments.plain("pilot", "small").to_json(), "seconds": {"test": 1.0},
            "untrained": both, "bm25": {task: rows(0.33) for task in both},
        })  # fmt: skip
    assert {"baselines-4l.json", "baselines-document_tokens-32.json"} < names
    return place


def test_the_rule(folder: Path):
    found = pilot.write(folder)
    assert json.loads((folder / "pilot.json").read_text()) == found
    taken = {name: row["taken"] for name, row in found["rows"].items()}
    assert taken == {
        "as-is": True, "4-layers": False, "160-steps": False, "32-tokens": True, "bce": True,
    }  # fmt: skip
    work = {name: row["work"] for name, row in found["rows"].items()}
    assert work["as-is"] == 1 and work["bce"] == pytest.approx((300 + 750) / 900)
    assert work["160-steps"] == pytest.approx(2)
    # 4 layers, forward and backward; as it is, 12 more that nine trials share.
    assert work["4-layers"] == pytest.approx(8 / (12 / 9 + 8))
    assert found["rows"]["4-layers"]["time"] == 1
    row = found["rows"]["32-tokens"]["tasks"]["embedding"]
    assert (row["untrained"], row["score"], row["gain"]) == pytest.approx((0.10, 0.21, 0.11))
    assert row["losses"] == [4.0, 2.0, 1.0]
    said = pilot.summary(found)
    assert "The setting stays: training gains 30.0 on retrieval and 20.0 on reranking" in said
    assert "Could be taken as well: bce, 32-tokens." in said
    assert "Take too much work: 160-steps (2.0 times)." in said
    assert "Gain too little: 4-layers (reranking)." in said
    assert "missing: emb-only-8-layers" in said


def test_a_setting_that_cannot_be_taken_gives_way_to_the_cheapest_that_can(folder: Path):
    path = folder / "emb-only-as-is" / "seed0.json"
    trial = json.loads(path.read_text())
    path.write_text(json.dumps(trial | {"scores": {"embedding": rows(0.19)}}))
    found = pilot.write(folder)
    assert found["rows"]["as-is"]["taken"] is found["rows"]["bce"]["taken"] is False
    assert pilot.reading(found).endswith(
        "the cheapest that can: 32-tokens. Take too much work: 160-steps (2.0 times). "
        "Gain too little: 4-layers (reranking)."
    )
    path.unlink()
    found = pilot.write(folder)
    assert all(row["time"] is row["work"] is row["taken"] is None for row in found["rows"].values())
    assert "so nothing is settled" in pilot.reading(found)


def test_a_row_without_one_of_its_specialists_is_not_judged(folder: Path):
    """What a change touches does not count as it is; what it leaves alone does."""
    (folder / "emb-only-32-tokens" / "seed0.json").unlink()
    found = pilot.write(folder)
    assert found["rows"]["32-tokens"]["taken"] is found["rows"]["32-tokens"]["work"] is None
    assert found["rows"]["bce"]["taken"]
    assert "32-tokens" not in pilot.reading(found)


def test_the_report(folder: Path):
    pilot.write(folder)
    text = (folder / "report.md").read_text()
    both = "10.00 | 40.00 | 30.00 | 10.00 | 30.00 | 20.00"
    assert f"| as-is | nothing | {both} | 1.00 | 1.00 | **yes** |" in text
    one = "- | - | - | 10.00 | 45.00 | 35.00"
    assert f"| bce | reranking_loss bce | {one} | 1.17 | 1.17 | **yes** |" in text
    assert "| 4-layers | 4.00 | 2.00 | 1.00 | 4.00 | 2.00 | 1.00 |" in text
    assert "Missing: emb-only-8-layers, rank-only-8-layers" in text
    assert "BM25 has 33.00 on retrieval and 33.00 on reranking" in text
    assert {"pilot.png", "pilot.svg"} <= {path.name for path in folder.iterdir()}


def test_states_that_are_not_kept_are_shared_with_no_trial(folder: Path):
    for path in folder.glob("*-4-layers/seed0.json"):
        trial = json.loads(path.read_text())
        trial["config"] |= {"layers": 4, "adapter_layers": 3, "prefix": False}
        path.write_text(json.dumps(trial))
    work = pilot.write(folder)["rows"]["4-layers"]["work"]
    assert work == pytest.approx((3 + 2) / (12 / 9 + 8))


def test_a_trial_that_does_not_say_what_it_took(folder: Path):
    path = folder / "rank-only-bce" / "seed0.json"
    trial = json.loads(path.read_text())
    del trial["curve"][0]["tokens"]
    path.write_text(json.dumps(trial))
    with pytest.raises(ValueError, match="rank-only-bce was trained before tokens were counted"):
        pilot.write(folder)


def test_without_a_trial(folder: Path):
    for path in folder.glob("*/seed0.json"):
        path.unlink()
    with pytest.raises(ValueError, match="has no trial yet"):
        pilot.write(folder)


def test_a_change_is_one_thing_and_the_rest_is_the_kill_gate():
    """Each arm differs from the kill gate's in its change alone, and in the split."""
    for name in experiments.arms("pilot"):
        arm, change = name.split("-only-")
        made = experiments.config("pilot", name, "small", 0).to_json()
        twin = experiments.config("kill_gate", f"{arm}-only", "small", 0).to_json()
        differ = {key: value for key, value in made.items() if twin[key] != value}
        assert differ == {"split": "dev", **scales.PILOT[change]}
    sizes = [experiments.size_of("pilot", name, "small") for name in experiments.arms("pilot")]
    distinct = {str(size) for size in sizes}
    assert len({experiments.baselines_name(size) for size in sizes}) == len(distinct)
    names = [name for name in experiments.arms("pilot") if name.startswith("rank-only-")]
    assert [name.removeprefix("rank-only-") for name in names] == list(scales.PILOT)
