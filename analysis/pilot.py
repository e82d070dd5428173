"""What a pilot found: one setting changed at a time, each specialist on dev -> pilot.json,
report.md and a figure.

The rule, fixed before the run: a setting can be taken if both specialists gain at least `ENOUGH`
over their own untrained bases and training them in a kill gate takes at most `MOST` times the work
that it takes in the setting as it is. That one stays if it can be taken: a pilot settles that the
tasks are measurable, and a higher score is no reason to change what the arms are compared in.

Work is counted, not timed: a shared machine's speed drifts by more than what sets settings apart.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import experiments
import scales
from analysis import disk, figures
from analysis.figures import METRIC, TASKS, table
from analysis.page import provenance, warnings, write_folder
from eval import rule

AS_IS = "as-is"
ENOUGH = 2 * rule.MEASURABLE_GAIN  # one seed has to leave a margin
MOST = 1.2  # fixed when the CPU default's kill gate was taken to need 25 of its 30 minutes
PAGE = """# Pilot: {v[setting]}

**Question.** {v[question]}

**Expected, before the first run.** {v[expected]}
{notes}
## Reading

{reading}

## What was tried

nDCG@10 × 100 on the {v[split]} split of {v[data][name]} ({queries}),
{seeds}: the untrained base of that very setting, the specialist, and what training gained. A row
changes one thing of the setting of the kill gate, which is the row "as-is"; what a change does not
touch is a dash, and counts as it is there. Work: of training both specialists in a kill gate, over
that of "as-is". Counted are the tokens of all steps, times the passes of each through layers:
forward and backward from the first layer with experts up, and 1/{readers} of a pass below it, where
nothing learns and what comes out is kept for {readers} trials. Time: what training took here, for
the record; a shared machine's speed drifts. Can be taken, by the rule that was fixed before the
run: both gains at least {enough:.0f}.00, twice what the kill gate asks for, and a work of at most
{most}, fixed when the CPU default's kill gate was taken to need 25 of its 30 minutes. A margin of
twice the gain is asked for because a seed may do a point or two. BM25 has {bm25}.

{rows}{picture}## How it learns

Mean training loss in the first, the middle and the last tenth of the steps. The losses of "bce" are
of another kind, and those of another number of tokens are of other texts.

{losses}## Provenance

