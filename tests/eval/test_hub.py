"""eval/hub.py: every published layout, on tiny copies; what their data do that ours may not."""

import errno
import gzip
import json
import re

import huggingface_hub
import pyarrow as pa
import pytest
from pyarrow import parquet

from eval import collections as C
from eval import hub as H
from tests.eval import published as P
from tests.eval.folders import CORPUS, QUERIES, serve


def test_the_benchmarks_have_their_known_sizes() -> None:
    sizes = {name: len(set(members)) for name, members in H.GROUPS.items()}
    assert sizes == {"all": 18, "cqadupstack": 12, "bright": 12, "miracl": 18, "mmarco": 14}
    public = set(H.BEIR) & H.HUB_SPLITS.keys()
    assert set(H.BEIR) == public | H.GATED.keys() | {"cqadupstack"} and len(public) == 13
    assert "msmarco" not in H.BEIR  # in BEIR's paper what was trained on, not what is averaged
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in H.CQADUPSTACK.values())


def test_known_names_and_their_splits() -> None:
    names = ("scifact", "cqadupstack/tex", "bright/pony", "miracl/sw", "mmarco/es", "triviaqa",
             "nq-train")  # fmt: skip
    for name in names:
        assert H.known(name)
    for name in ("bright", "bright/", "bright/law", "miracl/xx", "folder/sw", "all", "bioasq"):
        assert not H.known(name)
    dev = ("msmarco", "miracl/sw", "mmarco/es", "triviaqa", "nq-train")
    assert [H.own_split(name) for name in dev] == ["dev"] * 5
    assert {H.own_split(n) for n in ("scifact", "bright/pony", "miracl", "x/y")} == {"test"}


@pytest.mark.parametrize("qrels", ["jsonl", "tsv"])
def test_a_forum_of_cqadupstack(hub, qrels: str) -> None:
    files, asked = hub
    P.forum(files, "gis", 0)
    repo = files["mteb/cqadupstack-gis"]
    if qrels == "tsv":
        del repo["qrels/test.jsonl"]
        lines = [P.HEADER, "q0\td0\t1", "q1\td1\t1", "q2\td2\t1"]
        repo["qrels/test.tsv"] = "\n".join(lines).encode()
    data = C.load("cqadupstack/gis")
    assert data.name == "cqadupstack-gis"
    assert data.qrels == {"test": {f"q{i}": {f"d{i}": 1} for i in range(3)}}
    assert data.corpus["d0"] == P.functions()[0].document
    assert {revision for _, _, revision, _ in asked} == {H.CQADUPSTACK["gis"]}
    assert data.provenance == {"mteb/cqadupstack-gis": H.CQADUPSTACK["gis"]}


def test_a_domain_of_bright(hub) -> None:
    P.bright(hub[0], "earth_science", 3)
    data = C.load("bright/earth_science")
    pairs = P.functions()[3:9]
    assert data.name == "bright-earth_science" and len(data.corpus) == 7
    assert data.queries == {str(i): pair.query for i, pair in enumerate(pairs[:3])}
    assert data.qrels == {"test": {str(i): {f"{pairs[i].id}.txt": 1} for i in range(3)}}
    assert data.excluded == {"0": ["itself.txt"]}  # "N/A" stands for none
    assert data.instruction == (
        "Given a earth_science post, retrieve relevant passages that help answer the post"
    )
    assert data.provenance == {"xlangai/BRIGHT": "commit-of-BRIGHT"}
    for other in H.BRIGHT:
        P.bright(hub[0], other, 0)
        assert C.load(f"bright/{other}").instruction == H.BRIGHT[other]


