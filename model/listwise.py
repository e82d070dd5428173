"""Last-but-not-late interaction: the query and all its candidates are one text, and a mark behind
each of them is read (jina-reranker-v3, arXiv 2509.25085).

    s_i = cos(P(h at the mark behind document i), P(h at the mark behind the query))

The query stands before the documents and again behind them. Under a causal mask a document has seen
the query and the documents before its own, and the last mark has seen everything; so a score
depends on the company of a document and on its place.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import weights
from model.packed import Packed
from model.tokens import Tokenizer

MARKS = ("<|embed_token|>", "<|rerank_token|>")  # behind a document, behind the query
NEW = (-1, -2)  # their ids where the vocabulary lacks them: no row of the embedding matrix
BLOCK = 125  # documents of one text at most, as published
WIDTH = 512  # of the vectors that are compared

SYSTEM = (
    "You are a search relevance expert who can determine a ranking of the passages based on how "
    "relevant they are to the query. If the query is a question, how relevant a passage is depends "
    "on how well it answers the question. If not, try to analyze the intent of the query and "
    "assess how well each passage satisfies the intent. If an instruction is provided, you should "
    "follow the instruction when determining the ranking."
)
CHAT = (  # what stands around the user's turn, as published
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
PLAIN = ("", "")  # where the tokenizer has no <|im_start|>: the user's turn alone


@dataclass(frozen=True)
class Block:
    """One text: its token ids, and how many documents it holds."""

    ids: list[int]
    documents: int


class Lists:
    """A query and its candidates -> token ids, in the published template.

    Args:
        tokens: of one text, at most. Documents are cut to the tokenizer's `document_tokens`, and
            to what the query leaves of `tokens`; queries and the template never are.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: int):
        self.tokenizer, self.tokens = tokenizer, tokens
        self.marks = mark_ids(tokenizer)
        chat = PLAIN if tokenizer.id("<|im_start|>") is None else CHAT
        self.prefix, self.suffix = map(tokenizer.template, chat)
        self.lead = tokenizer.lead()

    def blocks(
        self,
        query: str,
        documents: Sequence[str],
        early: bool = False,
        instruction: str = "",
    ) -> list[Block]:
        """The texts of a list: as many documents in each as `tokens` and BLOCK allow, in order.

        Args:
            early: put the query's mark behind its first mention too, as training wants it.
            instruction: what the published template has between the query and the documents; ""
                leaves its place out.
        Raises:
            ValueError: the query leaves no room for a document.
        """
        query, instruction = strip(query), strip(instruction)
        documents = [strip(document) for document in documents]
        frame = partial(self._frame, query, early=early, instruction=instruction)
        head, tail = frame(BLOCK)  # no number of documents is written longer
        room = self.tokens - len(head) - len(tail)
        [opening] = self.tokenizer.pieces([_passage(BLOCK - 1, "")], 0)
        limit = min(self.tokenizer.document_tokens, room - len(opening) - 1)
        if limit < 1:
            raise ValueError(
                f"list_tokens={self.tokens} is too few: the template with the query "
                f"{query[:60]!r} takes {self.tokens - room} tokens and a document at least "
                f"{len(opening) + 2}. Raise list_tokens, or shorten the query"
            )
        pieces = self.tokenizer.pieces([_passage(BLOCK - 1, text) for text in documents], limit)
        groups: list[list[str]] = []
        left = 0
        for text, piece in zip(documents, pieces, strict=True):
            left -= len(piece) + 1
            if not groups or left < 0 or len(groups[-1]) == BLOCK:
                groups.append([])
                left = room - len(piece) - 1
            groups[-1].append(text)
        return [Block(self._ids(group, limit, *frame(len(group))), len(group)) for group in groups]

    def _ids(self, documents: list[str], limit: int, head: list[int], tail: list[int]) -> list[int]:
        passages = [_passage(i, text) for i, text in enumerate(documents)]
        # Encoded by themselves: they are parted by marks, and the first by the end of a line, which
        # no byte-level tokenizer joins to what follows.
        pieces = self.tokenizer.pieces(passages, limit)
        return head + [i for piece in pieces for i in (*piece, self.marks[0])] + tail

    def _frame(
        self, query: str, count: int, early: bool, instruction: str
    ) -> tuple[list[int], list[int]]:
        """The tokens before the first document and behind the last one's mark."""
        begin = (
            f"I will provide you with {count} passages, each indicated by a numerical "
            f"identifier. Rank the passages based on their relevance to query: {query}"
        )
        rest = f"\n<instruct>\n{instruction}\n</instruct>\n" if instruction else "\n"
        end = [f"\n</passage>\n<query>\n{query}", "\n</query>"]
        texts = [begin, rest, *end] if early else [f"{begin}{rest}", *end]
        *head, asked, last = self.tokenizer.pieces([(text, 0, 0) for text in texts], 0)
        mark = self.marks[1]
        first = [*head[0], mark, *head[1]] if early else head[0]
        return [*self.lead, *self.prefix, *first], [*asked, mark, *last, *self.suffix]


def _passage(number: int, text: str) -> tuple[str, int, int]:
    """A document behind the end of the one before it, and where in that it lies."""
    opening = "\n</passage>\n" if number else ""
    opening += f'<passage id="{number}">\n'
    return opening + text, len(opening), len(opening) + len(text)


