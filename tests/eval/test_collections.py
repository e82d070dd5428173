"""eval/collections.py: the standard library, BEIR folders with every error, and the hub (faked)."""

import ast
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from eval import collections as C
from eval import stdlib as S
from eval.sources import Sources, read_queries, read_splits

CORPUS = [{"_id": "d1", "title": "One", "text": "first"}, {"_id": "d2", "text": ""}]
QUERIES = [{"_id": "q1", "text": "which is first?"}, {"_id": "q2", "text": "which is empty?"}]
HEADER = "query-id\tcorpus-id\tscore"


def jsonl(rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def write(folder: Path, corpus=CORPUS, queries=QUERIES, **qrels: list[str]) -> str:
    """A BEIR folder; qrels without the header line."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text(jsonl(corpus))
    (folder / "queries.jsonl").write_text(jsonl(queries))
    for split, rows in (qrels or {"test": ["q1\td1\t1"]}).items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join([HEADER, *rows]) + "\n")
    return str(folder)


# ---------------------------------------------------------------------------------- BEIR folders


def test_a_folder(tmp_path):
    data = C.load(write(tmp_path / "mine", test=["q1\td1\t2", "q1\td2\t0", "q2\td2\t-1"]))
    assert data.name == "mine"
    assert data.corpus == {"d1": "One\nfirst", "d2": ""}  # an empty document is allowed
    assert data.queries == {"q1": "which is first?", "q2": "which is empty?"}
    assert data.qrels == {"test": {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": -1}}}
    assert data.pools == {"test": ["d1", "d2"]}
    assert data.domain == {}
    assert data.provenance == {"path": str(tmp_path / "mine")}


def test_train_does_not_ask_what_another_split_asks(tmp_path):
    """The same words under another id, up to case and spaces, in test or in dev."""
    asked = ["Which  is FIRST?", "which is first?", "another", "ANOTHER", "a third"]
    queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate(asked)]
    data = C.load(write(tmp_path / "mine", queries=queries, train=[
        "q0\td1\t1", "q2\td1\t1", "q4\td2\t1"], dev=["q3\td1\t1"], test=["q1\td1\t1"]))  # fmt: skip
    assert data.qrels["train"] == {"q4": {"d2": 1}}
    said = data.provenance["train queries that another split asks too"]
    assert said == "2, left out of train"


def test_gzip_reads_the_same(tmp_path):
    plain = C.load(write(tmp_path / "plain"))
    write(tmp_path / "packed")
    for name in ("corpus.jsonl", "queries.jsonl"):
        file = tmp_path / "packed" / name
        file.with_suffix(".jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    packed = C.load(str(tmp_path / "packed"))
    assert (packed.corpus, packed.queries, packed.qrels) == (
        plain.corpus,
        plain.queries,
        plain.qrels,
    )
    assert packed.fingerprint == plain.fingerprint


def test_fingerprint_follows_content_and_not_order(tmp_path):
    first = C.load(write(tmp_path / "a", test=["q1\td1\t1", "q2\td2\t1"]))
    turned = C.load(
        write(tmp_path / "b", CORPUS[::-1], QUERIES[::-1], test=["q2\td2\t1", "q1\td1\t1"])
    )
    assert len(first.fingerprint) == 64
    assert turned.fingerprint == first.fingerprint
    marks = {first.fingerprint}
    marks.add(C.load(write(tmp_path / "c", test=["q1\td1\t2", "q2\td2\t1"])).fingerprint)
    marks.add(C.load(write(tmp_path / "d", dev=["q1\td1\t1", "q2\td2\t1"])).fingerprint)
    other = [CORPUS[0], {"_id": "d2", "text": "x"}]
    marks.add(C.load(write(tmp_path / "e", other, test=["q1\td1\t1", "q2\td2\t1"])).fingerprint)
    labelled = [QUERIES[0], QUERIES[1] | {"domain": "x"}]
    rows = ["q1\td1\t1", "q2\td2\t1"]
    marks.add(C.load(write(tmp_path / "f", queries=labelled, test=rows)).fingerprint)
    assert len(marks) == 5
    held = (first.corpus, first.queries, first.qrels, first.domain)
    assert C.fingerprint(*held) == C.fingerprint(*held, {}) == first.fingerprint
    assert C.fingerprint(*held, {"q1": ["d2"]}) != first.fingerprint


def test_domains_come_from_the_query_or_its_metadata(tmp_path):
    queries = [
        {"_id": "q1", "text": "a", "domain": "law", "metadata": {"domain": "not this"}},
        {"_id": "q2", "text": "b", "metadata": {"domain": "art", "url": "x"}},
        {"_id": "q3", "text": "c", "metadata": {}},
    ]
    assert C.load(write(tmp_path, queries=queries)).domain == {"q1": "law", "q2": "art"}


def test_validation_is_dev(tmp_path):
    data = C.load(write(tmp_path, validation=["q1\td1\t1"], train=["q2\td2\t1"]))
    assert data.qrels == {"dev": {"q1": {"d1": 1}}, "train": {"q2": {"d2": 1}}}


def test_dev_is_carved_out_of_train_when_there_is_none(tmp_path):
    queries = [{"_id": f"q{i}", "text": f"text {i}"} for i in range(200)]
    rows = [f"q{i}\td1\t1" for i in range(200)]
    data = C.load(write(tmp_path / "a", queries=queries, train=rows, test=["q1\td2\t1"]))
    turned = C.load(write(tmp_path / "b", queries=queries, train=rows[::-1], test=["q1\td2\t1"]))
    assert len(data.qrels["dev"]) == 20 and len(data.qrels["train"]) == 179  # q1 is of test
    assert not data.qrels["dev"].keys() & data.qrels["train"].keys()
    assert turned.qrels == data.qrels
    assert "10 %" in data.provenance["dev"]
    assert data.pools.keys() == data.qrels.keys()
    given = C.load(write(tmp_path / "c", queries=queries, train=rows, dev=["q1\td2\t1"]))
    assert len(given.qrels["train"]) == 199 and "dev" not in given.provenance


def test_no_train_split_loads_and_asking_for_it_explains(tmp_path):
    data = C.load(write(tmp_path / "only-test"))
    assert C.require_split(data, "test") == {"q1": {"d1": 1}}
    with pytest.raises(ValueError, match=r"only-test has no train split \(it has test\)"):
        C.require_split(data, "train")


def test_blank_lines_and_repeated_equal_judgments_are_harmless(tmp_path):
    data = C.load(write(tmp_path, [*CORPUS, ""], test=["q1\td1\t1", "", "q1\td1\t1"]))
    assert data.qrels["test"] == {"q1": {"d1": 1}} and len(data.corpus) == 2


@pytest.mark.parametrize(
    ("part", "line", "message"),
    [
        ("corpus", '{"_id": "d3", "text": ', r"corpus\.jsonl:3: found .*expected JSON"),
        ("corpus", "[1, 2]", r"corpus\.jsonl:3: .*expected a JSON object"),
        ("corpus", {"text": "x"}, r"corpus\.jsonl:3: found keys \['text'\], expected '_id'"),
        ("corpus", {"_id": 3, "text": "x"}, r"corpus\.jsonl:3: found '_id': 3, expected"),
        ("corpus", {"_id": "d3"}, r"corpus\.jsonl:3: found keys .*expected 'text'"),
        ("corpus", {"_id": "d3", "text": None}, r"corpus\.jsonl:3: found 'text': None"),
        ("corpus", {"_id": "d3", "text": "", "title": 3}, r"corpus\.jsonl:3: found 'title': 3"),
        ("corpus", {"_id": "d1", "text": "x"}, r"corpus\.jsonl:3: document id 'd1' occurs a sec"),
        ("corpus", r'{"_id": "d3", "text": "\ud800"}', r"corpus\.jsonl:3: 'text': .*surrogates"),
        ("queries", r'{"_id": "q3", "text": "\ud800"}', r"queries\.jsonl:3: 'text': .*surrogates"),
        ("queries", "what?", r"queries\.jsonl:3: found 'what\?', expected JSON"),
        ("queries", {"_id": "q1", "text": "x"}, r"queries\.jsonl:3: query id 'q1' occurs a seco"),
        ("queries", {"_id": "q3", "text": " "}, r"queries\.jsonl:3: query 'q3' is empty"),
        ("queries", {"_id": "q3"}, r"queries\.jsonl:3: found keys \['_id'\], expected 'text'"),
        ("queries", {"_id": "q3", "text": "x", "domain": 1}, r"queries\.jsonl:3: found 'domain'"),
        ("qrels", "q1\td1", r"test\.tsv:3: found .*expected three columns"),
        ("qrels", "q1\t0\td1\t1", r"test\.tsv:3: found .*expected three columns"),
        ("qrels", "q1\td1\t1\t", r"test\.tsv:3: found .*expected three columns"),
        ("qrels", "q1\td2\t0.5", r"test\.tsv:3: found score '0\.5', expected an integer"),
        ("qrels", "q9\td1\t1", r"test\.tsv:3: query id 'q9' is not in"),
        ("qrels", "q1\td9\t1", r"test\.tsv:3: document id 'd9' is not in"),
        ("qrels", "q1\td1\t2", r"test\.tsv:3: found grade 2 for .*'q1'.*'d1', expected 1"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, part, line, message):
    folder = write(
        tmp_path,
        CORPUS + [line] * (part == "corpus"),
        QUERIES + [line] * (part == "queries"),
        test=["q1\td1\t1"] + [line] * (part == "qrels"),
    )
    with pytest.raises(ValueError, match=message):
        C.load(folder)


def test_queries_as_lines_of_id_and_text(tmp_path):
    """MS MARCO's own queries file."""
    file = tmp_path / "queries.tsv"
    file.write_text("q1\twhich is first?\nq2\ta\tb\n")
    sources = Sources("x", [], [file], {}, {})
    assert read_queries(sources).texts == {"q1": "which is first?", "q2": "a\tb"}
    file.write_text("q1\tx\nq2 y\n")
    with pytest.raises(ValueError, match=r"queries\.tsv:2: .*expected an id, a tab and a text"):
        read_queries(sources)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize("names", ["train dev test", "train validation test", "train test"])
def test_one_split_alone_is_what_it_is_among_all(tmp_path, names, split):
    queries = [{"_id": f"q{i}", "text": f"text {i}"} for i in range(60)]
    rows = {name: [f"q{i}\td1\t1" for i in range(at, 60, 3)] for at, name in
            enumerate(names.split())}  # fmt: skip
    folder = write(tmp_path, queries=queries, **rows)
    every = C.load(folder).qrels
    sources = C.find(folder).only(split)
    found, _ = read_splits(sources, read_queries(sources))
    assert found[split] == every[split]
    assert len(sources.qrels) == (2 if split == "train" and len(rows) == 3 else 1)


@pytest.mark.parametrize("first", ["q1\td1\t1", "query_id\tcorpus_id\tscore", ""])
def test_judgments_need_their_header(tmp_path, first):
    folder = write(tmp_path)
    (tmp_path / "qrels" / "test.tsv").write_text(first)
    with pytest.raises(ValueError, match=r"test\.tsv:1: .*expected the columns \['query-id'"):
        C.load(folder)


TREC = ["q1 0 d1 2", "q1 0 d2 0", "q2 Q0 d2 -1"]


@pytest.mark.parametrize("gap", [" ", "\t", "  "])
def test_judgments_in_trec_s_format(tmp_path, gap):
    folder = write(tmp_path)
    lines = [line.replace(" ", gap) for line in TREC]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    data = C.load(folder)
    assert data.qrels == {"test": {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": -1}}}
    beir = C.load(write(tmp_path / "b", test=["q1\td1\t2", "q1\td2\t0", "q2\td2\t-1"]))
    assert data.fingerprint == beir.fingerprint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1\td1\t1", r"test\.tsv:4: found 'q1\\td1\\t1', expected TREC's four columns"),
        ("q1 0 d1", r"test\.tsv:4: .*expected TREC's four columns"),
        ("q1 0 d1 good", r"test\.tsv:4: found score 'good', expected an integer"),
        ("q9 0 d1 1", r"test\.tsv:4: query id 'q9' is not in"),
        ("q1 0 d9 1", r"test\.tsv:4: document id 'd9' is not in"),
        ("q1 0 d1 1", r"test\.tsv:4: found grade 1 .*expected 2"),
    ],
)
def test_a_bad_line_in_trec_s_format_is_named(tmp_path, line, message):
    folder = write(tmp_path)
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join([*TREC, line]) + "\n")
    with pytest.raises(ValueError, match=message):
        C.load(folder)


