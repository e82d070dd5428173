"""eval/stdlib.py: a collection of the functions of the standard library, and of small ones."""

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from eval import collections as C
from eval import stdlib as S


@pytest.fixture(scope="module")
def stdlib():
    return C.load("stdlib")


def test_stdlib_has_the_promised_size_and_shares(stdlib):
    pairs = {s: sum(map(len, judged.values())) for s, judged in stdlib.qrels.items()}
    total = sum(pairs.values())
    assert 4000 < total < 8000
    assert len(stdlib.qrels["test"]) >= 1000 and len(stdlib.qrels["dev"]) >= 300
    assert 0.27 < pairs["test"] / total < 0.37
    assert 0.07 < pairs["dev"] / total < 0.15
    # no module decides the test set on its own
    count = Counter(stdlib.domain[query] for query in stdlib.qrels["test"])
    assert max(count.values()) < 0.15 * len(stdlib.qrels["test"])
    assert stdlib.provenance["python"] == ".".join(map(str, sys.version_info[:3]))


def test_stdlib_leaks_nothing_from_one_split_to_another(stdlib):
    splits = list(stdlib.qrels)
    for i, a in enumerate(splits):
        for b in splits[i + 1 :]:
            for texts in (
                lambda s: {stdlib.corpus[d] for d in stdlib.pools[s]},
                lambda s: {stdlib.queries[q] for q in stdlib.qrels[s]},
                lambda s: {stdlib.domain[q] for q in stdlib.qrels[s]},
                lambda s: {d.split(".")[0] for d in stdlib.pools[s]},
            ):
                assert texts(a) and not texts(a) & texts(b), (a, b)


def test_stdlib_is_well_formed(stdlib):
    assert len(set(stdlib.corpus.values())) == len(stdlib.corpus)
    assert len(set(stdlib.queries.values())) == len(stdlib.queries)
    assert stdlib.domain.keys() == stdlib.queries.keys()
    assert not stdlib.queries.keys() & stdlib.corpus.keys()
    for split, judged in stdlib.qrels.items():
        assert set(stdlib.pools[split]) == {d for row in judged.values() for d in row}
        assert len(set(stdlib.pools[split])) == len(stdlib.pools[split])
    assert sum(map(len, stdlib.pools.values())) == len(stdlib.corpus)
    for key, text in stdlib.corpus.items():
        (node,) = ast.parse(text).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), key
        assert ast.get_docstring(node) is None, key
    for text in stdlib.queries.values():
        assert text == " ".join(text.split()) and len(text.split()) >= S.MIN_WORDS


def test_stdlib_is_the_same_in_another_process(stdlib):
    code = "from eval import collections as C; print(C.load('stdlib').fingerprint)"
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == stdlib.fingerprint


def tree(root: Path, monkeypatch, split: dict[str, str], **files: str) -> C.Collection:
    """The collection of a small library; `split` says where each top-level module goes."""
    for name, source in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    monkeypatch.setattr(C, "split_modules", lambda sizes: {m: split[m] for m in sizes})
    return C.stdlib(root)


SOURCE = '''
import functools

class Café:
    @functools.cache
    def größe(self, x):
        """Return the größe of x.  More text
        follows here.
        """
        # kept
        def inner():
            """Nobody asks for this here."""
            return x
        return inner() + """
left alone"""

    async def short(self): "Wait for the others"; return 1

if True:
    def twice(a):
        """Double the given number"""
        return 2 * a
else:
    def twice(a):
        """Halve the given number."""
        return a / 2

def stub(self):
    """Only a docstring here."""

def terse():
    """Too short."""
    return 0

def shown():
    """>>> print(1, 2, 3)"""
    return 0
'''


def test_documents_and_queries_of_a_small_library(tmp_path, monkeypatch):
    data = tree(tmp_path, monkeypatch, {"lib": "test"}, **{"lib/__init__": SOURCE})
    assert {data.queries[q]: list(row) for q, row in data.qrels["test"].items()} == {
        "Return the größe of x": ["lib.Café.größe"],
        "Wait for the others": ["lib.Café.short"],
        "Double the given number": ["lib.twice"],
        "Halve the given number": ["lib.twice:24"],
    }
    assert data.corpus["lib.Café.größe"] == (
        "@functools.cache\n"
        "def größe(self, x):\n"
        "    # kept\n"
        "    def inner():\n"
        "        return x\n"
        '    return inner() + """\nleft alone"""'
    )
    assert data.corpus["lib.Café.short"] == "async def short(self): return 1"
    assert data.corpus["lib.twice:24"] == "def twice(a):\n    return a / 2"
    assert set(data.domain.values()) == {"lib"}


def function(name: str, docstring: str, body: str) -> str:
    return f'def {name}():\n    """{docstring}"""\n    {body}\n'


