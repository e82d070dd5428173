"""Hard negatives of a collection's training queries, mined once and kept: `python -m train mine`.

A first stage (BM25 or the embedder of a saved model) finds `depth` documents for each query; the
reranker of a saved model may score them anew. Relevant documents, copies of them and copies of each
other, by text, are left out, and what is left is ranked from 1. Negatives are those in a window of
ranks that score below a share of the query's positive (NV-Retriever, arXiv 2407.15831, section 3:
"TopK-PercPos"); see `limit`. A teacher's scores may be written beside them, for distillation.

A folder holds `negatives.jsonl`, a line for each query in the fixed order of training:

    {"query": id, "positive": id, "score": s, "negatives": {id: s, ...}, "found": n,
     "teacher": {id: logit, ...}}

and `manifest.json`: the models' revisions, the data's fingerprint, settings, devices, and when it
is finished the sha256 of the lines and counts. `found` counts the negatives before `fill`,
`teacher` is there where one was asked for. Scores are cosines, BM25's, or, of a reranker, the
sigmoid of its logit (after listwise training no probability: logits are known up to a constant).

While it runs, vectors of documents and finished parts of the queries lie in the folder; started
again it goes on from there. Memory: the ids, one shard of vectors, the queries of a pass; BM25's
index, where that is the first stage.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from eval.collections import Collection
from eval.machine import device_name
from model import saved
from model.files import locked, whole, write_json, write_text
from model.unimoer import UniMoER
from model.weights import revision
from train.batches import training_queries
from train.first_stage import Run, Score, dense, lexical, logits, sigmoid
from train.negatives import MANIFEST, MINED, best_positive, mined_sha256, read_manifest, stranger

FORMAT = 1
LEXICAL = "bm25"  # the name of the first stage that is no model
PICKS = ("sampled", "top")
AT_ONCE = 32_768  # queries that are searched for in one pass over the vectors


@dataclass(frozen=True)
class Settings:
    """What is mined.

    depth: documents of the first stage that are looked at, none of them relevant. ranks: the first
    and the last rank that may be a negative, from 1. margin: see `limit`; 0: no limit. negatives:
    how many of each query, drawn by the query id's own generator ("sampled") or the best ("top").
    fill: whether a query with fewer is filled up with documents drawn from the whole pool, which
    the limit does not bind. queries: how many, in the order of training; 0: all. part: of how many
    queries a file is written.
    """

    depth: int = 200
    ranks: tuple[int, int] = (10, 100)
    margin: float = 0.95
    negatives: int = 7
    pick: str = "sampled"
    fill: bool = False
    queries: int = 0
    part: int = 256

    def __post_init__(self):
        first, last = self.ranks
        if not 1 <= first <= last <= self.depth:
            raise ValueError(
                f"ranks {first} to {last}: expected 1 <= first <= last <= depth={self.depth}"
            )
        if not 0 <= self.margin <= 1:
            raise ValueError(f"margin must lie between 0 (no limit) and 1, got {self.margin}")
        if self.pick not in PICKS:
            raise ValueError(f"pick must be one of {', '.join(PICKS)}, got {self.pick!r}")
        for name, least in (("negatives", 1), ("part", 1), ("queries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def limit(positive: float, margin: float) -> float:
    """What a negative's score has to stay below: s - (1 - margin) |s|, s the positive's score.

    For s > 0 that is margin * s, the paper's rule. For s <= 0 margin * s would lie above s and let
    in what scores better than the positive, so the same distance is taken below it.
    """
    return positive - (1 - margin) * abs(positive) if margin else float("inf")


def choose(query: str, ranked: Mapping[str, float], bound: float, settings: Settings) -> list[str]:
    """The negatives of a query: in the window, below the bound, drawn or the best of them.

    Args:
        ranked: document id -> score, best first, without relevant documents and copies.
    """
    first, last = settings.ranks
    kept = [d for d in list(ranked)[first - 1 : last] if ranked[d] < bound]
    if settings.pick == "top":
        return kept[: settings.negatives]
    return random.Random(query).sample(kept, min(settings.negatives, len(kept)))


def mine(
    folder: Path,
    collection: Collection,
    settings: Settings,
    retriever: str,
    reranker: str = "",
    teacher: str = "",
    device: str = "cpu",
) -> dict:
    """Mine into a folder, or go on where an earlier run of the same settings stopped.

    Args:
        retriever: "bm25" or a folder of `save_pretrained`. reranker, teacher: such folders; "":
            none. The teacher's logits are of each query's positive and chosen negatives.
    Returns:
        the manifest, with `sha256` of the lines and the counts `mined`: queries, `short` (fewer
        negatives than asked for before `fill`) and `none` (no negative at all).
    Raises:
        ValueError: the folder holds something else, or was mined with other models, data or
            settings, or another process is at it; there is no train split, or the pool is too
            small to fill from; or reranker or teacher score lists.
    """
    names = {name for name in (retriever, reranker, teacher) if name not in ("", LEXICAL)}
    for name in {reranker, teacher} - {""}:
        if (config := saved.read_config(Path(name))[0]).listwise:
            raise ValueError(
                f"{name} has rerank_head={config.rerank_head!r}, which scores lists, but negatives "
                "are scored pair by pair: take a model with 'linear' or 'yes_no'"
            )
    order = training_queries(collection, settings.queries)
    if not order:
        raise ValueError(f"{collection.name}: no training query has a relevant document")
    identity = {
        "format": FORMAT,
        "retriever": LEXICAL if retriever == LEXICAL else revision(retriever),
        "reranker": revision(reranker) if reranker else "",
        "teacher": revision(teacher) if teacher else "",
        "scores": "sigmoid" if reranker else "bm25" if retriever == LEXICAL else "cosine",
        "data": {"name": collection.name, "fingerprint": collection.fingerprint},
        **json.loads(json.dumps(asdict(settings))),
    }
    if (folder / MANIFEST).exists() and "sha256" in (found := _begin(folder, identity)):
        mined_sha256(folder)  # what the manifest says is there
        with suppress(OSError):  # another process's, or another user's
            _tidy(folder)  # a kill may have come between the manifest and this
        return found
    _require_ours(folder)
    busy = "another process mines into it: wait for it, or choose another --out"
    with locked(folder, busy):
        # No part of the identity: a machine may go on with what another has begun.
        if "sha256" in (manifest := _begin(folder, identity, device_name(device) if names else "")):
            return manifest
        # Strangers are drawn by their positions in the pool, so parts are of one order of it.
        known = folder / "parts" / collection.order("train")
        parts = {
            known / f"{i:06d}.jsonl": order[at : at + settings.part]
            for i, at in enumerate(range(0, len(order), settings.part))
        }
        if not all(path.exists() for path in parts):
            models = {name: UniMoER.from_pretrained(name, device) for name in names}
            pool = collection.pools["train"]
            if retriever == LEXICAL:
                search, score = lexical(collection)
            else:
                vectors = folder / "vectors" / collection.order("train")
                search, score = dense(models[retriever], collection, pool, vectors)
            again = sigmoid(logits(models[reranker], collection)) if reranker else None
            judge = logits(models[teacher], collection) if teacher else None
            relevant = collection.relevant("train")
            # Of all parts, done or not: what a pass finds must not depend on where it was stopped.
            every, step = list(parts.items()), max(1, AT_ONCE // settings.part)
            for some in (every[at : at + step] for at in range(0, len(every), step)):
                if all(path.exists() for path, _ in some):
                    continue
                depth = settings.depth + max(len(relevant[q]) for _, part in some for q in part)
                runs = search([part for _, part in some], depth)
                shown = tqdm(runs, "mine", len(some), unit="part", leave=False)
                for (path, queries), run in zip(some, shown, strict=True):
                    if path.exists():
                        continue
                    rows = _part(queries, collection, settings, run, score, again, judge, relevant)
                    lines = (json.dumps(row, allow_nan=False) + "\n" for row in rows)
                    write_text(path, "".join(lines))
        return _finish(folder, manifest, list(parts), settings.negatives)


def _part(
    queries: list[str],
    collection: Collection,
    settings: Settings,
    first: Run,
    score: Score,
    again: Score | None,
    judge: Score | None,
    relevant: Mapping[str, Mapping[str, int]],
) -> list[dict]:
    """The lines of some queries.

    first: what the first stage found. score: of that stage. again: of a reranker, in its place.
    judge: of a teacher.
    """
    corpus, pool = collection.corpus, collection.pools["train"]
    judged = collection.qrels["train"]
    runs = {
        q: dict(list(_distinct(first[q], relevant[q], corpus).items())[: settings.depth])
        for q in queries
    }
    positive = {q: best_positive(judged[q]) for q in queries}
    known = {q: first[q][positive[q]] for q in queries if positive[q] in first[q]}
    if again is not None:
        score, known = again, {}
        runs = {q: _ordered(row) for q, row in _scored(runs, score).items()}
    unknown = [(q, positive[q]) for q in queries if q not in known]
    known |= zip((q for q, _ in unknown), score(unknown) if unknown else [], strict=True)
    own = [known[q] for q in queries]
    chosen: dict[str, list[str]] = {}
    found: dict[str, int] = {}
    for query, s in zip(queries, own, strict=True):
        picked = choose(query, runs[query], limit(s, settings.margin), settings)
        chosen[query], found[query] = picked, len(picked)
        rng = random.Random(f"{query} fill")
        while settings.fill and len(picked) < settings.negatives:
            taken = {*relevant[query], *picked}
            texts = {corpus[d] for d in taken}
            picked.append(stranger(query, rng, pool, corpus, taken, texts, settings.negatives))
    strange = {q: [d for d in chosen[q] if d not in runs[q]] for q in queries}
    drawn = _scored(strange, score)
    groups = {q: [positive[q], *chosen[q]] for q in queries}
    taught = _scored(groups, judge) if judge is not None else {}
    return [
        {
            "query": q,
            "positive": positive[q],
            "score": s,
            "negatives": {d: runs[q][d] if d in runs[q] else drawn[q][d] for d in chosen[q]},
            "found": found[q],
            **({"teacher": taught[q]} if taught else {}),
        }
        for q, s in zip(queries, own, strict=True)
    ]


def _distinct(
    run: Mapping[str, float], relevant: Mapping[str, int], corpus: Mapping[str, str]
) -> dict[str, float]:
    """A query's run without relevant documents, copies of them, and later copies of each other."""
    seen = {corpus[d] for d in relevant}
    kept = {}
    for document, value in run.items():
        text = corpus[document]
        if text not in seen:
            seen.add(text)
            kept[document] = value
    return kept


