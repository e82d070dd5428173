"""What a trained model makes of its inputs, layer by layer and expert by expert.

All views are of the same texts: documents as they are embedded and pairs as they are reranked. The
features of a layer are the means over a text's tokens of the hidden state behind it, each token at
root mean square 1, as every later block reads it: in the raw states one direction, that of the
massive activations (arXiv 2402.17762) of the first token, has nearly all of the variance, and any
two models are alike. Views of one model: `model` as it is, each expert alone (weight 1), `uniform`
weights, `base` without experts.

Features lie in files that are mapped into memory and are read layer by layer in batches, so that
what has to be in memory at once does not grow with the number of texts; the maps on a plane are of
`MAPPED` texts of each kind at most.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor

from analysis import spectra, subspaces
from analysis.cka import cka
from analysis.routing import inputs
from analysis.subspace import stir
from eval.protocol import EvaluationSet
from model.lora import LinearGroup, adapted
from model.packed import segment_mean
from model.prefix import TextSet
from model.router import TASKS
from model.texts import in_batches
from model.unimoer import UniMoER
from train.batches import TrainingData
from trials import Config

TASK_OF_KIND = {"document": "embedding", "pair": "reranking"}  # -> the task that sees it
OTHERS = ("emb-only", "rank-only", "joint-single")  # whose features an arm is held against
MAPPED = 1000  # texts of each kind on a plane
Views = dict[str, dict[str, Tensor]]  # kind -> view -> (layers, n, D)
Data = Callable[[], TrainingData]  # of both tasks, made when it is asked for


def measure(
    model: UniMoER, evaluation: EvaluationSet, data: Data, config: Config, place: Path
) -> dict[str, Any]:
    """Everything about one trained model; its features are kept as `<place>.features/<kind>.npy`.

    place: runs/<experiment>/<setting>/<arm>/seed<k>; arms that were measured before lie beside it.
    """
    with tempfile.TemporaryDirectory(prefix=".views", dir=place.parent) as folder:
        found = _measure(model, evaluation, config.measured, place, Path(folder))
    return {
        **found,
        # Of an arm that trained one task, the other's gradient passes through what never saw it.
        "gradients": subspaces.of_gradients(model, data()) if len(config.tasks) > 1 else [],
        "deltas": subspaces.of_changes(place),
    }


def _measure(
    model: UniMoER, evaluation: EvaluationSet, count: int, place: Path, folder: Path
) -> dict[str, Any]:
    assert model.config.lora is not None
    ids, _ = inputs(evaluation, count)
    experts = model.config.lora.experts
    views: Views = {}
    energy: dict[str, dict] = {}
    for kind, task in TASK_OF_KIND.items():
        place_of = {view: folder / f"{kind}-{view}.npy" for view in ("model", "base", "uniform")}
        with crosstalk(model) as energy[kind]:
            views[kind] = {"model": features(model, ids[kind], task, place_of["model"])}
        views[kind]["base"] = features(model, ids[kind], task, place_of["base"], base=True)
        if len(experts) > 1:
            for at, name in enumerate(experts):
                one = [float(i == at) for i in range(len(experts))]
                path = folder / f"{kind}-expert-{name}.npy"
                views[kind][name] = features(model, ids[kind], task, path, fixed=one)
            even = [1 / len(experts)] * len(experts)
            views[kind]["uniform"] = features(
                model, ids[kind], task, place_of["uniform"], fixed=even
            )
    _keep(views, place.with_name(f"{place.name}.features"))
    return {
        "first_layer": model.config.lora.first_layer,
        "experts": list(experts),
        "texts": {kind: of["model"].shape[1] for kind, of in views.items()},
        "cka": within(views),
        "cka_arms": against(views, place),
        "stir": overlaps(views),
        "linears": linears(model),
        "crosstalk": energies(energy),
        "maps": {name: {view: plane(views, view, name) for view in ("model", "uniform", "base")
                        if view in views["pair"]} for name in MAP_METHODS},
    }  # fmt: skip


def _keep(views: Views, folder: Path) -> None:
    """The features of the model itself in fp16, for the arms that are measured later."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for kind, of in views.items():
        made = mapped(part / f"{kind}.npy", tuple(of["model"].shape), np.float16)
        for into, layer in zip(made, of["model"], strict=True):
            for target, rows in zip(into.split(4096), layer.split(4096), strict=True):
                target.copy_(rows)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def mapped(path: Path, shape: tuple[int, ...], dtype: type = np.float32) -> Tensor:
    """A new .npy file as a tensor; what does not fit into memory stays on disk."""
    return torch.from_numpy(np.lib.format.open_memmap(path, "w+", dtype, shape))


