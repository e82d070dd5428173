"""The rule on MTEB's tasks for the embedding side, with scores that were made up."""

from pathlib import Path

import numpy as np
import pytest

from analysis import leaderboard
from eval import inference, rule
from tests.analysis.made import Maker

LEVELS = np.linspace(0.4, 0.9, 12)  # how hard each task is


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A kill gate whose joint arm loses nothing on reranking."""
    maker = Maker(tmp_path / "kill_gate" / "smoke")
    maker.baselines()
    maker.arm("emb-only", {"embedding": 0.5})
    maker.arm("rank-only", {"reranking": 0.5})
    for arm in ("joint-single", "joint-moe"):
        maker.arm(arm, {"embedding": 0.5, "reranking": 0.5})
    return maker.folder


def scores(**shares: float) -> leaderboard.Scores:
    """Three seeds of each arm (its name with _ for -), at a share of each task's level."""
    rng = np.random.default_rng(0)
    made: leaderboard.Scores = {"base": {0: {f"t{i}": 0.5 * v for i, v in enumerate(LEVELS)}}}
    for arm, share in shares.items():
        made[arm.replace("_", "-")] = {
            seed: {f"t{i}": share * v + rng.normal(0, 0.002) for i, v in enumerate(LEVELS)}
            for seed in range(3)
        }
    return made


def test_a_planted_loss_is_found(folder: Path) -> None:
    found = leaderboard.decide(folder, scores(emb_only=1.0, joint_single=0.9, joint_moe=0.95))
    row = found["tasks"]["embedding"]
    assert row["interference"] == pytest.approx(10, abs=0.5) and row["measurable"]
    assert row["interval"][0] <= 10 <= row["interval"][1] and row["interval"][0] > 5
    assert (found["decision"], found["supported"]) == ("proceed", True)
    gained = found["differences"]["joint-moe"]
    assert gained["difference"] == pytest.approx(5 * LEVELS.mean(), abs=0.3)
    page = leaderboard.markdown("smoke", found)
    assert "| task | untrained | Emb-Only | Joint-Single | Joint-MoE | I |" in page
    assert page.count("\n| t") == 13 and "| **mean of 12** | 32.50 |" in page
    assert "Reranking on `smoke`: I " in page and "**proceed**" in page


def test_no_loss_on_either_side_is_a_pivot(folder: Path) -> None:
    found = leaderboard.decide(folder, scores(emb_only=1.0, joint_single=1.0))
    assert found["decision"] == "pivot" and abs(found["tasks"]["embedding"]["interference"]) < 1


def test_a_specialist_that_has_learnt_nothing_proves_nothing(folder: Path) -> None:
    found = leaderboard.decide(folder, scores(emb_only=0.55, joint_single=0.54))
    assert not found["tasks"]["embedding"]["measurable"] and found["decision"] == "inconclusive"


def test_compared_are_the_seeds_of_both_sides(folder: Path) -> None:
    """A fourth seed of the embedding side alone is in neither the table nor the decision."""
    made = scores(emb_only=1.0, joint_single=0.9, joint_moe=0.9)
    expected = leaderboard.decide(folder, made)
    for arm in ("emb-only", "joint-single", "joint-moe"):
        made[arm][3] = dict.fromkeys(made[arm][0], 0.0)
    found = leaderboard.decide(folder, made)
    assert found == expected and found["seeds"] == [0, 1, 2]
    alpha = rule.alpha_at_look(3)
    row = found["tasks"]["embedding"]
    assert (found["alpha"], row["detectable_alpha"]) == (alpha, alpha / 2)
    assert row["smallest_detectable_effect"] == inference.smallest_detectable_effect(
        row["se"], row["df"], alpha / 2
    )
    other = {arm: {s + 5: rows[s] for s in rows if s < 3} for arm, rows in made.items()}
    with pytest.raises(ValueError, match="no seed of emb-only, joint-single is on both sides"):
        leaderboard.decide(folder, {**other, "base": made["base"]})


def test_both_arms_have_to_be_there(folder: Path) -> None:
    with pytest.raises(ValueError, match="no trained model of joint-single was measured on MTEB"):
        leaderboard.decide(folder, scores(emb_only=1.0))
    for path in (folder / "rank-only").glob("*.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no trial of rank-only"):
        leaderboard.decide(folder, scores(emb_only=1.0, joint_single=1.0))
