"""A setting's trials -> one dict that holds every number of its verdict.

Scores lie in [0, 1], interference is in % of the specialist's score, gain-normalised interference
and won_back are fractions, differences are in points (0.01 nDCG). Every number is that of
`eval.stats` or `eval.rule`.
"""

from pathlib import Path
from typing import Any

import numpy as np

import experiments
from analysis import arm_table
from analysis.disk import Trials, origin, planned, trials_by_file
from analysis.figures import METRIC, METRICS, REFERENCE_ROWS, TASKS, label
from analysis.page import with_holm
from analysis.sensitivity import sensitivity
from eval import inference, rule, stats
from eval.rule import JOINT, MOE, NEEDED, SPECIALIST
from model.router import learned

RIVALS = (MOE, "joint-2r", "joint-3r", "uniform-moe", "oracle-moe")  # may win back the loss
SAME_SIZE = ("joint-3r", "uniform-moe")  # controls with about Joint-MoE's parameters but no routing


def usual_seconds(trials: dict[int, dict]) -> float | None:
    """Of training, the median over seeds; None without a trial."""
    found = [trial["seconds"]["train"] for trial in trials.values()]
    return float(np.median(found)) if found else None


def judge(folder: Path, baselines: dict, arms: dict[str, dict[int, dict]]) -> dict[str, Any]:
    """What verdict.json holds; the numbers of `tasks` are those of `rule.verdict`.

    Compared are the seeds that all needed arms have; another arm enters with those of them that it
    has, and what it wins back is told at these. The verdict is the same whichever controls were
    run.
    """
    experiment = folder.parent.name
    study = experiments.EXPERIMENTS.get(experiment)
    present = [set(arms[arm]) for arm in NEEDED if arm in arms]
    common = sorted(set.intersection(*present)) if present else []
    used = {a: {s: t for s, t in arms[a].items() if not common or s in common} for a in arms}
    y, labels = arrays(baselines, used)
    base = {
        task: np.array([row[METRIC] for row in baselines["untrained"][task].values()])
        for task in TASKS
    }
    wide = [t for t in TASKS if len(set(labels[t])) > 1]  # one cluster gives no interval
    ready = [t for t in wide if common and {SPECIALIST[t], JOINT} <= y[t].keys()]
    found: dict[str, Any] = {"seeds": len(common), "alpha": None, "tasks": {}}
    if ready:
        found = rule.verdict({t: y[t] for t in ready}, base, labels, family=len(TASKS))
    if len(ready) < len(TASKS):
        why = "the needed arms have no seed in common, or all queries are of one cluster"
        if absent := [arm for arm in NEEDED if arm not in arms]:
            why = f"no trial of {', '.join(absent)}"
        found |= {"decision": None, "supported": False, "reason": f"{why}."}
    beside = [
        {"arm": MOE, "against": arm, "task": task}
        | _difference(y[task], labels[task], used, MOE, arm)
        for arm in SAME_SIZE
        for task in ready
        if {MOE, arm} <= y[task].keys() and set(used[MOE]) & set(used[arm])
    ]
    every, rows = sorted({seed for trials in arms.values() for seed in trials}), planned(folder)
    shown = {}
    for arm in dict.fromkeys([*planned(folder, False), *arms]):
        tasks = rows.get(arm, {}).get("tasks", list(TASKS))
        missing = [seed for seed in every if seed not in arms.get(arm, {})]
        shown[arm] = {
            **_row(arm, used.get(arm, {}), y, labels, tasks),
            "missing_seeds": missing,
            "against_joint": {
                task: _against(y[task], labels[task], used, arm, task, found["tasks"][task])
                for task in ready
                if arm in y[task] and arm not in NEEDED and not arm.endswith("-aa")
            },
        }
    if MOE in used and list(used[MOE]) != common:
        _at_seeds_of_moe(found["tasks"], shown[MOE]["against_joint"])
    tested = [d for line in shown.values() for d in line["against_joint"].values()]
    with_holm([*tested, *beside], found["alpha"] or inference.ALPHA)
    files = {"baselines.json": baselines} | trials_by_file(used)
    return {
        "experiment": experiment,
        "setting": folder.name,
        "question": study.question if study else "",
        "expected": study.expected if study else "",
        **{key: found[key] for key in ("decision", "supported", "reason", "seeds", "alpha")},
        "seeds_compared": common,
        "seeds_planned": experiments.seeds(experiment, folder.name) if study else None,
        **{"tasks": found["tasks"], "aa": _twins(y, base, labels, ready)},
        "arms": shown,
        "moe_against": beside,
        "sensitivity": _sensitivity(baselines, used, found["tasks"]),
        "made_of": arm_table.describe({arm: used[arm] for arm in used if used[arm]}),
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
        **(made := origin(files)),
        "warnings": [*made["warnings"], *_alarms(used)],
        "trials": list(files),
    }


