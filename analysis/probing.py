"""What can be read off a pair's representation: linear probes with control tasks and code lengths.

A probe is ridge regression (or, for a yes or no, logistic regression) from the features of a pair
to one of its properties, always tested on queries that it has not seen. Beside its score stand the
score on a control task (Hewitt and Liang, 1909.03368): each document has one value of the property
at random, under every query alike, so that a probe gets as far as it can tell documents apart and
remember them (of a property of the query each query has one, of which an unseen one tells nothing);
selectivity is the score less the mean over draws of the control's, or less chance where that is
below it. And the same of probes that have not seen the documents either, on which nothing that they
remember helps. And what the online code saves (Voita and Titov, 2003.12298): how many bits fewer it
takes to send a value when each portion is coded with the probe that was fitted to those before it
than by the values' own distribution.
"""

import hashlib
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from analysis.disk import read
from analysis.properties import of_pairs
from analysis.representation import features
from eval.protocol import EvaluationSet
from eval.provenance import sources
from model.unimoer import UniMoER
from trials import Config

FOLDS = 5
DRAWS = 10  # of the control task
# Of the queries; what is sent before there are enough for folds needs no probe.
PORTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
# Of ridge, on standardised features; each property takes the one that does best on a query that is
# left out. A fixed one overfits what has little in it: with 2,000 pairs of 576 values, noise gets
# -0.3.
PENALTIES = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
TRIED_ON = 1_000  # pairs: the best penalty is noise over signal, however many pairs there are
MOST = 5_000  # pairs that a probe is fitted to: time and memory do not grow beyond


def binary(y: np.ndarray) -> bool:
    return set(np.unique(y).tolist()) <= {0.0, 1.0}


