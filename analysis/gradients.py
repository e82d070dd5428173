"""Gradients of one task against the other's, watched along training.

On a fixed probe set of training texts, with noise and dropout off, each task has a gradient for
each half of its probe batches: e_a, e_b (embedding) and r_a, r_b (reranking), one backward pass a
batch. Kept of them are their 4 x 4 inner products, for each layer and projection and in four
spaces:

    ab      the coordinates that are trained, (dA, dB). They have a gauge: A -> TA, B -> B inv(T)
            is the same adapter with another cosine
    w       the induced gradient on W: what a gradient G of the weight has in common with the
            changes that the adapter can make to first order, the tangent space at BA of the
            matrices of its rank, P_B G + G P_A - P_B G P_A; it has no gauge
    along   of that, the part of each row along the frozen weight's row (NeuroMerging, 2503.05320)
    across  the rest

Each expert has its own G, as its gate lets it through; `all` is all of them as one long vector. A
gradient in `w` has rank 2R, so it is never formed, and the memory is that of four gradients of the
adapters, whatever the number of texts.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.lora import adapted
from model.unimoer import UniMoER
from train.batches import TrainingData
from train.loop import Callback, strict
from train.losses import LOSS_SCALE
from train.step import task_loss
from trials import Config

SPACES = ("ab", "w", "along", "across")
HALVES = ("e_a", "e_b", "r_a", "r_b")
PAIRS = [(i, j) for i in range(4) for j in range(i, 4)]  # of HALVES, as a row's `gram` lists them
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the steps: when to look
PROBE_SEED = 1_000_000  # of the probe batches: the same for every arm and seed


def watch(model: UniMoER, data: TrainingData, config: Config) -> Callback | None:
    """A callback that adds `gradients` to the log line of some steps; None where not asked for.

    It measures the parameters that the step has left behind. (Before the first step B is 0, so dA
    is 0 whatever the task.) Each half has `config.probes` batches of each task, or half of an
    epoch's where that is less. Raises ValueError where an epoch has but one.
    """
    if not config.probes:
        return None
    batches = halves(data, config.tasks, config.probes)
    if not batches:
        raise ValueError(
            f"probes={config.probes} compare two halves, but an epoch has one batch: raise steps"
        )
    steps = {max(round(share * config.steps), 1) - 1 for share in SHARES}

    def callback(step: int, line: dict) -> None:
        if step in steps:
            started = time.perf_counter()
            line["gradients"] = measure(model, data, batches)
            line["gradients_batches"] = batches
            line["gradients_seconds"] = round(time.perf_counter() - started, 3)

    return callback


def halves(data: TrainingData, tasks: Sequence[str], most: int) -> int:
    """How many batches of each task a half of the probe set has: `most`, or half an epoch's. Halves
    that shared a query would agree by that, and pass for reliable."""
    return min(most, *(data.per_epoch(task) // 2 for task in tasks))


def unwatched(result: dict[str, Any]) -> dict[str, Any]:
    """A trial's result as it is without `probes`: watching changes nothing but the seconds."""
    if not result["config"]["probes"]:
        return result
    curve = result["curve"]
    looks = sum(line.get("gradients_seconds", 0.0) for line in curve)
    return {
        **{key: value for key, value in result.items() if key != "watched_by"},
        "config": {**result["config"], "probes": 0},
        "seconds": {**result["seconds"], "train": result["seconds"]["train"] - looks},
        "curve": [
            {k: v for k, v in line.items() if not k.startswith("gradients")} for line in curve
        ],
    }


def measure(model: UniMoER, data: TrainingData, batches: int) -> list[dict[str, Any]]:
    """A row for each layer, projection, expert and space, with the inner products of `HALVES`.

    batches: of each task in each half.
    """
    training = model.training
    model.eval()
    found = [
        task_gradient(model, data, task, range(half * batches, (half + 1) * batches))
        for task in ("embedding", "reranking")
        for half in (0, 1)
    ]
    model.train(training)
    assert model.config.lora is not None
    lora, rows = model.config.lora, []
    for layer, prefix, name, group in adapted(model):
        a, b = group.lora_A[name].detach(), group.lora_B[name].detach()
        d_a = [g[f"{prefix}.lora_A.{name}"] for g in found]
        d_b = [g[f"{prefix}.lora_B.{name}"] for g in found]
        grams = {"all": dict.fromkeys(SPACES, torch.zeros(4, 4, dtype=torch.float64))}
        for (expert, part), scale in zip(lora.slices().items(), lora.scales, strict=True):
            one = conflict(a[part], b[:, part], [d[part] for d in d_a],
                           [d[:, part] for d in d_b], scale, group.weight(name))  # fmt: skip
            one = {space: gram.cpu() for space, gram in one.items()}
            grams["all"] = {space: grams["all"][space] + one[space] for space in SPACES}
            if len(lora.experts) > 1:
                grams[expert] = {"w": one["w"]}
        at = {"layer": layer, "projection": name}
        rows += [
            {**at, "expert": expert, "space": space, "gram": _upper(gram)}
            for expert, spaces in grams.items()
            for space, gram in spaces.items()
        ]
    return rows


