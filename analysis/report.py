"""A setting's trials -> verdict.json, report.md and figures, written beside them.

`judge` turns the trials into one dict, with every number from eval.stats; what is printed comes
from that dict alone. In it scores lie in [0, 1], interference is in % of the specialist's score,
gain-normalised interference and won_back are fractions, differences are in points (0.01 nDCG).
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import experiments
from analysis import figures
from analysis.figures import label
from eval import stats

METRICS = ("ndcg_cut_10", "map", "recip_rank", "recall_100")
TASKS = {"embedding": "retrieval", "reranking": "reranking"}  # a task -> its name in the text
JOINT, MOE = "joint-single", "joint-moe"
NEEDED = (*stats.SPECIALIST.values(), JOINT)  # without all of these there is no verdict
TRIPLE = ("joint-3r", "uniform-moe")  # controls with Joint-MoE's parameters but no routing
REFERENCES = {
    "bm25": "BM25",
    "untrained": "Untrained base (reranking: mean of 20 random heads)",
    "ceiling": "Ceiling of the BM25 candidates",
}
LEADS_TO = {
    "proceed": "Interference is there to be studied: where it arises (layer by layer, gradients of "
    "one task against the other's) and what undoes it (routers, ranks, mixtures), on larger bases "
    "and more collections.",
    "pivot": "Why does none emerge? Do both tasks live in one subspace of the adapter; is there "
    "capacity to spare (lower ranks, smaller bases would show it); are the data too alike or too "
    "few? And the efficiency question: one resident model instead of two, so what does it save in "
    "memory, load time and throughput at equal quality?",
    "more_seeds": "The same command with more seeds (`SEEDS=6`, then `SEEDS=9`): finished trials "
    "are kept, and the significance level is spent over the looks.",
    "inconclusive": "No claim either way. Mend the measurement first (longer training where a task "
    "is not measurable, more queries or collections where the interval is wide), then run anew.",
}


def write(folder: Path) -> dict[str, Any]:
    """Write verdict.json, report.md and the figures into `folder`; return the verdict.

    folder: runs/<experiment>/<setting>, with baselines.json and <arm>/seed<k>.json. All is written
    aside first and then renamed, so a stop on the way leaves the old report. A missing arm or seed
    is shown as missing; `decision` is None where a needed one is. Raises ValueError for a folder
    without baselines, a damaged file, or a trial whose base, data or queries are others than the
    baselines'.
    """
    folder = folder.resolve()
    baselines, arms = load(folder)
    verdict = judge(folder, baselines, arms)
    part = folder / ".report.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    drawn = figures.write(part, verdict, arms)
    (part / "report.md").write_text(markdown(verdict, drawn), encoding="utf-8")
    text = json.dumps(verdict, indent=1, allow_nan=False) + "\n"
    (part / "verdict.json").write_text(text, encoding="utf-8")
    for path in sorted(part.iterdir()):
        os.replace(path, folder / path.name)
    part.rmdir()
    for stale in set(figures.NAMES) - set(drawn):
        for kind in ("png", "svg"):
            (folder / f"{stale}.{kind}").unlink(missing_ok=True)
    return verdict


def load(folder: Path) -> tuple[dict, dict[str, dict[int, dict]]]:
    """(baselines, arm -> seed -> trial), arms in the study's order; raises as `write`."""
    baselines = _read(folder / "baselines.json")
    found: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob("*/seed*.json")):
        if not (seed := re.fullmatch(r"seed(\d+)", path.stem)):
            continue
        trial = _read(path)
        for name in ("base", "data"):
            if trial[name] != baselines[name]:
                raise ValueError(
                    f"{path} was made with {name} {trial[name]}, baselines.json with "
                    f"{baselines[name]}: they cannot be compared; run one of them again"
                )
        for task, rows in trial["scores"].items():
            if rows.keys() != baselines["untrained"][task].keys():
                raise ValueError(
                    f"{path} scores {len(rows)} {task} queries, baselines.json "
                    f"{len(baselines['untrained'][task])} or others: run one of them again"
                )
        found.setdefault(path.parent.name, {})[int(seed[1])] = trial
    return baselines, {
        arm: dict(sorted(found[arm].items()))
        for arm in dict.fromkeys([*_planned(folder.parent.name), *sorted(found)])
        if arm in found
    }


def _read(path: Path) -> dict:
    if not path.exists():
        raise ValueError(f"{path} does not exist: `python -m run run` makes it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path} is damaged ({problem}): remove it and run it again") from None


def _planned(experiment: str, extras: bool = True) -> dict[str, dict]:
    """The arms of an experiment; of one that experiments.py does not know, none."""
    known = experiment in experiments.EXPERIMENTS
    return experiments.arms(experiment, extras, extras) if known else {}


def _means(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    return {m: float(np.mean([row[m] for row in rows.values()])) for m in METRICS}


def judge(folder: Path, baselines: dict, arms: dict[str, dict[int, dict]]) -> dict[str, Any]:
    """What verdict.json holds; the numbers of `tasks` are those of `stats.verdict`.

    Compared are the seeds that all needed arms have; a further arm enters with those of them that
    it has. The pooled seed variance is that of the rule's own arms, to which a row about another
    arm adds that arm: so the verdict does not depend on which controls were run.
    """
    experiment, setting = folder.parent.name, folder.name
    row = experiments.EXPERIMENTS.get(experiment)
    present = [set(arms[arm]) for arm in NEEDED if arm in arms]
    common = sorted(set.intersection(*present)) if present else []
    used = {
        arm: {s: t for s, t in trials.items() if not common or s in common}
        for arm, trials in arms.items()
    }
    queries = {task: list(baselines["untrained"][task]) for task in TASKS}
    labels = {task: [baselines["clusters"][q] for q in queries[task]] for task in TASKS}
    base = {
        task: np.array([row["ndcg_cut_10"] for row in baselines["untrained"][task].values()])
        for task in TASKS
    }
    y: dict[str, dict[str, np.ndarray]] = {
        task: {
            arm: np.array([
                [trial["scores"][task][q]["ndcg_cut_10"] for q in queries[task]]
                for trial in trials.values()
            ])
            for arm, trials in used.items()
            if trials and all(task in trial["scores"] for trial in trials.values())
        }
        for task in TASKS
    }  # fmt: skip
    rule = {
        task: {a: y[task][a] for a in (stats.SPECIALIST[task], JOINT, MOE) if a in y[task]}
        for task in TASKS
    }
    # A trial of one arm and one seed is scores without intervals; one cluster likewise.
    several = [task for task in TASKS if len(set(labels[task])) > 1]
    ready = [
        t for t in several if common and stats.SPECIALIST[t] in rule[t] and JOINT in rule[t]
    ]
    found: dict[str, Any] = {"seeds": len(common), "alpha": None, "tasks": {}}
    if ready:
        found = stats.verdict({t: rule[t] for t in ready}, base, labels)
    absent = [arm for arm in NEEDED if arm not in arms]
    if len(ready) < len(TASKS):
        why = "the needed arms have no seed in common"
        if absent:
            why = f"no trial of {', '.join(absent)}"
        elif len(several) < len(TASKS):
            why = "all queries are in one cluster, so no interval can be given"
        found |= {"decision": None, "supported": False, "reason": f"No verdict: {why}."}
    aa = {
        task: {**{("aa" if a == JOINT else a): s for a, s in rule[task].items()}}
        for task in several
    }
    raise NotImplementedError
