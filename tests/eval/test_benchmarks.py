"""`python -m eval beir` on every benchmark, end to end: a tiny model and a few real texts."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from eval import __main__ as program
from eval import hub as H
from eval import metrics
from eval.benchmarks import joined, summary
from eval.collections import load
from eval.protocol import EvaluationSet
from eval.provenance import sources
from eval.retrieval import search
from model.prefix import TextSet
from model.pseudo import INSTRUCTION
from model.tokens import Prompts, Tokenizer
from model.unimoer import UniMoER
from tests.eval import published as P
from tests.train.tiny import TEST, tiny_config, tokens_only, write_collection
from train.trial import model_config

NDCG = "ndcg_cut_10"


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = UniMoER(model_config(tiny_config(tiny_base, Path("unused"))))
    with torch.no_grad():
        for name, parameter in model.trained().items():
            if ".lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    place = tmp_path_factory.mktemp("saved") / "arm" / "seed0.model"
    model.save_pretrained(place)
    return place


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """run(words) -> (exit code, what was printed); the results go to `tmp_path`/out."""
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path / "cache"))

    def run(*words: str) -> tuple[int, str, str]:
        line = ["beir", "--model", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
        code = program.main([*line, *words])
        return code, *capsys.readouterr()

    return run


def result(tmp_path: Path, name: str) -> dict:
    found = json.loads((tmp_path / "out" / "beir" / "arm-seed0" / f"{name}.json").read_text())
    assert found["sources"] == sources() and "commit" in found["git"]
    return found


def cells(text: str, row: str) -> list[str]:
    """The cells of a row of the summary, without its name."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def means(found: dict, metric: str = NDCG) -> list[float]:
    """As the summary's columns: retrieval of BM25 and model, reranking of both and the ceiling."""
    sides = (found["bm25"]["embedding"], found["scores"]["embedding"],
             found["bm25"]["reranking"], found["scores"]["reranking"],
             found["ceiling"]["reranking"])  # fmt: skip
    return [metrics.mean(side, metric) for side in sides]


def test_all_of_beir(hub, run, tmp_path: Path) -> None:
    """13 sets, CQADupStack as the mean of its forums, robust04 from a folder, 3 missing: 18."""
    files, asked = hub
    for number, name in enumerate(H.HUB_SPLITS):
        P.beir(files, name, number)
    for number, forum in enumerate(H.CQADUPSTACK):
        P.forum(files, forum, number)
    write_collection(tmp_path / "cache" / "data" / "robust04")
    code, out, _ = run("--data", "all")
    assert code == 0
    text = (tmp_path / "out" / "beir" / "arm-seed0" / "summary-beir.md").read_text()
    assert text.strip() in out
    rows = {}
    for name in H.BEIR:
        if name == "cqadupstack":
            forums = [means(result(tmp_path, f"cqadupstack-{f}-test")) for f in H.CQADUPSTACK]
            rows["cqadupstack (mean of 12)"] = [sum(c) / 12 for c in zip(*forums, strict=True)]
            assert len({forum[1] for forum in forums}) > 3
        elif name in ("bioasq", "signal1m", "trec-news"):
            place = tmp_path / "cache" / "data" / name
            found = cells(text, name)[0]
            assert found.startswith("missing: its licence") and str(place) in found
            assert H.GATED[name] in found
        else:
            rows[name] = means(result(tmp_path, f"{name}-test"))
    assert len(rows) == 15 and "msmarco" not in text
    for name, values in rows.items():
        assert cells(text, name) == [f"{value:.4f}" for value in values]
    mean = [sum(column) / 15 for column in zip(*rows.values(), strict=True)]
    assert cells(text, "**mean of 15 of 18**") == [f"{value:.4f}" for value in mean]
    assert {cache for *_, cache in asked} == {tmp_path / "cache" / "data"}

    places = sorted((tmp_path / "out").rglob("*.json"))
    before = [place.stat().st_mtime_ns for place in places]
    assert len(places) == 13 + 12 + 1
    assert run("--data", "all")[0] == 0  # nothing is measured twice
    assert [place.stat().st_mtime_ns for place in places] == before


