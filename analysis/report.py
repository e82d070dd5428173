"""A setting's trials -> verdict.json, report.md and figures, written beside them.

`judge` turns the trials into one dict, with every number from eval.stats; what is printed comes
from that dict alone. In it scores lie in [0, 1], interference is in % of the specialist's score,
gain-normalised interference and won_back are fractions, differences are in points (0.01 nDCG).
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import experiments
from analysis import figures
from analysis.figures import METRIC, METRICS, REFERENCE_ROWS, TASKS, label, span
from eval import stats

SPECIALIST = stats.SPECIALIST
JOINT, MOE = "joint-single", "joint-moe"
NEEDED = (*SPECIALIST.values(), JOINT)  # without all of these there is no verdict
RIVALS = (MOE, "joint-2r", "joint-3r", "uniform-moe", "oracle-moe")  # may win back the loss
SAME_SIZE = ("joint-3r", "uniform-moe")  # controls with Joint-MoE's parameters but no routing
ORIGIN = ("commit", "sources", "device", "versions")  # one of each, or the report warns
DECISIONS = ("proceed", "pivot", "more_seeds", "inconclusive")
PAGE = """# {title}

{v[question]}
{notes}
## Verdict

**{headline}** Supported by the statistics: **{supported}**.

{reading}

Reason: {v[reason]}

## Scores

nDCG@10 × 100, {v[config][split]} split: the mean over seeds ± their standard deviation, and its
95 % interval over seeds and queries. Retrieval has {v[queries][embedding]:,} queries in
{v[clusters][embedding]} clusters, reranking {v[queries][reranking]:,} in {v[clusters][reranking]},
on {v[documents]:,} documents.

{arms}
## Interference

I = 100 (specialist - joint) / specialist, in % of nDCG@10; below 0 the joint arm is the better one.

{effects}
### What Joint-MoE wins back

{won_back}

### The instrument's own zero (A/A)

{aa}
## How to read it

The rule, fixed before the run:

> under 1 % on both tasks, pivot; 2 % or more on either, proceed; between, more seeds (3, then 6,
> then 9, with alpha spending; then "inconclusive").

It is a point rule, which noise alone can satisfy, so read first whether the statistics support it.
Seeds and queries are crossed, queries of one domain are resampled together, the p of two tasks are
adjusted after Holm, and pivot needs an equivalence test within ± 2 %. Gain-normalised I divides by
what training gained the specialist over the untrained base. A task on which that gain is under 5.00
is not measurable, which is not "no interference".

What each decision leads to:

