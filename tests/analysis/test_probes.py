"""What the report of the probes says: claims over seeds, experts by their roles, controls."""

import pytest

from analysis import probes, roles
from analysis.page import over_seeds
from eval import inference
from tests.analysis.made import Make, write_json


def probed(seeds: list[int], views: dict[str, tuple[list[list[float]], list[float]]]) -> dict:
    """As `probes.summarise` gives it: view -> (by layer, the scores of BM25's ingredients by seed;
    relevance's by seed, in one layer)."""

    def rows(by_layer: list[list[float]]) -> dict:
        return {"layers": [{"score": over_seeds(values)} for values in by_layer]}

    return {"at": seeds, "views": {
        view: {**{name: rows(own) for name in probes.INGREDIENTS}, "relevant": rows([relevant])}
        for view, (own, relevant) in views.items()
    }}  # fmt: skip


def test_what_probes_claim_is_tested_over_seeds() -> None:
    """By seed, the base at the arm's depth alone, and an arm without a seed in common left out."""
    base = ([[0.9, 0.9], [0.3, 0.3], [0.4, 0.4]], [0.6, 0.6])  # its best layer is none of the arm's
    found = probes.claims({
        "rank-only": probed([0, 1], {
            "model": ([[0.5, 0.6], [0.1, 0.1]], [0.7, 0.8]), "base": base}),
        "joint-moe": probed([1, 0], {
            "model": ([[0.4, 0.5], [0.2, 0.2]], [0.6, 0.7]), "base": base,
            "embedding's own alone": ([[0.2, 0.4], [0.1, 0.1]], [0.6, 0.6]),
            "reranking's own alone": ([[0.5, 0.5], [0.1, 0.1]], [0.6, 0.6]),
            "the other alone": ([[0.5, 0.5], [0.1, 0.1]], [0.6, 0.6])}),
        "late": probed([7], {"model": ([[0.4], [0.2]], [0.6]), "base": ([[0.3], [0.3]], [0.6])}),
    })  # fmt: skip
    seeds = {(row["arm"], row["what"]): row["difference"]["seeds"] for row in found}
    held = "BM25 and its ingredients"
    assert seeds["rank-only", f"{held}, against the base"] == pytest.approx([0.1, 0.2])
    assert seeds["rank-only", "relevance, against the base"] == pytest.approx([0.1, 0.2])
    # Its first seed is 1, where Rank-Only has 0.6 and 0.8.
    assert seeds["joint-moe", f"{held}, against Rank-Only"] == pytest.approx([-0.2, 0.0])
    assert seeds["joint-moe", "relevance, against Rank-Only"] == pytest.approx([-0.2, 0.0])
    expert = f"{held}, expert: reranking's own alone against"
    assert seeds["joint-moe", f"{expert} embedding's own alone"] == pytest.approx([0.3, 0.1])
    assert seeds["joint-moe", f"{expert} the other alone"] == pytest.approx([0.0, 0.0])
    assert ("late", f"{held}, against Rank-Only") not in seeds and len(seeds) == 10
    tested = [row["difference"] for row in found if row["difference"]["p"] is not None]
    assert [row["p_holm"] for row in tested] == inference.holm([row["p"] for row in tested])
    assert len(tested) == 8  # one seed has no p


def test_views_and_components_take_the_experts_roles() -> None:
    """Of two seeds that dealt them the other way round, in one order."""
    found = []
    for weights in ([0.8, 0.2], [0.2, 0.8]):
        line = {"weights_embedding": weights, "weights_reranking": weights[::-1]}
        trial = {"config": {"experts": ["a", "b"]}, "curve": [line]}
        own = {"a": weights[0], "b": weights[1]}
        measured = {
            "probes": {"model": 0, "base": 1, **own},
            "components": {"q_proj": 2, **{f"expert {k}": v for k, v in own.items()}},
        }
        found.append(probes._by_role(measured, trial))  # fmt: skip
    one, other = found
    assert one == other and [*one["probes"]] == [*other["probes"]]
    assert one["probes"] == {"model": 0, "base": 1, "embedding's own alone": 0.8,
                             "reranking's own alone": 0.2}  # fmt: skip
    assert one["components"] == {"q_proj": 2, f"expert: {roles.OWN['embedding']}": 0.8,
                                 f"expert: {roles.OWN['reranking']}": 0.2}  # fmt: skip


def test_what_random_values_do_as_well_is_said() -> None:
    def layer(gap: float) -> dict:
        values = {"selectivity": gap, "new_selectivity": gap + 0.3}
        return {"best": 0, "layers": [{k: over_seeds([v, v]) for k, v in values.items()}]}

    names = (*probes.INGREDIENTS, "relevant")
    gaps = {**dict.fromkeys(names, 0.2), "bm25": -0.1, "relevant": 0.0}
    told = probes._unselective({"rank-only": {"views": {"model": {
        name: layer(gap) for name, gap in gaps.items()}}}})  # fmt: skip
    assert (
        told
        and "BM25 (whole text) in Rank-Only (-0.10; +0.20), relevant in Rank-Only (+0.00; +0.30)."
        in told
    )
    gaps = {"views": {"model": {name: layer(0.2) for name in names}}}
    assert probes._unselective({"rank-only": gaps}) is None


def test_a_claim_stands_beside_its_control_on_new_documents() -> None:
    def layer(**values: float | None) -> dict:
        return {"best": 0, "layers": [{k: over_seeds([v, v]) for k, v in values.items()}]}

    new = {"new_score": 0.3, "new_control": -0.1, "new_selectivity": 0.3}
    rows = {"bm25": layer(selectivity=-0.1, **new), "tf_sum": layer(
        selectivity=0.3, **dict.fromkeys(new))}  # fmt: skip
    found = {"views": {"model": rows}}
    told = "; on new documents 0.30, control -0.10, selectivity +0.30"
    assert probes._beside(found, ["bm25"]) == f"; selectivity -0.10{told}"
    assert probes._beside(found, ["bm25", "tf_sum"]) == f"; selectivity +0.10{told}"
    assert probes._beside(found, ["tf_sum"]) == "; selectivity +0.30"


def test_probes_of_older_code_are_named(make: Make) -> None:
    folder = make(name="probing/small")
    path = folder / "joint-moe" / "probing-seed0.json"
    write_json(path, {"probes": {}})
    with pytest.raises(ValueError, match=f"{path} is no result, it lacks kept: remove it"):
        probes.write(folder)
