"""Interference against the size of the model, and against the rank -> scale.json, report, figure.

Each size has specialists and a joint arm of its own, named `emb-only-8l` (8 layers) or
`emb-only-r4` (rank 4), and its own untrained base. A slope is the least-squares line through the
interference of the measurable sizes over log2 of their size; its interval follows, as every other,
from the gradient of the slope with respect to the arms' means (`eval.stats`).
"""

import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import experiments
from analysis import figures, judge
from analysis.figures import METRIC, TASKS, p_value, percent, span, table
from analysis.page import provenance, warnings, write_folder
from eval import stats

AXES = {"parameters": "parameters outside the embeddings", "rank": "rank of the experts"}
PAGE = """# {title}

**Question.** {v[question]}

**Expected, before the first run.** {v[expected]}
{notes}
## Reading

{reading}

## Interference by size

I = 100 (specialist - joint) / specialist, in % of nDCG@10, with its 95 % interval over seeds and
queries. Holm: over all {family} rows with an interval. A size at which training gained the
specialist less than 5.00 over its own untrained base is not measurable, which is not "no
interference". Detectable: with 80 % power at Holm's first step.

{sizes}{picture}## Slopes

How much I changes when the size doubles, in points of I, over the measurable sizes.

{slopes}## What could not be concluded

{limits}

## Provenance

{provenance}
"""
CAPTION = (
    "Interference at each size with 95 % intervals over seeds and queries; open: the task is not "
    "measurable there. The line is the least-squares fit through the measurable sizes."
)


def write(folder: Path) -> dict[str, Any]:
    """Write the report of runs/scale_study/<setting> into it; return what scale.json holds.

    Raises ValueError as `judge.load`, and for a size without its baselines.
    """
    folder = folder.resolve()
    _, arms = judge.load(folder)
    if not arms:
        raise ValueError(f"{folder} has no trial yet: `make scale-study` makes them")
    found = study(folder, arms)
    drawn = {"scale": draw(found)} if any(row["interval"] for row in found["rows"]) else {}
    write_folder(folder, {"scale.json": found}, markdown(found), drawn)
    return found


