"""The routers' report: beside the differences to Sparsegen those of the arms that are trained
without router noise and expert dropout to Sparsegen without them."""

from pathlib import Path
from typing import Any

from analysis import compare, differences, judge
from analysis.compare import Section, Trials, summary
from analysis.figures import TASKS, label, p_value
from eval import inference

__all__ = ["summary", "write"]
PLAIN = "sparsegen-plain"
TEXT = """## Differences to {plain}

Sparsegen is trained with router noise and expert dropout, the arms below are not: held against
{plain}, which is not either, they show routing alone. In points of nDCG@10, with Holm's correction
over the {family} of this table. This table was added when the trials had been seen.

{table}"""


def write(folder: Path) -> dict[str, Any]:
    """As `compare.write`, with the arms that are trained as plainly as `PLAIN` held against it."""
    return compare.write(folder, section)


def section(v: dict[str, Any], baselines: dict, arms: Trials) -> Section:
    y, labels = judge.arrays(baselines, arms)
    rows = [
        differences.difference(arm, PLAIN, task, "", y[task], labels[task], arms)
        for task in TASKS
        for arm in y[task]
        if PLAIN in y[task]
        and arm not in (PLAIN, *compare.SPECIALISTS)
        and not v["arms"][arm]["shaken"]
    ]
    rows = differences.tested([row for row in rows if row])
    if not rows:
        return Section("", "", {})
    shown = TEXT.format(
        plain=label(PLAIN), family=f"{len(rows)} differences", table=differences.markdown(rows)
    )
    return Section(shown, told(rows), {"to_plain": rows})


def told(rows: list[dict[str, Any]]) -> str:
    """What the table says, in a sentence."""
    tests = [row for row in rows if row.get("p_holm") is not None]
    if not tests:
        return ""
    sure = [row for row in tests if row["p_holm"] <= inference.ALPHA]
    said = [
        f"{label(r['arm'])} {r['difference']:+.2f} points on {TASKS[r['task']]} "
        f"(Holm p {p_value(r['p_holm'])})"
        for r in sure
    ]
    least = min(row["p_holm"] for row in tests)
    return f"Held against {label(PLAIN)}: " + (
        f"{'; '.join(said)}; nothing else is significant."
        if said
        else f"no difference is significant (the smallest Holm p is {p_value(least)})."
    )
