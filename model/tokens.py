"""Text -> token ids: templates, truncation of the document alone, the end token by id."""

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

# Texts, and their characters, whose whole encodings, before they are cut, are in memory at once.
CHUNK, CHARACTERS = 1000, 4_000_000
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>")
INSTRUCTION = "{instruction}"  # its place in a template
INSTRUCTED = f"Instruct: {INSTRUCTION}\nQuery: {{query}}"
Part = tuple[str, int, int]  # a text, and which of its characters are a document (0, 0: none)


@dataclass(frozen=True)
class Prompts:
    """Templates with `{query}` and `{document}`; saved with every model.

    The pair's template holds both. What is outside the braces is never truncated. Where one has a
    place `{instruction}`, the task in words stands there, which a benchmark may replace.
    """

    query: str = "Query: {query}"
    document: str = "{document}"
    pair: str = "Query: {query}\nDocument: {document}"
    instruction: str = ""

    def __post_init__(self):
        for name, needs in (
            ("query", ("{query}",)),
            ("document", ("{document}",)),
            ("pair", ("{query}", "{document}")),
        ):
            template = self.filled(name)
            if any(template.count(field) != 1 for field in needs):
                raise ValueError(f"prompt {name!r} needs {' and '.join(needs)} once: {template!r}")

    def filled(self, name: str) -> str:
        """A template with the instruction in it. name: query, document or pair."""
        return getattr(self, name).replace(INSTRUCTION, self.instruction)

    def texts(self) -> dict[str, str]:
        """The templates as they are asked, by name; what results and identities say of them."""
        return {name: self.filled(name) for name in ("query", "document", "pair")}

    def instructed(self, instruction: str) -> "Prompts":
        """With a benchmark's own instruction; if queries have no place for one, as INSTRUCTED."""
        query = self.query if INSTRUCTION in self.query else INSTRUCTED
        return replace(self, query=query, instruction=instruction)


