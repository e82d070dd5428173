"""Interference against the size of the model, and against the rank -> scale.json, report, figure.

Each size has specialists and a joint arm of its own, named `emb-only-8l` (8 layers), `emb-only-r4`
(rank 4) or `emb-only-w64` (a rank for each 64 of width), and its own untrained base. Other bases
lie in settings of their own; a setting's report takes in those of the same scale that answer the
same queries.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import experiments
from analysis import disk, figures, judge, scale_figure, slopes
from analysis.figures import METRIC, TASKS, p_value, percent, span, table
from analysis.page import frame, with_holm, write_folder
from analysis.slopes import AXES
from eval import inference, rule, stats
from trials import Config

BODY = """\
## Interference by size

nDCG@10 × 100 as the mean over seeds ± their standard deviation, with its 95 % interval over seeds
and queries; I = 100 (specialist - joint) / specialist, in %, with the same. Holm: over all {family}
rows with an interval. A size at which training gained the specialist less than 5.00 over its own
untrained base is not measurable, which is not "no interference". Detectable: with 80 % power at
Holm's first step. Of the same queries BM25 has {bm25}; no order of its candidates has more than
{ceiling}.

{sizes}{picture}## Slopes

How much I changes when the size doubles, in points of I, over the measurable sizes. I divides by a
specialist that changes with the size itself: beside it the slopes of the loss as a share of what
training gained the specialist over the untrained base, in points of %, and of the loss in points of
nDCG@10, both uncorrected. Holm: over all slopes of this table.

{slopes}"""
FREE = ("base", "revision", "dtype", "ranks", "learning_rate", "clip")  # of a base, or tuned
DOUBLES = {
    "parameters": "the parameters outside the embeddings double",
    "share": "they double and the rank grows with the width",
    "rank": "the rank doubles",
}
CAPTION = (
    "Interference at each size with 95 % intervals over seeds and queries; black: significant "
    "after Holm's correction (of a line: its slope), grey: not. The line is the least-squares fit "
    "through the measurable sizes{of}.{open}"
)


def write(folder: Path) -> dict[str, Any]:
    """Write the report of runs/scale_study/<setting> into it; return what scale.json holds.

    Raises ValueError as `disk.load`, and for a size without its baselines.
    """
    folder = folder.resolve()
    baselines, arms = disk.load(folder)
    if not arms:
        raise ValueError(f"{folder} has no trial yet: `make scale-study` makes them")
    found = study(folder, baselines, arms)
    drawn = (
        {"scale": scale_figure.draw(found)}
        if any(row.get("interval") for row in found["rows"])
        else {}
    )
    write_folder(folder, {"scale.json": found}, markdown(found), drawn)
    return found


def sizes(names: list[str]) -> dict[str, dict[str, str]]:
    """suffix -> arm without it -> the arm's name; `emb-only` has the suffix ""."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = re.fullmatch(r"(emb-only|rank-only|joint-single)(?:-(\d+l|[rw]\d+))?", name)
        if match:
            found.setdefault(match[2] or "", {})[match[1]] = name
    return found


@dataclass
class Ladder:
    """What the settings of one scale hold: a row a size and task, scores, files by their names."""

    rows: slopes.Rows = field(default_factory=list)
    scores: slopes.Scores = field(default_factory=lambda: {task: {} for task in TASKS})
    bases: slopes.Scores = field(default_factory=lambda: {task: {} for task in TASKS})
    labels: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, dict] = field(default_factory=dict)


