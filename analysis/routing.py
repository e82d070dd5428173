"""What the routers of a trained model do: with task, template, domain and layer.

The expert of a text is taken as drawn with its weights, Z ~ w(text), so that soft and hard routers
have one measure: I(Z; Y) = H(mean w) - sum_y p(y) H(mean w given y), in nats. It is 0 when all
groups of texts are weighed alike and H(Y) at most. Estimated from a sample it is above 0 by chance,
so it stands beside its mean under shuffled labels, and the share of shuffles that reach it.

Soft weights of .30 and .32 may tell two tasks apart without fail, and still a draw with them says
next to nothing of the task: what routing does is I(Z; Y), what could be read off it is `decoded`.
"""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.roles import assign
from eval.protocol import EvaluationSet
from model.prefix import TextSet
from model.router import TASKS
from model.texts import in_batches
from model.unimoer import UniMoER
from trials import Config

SHUFFLES = 2000  # at the least
# And so many for each layer: Holm's first step over all layers and 9 seeds needs p <= .05 / (9 L).
BY_LAYER = 200
DOMAINS = 6  # whose weights are kept
# kind of input -> the task whose forward pass sees it
TASK_OF_KIND = {
    "query": "embedding",
    "document": "embedding",
    "pair": "reranking",
    "bare pair": "embedding",  # the words of the pair without its template
}
OF_TASK = {"embedding": ("query", "document"), "reranking": ("pair",)}


def inputs(evaluation: EvaluationSet, count: int) -> tuple[dict[str, list[list[int]]], list[str]]:
    """Token ids of each kind, `count` of each at most and text i from query i; their domains."""
    texts, tokenizer = evaluation.collection, evaluation.tokenizer
    # Published collections may judge documents that their corpus lacks.
    judged = {q: {d: r for d, r in evaluation.qrels[q].items() if d in texts.corpus}
              for q in evaluation.queries}  # fmt: skip
    known = [q for q in evaluation.queries if judged[q]]
    order = sorted(known, key=lambda query: random.Random(query).random())[:count]
    queries = [texts.queries[q] for q in order]
    documents = [texts.corpus[max(judged[q], key=lambda d, q=q: judged[q][d])] for q in order]
    pairs = list(zip(queries, documents, strict=True))
    found = {
        "query": tokenizer.queries(queries),
        "document": tokenizer.documents(documents),
        "pair": tokenizer.pairs(pairs),
        # Cut as the pair is, so that nothing but the template's words differs.
        "bare pair": tokenizer.with_pair("{query}\n{document}").pairs(pairs),
    }
    return found, [evaluation.clusters[q] for q in order]


def weigh(model: UniMoER, ids: list[list[int]], task: str) -> np.ndarray:
    """(n, layers, E) weights; the mean over a text's tokens where tokens are routed."""
    step = model.embed if task == "embedding" else model.score
    kept: list[np.ndarray] = []

    def watched(batch, states, base):
        result, routing = step(batch, states, base)
        rows = np.stack([w.float().cpu().numpy() for w in routing], 1)  # (B or N, layers, E)
        if len(rows) != len(batch.lengths):
            ends = np.cumsum(batch.lengths)
            rows = np.stack([part.mean(0) for part in np.split(rows, ends[:-1])])
        kept.append(rows)
        return result, routing

    order = [i for done, _ in in_batches(model.decoder, TextSet(ids), watched) for i in done]
    return np.concatenate(kept)[np.argsort(order)]


def entropy(w: np.ndarray) -> np.ndarray:
    """Of weights (..., E), in nats."""
    safe = np.where(w > 0, w, 1.0)
    return -(safe * np.log(safe)).sum(-1)


def information(
    w: np.ndarray, labels: Sequence[Any] | np.ndarray, layers: int = 1, seed: int = 0
) -> dict[str, float]:
    """I(Z; label) of weights (n, E), its mean under shuffles, and p; layers: that are told of."""
    shuffles = max(SHUFFLES, BY_LAYER * layers)
    _, ids = np.unique(np.asarray(labels), return_inverse=True)
    rng = np.random.default_rng(seed)
    w = w / w.sum(-1, keepdims=True)  # an always-on expert weighs 1 beside the others' simplex
    sizes = np.bincount(ids)
    share = sizes / len(ids)

    def value(of: np.ndarray) -> float:
        sums = [np.bincount(of, weights=column, minlength=len(sizes)) for column in w.T]
        means = np.stack(sums, 1) / sizes[:, None]  # (G, E)
        return float(entropy(w.mean(0)) - share @ entropy(means))

    found = value(ids)
    shuffled = np.array([value(rng.permutation(ids)) for _ in range(shuffles)])
    reached = int((shuffled >= found - 1e-12).sum())
    return {
        "nats": max(found, 0.0),
        "by_chance": float(np.mean(shuffled)),
        "p": (1 + reached) / (1 + shuffles),
    }