{provenance}
"""
CAPTION = (
    "nDCG@10 on dev of the untrained base (open) and after training (filled), and the work that "
    "both take over that of the setting as it is; blue: can be taken by the rule, orange: cannot, "
    "grey: a specialist is missing; dashed: BM25, and the most work."
)
MISSING = "Missing: {}.\n\n"


def write(folder: Path) -> dict[str, Any]:
    """Write the report of runs/pilot/<setting> into it; return what pilot.json holds.

    Raises ValueError as `disk.load`, and if there is no trial, or one that has no tokens.
    """
    folder = folder.resolve()
    baselines, arms = disk.load(folder)
    if not arms:
        raise ValueError(f"{folder} has no trial yet: `make pilot` makes them")
    found = study(folder, baselines, arms)
    write_folder(folder, {"pilot.json": found}, markdown(found), {"pilot": draw(found)})
    return found


def study(folder: Path, baselines: dict, arms: disk.Trials) -> dict[str, Any]:
    """Every number of the report."""
    scale = folder.name.split("-")[0]
    planned, files, rows = disk.planned(folder), {"baselines.json": baselines}, {}
    readers = _readers(scale)
    for name, change in scales.PILOT.items():
        tasks = {}
        for task, special in rule.SPECIALIST.items():
            arm = f"{special}-{name}"
            if arm not in arms:
                continue
            of = experiments.baselines_name(experiments.size_of(folder.parent.name, arm, scale))
            files[of] = disk.read(folder / of)
            files |= {f"{arm}/seed{seed}.json": trial for seed, trial in arms[arm].items()}
            tasks[task] = _task(files[of], arms[arm], task, readers)
        if tasks:
            whole = all(f"{s}-{name}" in arms or f"{s}-{name}" not in planned
                        for s in rule.SPECIALIST.values())  # fmt: skip
            rows[name] = {"change": change, "tasks": tasks, "whole": whole}
    _judge(rows)
    return {
        "setting": folder.name,
        "question": experiments.EXPERIMENTS[folder.parent.name].question,
        "expected": experiments.EXPERIMENTS[folder.parent.name].expected,
        "rows": rows,
        "readers": readers,
        "seeds": sorted({len(t["seeds"]) for row in rows.values() for t in row["tasks"].values()}),
        "missing": [arm for arm in planned if arm not in arms],
        "bm25": {task: _mean(baselines["bm25"][task]) for task in TASKS},
        "queries": {task: len(baselines["bm25"][task]) for task in TASKS},
        "split": baselines["config"]["split"],
        **disk.facts(files),
    }


def _task(baselines: dict, trials: dict[int, dict], task: str, readers: int) -> dict[str, Any]:
    """One specialist in one setting."""
    untrained = _mean(baselines["untrained"][task])
    score = float(np.mean([_mean(trial["scores"][task]) for trial in trials.values()]))
    losses = np.mean([[line[f"loss_{task}"] for line in t["curve"]] for t in trials.values()], 0)
    tenth, n = max(1, len(losses) // 10), len(losses)
    return {
        "untrained": untrained,
        "score": score,
        "gain": score - untrained,
        "losses": [
            float(losses[at : at + tenth].mean()) for at in (0, (n - tenth) // 2, n - tenth)
        ],
        "work": float(np.mean([_work(trial, readers) for trial in trials.values()])),
        "seconds": float(np.mean([trial["seconds"]["train"] for trial in trials.values()])),
        "seeds": list(trials),
    }


def _mean(scores: dict[str, dict[str, float]]) -> float:
    return float(np.mean([row[METRIC] for row in scores.values()]))


def _readers(scale: str) -> int:
    """How many trials of a kill gate train on a task, and so read its texts: as many for either."""
    arms = [experiments.config("kill_gate", arm, scale, 0) for arm in experiments.arms("kill_gate")]
    return experiments.seeds("kill_gate", scale) * sum("embedding" in arm.tasks for arm in arms)


def _work(trial: dict[str, Any], readers: int) -> float:
    """Passes of a token through a layer in training, those below the experts shared by `readers`
    trials. The backward pass counts like the forward one: it multiplies by each frozen weight once.
    """
    if "tokens" not in trial["curve"][0]:
        raise ValueError(
            f"{trial['arm']} was trained before tokens were counted: delete it, and run again"
        )
    frozen = trial["config"]["adapter_layers"]
    shared = frozen / (readers if trial["config"]["prefix"] else 1)
    return (shared + 2 * (trial["layers"] - frozen)) * sum(
        line["tokens"] for line in trial["curve"]
    )


def _judge(rows: dict[str, dict[str, Any]]) -> None:
    """Add `work`, `time` and `taken` to each row: None where a specialist is missing, there or as
    is."""
    as_is = rows.get(AS_IS, {"tasks": {}})["tasks"]
    for row in rows.values():
        row["work"] = row["time"] = row["taken"] = None
        if row.pop("whole") and as_is.keys() >= TASKS.keys():
            both = as_is | row["tasks"]
            work, time = (
                sum(task[key] for task in both.values()) / sum(t[key] for t in as_is.values())
                for key in ("work", "seconds")
            )
            enough = all(task["gain"] >= ENOUGH for task in both.values())
            row |= {"work": work, "time": time, "taken": enough and work <= MOST}


def reading(v: dict[str, Any]) -> str:
    """The rule, applied."""
    rows = v["rows"]
    as_is = rows.get(AS_IS)
    if as_is is None or as_is["taken"] is None:
        return "The setting as it is was not run with both specialists, so nothing is settled."
    gains = " and ".join(
        f"{100 * as_is['tasks'][task]['gain']:.1f} on {name}" for task, name in TASKS.items()
    )
    fits = [name for name, row in rows.items() if row["taken"] and name != AS_IS]
    if as_is["taken"]:
        text = f"The setting stays: training gains {gains}."
        text += f" Could be taken as well: {', '.join(fits) or 'none'}."
    elif fits:
        best = min(fits, key=lambda name: rows[name]["work"])
        text = f"The setting cannot be taken (it gains {gains}); the cheapest that can: {best}."
    else:
        text = f"The setting cannot be taken (it gains {gains}), and no other that was tried."
    out = [name for name, row in rows.items() if row["taken"] is False and name != AS_IS]
    long = [f"{n} ({rows[n]['work']:.1f} times)" for n in out if rows[n]["work"] > MOST]
    weak = [f"{name} ({', '.join(_weak(rows[name]))})" for name in out if _weak(rows[name])]
    for names, why in ((long, "Take too much work"), (weak, "Gain too little")):
        if names:
            text += f" {why}: {', '.join(names)}."
    return text


def _weak(row: dict[str, Any]) -> list[str]:
    """The tasks, by name, in which the row's own specialist gains too little."""
    return [TASKS[task] for task, found in row["tasks"].items() if found["gain"] < ENOUGH]