def test_all_domains_of_bright(hub, run, folder: Path, tmp_path: Path) -> None:
    for number, domain in enumerate(H.BRIGHT):
        P.bright(hub[0], domain, 3 * number)
    code, out, _ = run("--data", "bright")
    assert code == 0 and cells(out, "**mean of 12 of 12**")
    for domain, instruction in H.BRIGHT.items():
        found = result(tmp_path, f"bright-{domain}-test")
        assert found["prompts"] == Prompts().instructed(instruction).texts()
        assert cells(out, f"bright-{domain}") == [f"{value:.4f}" for value in means(found)]

    data = load("bright/pony")
    model = UniMoER.from_pretrained(folder)
    own = Tokenizer(Path(model.config.base), Prompts(query=prompt_of("pony")), 24)
    queries, documents = list(data.queries), list(data.corpus)
    asked = own.queries([data.queries[q] for q in queries])
    read = own.documents([data.corpus[d] for d in documents])
    near, far = (model.embed_all(tokens_only(ids, "")) for ids in (asked, read))
    ranking = search(near, far, queries, documents, len(documents))
    for query, out_of in data.excluded.items():
        for document in out_of:
            del ranking[query][document]
    expected = metrics.evaluate(data.qrels["test"], ranking)
    assert result(tmp_path, "bright-pony-test")["scores"]["embedding"] == expected


@pytest.mark.parametrize("head", ["interaction", "pseudo_query"])
def test_a_list_names_what_it_was_asked_with(hub, run, tiny_base: Path, tmp_path: Path, head: str):
    """Not the pair's template, which it never read; the untrained base beside it does."""
    P.bright(hub[0], "pony", 0)
    config = tiny_config(tiny_base, Path("unused"), rerank_head=head)
    UniMoER(model_config(config)).save_pretrained(tmp_path / "arm" / "seed0.model")
    words = ("--data", "bright/pony", "--model", str(tmp_path / "arm" / "seed0.model"))
    assert run(*words)[0] == 0
    own = Prompts().instructed(H.BRIGHT["pony"]).texts()
    pair = own.pop("pair")
    own["instruction"] = H.BRIGHT["pony"] if head == "interaction" else INSTRUCTION
    assert result(tmp_path, "bright-pony-test")["prompts"] == own
    assert run(*words, "--out", str(tmp_path / "more"), "--untrained")[0] == 0
    place = tmp_path / "more" / "beir" / "arm-seed0" / "bright-pony-test.json"
    assert json.loads(place.read_text())["prompts"] == {**own, "pair": pair}


def prompt_of(domain: str) -> str:
    return f"Instruct: {H.BRIGHT[domain]}\nQuery: {{query}}"


def test_languages(hub, run, tmp_path: Path) -> None:
    """Named one by one they are one table; their own split is dev."""
    for language in ("sw", "hi", "ja"):
        P.miracl(hub[0], language, H.MIRACL[language])
    P.mmarco(hub[0], "es")
    words = ("miracl/sw", "miracl/hi", "miracl/ja", "mmarco/es")
    code, out, _ = run("--data", *words)
    assert code == 0
    for word in words:
        name = word.replace("/", "-")
        found = result(tmp_path, f"{name}-dev")
        assert found["split"] == "dev" and len(found["scores"]["embedding"]) == 4
        # As its authors measure it.
        metric, label = (metrics.MRR_10, "MRR@10") if "mmarco" in word else (NDCG, "nDCG@10")
        expected = [f"{value:.4f}" for value in means(found, metric)]
        assert cells(out, f"{name}, {label}") == expected
        assert metrics.mean(found["bm25"]["embedding"], NDCG) > 0.7, word
    assert cells(out, "**mean of 4 of 4**") and "| collections, nDCG@10 or MRR@10 |" in out
    text = summary("mmarco", {"mmarco/es": [found]})
    assert text.startswith("| mmarco, MRR@10 |") and cells(text, "mmarco-es") == expected
    code, _, err = run("--data", "miracl/sw", "--split", "test")
    assert code == 2 and "miracl-sw has no test split (it has dev)" in err


