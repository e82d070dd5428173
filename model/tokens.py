"""Text -> token ids: templates, truncation of the document alone, the end token by id."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

# Texts, and their characters, whose whole encodings, before they are cut, are in memory at once.
CHUNK, CHARACTERS = 1000, 4_000_000
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>")


@dataclass(frozen=True)
class Prompts:
    """Templates with `{query}` and `{document}`; saved with every model.

    The pair's template holds both. What is outside the braces is never truncated.
    """

    query: str = "Query: {query}"
    document: str = "{document}"
    pair: str = "Query: {query}\nDocument: {document}"

    def __post_init__(self):
        for name, needs in (
            ("query", ("{query}",)),
            ("document", ("{document}",)),
            ("pair", ("{query}", "{document}")),
        ):
            template = getattr(self, name)
            if any(template.count(field) != 1 for field in needs):
                raise ValueError(f"prompt {name!r} needs {' and '.join(needs)} once: {template!r}")


class Tokenizer:
    """The base's own `tokenizer.json`, and the rules of this project around it.

    Args:
        folder: holds tokenizer.json.
        document_tokens: a document longer than this loses its end. Queries, instructions and
            suffixes are never cut.
        end_token: appended by id to every text; "" takes the first of END_TOKENS that exists.
        pair_end: whether pairs get it too; not where the answer is read after the template's
            last word, as a yes/no head does.
    Raises:
        ValueError: tokenizer.json is missing or damaged, the end token is not in the vocabulary,
            or document_tokens < 1.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Prompts,
        document_tokens: int,
        end_token: str = "",
        pair_end: bool = True,
    ):
        if document_tokens < 1:
            raise ValueError(f"document_tokens must be at least 1, got {document_tokens}")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: a base needs its tokenizer.json")
        try:
            self.fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # a file's edge: the library raises nothing narrower
            raise ValueError(f"{path} is no tokenizer ({error}): copy it again") from error
        # The file may carry its own truncation and padding; both would break the rules here.
        self.fast.no_truncation()
        self.fast.no_padding()
        self.path = path
        self.prompts, self.document_tokens, self.pair_end = prompts, document_tokens, pair_end
        known = [t for t in ([end_token] if end_token else END_TOKENS) if self.id(t) is not None]
        if not known:
            raise ValueError(f"{path}: none of {[end_token] if end_token else END_TOKENS} in it")
        self.end_token = known[0]
        end = self.fast.token_to_id(self.end_token)
        assert end is not None
        self.end_id = end

    def with_query(self, template: str) -> "Tokenizer":
        """The same with another template for queries, such as a benchmark's own instruction."""
        other = copy.copy(self)
        other.prompts = replace(self.prompts, query=template)
        return other

    def id(self, token: str) -> int | None:
        return self.fast.token_to_id(token)

    def word_id(self, word: str) -> int:
        """The id of a word that a yes/no head reads. Raises ValueError if it is no single token."""
        found = self.id(word)
        if found is None:
            raise ValueError(
                f"rerank_head='yes_no' needs the single token {word!r}, which {self.path} does not "
                "have: use rerank_head='linear'"
            )
        return found

    def lead(self) -> list[int]:
        """What the tokenizer puts before every text: a BOS for Mistral, nothing for Qwen3."""
        encoding = self.fast.encode("a")
        return encoding.ids[: encoding.special_tokens_mask.index(0)]

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text in the query template, whole, with the end token."""
        return self._encode([_fill(self.prompts.query, query=text) for text in texts])

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids in the document template, the document cut to `document_tokens`."""
        return self._encode([_fill(self.prompts.document, document=text) for text in texts])

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of (query, document) in the pair's template, only the document cut."""
        filled = [_fill(self.prompts.pair, query=q, document=d) for q, d in pairs]
        return self._encode(filled, self.pair_end)

    def pieces(self, filled: Sequence[tuple[str, int, int]], limit: int) -> list[list[int]]:
        """Token ids of the parts of one text, with nothing put before or after them.

        Args:
            filled: each part, and which of its characters are a document (0, 0: none).
            limit: a document longer than this loses its end, whatever `document_tokens` says.
        """
        encodings = self.fast.encode_batch(
            [text for text, _, _ in filled], add_special_tokens=False
        )
        return [
            self._cut(encoding, start, stop, limit)
            for encoding, (_, start, stop) in zip(encodings, filled, strict=True)
        ]

    def _encode(self, filled: list[tuple[str, int, int]], end: bool = True) -> list[list[int]]:
        found = []
        for chunk in _chunks(filled):
            encodings = self.fast.encode_batch([text for text, _, _ in chunk])
            for encoding, (_, start, stop) in zip(encodings, chunk, strict=True):
                ids = self._cut(encoding, start, stop, self.document_tokens)
                if end and (not ids or ids[-1] != self.end_id):
                    ids.append(self.end_id)
                assert not end or ids[-1] == self.end_id
                found.append(ids)
        return found

    @staticmethod
    def _cut(encoding: Encoding, start: int, stop: int, limit: int) -> list[int]:
        """Drop the tokens past `limit` of the characters [start, stop)."""
        inside = 0
        ids = []
        for token, (left, right) in zip(encoding.ids, encoding.offsets, strict=True):
            # A token that begins in the template (" The" after "Document:") belongs to the text.
            if left < stop and right > start:
                inside += 1
                # One that ends in the template (".</" before "</doc>") stays: it is both.
                if inside > limit and right <= stop:
                    continue
            ids.append(token)
        return ids


def _chunks(filled: list[tuple[str, int, int]]) -> Iterator[list[tuple[str, int, int]]]:
    """Runs of at most CHUNK texts and CHARACTERS characters (or one longer text)."""
    start = size = 0
    for i, (text, _, _) in enumerate(filled):
        if i > start and (i - start == CHUNK or size + len(text) > CHARACTERS):
            yield filled[start:i]
            start, size = i, 0
        size += len(text)
    if filled:
        yield filled[start:]


def _fill(template: str, **fields: str) -> tuple[str, int, int]:
    """The filled template, and which of its characters are the document (0, 0: none).

    Not str.format: texts hold braces of their own, and a query may contain "{document}".
    """
    text, start, stop, at = "", 0, 0, 0
    places = sorted((template.index("{" + name + "}"), name) for name in fields)
    for place, name in places:
        text += template[at:place]
        if name == "document":
            start, stop = len(text), len(text) + len(fields[name])
        text += fields[name]
        at = place + len(name) + 2
    return text + template[at:], start, stop


def listed(items: Sequence, name: str) -> Sequence:
    """The items, unless they are one string: a sequence of characters is almost never meant."""
    if isinstance(items, str):
        raise ValueError(f"{name} must be a list, got one string: {items[:60]!r}")
    return items
