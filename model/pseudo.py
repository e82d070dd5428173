"""The pseudo-query (E2Rank, arXiv 2510.22733): an embedder reranks by one more text, which holds
the query and its first candidates.

    s_i = cos(embed(pseudo-query), embed(document i))

The documents' vectors are those of retrieval. A list that is longer than what the pseudo-query
holds is scored whole by that one, as the authors do it: no window slides over it.

The published training and evaluation put it in other words: training ends in `Query: ...` and an
end token within the turn, evaluation, which made the published numbers, in `Search Query: ...` and
cuts documents at 1,024 words, not tokens. Ours are trained and read with `Query: ...`, the turn of
a chat around it only where a base knows one. Published evaluation reranks every set, BRIGHT's too,
with the one INSTRUCTION; a benchmark's own says what to retrieve, and has no place here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from model.listwise import CHAT
from model.prefix import TextSet
from model.tokens import Tokenizer

INSTRUCTION = (
    "Given a web search query and some relevant documents, rerank the documents that answer the "
    "query"
)
List = tuple[str, Sequence[str]]  # a query and its candidates, best first


@dataclass(frozen=True)
class PseudoQuery:
    """How a list becomes one text.

    read: so many documents are in it at most, each cut to the tokenizer's `document_tokens`.
    tokens: of the whole, at most: where there are too many, the documents get equal shares of what
    the template and the query leave; 0: no bound.
    chat: as a user's turn, read where the answer would begin, as the published models are; else
    the text alone with the end token, where other embedders are read.
    asks: what stands before the query.
    """

    instruction: str = INSTRUCTION
    read: int = 20
    tokens: int = 0
    chat: bool = False
    asks: str = "Query: "

    def __post_init__(self):
        if self.read < 1:
            raise ValueError(f"a pseudo-query reads at least 1 document, got {self.read}")

    def ids(self, tokenizer: Tokenizer, lists: Sequence[List]) -> list[list[int]]:
        """Token ids of the pseudo-query of each list.

        Raises:
            ValueError: chat, and the tokenizer has no `<|im_start|>`; or a query leaves no room.
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
            read = documents[: self.read]
            limit, parts = tokenizer.document_tokens, self._parts(query, read)
            if self.tokens and read:
                frame = tokenizer.pieces(self._parts(query, [""] * len(read)), limit)
                room = self.tokens - len(before) - len(behind) - sum(map(len, frame))
                limit = min(limit, room // len(read))
                if limit < 1:
                    raise ValueError(
                        f"list_tokens={self.tokens} leaves no room for {len(read)} documents "
                        f"behind the query {query[:60]!r}: raise it, or shorten the query"
                    )
            pieces = tokenizer.pieces(parts, limit)
            found.append([*before, *(i for piece in pieces for i in piece), *behind])
        return found

    def _parts(self, query: str, documents: Sequence[str]) -> list[tuple[str, int, int]]:
        """What `Tokenizer.pieces` takes, parted behind the end of a line and before "[" or a
        letter, which no byte-level tokenizer joins."""
        parts = [(f"{self.instruction}:\nDocuments:\n", 0, 0)]
        for number, text in enumerate(documents, 1):
            start = len(f"[{number}] ")
            parts.append((f"[{number}] {text}\n", start, start + len(text)))
        return [*parts, (f"{self.asks}{query}", 0, 0)]


class ByPseudoQuery(nn.Module):
    """The head of a model that reranks as it embeds; it has no parameters."""

    def __init__(self, tokenizer: Tokenizer, asked: PseudoQuery | None = None):
        super().__init__()
        self.tokenizer, self.asked = tokenizer, asked or PseudoQuery()

    def scores(
        self,
        embed: Callable[[TextSet], Tensor],
        lists: Sequence[List],
        vectors: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """The scores (n,) of each list's n documents.

        Args:
            embed: n texts -> their unit vectors (n, D).
            vectors: (n, D) of each list's documents, where they are at hand.
        Raises:
            ValueError: there are more or fewer of them than documents.
        """
        if vectors is None:
            texts = dict.fromkeys(text for _, documents in lists for text in documents)
            place = {text: i for i, text in enumerate(texts)}
            rows = embed(TextSet(self.tokenizer.documents(list(place))))
            vectors = [rows[[place[text] for text in documents]] for _, documents in lists]
        for (query, documents), of in zip(lists, vectors, strict=True):
            if len(of) != len(documents):
                raise ValueError(f"query {query!r}: {len(documents)} documents, {len(of)} vectors")
        queries = embed(TextSet(self.asked.ids(self.tokenizer, lists)))
        return [of.to(query) @ query for of, query in zip(vectors, queries, strict=True)]
