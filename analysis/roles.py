"""What each expert of a trained model is for.

A learned router deals the roles anew with each seed, so what two seeds share under one name says
nothing of a task; and what is averaged over seeds is averaged by role.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from model.router import TASKS, learned

OWN = {task: f"{task}'s own" for task in TASKS}


def assign(by_task: dict[str, np.ndarray], experts: Sequence[str]) -> dict[str, str]:
    """Each task's own expert, no expert twice: what favours it most against the other tasks.

    Hungarian assignment on the mean weight of an expert in the task less its mean over tasks.
    """
    mean = np.stack([by_task[task] for task in by_task])
    rows, columns = linear_sum_assignment(-(mean - mean.mean(0)))
    found = zip(rows.tolist(), columns.tolist(), strict=True)
    return {list(by_task)[int(i)]: experts[int(j)] for i, j in found}


def columns(trial: dict[str, Any]) -> tuple[list[str], list[int]]:
    """The experts as what is averaged over seeds orders them: (their roles, where they stand).

    Where a router learns: each task's own, then the other; else, and where several are left over,
    as they are named.
    """
    config = trial["config"]
    experts = config["experts"]
    learns = learned(config["router"], config.get("router_frozen", False))
    names = of_trial(trial) if learns else {}
    first = [*OWN.values(), "the other"][: len(experts)]
    if sorted(names.values()) != sorted(first):
        return list(experts), list(range(len(experts)))
    order = sorted(range(len(experts)), key=lambda i: first.index(names[experts[i]]))
    return first, order


def of_trial(trial: dict[str, Any]) -> dict[str, str]:
    """Expert -> its role, by the mean weights of the last quarter of a trial's training steps.

    `OWN` of each task; one that is left over is "the other", several keep their names. Without
    weights of both tasks every expert keeps its name.
    """
    experts = trial["config"]["experts"]
    lines = [line for line in trial["curve"] if all(f"weights_{task}" in line for task in TASKS)]
    names = {name: name for name in experts}
    if len(experts) < len(TASKS) or not lines:
        return names
    late = lines[-max(1, len(lines) // 4) :]
    weights = {task: np.mean([line[f"weights_{task}"] for line in late], 0) for task in TASKS}
    names |= {name: OWN[task] for task, name in assign(weights, experts).items()}
    rest = [name for name in experts if names[name] == name]
    return names | {name: "the other" for name in rest if len(rest) == 1}