@pytest.mark.parametrize("language", ["sw", "hi", "ja"])
def test_a_language_of_miracl(hub, language: str) -> None:
    P.miracl(hub[0], language, H.MIRACL[language])
    data = C.load(f"miracl/{language}")
    assert (data.name, data.language) == (f"miracl-{language}", language)
    assert data.corpus == {
        f"{i}#1": f"UDHR {i}\n{text}" for i, (text, _) in enumerate(P.ARTICLES[language])
    }
    assert data.qrels["dev"]["0#0"] == {"0#1": 1, "1#1": 0, "2#1": 0, "3#1": 0}
    assert data.queries["1#0"] == P.ARTICLES[language][1][1]
    assert data.provenance.keys() == {"miracl/miracl", "miracl/miracl-corpus"}
    del hub[0]["miracl/miracl-corpus"][f"miracl-corpus-v1.0-{language}/docs-0.jsonl.gz"]
    with pytest.raises(ValueError, match=r"miracl/miracl-corpus: .*docs-0\.jsonl\.gz.*404"):
        C.load(f"miracl/{language}")  # a file less is never a smaller corpus


def test_a_language_of_mmarco(hub) -> None:
    P.mmarco(hub[0], "es")
    data = C.load("mmarco/es")
    assert (data.name, data.language) == ("mmarco-es", "es")
    assert data.corpus == {str(i): text for i, (text, _) in enumerate(P.ARTICLES["es"])}
    assert data.qrels == {"dev": {str(100 + i): {str(i): 1} for i in range(4)}}


def test_triviaqa(hub) -> None:
    P.triviaqa(hub[0])
    data = C.load("triviaqa")
    texts = [pair.document for pair in P.functions()[:3]]
    assert data.corpus == {
        "7": f"email.utils\n{texts[0]}",
        "8": f"email.message\n{texts[1]}",
        "9": f"email.charset\n{texts[2]}",
    }
    assert data.queries == {str(i): P.functions()[i].query for i in range(2)}
    assert data.qrels == {"dev": {"0": {"7": 1, "8": 1}, "1": {"8": 1}}}
    assert data.excluded == {} and data.instruction == ""
    assert data.provenance == {
        "Tevatron/wikipedia-trivia": "commit-of-wikipedia-trivia",
        "Tevatron/wikipedia-trivia-corpus": "commit-of-wikipedia-trivia-corpus",
    }


def test_pairs_are_a_collection_to_train_on(hub) -> None:
    """Rows of one text are one; the dev split is taken from train."""
    P.nq_train(hub[0])
    data, chosen = C.load("nq-train"), P.functions()[:12]
    assert sorted(data.corpus.values()) == sorted(pair.document for pair in chosen)
    assert sorted(data.queries.values()) == sorted(pair.query for pair in chosen)
    assert {s: len(rows) for s, rows in data.qrels.items()} == {"train": 11, "dev": 1}
    found = {
        data.queries[query]: {data.corpus[document] for document in row}
        for rows in data.qrels.values() for query, row in rows.items()
    }  # fmt: skip
    expected = {pair.query: {pair.document} for pair in chosen}
    expected[chosen[0].query].add(chosen[1].document)
    assert found == expected and not data.queries.keys() & data.corpus.keys()
    hub[0]["sentence-transformers/natural-questions"] = {
        "pair/train-00000-of-00001.parquet": P.as_parquet([{"query": " ", "answer": "a"}])
    }
    with pytest.raises(ValueError, match=r"parquet: row 1: the query is empty; expected a text"):
        C.load("nq-train")


@pytest.mark.parametrize(
    ("passages", "found"),
    [(None, "None"), ("7", "'7'"), ([{"title": "no id"}], r"\[None\]")],
)
def test_a_bad_row_of_triviaqa_is_named(hub, passages: object, found: str) -> None:
    P.triviaqa(hub[0])
    row = {"query_id": "0", "query": "what?", "answers": ["a"], "positive_passages": passages}
    packed = gzip.compress(P.jsonl([row]))
    hub[0]["Tevatron/wikipedia-trivia"]["trivia-dev.jsonl.gz"] = packed
    with pytest.raises(ValueError, match=rf"gz:1: found 'positive_passages': ({found}), expected"):
        C.load("triviaqa")


def test_answers_come_from_pinned_files() -> None:
    pinned = {name: of for name, of in H.ANSWERS.items() if of.commit is not None}
    assert pinned.keys() == {"nq", "hotpotqa"}
    assert all(re.fullmatch("[0-9a-f]{40}", str(of.commit)) for of in pinned.values())
    assert {name: of.split for name, of in H.ANSWERS.items()} == {
        name: H.own_split(name) for name in H.ANSWERS
    }