def mark_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of MARKS in a vocabulary that has both, else NEW."""
    document, query = (tokenizer.id(mark) for mark in MARKS)
    return NEW if document is None or query is None else (document, query)


def strip(text: str) -> str:
    """Without marks, also those that taking out a mark would make."""
    while any(mark in text for mark in MARKS):
        text = re.sub("|".join(map(re.escape, MARKS)), "", text)
    return text


def own_projector(folder: Path, features: int) -> tuple[Tensor, ...]:
    """The two matrices of a checkpoint that brings its own projector, (512, D) and (512, 512); ()
    for one that does not. Raises ValueError where they have other shapes."""
    names = [f"projector.{at}.weight" for at in (0, 2)]
    if not any(name in weights.checkpoint(folder) for name in names):
        return ()
    found = torch.empty(WIDTH, features), torch.empty(WIDTH, WIDTH)
    weights.load_into(folder, dict(zip(names, found, strict=True)), ignore=lambda name: True)
    return found


class Interaction(nn.Module):
    """The head: P = 512 x 512 . ReLU . 512 x D, no biases, on the states at the marks, in fp32.

    Args:
        features: D.
        marks: `mark_ids`. Where they are NEW, two trained vectors take the place of the input
            embeddings there; the frozen embedding matrix is not touched.
        start: (D,) where these vectors begin.
        own: `own_projector`, where P begins if not at random.
    """

    def __init__(
        self, features: int, marks: tuple[int, int], start: Tensor, own: Sequence[Tensor] = ()
    ):
        super().__init__()
        self.ids, self.own = marks, tuple(own)
        self.start = start.detach().clone().float()
        self.projector = nn.Sequential(
            nn.Linear(features, WIDTH, bias=False),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.marks = nn.Parameter(torch.empty(2, features)) if marks == NEW else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """P ~ Kaiming uniform with a = sqrt(5), or the base's own; the marks at `start`."""
        linears = [layer for layer in self.projector if isinstance(layer, nn.Linear)]
        for at, layer in enumerate(linears):
            if self.own:
                layer.weight.copy_(self.own[at])
                continue
            weights.draw_into(
                layer.weight,
                lambda w: nn.init.kaiming_uniform_(w, a=5**0.5, generator=generator),
            )
        if self.marks is not None:
            self.marks.copy_(self.start.expand_as(self.marks))

    def inputs(self, embed_tokens: nn.Embedding, ids: Tensor) -> Tensor:
        """(N,) -> (N, D), what enters the first layer."""
        if self.marks is None:
            return embed_tokens(ids)
        x = embed_tokens(ids.clamp(min=0))
        for mark, vector in zip(self.ids, self.marks, strict=True):
            x = torch.where((ids == mark)[:, None], vector.to(x.dtype), x)
        return x

    def places(self, ids: Tensor) -> Tensor:
        """(N,) bool: where the marks are."""
        return (ids == self.ids[0]) | (ids == self.ids[1])

    def forward(self, hidden: Tensor) -> Tensor:
        """(M, D) -> (M, 512), not of length 1: the vectors of several blocks are averaged."""
        return self.projector(hidden if hidden.dtype == torch.float64 else hidden.float())

    def cosines(self, vectors: Tensor, batch: Packed) -> Tensor:
        """(M, 512) of a batch's marks -> the score of each document, text by text, in order."""
        at = self.places(batch.input_ids)
        kinds, text = batch.input_ids[at], batch.sequence[at]
        last = torch.cat((text[1:] != text[:-1], text.new_ones(1, dtype=torch.bool)))
        document = kinds == self.ids[0]
        queries = vectors[last][text[document]]
        return F.cosine_similarity(queries, vectors[document], dim=-1)


def by_query(
    pairs: Sequence[tuple[str, str]],
) -> tuple[list[tuple[str, list[str]]], list[int]]:
    """The lists of (query, document) pairs, a query's documents in the order given, and where each
    pair's document lies in them one after the other."""
    at: dict[str, list[int]] = {}
    for i, (query, _) in enumerate(pairs):
        at.setdefault(query, []).append(i)
    lists = [(query, [pairs[i][1] for i in members]) for query, members in at.items()]
    order = [i for members in at.values() for i in members]
    return lists, sorted(range(len(pairs)), key=lambda place: order[place])


def in_order(
    lists: Sequence[Sequence[Block]],
    batches: Iterable[tuple[list[int], Tensor]],
    dtype: torch.dtype,
) -> Tensor:
    """(M, 512) at the marks of all blocks, in their order; zeros for blocks that no batch has.

    Args:
        batches: the numbers of some blocks, counted through, and the vectors at their marks.
    """
    counts = [block.documents + 1 for blocks in lists for block in blocks]
    vectors = torch.zeros(sum(counts), WIDTH, dtype=dtype)
    parts = vectors.split(counts)
    for indices, rows in batches:
        for i, part in zip(indices, rows.split([counts[i] for i in indices]), strict=True):
            parts[i].copy_(part)
    return vectors


def score_blocks(lists: Sequence[Sequence[Block]], vectors: Tensor) -> list[Tensor]:
    """The scores of each list.

    Args:
        lists: the blocks of each. vectors: (M, 512) at the marks of all blocks, in their order.
    """
    each = iter(vectors.split([block.documents + 1 for blocks in lists for block in blocks]))
    return [combine([next(each) for _ in blocks]) for blocks in lists]


def combine(blocks: Sequence[Tensor]) -> Tensor:
    """The scores (n,) of a list's documents, by one query vector for all of its blocks.

    It is the mean of the blocks' query vectors, each weighted with max((1 + s) / 2) over its own
    documents: the block that holds the best document says what is asked for.

    Args:
        blocks: (documents + 1, 512) each, the query's vector last.
    """
    if not blocks:
        return torch.zeros(0)
    best = [(1 + F.cosine_similarity(b[-1:], b[:-1])).amax() / 2 for b in blocks]
    share = torch.stack(best).clamp(min=1e-6)  # all weights may be 0
    query = (share[:, None] * torch.stack([b[-1] for b in blocks])).sum(0) / share.sum()
    return F.cosine_similarity(query[None], torch.cat([b[:-1] for b in blocks]))