def test_bytes_that_are_not_utf8(tmp_path):
    folder = write(tmp_path)
    with open(tmp_path / "corpus.jsonl", "ab") as file:
        file.write(b'{"_id": "d3", "text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"corpus\.jsonl:3: .*expected UTF-8"):
        C.load(folder)


@pytest.mark.parametrize("damage", ["cut", "foreign", "flipped"])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    folder = write(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    rows = jsonl({"_id": f"d{i}", "text": os.urandom(20).hex()} for i in range(1000))
    packed = bytearray(gzip.compress(rows.encode()))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        packed[len(packed) // 2 : len(packed) // 2 + 64] = b"\xff" * 64
    else:
        packed = bytearray(b"<html>not found</html>")
    (tmp_path / "corpus.jsonl.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=r"corpus\.jsonl\.gz"):
        C.load(folder)


def test_missing_and_doubled_files(tmp_path):
    folder = write(tmp_path, dev=["q1\td1\t1"], validation=["q1\td1\t1"])
    with pytest.raises(ValueError, match=r"dev\.tsv and validation\.tsv"):
        C.load(folder)
    for file in (tmp_path / "qrels").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"no qrels/\*\.tsv"):
        C.load(folder)
    (tmp_path / "queries.jsonl").unlink()
    with pytest.raises(ValueError, match=r"neither queries\.jsonl nor queries\.jsonl\.gz"):
        C.load(folder)


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="neither a collection nor a folder.*scifact"):
        C.load(str(tmp_path / "nowhere"))


def test_what_the_hub_may_not_have_lies_in_the_cache(tmp_path):
    assert C.missing("scifact", tmp_path) == ""
    with pytest.raises(ValueError, match=r"DATA=bioasq: its licence.*participants-area\.bioasq"):
        C.load("bioasq")
    with pytest.raises(ValueError, match=rf"NIST.*{tmp_path}/robust04"):
        C.load("robust04", tmp_path)
    write(tmp_path / "robust04")
    assert C.missing("robust04", tmp_path) == ""
    assert C.load("robust04", tmp_path).name == "robust04"


# --------------------------------------------------------------------------------------- the hub


def serve(files, name: str, splits: dict[str, str]):
    files[f"BeIR/{name}"] = {
        "corpus.jsonl.gz": gzip.compress(jsonl(CORPUS).encode()),
        "queries.jsonl.gz": gzip.compress(jsonl(QUERIES).encode()),
    }
    files[f"BeIR/{name}-qrels"] = {
        file: f"{HEADER}\n{row}\n".encode() for file, row in splits.items()
    }


def test_a_hub_set(hub, tmp_path):
    files, asked = hub
    serve(files, "scifact", {"train.tsv": "q1\td1\t1", "test.tsv": "q2\td2\t1"})
    data = C.load("scifact", tmp_path / "cache")
    assert data.name == "scifact"
    assert data.corpus == {"d1": "One\nfirst", "d2": ""}
    assert data.qrels["test"] == {"q2": {"d2": 1}}
    assert data.provenance["BeIR/scifact"] == "commit-of-scifact"
    assert data.provenance["BeIR/scifact-qrels"] == "commit-of-scifact-qrels"
    assert {call[3] for call in asked} == {tmp_path / "cache"}
    # after the first file of a repository, the others come from the same commit
    revisions = [(repo, revision) for repo, _, revision, _ in asked]
    assert revisions == [
        ("BeIR/scifact-qrels", None),
        ("BeIR/scifact-qrels", "commit-of-scifact-qrels"),
        ("BeIR/scifact", None),
        ("BeIR/scifact", "commit-of-scifact"),
    ]


@pytest.mark.parametrize("dev", ["dev.tsv", "validation.tsv"])
def test_the_hub_dev_split_under_either_name(hub, dev):
    rows = {"train.tsv": "q1\td1\t1", dev: "q2\td1\t1", "test.tsv": "q2\td2\t1"}
    serve(hub[0], "msmarco", rows)
    assert C.load("msmarco").qrels == {
        "train": {"q1": {"d1": 1}},
        "dev": {"q2": {"d1": 1}},
        "test": {"q2": {"d2": 1}},
    }


def test_the_command_reads_all_and_says_what_is_there(tmp_path, capsys):
    folder = write(tmp_path / "Tiny", CORPUS, QUERIES, test=["q1\td1\t1"])
    with pytest.raises(SystemExit) as done:
        C.main([str(folder)])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "Tiny: 2 documents; judged queries: 1 test; fingerprint " in out
    with pytest.raises(SystemExit) as done:
        C.main([str(folder), str(tmp_path / "none")])
    assert done.value.code == 2 and "neither a collection nor a folder" in capsys.readouterr().err


def test_a_hub_set_in_parquet(hub, tmp_path):
    files, _ = hub
    serve(files, "scidocs", {"test.tsv": "q2\td2\t1"})
    expected = C.load("scidocs")
    files["BeIR/scidocs"] = {}
    for part, rows in (("corpus", CORPUS), ("queries", QUERIES)):
        columns = ("_id", "title", "text")
        table = pa.table({c: [row.get(c, "") for row in rows] for c in columns})
        parquet.write_table(table, tmp_path / "table")
        name = f"{part}/{part}-00000-of-00001.parquet"
        files["BeIR/scidocs"][name] = (tmp_path / "table").read_bytes()
    data = C.load("scidocs")
    assert data.fingerprint == expected.fingerprint
    assert data.provenance["BeIR/scidocs"] == "commit-of-scidocs"
    del files["BeIR/scidocs"]["corpus/corpus-00000-of-00001.parquet"]  # and in one shard a document
    for number, row in enumerate(CORPUS):
        table = pa.table({c: [row.get(c, "")] for c in columns})
        parquet.write_table(table, tmp_path / "table")
        name = f"corpus/corpus-{number:05}-of-{len(CORPUS):05}.parquet"
        files["BeIR/scidocs"][name] = (tmp_path / "table").read_bytes()
    assert C.load("scidocs").fingerprint == expected.fingerprint


def test_without_network_and_cache_the_error_says_what_to_do(hub):
    with pytest.raises(ValueError, match=r"BeIR/fiqa-qrels: .*no network.*DATA=path"):
        C.load("fiqa")
    serve(hub[0], "fiqa", {"train.tsv": "q1\td1\t1", "test.tsv": "q1\td1\t1"})
    with pytest.raises(ValueError, match=r"dev\.tsv: .*404.*validation\.tsv"):
        C.load("fiqa")


# ---------------------------------------------------------------------------------------- stdlib


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


def test_bm25_s_index_of_many_documents_is_kept_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path))
    texts = {"a": "red fish", "b": "blue bird"}

    def made(fingerprint: str, **corpus: str) -> C.Collection:
        return C.Collection(
            "x", corpus, {"q": "red"}, {"test": {"q": {"a": 1}}}, {}, {"test": list(corpus)},
            fingerprint, {},
        )  # fmt: skip

    assert list(made("1", **texts).bm25("test").search({"q": "red"}, 2)["q"]) == ["a"]
    assert not (tmp_path / "bm25").exists()
    monkeypatch.setattr(C, "KEPT_FROM", 1)
    # The texts decide, not the fingerprint, which is of the judgments too.
    for fingerprint, red in (("1", "a"), ("2", "a"), ("1", "b")):
        of = {red: "red", "ab".replace(red, ""): "blue"}
        of = dict(sorted(of.items()))
        assert list(made(fingerprint, **of).bm25("test").search({"q": "red"}, 2)["q"]) == [red]
    assert len([path for path in (tmp_path / "bm25").iterdir() if path.is_dir()]) == 2