- **proceed**{proceed}: there is interference to study: where it arises (layer by layer, gradients
  of one task against the other's) and what undoes it (routers, ranks, mixtures).
- **pivot**{pivot}: why does none emerge? Do both tasks live in one subspace of the adapter; is
  there capacity to spare (lower ranks, smaller bases would tell); are the data too alike or too
  few? And the efficiency question: what does one resident model instead of two save in memory,
  loading and throughput at equal quality?
- **more_seeds**{more_seeds}: the same command with `SEEDS=6`, then `SEEDS=9`; finished trials stay.
- **inconclusive**{inconclusive}: no claim either way. Mend the measurement first: train longer
  where a task is not measurable, take more queries or collections where an interval is wide.

## What could not be concluded

{limits}

## Training

{curves}All files together: {v[seconds]:,.0f} s; peak memory of a process: {peak:.2f} GB.

## Provenance

{provenance}
"""


def write(folder: Path) -> dict[str, Any]:
    """Write verdict.json, report.md and the figures into `folder`; return the verdict.

    folder: runs/<experiment>/<setting>, with baselines.json and <arm>/seed<k>.json. All is written
    aside first and then renamed, so a stop on the way leaves the old report. A missing arm or seed
    is shown as missing; `decision` is None where a needed one is. Raises ValueError for missing
    baselines, a damaged file, or a trial on another base, other data or other queries than theirs.
    """
    folder = folder.resolve()
    baselines, arms = load(folder)
    verdict = judge(folder, baselines, arms)
    part = folder / ".report.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    drawn = figures.write(part, verdict, arms)
    (part / "report.md").write_text(markdown(verdict, drawn), encoding="utf-8")
    (part / "verdict.json").write_text(json.dumps(verdict, indent=1, allow_nan=False) + "\n")
    for path in sorted(part.iterdir()):
        os.replace(path, folder / path.name)
    part.rmdir()
    for stale in (f"{n}.{k}" for n in figures.NAMES if n not in drawn for k in ("png", "svg")):
        (folder / stale).unlink(missing_ok=True)
    return verdict


def load(folder: Path) -> tuple[dict, dict[str, dict[int, dict]]]:
    """(baselines, arm -> seed -> trial), arms in the study's order; raises as `write`."""
    baselines = _read(folder / "baselines.json")
    found: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob("*/seed[0-9]*.json")):
        trial = _read(path)
        same = {name: trial[name] == baselines[name] for name in ("base", "data")}
        for task, rows in trial["scores"].items():
            same[f"{task} queries"] = rows.keys() == baselines["untrained"][task].keys()
        if other := [name for name, agrees in same.items() if not agrees]:
            what = f"has other {' and '.join(other)} than baselines.json"
            raise ValueError(f"{path} {what}: they cannot be compared, so run one of them again")
        found.setdefault(path.parent.name, {})[int(path.stem.removeprefix("seed"))] = trial
    order = dict.fromkeys([*_planned(folder.parent.name), *found])
    return baselines, {arm: dict(sorted(found[arm].items())) for arm in order if arm in found}


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: `python -m run run ...` makes it") from None
    except ValueError as problem:
        raise ValueError(f"{path} is damaged ({problem}): remove it, then run it again") from None


def _planned(experiment: str, extras: bool = True) -> dict[str, dict]:
    """The arms of an experiment, with controls and A/A or without; none if it is not known."""
    known = experiment in experiments.EXPERIMENTS
    return experiments.arms(experiment, extras, extras) if known else {}


