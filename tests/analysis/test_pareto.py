"""The front of the remedies and what is said of routing: planted cases."""

import re
from pathlib import Path

import pytest

from analysis import pareto
from tests.analysis.made import Maker

SPECIALISTS = {"emb-only": {"embedding": 0.65}, "rank-only": {"reranking": 0.55}}


def plant(folder: Path, arms: dict[str, dict[str, float]]) -> tuple[dict, str]:
    maker = Maker(folder / "remedies" / "smoke")
    maker.baselines()
    for arm, means in {**SPECIALISTS, **arms}.items():
        kept = {"shared": 0.75} if arm.startswith("ties") else {}
        maker.arm(arm, means, merged_energy=kept)
    found = pareto.write(maker.folder)
    return found, (maker.folder / "report.md").read_text()


def test_dominated() -> None:
    by = pareto.dominated({"a": (0.5, 0.5), "b": (0.6, 0.5), "c": (0.4, 0.7), "d": (0.5, 0.5)})
    assert by == {"a": ["b"], "b": [], "c": [], "d": ["b"]}


def test_a_remedy_that_is_better_is_said_to_be(tmp_path: Path) -> None:
    found, text = plant(tmp_path, {
        "joint-single": {"embedding": 0.55, "reranking": 0.45},
        "joint-moe": {"embedding": 0.60, "reranking": 0.50},
        "pcgrad": {"embedding": 0.63, "reranking": 0.51},
        "ties-20": {"embedding": 0.40, "reranking": 0.53},
    })  # fmt: skip
    assert set(found["front"]) == {"pcgrad", "ties-20"}
    assert "is below: on retrieval PCGrad; on reranking PCGrad, Ties-20." in text
    assert "is above: on retrieval Ties-20." in text
    above = r"On retrieval, PCGrad is [78]\.\d+ points above Joint-Single \(.*\): against sharing"
    assert re.search(above, text)
    assert "Routing beats no remedy significantly on both tasks." in text
    assert "| 75.0 % |" in text and (tmp_path / "remedies/smoke/pareto.svg").exists()


def test_routing_that_beats_all_and_routing_that_beats_none(tmp_path: Path) -> None:
    weak = {"embedding": 0.50, "reranking": 0.40}
    strong = {"embedding": 0.60, "reranking": 0.50}
    _, text = plant(tmp_path / "a", {"joint-moe": strong, "pcgrad": weak, "weight-25": weak})
    assert "It beats every remedy that was run (2) on both tasks." in text
    _, text = plant(tmp_path / "b", {"joint-moe": weak, "pcgrad": weak, "weight-25": weak})
    assert "Routing beats no remedy significantly on both tasks." in text


@pytest.mark.parametrize("arms", [{}, {"pcgrad": {"embedding": 0.6, "reranking": 0.5}}])
def test_what_is_missing_is_not_judged(arms: dict, tmp_path: Path) -> None:
    found, text = plant(tmp_path, arms)
    assert "Routing" not in found["more"] and "There is nothing to compare yet." in text