def climb(folder: Path, arms: dict[str, dict[int, dict]], ladder: Ladder, place: str = "") -> None:
    """Add the sizes of one setting. place: of another base's setting, in the names of its sizes."""
    planned = disk.planned(folder, False)
    for suffix, members in sizes([*planned, *arms]).items():
        name, size = "baselines.json", f"{suffix}@{place}" if place else suffix
        some = next((m for m in members.values() if m in arms), None)
        if not some:
            ladder.rows += [{"size": size, "task": task, "missing": True} for task in TASKS]
            continue
        if some in experiments.arms(folder.parent.name, True, True, _scale(folder)):
            changed = experiments.size_of(folder.parent.name, some, _scale(folder))
            name = experiments.baselines_name(changed)
        baselines = disk.read(folder / name)
        ladder.files[f"{place}/{name}".lstrip("/")] = baselines
        here = {arm: arms[full] for arm, full in members.items() if full in arms}
        y, ladder.labels = judge.arrays(baselines, here)
        for task in TASKS:
            ladder.rows.append(_row(size, task, here, y[task], ladder.labels[task], baselines))
            ladder.scores[task] |= {f"{arm} {size}": values for arm, values in y[task].items()}
            untrained = baselines["untrained"][task].values()
            ladder.bases[task][size] = np.array([row[METRIC] for row in untrained])
    for arm in arms:
        ladder.files |= {
            f"{place}/{arm}/seed{seed}.json".lstrip("/"): t for seed, t in arms[arm].items()
        }