def judge(folder: Path, baselines: dict, arms: dict[str, dict[int, dict]]) -> dict[str, Any]:
    """What verdict.json holds; the numbers of `tasks` are those of `stats.verdict`.

    Compared are the seeds that all needed arms have; another arm enters with those of them that it
    has. Seed variance is pooled over the rule's own arms, plus the arm in question where a row is
    about another: so the verdict is the same whichever controls were run.
    """
    experiment = folder.parent.name
    study = experiments.EXPERIMENTS.get(experiment)
    present = [set(arms[arm]) for arm in NEEDED if arm in arms]
    common = sorted(set.intersection(*present)) if present else []
    used = {a: {s: t for s, t in arms[a].items() if not common or s in common} for a in arms}
    base, labels, y, rule = {}, {}, {}, {}
    for task in TASKS:
        rows = baselines["untrained"][task]
        base[task] = np.array([row[METRIC] for row in rows.values()])
        labels[task] = [baselines["clusters"][query] for query in rows]
        y[task] = {
            arm: np.array([[t["scores"][task][q][METRIC] for q in rows] for t in trials.values()])
            for arm, trials in used.items()
            if trials and all(task in trial["scores"] for trial in trials.values())
        }
        rule[task] = {a: y[task][a] for a in (SPECIALIST[task], JOINT, MOE) if a in y[task]}
    wide = [t for t in TASKS if len(set(labels[t])) > 1]  # one cluster gives no interval
    ready = [t for t in wide if common and {SPECIALIST[t], JOINT} <= rule[t].keys()]
    found: dict[str, Any] = {"seeds": len(common), "alpha": None, "tasks": {}}
    if ready:
        found = stats.verdict({t: rule[t] for t in ready}, base, labels)
    if len(ready) < len(TASKS):
        why = "the needed arms have no seed in common, or all queries are of one cluster"
        if absent := [arm for arm in NEEDED if arm not in arms]:
            why = f"no trial of {', '.join(absent)}"
        found |= {"decision": None, "supported": False, "reason": f"{why}."}
    # The A/A arm takes the joint arm's place, under a name that both tasks share.
    twin = {task: y[task].get(f"{SPECIALIST[task]}-aa") for task in ready}
    twins = {task: {**rule[task], "aa": aa} for task, aa in twin.items() if aa is not None}
    aa = stats.verdict(twins, base, labels, joint="aa", moe="")["tasks"] if twins else {}

    def row(arm: str) -> dict[str, Any]:
        """One arm in the tables."""
        trials, scores, against = used.get(arm, {}), {}, {}
        for task in (task for task in TASKS if arm in y[task]):
            of, means = {**rule[task], arm: y[task][arm]}, y[task][arm].mean(axis=1)
            interval = stats.arm_mean(of, labels[task], arm).interval if task in wide else None
            scores[task] = {
                **_means([r for t in trials.values() for r in t["scores"][task].values()]),
                "by_seed": means.tolist(),
                "seed_sd": float(means.std(ddof=1)) if len(means) > 1 else None,
                "interval": interval,
            }
            if task in ready and arm not in NEEDED and not arm.endswith("-aa"):
                against[task] = _against(of, labels[task], arm, task, found["tasks"][task])
        first = next(iter(trials.values()), {})
        train = [t["seconds"]["train"] for t in trials.values()]
        return {
            "tasks": first["config"]["tasks"] if trials else planned[arm].get("tasks", list(TASKS)),
            "seeds": list(trials),
            "missing_seeds": [s for s in every if s not in arms.get(arm, {})],
            "scores": scores,
            "against_joint": against,
            "trainable_parameters": first.get("trainable_parameters"),
            "training_seconds": float(np.mean(train)) if train else None,
        }

    planned, every = _planned(experiment), sorted({s for a in arms.values() for s in a})
    files = {"baselines.json": baselines} | {
        f"{arm}/seed{seed}.json": trial for arm in used for seed, trial in used[arm].items()
    }
    return {
        "experiment": experiment,
        "setting": folder.name,
        "question": study.question if study else "",
        **{key: found[key] for key in ("decision", "supported", "reason", "seeds", "alpha")},
        "seeds_compared": common,
        "seeds_planned": study.seeds if study else None,
        **{"tasks": found["tasks"], "aa": aa},
        "arms": {arm: row(arm) for arm in dict.fromkeys([*_planned(experiment, False), *arms])},
        "references": {
            name: {task: _means(list(rows.values())) for task, rows in baselines[name].items()}
            for name in REFERENCE_ROWS
        },
        "queries": {task: len(base[task]) for task in TASKS},
        "clusters": {task: len(set(labels[task])) for task in TASKS},
        "documents": baselines["pool"],
        **{"base": baselines["base"], "data": baselines["data"]},
        "config": next(iter(used.get(JOINT, {}).values()), baselines)["config"],
        "seconds": sum(sum(file["seconds"].values()) for file in files.values()),
        "peak_bytes": max(file["peak_bytes"] for file in files.values()),
        **_origin(files),
        "trials": list(files),
    }


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {m: float(np.mean([row[m] for row in rows])) for m in METRICS}


def _against(
    y: stats.Arms, labels: list[str], arm: str, task: str, found: dict[str, Any]
) -> dict[str, Any]:
    """An arm's difference to the joint arm, and what it wins back where that can be told."""
    difference, back = stats.arm_difference(y, labels, arm, JOINT), None
    if arm in RIVALS and found["interval"] and found["interval"][0] > 0:
        back = stats.won_back(y, labels, SPECIALIST[task], JOINT, arm)
    return {
        **{"difference": difference.value, "interval": difference.interval},
        "p": difference.p if difference.interval else None,
        "won_back": back and back.value,
        "won_back_interval": back and back.interval,
    }