def features(
    model: UniMoER,
    ids: list[list[int]],
    task: str,
    path: Path,
    *,
    fixed: Sequence[float] | None = None,
    base: bool = False,
    first: int | None = None,
) -> Tensor:
    """(layers, n, D) fp32 of the layers from `first` on, mapped from the new file `path`.

    fixed: weights (E,) in place of the routers'. first: None: the lowest adapted layer.
    """
    assert model.config.lora is not None
    layers = model.decoder.layers[model.config.lora.first_layer if first is None else first :]
    width = model.decoder.config.hidden_size
    out = mapped(path, (len(layers), len(ids), width))
    now: dict[str, Any] = {}

    def keep(at: int):
        def hook(layer, given, made) -> None:
            x, delta = made[:2]
            hidden = x if delta is None else x + delta[:, :width]
            read = F.rms_norm(hidden.float(), (width,))
            now["rows"][at] = segment_mean(read, now["batch"]).cpu()

        return hook

    def step(batch, states, base):
        now["batch"], now["rows"] = batch, [torch.empty(0)] * len(layers)
        tasks = torch.full((len(batch.lengths),), TASKS.index(task), device=model.device)
        given = None
        if fixed is not None:
            given = torch.tensor([fixed] * len(batch.lengths), device=model.device)
        _, routing = model.decoder(batch, tasks, weights=given, base=base)
        return torch.stack(now["rows"], 1), routing

    hooks = [layer.register_forward_hook(keep(at)) for at, layer in enumerate(layers)]
    try:
        for indices, rows in in_batches(model.decoder, TextSet(ids), step, base=base):
            out[:, indices] = rows.transpose(0, 1)
    finally:
        for hook in hooks:
            hook.remove()
    return out


def within(views: Views) -> dict[str, dict[str, list[float | None]]]:
    """kind -> "view | view" -> CKA by layer, of the views of one model."""
    return {
        kind: {
            f"{a} | {b}": [cka(x, y) for x, y in zip(of[a], of[b], strict=True)]
            for i, a in enumerate(of)
            for b in list(of)[i + 1 :]
        }
        for kind, of in views.items()
    }


def before(arm: str) -> list[str]:
    """Of OTHERS, those that a fresh run measures before an arm, which is held against them."""
    return list(takewhile(lambda other: other != arm, OTHERS))


def against(views: Views, place: Path) -> dict[str, dict[str, list[float | None]]]:
    """kind -> other arm -> CKA by layer with the same seed of that arm, where it was measured."""
    found: dict[str, dict[str, list[float | None]]] = {kind: {} for kind in views}
    for arm in before(place.parent.name):
        folder = place.parent.parent / arm / f"{place.name}.features"
        if not folder.exists():
            continue
        for kind, of in views.items():
            # Mapped for copies on writing, which nobody does: torch warns of read-only memory.
            theirs = torch.from_numpy(np.load(folder / f"{kind}.npy", mmap_mode="c"))
            if theirs.shape == of["model"].shape:
                pairs = zip(of["model"], theirs, strict=True)
                found[kind][arm] = [cka(x, y) for x, y in pairs]
    return found


