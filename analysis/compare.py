"""The arms of an experiment against each other -> comparison.json, report.md and a figure.

The differences are the experiment's `contrasts`, or of all arms but the specialists to its
`reference` on all tasks. They are the family of Holm's correction.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import experiments
from analysis import arm_table, differences, disk, figures, judge, roles
from analysis.figures import METRIC, TASKS, label, p_value, table
from analysis.page import frame, limits, write_folder
from eval import inference, rule

SPECIALISTS = tuple(rule.SPECIALIST.values())
BODY = """\
## Scores

nDCG@10 × 100, {v[split]} split{seeds} ({queries}).{collapsed}

{scores}## {differences_title}

In points of nDCG@10{with_intervals}, at the seeds that both arms have; above 0 the arm is the
better one.{family}

{differences}{picture}{more}## Where the weights went

Mean expert weights over the last training batch, all layers and seeds; of a learned router by the
role that each seed gave an expert, whatever its name (a task's own is the one that its texts weigh
more, so a small gap says nothing).

{routing}
"""
SEVERAL = (
    ": the mean over {seeds} seeds ± their standard deviation, and its 95 % interval over seeds "
    "and queries"
)
COLLAPSED = (
    " Collapsed: the share of seeds in whose last step an expert carried under 1 % of the weight "
    "in more than half of the layers."
)
FAMILY = (
    "\nHolm: p adjusted over all {family} differences of this table. Detectable: the smallest "
    "difference that this run would find with 80 % power at Holm's first step."
)
CAPTION = (
    "Difference of each arm to {reference} in points of nDCG@10: mean over seeds (large dot) with "
    "its 95 % interval over seeds and queries, and single seeds (small dots), each held against "
    "the other's seed of that number; black: significant after Holm's correction, grey: not."
)
ONE_SEED = (
    "Difference of each arm to {reference} in points of nDCG@10, at one seed: nothing is tested."
)
Trials = disk.Trials


@dataclass(frozen=True)
class Section:
    """What one experiment's report has beside the comparison: text with its heading, a sentence
    for the reading, numbers for comparison.json, figures."""

    text: str
    reading: str
    numbers: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)


def write(
    folder: Path, add: Callable[[dict[str, Any], dict, Trials], Section] | None = None
) -> dict[str, Any]:
    """Write the report of runs/<experiment>/<setting> into it; return what comparison.json holds.

    Arms, seeds or a reference that are missing are shown as missing. Raises ValueError as
    `disk.load`, and if there is no trial at all.

    add: makes a section of the comparison, the baselines and the trials.
    """
    folder = folder.resolve()
    baselines, arms = disk.load(folder)
    if not arms:
        raise ValueError(f"{folder} has no trial yet: `python -m run run` makes them")
    found = compare(folder, baselines, arms)
    drawn = {"differences": draw(found)} if found["differences"] else {}
    section = add(found, baselines, arms) if add else Section("", "", {})
    found |= section.numbers | {"more": section.reading}
    page = markdown(found, section.text)
    write_folder(folder, {"comparison.json": found}, page, drawn | section.figures)
    return found


def compare(folder: Path, baselines: dict, arms: Trials) -> dict[str, Any]:
    """Every number of the report."""
    study = experiments.EXPERIMENTS[folder.parent.name]
    planned = disk.planned(folder, False)
    count = experiments.seeds(folder.parent.name, folder.name)
    y, labels = judge.arrays(baselines, arms)
    every = sorted({seed for trials in arms.values() for seed in trials} | set(range(count)))
    rows = {}
    for arm in dict.fromkeys([*planned, *arms]):
        trials = arms.get(arm, {})
        first = next(iter(trials.values()), None)
        rows[arm] = {
            "seeds": list(trials),
            "missing_seeds": [seed for seed in every if seed not in trials],
            "scores": {
                task: judge.score_row(y[task], labels[task], arm, trials, task)
                for task in TASKS
                if arm in y[task]
            },
            "tasks": _tasks(first["config"] if first else planned[arm]),
            "trainable_parameters": first["trainable_parameters"] if first else None,
            "training_seconds": judge.usual_seconds(trials),
            "experts": roles.columns(first)[0] if first else [],
            "router": first["config"]["router"] if first else None,
            "shaken": bool(first) and judge.shaken(first["config"]),
            "routing": _routing(list(trials.values())),
            "collapsed": None if (of := judge.collapsed(trials)) is None else len(of) / len(trials),
        }
    made = (
        differences.difference(arm, other, task, shows, y[task], labels[task], arms, study.paired)
        for arm, other, task, shows in _pairs(study, y)
    )
    found = differences.tested([row for row in made if row])
    files = {"baselines.json": baselines} | disk.trials_by_file(arms)
    return {
        "experiment": folder.parent.name,
        "setting": folder.name,
        "question": study.question,
        "expected": study.expected,
        "reference": study.reference,
        "split": baselines["config"]["split"],
        "arms": rows,
        "made_of": arm_table.describe(arms),
        "differences": found,
        "references": judge.references(baselines),
        "queries": {task: len(labels[task]) for task in TASKS},
        "clusters": {task: len(set(labels[task])) for task in TASKS},
        **disk.facts(files),
    }


def _tasks(config: dict) -> list[str]:
    """What is measured of an arm, by its config or its row in the study."""
    return list(config.get("scored") or config.get("tasks") or TASKS)


def _pairs(study: experiments.Experiment, y: dict) -> Iterator[tuple[str, str, str, str]]:
    """(arm, against, task, what it would show) of what there are trials for."""
    if study.contrasts:
        yield from (row for row in study.contrasts if {row[0], row[1]} <= y[row[2]].keys())
        return
    for task in TASKS:
        for arm in y[task]:
            if arm != study.reference and arm not in SPECIALISTS and study.reference in y[task]:
                yield arm, study.reference, task, ""


def _routing(trials: list[dict]) -> dict[str, list[float]]:
    """task -> mean weight of each expert in the last step, in the order of `roles.columns`."""
    last = [(trial["curve"][-1], roles.columns(trial)[1]) for trial in trials if trial["curve"]]
    return {
        task: np.mean([[line[key][i] for i in order] for line, order in last], axis=0).tolist()
        for task in TASKS
        if last and all((key := f"weights_{task}") in line for line, _ in last)
    }


def reading(v: dict[str, Any]) -> str:
    """What follows from the differences, in one paragraph."""
    shown = [row for row in v["differences"] if row.get("p_holm") is not None]
    said = []
    if not shown:
        none = "There is nothing to compare yet."
        untested = "No difference can be tested: that takes two seeds, and queries of two clusters."
        said.append(untested if v["differences"] else none)
    sure = [row for row in shown if row["p_holm"] <= inference.ALPHA]
    for row in sure:
        word = "above" if row["difference"] > 0 else "below"
        said.append(
            f"On {TASKS[row['task']]}, {label(row['arm'])} is {abs(row['difference']):.2f} points "
            f"{word} {label(row['against'])} (Holm p {p_value(row['p_holm'])})"
            f"{': ' if row['shows'] else ''}{row['shows']}."
        )
    unsure = [row for row in shown if row not in sure]
    if unsure:
        least, most = (f([row["detectable"] for row in unsure]) for f in (min, max))
        to = f" to {label(v['reference'])}" if v["reference"] else ""
        many = f"{len(unsure)} differences" if len(unsure) > 1 else "difference"
        seen = f"{least:.1f} to {most:.1f}" if least < most else f"{least:.1f}"
        said.append(
            f"The {'other ' if sure else ''}{many}{to} {'are' if len(unsure) > 1 else 'is'} not "
            f"significant (detectable: {seen} points)."
        )
    if lost := [label(arm) for arm, row in v["arms"].items() if row["collapsed"] == 1]:
        said.append(
            f"In every seed of {', '.join(lost)} an expert carries under 1 % of the weight in most "
            "layers in the end."
        )
    for task in TASKS:
        best = _best(v, task)
        if best:
            said.append(f"The highest mean on {TASKS[task]} is that of {label(best)}.")
    return " ".join([*said, v["more"]] if v.get("more") else said)


def bars(v: dict[str, Any], against: str) -> dict[tuple[str, str], tuple[float, float]]:
    """(arm, task) -> the interval of its difference to an arm, from the difference, in points: a
    bar around the arm's own mean that holds the other's mean where the interval holds 0. Where the
    two have other seeds, whose means would lie elsewhere, there is none."""
    seeds = {arm: row["seeds"] for arm, row in v["arms"].items()}
    return {
        (row["arm"], row["task"]): tuple(end - row["difference"] for end in row["interval"])
        for row in v["differences"]
        if row["against"] == against and row["interval"] and seeds[row["arm"]] == seeds[against]
    }


def _best(v: dict[str, Any], task: str) -> str | None:
    scores = {a: r["scores"][task][METRIC] for a, r in v["arms"].items() if task in r["scores"]}
    return max(scores, key=lambda arm: scores[arm]) if scores else None


def markdown(v: dict[str, Any], more: str = "") -> str:
    """more: sections with their headings."""
    reference = label(v["reference"]) if v["reference"] else "the one it is held against"
    shown = {len(row["seeds"]) for row in v["arms"].values() if row["seeds"]}
    family = sum(row["p"] is not None for row in v["differences"])
    caption = CAPTION if max(shown) > 1 else ONE_SEED
    body = BODY.format(
        v=v,
        seeds=SEVERAL.format(seeds=" or ".join(map(str, sorted(shown))))
        if max(shown) > 1
        else "; one seed each, so no interval and no test",
        collapsed=COLLAPSED * any(row["collapsed"] is not None for row in v["arms"].values()),
        with_intervals=" with 95 % intervals over seeds and queries" if family else "",
        queries=", ".join(
            f"{v['queries'][task]:,} queries in {v['clusters'][task]} clusters for {name}"
            for task, name in TASKS.items()
        ),
        scores=scores_table(v),
        differences_title=f"Differences to {reference}" if v["reference"] else "Contrasts",
        more=more,
        family=FAMILY.format(family=family) if family else "",
        differences=differences_table(v),
        picture=f"![differences](differences.png)\n\n*{caption.format(reference=reference)}*\n\n"
        if v["differences"]
        else "",
        routing=_weights(v),
    )
    return frame(v, reading(v), body, limits(v))


ARMS = """## What the arms score