def _origin(files: dict[str, dict]) -> dict[str, Any]:
    """Where the results come from, and a warning where that is not one place."""
    facts = [{**file, "commit": file["git"]["commit"]} for file in files.values()]
    seen = {name: sorted({json.dumps(fact[name]) for fact in facts}) for name in ORIGIN}
    warnings = [
        f"the files were made with {len(values)} different values of {name} (see Provenance)."
        for name, values in seen.items()
        if len(values) > 1
    ]
    if dirty := sum(fact["git"]["dirty"] for fact in facts):
        warnings.append(f"{dirty} of the {len(files)} files were made with uncommitted changes.")
    return {
        "origin": {k: [json.loads(x) for x in v] for k, v in seen.items()},
        "warnings": warnings,
    }


def headline(verdict: dict[str, Any]) -> str:
    """The verdict in one plain sentence."""
    size = {t: round(f["interference"], 9) for t, f in verdict["tasks"].items() if f["measurable"]}
    told = {t: f"{value:+.2f} % on {TASKS[t]}" for t, value in size.items()}
    large = " and ".join(told[t] for t in size if size[t] >= stats.PROCEED_FROM)
    lost = " and ".join(TASKS[t] for t in verdict["tasks"] if t not in size)
    both = " and ".join(told.values())
    return {
        "proceed": f"Proceed: sharing one adapter costs 2 % or more ({large}).",
        "pivot": f"Pivot: sharing one adapter costs under 1 % ({both}).",
        "more_seeds": f"More seeds: no task loses 2 %, but not all lose under 1 % ({both}).",
        "inconclusive": f"Inconclusive: {f'{lost} cannot be measured here' if lost else both}.",
    }.get(verdict["decision"], "No verdict.")


def reading(verdict: dict[str, Any]) -> str:
    """What the numbers say, task by task, in one paragraph."""
    said = []
    for task, f in verdict["tasks"].items():
        special, joint, base = (100 * f[key] for key in ("specialist", "joint", "base"))
        end = f"a {'loss' if joint <= special else 'gain'} of {abs(f['interference'] or 0):.2f} %"
        if not f["measurable"]:
            end = (
                f"training moved the specialist by {special - base:+.2f}, too little (5.00) to tell"
            )
        elif f["interval"]:
            sure = "" if f["p_holm"] <= verdict["alpha"] else "not "
            end += f" (95 % interval of I {span(f['interval'], 1, ' %')}), {sure}distinguishable "
            end += f"from none at level {verdict['alpha']:.4f}"
        pair = f"{label(SPECIALIST[task])} scores {special:.2f} and Joint-Single {joint:.2f}"
        said.append(f"On {TASKS[task]} {pair}: {end}.")
    return " ".join(said) or "Until the needed arms are there, nothing is compared."