def _alarms(used: Trials) -> list[str]:
    """Routers that ended without one of their experts, a sentence for each arm."""
    return [
        f"{label(arm)}: in {len(seeds)} of {len(trials)} seeds an expert carried under 1 % of the "
        "weight in more than half of the layers in the last step."
        for arm, trials in used.items()
        if (seeds := collapsed(trials))
    ]


def _twins(
    y: dict[str, dict[str, np.ndarray]], base: dict[str, np.ndarray],
    labels: dict[str, list[str]], ready: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The verdict where the A/A arm takes the joint arm's place, under a name that both tasks
    share, and the level of its look."""
    twin = {task: y[task].get(f"{SPECIALIST[task]}-aa") for task in ready}
    arms = {task: {**y[task], "aa": aa} for task, aa in twin.items() if aa is not None}
    if not arms:
        return {}
    found = rule.verdict(arms, base, labels, joint="aa", moe=None, family=len(TASKS))
    return {task: row | {"alpha": found["alpha"]} for task, row in found["tasks"].items()}


def _row(
    arm: str, trials: dict[int, dict], y: dict[str, dict[str, np.ndarray]],
    labels: dict[str, list[str]], tasks: list[str],
) -> dict[str, Any]:  # fmt: skip
    """One arm by itself in the tables. tasks: what is planned of it."""
    first = next(iter(trials.values()), {})
    config = first.get("config", {})
    return {
        "tasks": config.get("tasks", tasks),
        "seeds": list(trials),
        "scores": {
            task: score_row(y[task], labels[task], arm, trials, task)
            for task in TASKS
            if arm in y[task]
        },
        "trainable_parameters": first.get("trainable_parameters"),
        "training_seconds": usual_seconds(trials),
        "rates": {k: config[k] for k in ("learning_rate", "clip")} if trials else None,
        "shaken": bool(trials) and shaken(config),
    }


def collapsed(trials: dict[int, dict]) -> list[int] | None:
    """The seeds whose last step raised the alarm of `train.loop.routing_line`; None of an arm
    without a learned router."""
    config = next(iter(trials.values()), {"config": {}})["config"]
    if not config or not learned(config["router"], config.get("router_frozen", False)):
        return None
    return [s for s, t in trials.items() if any("alarm" in line for line in t["curve"][-1:])]


def shaken(config: dict) -> bool:
    """Whether its router is trained with noise or expert dropout."""
    return bool(config["router"] and (config["router_noise"] or config["expert_dropout"]))


def _at_seeds_of_moe(tasks: dict[str, Any], mine: dict[str, Any]) -> None:
    """Where Joint-MoE has fewer seeds, put what it wins back at these in place of all."""
    for task, row in mine.items():
        if (tasks[task]["interval"] or [0])[0] <= 0:
            continue  # nothing to win back, and that is said
        tasks[task] |= {k: row[k] for k in ("won_back", "won_back_interval")}
        if row["won_back"] is None:
            why = "no loss at the seeds that all three arms have, of which it would be a share"
            tasks[task]["won_back_reason"] = why


def references(baselines: dict) -> dict[str, dict[str, float]]:
    """A row of figures.REFERENCE_ROWS -> task -> mean nDCG@10."""
    return {
        name: {task: float(np.mean([row[METRIC] for row in rows.values()]))
               for task, rows in baselines[name].items()}
        for name in REFERENCE_ROWS
    }  # fmt: skip


def arrays(
    baselines: dict, arms: Trials, metric: str = METRIC
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, list[str]]]:
    """(task -> arm -> scores (S, Q), task -> the cluster of each of the Q queries)."""
    labels, y = {}, {}
    for task in TASKS:
        rows = baselines["untrained"][task]
        labels[task] = [baselines["clusters"][query] for query in rows]
        y[task] = {
            arm: np.array([[t["scores"][task][q][metric] for q in rows] for t in trials.values()])
            for arm, trials in arms.items()
            if trials and all(task in trial["scores"] for trial in trials.values())
        }
    return y, labels


def score_row(
    y: dict[str, np.ndarray], labels: list[str], arm: str, trials: dict[int, dict], task: str
) -> dict[str, Any]:
    """One arm's means on a task, the spread over its seeds, and the interval."""
    means = y[arm].mean(axis=1)
    wide = len(set(labels)) > 1  # one cluster gives no interval
    return {
        **_means([row for t in trials.values() for row in t["scores"][task].values()]),
        "by_seed": means.tolist(),
        "seed_sd": float(means.std(ddof=1)) if len(means) > 1 else None,
        "interval": stats.arm_mean(y, labels, arm).interval if wide else None,
    }


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {m: float(np.mean([row[m] for row in rows])) for m in METRICS}


def _difference(
    y: stats.Arms, labels: list[str], used: Trials, arm: str, other: str
) -> dict[str, Any]:
    """An arm less another at the seeds that both have: what the others score is no part of it."""
    both = at_common_seeds(y, used, arm, other)
    e = stats.arm_difference(both, labels, arm, other)
    return {
        **{"difference": e.value, "interval": e.interval, "p": e.p if e.interval else None},
        **({"se": e.se, "df": e.df} if e.interval else {}),
        **{"p_holm": None, "detectable": None},  # over all of the table
        "seeds_compared": sorted(set(used[arm]) & set(used[other])),
    }


def at_common_seeds(y: stats.Arms, used: Trials, *arms: str) -> dict[str, np.ndarray]:
    """The scores of some arms at the seeds that all of them have. used: the trials behind y."""
    common = set.intersection(*(set(used[arm]) for arm in arms))
    return {a: y[a][[at for at, seed in enumerate(used[a]) if seed in common]] for a in arms}


def _against(
    y: stats.Arms, labels: list[str], used: Trials, arm: str, task: str, found: dict[str, Any]
) -> dict[str, Any]:
    """An arm's difference to the joint arm, and what it wins back where that can be told."""
    back, three = None, (SPECIALIST[task], JOINT, arm)
    if arm in RIVALS and found["interval"] and found["interval"][0] > 0:
        both = at_common_seeds(y, used, *three)
        loss = stats.arm_difference(both, labels, *three[:2])  # at these seeds too
        if loss.low > 0:
            back = stats.won_back(both, labels, *three)
    return {
        **_difference(y, labels, used, arm, JOINT),
        "won_back": back and back.value,
        "won_back_interval": back and back.interval,
    }


def _sensitivity(baselines: dict, used: Trials, tasks: dict[str, Any]) -> dict[str, Any]:
    """task -> `analysis.sensitivity.sensitivity`, where the interference has an interval."""
    told = [task for task, found in tasks.items() if found["interval"]]
    by_metric = {m: arrays(baselines, used, m)[0] for m in METRICS} if told else {}
    labels = arrays(baselines, {})[1]
    made = {}
    for task in told:
        # What the candidates set is no arm's doing.
        metrics = [m for m in METRICS if task == "embedding" or m != "recall_100"]
        references = {
            name: np.array([row[METRIC] for row in baselines[name][task].values()])
            for name in ("bm25", "ceiling") if task in baselines[name]
        }  # fmt: skip
        special = SPECIALIST[task]
        made[task] = sensitivity(
            {m: by_metric[m][task] for m in metrics}, labels[task], (special, JOINT),
            f"{special}-aa", references,
        )  # fmt: skip
    return made
