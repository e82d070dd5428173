"""MTEB's scores of a model are ours; every type of task runs; what is kept beside the scores."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mteb
import pytest
import torch
from mteb.mocks.mock_tasks import (
    bitext_mining,
    classification,
    clustering,
    pair_classification,
    regression,
    reranking,
    retrieval,
    sts,
    summarization,
    zeroshot_classification,
)
from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol

from eval import __main__ as program
from eval import metrics, mteb_adapter
from eval.collections import load
from eval.hub import MIRACL, MMARCO
from eval.protocol import EvaluationSet, without_states
from experiments import Config
from model.unimoer import UniMoER
from model.weights import revision
from tests.eval.shared import real
from tests.train.tiny import NOISY_MOE, moved, tiny_config, write_collection
from train.trial import model_config

pytestmark = pytest.mark.filterwarnings("ignore")  # mteb's own
TASKS = [
    bitext_mining.MockBitextMiningTask, classification.MockClassificationTask,
    classification.MockMultilabelClassification, clustering.MockClusteringTask,
    clustering.LegacyMockClusteringFastTask,  # AbsTaskClustering, of the tasks named .v2
    pair_classification.MockPairClassificationTask, regression.MockRegressionTask,
    reranking.MockRerankingTask, reranking.MockInstructionReranking, retrieval.MockRetrievalTask,
    retrieval.MockInstructionRetrieval, sts.MockSTSTask, summarization.MockSummarizationTask,
    zeroshot_classification.MockTextZeroShotClassificationTask,
]  # fmt: skip
PLAIN = sts.MockSTSTask.metadata  # of a task without a prompt
METRICS = {"ndcg_at_10": "ndcg_cut_10", "map_at_1000": "map", "recall_at_100": "recall_100"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("mteb") / "Tiny")


@pytest.fixture(scope="module")
def config(tiny_base: Path, data: Path) -> Config:
    return tiny_config(tiny_base, data, **NOISY_MOE, retrieval_depth=1000)


@pytest.fixture(scope="module")
def model(config: Config) -> UniMoER:
    return moved(config)


@pytest.fixture(scope="module")
def folder(model: UniMoER, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved") / "joint-moe" / "seed0.model"
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize("name", ["Tiny", "fiqa-mini", "hotpotqa-mini"])
def test_the_scores_are_ours(
    name: str, model: UniMoER, config: Config, data: Path, tmp_path: Path
) -> None:
    place = data if name == "Tiny" else real(name)
    evaluation = EvaluationSet(load(str(place)), model.tokenizer, config, without_states)
    sides = (mteb_adapter.Encoder(model, "unimoer/x", "1"),
             mteb_adapter.CrossEncoder(model, "unimoer/x-reranker", "1"))  # fmt: skip
    assert isinstance(sides[0], EncoderProtocol) and isinstance(sides[1], CrossEncoderProtocol)
    made = mteb_adapter.tasks(evaluation.collection, "test", evaluation.candidates)
    ours = (evaluation.retrieval(model), evaluation.reranking(model))
    judged = (evaluation.qrels, evaluation.reranking_qrels)
    predictions = tmp_path / "predictions"
    for side, task, mine, qrels in zip(sides, made, ours, judged, strict=True):
        found = mteb.evaluate(
            cast(Any, side), task, cache=mteb.ResultCache(tmp_path), prediction_folder=predictions
        )
        run = json.loads((predictions / task.prediction_file_name).read_text())["default"]["test"]
        theirs = metrics.evaluate(qrels, run)  # query by query, and not rounded
        assert theirs.keys() == mine.keys() and len(mine) > 5
        for query, row in mine.items():
            assert theirs[query] == pytest.approx(row, rel=0, abs=1e-6), query
        scores = found.task_results[0].scores["test"][0]
        for theirs, metric in METRICS.items():
            rounded = round(metrics.mean(mine, metric), 5)  # as mteb stores them
            assert scores[theirs] == pytest.approx(rounded, abs=1e-6), theirs
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")}
    assert f"results/unimoer__x/1/{name}.json" in files
    assert f"results/unimoer__x-reranker/1/{name}-reranking.json" in files
    kept = json.loads((tmp_path / "results/unimoer__x/1/model_meta.json").read_text())
    assert kept["loader_kwargs"]["prompts"]["query"] == config.query_prompt
    assert kept["loader_kwargs"]["base"]["fingerprint"] == model.identity["fingerprint"]
    loaded = mteb.ResultCache(tmp_path).load_results(require_model_meta=True)
    assert {m.model_name for m in loaded.model_results} == {"unimoer/x", "unimoer/x-reranker"}
    shown = loaded.to_dataframe().set_index("task_name")  # of which leaderboards are made
    for task, mine, who in zip(made, ours, ("unimoer/x", "unimoer/x-reranker"), strict=True):
        cell = shown.loc[task.metadata.name, who]
        assert cell == pytest.approx(metrics.mean(mine, "ndcg_cut_10"), rel=0, abs=5.1e-6)


@pytest.mark.parametrize("kind", TASKS, ids=lambda kind: kind.__name__)
def test_every_type_of_task_runs(kind: type, model: UniMoER) -> None:
    task, side = kind(), mteb_adapter.Encoder(model, "unimoer/x", "1")
    task.load_data()
    made = mteb.evaluate(cast(Any, side), task, cache=None)
    assert torch.isfinite(torch.tensor(made.task_results[0].get_score()))


def test_queries_and_documents_take_their_templates(model: UniMoER) -> None:
    side = mteb_adapter.Encoder(model, "unimoer/x", "1")
    asked = {"task_metadata": PLAIN, "hf_split": "test", "hf_subset": "default"}
    batches = [{"text": ["rare1", "ba"]}, {"text": ["ko"]}]
    for kind, task in (("query", "query"), ("document", "document"), (None, "document")):
        prompt = None if kind is None else mteb.types.PromptType(kind)
        found = side.encode(batches, prompt_type=prompt, **asked)
        torch.testing.assert_close(found, model.encode(["rare1", "ba", "ko"], task=task))
    vectors = model.encode(["rare1", "ba", "ko"])
    torch.testing.assert_close(side.similarity(3 * vectors, vectors), vectors @ vectors.t())
    pairs = side.similarity_pairwise(vectors, 2 * vectors)
    torch.testing.assert_close(pairs, torch.ones(3))


def test_a_task_is_of_the_collections_language(data: Path) -> None:
    """mteb knows the name of each language that the hub's collections have."""
    collection = load(str(data))
    for language in {*MIRACL, *MMARCO}:
        (task,) = mteb_adapter.tasks(replace(collection, language=language), "test")
        assert task.metadata.eval_langs == [mteb_adapter.LANGUAGES[language]]