def test_a_query_that_is_a_document_is_excluded_under_its_id(hub) -> None:
    files, _ = hub
    for name in ("quora", "nq", "fiqa"):
        P.beir(files, name, 0)
        texts = [{"_id": "q1", "text": "which?"}, {"_id": "q2", "text": "what?"}]
        corpus = [*texts, {"_id": "d1", "text": "this"}]
        files[f"BeIR/{name}"] = {
            "corpus.jsonl.gz": gzip.compress(P.jsonl(corpus)),
            "queries.jsonl.gz": gzip.compress(P.jsonl([*texts, {"_id": "q3", "text": "who?"}])),
        }
        for split in files[f"BeIR/{name}-qrels"]:
            files[f"BeIR/{name}-qrels"][split] = f"{P.HEADER}\nq1\td1\t1\n".encode()
    assert C.load("quora").excluded == {"q1": ["q1"], "q2": ["q2"]}
    assert C.load("nq").excluded == {}  # there it would be chance
    assert C.load("fiqa").excluded == {"q1": ["q1"], "q2": ["q2"]}  # there too, but mteb does it
    assert C.load("quora").fingerprint != C.load("nq").fingerprint


def test_what_is_published_may_judge_documents_that_it_lacks(hub) -> None:
    """ArguAna does; the judgment stays, so that the score is the known one."""
    files, _ = hub
    P.beir(files, "fiqa", 0)
    rows = {
        "train": ["q1\tgone\t1", "q2\td0\t1", "q2\tgone\t1"],
        "dev": ["q0\td0\t1"],
        "test": ["q0\td0\t1", "q0\tgone\t1"],
    }
    for split, lines in rows.items():
        files["BeIR/fiqa-qrels"][f"{split}.tsv"] = "\n".join([P.HEADER, *lines]).encode()
    data = C.load("fiqa")
    assert data.qrels["test"] == {"q0": {"d0": 1, "gone": 1}}
    assert data.provenance["judged documents that the corpus lacks"] == "1"
    assert data.qrels["train"] == {"q2": {"d0": 1}}  # nothing could be trained on the others
    for split in ("train", "dev", "test"):
        files["BeIR/fiqa-qrels"][f"{split}.tsv"] = f"{P.HEADER}\nq0\tgone\t1\n".encode()
    with pytest.raises(ValueError, match="fiqa: no judged document is in the corpus.*'gone'"):
        C.load("fiqa")


EXAMPLE = {"id": "0", "query": "what?", "excluded_ids": ["N/A"], "gold_ids": ["a"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": " "}, r"biology-00000-of-00001\.parquet: row 2: query '1' is empty"),
        ({"id": "0"}, r"parquet: row 2: query id '0' occurs a second time"),
        ({"gold_ids": None}, r"row 2: found 'gold_ids': None, expected 'gold_ids' with a list"),
        ({"excluded_ids": ["a"]}, r"row 2: document id 'a' is both gold and excluded"),
    ],
)
def test_a_bad_row_of_bright_is_named(hub, change: dict, message: str) -> None:
    rows = [EXAMPLE, EXAMPLE | {"id": "1"} | change]
    hub[0]["xlangai/BRIGHT"] = {
        "examples/biology-00000-of-00001.parquet": P.as_parquet(rows),
        "documents/biology-00000-of-00001.parquet": P.as_parquet([{"id": "a", "content": "x"}]),
    }
    with pytest.raises(ValueError, match=message):
        C.load("bright/biology")


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        ("collections/spanish_collection.tsv", "0\tuno\n1 dos", r"tsv:2: found '1 dos'.*a tab"),
        ("collections/spanish_collection.tsv", "0\tuno\n0\tdos", r"tsv:2: document id '0' occurs"),
        ("queries/dev/spanish_queries.dev.small.tsv", "100\t", r"tsv:1: query '100' is empty"),
    ],
)
def test_a_bad_line_of_mmarco_is_named(hub, file: str, lines: str, message: str) -> None:
    P.mmarco(hub[0], "es")
    hub[0]["unicamp-dl/mmarco"][f"data/google/{file}"] = lines.encode()
    with pytest.raises(ValueError, match=message):
        C.load("mmarco/es")