def task_gradient(
    model: UniMoER, data: TrainingData, task: str, batches: Sequence[int]
) -> dict[str, Tensor]:
    """Mean gradient of one task's loss over probe batches, by the name of an expert's A or B."""
    named = {n: p for n, p in model.trained().items() if ".lora_" in n}
    total = [torch.zeros_like(p) for p in named.values()]
    scale = LOSS_SCALE.get(model.dtype, 1.0)
    for step in batches:
        loss = task_loss(task, model, data, step, PROBE_SEED) / len(batches)
        with strict():
            grads = torch.autograd.grad(loss * scale, list(named.values()))
        for into, grad in zip(total, grads, strict=True):
            into += grad / scale
    return dict(zip(named, total, strict=True))


@torch.no_grad()
def conflict(
    a: Tensor,
    b: Tensor,
    d_a: Sequence[Tensor],
    d_b: Sequence[Tensor],
    scale: float,
    weight: Tensor,
) -> dict[str, Tensor]:
    """Inner products of K gradients of one expert of one linear, (K, K) in float64, by space.

    dA = s B' G and dB = s G A', so the induced gradient is L R with L = [B, dB / s] and
    R = [(B'B)^+ (dA / s) (I - P_A); (A A')^+ A], and <L_k R_k, L_l R_l> is the sum of
    (L_k' L_l) * (R_k R_l').

    Args:
        a: (R, D). b: (O, R). d_a, d_b: K of each, of the same shapes. scale: s = alpha / r.
        weight: W (O, D), frozen.
    """
    a, b = a.double(), b.double()
    x, y = torch.stack(list(d_a)).double(), torch.stack(list(d_b)).double()
    flat = torch.cat((x.flatten(1), y.flatten(1)), 1)
    x, y = x / scale, y / scale
    of_a = torch.linalg.pinv(a @ a.t(), hermitian=True) @ a  # (R, D)
    of_b = torch.linalg.pinv(b.t() @ b, hermitian=True)  # (R, R)
    right = torch.cat((of_b @ (x - x @ a.t() @ of_a), of_a.expand_as(x)), 1)  # (K, 2R, D)
    left = torch.cat((b.expand_as(y), y), 2)  # (K, O, 2R)
    k, _, r = left.shape
    over_o, over_d = left.transpose(1, 2).flatten(0, 1), right.flatten(0, 1)
    product = (over_o @ over_o.t()) * (over_d @ over_d.t())
    whole = product.view(k, r, k, r).sum((1, 3))
    w = weight.double()
    unit = w / w.norm(dim=1, keepdim=True).clamp(min=1e-300)
    part = torch.einsum("kor,kro->ko", left, right @ unit.t())  # of each row, along W's
    along = part @ part.t()
    return {"ab": flat @ flat.t(), "w": whole, "along": along, "across": whole - along}


def _upper(gram: Tensor) -> list[float]:
    """The ten inner products, to six digits."""
    return [float(f"{gram[i, j].item():.6g}") for i, j in PAIRS]


def statistics(gram: Sequence[float]) -> dict[str, float | None]:
    """What one row says of e = (e_a + e_b) / 2 against r.

    cosine; corrected: the mean cosine across tasks and halves over the root of both tasks' own
    cosine between halves (Spearman's correction), None where `reliability`, that root, is under
    0.3 or does not exist; ratio |e| / |r| and similarity 2 |e| |r| / (|e|^2 + |r|^2), where it is
    not None and of norms without that noise, |e|^2 being e_a e_b; removed: the share of the norm
    that PCGrad (2001.06782) removes, -cosine where it is negative. Two gradients of which one is 0
    have no cosine: None.
    """
    g = {(HALVES[i], HALVES[j]): v for (i, j), v in zip(PAIRS, gram, strict=True)}
    g |= {(j, i): v for (i, j), v in g.items()}
    e = (g["e_a", "e_a"] + 2 * g["e_a", "e_b"] + g["e_b", "e_b"]) / 4
    r = (g["r_a", "r_a"] + 2 * g["r_a", "r_b"] + g["r_b", "r_b"]) / 4
    cross = sum(g[x, y] for x in ("e_a", "e_b") for y in ("r_a", "r_b")) / 4

    def cosine(x: str, y: str) -> float | None:
        size = max(g[x, x], 0.0) * max(g[y, y], 0.0)
        return g[x, y] / size**0.5 if size > 0 else None

    found: dict[str, float | None] = dict.fromkeys(
        ("cosine", "corrected", "reliability", "ratio", "similarity", "removed")
    )
    if e <= 0 or r <= 0:
        return found
    raw = cross / (e * r) ** 0.5
    found |= {
        "cosine": raw,
        "removed": max(-raw, 0.0),
    }
    own = [cosine("e_a", "e_b"), cosine("r_a", "r_b")]
    across = [cosine("e_a", "r_b"), cosine("e_b", "r_a")]
    if None not in own + across:
        within = own[0] * own[1]  # type: ignore[operator]
        if min(own) > 0:  # type: ignore[type-var]
            found["reliability"] = within**0.5
            if within**0.5 >= 0.3:
                found["corrected"] = sum(across) / 2 / within**0.5  # type: ignore[arg-type]
                of_e, of_r = g["e_a", "e_b"], g["r_a", "r_b"]
                found["ratio"] = (of_e / of_r) ** 0.5
                found["similarity"] = 2 * (of_e * of_r) ** 0.5 / (of_e + of_r)
    return found


def pooled(rows: Sequence[dict[str, Any]]) -> list[float]:
    """The inner products of several layers or projections taken as one long vector."""
    return [sum(values) for values in zip(*(row["gram"] for row in rows), strict=True)]
