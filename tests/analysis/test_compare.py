"""The comparison of arms: what was planted is found, and nothing else."""

import json
import re
from pathlib import Path

import pytest

from analysis import compare
from eval import inference
from tests.analysis.made import Maker

SAME = {"embedding": 0.6, "reranking": 0.5}
ARMS = ("task", "task-shared", "similarity-mean", "uniform")


@pytest.fixture
def made(tmp_path: Path) -> Maker:
    """The reference, specialists, and no other arm yet."""
    maker = Maker(tmp_path / "soft_vs_hard" / "smoke")
    maker.baselines()
    maker.arm("emb-only", {"embedding": 0.65})
    maker.arm("rank-only", {"reranking": 0.55})
    maker.arm("sparsegen", SAME)
    return maker


def differences(found: dict) -> dict[tuple[str, str], dict]:
    return {(row["arm"], row["task"]): row for row in found["differences"]}


def test_a_planted_difference_is_found_and_no_other(made: Maker) -> None:
    for arm in ARMS:
        made.arm(arm, {**SAME, "reranking": 0.47} if arm == "task" else SAME)
    found = compare.write(made.folder)
    rows = differences(found)
    assert rows.keys() == {(arm, task) for arm in ARMS for task in SAME}
    sure = {at for at, row in rows.items() if row["p_holm"] <= inference.ALPHA}
    assert sure == {("task", "reranking")}
    planted = rows["task", "reranking"]
    assert planted["difference"] == pytest.approx(-3, abs=0.5)
    low, high = planted["interval"]
    assert low < -3 + 0.5 and high < 0 and len(planted["by_seed"]) == 3
    assert planted["detectable"] < 3 and planted["p_holm"] > planted["p"]
    text = (made.folder / "report.md").read_text()
    assert "On reranking, Task is" in text and "below Sparsegen" in text
    assert "With these: Sparsegen; without: " in text and "without: Task, Task-Shared," in text
    assert "The other 7 differences to Sparsegen are not significant (detectable: " in text
    assert json.loads((made.folder / "comparison.json").read_text()) == found
    assert (made.folder / "differences.png").exists() and (made.folder / "differences.svg").exists()


def test_arms_of_one_start_are_paired_by_seed(tmp_path: Path) -> None:
    """What seeds differ in is in both, so a small difference is found that is else in the noise."""
    found = []
    for experiment, arm, other in (
        ("gradient_conflict", "pcgrad", "joint-single"), ("remedies", "pcgrad", "joint-moe")
    ):  # fmt: skip
        made = Maker(tmp_path / experiment / "smoke")
        made.baselines()
        for seed, shift in enumerate((-0.04, 0.0, 0.04)):
            for name, more in ((other, 0.0), (arm, 0.01)):
                means = {task: mean + shift + more for task, mean in SAME.items()}
                made.arm(name, means, seeds=1)
                path = made.folder / name / "seed0.json"
                trial = json.loads(path.read_text()) | {"seed": seed}
                trial["config"]["seed"] = seed
                path.unlink()
                (made.folder / name / f"seed{seed}.part").write_text(json.dumps(trial))
        for path in made.folder.glob("*/seed?.part"):
            path.rename(path.with_suffix(".json"))
        found.append(compare.compare(made.folder, *compare.disk.load(made.folder)))
    paired, apart = (differences(f)["pcgrad", "embedding"] for f in found)
    assert paired["paired"] and not apart["paired"]
    assert paired["difference"] == pytest.approx(1, abs=0.2)
    assert paired["interval"][0] > 0 > apart["interval"][0]
    assert paired["detectable"] < apart["detectable"] / 3
    text = compare.differences_table(found[0])
    assert ", paired | " in text and "Paired: by seed, where both see the same batches" in text
    assert "aired" not in compare.differences_table(found[1])


