"""Interference over several collections: that of each, and their mean, by the rule of the study.

For one task, collection k has I_k = 100 (P_k - J_k) / P_k, and I = sum_k w_k I_k with the w_k of
`weights`: each weighs the same, however many queries it has. The queries of different collections
are different ones, the trained models are the same; so I is one smooth function of all queries'
scores, whose interval `eval.stats.estimate_over` finds from its gradient,

    w_k 100 (J_k / P_k dP_k - dJ_k) / P_k      in collection k

Each collection has its own variance over its clusters, and how hard it is adds nothing: the
interval is for the collections at hand, not for others that might have been taken.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.disk import load, origin, trials_by_file
from analysis.figures import METRIC, TASKS, percent, plain, span
from analysis.judge import arrays
from analysis.page import warnings
from eval import inference, rule, stats
from eval.rule import JOINT, NEEDED, SPECIALIST
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
    value, found = 0.0, []
    for (y, labels), count in zip(parts, counts, strict=True):
        y = stats.checked(y, [specialist, joint])
        p, j = float(y[specialist].mean()), float(y[joint].mean())
        if p <= 0:
            raise ValueError(f"mean of {specialist!r} is {p}; a relative loss needs a positive one")
        value += count * 100 * (p - j) / p
        gradient = {specialist: count * 100 * j / p**2, joint: -count * 100 / p}
        found.append(stats.Part(gradient, y, labels))
    if any(len(set(labels)) < 2 for _, labels in parts):
        return stats.Estimate(value)  # one cluster gives no interval
    return stats.estimate_over(value, found)


def judge(folders: Sequence[Path]) -> dict[str, Any]:
    """What across.json holds: `collections`, and by `rule.decide` the decision on their mean.

    A task is measurable if its specialists' gain over the untrained base is, in the mean.

    Args:
        folders: the settings, each of one collection and of the same trained models.
    Raises:
        ValueError: see `analysis.disk.load`; no seed has all needed arms everywhere, or a
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
            found = mean_interference([(y[task], labels[task])], SPECIALIST[task], JOINT, [1.0])
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
    level = rule.alpha_at_look(len(seeds)) / len(TASKS)
    adjusted = inference.holm([1.0 if p is None else p for p in known.values()])
    tasks = {}
    for (task, mean), p in zip(means.items(), adjusted, strict=True):
        sure = mean.interval is not None
        tasks[task] = {
            "measurable": round(float(np.dot(counts, gains[task])), 9) >= rule.MEASURABLE_GAIN,
            "interference": mean.value,
            "interval": mean.interval,
            "p": known[task],
            "p_holm": p if sure else None,
            "detectable": inference.smallest_detectable_effect(mean.se, mean.df, level)
            if sure
            else None,
            "p_equivalence": inference.tost(mean.value, mean.se, mean.df, rule.PROCEED_FROM)
            if sure
            else None,
        }
    decided = rule.decide(tasks, len(seeds))
    files = {
        f"{name}/{file}": result
        for name, (baselines, arms) in loaded.items()
        for used in [{arm: {s: arms[arm][s] for s in seeds} for arm in NEEDED}]
        for file, result in {"baselines.json": baselines, **trials_by_file(used)}.items()
    }
    first = next(iter(loaded.values()))[0]
    return decided | {
        **{"seeds": seeds, "tasks": tasks, "collections": rows, "names": names},
        **{"split": first["config"]["split"], **origin(files)},
    }


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
        *warnings({**found, "setting": setting}).splitlines(),
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
    least = [
        f"{name} {percent(found['tasks'][task]['detectable'])}" for task, name in TASKS.items()
    ]
    lines += ["", f"Detectable in the mean, with 80 % power at half this look's level: "
              f"{', '.join(least)}."]  # fmt: skip
    lines += ["", f"**{found['decision']}**, supported by the statistics: **{supported}**.", ""]
    lines += [found["reason"], ""]
    lines += [f"Left out: {name}: {why}.\n" for name, why in found.get("left_out", {}).items()]
    lines += ["## Provenance", "", *(f"- {k}: {plain(v)}" for k, v in found["origin"].items()), ""]
    return "\n".join(lines)
