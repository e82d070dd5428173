"""The routers' report: arms without noise against Sparsegen without it."""

from pathlib import Path

from analysis import routers
from eval.inference import ALPHA
from tests.analysis.made import Maker

SAME = {"embedding": 0.6, "reranking": 0.5}


def test_plain_arms_are_held_against_plain_sparsegen(tmp_path: Path) -> None:
    """What the reference loses by its noise is no gain of the others: nothing but what is planted
    above the plain one is found there, and arms with noise are no part of it."""
    made = Maker(tmp_path / "soft_vs_hard" / "smoke")
    made.baselines()
    for arm, scores in {
        "emb-only": {"embedding": 0.65}, "rank-only": {"reranking": 0.55},
        "sparsegen": {**SAME, "reranking": 0.46}, "softmax": {**SAME, "reranking": 0.46},
        "sparsegen-plain": SAME, "uniform": SAME, "task": {**SAME, "reranking": 0.54},
    }.items():  # fmt: skip
        made.arm(arm, scores)
    found = routers.write(made.folder)
    rows = {(row["arm"], row["task"]): row for row in found["to_plain"]}
    assert rows.keys() == {(arm, task) for arm in ("task", "uniform") for task in SAME}
    assert {row["against"] for row in rows.values()} == {"sparsegen-plain"}
    assert {at for at, row in rows.items() if row["p_holm"] <= ALPHA} == {("task", "reranking")}
    first = {(row["arm"], row["task"]): row for row in found["differences"]}
    assert first["uniform", "reranking"]["p_holm"] <= ALPHA  # against the one with noise
    text = (made.folder / "report.md").read_text()
    assert "## Differences to Sparsegen-Plain" in text
    assert "Held against Sparsegen-Plain: Task +" in text
    assert "nothing else is significant" in text


def test_without_it_the_report_is_that_of_the_comparison(tmp_path: Path) -> None:
    made = Maker(tmp_path / "soft_vs_hard" / "smoke")
    made.baselines()
    for arm in ("sparsegen", "uniform"):
        made.arm(arm, SAME)
    assert "to_plain" not in routers.write(made.folder)
    assert "Plain" not in (made.folder / "report.md").read_text()
