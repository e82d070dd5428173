"""eval/collections.py: BEIR folders with every error, names, the command."""

import gzip
import os

import pytest

from eval import collections as C
from eval.sources import Sources, read_queries, read_splits
from tests.eval.folders import CORPUS, QUERIES, jsonl, write


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
