"""The mean interference over collections: against the formula and each collection's own."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from analysis import across
from eval import stats
from tests.analysis.made import Maker

PAIR = ("emb-only", "joint-single")


def part(queries: int, seed: int, loss: float, level: float = 0.5) -> across.Part:
    """Three seeds of both arms; Joint-Single scores 1 - loss of the specialist."""
    rng = np.random.default_rng(seed)
    hard = level * (0.5 + rng.random(queries))
    y = {
        arm: hard * share + level * 0.05 * rng.standard_normal((3, queries))
        for arm, share in zip(PAIR, (1.0, 1 - loss), strict=True)
    }
    return y, [f"c{i // 2}" for i in range(queries)]


def mean(parts: Sequence[across.Part]) -> stats.Estimate:
    """Of collections that weigh the same."""
    return across.mean_interference(parts, *PAIR, [1 / len(parts)] * len(parts))


def test_of_one_collection_it_is_its_own_interference() -> None:
    y, labels = part(40, 0, 0.1)
    own, found = stats.interference(y, labels, *PAIR), mean([(y, labels)])
    for name in ("value", "se", "df", "low", "high", "p"):
        assert getattr(found, name) == pytest.approx(getattr(own, name), rel=1e-9)


def test_every_collection_weighs_the_same() -> None:
    """Against the module's formula, query by query; the queries' labels are of their collection."""
    parts = [part(20, 1, 0.1), part(400, 2, -0.05)]
    found = mean(parts)
    each = [stats.interference(y, labels, *PAIR) for y, labels in parts]
    assert found.value == pytest.approx((each[0].value + each[1].value) / 2, rel=1e-12)
    # Without seeds that differ what is left is the variance over queries, of each by itself.
    still = [({a: np.repeat(s.mean(0)[None], 3, 0) for a, s in y.items()}, of) for y, of in parts]
    alone = [stats.interference(y, labels, *PAIR) for y, labels in still]
    assert mean(still).se == pytest.approx(math.hypot(*(e.se for e in alone)) / 2, rel=1e-9)
    # The small one's variance is nearly all of it, and so are its few clusters.
    assert alone[0].se > 3 * alone[1].se and alone[0].df == 9
    assert 9 <= mean(still).df < 12


def test_seeds_move_an_arm_on_all_collections_at_once() -> None:
    """What a seed adds on one collection and takes on the other is no variance of the mean."""
    rng = np.random.default_rng(5)
    level = np.array([[-0.02], [0.0], [0.02]])
    parts = []
    for sign in (1, -1):
        y = {arm: np.full((3, 40), 0.5) + 1e-4 * rng.standard_normal(40) for arm in PAIR}
        y[PAIR[1]] = y[PAIR[1]] + sign * level
        parts.append((y, [f"c{i}" for i in range(40)]))
    against, alike = mean(parts), mean([parts[0], parts[0]])
    assert against.se < 0.01 * alike.se
    assert alike.se == pytest.approx(100 * 0.02 / 0.5 / math.sqrt(3), rel=0.01)


def test_a_collection_of_one_cluster_leaves_no_interval(tmp_path: Path) -> None:
    (y, labels), one = part(40, 1, 0.1), part(40, 2, 0.1)
    found = mean([(y, labels), (one[0], ["same"] * 40)])
    assert found.interval is None and 5 < found.value < 15


def test_the_forums_are_one_collection() -> None:
    names = ["scifact", "cqadupstack-android", "mteb-cqadupstacktexretrieval", "cqadupstack-gis"]
    counts = across.weights(names)
    assert counts == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    parts = [part(40, 10 + i, loss) for i, loss in enumerate((0.1, -0.05, 0.2, 0.05))]
    found = across.mean_interference(parts, *PAIR, counts)
    each = [stats.interference(y, labels, *PAIR) for y, labels in parts]
    assert found.value == pytest.approx(each[0].value / 2 + sum(e.value for e in each[1:]) / 6)
    # A collection that counts nothing leaves the others' estimate as it is.
    alone, without = mean(parts[:1]), across.mean_interference(parts[:2], *PAIR, [1.0, 0.0])
    assert without.value == pytest.approx(alone.value, rel=1e-12)
    assert without.se == pytest.approx(alone.se, rel=1e-12)


def test_how_hard_a_collection_is_adds_nothing() -> None:
    one, (y, labels) = part(60, 3, 0.1), part(60, 4, 0.1)
    easy = mean([one, (y, labels)])
    hard = mean([one, ({a: s / 8 for a, s in y.items()}, labels)])
    assert (hard.value, hard.se) == pytest.approx((easy.value, easy.se), rel=1e-9)


def folders(tmp_path: Path, losses: list[tuple[float, float]], seeds: int = 3) -> list[Path]:
    """A setting for each collection, of which Joint-Single loses such shares on both tasks."""
    made = []
    for at, (embedding, reranking) in enumerate(losses):
        folder = tmp_path / "kill_gate" / f"smoke-on-set{at}"
        maker, data = Maker(folder, seed=at), {"name": f"set{at}", "fingerprint": str(at)}
        maker.baselines(data=data)
        maker.arm("emb-only", {"embedding": 0.6}, seeds, data=data)
        maker.arm("rank-only", {"reranking": 0.6}, seeds, data=data)
        both = {"embedding": 0.6 * (1 - embedding), "reranking": 0.6 * (1 - reranking)}
        maker.arm("joint-single", both, seeds, data=data)
        made.append(folder)
    return made


@pytest.mark.parametrize(
    ("losses", "decision"),
    [
        ([(0.0, 0.1), (0.0, 0.02)], "proceed"),  # 6 % in the mean
        ([(0.0, 0.1), (0.0, -0.1)], "pivot"),
        ([(0.0, 0.05), (0.0, -0.02)], "more_seeds"),  # 1.5 %
    ],
)
def test_the_rule_is_applied_to_the_mean(tmp_path: Path, losses, decision: str) -> None:
    places = folders(tmp_path, losses)
    found = across.judge(places)
    assert found["decision"] == decision and found["seeds"] == [0, 1, 2]
    for task in across.TASKS:
        each = [row[task]["interference"] for row in found["collections"].values()]
        assert found["tasks"][task]["interference"] == pytest.approx(sum(each) / 2)
    wanted = [100 * sum(pair[t] for pair in losses) / 2 for t in (0, 1)]
    values = [found["tasks"][task]["interference"] for task in across.TASKS]
    assert values == pytest.approx(wanted, abs=0.4)
    said = across.write(tmp_path, places, {"robust04": "it is gated"})
    assert "| set0 | " in said and "| **mean of 2** | " in said and f"**{decision}**" in said
    assert (tmp_path / "across.md").read_text() in said
    assert "Left out: robust04: it is gated." in said


def test_what_training_gains_too_little_is_not_measurable(tmp_path: Path) -> None:
    places = folders(tmp_path, [(0.0, 0.0), (0.0, 0.0)])
    for at, folder in enumerate(places):
        data = {"name": f"set{at}", "fingerprint": str(at)}
        Maker(folder, seed=at).baselines(score=0.57, data=data)
    found = across.judge(places)
    assert found["decision"] == "inconclusive"
    assert not any(task["measurable"] for task in found["tasks"].values())


def test_one_seed_supports_nothing(tmp_path: Path) -> None:
    found = across.judge(folders(tmp_path, [(0.1, 0.1), (0.1, 0.1)], seeds=1))
    assert (found["decision"], found["supported"]) == ("proceed", False)
    assert found["tasks"]["embedding"]["interval"] is None
    assert "(no interval)" in across.markdown("smoke", found)
    found["names"] = {name: f"cqadupstack-{i}" for i, name in enumerate(found["names"])}
    said = across.markdown("smoke", found)
    assert "on 1 other collections" in said and "**mean of 1**" in said


def test_an_arm_that_one_collection_lacks(tmp_path: Path) -> None:
    places = folders(tmp_path, [(0.0, 0.0), (0.0, 0.0)])
    for path in (places[1] / "rank-only").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="smoke-on-set0, smoke-on-set1: no seed of emb-only, ran"):
        across.judge(places)


def test_a_specialist_that_scores_nothing_is_named() -> None:
    y = {"emb-only": np.zeros((3, 8)), "joint-single": np.full((3, 8), 0.1)}
    with pytest.raises(ValueError, match="'emb-only' is 0.0; a relative loss needs"):
        mean([(y, [f"c{i}" for i in range(8)])])
