"""What the report of representations claims, as tests over seeds."""

from collections.abc import Sequence
from typing import Any

from analysis import judge
from analysis.figures import label
from analysis.page import over_seeds, with_holm
from analysis.representation_figures import KINDS

SPECIALISTS = ("emb-only", "rank-only")
UNROUTED = "uniform-moe"  # as many experts, and no routing


def claims(measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the reading claims, as differences over seeds with Holm's p over all of them.

    Of each arm but the specialists: its CKA with Emb-Only less that with Rank-Only. Of each pair of
    experts: how much more of each other's space they write into than random ones would, and than
    those of Uniform-MoE do. Of Joint-Single: its STIR less that of each specialist.
    """
    rows: list[dict[str, Any]] = []

    def add(arm: str, what: str, values: Sequence[float | None]) -> None:
        if values:
            rows.append({"arm": arm, "what": what, "difference": over_seeds(values)})

    for arm, found in measured.items():
        for kind, text in KINDS.items():
            near = [found["arms"][kind].get(other, {}).get("by_seed") for other in SPECIALISTS]
            if all(near):
                add(arm, f"CKA with Emb-Only less with Rank-Only, {text}", _less(*near))
        for name, row in found["pairs"].items():
            of = [row[f"outputs_{key}"]["seeds"] for key in ("overlap", "by_chance")]
            what = f"overlap of {name.replace(' | ', ' with ')} (write)"
            add(arm, f"{what} less by chance", _less(*of))
            other = measured.get(UNROUTED, {"pairs": {}})["pairs"].get(name)
            if other and arm != UNROUTED:
                pair = [_at(measured[a], r["outputs_overlap"]["seeds"])
                        for a, r in ((arm, row), (UNROUTED, other))]  # fmt: skip
                add(arm, f"{what} less {label(UNROUTED)}'s", _of_same_seed(*pair))
        for other in SPECIALISTS if arm == judge.JOINT else ():
            if other in measured:
                pair = [_at(measured[a], measured[a]["stir"][-1]["stir"]["by_seed"])
                        for a in (arm, other)]  # fmt: skip
                add(arm, f"STIR of documents with pairs less {label(other)}'s",
                    _of_same_seed(*pair))  # fmt: skip
    with_holm(row["difference"] for row in rows)
    return rows


def _at(found: dict[str, Any], values: Sequence[float | None]) -> dict[int, float | None]:
    return dict(zip(found["at"], values, strict=True))


def _of_same_seed(
    one: dict[int, float | None], other: dict[int, float | None]
) -> list[float | None]:
    seeds = [seed for seed in one if seed in other]
    return _less([one[s] for s in seeds], [other[s] for s in seeds])


def _less(one: Sequence[float | None], other: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(one, other, strict=True)]