nDCG@10 × 100, {v[split]} split: mean over seeds ± their standard deviation, with the 95 % interval
over seeds and queries.

{scores}{differences}"""


def arms_section(v: dict[str, Any]) -> str:
    """What the arms score, for reports whose subject is something else."""
    return ARMS.format(v=v, scores=scores_table(v), differences=differences_table(v))


def scores_table(v: dict[str, Any]) -> str:
    rows = []
    for name, text in figures.REFERENCE_ROWS.items():
        found = v["references"][name]
        cells = [f"{100 * found[task]:.2f}" if task in found else "-" for task in TASKS]
        rows.append([text, *cells, "-", "-", "-", "-"])
    for arm, row in v["arms"].items():
        if not row["seeds"]:
            continue  # named under what could not be concluded
        absent = {task: "missing" if task in row["tasks"] else "-" for task in TASKS}
        cells = [
            figures.score(row["scores"][task]) if task in row["scores"] else absent[task]
            for task in TASKS
        ]
        count, seconds = row["trainable_parameters"], row["training_seconds"]
        rows.append([
            label(arm), *cells, str(len(row["seeds"])),
            "-" if row["collapsed"] is None else f"{100 * row['collapsed']:.0f} %",
            "-" if count is None else f"{count:,}",
            "-" if seconds is None else f"{seconds:,.0f}",
        ])  # fmt: skip
    head = ["", *TASKS.values(), "seeds", "collapsed", "trainable parameters", figures.SECONDS]
    return table(head, rows) + arm_table.markdown(v["made_of"])


def differences_table(v: dict[str, Any]) -> str:
    if v["differences"]:
        return differences.markdown(v["differences"])
    name = label(v["reference"])
    return f"{name} has no trial to hold against.\n\n" if name else "No pair has trials yet.\n\n"


def _weights(v: dict[str, Any]) -> str:
    rows = [
        [label(arm), TASKS[task], ", ".join(f"{name} {w:.2f}" for name, w in
                                            zip(row["experts"], weights, strict=True))]
        for arm, row in v["arms"].items()
        for task, weights in row["routing"].items()
    ]  # fmt: skip
    return table(["arm", "task", "weights"], rows) if rows else "No arm has a router.\n"


def draw(v: dict[str, Any]) -> Figure:
    """A panel a task: each arm's difference to the reference."""
    with matplotlib.rc_context(figures.STYLE):
        count = max(sum(row["task"] == task for row in v["differences"]) for task in TASKS)
        deep = 0.32 if any(row["shows"] for row in v["differences"]) else 0.22
        size = (figures.WIDTH, deep * count + 0.85)
        figure = Figure(figsize=size, layout="constrained")
        for axes, task in zip(figure.subplots(1, 2), TASKS, strict=True):
            _panel(axes, [row for row in v["differences"] if row["task"] == task], task)
            against = f" against {label(v['reference'])}" if v["reference"] else ", difference"
            axes.set_xlabel(f"nDCG@10 (× 100){against}")
        return figure


def _panel(axes: Axes, rows: list[dict[str, Any]], task: str) -> None:
    for at, row in enumerate(rows):
        colour = figures.mark(row.get("p_holm"))
        if row["interval"]:
            axes.plot(row["interval"], [at, at], color=colour, linewidth=1.2)
        axes.plot(row["difference"], at, "o", color=colour, markersize=4.2)
        if len(row["by_seed"]) > 1:
            axes.plot(row["by_seed"], [at + 0.28] * len(row["by_seed"]), "o", color=colour,
                      markersize=2.2, alpha=0.6, markeredgewidth=0)  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.6, zorder=0)
    axes.set_title(TASKS[task].capitalize(), fontweight="bold")
    names = [
        label(row["arm"]) + (f"\n− {label(row['against'])}" if row["shows"] else "") for row in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def summary(v: dict[str, Any]) -> str:
    """The reading, for a terminal."""
    done = sum(len(row["seeds"]) for row in v["arms"].values())
    return f"{v['experiment']} {v['setting']}, {done} trials: {reading(v)}"