def test_the_untrained_base_is_a_row_where_it_is_asked_for(
    run, folder: Path, tmp_path: Path
) -> None:
    place = write_collection(tmp_path / "Tiny")
    code, out, _ = run("--data", str(place), "--untrained", "--candidates", "5")
    assert code == 0 and "retrieval, untrained base" in out and "reranking, untrained base" in out
    found = result(tmp_path, "tiny-test")
    data, model = load(str(place)), UniMoER.from_pretrained(folder)
    queries, documents = list(data.qrels["test"]), data.pools["test"]
    asked = model.embed_all(
        TextSet(model.tokenizer.queries([data.queries[q] for q in queries])), base=True
    )
    read = model.embed_all(
        TextSet(model.tokenizer.documents([data.corpus[d] for d in documents])), base=True
    )
    ranking = search(asked, read, queries, documents, 1000)
    expected = metrics.evaluate(data.qrels["test"], ranking)
    assert found["untrained"]["embedding"] == expected
    rows = found["untrained"]["reranking"].values()  # a mean over heads of what each cuts
    assert all(0 <= row[metrics.MRR_10] <= row["recip_rank"] for row in rows)
    assert found["data"] == data.identity and "path" not in found["data"]
    assert run("--data", str(place), "--candidates", "5")[0] == 2  # another setting