def folds(
    queries: Sequence[Any], documents: Sequence[Any] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test) of unseen queries; with the documents of the pairs, of unseen documents too:
    pairs of those that are tested on leave what is fitted."""
    groups = np.asarray(queries)
    found = list(GroupKFold(FOLDS).split(groups, groups=groups))
    if documents is None:
        return found
    of = np.asarray(documents)
    return [(train[~np.isin(of[train], of[test])], test) for train, test in found]


def score(
    x: np.ndarray, y: np.ndarray, queries: Sequence[Any], documents: Sequence[Any] | None = None
) -> list[float | None]:
    """R^2 of ridge for each column of y (n, T), or balanced accuracy of a logistic probe where all
    of them are yes or no; over `folds`.

    R^2 is pooled over folds, against the mean of all values. None where a column does not vary, or
    a fold leaves fewer than `FOLDS` queries to fit to.
    """
    guessed, yes, groups = np.zeros(y.shape), binary(y), np.asarray(queries)
    for train, test in folds(queries, documents):
        if len(np.unique(groups[train])) < FOLDS:
            return [None] * y.shape[1]
        penalty = _penalty(x[train], y[train], groups[train])
        guessed[test] = _fitted(x[train], y[train], yes, penalty, weigh=True)(x[test])
    found: list[float | None] = []
    for values, guess in zip(y.T, guessed.T, strict=True):
        if len(np.unique(values)) < 2:
            found.append(None)
        elif yes:
            right = [np.mean((guess[values == label] >= 0.5) == label) for label in (0.0, 1.0)]
            found.append(float(np.mean(right)))
        else:
            left = ((values - guess) ** 2).sum() / ((values - values.mean()) ** 2).sum()
            found.append(float(1 - left))
    return found


def control(
    y: np.ndarray, queries: Sequence[Any], documents: Sequence[Any], seed: int = 0
) -> np.ndarray:
    """(n, T): for each document a row of y (n, T), drawn at random, wherever the document is; of a
    column that is one value in each query, for each query."""

    def dealt(groups: Sequence[Any]) -> np.ndarray:
        names, at = np.unique(np.asarray(groups), return_inverse=True)
        return y[np.random.default_rng(seed).integers(len(y), size=len(names))][at]

    _, first, at = np.unique(np.asarray(queries), return_index=True, return_inverse=True)
    of_query = (y == y[first][at]).all(0)
    return np.where(of_query, dealt(queries), dealt(documents))


def code_lengths(
    x: np.ndarray, y: np.ndarray, queries: Sequence[Any]
) -> list[tuple[float, float] | None]:
    """For each column of y (n, T) the bits of a value by the online code of the probe, and by the
    values' own distribution; None where y does not vary.

    Where both are alike the features say nothing, where the first is more they mislead. Portions
    are of whole queries in a fixed random order. A yes or no costs -log2 p; a value, in units of
    its standard deviation, -log2 of the density of a Gaussian around the guess with the variance of
    the probe's residuals on what it was fitted to (in five folds): to whatever precision it is
    sent, that costs both codes the same. Fewer than `FOLDS` queries are no probe's, and in a
    probability or variance the values' own distribution counts as so many queries.
    """
    names = np.unique(np.asarray(queries))
    order = {name: i for i, name in enumerate(np.random.default_rng(0).permutation(names))}
    rank = np.array([order[query] for query in np.asarray(queries).tolist()])
    ends = [round(share * len(names)) for share in PORTIONS]
    yes, varies = binary(y), y.std(0) > 0
    z = y if yes else (y - y.mean(0)) / np.where(varies, y.std(0), 1)
    share = z.mean(0)

    def coded(values: np.ndarray, guess: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """Bits (T,) of values (m, T); of a Gaussian but for those of the precision."""
        if yes:
            p = np.clip(guess, 1e-3, 1 - 1e-3)
            return -(values * np.log2(p) + (1 - values) * np.log2(1 - p)).sum(0)
        bits = 0.5 * np.log2(2 * math.pi * variance)
        return (bits + (values - guess) ** 2 / (2 * variance * math.log(2))).sum(0)

    def prior(values: np.ndarray) -> np.ndarray:
        return coded(values, share if yes else np.zeros_like(share), np.ones_like(share))

    sent = prior(z[rank < ends[0]])
    for begin, end in zip(ends, ends[1:], strict=False):
        known, new = rank < begin, (rank >= begin) & (rank < end)
        groups = np.asarray(queries)[known]
        learnt = z[known].std(0) > 0 if begin >= FOLDS else np.zeros(len(varies), bool)
        if not learnt.any():
            sent += prior(z[new])
            continue
        own, values = x[known], z[known]
        penalty = _penalty(own, values, groups)
        guess, variance = _fitted(own, values, yes, penalty)(x[new]), np.ones(len(varies))
        # Queries count, not pairs, of which those of a query may all have one value: few of them
        # say little of how far a guess is off.
        trust = begin / (begin + FOLDS)
        if yes:
            guess = trust * guess + (1 - trust) * share
        else:
            left = np.concatenate([
                values[test] - _fitted(own[train], values[train], yes, penalty)(own[test])
                for train, test in GroupKFold(FOLDS).split(own, values, groups)
            ])  # fmt: skip
            variance = np.where(learnt, trust * (left**2).mean(0) + 1 - trust, 1)
        sent += np.where(learnt, coded(z[new], guess, variance), prior(z[new]))
    pairs = zip(sent / len(y), prior(z) / len(y), varies, strict=True)
    return [(float(a), float(b)) if varied else None for a, b, varied in pairs]


def _penalty(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(T,) of `PENALTIES`, for each column of y (n, T), by the error of each query left out whole
    (a pair alone would be told by the others of its query), of about `TRIED_ON` pairs.

    With H the matrix that takes y to what ridge makes of it, the residuals of a group g that is
    left out are (I - H_gg)^-1 r_g. All columns and penalties share one decomposition.
    """
    names, at = np.unique(queries, return_inverse=True)
    step = max(1, min(len(x) // TRIED_ON, len(names) // FOLDS))
    kept = at % step == 0
    y, at = y[kept] - y[kept].mean(0), at[kept]
    z = StandardScaler().fit_transform(x[kept])
    size, axes = np.linalg.eigh(z.T @ z)
    z = z @ axes
    groups = [np.flatnonzero(at == group) for group in np.unique(at)]
    errors = np.zeros((len(PENALTIES), y.shape[1]))
    for row, penalty in zip(errors, PENALTIES, strict=True):
        part = z / (size + penalty)
        left = y - part @ (z.T @ y)
        for g in groups:
            free = np.eye(len(g)) - part[g] @ z[g].T - 1 / len(y)  # the last for the intercept
            row += (np.linalg.solve(free, left[g]) ** 2).sum(0)
    return np.array(PENALTIES)[errors.argmin(0)]


def _fitted(
    x: np.ndarray,
    y: np.ndarray,
    yes: bool,
    penalty: np.ndarray,
    weigh: bool = False,
) -> Callable[[np.ndarray], np.ndarray]:
    """A probe of all columns of y (n, T): standardised features (m, D) -> guesses (m, T).

    One ridge has all columns of a penalty, since they share nearly all of the work.
    yes: logistic instead, and guesses are probabilities; weigh: with both classes weighed alike. At
    the values' mean the curvature of its loss is p (1 - p) times that of squares, so that is what
    ridge's penalty is worth there.
    """
    if not yes:
        scaler = StandardScaler().fit(x)
        z = scaler.transform(x)
        parts = [(penalty == one, one) for one in np.unique(penalty)]
        made = [(part, Ridge(one).fit(z, y[:, part])) for part, one in parts]

        def guess(new: np.ndarray) -> np.ndarray:
            scaled, found = scaler.transform(new), np.empty((len(new), y.shape[1]))
            for part, ridge in made:
                found[:, part] = ridge.predict(scaled).reshape(len(new), -1)
            return found

        return guess
    probes = []
    for column, least in zip(y.T, penalty, strict=True):
        probe = None  # what does not vary needs none
        if column.std() > 0:
            weight, curvature = ("balanced", 0.25) if weigh else (None, column.var())
            # Newton: neighbouring features are nearly the same, and lbfgs takes hundreds of steps.
            model = LogisticRegression(
                C=1 / (least * curvature), class_weight=weight, solver="newton-cholesky"
            )
            probe = make_pipeline(StandardScaler(), model).fit(x, column)
        probes.append((probe, column.mean()))
    return lambda new: np.stack(
        [np.full(len(new), mean) if probe is None else probe.predict_proba(new)[:, 1]
         for probe, mean in probes], 1,
    )  # fmt: skip


def probe(
    layers: np.ndarray,
    values: dict[str, np.ndarray],
    queries: Sequence[Any],
    documents: Sequence[Any],
) -> dict[str, list[dict[str, float | None]]]:
    """property -> by layer: what `_selectivity` says of unseen queries, and as `new_...` of unseen
    queries and documents; and bits of a value by the online code, by the values' own distribution,
    and saved.

    layers: (layers, n, D). queries, documents: of each of the n pairs.
    """
    found: dict[str, list[dict[str, float | None]]] = {name: [] for name in values}
    for yes in (False, True):
        names = [name for name, y in values.items() if binary(y) == yes]
        if not names:
            continue
        y = np.stack([values[name] for name in names], 1)
        drawn = [control(y, queries, documents, seed) for seed in range(DRAWS)]
        every = np.concatenate([y, *drawn], 1)
        for x in layers:
            columns = (
                _selectivity(score(x, every, queries), len(names), 0.5 if yes else 0.0),
                _selectivity(score(x, every, queries, documents), len(names), 0.5 if yes else 0.0),
                code_lengths(x, y, queries),
            )
            for name, seen, new, bits in zip(names, *columns, strict=True):
                own, prior = bits or (None, None)
                found[name].append({
                    **seen, **{f"new_{key}": value for key, value in new.items()}, "bits": own,
                    "prior_bits": prior, "saved_bits": bits and bits[1] - bits[0],
                })  # fmt: skip
    return found


def _selectivity(
    scores: Sequence[float | None], count: int, chance: float
) -> list[dict[str, float | None]]:
    """Of the scores of `count` properties, then of their controls, draw by draw: of each property
    its score, the control's mean and standard deviation over draws, and the selectivity."""
    rows: list[dict[str, float | None]] = []
    for at, real in enumerate(scores[:count]):
        drawn = [fake for fake in scores[at + count :: count] if fake is not None]
        if real is None or not drawn:
            rows.append(dict.fromkeys(("score", "control", "control_sd", "selectivity")))
            continue
        mean = float(np.mean(drawn))
        rows.append({"score": real, "control": mean, "control_sd": float(np.std(drawn)),
                     "selectivity": real - max(mean, chance)})  # fmt: skip
    return rows


def measure(
    model: UniMoER, evaluation: EvaluationSet, data: object, config: Config, place: Path
) -> dict[str, Any]:
    """Probes of the pairs of `measured` reranking queries: the model, its experts, and the base.

    Of the base all layers, of the others the adapted ones: those below are the base's. Of an expert
    the model with its weight at 1 in every layer, not what it adds to the model as it is.
    """
    assert model.config.lora is not None
    texts, experts = evaluation.collection, model.config.lora.experts
    chosen = sorted(evaluation.candidates, key=lambda query: random.Random(query).random())
    chosen = chosen[: config.measured]
    keys = [(q, d) for q in chosen for d in evaluation.candidates[q]][:MOST]
    values, cut = of_pairs(model, evaluation, keys)
    pairs = [(texts.queries[q], texts.corpus[d]) for q, d in keys]
    ids, (queries, documents) = evaluation.tokenizer.pairs(pairs), zip(*keys, strict=True)
    views: dict[str, dict[str, Any]] = {"model": {}, "base": {"base": True, "first": 0}}
    if len(experts) > 1:
        for at, name in enumerate(experts):
            views[name] = {"fixed": [float(i == at) for i in range(len(experts))]}
    probes, mark = {}, ""
    with tempfile.TemporaryDirectory(prefix=".views", dir=place.parent) as folder:
        for name, how in views.items():
            x = features(model, ids, "reranking", Path(folder) / "view.npy", **how)
            if name == "base":
                mark = _mark(x.numpy(), values)
                if (known := _known(place, mark)) is not None:
                    probes[name] = known
                    continue
            # Hundreds of small fits: where two threads share cores with others, BLAS waits for its
            # own and takes ten times as long.
            with threadpool_limits(1, "blas"):
                probes[name] = probe(x.numpy(), values, queries, documents)
    fitted = [sum(len(train) for train, _ in folds(queries, of)) for of in (None, documents)]
    return {
        "first_layer": model.config.lora.first_layer,
        "pairs": len(pairs),
        "queries": len(set(queries)),
        "document_tokens": config.document_tokens,
        "cut": cut,
        "kept": fitted[1] / fitted[0],
        "recurring": sum(n for n in Counter(documents).values() if n > 1),
        "probes": probes,
        "base_mark": mark,
        "binary": [name for name, y in values.items() if binary(y)],
    }


def _mark(x: np.ndarray, values: dict[str, np.ndarray]) -> str:
    """A hash of what is probed: the features and the properties."""
    digest = hashlib.sha256()
    for layer in x:  # no copy of all of them
        digest.update(np.ascontiguousarray(layer).data)
    for name, y in values.items():
        digest.update(name.encode() + np.ascontiguousarray(y).tobytes())
    return digest.hexdigest()


def _known(place: Path, mark: str) -> dict[str, Any] | None:
    """The probes of the base as another trial of this setting found them by the same code: it is
    the same base, and most of the work."""
    for path in sorted(place.parent.parent.glob("*/probing-seed*.json")):
        found = read(path)
        if found.get("base_mark") == mark and found.get("sources") == sources("analysis"):
            return found["probes"]["base"]
    return None
