"""BM25: the lexical row of every table, the source of hard negatives and of reranking candidates.

The scores are `bm25s`'s (arXiv 2407.03618, method "lucene"); the ranking is done here, because
`bm25s` breaks ties by chance of memory layout and candidates have to be the same in every run.
"""

import errno
import hashlib
import shutil
import sys
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import bm25s
import numpy as np
import Stemmer

from model.files import locked, put

# A letter or digit, with the accents and vowel signs that `\w` leaves out (those of Latin, Arabic,
# Indic and Thai script): without them a Hindi word falls into single letters.
MARKS = r"\u0300-\u036f\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff\u0e31-\u0e3a\u0e47-\u0e4e"
LETTER = rf"(?:[^\W_]|[{MARKS}])"
FORMAT = 1  # of an index that is kept; raised when texts are cut into other terms
WINDOW = 10_000  # documents whose terms are in memory at once while the index is made
UNSPACED = ("ja", "th", "zh")  # languages that put no spaces between words
STEMMERS = {
    "ar": "arabic", "de": "german", "en": "english", "es": "spanish", "fi": "finnish",
    "fr": "french", "hi": "hindi", "id": "indonesian", "it": "italian", "nl": "dutch",
    "pt": "portuguese", "ru": "russian",
}  # fmt: skip


