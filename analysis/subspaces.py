"""STIR of the tasks' gradients and of what they change in the weights, linear by linear.

A gradient's halves are those of the probe set, a change's the models of two seeds. `inputs` is the
side that a linear reads (right singular vectors), `outputs` the side it writes to.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import disk, roles
from analysis.figures import table
from analysis.gradients import halves, task_gradient
from analysis.page import over_seeds, spread
from analysis.subspace import between, ratio
from model.lora import adapted, layer_of
from model.router import TASKS, learned
from model.unimoer import UniMoER
from train.batches import TrainingData
from train.start import Piece, pieces

SIDES = ("inputs", "outputs")
MEANS = ("cross", "within", "null", "k")
BATCHES = 2  # of each task in each half of the probe set
Rows = list[dict[str, Any]]  # of one linear and side each


def of_gradients(model: UniMoER, data: TrainingData) -> Rows:
    """Of the gradients that training follows: rows of dA, columns of dB, all experts together.

    No rows where an epoch has one batch alone: halves that share a query agree by that.
    """
    model.eval()
    batches = halves(data, TASKS, BATCHES)
    if not batches:
        return []
    e, r = (
        [task_gradient(model, data, task, range(half * batches, (half + 1) * batches))
         for half in (0, 1)]
        for task in TASKS
    )  # fmt: skip
    rows: Rows = []
    for layer, prefix, name, _ in adapted(model):
        at = {"layer": layer, "projection": name}
        for side, key in zip(SIDES, ("lora_A", "lora_B"), strict=True):
            of = [[g[f"{prefix}.{key}.{name}"].cpu() for g in both] for both in (e, r)]
            (a, b), (c, d) = of if side == "inputs" else [[m.t() for m in h] for h in of]
            rows.append({**at, "side": side, **between((a, b), (c, d), most=len(a))})
    return rows


def sides(piece: Piece) -> dict[str, Tensor]:
    """Matrices X of R rows with X'X = dW'dW (inputs) and dW dW' (outputs), dW = s B A."""
    a, b, scale = piece[0].double(), piece[1].double(), piece[2]
    left = torch.linalg.qr(b, mode="r")[1]  # B = Q left, so dW'dW = s^2 A' left' left A
    right = torch.linalg.qr(a.t(), mode="r")[1]
    return {"inputs": scale * left @ a, "outputs": scale * right @ b.t()}


def of_changes(place: Path) -> Rows:
    """Of the specialists where this is Rank-Only, else of each task's own expert.

    The halves are this seed and the one before; no rows for the first seed and for arms without
    such experts. `experts` of a row: task -> their names in the two seeds.
    """
    arm, seed = place.parent, int(place.name.removeprefix("seed"))
    of = [_own(arm, k) for k in (seed, seed - 1)]
    if not all(folder.exists() for half in of for folder, _ in half.values()) or not all(of):
        return []
    found = {
        task: [{at: sides(piece) for at, piece in pieces(*half[task]).items()} for half in of]
        for task in TASKS
    }
    experts = {task: [half[task][1] for half in of] for task in TASKS}
    rows: Rows = []
    for prefix, name in found["reranking"][0]:
        at = {"layer": layer_of(prefix), "projection": name}
        for side in SIDES:
            (a, b), (c, d) = ([half[prefix, name][side] for half in found[t]] for t in TASKS)
            # No task has more directions than its smaller half.
            found_at = between((a, b), (c, d), most=min(map(len, (a, b, c, d))))
            rows.append({**at, "side": side, "experts": experts, **found_at})
    return rows


def _own(arm: Path, seed: int) -> dict[str, tuple[Path, str]]:
    """Task -> the saved model and the expert in it that is the task's own in a seed: by name where
    a hard switch gives it that one, by its role where a router learns. Empty where there is none.
    """
    if arm.name == "rank-only":
        folders = arm.parent / "emb-only", arm
        both = zip(TASKS, folders, strict=True)
        return {task: (folder / f"seed{seed}.model", "shared") for task, folder in both}
    path = arm / f"seed{seed}.json"
    trial: dict[str, Any] = disk.read(path) if path.exists() else {"config": {"router": ""}}
    config, named = trial["config"], {}
    if config["router"] == "task":
        named = {task: task for task in TASKS}
    elif learned(config["router"], config.get("router_frozen", False)):
        by_role = {role: name for name, role in roles.of_trial(trial).items()}
        named = {task: by_role[own] for task, own in roles.OWN.items() if own in by_role}
    return {task: (path.with_suffix(".model"), name) for task, name in named.items()}


def summarise(trials: list[dict[str, Any]], what: str) -> dict[str, dict[str, Any]]:
    """side -> over seeds, the means over linears of what `between` gives, and STIR of these."""
    found = {}
    for side in SIDES:
        of = [[row for row in trial[what] if row["side"] == side] for trial in trials]
        means = [
            {k: float(np.mean([row[k] for row in rows])) for k in MEANS} for rows in of if rows
        ]
        if means:
            stir = [ratio(m["cross"], m["within"], m["null"]) for m in means]
            rows = {k: over_seeds([m[k] for m in means]) for k in MEANS}
            found[side] = {"stir": over_seeds(stir), **rows, "linears": sum(map(len, of))}
    return found


TEXT = """The same of the gradients behind the last step (halves: two of the probe set) and of the
weights' changes (of the specialists, in the row of Rank-Only, and of each task's own expert where a
hard switch or a learned router gives it one and its role was measured; halves: this seed and the
one before, so that neighbouring seeds share a model and have no interval), by the side of a linear:
inputs, what it reads, and outputs, where it writes. Means over linears, STIR from a seed's means;
none where within is less than 0.05 above null: there a task does not share its directions with
itself. Linears: of all seeds.

"""


def _listed(found: dict[str, Any], form: str = ".2f") -> str:
    """The mean and, behind it, the values: they share models, so their spread tells little."""
    if found["mean"] is None:
        return "-"
    return f"{found['mean']:{form}} ({', '.join(format(x, form) for x in found['seeds'])})"


def markdown(measured: dict[str, dict[str, Any]], label) -> str:
    """measured: arm -> {"gradients", "deltas"} as `summarise` gives them."""
    rows = []
    for name in ("gradients", "deltas"):
        for arm, found in measured.items():
            for side, row in found[name].items():
                show = spread if name == "gradients" else _listed
                cells = [show(row["stir"], "+.2f"), show(row["cross"]), show(row["within"]),
                         f"{row['null']['mean']:.2f}", f"{row['k']['mean']:.0f}"]  # fmt: skip
                counts = [str(row["linears"]), str(len(row["k"]["seeds"]))]
                rows.append([name.replace("deltas", "changes"), label(arm), side, *cells, *counts])
    if not rows:
        return ""
    head = ["of", "arm", "side", "STIR", "cross", "within", "null", "k", "linears", "seeds"]
    return TEXT + table(head, rows)