def test_a_score_is_of_what_the_task_asks_for(model: UniMoER, tmp_path: Path) -> None:
    """Not of its other splits, and not of further languages in a stored result."""
    side = mteb_adapter.Encoder(model, "unimoer/x", "1")
    task = sts.MockSTSTask()
    task.metadata = task.metadata.model_copy(update={"eval_splits": ["test", "dev"]})
    task.filter_eval_splits(["test"])
    score = mteb_adapter.main_score(side, task, tmp_path)
    place = tmp_path / "results/unimoer__x/1/MockSTSTask.json"
    stored = json.loads(place.read_text())
    (row,) = stored["scores"]["test"]
    assert score == pytest.approx(row["main_score"])
    more = {**row, "hf_subset": "other", "main_score": row["main_score"] + 1}
    stored["scores"]["test"].append(more)
    place.write_text(json.dumps(stored))
    assert mteb_adapter.main_score(side, task, tmp_path) == score


def test_a_sum_is_that_of_its_tasks(model: UniMoER, tmp_path: Path) -> None:
    """As mteb means it: the mean of the stored scores, also once one of them is measured anew."""
    side, task = mteb_adapter.Encoder(model, "unimoer/x", "1"), reranking.MockAggregatedTask()
    places = [tmp_path / f"results/unimoer__x/1/{part.metadata.name}.json" for part in task.tasks]

    def expected() -> float:
        rows = [json.loads(place.read_text())["scores"]["test"][0] for place in places]
        return sum(row["main_score"] for row in rows) / len(rows)

    whole = mteb_adapter.main_score(side, task, tmp_path)
    assert whole == pytest.approx(expected(), abs=1e-5)
    before = [place.read_bytes() for place in places]
    assert mteb_adapter.main_score(side, task, tmp_path) == whole
    assert [place.read_bytes() for place in places] == before  # nothing is measured twice
    stored = json.loads(before[0])
    stored["scores"]["test"][0]["main_score"] += 1
    places[0].write_text(json.dumps(stored))
    assert mteb_adapter.main_score(side, task, tmp_path) == pytest.approx(whole + 0.5, abs=1e-5)
    places[0].write_text(json.dumps({**stored, "dataset_revision": "other"}))
    assert mteb_adapter.main_score(side, task, tmp_path) == pytest.approx(whole, abs=1e-5)


