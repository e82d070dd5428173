"""Groups of collections: what is in them, and which tables they make."""

from pathlib import Path

from eval import benchmarks
from eval import hub as H
from eval.benchmarks import tables


def test_groups_as_collections(tmp_path: Path) -> None:
    """For what takes one collection after the other: gated sets only where they lie, and of a group
    none that was trained on."""
    (tmp_path / "bioasq").mkdir()
    found, absent = benchmarks.each(["scifact", "all"], tmp_path, ["fiqa", "nq-train"])
    assert found[0] == "scifact" and len(found) == len(set(found)) == 17 + 12 - 4
    assert "bioasq" in found and "cqadupstack/tex" in found and "cqadupstack" not in found
    assert set(absent) == {"signal1m", "trec-news", "robust04", "fiqa"}
    assert "keeps it off the hub" in absent["robust04"] and "trained on it" in absent["fiqa"]
    assert benchmarks.each(["bright", "nowhere"], tmp_path, [])[0][-1] == "nowhere"
    # One that is named is asked for: that it is missing is said when it is loaded.
    assert benchmarks.each(["robust04", "fiqa"], tmp_path, ["fiqa"]) == (["robust04", "fiqa"], {})


def test_the_groups_are_tables_of_their_own() -> None:
    made = tables(["scifact", "bright", "miracl/sw", "all", "bright"])
    assert [table.title for table in made] == ["collections", "bright", "beir"]
    assert made[0].rows == {"scifact": ("scifact",), "miracl/sw": ("miracl/sw",)}
    assert made[1].rows["bright/pony"] == ("bright/pony",)
    assert made[2].rows["cqadupstack"] == H.GROUPS["cqadupstack"]
    assert made[2].rows["bioasq"] == ("bioasq",) and len(made[2].rows) == 18
    assert tables(["cqadupstack"])[0].rows["cqadupstack/tex"] == ("cqadupstack/tex",)
