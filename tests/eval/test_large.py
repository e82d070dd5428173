"""`python -m eval encode | search`, end to end on a tiny model: against the search in memory."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import pytrec_eval
import torch

from eval import __main__ as program
from eval import hub as H
from eval import large, metrics
from eval.collections import find, load
from eval.provenance import sources
from eval.retrieval import search
from eval.sources import COLUMNS
from eval.vectors import Vectors
from model.heads import truncate
from model.unimoer import UniMoER
from model.weights import revision
from tests.eval import published as P
from tests.train.tiny import tiny_config, write_collection
from train.trial import model_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny collection, its test split graded, and its judgments once more in other clothes."""
    folder = write_collection(tmp_path_factory.mktemp("large") / "Tiny")
    rows = (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]
    graded = [f"{row[:-1]}{1 + i % 3}" for i, row in enumerate(rows)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["\t".join(COLUMNS), *graded]))
    (folder / "queries.tsv").write_text("x1\trare3 ba\nx2\tno such word\n")
    ids = [json.loads(line)["_id"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    # All are of grade 1 to the second query, so whatever is found is.
    grades = ["x1 0 d3 2", "x1 0 d4 1", *(f"x2 0 {document} 1" for document in ids)]
    (folder / "dl20.txt").write_text("".join(f"{line}\n" for line in grades))
    return folder


@pytest.fixture(scope="module")
def folder(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved") / "arm" / "seed0.model"
    UniMoER(model_config(tiny_config(tiny_base, data))).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def line(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What both commands are given; the corpus is encoded."""
    out = tmp_path_factory.mktemp("out")
    given = ["--model", str(folder), "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert program.main(["encode", *given, "--window", "9", "--dtype", "float32"]) == 0
    return given


def test_encoding_goes_on_as_it_was_begun(line: list[str], capsys) -> None:
    """Without a window and a dtype it takes those that are there; other ones are refused."""
    assert program.main(["encode", *line]) == 0
    assert "in 5 shards of float32" in capsys.readouterr().out
    assert program.main(["encode", *line, "--dtype", "float16"]) == 2
    assert "holds other vectors (dtype: 'float32' there, 'float16' now)" in capsys.readouterr().err


def out_of(line: list[str]) -> Path:
    return Path(line[line.index("--out") + 1])


def elsewhere(line: list[str], out: Path) -> list[str]:
    """The same vectors, the results in another folder."""
    model = line[line.index("--model") + 1]
    vectors = large.folder_of(str(out_of(line)), model, "tiny")
    return [*line, "--out", str(out), "--vectors", str(vectors)]


def in_memory(folder: Path, data: Path, depth: int) -> dict[str, dict[str, float]]:
    model, collection = UniMoER.from_pretrained(folder), load(str(data))
    asked = {q: collection.queries[q] for q in collection.qrels["test"]}
    queries = model.encode_query(list(asked.values()))
    documents = model.encode_document(list(collection.corpus.values()))
    return search(queries, documents, list(asked), list(collection.corpus), depth)


def test_it_ranks_as_the_search_in_memory(
    line: list[str], folder: Path, data: Path, tmp_path: Path, capsys
) -> None:
    trec = tmp_path / "run.trec"
    given = elsewhere(line, tmp_path)
    assert program.main(["search", *given, "--depth", "12", "--trec", str(trec)]) == 0
    out = capsys.readouterr().out
    expected, qrels = in_memory(folder, data, 12), load(str(data)).qrels["test"]
    with open(trec) as file:
        run = pytrec_eval.parse_run(file)
    assert {q: list(row) for q, row in run.items()} == {q: list(r) for q, r in expected.items()}
    place = tmp_path / "search" / "arm-seed0" / "tiny-test.json"
    result = json.loads(place.read_text())
    assert result["scores"]["exact"] == metrics.evaluate(
        qrels, expected, metrics=metrics.deep_enough(large.METRICS, 12)
    )
    assert result["sources"] == sources() and result["versions"]["torch"] == torch.__version__
    mean = metrics.mean(result["scores"]["exact"], "ndcg_cut_10")
    assert result["mean"]["exact"]["ndcg_cut_10"] == mean and f"{mean:.4f}" in out
    model = UniMoER.from_pretrained(folder)
    assert result["revision"] == revision(folder) and result["base"] == model.identity
    prompts = model.config.prompts.texts()
    assert result["prompts"] == {name: prompts[name] for name in ("query", "document")}
    assert result["data"]["documents"] == 42 and result["asked"]["relevant"] == 1
    assert result["vectors"] == {"dtype": "float32", "dimension": 32, "document_tokens": 24}
    assert str(data) not in place.read_text() and set(result["seconds"]) == {"queries", "exact"}


def test_the_first_dimensions_alone(
    line: list[str], folder: Path, data: Path, tmp_path: Path, capsys
) -> None:
    """Shorter vectors on disk, at unit length; the queries are cut alike (Matryoshka)."""
    given = [*line, "--out", str(tmp_path), "--dimensions", "8"]
    assert program.main(["encode", *given, "--dtype", "float32"]) == 0
    stored = Vectors(large.folder_of(str(tmp_path), line[1], "tiny", 8))
    model, collection = UniMoER.from_pretrained(folder), load(str(data))
    documents = truncate(model.encode_document(list(collection.corpus.values())), 8)
    assert torch.equal(torch.from_numpy(stored.shard(0).copy()), documents)
    trec = tmp_path / "run.trec"
    assert program.main(["search", *given, "--depth", "12", "--trec", str(trec)]) == 0
    asked = {q: collection.queries[q] for q in collection.qrels["test"]}
    queries = truncate(model.encode_query(list(asked.values())), 8)
    expected = search(queries, documents, list(asked), list(collection.corpus), 12)
    with open(trec) as file:
        run = pytrec_eval.parse_run(file)
    assert {q: list(row) for q, row in run.items()} == {q: list(r) for q, r in expected.items()}
    result = json.loads((tmp_path / "search" / "arm-seed0" / "tiny-test-8d.json").read_text())
    assert result["vectors"]["dimension"] == 8
    there = ["--vectors", str(stored.folder), "--dimensions", "16"]
    assert program.main(["search", *line, *there]) == 2
    assert "holds vectors of 8 dimensions, not of 16" in capsys.readouterr().err
    assert program.main(["encode", *line, "--dimensions", "33"]) == 2
    assert "dimension=33: expected 1 to 32" in capsys.readouterr().err


def test_a_result_is_computed_once_and_never_mixed(line: list[str], tmp_path: Path, capsys) -> None:
    given = ["search", *elsewhere(line, tmp_path), "--depth", "5"]
    place = tmp_path / "search" / "arm-seed0" / "tiny-test.json"
    assert program.main(given) == 0
    before = place.stat().st_mtime_ns
    first = capsys.readouterr().out
    assert program.main(given) == 0 and place.stat().st_mtime_ns == before
    assert capsys.readouterr().out == first
    assert program.main([*given, "--relevant", "2"]) == 2
    err = capsys.readouterr().err
    assert "is of another model, data, setting or device" in err and "give another --name" in err
    # Which needs no other vectors.
    other = [*line, "--depth", "5", "--relevant", "2", "--name", "other"]
    assert program.main(["search", *other]) == 0
    capsys.readouterr()
    whole = place.read_text()
    place.write_text(json.dumps(json.loads(whole) | {"sources": "others"}))
    assert program.main(given) == 0
    assert f"the source has changed since {place} was made" in capsys.readouterr().err
    place.write_text(whole[:50])
    assert program.main(given) == 2 and f"{place} cannot be read as JSON" in capsys.readouterr().err
    place.write_text(whole)


def test_grades_and_other_judgments(line: list[str], data: Path, tmp_path: Path) -> None:
    """TREC's format for queries that the collection does not have, relevant from grade 2 on."""
    given = ["search", *elsewhere(line, tmp_path), "--qrels", str(data / "dl20.txt"),
             "--queries", str(data / "queries.tsv"), "--relevant", "2"]  # fmt: skip
    assert program.main(given) == 0
    result = json.loads((tmp_path / "search" / "arm-seed0" / "tiny-dl20.json").read_text())
    scores = result["scores"]["exact"]
    assert list(scores) == ["x1", "x2"] and result["split"] == "dl20"
    assert scores["x2"]["recall_1000"] == scores["x2"]["map"] == 0 < scores["x2"]["ndcg_cut_10"]
    assert scores["x1"]["recall_1000"] == 1


def test_ms_marcos_test_split_is_the_deep_learning_track(
    line: list[str], data: Path, tmp_path: Path, monkeypatch
) -> None:
    """There 2 is the lowest relevant grade, without being asked; on dev it is 1."""
    sources = replace(find(str(data)), relevant={"test": 2})
    monkeypatch.setattr(H, "find", lambda name, cache: sources)
    given = ["search", *elsewhere(line, tmp_path), "--data", "msmarco"]
    for split, relevant in (("test", 2), ("dev", 1)):
        assert program.main([*given, "--split", split]) == 0
        place = tmp_path / "search" / "arm-seed0" / f"tiny-{split}.json"
        assert json.loads(place.read_text())["asked"]["relevant"] == relevant


@pytest.mark.parametrize("name", ["scifact", "quora", "cqadupstack/gis", "bright/pony", "miracl/sw",
                                  "mmarco/es"])  # fmt: skip
def test_a_name_of_the_hub_scores_as_in_memory(
    hub, name: str, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """Its split, what it excludes and its prompt are those of `python -m eval beir`."""
    files, _ = hub
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path / "cache"))
    P.beir(files, "scifact", 1)
    P.beir(files, "quora", 0)
    corpus = gzip.decompress(files["BeIR/quora"]["corpus.jsonl.gz"]).decode()
    queries = gzip.decompress(files["BeIR/quora"]["queries.jsonl.gz"]).decode()
    files["BeIR/quora"]["corpus.jsonl.gz"] = gzip.compress((corpus + queries).encode())
    lines = [P.HEADER, *(f"q{i}\td{i}\t1" for i in range(3)), "q0\tgone\t1"]
    files["BeIR/quora-qrels"]["test.tsv"] = "\n".join(lines).encode()
    P.forum(files, "gis", 0)
    P.bright(files, "pony", 0)
    P.miracl(files, "sw", H.MIRACL["sw"])
    P.mmarco(files, "es")
    given = ["--model", str(folder), "--data", name, "--out", str(tmp_path), "--device", "cpu"]
    assert program.main(["beir", *given, "--depth", "3"]) == 0
    assert program.main(["encode", *given, "--window", "4", "--dtype", "float32"]) == 0
    assert program.main(["search", *given, "--depth", "3"]) == 0
    file = f"{name.replace('/', '-')}-{H.own_split(name)}.json"
    known, found = (
        json.loads((tmp_path / command / "arm-seed0" / file).read_text())
        for command in ("beir", "search")
    )
    rows = known["scores"]["embedding"]
    common = metrics.deep_enough(metrics.METRICS, 3)
    mine = {q: {m: row[m] for m in common} for q, row in found["scores"]["exact"].items()}
    rows = {q: {m: row[m] for m in common} for q, row in rows.items()}
    assert (
        common == ["map", "recip_rank"]
        and mine == rows
        and len(rows) > 2
        and found["prompts"] == {k: v for k, v in known["prompts"].items() if k != "pair"}
    )
    absent = {"judged documents that the corpus lacks": "1"}
    assert (found["data"]["source"].items() >= absent.items()) == (name == "quora")


def test_faiss_beside_the_exact_search(line: list[str], tmp_path: Path, capsys) -> None:
    given = ["search", *elsewhere(line, tmp_path), "--depth", "10", "--lists", "4", "--probes"]
    assert program.main([*given, "1", "--index", "ivf"]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "search" / "arm-seed0" / "tiny-test-ivf.json").read_text())
    assert set(result["scores"]) == {"exact", "ivf"} and set(result["recall"]) == {"10"}
    assert 0 < result["recall"]["10"] < 1
    assert f"of the exact 10 best ivf finds {100 * result['recall']['10']:.2f} %" in out
    assert program.main([*given, "1", "--index", "flat"]) == 0
    flat = json.loads((tmp_path / "search" / "arm-seed0" / "tiny-test-flat.json").read_text())
    assert flat["scores"]["flat"] == flat["scores"]["exact"] and flat["recall"] == {"10": 1.0}
    assert set(flat["seconds"]) == {"queries", "exact", "build", "flat"}


def test_ranks_come_from_torchrun(line: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    given = ["encode", *line, "--vectors", str(tmp_path), "--window", "9", "--dtype", "float32"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert program.main(given) == 0
    assert "42 documents of Tiny in 5 shards of float32, 3 still missing" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.delenv("WORLD_SIZE")
        assert program.main(["search", *line, "--vectors", str(tmp_path)]) == 2
    assert "3 of 5 shards are missing" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert program.main(given) == 0
    whole = Vectors(large.folder_of(str(out_of(line)), line[1], "tiny"))
    for shard in range(5):
        assert (Vectors(tmp_path).shard(shard) == whole.shard(shard)).all()


def test_another_checkpoint_cannot_search_these_vectors(
    line: list[str], folder: Path, tmp_path: Path, capsys
) -> None:
    other = UniMoER.from_pretrained(folder)
    with torch.no_grad():
        next(iter(other.trained().values())).add_(1)
    other.save_pretrained(tmp_path / "arm" / "seed0.model")
    given = [*elsewhere(line, tmp_path), "--model", str(tmp_path / "arm" / "seed0.model")]
    for command in ("encode", "search"):
        assert program.main([command, *given]) == 2
    err = capsys.readouterr().err
    assert "holds other vectors (revision" in err and "(the checkpoint: " in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "--data", "nowhere"], "neither a collection nor a folder"),
        (["encode", "--data", "stdlib"], "stdlib has a corpus for each split"),
        (["encode", "--model", "nowhere"], "nowhere/config.json is missing"),
        (["search", "--vectors", "nowhere"], "nowhere/manifest.json is missing: encode the corpus"),
        (["search", "--split", "dl19"], "no judgments of dl19 (it has dev, test, train)"),
        (["search", "--model", ""], "expected a folder"),
        (["search", "--qrels", "nowhere"], "--qrels nowhere: there is no such file"),
        (["search", "--memory", "1e-6"], "--memory 1e-06 GB: 10 queries, depth 42 and 42 documen"),
        (["search", "--index", "flat", "--memory", "1e-5"], "5.4e-06 GB and ids, queries and rank"),
        (["search", "--index", "ivf", "--lists", "43"], "--lists 43: expected at most 42"),
        (["search", "--depth", "0"], "expected positive numbers"),
    ],
)
def test_what_cannot_be_done(
    words: list[str], message: str, line: list[str], tmp_path: Path, capsys
) -> None:
    given = elsewhere(line, tmp_path)
    assert program.main([words[0], *given, *words[1:]]) == 2
    assert message in capsys.readouterr().err