def markdown(v: dict[str, Any]) -> str:
    """report.md."""
    rows, losses = [], []
    for name, row in v["rows"].items():
        cells = [name, figures.plain(row["change"]) if row["change"] else "nothing"]
        for task in TASKS:
            found = row["tasks"].get(task)
            keys = ("untrained", "score", "gain")
            cells += [f"{100 * found[key]:.2f}" if found else "-" for key in keys]
        cost = ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("work", "time")]
        taken = {True: "**yes**", False: "no", None: "-"}[row["taken"]]
        rows.append([*cells, *cost, taken])
        means = [
            f"{mean:.2f}" if mean is not None else "-"
            for task in TASKS
            for mean in row["tasks"].get(task, {"losses": [None] * 3})["losses"]
        ]
        losses.append([name, *means])
    head = [f"{name}: {what}" for name in TASKS.values()
            for what in ("untrained", "specialist", "gain")]  # fmt: skip
    tenths = [f"{name}: {what}" for name in TASKS.values() for what in ("first", "middle", "last")]
    missing = MISSING.format(", ".join(v["missing"])) if v["missing"] else ""
    shown = table(["setting", "changed", *head, "work", "time", "can be taken"], rows)
    return PAGE.format(
        v=v,
        notes=warnings(v),
        reading=reading(v),
        queries=", ".join(f"{v['queries'][t]:,} queries for {n}" for t, n in TASKS.items()),
        seeds=" or ".join(map(str, v["seeds"])) + (" seed" if v["seeds"] == [1] else " seeds"),
        enough=100 * ENOUGH,
        most=MOST,
        readers=v["readers"],
        bm25=" and ".join(f"{100 * v['bm25'][t]:.2f} on {n}" for t, n in TASKS.items()),
        rows=shown + missing,
        picture=f"![pilot](pilot.png)\n\n*{CAPTION}*\n\n",
        losses=table(["setting", *tenths], losses),
        provenance=provenance(v),
    )


def draw(v: dict[str, Any]) -> Figure:
    """Untrained and trained scores of each setting, and the work."""
    height = 0.9 + 0.2 * len(v["rows"])
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH, height), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
        for axes, task in zip(panels, TASKS, strict=False):
            _scores(axes, v, task)
        _works(panels[2], v)
        panels[0].set_yticks(range(len(v["rows"])), list(v["rows"]))
        panels[0].invert_yaxis()
    return figure


def _colour(row: dict[str, Any]) -> str:
    return {True: figures.EXPERTS[0], False: figures.EXPERTS[1], None: figures.GREY}[row["taken"]]


def _scores(axes: Axes, v: dict[str, Any], task: str) -> None:
    for at, row in enumerate(v["rows"].values()):
        if found := row["tasks"].get(task):
            ends = [100 * found["untrained"], 100 * found["score"]]
            axes.plot(ends, [at, at], color=figures.GREY, linewidth=0.8, zorder=1)
            axes.scatter(ends[:1], [at], 16, "white", edgecolors=_colour(row), zorder=2)
            axes.scatter(ends[1:], [at], 16, _colour(row), zorder=2)
    axes.axvline(100 * v["bm25"][task], color=figures.GREY, linestyle="--", linewidth=0.8)
    axes.set(xlabel="nDCG@10 × 100", xlim=(0, None))
    axes.set_title(TASKS[task].capitalize(), fontweight="bold")


def _works(axes: Axes, v: dict[str, Any]) -> None:
    for at, row in enumerate(v["rows"].values()):
        if row["work"] is not None:
            axes.barh(at, row["work"], 0.5, color=_colour(row))
    axes.axvline(MOST, color=figures.GREY, linestyle="--", linewidth=0.8)
    axes.set_xlabel("work of training over as-is")
    axes.set_title("Both", fontweight="bold")


def summary(v: dict[str, Any]) -> str:
    """For a terminal."""
    text = f"pilot {v['setting']}: {reading(v)}"
    return text + f"\nmissing: {', '.join(v['missing'])}" if v["missing"] else text
