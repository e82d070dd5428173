"""A setting's trials -> one dict that holds every number of its verdict.

Scores lie in [0, 1], interference is in % of the specialist's score, gain-normalised interference
and won_back are fractions, differences are in points (0.01 nDCG). Every number is eval.stats's.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

import experiments
from analysis import arm_table
from analysis.figures import METRIC, METRICS, REFERENCE_ROWS, TASKS
from analysis.page import with_holm
from analysis.sensitivity import sensitivity
from eval import inference, rule, stats
from model.files import read_json
from trials import Config

SPECIALIST = rule.SPECIALIST
JOINT, MOE = "joint-single", "joint-moe"
NEEDED = (*SPECIALIST.values(), JOINT)  # without all of these there is no verdict
RIVALS = (MOE, "joint-2r", "joint-3r", "uniform-moe", "oracle-moe")  # may win back the loss
SAME_SIZE = ("joint-3r", "uniform-moe")  # controls with about Joint-MoE's parameters but no routing
# What the arms of the rule may differ in; in all else they have to agree to be compared.
MAY_DIFFER = ("tasks", "experts", "ranks", "router", "router_noise", "expert_dropout", "task_prior",
          "always_on", "learning_rate", "clip", "seed")  # fmt: skip
ORIGIN = ("commit", "sources", "device", "versions")  # one of each, or the report warns


Trials = dict[str, dict[int, dict]]  # arm -> seed -> what its file holds


def load(folder: Path) -> tuple[dict, Trials]:
    """(baselines, arm -> seed -> trial), arms in the study's order.

    Raises ValueError for missing baselines, a damaged file, or a trial that cannot be compared with
    them or with the others: another base, other data, queries or config.
    """
    baselines = read(folder / "baselines.json", "base", "data", "untrained")
    found: Trials = {}
    for path in trial_files(folder):
        trial = read(path, "base", "data", "config", "scores")
        same = {  # by content: the commit of a repository may be another
            name: trial[name].get("fingerprint") == baselines[name].get("fingerprint")
            for name in ("base", "data")
        }
        for task, rows in trial["scores"].items():
            same[f"{task} queries"] = rows.keys() == baselines["untrained"][task].keys()
        if other := [name for name, agrees in same.items() if not agrees]:
            what = f"has other {' and '.join(other)} than baselines.json"
            raise ValueError(f"{path} {what}: they cannot be compared, so run one of them again")
        found.setdefault(path.parent.name, {})[int(path.stem.removeprefix("seed"))] = trial
    whole = {
        folder / arm / f"seed{seed}.json": Config.completed(trial["config"])
        for arm, trials in found.items() for seed, trial in trials.items()
    }  # fmt: skip
    first = {arm: folder / arm / f"seed{min(trials)}.json" for arm, trials in found.items()}
    for path in whole:
        _comparable(whole, path, first[path.parent.name], ("seed",))
    named = [first[arm] for arm in (*NEEDED, MOE) if arm in found]
    for path in named[1:]:
        _comparable(whole, path, named[0], MAY_DIFFER)
    order = dict.fromkeys([*planned(folder), *found])
    return baselines, {arm: dict(sorted(found[arm].items())) for arm in order if arm in found}


def trial_files(folder: Path) -> list[Path]:
    """Of a setting, <arm>/seed<k>.json; what was put aside, seed0.old.json say, is none."""
    paths = sorted(folder.glob("*/seed[0-9]*.json"))
    return [path for path in paths if path.stem.removeprefix("seed").isdecimal()]


def read(path: Path, *needs: str) -> dict:
    """A result. Raises ValueError where there is none, or one that is damaged or lacks a key."""
    if not path.exists():
        raise ValueError(f"there is no {path}: `python -m run run ...` makes it")
    found = read_json(path, "remove it, then run it again")
    if lacks := [key for key in needs if key not in found]:
        what = f"it lacks {', '.join(lacks)}"
        raise ValueError(f"{path} is no result, {what}: remove it, then run it again")
    return found


def trials_by_file(arms: Trials) -> dict[str, dict]:
    """Where each trial lies in its setting's folder -> the trial."""
    return {f"{arm}/seed{at}.json": trial for arm in arms for at, trial in arms[arm].items()}


def usual_seconds(trials: dict[int, dict]) -> float | None:
    """Of training, the median over seeds; None without a trial."""
    found = [trial["seconds"]["train"] for trial in trials.values()]
    return float(np.median(found)) if found else None