def test_validation_is_another_name_of_dev(line: list[str], data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "Tiny")
    (copy / "qrels" / "dev.tsv").rename(copy / "qrels" / "validation.tsv")
    given = [*elsewhere(line, tmp_path), "--data", str(copy)]
    for split in ("validation", "dev"):
        assert program.main(["search", *given, "--split", split]) == 0
    assert (tmp_path / "search" / "arm-seed0" / "tiny-dev.json").exists()


def test_judged_documents_have_to_be_encoded(
    line: list[str], data: Path, tmp_path: Path, capsys
) -> None:
    copy = shutil.copytree(data, tmp_path / "Tiny")
    rows = f"{chr(9).join(COLUMNS)}\nq30\td30\t1\nq30\tghost\t1\n"
    (copy / "qrels" / "test.tsv").write_text(rows)
    given = [*elsewhere(line, tmp_path), "--data", str(copy)]
    assert program.main(["search", *given]) == 2
    assert "1 judged documents of test are not among the encoded, such as 'ghost'" in (
        capsys.readouterr().err
    )


def test_a_hub_that_is_down(line: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    def down(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(H.huggingface_hub, "hf_hub_download", down)
    given = elsewhere(line, tmp_path)
    assert program.main(["encode", *given, "--data", "msmarco"]) == 2
    err = capsys.readouterr().err
    assert "BeIR/msmarco-qrels: neither in the cache" in err and "pass a BEIR folder" in err