def sizes(names: list[str]) -> dict[str, dict[str, str]]:
    """suffix -> arm without it -> the arm's name; `emb-only` has the suffix ""."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = re.fullmatch(r"(emb-only|rank-only|joint-single)(?:-(\d+l|r\d+))?", name)
        if match:
            found.setdefault(match[2] or "", {})[match[1]] = name
    return found


def study(folder: Path, arms: dict[str, dict[int, dict]]) -> dict[str, Any]:
    """Every number of the report."""
    experiment = experiments.EXPERIMENTS[folder.parent.name]
    rows: list[dict[str, Any]] = []
    scores: dict[str, dict[str, np.ndarray]] = {task: {} for task in TASKS}
    labels: dict[str, list[str]] = {}
    files: dict[str, dict] = {}
    planned = judge.planned(folder, False)
    for suffix, members in sizes([*planned, *arms]).items():
        name = "baselines.json"
        some = next((m for m in members.values() if m in arms), None)
        if some and some in experiments.arms(folder.parent.name, True, True, _scale(folder)):
            size = experiments.size_of(folder.parent.name, some, _scale(folder))
            name = experiments.baselines_name(size)
        if not some:
            rows += [{"size": suffix, "task": task, "missing": True} for task in TASKS]
            continue
        baselines = files[name] = judge.read(folder / name)
        here = {arm: arms[full] for arm, full in members.items() if full in arms}
        y, labels = judge.arrays(baselines, here)
        for task in TASKS:
            rows.append(_row(suffix, task, here, y[task], labels[task], baselines))
            scores[task] |= {f"{arm} {suffix}": values for arm, values in y[task].items()}
    for arm in arms:
        files |= {f"{arm}/seed{seed}.json": trial for seed, trial in arms[arm].items()}
    tested = [row for row in rows if row.get("p") is not None]
    for row, p in zip(tested, stats.holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
        level = stats.ALPHA / len(tested)
        row["detectable"] = stats.smallest_detectable_effect(row["se"], row["df"], level)
    first = next(iter(files.values()))
    config = next(iter(files.values()))["config"]
    return {
        "experiment": folder.parent.name,
        "setting": folder.name,
        "question": experiment.question,
        "expected": experiment.expected,
        "split": config["split"],
        "seeds_planned": experiment.seeds,
        "rows": rows,
        "slopes": _slopes(rows, scores, labels),
        "seconds": sum(sum(file["seconds"].values()) for file in files.values()),
        "peak_bytes": max(file["peak_bytes"] for file in files.values()),
        "base": first["base"],
        "data": first["data"],
        **judge.origin(files),
        "files": list(files),
    }


def _scale(folder: Path) -> str:
    return folder.name.split("-")[0]


def _row(
    suffix: str,
    task: str,
    arms: dict[str, dict[int, dict]],
    y: dict[str, np.ndarray],
    labels: list[str],
    baselines: dict,
) -> dict[str, Any]:
    """One size and task."""
    special, joint = stats.SPECIALIST[task], judge.JOINT
    first = next(iter(next(iter(arms.values())).values()))
    base = float(np.mean([row[METRIC] for row in baselines["untrained"][task].values()]))
    row: dict[str, Any] = {
        "size": suffix,
        "task": task,
        "layers": first["config"]["layers"],
        "parameters": first["body_parameters"],
        "rank": sum(first["config"]["ranks"]),
        "base": base,
        "specialist": float(y[special].mean()) if special in y else None,
        "joint": float(y[joint].mean()) if joint in y else None,
        "seeds": min((len(y[a]) for a in (special, joint) if a in y), default=0),
        "interference": None, "interval": None, "p": None, "measurable": None,
    }  # fmt: skip
    if special not in y:
        return row
    row["measurable"] = round(row["specialist"] - base, 9) >= stats.MEASURABLE_GAIN
    if joint in y and row["specialist"] > 0:
        e = stats.interference(y, labels, special, joint)
        row |= {"interference": e.value, "interval": e.interval}
        if e.interval:
            row |= {"p": e.p, "se": e.se, "df": e.df}
    return row


def _slopes(rows: list[dict], scores: dict[str, dict[str, np.ndarray]], labels) -> list[dict]:
    """The slope of each task over the number of parameters, and over the rank."""
    found = []
    full = [row for row in rows if row.get("interval") and row["measurable"]]
    for axis, other in (("parameters", "rank"), ("rank", "parameters")):
        counts = [row[other] for row in full]
        for task in TASKS:
            # What varies along one axis has the other's most common value.
            common = max(set(counts), key=counts.count) if counts else None
            line = [row for row in full if row["task"] == task and row[other] == common]
            if len({row[axis] for row in line}) < 2:
                continue
            e = slope(line, axis, scores[task], labels[task])
            at = [math.log2(row[axis]) for row in line]
            middle = float(np.mean([row["interference"] for row in line]))
            found.append({
                "axis": axis, "task": task, "sizes": [row["size"] for row in line],
                "slope": e.value, "interval": e.interval, "p": e.p,
                "detectable": stats.smallest_detectable_effect(e.se, e.df, stats.ALPHA / 2),
                "middle": [float(np.mean(at)), middle], "range": [min(at), max(at)],
            })  # fmt: skip
    for axis in AXES:
        family = [row for row in found if row["axis"] == axis]
        for row, p in zip(family, stats.holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = p
    return found


def slope(rows: list[dict], axis: str, y: dict[str, np.ndarray], labels) -> stats.Estimate:
    """Least-squares slope of I over x = log2(size): sum_k c_k I_k.

    c_k = (x_k - mean x) / sum (x - mean x)^2. With I_k = 100 (1 - J_k / P_k) its gradient is
    100 c_k J_k / P_k^2 for the specialist and -100 c_k / P_k for the joint arm; arms of all sizes
    answer the same queries.

    Args:
        rows: with `size`, `interference`, `task` and the axis. y: "<arm> <size>" -> (S, Q).
    """
    x = np.array([math.log2(row[axis]) for row in rows])
    c = (x - x.mean()) / float(((x - x.mean()) ** 2).sum())
    gradient: dict[str, float] = {}
    for weight, row in zip(c.tolist(), rows, strict=True):
        special = f"{stats.SPECIALIST[row['task']]} {row['size']}"
        joint = f"{judge.JOINT} {row['size']}"
        p, j = float(y[special].mean()), float(y[joint].mean())
        gradient[special] = 100 * weight * j / p**2
        gradient[joint] = -100 * weight / p
    value = float(sum(w * row["interference"] for w, row in zip(c.tolist(), rows, strict=True)))
    return stats.estimate(value, gradient, y, labels)


def reading(v: dict[str, Any]) -> str:
    said = []
    for row in v["slopes"]:
        sure = row["p_holm"] <= stats.ALPHA
        way = "falls" if row["slope"] < 0 else "rises"
        text = (
            f"Over {len(row['sizes'])} sizes, I on {TASKS[row['task']]} {way} by "
            f"{abs(row['slope']):.2f} points when the {AXES[row['axis']]} double "
            f"({span(row['interval'])})"
        )
        text = text.replace("when the rank of the experts double", "when the rank doubles")
        end = "." if sure else (
            f", which cannot be told from no slope (Holm p {p_value(row['p_holm'])}; detectable "
            f"{row['detectable']:.2f})."
        )  # fmt: skip
        said.append(text + end)
    lost = [row for row in v["rows"] if row.get("measurable") is False]
    if lost:
        names = ", ".join(f"{TASKS[row['task']]} at {_size(row)}" for row in lost)
        said.append(f"Not measurable: {names}.")
    sure = [row for row in v["rows"] if row.get("p_holm", 1) <= stats.ALPHA and row["measurable"]]
    for row in sure:
        said.append(
            f"At {_size(row)} the joint arm {'loses' if row['interference'] > 0 else 'gains'} "
            f"{abs(row['interference']):.2f} % on {TASKS[row['task']]}."
        )
    if not sure and any(row.get("p") is not None for row in v["rows"]):
        said.append("At no size can interference be told from none.")
    return " ".join(said) or "There is nothing to compare yet."


def _size(row: dict[str, Any]) -> str:
    if row.get("missing"):
        return row["size"] or "all layers"
    layers = "all layers" if row["layers"] is None else f"{row['layers']} layers"
    return f"{layers}, rank {row['rank']}"


def limits(v: dict[str, Any]) -> list[str]:
    said = []
    absent = {_size(row) for row in v["rows"] if row.get("interference") is None}
    if absent:
        said.append(f"Anything about the sizes that are missing or not whole: {', '.join(absent)}.")
    few = [r for r in v["rows"] if r.get("seeds") and r["seeds"] < v["seeds_planned"]]
    if few:
        said.append(f"What {v['seeds_planned']} seeds would show: some sizes have fewer.")
    if any(row.get("detectable", 0) > stats.PROCEED_FROM for row in v["rows"]):
        said.append("An effect of 2 % at each size: what is detectable stands in the table.")
    ranks = {row["axis"] for row in v["slopes"]}
    if "rank" not in ranks:
        said.append("The rank as a second axis of capacity: its arms were not run (`CONTROLS=1`).")
    widths = "All sizes have one width, so fixed rank and fixed rank/width are the same here."
    return [*said, widths, f"Other collections than {v['data']['name']}."]


def markdown(v: dict[str, Any]) -> str:
    rows = []
    for row in v["rows"]:
        if row.get("interference") is None:
            rows.append([_size(row), TASKS[row["task"]], *["missing"] * 3, *["-"] * 6])
            continue
        rows.append([
            _size(row), TASKS[row["task"]],
            *(f"{100 * row[key]:.2f}" for key in ("base", "specialist", "joint")),
            "yes" if row["measurable"] else "**no**",
            f"**{percent(row['interference'])}** {span(row['interval'])}",
            p_value(row["p"]), p_value(row.get("p_holm")), percent(row.get("detectable")),
            str(row["seeds"]),
        ])  # fmt: skip
    head = ["size", "task", "untrained", "specialist", "joint", "measurable", "I", "p", "Holm p",
            "detectable", "seeds"]  # fmt: skip
    slopes = [
        [AXES[row["axis"]], TASKS[row["task"]], str(len(row["sizes"])),
         f"{row['slope']:+.2f} {span(row['interval'])}", p_value(row["p"]),
         p_value(row["p_holm"]), f"{row['detectable']:.2f}"]
        for row in v["slopes"]
    ]  # fmt: skip
    top = ["over", "task", "sizes", "slope", "p", "Holm p", "detectable"]
    drawn = any(row["interval"] for row in v["rows"] if not row.get("missing"))
    return PAGE.format(
        v=v,
        title=f"{v['experiment'].replace('_', ' ').capitalize()}: {v['setting']}",
        notes=warnings(v),
        reading=reading(v),
        family=sum(row.get("p") is not None for row in v["rows"]),
        sizes=table(head, rows),
        picture=f"![scale](scale.png)\n\n*{CAPTION}*\n\n" if drawn else "",
        slopes=table(top, slopes) if slopes else "Fewer than two sizes are measurable.\n\n",
        limits="\n".join(f"- {text}" for text in limits(v)),
        provenance=provenance(v),
    )


def draw(v: dict[str, Any]) -> Figure:
    """A panel a task and axis: interference over size."""
    axes_shown = [a for a in AXES if a == "parameters" or any(s["axis"] == a for s in v["slopes"])]
    with matplotlib.rc_context(figures.STYLE):
        size = (figures.WIDTH, 2.3 * len(axes_shown))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(axes_shown), 2, sharey=True, squeeze=False)
        for line, axis in zip(grid, axes_shown, strict=True):
            for panel, task in zip(line, TASKS, strict=True):
                _panel(panel, v, axis, task)
            line[0].set_ylabel("interference (%)")
        return figure


def _panel(axes: Axes, v: dict[str, Any], axis: str, task: str) -> None:
    colour = figures.COLOURS["joint-single"]
    fits = [row for row in v["slopes"] if row["axis"] == axis and row["task"] == task]
    other = "rank" if axis == "parameters" else "parameters"
    rows = [r for r in v["rows"] if r["task"] == task and r.get("interval")]
    counts = [row[other] for row in rows]
    common = max(set(counts), key=counts.count)
    for row in (row for row in rows if row[other] == common):
        x, fill = math.log2(row[axis]), colour if row["measurable"] else "white"
        axes.plot([x, x], row["interval"], color=colour, linewidth=1.2, zorder=1)
        axes.plot(x, row["interference"], "o", color=colour, mfc=fill, markersize=4.2)
        axes.annotate(f"{row['layers'] or 'all'}" if axis == "parameters" else f"{row['rank']}",
                      (x, row["interval"][1]), xytext=(0, 2), textcoords="offset points",
                      ha="center", fontsize=7, color=figures.GREY)  # fmt: skip
    for row in fits:
        x = np.array(row["range"])
        axes.plot(x, row["middle"][1] + row["slope"] * (x - row["middle"][0]), color=colour,
                  linewidth=0.8, linestyle=(0, (5, 1.5)))  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.6, zorder=0)
    axes.set_title(TASKS[task].capitalize(), fontweight="bold")
    shown = sorted({row[axis] for row in rows if row[other] == common})
    names = [f"{n / 1e6:.0f} M" if axis == "parameters" else f"{n}" for n in shown]
    axes.set_xticks([math.log2(n) for n in shown], names)
    note = " (labels: layers)" if axis == "parameters" else ""
    axes.set_xlabel(f"{AXES[axis]}{note}")


def summary(v: dict[str, Any]) -> str:
    """The reading, for a terminal."""
    return f"{v['experiment']} {v['setting']}: {reading(v)}"