def test_a_grade_between_two_is_named(hub) -> None:
    P.forum(hub[0], "tex", 0)
    row = {"query-id": "q0", "corpus-id": "d0", "score": 0.5}
    hub[0]["mteb/cqadupstack-tex"]["qrels/test.jsonl"] = json.dumps(row).encode()
    with pytest.raises(ValueError, match=r"test\.jsonl:1: found score 0\.5, expected an integer"):
        C.load("cqadupstack/tex")


@pytest.mark.parametrize(
    "name", ["cqadupstack/tex", "bright/pony", "miracl/sw", "mmarco/es", "triviaqa", "nq-train"]
)
def test_without_the_hub_the_error_says_what_to_do(hub, name: str) -> None:
    with pytest.raises(ValueError, match=r"/.*: neither in the cache.*no network.*DATA=path"):
        C.load(name)


class Proxy(Exception):
    """An error of the network, of none of the hub's or the system's classes."""


@pytest.mark.parametrize("error", [Proxy("no way out"), TimeoutError("slow")])
def test_an_error_of_the_network_says_what_to_do(error: Exception, tmp_path, monkeypatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match=f"{error}.*bring {tmp_path} over, or pass a BEIR folder"):
        H.find("scifact", tmp_path)


def test_a_full_disk_is_not_taken_for_a_file_that_is_absent(tmp_path, monkeypatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "blob")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OSError, match="No space left on device: 'blob'"):
        H.find("scifact", tmp_path)


def test_a_group_is_not_one_collection() -> None:
    with pytest.raises(ValueError, match=r"DATA=bright is 12 collections.*bright/biology"):
        C.load("bright")


def test_ms_marcos_test_split_has_grades_below_relevant(hub) -> None:
    """It is TREC's Deep Learning track of 2019; what it is measured on, dev, has none."""
    files, _ = hub
    P.beir(files, "msmarco", 1)
    assert C.load("msmarco").relevant_from == {"test": 2}
    P.beir(files, "scifact", 1)
    assert C.load("scifact").relevant_from == {}


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


def test_a_long_download_is_announced_once(hub, monkeypatch, capsys):
    """Repository, files and size, in one line; what is small or there already, in none."""
    P.miracl(hub[0], "hi", 2)
    corpus = hub[0]["miracl/miracl-corpus"]
    least = min(map(len, corpus.values()))
    monkeypatch.setattr(H, "SLOW", least)
    C.load("miracl/hi")
    megabytes = sum(map(len, corpus.values())) / 1e6
    said = [line for line in capsys.readouterr().err.splitlines() if "corpus" in line]
    of = "downloading miracl/miracl-corpus, 2 files: "
    assert said == [f"{of}{megabytes:,.0f} MB from the Hugging Face hub"]
    assert sum(repo == "miracl/miracl-corpus" for repo, *_ in hub[1]) == 2
    C.load("miracl/hi")
    assert capsys.readouterr().err == ""
    serve(hub[0], "scidocs", {"test.tsv": "q2\td2\t1"})
    hub[0]["BeIR/scidocs"]["corpus.jsonl.gz"] += bytes(least)  # which gzip passes over
    monkeypatch.setattr(H, "SLOW", least + 1)
    C.load("scidocs")
    said = capsys.readouterr().err.splitlines()
    assert said == ["downloading BeIR/scidocs, corpus.jsonl.gz: 0 MB from the Hugging Face hub"]


@pytest.mark.parametrize("dev", ["dev.tsv", "validation.tsv"])
def test_the_hub_dev_split_under_either_name(hub, dev):
    rows = {"train.tsv": "q1\td1\t1", dev: "q2\td1\t1", "test.tsv": "q2\td2\t1"}
    serve(hub[0], "msmarco", rows)
    assert C.load("msmarco").qrels == {
        "train": {"q1": {"d1": 1}},
        "dev": {"q2": {"d1": 1}},
        "test": {"q2": {"d2": 1}},
    }


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
