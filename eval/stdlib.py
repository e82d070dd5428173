"""Python's standard library as pairs of a docstring's first sentence and a function's source."""

import ast
import hashlib
import inspect
import json
import os
import re
import sys
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from model.files import read_json, write_json

# Left out of `stdlib`. Tests: their docstrings name test cases and their bodies repeat each other.
# turtledemo, idlelib and lib2to3 are programs that come with Python, not a library, and are absent
# from many installations. site-packages is not Python's own.
EXCLUDED = {"test", "tests", "idle_test", "turtledemo", "idlelib", "lib2to3"}
EXCLUDED |= {"site-packages", "dist-packages"}
TEST_SHARE, DEV_SHARE = 0.30, 0.10  # of the pairs
LARGE_SHARE = 0.03  # of the pairs: a module above this is for training
MIN_WORDS = 3  # "Internal." or "See above." is no query


class Pair(NamedTuple):
    """One documented function."""

    id: str  # module.qualname, with :line on a clash
    module: str  # top level
    query: str
    document: str


def split_modules(sizes: Counter[str]) -> dict[str, str]:
    """Top-level module -> split: walk the modules in the order of sha256(name) and fill test up to
    30 % of the pairs, then dev up to 10 %; the rest is train. Modules of more than 3 % (tkinter
    alone has 11 %) go to train at once: queries of one module are resampled together, and one
    that is a third of the test set would widen every interval (effective modules 6, so 33).
    """
    total, seen, split = sum(sizes.values()), 0, {}
    for module in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if sizes[module] > LARGE_SHARE * total or seen >= (TEST_SHARE + DEV_SHARE) * total:
            split[module] = "train"
            continue
        split[module] = "test" if seen < TEST_SHARE * total else "dev"
        seen += sizes[module]
    return split


def kept_functions(root: Path, cache: Path) -> list[Pair]:
    """`documented_functions`, looked for once: they are kept in the cache, under a hash of the
    sources, of this module and of the Python that parses them."""
    digest = hashlib.sha256(sys.version.encode() + Path(__file__).read_bytes())
    for parts, path in _modules(root):
        digest.update(json.dumps([parts, hashlib.sha256(path.read_bytes()).hexdigest()]).encode())
    place = cache / f"stdlib-{digest.hexdigest()[:16]}.json"
    if place.exists():
        try:
            return [Pair(*row) for row in read_json(place, "it is made again")["pairs"]]
        except (ValueError, KeyError, TypeError) as problem:
            print(f"{place}: damaged, made again ({problem})")
    pairs = list(documented_functions(root))
    with suppress(OSError):  # a cache that can only be read: they are looked for each time
        write_json(place, {"pairs": pairs}, f".{os.getpid()}")  # others may find the same
    return pairs


def _modules(root: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    """The parts of a module's name, and its file, of all that are looked at."""
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        skip = any(part in EXCLUDED or part.startswith("test_") for part in parts)
        # config-3.11-x86_64-linux-gnu and the like cannot be imported: files of the build
        if not skip and all(part.isidentifier() for part in parts):
            yield parts, path


def documented_functions(root: Path) -> Iterator[Pair]:
    """Every documented function under `root`, in the order of path and line."""
    used: set[str] = set()
    for parts, path in _modules(root):
        top = parts[0]
        with tokenize.open(path) as file:  # honours the coding line
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence" in somebody else's source
            tree = ast.parse(source)
        module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
        for name, node in _functions(tree, module):
            query = first_sentence(ast.get_docstring(node) or "")
            words = sum(any(c.isalpha() for c in word) for word in query.split())
            if words < MIN_WORDS or ">>>" in query:  # a doctest is no sentence
                continue
            if len(node.body) == 1:  # nothing but the docstring: no source to find
                continue
            name = name if name not in used else f"{name}:{node.lineno}"
            used.add(name)
            yield Pair(name, top, query, _without_docstrings(node, lines))


def _functions(
    parent: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(qualified name, node) of the functions and methods below `parent`, not of nested ones."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}.{node.name}")
        elif isinstance(node, ast.stmt | ast.ExceptHandler):  # if, try, with at module level
            yield from _functions(node, prefix)


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line, without the full stop."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0]
    line = " ".join(paragraph.split())
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!cf)[.!?](?=\s+[^a-z\s])", line)
    return (line[: end.start()] if end else line).rstrip(" .:")


def _without_docstrings(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[bytes]) -> str:
    """The function's source, dedented, decorators included; docstrings (also those of functions
    and classes inside it, which are queries of nobody) cut out by their position."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    text = lines[first - 1 : node.end_lineno]
    indent = text[0][: len(text[0]) - len(text[0].lstrip())]
    for inner in ast.walk(node):
        if not isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if ast.get_docstring(inner, clean=False) is None:
            continue
        doc = inner.body[0]
        start, stop = doc.lineno - first, (doc.end_lineno or doc.lineno) - first
        head, tail = text[start][: doc.col_offset], text[stop][doc.end_col_offset :]
        rest = head + tail.lstrip(b"; \t")  # def f(): "docstring"; return 1
        text[start : stop + 1] = [b""] * (stop - start) + [rest if rest.strip() else b""]
    return b"".join(line.removeprefix(indent) for line in text).decode().rstrip()
