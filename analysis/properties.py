"""What a probe may find in a pair: properties of its texts, of its query and of the judgment."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from eval.protocol import EvaluationSet
from model.prefix import TextSet
from model.unimoer import UniMoER

WORD = re.compile(r"\w+")


def terms(text: str) -> list[str]:
    return WORD.findall(text.lower())


def frequencies(evaluation: EvaluationSet, words: frozenset[str]) -> Counter[str]:
    """How many documents of the split's pool have each of some words; the collection keeps it.

    Each text is asked for once and let go: the corpus may be larger than memory.
    """
    split, of = evaluation.config.split, evaluation.collection
    if (split, words) not in of.frequencies:
        texts = (of.corpus[document] for document in of.pools[split])
        of.frequencies[split, words] = Counter(
            word for text in texts for word in words.intersection(terms(text))
        )
    return of.frequencies[split, words]


def of_text(
    pairs: Sequence[tuple[str, str]],
    scores: Sequence[float],
    seen: Mapping[str, int],
    documents: int,
) -> dict[str, np.ndarray]:
    """name -> (n,) of pairs (query, what a model reads of the document).

    covered_terms, covered_share: distinct query terms that the document has. tf_sum: how often it
    has them. idf_sum: sum of ln(N / n_t) of those covered, n_t being `seen` of N = `documents`.
    bm25: the first stage's `scores`, of whole documents. bigrams: the share of the query's bigrams
    that the document has word by word. length: ln of the document's words. exact: whether any query
    bigram is there (0 or 1).
    """
    found: dict[str, list[float]] = {}
    for (query, document), score in zip(pairs, scores, strict=True):
        asked, words = terms(query), terms(document)
        counts, distinct = Counter(words), set(asked)
        covered = [word for word in distinct if counts[word]]
        grams = set(zip(asked, asked[1:], strict=False))
        there = grams & set(zip(words, words[1:], strict=False))
        share = len(there) / len(grams) if grams else 0.0
        row = {
            "covered_terms": len(covered),
            "covered_share": len(covered) / max(len(distinct), 1),
            "tf_sum": sum(counts[word] for word in covered),
            "idf_sum": sum(math.log(documents / seen[word]) for word in covered if seen[word]),
            "bm25": score,
            "bigrams": share,
            "length": math.log(max(len(words), 1)),
            "exact": float(share > 0),
        }
        for name, value in row.items():
            found.setdefault(name, []).append(float(value))
    return {name: np.array(values) for name, values in found.items()}


def parts_of_speech(text: str) -> tuple[float, float]:
    """The shares of nouns and of verbs among a text's words (Penn tags, a rule-based tagger)."""
    from textblob.en import tag  # takes two seconds to import

    tags = [kind for word, kind in tag(text) if WORD.match(word)]
    if not tags:
        return 0.0, 0.0
    nouns, verbs = (sum(kind.startswith(first) for kind in tags) for first in ("NN", "VB"))
    return nouns / len(tags), verbs / len(tags)


def of_pairs(
    model: UniMoER, evaluation: EvaluationSet, keys: Sequence[tuple[str, str]]
) -> tuple[dict[str, np.ndarray], int]:
    """name -> (n,) of pairs (query id, document id), and of how many the document is cut.

    Beside those of `of_text`: `similarity`, the cosine of query and document in the untrained base;
    `nouns` and `verbs`, their shares in the query; `relevant`, the judgment. Of a document that is
    cut the model reads the beginning, so they are of that; only BM25's score and the numbers of
    documents with a term are of whole texts.
    """
    texts, tokenizer = evaluation.collection, evaluation.tokenizer
    queries, documents = [texts.queries[q] for q, _ in keys], [texts.corpus[d] for _, d in keys]
    read = tokenizer.visible(list(zip(queries, documents, strict=True)))
    words = frozenset(word for query in queries for word in terms(query))
    values = of_text(
        list(zip(queries, read, strict=True)),
        [evaluation.candidates[q][d] for q, d in keys],
        frequencies(evaluation, words),
        len(texts.pools[evaluation.config.split]),
    )
    sides = (tokenizer.queries(queries), tokenizer.documents(documents))
    first, second = (model.embed_all(TextSet(ids), base=True) for ids in sides)
    values["similarity"] = (first * second).sum(1).double().numpy()
    spoken = {query: parts_of_speech(query) for query in set(queries)}
    values["nouns"], values["verbs"] = np.array([spoken[query] for query in queries]).T
    judged = evaluation.qrels
    values["relevant"] = np.array([float(judged[q].get(d, 0) > 0) for q, d in keys])
    return values, sum(a != b for a, b in zip(read, documents, strict=True))
