"""E2Rank (arXiv 2510.22733): an embedder reranks by one more text, which holds the query and its
first candidates.

    s_i = cos(embed(pseudo-query), embed(document i))

The documents' vectors are those of retrieval. A list that is longer than what the pseudo-query
holds is scored whole by that one, as the authors do it: no window slides over it.

The template is the one of the published training. It differs from what the published evaluation
uses in two things: that writes `Search Query:` and cuts documents at 1,024 words, not tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.protocol import EvaluationSet
from model.listwise import CHAT
from model.prefix import TextSet
from model.tokens import Tokenizer
from model.unimoer import UniMoER

INSTRUCTION = (
    "Given a web search query and some relevant documents, rerank the documents that answer the "
    "query"
)
List = tuple[str, Sequence[str]]  # a query and its candidates, best first


@dataclass(frozen=True)
class PseudoQuery:
    """How a list becomes one text.

    read: so many documents are in it at most, each cut to the tokenizer's `document_tokens`.
    chat: as a user's turn, read where the answer would begin, which is how the published models
    were trained; else the text alone with the end token, where other embedders are read.
    """

    instruction: str = INSTRUCTION
    read: int = 20
    chat: bool = False

    def __post_init__(self):
        if self.read < 1:
            raise ValueError(f"a pseudo-query reads at least 1 document, got {self.read}")

    def ids(self, tokenizer: Tokenizer, lists: Sequence[List]) -> list[list[int]]:
        """Token ids of the pseudo-query of each list.

        Raises:
            ValueError: chat, and the tokenizer has no `<|im_start|>`.
        """
        if self.chat and tokenizer.id("<|im_start|>") is None:
            raise ValueError(
                f"{tokenizer.path} has no <|im_start|>: this pseudo-query is a turn of a chat, "
                "which this model does not know"
            )
        before, behind = tokenizer.lead(), [tokenizer.end_id]
        if self.chat:
            before = before + tokenizer.template("<|im_start|>user\n")
            behind = tokenizer.template(CHAT[1])
        found = []
        for query, documents in lists:
            # Parted behind the end of a line and before "[" or "Q", which no byte-level tokenizer
            # joins.
            parts = [(f"{self.instruction}:\nDocuments:\n", 0, 0)]
            for number, text in enumerate(documents[: self.read], 1):
                start = len(f"[{number}] ")
                parts.append((f"[{number}] {text}\n", start, start + len(text)))
            parts.append((f"Query: {query}", 0, 0))
            pieces = tokenizer.pieces(parts, tokenizer.document_tokens)
            found.append([*before, *(i for piece in pieces for i in piece), *behind])
        return found


def cosines(
    model: UniMoER,
    lists: Sequence[List],
    vectors: Sequence[Tensor],
    asked: PseudoQuery,
    progress: bool = False,
) -> list[Tensor]:
    """The scores (n,) of each list's n documents, whose unit vectors (n, D) are given."""
    texts = TextSet(asked.ids(model.tokenizer, lists))
    queries = model.embed_all(texts, progress=progress, shared=True)
    return [of @ query for of, query in zip(vectors, queries, strict=True)]


def score_lists(
    model: UniMoER, lists: Sequence[List], asked: PseudoQuery | None = None
) -> list[Tensor]:
    """The scores (n,) of each list's n documents, from their texts; asked None: the defaults."""
    place = {text: i for i, text in enumerate(dict.fromkeys(d for _, of in lists for d in of))}
    vectors = model.encode_document(list(place))
    rows = [vectors[[place[text] for text in documents]] for _, documents in lists]
    return cosines(model, lists, rows, asked or PseudoQuery())


def pair_scores(
    model: UniMoER,
    evaluation: EvaluationSet,
    vectors: Tensor,
    asked: PseudoQuery,
    progress: bool = False,
) -> Tensor:
    """Scores (n,) of the evaluation's `pairs`, its candidates being read in BM25's order.

    Args:
        vectors: of `evaluation.vectors`.
    """
    c, documents = evaluation.collection, vectors[len(evaluation.queries) :]
    place = {d: i for i, d in enumerate(evaluation.documents)}
    lists, rows = [], []
    for query, found in evaluation.candidates.items():
        if found:
            lists.append((c.queries[query], [c.corpus[d] for d in found]))
            rows.append(documents[[place[d] for d in found]])
    return torch.cat([torch.zeros(0), *cosines(model, lists, rows, asked, progress)])
