"""What the reading of the probes claims: differences over seeds, each with a test."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis import roles
from analysis.figures import label
from analysis.page import by_seed_less, over_seeds, with_holm

HELD, RELEVANCE = "BM25 and its ingredients", "relevance"
ALONE = "{} alone"  # a view: the model with one expert of this role
OWN_ALONE = ALONE.format(roles.OWN["reranking"])
INGREDIENTS = ("covered_terms", "tf_sum", "idf_sum", "bm25")  # of BM25, and itself


def at_best(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The scores over seeds at the one of some layers with the highest mean."""
    known = [row["score"] for row in rows if row["score"]["mean"] is not None]
    return max(known, key=lambda score: score["mean"]) if known else None


def held(found: dict[str, Any], view: str, names: Sequence[str]) -> dict[int, float]:
    """seed -> the mean over properties of a view's scores, each at its best layer; the base is
    read at the layers that the arm adapts. Empty where a property has no score in some seed."""
    depth = len(found["views"]["model"][names[0]]["layers"])
    best = [at_best(found["views"][view][name]["layers"][-depth:]) for name in names]
    scores = [score["seeds"] for score in best if score]
    if len(scores) < len(names) or {len(row) for row in scores} != {len(found["at"])}:
        return {}
    return dict(zip(found["at"], np.mean(scores, 0).tolist(), strict=True))


def claims(probed: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the reading claims, as differences over seeds with Holm's p over all of them.

    Of BM25's ingredients in the mean, and of relevance: each arm less the base, each less Rank-Only
    of the same seed; of the ingredients, reranking's own expert less every other.
    """
    rows = []

    def add(arm: str, what: str, one: dict[int, float], other: dict[int, float]) -> None:
        if values := by_seed_less(one, other):
            rows.append({"arm": arm, "what": what, "difference": over_seeds(values)})

    for arm, found in probed.items():
        for names, text in ((INGREDIENTS, HELD), (("relevant",), RELEVANCE)):
            own = held(found, "model", names)
            add(arm, f"{text}, against the base", own, held(found, "base", names))
            if arm != "rank-only" and "rank-only" in probed:
                rival = held(probed["rank-only"], "model", names)
                add(arm, f"{text}, against {label('rank-only')}", own, rival)
        for view in found["views"] if OWN_ALONE in found["views"] else ():
            if view not in ("model", "base", OWN_ALONE):
                mine, other = (held(found, name, INGREDIENTS) for name in (OWN_ALONE, view))
                add(arm, f"{HELD}, expert: {OWN_ALONE} against {view}", mine, other)
    with_holm(row["difference"] for row in rows)
    return rows