class Tokenizer:
    """The base's own `tokenizer.json`, and the rules of this project around it.

    Special tokens, such as `<|im_end|>`, are such in a template. In a query or a document they are
    the characters that spell them, so that no text can end its own turn or begin another.

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
        self.fast.encode_special_tokens = True
        added = self.fast.get_added_tokens_decoder().items()
        self._special = {token.content: i for i, token in added if token.special}
        longest_first = map(re.escape, sorted(self._special, key=len, reverse=True))
        # Nothing matches "(?!)", where a tokenizer has no special tokens.
        self._between = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self.path = path
        self.prompts, self.document_tokens, self.pair_end = prompts, document_tokens, pair_end
        known = [t for t in ([end_token] if end_token else END_TOKENS) if self.id(t) is not None]
        if not known:
            raise ValueError(
                f"{path}: none of {[end_token] if end_token else END_TOKENS} in it: set end_token "
                "to the token that ends a text there"
            )
        self.end_token = known[0]
        end = self.fast.token_to_id(self.end_token)
        assert end is not None
        self.end_id = end

    def with_instruction(self, instruction: str) -> "Tokenizer":
        """The same, asked with a benchmark's own instruction ("": the model's stands); see
        `Prompts.instructed`."""
        if not instruction:
            return self
        other = copy.copy(self)
        other.prompts = self.prompts.instructed(instruction)
        return other

    def with_pair(self, template: str) -> "Tokenizer":
        """The same with another template for pairs."""
        other = copy.copy(self)
        other.prompts = replace(self.prompts, pair=template)
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
        return self._encode(self.prompts.filled("query"), [{"query": text} for text in texts])

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids in the document template, the document cut to `document_tokens`."""
        return self._encode(self.prompts.filled("document"), [{"document": text} for text in texts])

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of (query, document) in the pair's template, only the document cut."""
        rows = [{"query": query, "document": document} for query, document in pairs]
        return self._encode(self.prompts.filled("pair"), rows, self.pair_end)

    def template(self, text: str) -> list[int]:
        """Token ids of a text of our own, whose special tokens are such, with nothing put before or
        after them."""
        texts, marks = self._split(text)
        first, *others = self.pieces([(part, 0, 0) for part in texts], 0)
        return first + [i for mark, ids in zip(marks, others, strict=True) for i in (mark, *ids)]

    def pieces(self, parts: Sequence[Part], limit: int) -> list[list[int]]:
        """Token ids of the parts of one text, with nothing put before or after them.

        Args:
            parts: in which special tokens are not such; see `template`.
            limit: a document longer than this loses its end, whatever `document_tokens` says.
        """
        encodings = self.fast.encode_batch([text for text, _, _ in parts], add_special_tokens=False)
        return [
            self._cut(encoding, start, stop, limit)
            for encoding, (_, start, stop) in zip(encodings, parts, strict=True)
        ]

    def _split(self, template: str) -> tuple[list[str], list[int]]:
        """The n + 1 texts between the n special tokens of a template, and the ids of these.

        Special tokens part a text before anything else is done to it, so what lies between them has
        the same ids by itself.
        """
        found = self._between.split(template)
        return found[::2], [self._special[token] for token in found[1::2]]

    def _encode(
        self, template: str, rows: Sequence[dict[str, str]], end: bool = True
    ) -> list[list[int]]:
        """Token ids of each row's fields in the template."""
        texts, marks = self._split(template)
        lead, found = self.lead(), []
        for chunk in _chunks([_fill(text, row) for text in texts] for row in rows):
            pieces = iter(
                self.pieces([part for parts in chunk for part in parts], self.document_tokens)
            )
            for _ in chunk:
                ids = [*lead, *next(pieces)]
                for mark in marks:
                    ids += [mark, *next(pieces)]
                if end and (not ids or ids[-1] != self.end_id):
                    ids.append(self.end_id)
                found.append(ids)
        return found

    def visible(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Of each (query, document) what `pairs` leaves of the document: its characters before the
        first token that is cut."""
        texts, _ = self._split(self.prompts.filled("pair"))
        template = next(text for text in texts if "{document}" in text)
        rows = ([_fill(template, {"query": q, "document": d})] for q, d in pairs)
        found = []
        for chunk in _chunks(rows):
            parts = [part for [part] in chunk]
            whole = [text for text, _, _ in parts]
            encodings = self.fast.encode_batch(whole, add_special_tokens=False)
            for encoding, (text, start, stop) in zip(encodings, parts, strict=True):
                over = _over(encoding, start, stop, self.document_tokens)
                found.append(text[start : encoding.offsets[over[0]][0] if over else stop])
        return found

    @staticmethod
    def _cut(encoding: Encoding, start: int, stop: int, limit: int) -> list[int]:
        """Drop the tokens past `limit` of the characters [start, stop)."""
        over = set(_over(encoding, start, stop, limit))
        return [token for at, token in enumerate(encoding.ids) if at not in over]


def _over(encoding: Encoding, start: int, stop: int, limit: int) -> list[int]:
    """The places of the tokens past `limit` of the characters [start, stop)."""
    offsets = encoding.offsets
    # A token that begins in the template (" The" after "Document:") belongs to the text.
    inside = [at for at, (left, right) in enumerate(offsets) if left < stop and right > start]
    # One that ends in the template (".</" before "</doc>") stays: it is both.
    return [at for at in inside[limit:] if offsets[at][1] <= stop]


def _chunks(filled: Iterable[list[Part]]) -> Iterator[list[list[Part]]]:
    """Runs of at most CHUNK texts and CHARACTERS characters (or one longer text), each made when it
    is asked for."""
    chunk: list[list[Part]] = []
    size = 0
    for parts in filled:
        length = sum(len(text) for text, _, _ in parts)
        if chunk and (len(chunk) == CHUNK or size + length > CHARACTERS):
            yield chunk
            chunk, size = [], 0
        chunk.append(parts)
        size += length
    if chunk:
        yield chunk


def _fill(template: str, fields: dict[str, str]) -> Part:
    """A template, or a part of one, with the fields that it has a place for.

    Not str.format: texts hold braces of their own, and a query may contain "{document}".
    """
    text, start, stop, at = "", 0, 0, 0
    places = sorted((template.find("{" + name + "}"), name) for name in fields)
    for place, name in places:
        if place < 0:
            continue
        text += template[at:place]
        if name == "document":
            start, stop = len(text), len(text) + len(fields[name])
        text += fields[name]
        at = place + len(name) + 2
    return text + template[at:], start, stop


def listed(items: Sequence, name: str, each: int = 1) -> Sequence:
    """The items, if they are texts, or tuples of `each` texts.

    Raises:
        ValueError: they are one string (a sequence of characters is almost never meant), or an item
            is something else or has half of a surrogate pair, which no tokenizer reads.
    """
    if isinstance(items, str):
        raise ValueError(f"{name} must be a list, got one string: {items[:60]!r}")
    expected = "a string" if each == 1 else f"{each} strings"
    for i, item in enumerate(items):
        parts = (item,) if each == 1 else item
        whole = isinstance(parts, tuple | list) and len(parts) == each
        if not whole or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{name}[{i}] must be {expected}, got {item!r:.60}")
        if not all(part.isascii() or _encodes(part) for part in parts):
            raise ValueError(f"{name}[{i}] has half of a surrogate pair, no text: {item!r:.60}")
    return items


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