def test_a_hub_that_is_down_is_told(
    model: UniMoER, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, task = mteb_adapter.Encoder(model, "unimoer/x", "1"), sts.MockSTSTask()

    def load(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(type(task), "load_data", load)
    problem = ConnectionError("no way out")
    with pytest.raises(ValueError, match=r"MockSTS.*no way out.* bring HF_HOME over"):
        mteb_adapter.main_score(side, task, tmp_path)
    problem = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        mteb_adapter.main_score(side, task, tmp_path)


def test_what_cannot_be_named() -> None:
    with pytest.raises(ValueError, match=r"Did you mean: MTEB\(eng, v2\)"):
        mteb_adapter.named(["MTEB(eng, v3)"])
    with pytest.raises(ValueError, match="STS17 is meant twice, with other languages or splits"):
        mteb_adapter.named(["MTEB(eng, v2)", "STS17"])
    with pytest.raises(ValueError, match="is of image"):
        mteb_adapter.named(["CIFAR10"])
    assert [task.metadata.name for task in mteb_adapter.named(["STS12", "STS12"])] == ["STS12"]


def test_the_command(folder: Path, data: Path, tmp_path: Path, capsys) -> None:
    line = ["--model", str(folder), "--data", str(data), "--out", str(tmp_path), "--device", "cpu",
            "--candidates", "6"]  # fmt: skip
    assert program.main(["mteb", *line]) == 0
    assert program.main(["beir", *line]) == 0
    out = capsys.readouterr().out
    place = tmp_path / "beir" / "joint-moe-seed0" / "tiny-test.json"
    result = json.loads(place.read_text())
    score = metrics.mean(result["scores"]["embedding"], "ndcg_cut_10")
    assert f"Tiny: {round(score, 5):.4f} (ndcg_at_10)" in out and "reranking, BM25" in out
    assert "by vectors: " in out  # an embedder's own reranking, as leaderboards have it
    assert result["revision"] == revision(folder) and str(data) not in place.read_text()
    before = place.stat().st_mtime_ns
    assert program.main(["beir", *line]) == 0 and place.stat().st_mtime_ns == before  # read again
    assert program.main(["mteb", *line[:-1], "1"]) == 0  # other candidates: measured anew
    again = capsys.readouterr().out
    score = [text for text in (out, again) for text in text.splitlines() if "reranking:" in text]
    assert len(score) == 2 and score[0] != score[1]
    assert program.main(["beir", *line[:-1], "3"]) == 2  # another setting, the same place
    assert "is of another model, data, setting or device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["beir"], "--data is missing"),
        (["mteb"], "nothing to evaluate"),
        (["mteb", "--tasks", "SciFakt"], "mteb knows no such task or benchmark"),
        (["mteb", "--benchmark", "MTEB(xyz)"], "mteb knows no such task or benchmark"),
        (["beir", "--data", "nowhere"], "neither a collection nor a folder"),
        (["rag", "--data", "stdlib", "--model", "nowhere"], "nowhere/config.json is missing"),
        (["beir", "--data", "stdlib", "--model", "nowhere"], "nowhere/config.json is missing"),
    ],
)
def test_what_cannot_be_evaluated(words: list[str], message: str, folder: Path, capsys) -> None:
    given = [] if "--model" in words else ["--model", str(folder)]
    assert program.main([*words, *given, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_another_checkpoint_has_another_revision(folder: Path, tmp_path: Path) -> None:
    other = UniMoER.from_pretrained(folder)
    with torch.no_grad():
        next(iter(other.trained().values())).add_(1)
    other.save_pretrained(tmp_path / "other")
    assert revision(tmp_path / "other") != revision(folder)


def test_an_interaction_head_reads_the_pairs_of_a_query_as_one_list(config: Config) -> None:
    """In the order in which mteb hands them on, over the bounds of its batches."""
    model = UniMoER(model_config(replace(config, rerank_head="interaction")))
    side = mteb_adapter.CrossEncoder(model, "a/b", "0")
    queries, documents = ["p", "q", "q", "p", "q"], ["ba", "ko", "mi", "tu", "re"]
    batches = [[{"text": texts[:2]}, {"text": texts[2:]}] for texts in (queries, documents)]
    found = side.predict(*batches, task_metadata=PLAIN, hf_split="", hf_subset="")
    p, q = model.score_lists([("p", ["ba", "tu"]), ("q", ["ko", "mi", "re"])])
    expected = torch.stack([p[0], q[0], q[1], p[1], q[2]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
