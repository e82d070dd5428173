"""Interference over several collections: that of each, and their mean, by the rule of the study.

For one task, collection k has I_k = 100 (P_k - J_k) / P_k, and I = sum_k w_k I_k with the w_k of
`weights`: each weighs the same, however many queries it has. The queries of different collections
are different ones, the trained models are the same; so I is one smooth function of all queries'
scores, whose interval `eval.stats.estimate` finds from its gradient. With n_k of Q queries in
collection k,

    u_q = w_k Q / n_k * 100 * (J_k / P_k * Y_P[q] - Y_J[q]) / P_k      of a query q of k

whose mean within each collection is 0, so that how hard a collection is adds nothing to the
variance: it is that of the collections at hand, not of others that might have been taken.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.figures import TASKS, span
from analysis.judge import JOINT, METRIC, NEEDED, SPECIALIST, arrays, load
from eval import stats
from model.files import write_json, write_text

Part = tuple[stats.Arms, Sequence[str]]  # of a collection: arm -> (S, Q) scores, Q cluster labels


def counted(names: Sequence[str]) -> list[str]:
    """As what each collection counts: itself, but the forums of CQADupStack, from BEIR or mteb, are
    one, as both count them."""
    forums = ("cqadupstack-", "mteb-cqadupstack")
    return ["cqadupstack" if name.startswith(forums) else name for name in names]


def weights(names: Sequence[str]) -> list[float]:
    """The share of each collection in the mean; of what counts as one, alike. They add up to 1."""
    rows = counted(names)
    return [1 / (len(set(rows)) * rows.count(row)) for row in rows]


def mean_interference(
    parts: Sequence[Part], specialist: str, joint: str, counts: Sequence[float]
) -> stats.Estimate:
    """I, in %, with its interval; for one collection it is `stats.interference`.

    Args:
        parts: the same seeds, in the same order, in each. Means of the specialist must be > 0.
        counts: w_k of each.
    """
    total, values, labels = sum(len(of) for _, of in parts), [], []
    columns: dict[str, list[np.ndarray]] = {specialist: [], joint: []}
    for at, ((y, of), count) in enumerate(zip(parts, counts, strict=True)):
        p, j = float(y[specialist].mean()), float(y[joint].mean())
        weight = 100 * total * count / len(of)
        values.append(100 * (p - j) / p)
        columns[specialist].append(weight * j / p**2 * y[specialist])
        columns[joint].append(-weight / p * y[joint])
        labels += [f"{at} {label}" for label in of]
    scaled = {arm: np.concatenate(of, axis=1) for arm, of in columns.items()}
    return stats.estimate(
        float(np.dot(counts, values)), dict.fromkeys(columns, 1.0), scaled, labels
    )


def judge(folders: Sequence[Path]) -> dict[str, Any]:
    """What across.json holds: `collections`, and by `stats.decide` the decision on their mean.

    A task is measurable if its specialists' gain over the untrained base is, in the mean.

    Args:
        folders: the settings, each of one collection and of the same trained models.
    Raises:
        ValueError: see `analysis.judge.load`; no seed has all needed arms everywhere, or a
            specialist scores 0.
    """
    loaded = {folder.name: load(folder) for folder in folders}
    every = [set(arms.get(arm, {})) for _, arms in loaded.values() for arm in NEEDED]
    seeds = sorted(set.intersection(*every))
    if not seeds:
        raise ValueError(f"{', '.join(loaded)}: no seed of {', '.join(NEEDED)} is in all of them")
    rows: dict[str, dict[str, Any]] = {name: {} for name in loaded}
    parts: dict[str, list[Part]] = {task: [] for task in TASKS}
    gains: dict[str, list[float]] = {task: [] for task in TASKS}
    for name, (baselines, arms) in loaded.items():
        used = {arm: {s: arms[arm][s] for s in seeds} for arm in NEEDED}
        y, labels = arrays(baselines, used)
        for task in TASKS:
            base = np.mean([row[METRIC] for row in baselines["untrained"][task].values()])
            found = stats.interference(y[task], labels[task], SPECIALIST[task], JOINT)
            mine = float(y[task][SPECIALIST[task]].mean())
            rows[name][task] = {
                "specialist": mine,
                "joint": float(y[task][JOINT].mean()),
                "base": float(base),
                "interference": found.value,
                "interval": found.interval,
            }
            parts[task].append((y[task], labels[task]))
            gains[task].append(mine - float(base))
    names = {name: baselines["data"]["name"] for name, (baselines, _) in loaded.items()}
    counts = weights(list(names.values()))
    means = {t: mean_interference(parts[t], SPECIALIST[t], JOINT, counts) for t in TASKS}
    known = {task: None if mean.interval is None else mean.p for task, mean in means.items()}
    adjusted = stats.holm([1.0 if p is None else p for p in known.values()])
    tasks = {}
    for (task, mean), p in zip(means.items(), adjusted, strict=True):
        sure = mean.interval is not None
        tasks[task] = {
            "measurable": round(float(np.dot(counts, gains[task])), 9) >= stats.MEASURABLE_GAIN,
            "interference": mean.value,
            "interval": mean.interval,
            "p": known[task],
            "p_holm": p if sure else None,
            "p_equivalence": stats.tost(mean.value, mean.se, mean.df, stats.PROCEED_FROM)
            if sure
            else None,
        }
    decided = stats.decide(tasks, len(seeds))
    return decided | {"seeds": seeds, "tasks": tasks, "collections": rows, "names": names}


def write(folder: Path, folders: Sequence[Path], absent: Mapping[str, str]) -> str:
    """Put across.json and across.md beside the setting where the models were trained.

    Args:
        absent: collections that were asked for and left out -> why.
    Returns:
        What it says, for a terminal.
    """
    found = judge(folders) | {"left_out": dict(absent)}
    write_json(folder / "across.json", found)
    text = markdown(folder.name, found)
    write_text(folder / "across.md", text)
    return f"{text}\nwritten to {folder / 'across.md'}"


def markdown(setting: str, found: dict[str, Any]) -> str:
    """The table of collections with their mean, and the decision."""
    count = len(set(counted(list(found["names"].values()))))
    lines = [
        f"# {setting}: measured elsewhere",
        "",
        f"Trained in `{setting}`, measured on {count} other collections, seeds "
        f"{', '.join(map(str, found['seeds']))}. I = 100 (specialist - joint) / specialist, in % "
        "of nDCG@10, with its 95 % interval over seeds and queries; in the mean every collection "
        "weighs the same (the forums of CQADupStack are one), and its interval is for these "
        "collections, not for others.",
        "",
        "| collection | " + " | ".join(f"{name} I" for name in TASKS.values()) + " |",
        "| --- |" + " ---: |" * len(TASKS),
    ]
    rows = {found["names"][name]: row for name, row in found["collections"].items()}
    for name, row in (rows | {f"**mean of {count}**": found["tasks"]}).items():
        cells = [f"{row[t]['interference']:+.2f} {span(row[t]['interval'])}".strip() for t in TASKS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    supported = "yes" if found["supported"] else "no"
    lines += ["", f"**{found['decision']}**, supported by the statistics: **{supported}**.", ""]
    lines += [found["reason"], ""]
    lines += [f"Left out: {name}: {why}.\n" for name, why in found.get("left_out", {}).items()]
    return "\n".join(lines)