def decoded(w: np.ndarray, labels: Sequence[Any] | np.ndarray) -> float:
    """Balanced accuracy of a linear reader of weights (n, E), on texts that it has not seen."""
    folds = min(5, int(np.unique(np.asarray(labels), return_counts=True)[1].min()))
    return float(np.mean(cross_val_score(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), w, labels,
        cv=StratifiedKFold(folds, shuffle=True, random_state=0), scoring="balanced_accuracy",
    )))  # fmt: skip


def summarise(
    weights: dict[str, np.ndarray], domains: Sequence[str], experts: Sequence[str]
) -> dict[str, Any]:
    """Every statistic of the weights (n, layers, E) of each kind of text; by layer in lists."""
    of_task = {t: np.concatenate([weights[k] for k in OF_TASK[t]]) for t in TASKS}
    # As many texts of each task, so that the label's entropy is ln 2.
    size = min(map(len, of_task.values()))
    rng = np.random.default_rng(0)
    even = {t: w[rng.permutation(len(w))[:size]] for t, w in of_task.items()}
    both, labels = np.concatenate(list(even.values())), np.repeat(TASKS, size)
    layers = range(both.shape[1])
    means = {kind: w.mean(0) for kind, w in weights.items()}  # (layers, E)
    by_task = {t: w.mean(0) for t, w in of_task.items()}
    shift = {  # total variation between mean weights
        "template": _distance(means["pair"], means["bare pair"]),
        "content": _distance(means["bare pair"], means["document"]),
        "task": _distance(by_task["embedding"], by_task["reranking"]),
    }
    mixed = both.mean(0)
    return {
        "experts": list(experts),
        "texts": {kind: len(w) for kind, w in weights.items()},
        "means": {kind: m.round(5).tolist() for kind, m in means.items()},
        "entropy": {t: entropy(w).mean(0).tolist() for t, w in of_task.items()},
        "dead": [[experts[e] for e in np.flatnonzero(row < 0.01).tolist()] for row in mixed],
        "within": np.mean([w.var(0).sum(-1) for w in of_task.values()], 0).tolist(),
        "between": np.stack(list(by_task.values())).var(0).sum(-1).tolist(),
        "shuffles": max(SHUFFLES, BY_LAYER * len(layers)),
        "task": [information(both[:, i], labels, len(layers)) for i in layers],
        "decoded": [decoded(both[:, i], labels) for i in layers],
        "domain": {
            kind: [information(weights[kind][:, i], domains, len(layers)) for i in layers]
            for kind in ("query", "document", "pair")
            if len(set(domains)) < len(domains)  # without domains each query is its own
        },
        "domains": by_domain(weights, domains),
        "shift": {name: values.tolist() for name, values in shift.items()},
        "roles": assign({t: m.mean(0) for t, m in by_task.items()}, experts),
    }


def by_domain(weights: dict[str, np.ndarray], domains: Sequence[str]) -> dict[str, Any]:
    """Of the DOMAINS domains with most texts: how many of a kind, and mean weights (E,) by kind.

    Means over texts and layers. Domains of which there are equally many are taken by name.
    """
    counts = Counter(domains)
    most = sorted(counts, key=lambda name: (-counts[name], name))[:DOMAINS]
    most = [name for name in most if counts[name] > 1]  # without domains each query is its own
    labels = np.asarray(domains)
    return {
        name: {
            "texts": counts[name],
            **{kind: weights[kind][labels == name].mean((0, 1)).round(5).tolist()
               for kind in ("query", "document", "pair")},
        }
        for name in most
    }  # fmt: skip


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a - b).sum(-1) / 2


def measure(
    model: UniMoER, evaluation: EvaluationSet, data: object, config: Config, place: Path
) -> dict[str, Any] | None:
    """The summary of a trained model on `measured` texts of each kind; None without a router."""
    if not model.routers():
        return None
    ids, domains = inputs(evaluation, config.measured)
    weights = {kind: weigh(model, ids[kind], task) for kind, task in TASK_OF_KIND.items()}
    assert model.config.lora is not None
    found = summarise(weights, domains, model.config.lora.experts)
    return {"first_layer": model.config.lora.first_layer, **found}