def others(folder: Path) -> dict[Path, list[str]]:
    """Settings of the same scale and data with other bases -> in what they differ beyond what
    belongs to a base or is tuned; a report takes in those that differ in nothing."""
    mine, found = disk.read(folder / "baselines.json"), {}
    for path in sorted(folder.parent.glob(f"{_scale(folder)}*/baselines.json")):
        theirs = disk.read(path)
        same = {k: theirs[k]["fingerprint"] == mine[k]["fingerprint"] for k in ("data", "base")}
        if not same["data"] or same["base"]:
            continue
        pairs = [(mine, theirs)]
        for trial in disk.trial_files(path.parent):
            if (own := folder / trial.parent.name / trial.name).exists():
                pairs.append((disk.read(own), disk.read(trial)))
        configs = [[Config.completed(of["config"]) for of in pair] for pair in pairs]
        odd = {k for a, b in configs for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
        queries = [f"{TASKS[t]} queries" for t in TASKS
                   if theirs["untrained"][t].keys() != mine["untrained"][t].keys()]  # fmt: skip
        found[path.parent] = [*queries, *sorted(odd.difference(FREE))]
    return found


def study(folder: Path, baselines: dict, arms: disk.Trials) -> dict[str, Any]:
    """Every number of the report."""
    experiment = experiments.EXPERIMENTS[folder.parent.name]
    ladder = Ladder()
    climb(folder, arms, ladder)
    beside = others(folder)
    for other in (other for other, odd in beside.items() if not odd):
        climb(other, disk.load(other)[1], ladder, other.name)
    rows, files = ladder.rows, ladder.files
    with_holm(rows)
    first = next(iter(files.values()))
    return {
        "experiment": folder.parent.name,
        "setting": folder.name,
        "question": experiment.question,
        "expected": experiment.expected,
        "split": first["config"]["split"],
        "seeds_planned": experiments.seeds(folder.parent.name, folder.name),
        "references": judge.references(baselines),
        "rows": rows,
        "slopes": slopes.fits(rows, ladder.scores, ladder.labels, ladder.bases),
        "left_out": {other.name: odd for other, odd in beside.items() if odd},
        **disk.facts(files),
    }


def _scale(folder: Path) -> str:
    return folder.name.split("-")[0]


def _row(
    size: str,
    task: str,
    arms: dict[str, dict[int, dict]],
    y: dict[str, np.ndarray],
    labels: list[str],
    baselines: dict,
) -> dict[str, Any]:
    """One size and task."""
    special, joint = rule.SPECIALIST[task], rule.JOINT
    first = next(iter(next(iter(arms.values())).values()))
    base = float(np.mean([row[METRIC] for row in baselines["untrained"][task].values()]))
    row: dict[str, Any] = {
        "size": size,
        "task": task,
        "layers": first["config"]["layers"],
        "parameters": first["body_parameters"],
        "rank": (rank := sum(first["config"]["ranks"])),
        "width": (width := first.get("width")),
        "share": round(rank / width, 6) if width else None,
        "name": (name := Path(first["base"]["name"]).name),
        "family": name.split("-")[0].lower(),
        "base": base,
        "specialist": float(y[special].mean()) if special in y else None,
        "joint": float(y[joint].mean()) if joint in y else None,
        "scores": {
            side: judge.score_row(y, labels, arm, arms[arm], task)
            for side, arm in (("specialist", special), ("joint", joint)) if arm in y
        },
        "seeds": min((len(y[a]) for a in (special, joint) if a in y), default=0),
        "interference": None, "interval": None, "p": None, "measurable": None,
    }  # fmt: skip
    if special not in y:
        return row
    row["measurable"] = round(row["specialist"] - base, 9) >= rule.MEASURABLE_GAIN
    if joint in y and row["specialist"] > 0:
        e = stats.interference(y, labels, special, joint)
        row |= {"interference": e.value, "interval": e.interval}
        if e.interval:
            row |= {"p": e.p, "se": e.se, "df": e.df}
    return row


def reading(v: dict[str, Any]) -> str:
    said = []
    for row in v["slopes"]:
        sure = _significant(row)
        way = "falls" if row["slope"] < 0 else "rises"
        text = (
            f"Over {len(row['sizes'])} sizes, I on {TASKS[row['task']]} {way} by "
            f"{abs(row['slope']):.2f} points when {DOUBLES[row['axis']]} "
            f"({span(row['interval'])}; Holm p {p_value(row['p_holm'])}; detectable "
            f"{row['detectable']:.2f}"
        )
        said.append(f"{text}{').' if sure else '; not significant).'}")
        if sure and row["without"]:
            least = row["without"][0]
            low, high = least["interval"]
            said.append(
                f"Without {_without(least['size'])}, the size on which it hangs most, the slope is "
                f"{least['slope']:+.2f} {span(least['interval'])}"
                f"{', whose interval holds 0' if low <= 0 <= high else ''}."
            )
        if sure:
            gain, points = row["other"]["gain"], row["other"]["points"]
            said.append(
                f"As a share of what training gained it is {gain['slope']:+.2f} percentage points "
                f"{span(gain['interval'])}, in points of nDCG@10 {points['slope']:+.2f} "
                f"{span(points['interval'])}."
            )
    lost = [row for row in v["rows"] if row.get("measurable") is False]
    if lost:
        names = ", ".join(f"{TASKS[row['task']]} at {_size(row)}" for row in lost)
        said.append(f"Not measurable: {names}.")
    sure = [row for row in v["rows"] if _significant(row) and row["measurable"]]
    for row in sure:
        said.append(
            f"At {_size(row)} the joint arm {'loses' if row['interference'] > 0 else 'gains'} "
            f"{abs(row['interference']):.2f} % on {TASKS[row['task']]}."
        )
    if not sure and any(row.get("p") is not None for row in v["rows"]):
        said.append("At no size is interference significant.")
    return " ".join(said) or "There is nothing to compare yet."


def _size(row: dict[str, Any]) -> str:
    if row.get("missing"):
        return row["size"] or "all layers"
    layers = "all layers" if row["layers"] is None else f"{row['layers']} layers"
    base = f"{row['name']}, " if "@" in row["size"] else ""
    return f"{base}{layers}, rank {row['rank']}"


def _significant(row: dict[str, Any]) -> bool:
    return row.get("p_holm", 1) <= inference.ALPHA


def _without(size: str) -> str:
    """A size's short name in words: `30l` -> `30 layers`."""
    words = {"l": "{} layers", "r": "rank {}", "w": "a rank for each {} of width"}
    kinds = re.fullmatch(r"(\d+)(l)|(r|w)(\d+)", size)
    if not kinds:
        return size or "all layers"
    layers, _, kind, number = kinds.groups()
    return words["l"].format(layers) if layers else words[kind].format(number)


def limits(v: dict[str, Any]) -> list[str]:
    said = []
    absent = dict.fromkeys(_size(r) for r in v["rows"] if r.get("interference") is None)
    if absent:
        said.append(f"Anything about the sizes that are missing or not whole: {', '.join(absent)}.")
    few = [r for r in v["rows"] if r.get("seeds") and r["seeds"] < v["seeds_planned"]]
    if few:
        said.append(f"What {v['seeds_planned']} seeds would show: some sizes have fewer.")
    if any(row.get("detectable", 0) > rule.PROCEED_FROM for row in v["rows"]):
        said.append("An effect of 2 % at each size: what is detectable stands in the table.")
    axes = {row["axis"] for row in v["slopes"]}
    run = [row for row in v["rows"] if not row.get("missing")]
    short = "fewer than two sizes are measurable and have an interval"
    if "rank" not in axes:
        why = "its arms were not run (`CONTROLS=1`)" if len({r["rank"] for r in run}) < 2 else short
        said.append(f"The rank as a second axis of capacity: {why}.")
    if len({row["width"] for row in run if row["width"]}) < 2:
        said.append("All sizes have one width: fixed rank and fixed rank/width are the same here.")
    elif "share" not in axes:
        with_arms = {row["name"] for row in run if re.match(r"w\d", row["size"])}
        why = "fewer than two bases have its arms (`-w64`)" if len(with_arms) < 2 else short
        said.append(f"Rank in proportion to width: {why}.")
    for name, odd in v["left_out"].items():
        said.append(
            f"Anything about `{name}`, which differs in more than the base: {', '.join(odd)}."
        )
    said.append("Whether it is the size: where a model is cut, the adapted layers stand elsewhere "
                "too, and all sizes have the learning rates of one.")  # fmt: skip
    return [*said, f"Other collections than {v['data']['name']}."]


def markdown(v: dict[str, Any]) -> str:
    rows = []
    for row in v["rows"]:
        if row.get("missing"):
            rows.append([_size(row), TASKS[row["task"]], *["missing"] * 3, *["-"] * 6])
            continue
        cost, measurable = row["interference"], row["measurable"]
        rows.append([
            _size(row), TASKS[row["task"]], f"{100 * row['base']:.2f}",
            *(figures.score(row["scores"][side]) if side in row["scores"] else "missing"
              for side in ("specialist", "joint")),
            "-" if measurable is None else "yes" if measurable else "**no**",
            "-" if cost is None else f"**{percent(cost)}** {span(row['interval'])}",
            p_value(row["p"]), p_value(row.get("p_holm")), percent(row.get("detectable")),
            str(row["seeds"]) if row["seeds"] else "-",
        ])  # fmt: skip
    head = ["size", "task", "untrained", "specialist", "joint", "measurable", "I", "p", "Holm p",
            "detectable", "seeds"]  # fmt: skip
    slopes = [
        [AXES[row["axis"]][0], TASKS[row["task"]], str(len(row["sizes"])),
         f"{row['slope']:+.2f} {span(row['interval'])}", p_value(row["p"]),
         p_value(row["p_holm"]), f"{row['detectable']:.2f}",
         "; ".join(f"{of['slope']:+.2f} {span(of['interval'])} (without {_without(of['size'])})"
                   for of in row["without"][:1]) or "-",
         *(f"{of['slope']:+.2f} {span(of['interval'])} (p {p_value(of['p'])})"
           for of in row["other"].values())]
        for row in v["slopes"]
    ]  # fmt: skip
    top = [
        "over",
        "task",
        "sizes",
        "slope",
        "p",
        "Holm p",
        "detectable",
        "flattest without one size",
        "gain-normalised",
        "nDCG@10",
    ]
    bm25 = v["references"]["bm25"]
    drawn = any(row["interval"] for row in v["rows"] if not row.get("missing"))
    body = BODY.format(
        family=sum(row.get("p") is not None for row in v["rows"]),
        bm25=" and ".join(f"{100 * bm25[task]:.2f} on {name}" for task, name in TASKS.items()),
        ceiling=f"{100 * v['references']['ceiling']['reranking']:.2f}",
        sizes=table(head, rows),
        picture=f"![scale](scale.png)\n\n*{_caption(v)}*\n\n" if drawn else "",
        slopes=table(top, slopes) if slopes else "Fewer than two sizes are measurable.\n\n",
    )
    return frame(v, reading(v), body, limits(v))


def _caption(v: dict[str, Any]) -> str:
    """What the figure shows, and only that."""
    drawn = [row for row in v["rows"] if not row.get("missing") and row["interval"]]
    several = len({row["family"] for row in drawn}) > 1
    return CAPTION.format(
        of=" of the family with the most of them; squares: another family" if several else "",
        open="" if all(row["measurable"] for row in drawn)
        else " Open: the task is not measurable there.",
    )  # fmt: skip
