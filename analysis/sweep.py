"""What a sweep chose: for each arm the learning rate and clipping that score best on dev.

The rule, fixed before the run: an arm takes the setting with the highest nDCG@10, averaged over
its tasks and seeds; of equal ones the lowest learning rate, then the tightest clipping.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

import experiments
from analysis import disk, judge
from analysis.figures import METRIC, REFERENCE_ROWS, TASKS, label, table
from analysis.page import provenance, warnings, write_folder

SWEPT = ("learning_rate", "clip")
PAGE = """# {title}

{question}
{notes}
Scores are nDCG@10 × 100 on the {split} split ({queries}), after {steps} steps.
Gradient norms are the median before clipping. The rule, fixed before the run: an arm takes the
setting with the highest mean over its tasks (bold); of equal ones the lowest learning rate, then
the tightest clipping. {seeds}: the choice settles a sensible setting for each arm and claims
nothing about which is best.

{tables}Chosen, as it stands in `scales.TUNED`:

```python
{chosen}
```

## Provenance

{provenance}
"""


def write(folder: Path) -> dict[str, Any]:
    """Write choice.json and report.md into `folder` (runs/sweep/<setting>); return the choice.

    Raises ValueError as `disk.load`, if there is no trial, or one of an arm that is not swept.
    """
    baselines, arms = disk.load(folder)
    if not arms:
        raise ValueError(f"{folder} has no trial yet: `make sweep` makes them")
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in experiments.ARMS}
    for name, trials in arms.items():
        arm = next((a for a in experiments.ARMS if name.startswith(f"{a}-lr")), None)
        if arm is None:
            raise ValueError(f"{folder / name} is of no arm of the sweep: move it away")
        rows[arm].append(_row(trials))
    chosen = {arm: {k: _best(found)[k] for k in SWEPT} for arm, found in rows.items() if found}
    files = {"baselines.json": baselines} | disk.trials_by_file(arms)
    choice = {
        "setting": folder.resolve().name,
        "chosen": chosen,
        "rows": rows,
        "missing": [a for a in experiments.EXPERIMENTS["sweep"].arms if a not in arms],
        "split": baselines["config"]["split"],
        **disk.facts(files),
    }
    steps = next(iter(next(iter(arms.values())).values()))["config"]["steps"]
    write_folder(folder, {"choice.json": choice}, _markdown(choice, baselines, steps), {})
    return choice


def _row(trials: dict[int, dict]) -> dict[str, Any]:
    """One setting: what was swept, the scores by task and their mean, over its seeds."""
    first = next(iter(trials.values()))
    scores = {
        task: float(
            np.mean([q[METRIC] for t in trials.values() for q in t["scores"][task].values()])
        )
        for task in first["scores"]
    }
    means = [
        np.mean([np.mean([q[METRIC] for q in rows.values()]) for rows in t["scores"].values()])
        for t in trials.values()
    ]
    norms = [line["gradient_norm"] for trial in trials.values() for line in trial["curve"]]
    return {
        **{key: first["config"][key] for key in SWEPT},
        "seeds": len(trials),
        "scores": scores,
        "mean": float(np.mean(list(scores.values()))),
        "seed_sd": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        "gradient_norm": float(np.median(norms)),
    }


def _best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return min(rows, key=lambda row: (-row["mean"], *(row[key] for key in SWEPT)))


def _markdown(choice: dict[str, Any], baselines: dict, steps: int) -> str:
    tables = ""
    for arm, rows in choice["rows"].items():
        if not rows:
            continue
        tasks, best = list(rows[0]["scores"]), _best(rows)
        cells = [
            [
                f"{row['learning_rate']:g}",
                f"{row['clip']:g}",
                *(f"{100 * row['scores'][task]:.2f}" for task in tasks),
                f"**{100 * row['mean']:.2f}**" if row is best else f"{100 * row['mean']:.2f}",
                f"{row['gradient_norm']:.2f}",
            ]
            for row in sorted(rows, key=lambda row: [row[key] for key in SWEPT])
        ]
        known = [
            [REFERENCE_ROWS[name], "-", *(f"{100 * of[t]:.2f}" if t in of else "-" for t in tasks),
             "-", "-"]
            for name, of in judge.references(baselines).items() if of.keys() & set(tasks)
        ]  # fmt: skip
        head = ["learning rate", "clip", *(TASKS[task] for task in tasks), "mean", "gradient norm"]
        tables += f"**{label(arm)}**\n\n{table(head, [*known, *cells])}"
    if choice["missing"]:
        tables += f"Missing: {', '.join(choice['missing'])}.\n\n"
    queries = {task: len(baselines["untrained"][task]) for task in TASKS}
    seeds = sorted({row["seeds"] for rows in choice["rows"].values() for row in rows})
    return PAGE.format(
        title=f"Sweep: {choice['setting']}",
        question=experiments.EXPERIMENTS["sweep"].question,
        split=choice["split"],
        queries=", ".join(f"{queries[task]:,} queries for {name}" for task, name in TASKS.items()),
        steps=steps,
        seeds="One seed a setting, so what another seed would do is not known"
        if seeds == [1]
        else f"{' or '.join(map(str, seeds))} seeds a setting, whose scores differ by an SD of "
        f"{_seed_sd(choice):.2f} in the mean",
        tables=tables,
        chosen=_literal(choice),
        notes=warnings(choice),
        provenance=provenance(choice),
    )


def _seed_sd(choice: dict[str, Any]) -> float:
    """Of a setting's mean score over seeds, in points; the mean over settings with several."""
    known = [row["seed_sd"] for rows in choice["rows"].values() for row in rows
             if row["seed_sd"] is not None]  # fmt: skip
    return 100 * float(np.mean(known)) if known else 0.0


def _literal(choice: dict[str, Any]) -> str:
    """The row of `scales.TUNED` as Python."""
    rows = [f'    "{arm}": {json.dumps(values)},' for arm, values in choice["chosen"].items()]
    return "\n".join([f'"{choice["setting"]}": {{', *rows, "},"])


def summary(choice: dict[str, Any]) -> str:
    """The choice for a terminal; the report has it as it stands in `scales.TUNED`."""
    chosen = "; ".join(
        f"{label(arm)} {values['learning_rate']:g} and {values['clip']:g}"
        for arm, values in choice["chosen"].items()
    )
    text = f"sweep {choice['setting']}: learning rate and clipping of each arm: {chosen}."
    missing = f"\nmissing: {', '.join(choice['missing'])}"
    return text + missing if choice["missing"] else text