def _scored(wanted: Mapping[str, Sequence[str] | Mapping[str, float]], score: Score) -> Run:
    """query id -> documents with their scores, all pairs in one call."""
    pairs = [(q, d) for q, documents in wanted.items() for d in documents]
    values = iter(score(pairs) if pairs else [])
    return {q: {d: next(values) for d in documents} for q, documents in wanted.items()}


def _ordered(row: Mapping[str, float]) -> dict[str, float]:
    """Best first, equal scores by document id."""
    return dict(sorted(row.items(), key=lambda pair: (-pair[1], pair[0])))


# The folder --------------------------------------------------------------------------------------


def _require_ours(folder: Path) -> None:
    """Raise ValueError if a folder without a manifest holds something."""
    if folder.exists() and not (folder / MANIFEST).exists():
        if any(not p.name.startswith(".") for p in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and was not mined: choose another --out")


def _begin(folder: Path, identity: dict, device: str = "") -> dict:
    """The manifest that is there, if it is of this run; else a new one. `device` is noted."""
    path = folder / MANIFEST
    manifest = read_manifest(path) if path.exists() else {**identity, "devices": []}
    if differ := [key for key in identity if manifest.get(key) != identity[key]]:
        shown = "; ".join(f"{k}: {manifest.get(k)} there, {identity[k]} here" for k in differ)
        raise ValueError(
            f"{folder} was mined otherwise ({shown}): remove it, or choose another --out"
        )
    known = manifest.get("devices", [of] if (of := manifest.get("device")) else [])
    new = [device] if device and device not in known else []
    if not path.exists() or (new and "sha256" not in manifest):
        write_json(path, manifest := {**manifest, "devices": known + new})
    return manifest


def _finish(folder: Path, manifest: dict, parts: list[Path], wanted: int) -> dict:
    """Join the parts, count, and say in the manifest that the folder is whole."""
    digest, counts = hashlib.sha256(), {"queries": 0, "short": 0, "none": 0}
    with whole(folder / MINED) as file:
        for path in parts:
            for line in path.read_bytes().splitlines(keepends=True):
                found = json.loads(line)["found"]
                counts["queries"] += 1
                counts["short"] += found < wanted
                counts["none"] += found == 0
                digest.update(line)
                file.write(line)
    manifest = {**manifest, "sha256": digest.hexdigest(), "mined": counts}
    write_json(folder / MANIFEST, manifest)
    _tidy(folder)
    return manifest


def _tidy(folder: Path) -> None:
    """Remove what a whole folder has no more use for."""
    for name in ("parts", "vectors"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
