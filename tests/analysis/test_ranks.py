"""The smallest rank that is enough: planted qualities."""

from pathlib import Path

import numpy as np
import pytest

import experiments
from analysis import compare, ranks
from tests.analysis.made import Maker


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """All ranks, in trials of the smoke scale."""
    monkeypatch.delitem(experiments.EXPERIMENTS["rank_sweep"].by_scale, "smoke")
    maker = Maker(tmp_path / "rank_sweep" / "smoke")
    maker.baselines()
    return maker


def rows(found: dict) -> dict[tuple[str, str], dict]:
    return {(row["ladder"], row["task"]): row for row in found["ladders"]}


def test_the_smallest_rank_within_one_percent(made: Maker) -> None:
    """r1 loses 10 %, r4 half a percent, r32 is the best by a hair; tiny spread: shown."""
    made.noise = 0.0005
    sizes = {1: 0.54, 4: 0.598, 16: 0.600, 32: 0.601}
    for rank, mean in sizes.items():
        parameters = 1000 * rank
        made.arm(f"all-r{rank}", {"embedding": mean, "reranking": 0.5},
                 trainable_parameters=parameters)  # fmt: skip
    found = ranks.write(made.folder)
    row = rows(found)["all", "embedding"]
    assert (row["rank"], row["best_rank"], row["bytes"]) == (4, 32, 16_000)
    assert row["loss"] == pytest.approx(0.5, abs=0.2) and row["shown"]
    assert rows(found)["all", "reranking"]["rank"] == 1
    text = (made.folder / "report.md").read_text()
    assert "On retrieval, r4 for all experts is within 1 % of the best (r32)." in text
    assert (made.folder / "ranks.png").exists()


def test_with_a_large_spread_the_means_alone_say_so(made: Maker) -> None:
    """And nothing is said to be shown where the smallest that is near is itself the best."""
    made.noise = 0.05
    for rank, mean in {1: 0.6, 16: 0.602, 32: 0.5}.items():
        made.arm(f"all-r{rank}", {"embedding": mean, "reranking": mean - 0.3 * (rank == 1)})
    found = rows(ranks.write(made.folder))
    row = found["all", "embedding"]
    assert row["shown"] is (None if row["rank"] == row["best_rank"] else False)
    text = (made.folder / "report.md").read_text()
    row = found["all", "reranking"]
    assert (row["rank"], row["best_rank"], row["shown"]) == (16, 16, None)
    told = "On reranking, r16 for all experts is the best, and no smaller rank is within 1 % of it"
    assert told in text


def test_bars_are_the_intervals_of_the_differences(made: Maker) -> None:
    """Around the arm they reach as far as the interval does from the difference, and hold the other
    arm's mean where it holds 0; none where the means are of other seeds."""
    made.noise = 0.02
    for rank, seeds in ((1, 3), (4, 3), (16, 3), (32, 2)):
        made.arm(f"all-r{rank}", {"embedding": 0.5 + 0.02 * (rank == 1), "reranking": 0.5}, seeds)
    v = ranks.write(made.folder)
    found = compare.bars(v, "all-r16")
    assert {arm for arm, _ in found} == {"all-r1", "all-r4"}
    for row in v["differences"]:
        if row["arm"] != "all-r32":
            low, high = found[row["arm"], row["task"]]
            assert [row["difference"] + low, row["difference"] + high] == row["interval"]
            of = [100 * v["arms"][a]["scores"][row["task"]]["ndcg_cut_10"]
                  for a in (row["arm"], "all-r16")]  # fmt: skip
            holds_other = of[0] + low <= of[1] <= of[0] + high
            assert holds_other == (row["interval"][0] <= 0 <= row["interval"][1])


def test_each_expert_s_ladder_passes_through_the_common_rank(made: Maker) -> None:
    for arm in ("all-r16", "shared-r4", "shared-r32"):
        made.arm(arm, {"embedding": 0.6, "reranking": 0.5})
    found = ranks.write(made.folder)
    assert {row["ladder"] for row in found["ladders"]} == {"shared"}
    assert [ranks.rank_of(a, "shared") for a in ("all-r16", "shared-r4", "all-r4", "x-r4")] == [
        16, 4, None, None]  # fmt: skip


def test_one_cluster_gives_no_interval_and_shows_nothing() -> None:
    y = {"all-r1": np.full((2, 5), 0.598), "all-r16": np.full((2, 5), 0.6)}
    found = ranks.enough(y, {"all-r1": 1, "all-r16": 16}, ["one"] * 5)
    ranks.settle([found])
    assert (found["rank"], found["interval"], found["shown"]) == (1, None, False)
    assert found["loss"] == pytest.approx(100 * 0.002 / 0.6)


def test_what_is_shown_survives_the_correction_over_all_ladders() -> None:
    """A p of 0.03 by itself is no more than a p of 0.12 among four."""

    def row(rank: int, excluded: dict[int, float]) -> dict:
        return {"rank": rank, "best_rank": 16, "excluded": excluded}

    alone, two = row(4, {4: 0.03}), row(4, {1: 0.9, 4: 0.001})
    ranks.settle([alone])
    assert alone["shown"] is True
    ranks.settle([alone, two, row(16, {8: 0.5})])
    assert (alone["shown"], two["shown"]) == (False, True)


def test_one_rank_is_no_ladder(made: Maker) -> None:
    made.arm("all-r16", {"embedding": 0.6, "reranking": 0.5})
    assert "ladders" not in ranks.write(made.folder)