def test_under_the_null_at_most_a_few_comparisons_are_sure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holm over 8 comparisons: over 60 made-up studies any false one is rare."""
    monkeypatch.setattr(inference, "smallest_detectable_effect", lambda *of: 1.0)  # slow, not read
    false = 0
    for seed in range(60):
        maker = Maker(tmp_path / f"{seed}" / "soft_vs_hard" / "smoke", seed=seed)
        maker.baselines()
        for arm in ("sparsegen", *ARMS):
            maker.arm(arm, SAME)
        baselines, arms = compare.disk.load(maker.folder)
        rows = compare.compare(maker.folder, baselines, arms)["differences"]
        false += any(row["p_holm"] <= inference.ALPHA for row in rows)
    # 5 % of 60 is 3; P(more than 8) is under 1 % even if the rate were 7 %
    assert false <= 8


def test_what_one_arm_scores_at_a_seed_that_the_other_lacks_is_no_difference(made: Maker) -> None:
    made.arm("task", SAME, seeds=2)
    made.arm("uniform", SAME)  # with all three
    before = differences(compare.compare(made.folder, *compare.disk.load(made.folder)))
    path = made.folder / "sparsegen" / "seed2.json"
    trial = json.loads(path.read_text())
    for rows in trial["scores"].values():
        for row in rows.values():
            row["ndcg_cut_10"] += 0.2
    path.write_text(json.dumps(trial))
    after = differences(compare.compare(made.folder, *compare.disk.load(made.folder)))
    same = ("difference", "interval", "p", "by_seed")
    for task in ("embedding", "reranking"):
        one, other = before["task", task], after["task", task]
        assert [one[k] for k in same] == [other[k] for k in same]
        assert before["uniform", task]["difference"] != after["uniform", task]["difference"]


def test_missing_arms_and_seeds_are_shown_as_missing(made: Maker) -> None:
    made.arm("task", SAME, seeds=2)
    found = compare.write(made.folder)
    assert found["arms"]["task"]["missing_seeds"] == [2]
    assert found["arms"]["uniform"]["seeds"] == []
    text = (made.folder / "report.md").read_text()
    assert "| Uniform |" not in text
    assert "- Anything about what was not run: " in text and ", Uniform." in text
    assert "- Anything that needs seeds that were not run: seed 2 of Task." in text


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "soft_vs_hard" / "smoke")
    maker.baselines()
    for arm in ("sparsegen", "task"):
        maker.arm(arm, SAME, seeds=1)
    found = compare.write(maker.folder)
    assert all(row["p"] is None and "p_holm" not in row for row in found["differences"])
    text = (maker.folder / "report.md").read_text()
    assert "No difference can be tested: that takes two seeds" in text
    assert "; one seed each, so no interval and no test" in text and "Holm: p" not in text
    assert "The highest mean on retrieval is that of" in text


def test_collapse_is_counted(made: Maker) -> None:
    curve = [{"step": 5, "alarm": "collapse: shared carry no weight"}]
    made.arm("sparsegen", SAME, curve=curve)
    found = compare.write(made.folder)
    assert found["arms"]["sparsegen"]["collapsed"] == 1
    # What learns no routing cannot lose an expert; no alarm watches it.
    assert found["arms"]["uniform"]["collapsed"] is None
    assert found["arms"]["emb-only"]["collapsed"] is None


def test_no_trial_is_an_error(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "soft_vs_hard" / "smoke")
    maker.baselines()
    with pytest.raises(ValueError, match="no trial yet"):
        compare.write(maker.folder)


def test_contrasts_are_held_against_each_other(tmp_path: Path) -> None:
    """Of the planned pairs those that exist are tested, as one family; arms may score one task."""
    maker = Maker(tmp_path / "transfer" / "smoke")
    maker.baselines()
    maker.arm("rank-only", {"reranking": 0.55})
    maker.arm("rerank-beside-embedding", {"reranking": 0.58})
    maker.arm("rerank-beside-nothing", {"reranking": 0.55})
    maker.arm("head-on-base", {"embedding": 0.3, "reranking": 0.4})
    maker.arm("head-on-reranking", {"embedding": 0.3, "reranking": 0.55})
    found = compare.write(maker.folder)
    pairs = {(r["arm"], r["against"], r["task"]): r for r in found["differences"]}
    assert pairs.keys() == {
        ("rerank-beside-embedding", "rerank-beside-nothing", "reranking"),
        ("head-on-reranking", "head-on-base", "embedding"),
        ("head-on-reranking", "rank-only", "reranking"),
    }
    sure = [at for at, row in pairs.items() if row["p_holm"] <= inference.ALPHA]
    assert sure == [("rerank-beside-embedding", "rerank-beside-nothing", "reranking")]
    assert pairs[sure[0]]["difference"] == pytest.approx(3, abs=0.5)
    text = (maker.folder / "report.md").read_text()
    assert "## Contrasts" in text and "over all 3 differences" in text
    assert "what a trained, frozen embedding expert adds" in text
    assert re.search(r"- Anything about what was not run: .*\bFull, ", text)


def test_an_arm_without_a_step_is_compared(made: Maker) -> None:
    made.arm("uniform", SAME, curve=[])
    found = compare.write(made.folder)
    assert found["arms"]["uniform"]["routing"] == {}