def test_duplicates_are_merged_and_stay_on_the_held_out_side(tmp_path, monkeypatch):
    data = tree(
        tmp_path,
        monkeypatch,
        {"a": "test", "b": "test", "c": "dev", "d": "train"},
        a=function("f", "Open the file.", "return 1") + function("g", "Shut the file.", "pass"),
        b=function("f", "Open that file.", "return 1")
        + function("h", "Shut the file.", "return 3")
        + function("k", "Shut the file", "return 4"),
        c=function("p", "Open the file", "return 5") + function("q", "Keep this query", "return 6"),
        d=function("f", "Ask something else", "return 1")  # the document of a.f
        + function("r", "Keep this query", "return 7")  # the query of c.q
        + function("s", "Train on this", "return 8"),
    )
    asked = {s: {data.queries[q]: row for q, row in r.items()} for s, r in data.qrels.items()}
    assert asked == {
        "test": {
            "Open the file": {"a.f": 1},
            "Open that file": {"a.f": 1},  # equal documents are one
            "Shut the file": {"a.g": 1, "b.h": 1, "b.k": 1},  # equal queries are one
        },
        "dev": {"Keep this query": {"c.q": 1}},
        "train": {"Train on this": {"d.s": 1}},
    }
    assert data.pools == {"train": ["d.s"], "dev": ["c.q"], "test": ["a.f", "a.g", "b.h", "b.k"]}
    assert data.domain["q:a.g"] == "b"  # two of the three functions
    assert data.provenance["pairs dropped from train and dev"] == "3"


def test_tests_programs_and_build_files_are_left_out(tmp_path, monkeypatch):
    source = function("f", "Open the file.", "return 1")
    left_out = ["test/a", "x/tests/a", "x/test_a", "idlelib/a", "turtledemo/a", "lib2to3/a"]
    left_out += ["site-packages/a", "config-3.11-x/a", "x/a-b"]
    files = dict.fromkeys([*left_out, "x/ok"], source)
    data = tree(tmp_path, monkeypatch, {"x": "test"}, **files)
    assert list(data.corpus) == ["x.ok.f"]


def test_a_python_without_sources_is_an_error(tmp_path):
    (tmp_path / "empty.py").write_text("def f(): pass\n")
    with pytest.raises(ValueError, match="no function with a docstring.*DATA=path"):
        C.stdlib(tmp_path)


def test_modules_are_split_by_share_and_large_ones_train():
    sizes = Counter({f"m{i}": 5 + i % 7 for i in range(300)})
    small = sum(sizes.values())
    sizes["large"] = small // 10
    split = S.split_modules(sizes)
    assert split == S.split_modules(Counter(dict(reversed(sizes.items()))))
    assert split.keys() == sizes.keys() and split["large"] == "train"
    share = dict.fromkeys(split.values(), 0.0)
    for module, where in split.items():
        share[where] += sizes[module] / sum(sizes.values())
    assert share["test"] == pytest.approx(0.30, abs=0.01)
    assert share["dev"] == pytest.approx(0.10, abs=0.01)
    # one module less moves only what lies at the two borders
    del sizes["m7"]
    fewer = S.split_modules(sizes)
    assert sum(fewer[m] != split[m] for m in fewer) <= 4


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Open the file.", "Open the file"),
        ("Open a file.  Then\n    read it.", "Open a file"),
        ("Open the\n    file\n\n    Details.", "Open the file"),
        ("\n    Open it, e.g. The first. Second.", "Open it, e.g. The first"),
        ("Use os.path.join here. `x` is a path.", "Use os.path.join here"),
        ("Is it open? Tell me.", "Is it open"),
        ("Version 3.11 or so, i.e. Not 2. Done.", "Version 3.11 or so, i.e. Not 2"),
        ("Return these:\n\n    one", "Return these"),
        ("", ""),
    ],
)
def test_first_sentence(docstring, sentence):
    assert S.first_sentence(docstring) == sentence


def test_functions_are_looked_for_once(tmp_path: Path, monkeypatch, capsys) -> None:
    root, cache = tmp_path / "lib", tmp_path / "cache"
    root.mkdir()
    (root / "one.py").write_text('def f(x):\n    """Returns what it is given."""\n    return x\n')
    first = S.kept_functions(root, cache)
    assert first == list(S.documented_functions(root)) and len(first) == 1
    with monkeypatch.context() as patch:
        patch.setattr(S.ast, "parse", lambda *_: pytest.fail("parsed again"))
        assert S.kept_functions(root, cache) == first
    [kept] = cache.iterdir()
    kept.write_text("{")
    assert S.kept_functions(root, cache) == first
    assert f"{kept}: damaged, made again" in capsys.readouterr().out
    (root / "two.py").write_text('def g(x):\n    """Returns it twice over."""\n    return x, x\n')
    assert [pair.id for pair in S.kept_functions(root, cache)] == ["one.f", "two.g"]
