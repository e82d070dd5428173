"""What the report of representations claims, as tests over seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.figures import label
from analysis.page import by_seed_less, over_seeds, with_holm
from analysis.representation_figures import KIND_NAMES
from eval import rule

SPECIALISTS = tuple(rule.SPECIALIST.values())
UNROUTED = "uniform-moe"  # as many experts, and no routing


def claims(measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the reading claims, as differences over seeds with Holm's p over all of them.

    Of each arm but the specialists: its CKA with Emb-Only less that with Rank-Only. Of each pair of
    experts: how much more of each other's space they write into than random ones would, and than
    the mean pair of Uniform-MoE, whose experts have no roles to tell them by, does. Of
    Joint-Single: its STIR less that of each specialist.
    """
    rows: list[dict[str, Any]] = []

    def add(
        arm: str,
        what: str,
        one: tuple[str, Sequence[float | None]],
        other: tuple[str, Sequence[float | None]],
    ) -> None:
        """one, other: an arm, and a value of each of its seeds."""
        of = (dict(zip(measured[a]["at"], values, strict=True)) for a, values in (one, other))
        if values := by_seed_less(*of):
            rows.append({"arm": arm, "what": what, "difference": over_seeds(values)})

    unrouted = [row["outputs_overlap"]["seeds"]
                for row in measured.get(UNROUTED, {"pairs": {}})["pairs"].values()]  # fmt: skip
    for arm, found in measured.items():
        for kind, text in KIND_NAMES.items():
            near = [found["arms"][kind].get(other, {}).get("by_seed") for other in SPECIALISTS]
            if all(near):
                what = f"CKA with Emb-Only less with Rank-Only, {text}"
                add(arm, what, (arm, near[0]), (arm, near[1]))
        for name, row in found["pairs"].items():
            mine, by_chance = (
                (arm, row[f"outputs_{k}"]["seeds"]) for k in ("overlap", "by_chance")
            )
            what = f"overlap of {name.replace(' | ', ' with ')} (write) less"
            add(arm, f"{what} by chance", mine, by_chance)
            if arm != UNROUTED and len(unrouted) == len(found["pairs"]):
                theirs = (UNROUTED, np.mean(unrouted, 0).tolist())
                add(arm, f"{what} {label(UNROUTED)}'s", mine, theirs)
        for other in SPECIALISTS if arm == rule.JOINT else ():
            if other in measured:
                mine, theirs = ((a, measured[a]["stir"][-1]["stir"]["by_seed"])
                                for a in (arm, other))  # fmt: skip
                add(arm, f"STIR of documents with pairs less {label(other)}'s", mine, theirs)
    with_holm(row["difference"] for row in rows)
    return rows