def limits(verdict: dict[str, Any]) -> list[str]:
    """What this run cannot conclude, an item each."""
    arms, config, said = verdict["arms"], verdict["config"], []
    for task, f in verdict["tasks"].items():
        name, smallest, interval = TASKS[task], f["smallest_detectable_effect"], f["interval"]
        if not f["measurable"]:
            said.append(f"Whether sharing hurts {name}: the task is not measurable here.")
        elif interval is None:
            said.append(f"How sure the value on {name} is: one seed gives no interval.")
        elif smallest > stats.PROCEED_FROM:
            said.append(f"An effect of 2 % on {name}: detectable is {smallest:.2f} % or more.")
        if f["measurable"] and interval and interval[0] <= 0 and interval[1] >= stats.PROCEED_FROM:
            said.append(f"Whether it is 0 or 2 % on {name}: the interval holds both.")
    for task, f in verdict["aa"].items():
        if f["interval"] and f["interval"][0] * f["interval"][1] > 0:
            said.append(f"Small effects on {TASKS[task]}: even the A/A pair shows one.")
    if late := [f"{label(a)} {seed}" for a, row in arms.items() for seed in row["missing_seeds"]]:
        said.append(f"Anything that needs what is missing (arm, seed): {', '.join(late)}.")
    if (n := verdict["seeds"]) < (planned := verdict["seeds_planned"] or 0):
        said.append(f"What {planned} seeds would show: {n} can be compared.")
    if arms.get(MOE, {}).get("seeds") and not all(arms.get(a, {}).get("seeds") for a in SAME_SIZE):
        size = "Joint-3r and Uniform-MoE were not both run (`CONTROLS=1`)"
        said.append(f"Whether Joint-MoE gains by routing or by its threefold size: {size}.")
    base = f"{config['base']} ({config['layers'] or 'all'} layers)"
    return [*said, f"Other collections than {verdict['data']['name']}, other bases than {base}."]


def _notes(verdict: dict[str, Any]) -> list[str]:
    """What a reader has to know before any number."""
    notes = [f"Warning: {text}" for text in verdict["warnings"]]
    if (split := verdict["config"]["split"]) != "test":
        notes.insert(0, f"Measured on {split}, where the settings may have been chosen.")
    if verdict["setting"].split("-")[0] == "smoke":
        notes.insert(0, "SCALE=smoke shows that the machinery runs: it concludes nothing.")
    return notes


def markdown(verdict: dict[str, Any], drawn: list[str]) -> str:
    """report.md; `drawn`: the figures that lie beside it."""
    v, c = verdict, verdict["config"]
    facts = {
        **{"base": v["base"], "data": v["data"]},
        "training": f"{c['steps']} steps, learning rate {c['learning_rate']:g}, "
        f"{c['document_tokens']} tokens a text, adapters from layer {c['adapter_layers']}",
        **v["origin"],
        "files": [f"`{name}`" for name in v["trials"]],
    }
    text = PAGE.format(
        v=v,
        title=f"{v['experiment'].replace('_', ' ').capitalize()}: {v['setting']}",
        notes="".join(f"\n> **{text}**\n" for text in _notes(v)),
        headline=headline(v),
        supported="yes" if v["supported"] else "no",
        reading=reading(v),
        arms=figures.arms_tables(v) + figures.picture("scores", drawn),
        effects=figures.effects_table(v["tasks"], "Joint-Single"),
        won_back=figures.won_back(v),
        aa=figures.effects_table(v["aa"], "its twin"),
        **{d: " (this run)" if d == v["decision"] else "" for d in DECISIONS},
        limits="\n".join(f"- {text}" for text in limits(v)),
        curves=figures.picture("curves", drawn) + figures.picture("routing", drawn),
        peak=v["peak_bytes"] / 1e9,
        provenance="\n".join(f"- {name}: {figures.plain(value)}" for name, value in facts.items()),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def summary(verdict: dict[str, Any]) -> str:
    """The verdict for a terminal, in six to ten lines."""
    v = verdict
    lines = [
        f"{v['experiment']} {v['setting']}: {headline(v)}",
        f"supported: {'yes' if v['supported'] else 'no'}. {v['reason']}",
    ]
    for task, f in v["tasks"].items():
        scores = {"specialist": f["specialist"], JOINT: f["joint"], MOE: f["moe"]}
        cells = [f"{name} {100 * x:.2f}" for name, x in scores.items() if x is not None]
        cells += [f"I {figures.percent(f['interference'])} {span(f['interval'])}"]
        lines += [f"{TASKS[task]}: {', '.join(cells)}", f"  {MOE} wins back: {figures.back(f)}"]
    lines.append(f"seeds {v['seeds_compared']}, {len(v['trials']) - 1} trials")
    return "\n".join([*lines, *_notes(v)])
