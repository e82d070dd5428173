"""What a verdict hangs on, on scores whose answer is known."""

import numpy as np
import pytest

from analysis import sensitivity
from analysis.sensitivity import null
from eval import stats

LABELS = [f"c{at // 2}" for at in range(12)]
HARD = np.linspace(0.1, 0.9, 12)
SHARED = np.array([[-0.05], [0.0], [0.05]])  # what a seed does to every arm


def found(joint: np.ndarray, metrics: tuple[str, ...] = (), **more) -> dict:
    arms = {"emb-only": HARD + SHARED, "joint-single": joint}
    y = {"ndcg_cut_10": arms, **{m: {a: 0.5 * x for a, x in arms.items()} for m in metrics}}
    references = {"bm25": HARD - 0.1} | more.pop("references", {})
    pair = ("emb-only", "joint-single")
    return sensitivity.sensitivity(y, LABELS, pair, "emb-only-aa", references, **more)


def test_what_seeds_share_is_no_spread_of_a_paired_difference() -> None:
    row = found(0.98 * (HARD + SHARED), ("map",))
    paired = row["ways"]["paired"]
    assert row["correlation"] == pytest.approx(1)
    assert paired["value"] == pytest.approx(2) and paired["interval"] == pytest.approx([2, 2])
    arms = {"emb-only": HARD + SHARED, "joint-single": 0.98 * (HARD + SHARED)}
    apart = stats.interference(arms, LABELS, "emb-only", "joint-single")
    assert apart.low < 0 < apart.high
    # A metric that is half of the other loses the same share, by the verdict's own test.
    assert row["ways"]["map"]["interval"] == pytest.approx(apart.interval)


def test_queries_are_counted_by_the_sign_of_their_mean_difference() -> None:
    change = np.array([-0.1] * 3 + [0.1] + [0.0] * 8)
    ceiling = np.array([1.0] * 5 + [0.0] * 7)
    row = found(HARD + SHARED + change, references={"ceiling": ceiling})
    assert (row["lost"], row["gained"], row["same"], row["reachable"]) == (3, 1, 8, 5)
    assert found(HARD + SHARED)["reachable"] is None


def test_arms_stand_beside_bm25() -> None:
    row = found(HARD + SHARED - 0.1)["above_bm25"]
    assert row["emb-only"]["value"] == pytest.approx(10)
    assert row["joint-single"]["value"] == pytest.approx(0, abs=1e-9)


def test_a_constant_arm_has_no_correlation() -> None:
    assert found(np.repeat(HARD[None], 3, 0))["correlation"] is None


def test_null_by_hand() -> None:
    """Two runs at 0.5 and two at 0.4, seeds alone: of the three ways to pair them one has a
    difference, 20 % seen from 0.5 and 25 % from 0.4; within a group nothing varies."""
    runs = np.repeat(np.array([0.5, 0.5, 0.4, 0.4])[:, None], 12, axis=1)
    made = null(runs, LABELS)
    assert made is not None
    assert (made["runs"], made["groups"], made["splits"]) == (4, [2, 2], 3)
    assert made["proceed"] == pytest.approx(1 / 6) and made["told"] == pytest.approx(1 / 3)
    assert made["largest"] == pytest.approx(25)
    assert null(runs[:3], LABELS) is None


def test_of_many_splits_some_are_drawn() -> None:
    runs = np.random.default_rng(1).normal(0.5, 0.01, (14, 12))
    made = null(runs, LABELS)
    assert made is not None and made["splits"] == sensitivity.MOST  # of 1,716
    assert made == null(runs, LABELS)


def test_null_is_calibrated() -> None:
    """Runs that differ by their seeds alone are told apart in about 5 % of the splits."""
    rng, told = np.random.default_rng(3), []
    for _ in range(40):
        hard = rng.normal(0.5, 0.1, 60)
        runs = hard + rng.normal(0, 0.01, (6, 1)) + rng.normal(0, 0.05, (6, 60))
        made = null(runs, [f"q{at}" for at in range(60)])
        assert made is not None
        told.append(made["told"])
    assert 0.02 <= np.mean(told) <= 0.09


def test_markdown_says_where_there_is_nothing() -> None:
    assert "takes two seeds" in sensitivity.markdown({"sensitivity": {}, "tasks": {}})