def test_fewer_dimensions_are_further_rows_of_one_run(
    run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_collection(tmp_path / "Tiny")
    calls = []
    whole = UniMoER.embed_all

    def counted(self, texts, **options):
        calls.append(len(texts.ids))
        return whole(self, texts, **options)

    monkeypatch.setattr(UniMoER, "embed_all", counted)
    code, out, _ = run("--data", str(place), "--dimensions", "4", "16", "32", "--depth", "10")
    assert code == 0 and len(calls) == 1  # encoded once
    found = result(tmp_path, "tiny-test")
    data = load(str(place))
    model = UniMoER.from_pretrained(folder)
    queries, documents = list(data.qrels["test"]), data.pools["test"]
    for size in (4, 16, 32):
        asked = model.encode_query([data.queries[q] for q in queries], dimensions=size)
        read = model.encode_document([data.corpus[d] for d in documents], dimensions=size)
        ranking = search(asked, read, queries, documents, 10)
        expected = metrics.evaluate(data.qrels["test"], ranking)
        assert found["dimensions"][str(size)].keys() == expected.keys()
        for query, row in expected.items():
            assert found["dimensions"][str(size)][query] == pytest.approx(row, abs=1e-6)
        score = metrics.mean(found["dimensions"][str(size)], "ndcg_cut_10")
        line = next(x for x in out.splitlines() if x.startswith(f"retrieval, {size} dimensions"))
        assert line.split()[3] == f"{score:.4f}"
    assert found["dimensions"]["32"] == found["scores"]["embedding"]  # all that the model has
    assert found["dimensions"]["4"] != found["scores"]["embedding"]
    code, _, err = run("--data", str(place), "--depth", "10")
    assert code == 2 and "another model, data, setting or device" in err
    code, _, err = run("--data", str(place), "--dimensions", "8", "64")
    assert code == 2 and "--dimensions 64: expected 1 to 32" in err


@pytest.mark.parametrize(
    ("depth", "candidates", "untold"),
    [(50, 100, {"recall_100": 2}), (50, 50, {}), (5, 10, {"ndcg_cut_10": 2, metrics.MRR_10: 2})],
)
def test_what_a_ranking_is_too_short_to_tell(
    run, tmp_path: Path, depth: int, candidates: int, untold: dict[str, int]
) -> None:
    """It is left out; a column that one of the two tasks can tell has no number in the other."""
    place = write_collection(tmp_path / "Tiny")
    words = ("--depth", str(depth), "--candidates", str(candidates))
    code, out, _ = run("--data", str(place), *words)
    assert code == 0
    _, head, *rows = out.splitlines()
    names = head.split()
    told = metrics.deep_enough((*metrics.METRICS, metrics.MRR_10), max(depth, candidates))
    assert names == told and len(rows) == 5
    for at, name in enumerate(names):
        cells = [row.split()[at - len(names)] for row in rows]
        assert [cell == "-" for cell in cells] == [i < untold.get(name, 0) for i in range(5)]


def test_another_choice_of_collections_is_another_summary(tmp_path: Path) -> None:
    (tmp_path / "Mine").mkdir()
    assert joined(["scifact", "bright/biology", str(tmp_path / "Mine")]) == (
        "scifact+bright-biology+mine"
    )
    many = [f"collection{i}" for i in range(40)]
    assert len(joined(many)) < 100 and joined(many) != joined(many[:-1] + ["other"])


def test_results_from_before_there_were_dimensions_are_read(run, tmp_path: Path) -> None:
    place = write_collection(tmp_path / "Tiny")
    assert run("--data", str(place))[0] == 0
    file = tmp_path / "out" / "beir" / "arm-seed0" / "tiny-test.json"
    old = json.loads(file.read_text())
    assert "dimensions" not in old["asked"] and len(old["scores"]["embedding"]) == TEST
    del old["dimensions"]
    file.write_text(json.dumps(old))
    assert run("--data", str(place))[0] == 0
    assert not [*file.parent.glob("summary*")]  # one collection needs none


@pytest.mark.parametrize(
    "moment", ["a window", "a window of pairs", "reranking", "the untrained base"]
)
def test_a_collection_that_was_stopped_goes_on(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """What was finished is not computed again, and the result is the same to the last bit."""
    place = write_collection(tmp_path / "Tiny")
    monkeypatch.setattr("eval.protocol.WINDOW", 10)  # of 42 documents
    words = ("--data", str(place), "--dimensions", "8", "--untrained")
    assert run(*words)[0] == 0
    whole = result(tmp_path, "tiny-test")
    shutil.rmtree(tmp_path / "out")
    name = {"a window": "_search", "a window of pairs": "pair_scores", "reranking": "reranking",
            "the untrained base": "untrained"}  # fmt: skip
    stage, calls = getattr(EvaluationSet, name[moment]), []

    def stopped(*args, **options):
        calls.append(args)
        if len(calls) == (3 if "window" in moment else 1):
            raise KeyboardInterrupt
        return stage(*args, **options)

    monkeypatch.setattr(EvaluationSet, name[moment], stopped)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    part = tmp_path / "out" / "beir" / "arm-seed0" / "tiny-test.json.part"
    assert part.is_dir() and not part.with_suffix("").exists()
    code, _, err = run(*words[:4])  # another setting
    assert code == 2 and "holds pieces of a run that was stopped, with another asked" in err
    if moment != "a window":  # what is finished cannot be asked for once more
        monkeypatch.setattr(EvaluationSet, "_search", None)
        monkeypatch.setattr(
            EvaluationSet, "retrieval", lambda *_, **__: whole["untrained"]["embedding"]
        )
    assert run(*words)[0] == 0
    assert result(tmp_path, "tiny-test") == whole and not part.exists()
    if moment == "a window":  # two before, the third again, then two, and five of the bare base
        assert len(calls) == 3 + 3 + 5


def test_a_collection_in_another_order_begins_anew(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its content is the same, but what was kept of a window was told by positions alone."""
    place = write_collection(tmp_path / "Tiny")
    monkeypatch.setattr("eval.protocol.WINDOW", 10)

    def reverse() -> None:
        for file, head in (("corpus.jsonl", 0), ("qrels/test.tsv", 1)):
            lines = (place / file).read_text().splitlines()
            text = "\n".join([*lines[:head], *reversed(lines[head:])])
            (place / file).write_text(text + "\n")

    reverse()
    assert run("--data", str(place))[0] == 0
    whole = result(tmp_path, "tiny-test")
    shutil.rmtree(tmp_path / "out")
    reverse()
    search, calls = EvaluationSet._search, []

    def stopped(*args) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        search(*args)

    monkeypatch.setattr(EvaluationSet, "_search", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("--data", str(place))
    reverse()
    assert run("--data", str(place))[0] == 0
    assert result(tmp_path, "tiny-test") == whole and len(calls) == 3 + 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["all"], "BeIR/trec-covid-qrels: neither in the cache nor to be had from the hub"),
        (["bright"], "xlangai/BRIGHT: neither in the cache"),
        (["bright/law"], "neither a collection nor a folder"),
        (["miracl/sw"], "miracl/miracl: neither in the cache"),
        (["bioasq"], "DATA=bioasq: its licence keeps it off the hub"),
    ],
)
def test_what_cannot_be_had(hub, run, words: list[str], message: str) -> None:
    code, _, err = run("--data", *words)
    assert code == 2 and message in err and "Traceback" not in err


def test_mteb_does_not_pass_over_a_collection_s_rules(hub, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path / "cache"))
    P.bright(hub[0], "pony", 0)
    line = ["--model", str(folder), "--data", "bright/pony", "--out", str(tmp_path)]
    assert program.main(["mteb", *line, "--device", "cpu"]) == 2
    assert "bright-pony excludes documents by query" in capsys.readouterr().err