class BM25:
    """An index over `texts`, scored with

        sum over the query's terms t of  idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|)),
        idf(t) = ln(1 + (n - df + 0.5) / (df + 0.5)).

    Tokenizer: lower case, runs of two or more letters or digits, no stopwords removed, Snowball
    English stemmer; the same for documents and queries. It is the usual `\\w\\w+` but for the
    underscore, so that `read_text` is two terms: prose scores the same, source code much better
    (nDCG@10 on `stdlib` .25 -> .31). A term that occurs twice in a query counts twice. k1 = 0.9
    and b = 0.4 are Anserini's defaults. Other languages have their own Snowball stemmer, or none;
    where words are not spaced, each pair of neighbouring letters is a term.

    Args:
        ids: document ids, unique.
        texts: their texts, each asked for once; an empty text is allowed and is never found.
        language: ISO 639-1.
        folder: where the index is kept, if at all: whoever asks for it next, here or in another
            process, reads it from there, memory-mapped, so that processes share its pages. A
            damaged one is made again.
        content: a hash of what `texts` say, by which it is found in `folder`.
    Raises:
        ValueError: `ids` and `texts` differ in length, an id occurs twice, there is no document,
            or k1 or b is out of range.
    """

    def __init__(
        self,
        ids: Sequence[str],
        texts: Sequence[str],
        *,
        k1: float = 0.9,
        b: float = 0.4,
        language: str = "en",
        folder: Path | None = None,
        content: str = "",
    ):
        if len(ids) != len(texts):
            raise ValueError(f"{len(ids)} ids but {len(texts)} texts: pass one id for each text")
        if not ids:
            raise ValueError("no document to index: the corpus is empty")
        if len(set(ids)) != len(ids):
            twice = sorted(ids)
            pair = next(a for a, c in zip(twice, twice[1:], strict=False) if a == c)
            raise ValueError(f"document id {pair!r} occurs twice: ids have to be unique")
        if k1 < 0 or not 0 <= b <= 1:
            raise ValueError(f"k1={k1}, b={b}: expected k1 >= 0 and 0 <= b <= 1")
        # Positions in descending order of id: an earlier position wins a tie, as in trec_eval, so
        # that cutting at k here and ranking in eval/metrics.py agree.
        order = sorted(range(len(ids)), key=ids.__getitem__, reverse=True)
        self.ids = [ids[i] for i in order]
        name = STEMMERS.get(language)
        self._stemmer = None if name is None else Stemmer.Stemmer(name)
        # A group within a lookahead is found at every letter, so that the pairs overlap.
        pattern = f"(?=({LETTER}{{2}}))" if language in UNSPACED else f"{LETTER}{{2,}}"
        self._pattern = r"[^\W_]{2,}" if language == "en" else pattern
        if folder is None:
            self._index = self._make(texts, order, k1, b)
            return
        made_by = f"{FORMAT} {bm25s.__version__} {Stemmer.version()}"
        how = [content, language, f"{k1} {b}", self._pattern, made_by, *self.ids]
        place = folder / hashlib.sha256("\0".join(how).encode()).hexdigest()[:20]
        with locked(folder, name=f".{place.name}.lock"):
            self._index = _read(place)
            if self._index is None:
                self._index = made = self._make(texts, order, k1, b)
                if made is not None:
                    _write(made, place)
                    mapped = _read(place)
                    self._index = made if mapped is None else mapped

    def _make(
        self, texts: Sequence[str], order: list[int], k1: float, b: float
    ) -> bm25s.BM25 | None:
        """None where no document has a term: the average length is 0, bm25s would divide by it."""
        rows: list[array] = []  # 4 bytes a term, where a list of words would take a hundred
        vocabulary: dict[str, int] = {}
        for start in range(0, len(order), WINDOW):
            for terms in self._tokenize([texts[i] for i in order[start : start + WINDOW]]):
                places = (vocabulary.setdefault(term, len(vocabulary)) for term in terms)
                rows.append(array("i", places))
        if not vocabulary:
            return None
        index = bm25s.BM25(k1=k1, b=b, method="lucene")
        found = bm25s.tokenization.Tokenized(rows, vocabulary)  # pyright: ignore
        index.index(found, show_progress=False)
        return index

    def search(self, queries: dict[str, str], k: int) -> dict[str, dict[str, float]]:
        """The k best documents of each query, best first.

        Only documents that share a term with the query are returned, so there may be fewer than k,
        and none ({}) for a query without a known term: a document with score 0 is not found, and
        filling up would give the same arbitrary documents to each such query. Equal scores are
        ordered by document id, descending.

        Args:
            queries: query id -> text.
            k: depth, at least 1; may be larger than the corpus.
        Returns:
            query id -> document id -> score (> 0, a float32 value), every query present.
        Raises:
            ValueError: k < 1.
        """
        if k < 1:
            raise ValueError(f"k={k}: expected at least 1 document per query")
        tokens = self._tokenize(list(queries.values()))
        return {query: self._rank(terms, k) for query, terms in zip(queries, tokens, strict=True)}

    def score(self, query: str, documents: Sequence[str]) -> list[float]:
        """The scores of some documents for a query's text, whatever their rank.

        Returns:
            one score each, 0 where no term is shared.
        Raises:
            ValueError: a document is not in the index.
        """
        for document in documents:
            if document not in self._position:
                raise ValueError(f"document {document!r} is not among the {len(self.ids)} indexed")
        terms = self._tokenize([query])[0]
        if self._index is None or not terms:
            return [0.0] * len(documents)
        scores = self._index.get_scores(terms)
        return [float(scores[self._position[document]]) for document in documents]

    @cached_property
    def _position(self) -> dict[str, int]:
        return {document: i for i, document in enumerate(self.ids)}

    def _tokenize(self, texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(  # pyright: ignore[reportReturnType]
            texts,
            token_pattern=self._pattern,
            stopwords=None,  # pyright: ignore[reportArgumentType]
            stemmer=self._stemmer,  # pyright: ignore[reportArgumentType]
            return_ids=False,
            show_progress=False,
        )

    def _rank(self, terms: list[str], k: int) -> dict[str, float]:
        if self._index is None or not terms:
            return {}
        scores = self._index.get_scores(terms)  # (documents,) float32
        found = np.flatnonzero(scores > 0)  # ascending position
        if len(found) > k:
            kth = np.partition(scores[found], len(found) - k)[len(found) - k]
            found = found[scores[found] >= kth]  # k or, with a tie at the cut, more
        found = found[np.argsort(-scores[found], kind="stable")][:k]
        return {self.ids[i]: float(scores[i]) for i in found}


def _write(index: bm25s.BM25, folder: Path) -> None:
    """Whole or not at all; what a killed process leaves, the next one removes."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        index.save(part, show_progress=False)
    except OSError as problem:
        shutil.rmtree(part, ignore_errors=True)
        if problem.errno is None:  # numpy's, where not all of an array could be written
            problem = OSError(errno.ENOSPC, str(problem))
        problem.filename = problem.filename or str(folder)  # a write does not say of what
        raise problem from None
    put(part, folder)


def _read(folder: Path) -> bm25s.BM25 | None:
    """None where there is none, or a damaged one."""
    if not folder.exists():
        return None
    try:
        return bm25s.BM25.load(folder, mmap=True, show_progress=False)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as problem:
        print(f"warning: the index {folder} is damaged ({problem}) and made again", file=sys.stderr)
        return None
