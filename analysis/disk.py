"""Trials as they lie in a setting's folder: found, read, compared, and what made them."""

import json
from pathlib import Path
from typing import Any

import experiments
from eval.rule import MOE, NEEDED
from model.files import read_json
from trials import Config

Trials = dict[str, dict[int, dict]]  # arm -> seed -> what its file holds
# What the arms of the rule may differ in; in all else they have to agree to be compared.
MAY_DIFFER = ("tasks", "experts", "ranks", "router", "router_noise", "expert_dropout", "task_prior",
          "always_on", "learning_rate", "clip", "seed")  # fmt: skip
ORIGIN = ("commit", "sources", "device", "versions")  # one of each, or the report warns


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


def measured(folder: Path, arms: Trials, name: str, *needs: str) -> Trials:
    """arm -> seed -> what a measure (`routing`, `probing`) found; arms without are left out.

    Raises ValueError as `read`.
    """
    found = {
        arm: {seed: read(path, *needs) for seed in trials
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
    made = [{**file, "commit": file["git"]["commit"]} for file in files.values()]
    seen = {name: sorted({json.dumps(fact[name]) for fact in made}) for name in ORIGIN}
    warnings = [
        f"the files were made with {len(values)} different values of {name} (see Provenance)."
        for name, values in seen.items()
        if len(values) > 1
    ]
    if unknown := sum(fact["git"]["dirty"] is None for fact in made):
        warnings.append(f"{unknown} of the {len(files)} files do not say which commit made them.")
    if dirty := sum(bool(fact["git"]["dirty"]) for fact in made):
        warnings.append(f"{dirty} of the {len(files)} files were made with uncommitted changes.")
    if begun := sum("begun_by_sources" in fact for fact in made):
        warnings.append(f"{begun} of the {len(files)} files were begun by other code.")
    return {
        "origin": {k: [json.loads(x) for x in v] for k, v in seen.items()},
        "warnings": warnings,
    }