def overlaps(views: Views) -> list[dict[str, Any]]:
    """By layer: STIR of what training added for documents and for pairs, and its sign.

    direction: the cosine of the two mean changes. Tasks that share a subspace may use it alike
    (near 1: transfer) or against each other (below 0).
    """
    rows = []
    for layer in range(len(views["pair"]["model"])):
        e, r = ((views[kind]["model"][layer], views[kind]["base"][layer]) for kind in TASK_OF_KIND)
        a, b = (with_.mean(0) - without.mean(0) for with_, without in (e, r))
        size = (a.norm() * b.norm()).item()
        rows.append({**stir(e, r), "direction": (a @ b).item() / size if size > 0 else None})
    return rows


def linears(model: UniMoER) -> list[dict[str, Any]]:
    """`spectra.experts` of every adapted linear."""
    assert model.config.lora is not None
    lora, rows = model.config.lora, []
    for layer, _, name, group in adapted(model):
        a, b = group.lora_A[name].detach().cpu(), group.lora_B[name].detach().cpu()
        parts = {
            expert: (a[part], b[:, part], scale)
            for (expert, part), scale in zip(lora.slices().items(), lora.scales, strict=True)
        }
        rows.append({"layer": layer, "projection": name, **spectra.experts(parts)})
    return rows


@contextmanager
def crosstalk(model: UniMoER) -> Iterator[dict]:
    """While open, adds up ||s B_i A_i x||^2 over tokens: (layer, projection) -> expert -> sum.

    It sees the inputs of the linears, so the model must run on the PyTorch path.
    """
    assert model.config.lora is not None and not model.decoder.fused
    lora, found, hooks = model.config.lora, {}, []

    def watch(layer: int, name: str):
        def hook(group: LinearGroup, given) -> None:
            x = given[0].float()
            row = found.setdefault((layer, name), dict.fromkeys((*lora.experts, "tokens"), 0.0))
            row["tokens"] += len(x)
            a, b = group.lora_A[name].float(), group.lora_B[name].float()
            for (expert, part), scale in zip(lora.slices().items(), lora.scales, strict=True):
                s = x @ a[part].t()  # ||B s||^2 = s' (B'B) s
                gram = b[:, part].t() @ b[:, part]
                row[expert] += scale**2 * ((s @ gram) * s).sum().item()

        return hook

    for layer, _, name, group in adapted(model):
        hooks.append(group.register_forward_pre_hook(watch(layer, name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def energies(found: dict[str, dict]) -> list[dict[str, Any]]:
    """Rows of E ||dW_i x||^2 by expert and kind of text."""
    return [
        {"layer": layer, "projection": name, "energy": {
            expert: {kind: of[layer, name][expert] / of[layer, name]["tokens"]
                     for kind, of in found.items()}
            for expert in found["pair"][layer, name] if expert != "tokens"
        }}
        for layer, name in found["pair"]
    ]  # fmt: skip


def tsne(x: np.ndarray) -> np.ndarray:
    near = min(30.0, (len(x) - 1) / 3)
    return TSNE(2, perplexity=near, init="pca", random_state=0).fit_transform(x)


def umap(x: np.ndarray) -> np.ndarray:
    from umap import UMAP  # compiles itself for seconds when it is imported

    near, threads = min(15, len(x) - 1), torch.get_num_threads()
    try:
        return np.asarray(UMAP(near, init="pca", random_state=0, n_jobs=1).fit_transform(x))
    finally:
        torch.set_num_threads(threads)  # its compiler sets OpenMP's number for the whole process


MAP_METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"t-SNE": tsne, "UMAP": umap}


def plane(views: Views, view: str, method: str) -> dict[str, list[list[float]]]:
    """A map of the last layer: kind -> (n, 2), documents and pairs in one."""
    rows = {kind: of[view][-1][:MAPPED].numpy() for kind, of in views.items()}
    found = MAP_METHODS[method](np.concatenate(list(rows.values()))).round(3)
    parts = np.split(found, np.cumsum([len(x) for x in rows.values()])[:-1])
    return {kind: part.tolist() for kind, part in zip(rows, parts, strict=True)}