def measured(folder: Path, arms: Trials, name: str) -> Trials:
    """arm -> seed -> what a measure (`routing`, `probing`) found; arms without are left out."""
    found = {
        arm: {seed: read(path) for seed in trials
              if (path := folder / measure_file(arm, name, seed)).exists()}
        for arm, trials in arms.items()
    }  # fmt: skip
    return {arm: rows for arm, rows in found.items() if rows}


def measure_file(arm: str, name: str, seed: int) -> str:
    return f"{arm}/{name}-seed{seed}.json"


def add_measures(report: dict[str, Any], measured: Trials, name: str) -> None:
    """Put the files of a measure into what a report says of its provenance."""
    report["files"] += [measure_file(arm, name, s) for arm, rows in measured.items() for s in rows]
    every = [row for rows in measured.values() for row in rows.values()]
    known = {str(at): row for at, row in enumerate(every) if "git" in row}
    made = origin(known)
    report["origin"] |= {f"{key} of {name}": values for key, values in made["origin"].items()}
    report["warnings"] += [f"{name}: {text}" for text in made["warnings"]]
    report["seconds"] += sum(sum(row["seconds"].values()) for row in known.values())
    if absent := len(every) - len(known):
        report["warnings"].append(
            f"{name}: {absent} of the {len(every)} measures do not say what they were made with."
        )


def _comparable(whole: dict[Path, dict], path: Path, other: Path, free: tuple[str, ...]) -> None:
    """Raise ValueError if two trials differ in a field of their config that is not `free`."""
    mine, theirs = whole[path], whole[other]
    for name in mine.keys() | theirs.keys():
        if name not in free and mine.get(name) != theirs.get(name):
            raise ValueError(
                f"{path}: {name} is {mine.get(name)!r}, but {theirs.get(name)!r} in {other}: they "
                "cannot be compared, so move one of them away and run it again"
            )


def planned(folder: Path, extras: bool = True) -> dict[str, dict]:
    """The arms of a folder's experiment, with controls and A/A or without; none if not known."""
    name, scale = folder.parent.name, folder.name.split("-")[0]
    known = name in experiments.EXPERIMENTS
    return experiments.arms(name, extras, extras, scale) if known else {}


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
        **origin(files),
        "trials": list(files),
    }


def _twins(
    y: dict[str, dict[str, np.ndarray]], base: dict[str, np.ndarray],
    labels: dict[str, list[str]], ready: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The verdict's numbers where the A/A arm takes the joint arm's place, under a name that both
    tasks share."""
    twin = {task: y[task].get(f"{SPECIALIST[task]}-aa") for task in ready}
    arms = {task: {**y[task], "aa": aa} for task, aa in twin.items() if aa is not None}
    if not arms:
        return {}
    return rule.verdict(arms, base, labels, joint="aa", moe="", family=len(TASKS))["tasks"]


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


def facts(files: dict[str, dict]) -> dict[str, Any]:
    """What `page.provenance` and `page.warnings` tell of the results behind a report; base and data
    are those of the first."""
    first = next(iter(files.values()))
    return {
        "seconds": sum(sum(file["seconds"].values()) for file in files.values()),
        "peak_bytes": max(file["peak_bytes"] for file in files.values()),
        "base": first["base"],
        "data": first["data"],
        **origin(files),
        "files": list(files),
    }


def origin(files: dict[str, dict]) -> dict[str, Any]:
    """Where the results come from, and a warning where that is not one place."""
    if not files:
        return {"origin": {}, "warnings": []}
    facts = [{**file, "commit": file["git"]["commit"]} for file in files.values()]
    seen = {name: sorted({json.dumps(fact[name]) for fact in facts}) for name in ORIGIN}
    warnings = [
        f"the files were made with {len(values)} different values of {name} (see Provenance)."
        for name, values in seen.items()
        if len(values) > 1
    ]
    if unknown := sum(fact["git"]["dirty"] is None for fact in facts):
        warnings.append(f"{unknown} of the {len(files)} files do not say which commit made them.")
    if dirty := sum(bool(fact["git"]["dirty"]) for fact in facts):
        warnings.append(f"{dirty} of the {len(files)} files were made with uncommitted changes.")
    if begun := sum("begun_by_sources" in fact for fact in facts):
        warnings.append(f"{begun} of the {len(files)} files were begun by other code.")
    return {
        "origin": {k: [json.loads(x) for x in v] for k, v in seen.items()},
        "warnings": warnings,
    }
