"""train/mixture.py: how many steps each collection gets, and that nothing of two is ever mixed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.collections import Collection, load
from model.tokens import Prompts, Tokenizer
from tests.train.tiny import TRAIN, build, tiny_config, tokens_only, write_collection
from train.batches import TrainingData
from train.loop import train
from train.mining import LEXICAL, Settings, mine
from train.mixture import Mixture, quotas, shares, training_data, training_steps
from train.trial import Workbench, resolved, run_baselines, run_trial
from trials import Config, parts


@pytest.fixture(scope="module")
def folders(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny collection, and one with the same ids, other texts, and a third of the queries."""
    other = write_collection(tmp_path_factory.mktemp("data") / "other")
    for name in ("corpus", "queries"):
        path = other / f"{name}.jsonl"
        path.write_text(path.read_text().replace("rare", "seldom"))
    judged = other / "qrels" / "train.tsv"
    judged.write_text("\n".join(judged.read_text().splitlines()[:10]) + "\n")  # q0 to q7
    return [tiny_data, other]


@pytest.fixture(scope="module")
def collections(folders: list[Path]) -> list[Collection]:
    return [load(str(folder)) for folder in folders]


@pytest.fixture
def config(tiny_base: Path, folders: list[Path]) -> Config:
    data = "+".join(map(str, folders))
    return replace(tiny_config(tiny_base, folders[0]), data=data, steps=8)


@pytest.fixture
def made(collections: list[Collection], tiny_base: Path, config: Config):
    def made(**changes) -> Mixture:
        tokenizer = Tokenizer(tiny_base, Prompts(), 24)
        found = training_data(collections, tokenizer, replace(config, **changes), tokens_only)
        assert isinstance(found, Mixture)
        return found

    return made


# How many ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "temperature", "expected"),
    [
        ((300, 100), 1.0, (0.75, 0.25)),
        ((900, 100), 2.0, (0.75, 0.25)),  # square roots 30 and 10
        ((16, 1, 1), 4.0, (0.5, 0.25, 0.25)),
        ((10**6, 1), 1e9, (0.5, 0.5)),
        ((7,), 3.0, (1.0,)),
    ],
)
def test_shares_by_hand(sizes, temperature, expected) -> None:
    assert shares(sizes, temperature) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("steps", "wanted", "expected"),
    [
        (8, (0.75, 0.25), [6, 2]),
        (10, (0.5, 0.25, 0.25), [5, 3, 2]),  # 2.5 twice: the first gets the step that is left
        (3, (0.9, 0.1), [3, 0]),
        (1, (0.5, 0.5), [1, 0]),
        (7, (1 / 3, 1 / 3, 1 / 3), [3, 2, 2]),
    ],
)
def test_quotas_by_hand(steps, wanted, expected) -> None:
    assert quotas(steps, wanted) == expected


def test_steps_follow_the_number_of_queries(collections, config) -> None:
    assert training_steps(collections, config) == [6, 2]  # 24 queries and 8
    assert training_steps(collections, replace(config, mixture_temperature=1e9)) == [4, 4]
    assert training_steps(collections, replace(config, train_queries=8)) == [4, 4]  # the limit K
    assert training_steps(collections[:1], config) == [8]
    with pytest.raises(ValueError, match="other: its 8 queries get none of 1 steps"):
        training_steps(collections, replace(config, steps=1))
    with pytest.raises(ValueError, match="other: 8 training queries .* a batch takes 9"):
        training_steps(collections, replace(config, embedding_batch=9))
    with pytest.raises(ValueError, match="need different names"):
        training_steps(collections[:1] * 2, config)


# Which -------------------------------------------------------------------------------------------


def test_a_step_s_collection_is_a_function_of_seed_and_step(made) -> None:
    data = made()
    order = [data.place(step)[0] for step in range(16)]
    assert Counter(order[:8]) == Counter(order[8:]) == {0: 6, 1: 2}
    for part in (0, 1):  # the own steps of each go on from epoch to epoch
        assert [data.place(s)[1] for s in range(16) if order[s] == part] == list(
            range(order.count(part))
        )
    assert [made(tasks=("reranking",)).place(step)[0] for step in range(16)] == order
    seeds = {tuple(data.place(step, seed)[0] for step in range(8)) for seed in range(20)}
    assert len(seeds) > 5
    first = Counter(made(seed=seed).place(0)[0] for seed in range(400))
    assert 0.68 < first[0] / 400 < 0.82  # each step is of collection 0 with chance 6 / 8
    assert made(seed=1).place(3) == made(seed_offset=1).place(3) == data.place(3, 1)


def test_more_or_fewer_steps_over_the_queries_of_an_arm(made) -> None:
    arm, half, double = made(), *(made(steps=n, data_steps=8) for n in (4, 16))
    assert half.steps == double.steps == arm.steps
    assert [part.used for part in half.parts] == [part.used for part in arm.parts]
    assert [part.used for part in double.parts] == [part.used for part in arm.parts]
    for step in range(16):
        assert double.embedding(step).ids == arm.embedding(step).ids
        assert half.place(step) == arm.place(step)


def test_what_is_trained_on_does_not_depend_on_seed_or_arm(made) -> None:
    seen = [
        {query for step in range(8) for query in made(seed=seed).embedding(step).ids}
        for seed in range(4)
    ]
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert len(seen[0]) == TRAIN + 6  # of the 8 queries of the other, one whole batch of 6


@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_a_batch_holds_the_texts_of_one_collection(made, collections, config, task) -> None:
    """Each step is, text by text, the own step of that collection alone."""
    data = made()
    texts = getattr(data, f"{task}_texts")
    for step in range(8):
        part, at = data.place(step)
        alone = replace(config, data="x", steps=data.steps[part])
        own = TrainingData(
            collections[part], Tokenizer(Path(config.base), Prompts(), 24), alone, tokens_only
        )
        batch, expected = getattr(data, task)(step), getattr(own, task)(at)
        rows, wanted = (
            b.pairs if task == "reranking" else b.queries + b.documents for b in (batch, expected)
        )
        own_texts = getattr(own, f"{task}_texts")
        assert [texts.ids[i] for i in rows] == [own_texts.ids[i] for i in wanted]
        name = collections[part].name
        assert batch.ids == [f"{name}:{query}" for query in expected.ids]
    assert len(texts.ids) == sum(len(getattr(p, f"{task}_texts").ids) for p in data.parts)


def test_no_query_comes_twice_in_the_batches_of_an_epoch(made) -> None:
    """On which the halves of gradient probes rest."""
    data = made()
    for task, of in (("embedding", data.embedding), ("reranking", data.reranking)):
        ids = [i for step in range(data.per_epoch(task)) for i in of(step, 1_000_000).ids]
        assert ids and len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("head", "what", "place"),
    [("interaction", "lists", "place"), ("pseudo_query", "pseudo", "group")],
)
def test_lists_are_those_of_the_part(made, head: str, what: str, place: str) -> None:
    data = made(rerank_head=head)
    for step in range(8):
        part, at = data.place(step)
        batch, own = getattr(data, what)(step), getattr(data.parts[part], what)(at)
        assert batch.texts == own.texts
        assert torch.equal(getattr(batch, place), getattr(own, place))
        assert batch.ids == [f"{data.names[part]}:{query}" for query in own.ids]


def test_prefix_states_are_made_once_of_all(collections, tiny_base, config) -> None:
    asked = []

    def states(ids, title):
        asked.append((title, len(ids)))
        return tokens_only(ids, title)

    data = training_data(collections, Tokenizer(tiny_base, Prompts(), 24), config, states)
    assert asked == [("training texts", len(data.embedding_texts.ids)),
                     ("training pairs", len(data.reranking_texts.ids))]  # fmt: skip


def test_one_collection_is_no_mixture(collections, tiny_base, config) -> None:
    tokenizer = Tokenizer(tiny_base, Prompts(), 24)
    assert type(training_data(collections[:1], tokenizer, config, tokens_only)) is TrainingData


def test_negatives_of_each(made, collections, tmp_path) -> None:
    wide = Settings(depth=30, ranks=(1, 30), margin=0, negatives=2, fill=True, pick="top")
    for i, collection in enumerate(collections):
        mine(tmp_path / str(i), collection, wide, LEXICAL)
    both = f"{tmp_path / '0'}+{tmp_path / '1'}"
    c = resolved(made(negatives=both).config, "cpu")
    assert [len(mark) for mark in c.negatives_sha256.split("+")] == [64, 64]
    data = made(negatives=both, negatives_sha256=c.negatives_sha256)
    mixed = made(negatives=f"bm25+{tmp_path / '1'}")
    assert mixed.parts[0].negatives == made().parts[0].negatives
    assert mixed.parts[1].negatives == data.parts[1].negatives != made().parts[1].negatives
    with pytest.raises(ValueError, match="names 1 for 2 collections \\(tiny, other\\)"):
        made(negatives=str(tmp_path / "0"))
    with pytest.raises(ValueError, match="was mined from data with fingerprint"):
        made(negatives=f"{tmp_path / '1'}+{tmp_path / '0'}")


# A trial -----------------------------------------------------------------------------------------


def test_a_folder_with_a_plus_in_its_name_is_one(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    assert parts(str(tmp_path / "a+b")) == [str(tmp_path / "a+b")]
    assert parts("fiqa+msmarco") == ["fiqa", "msmarco"] and parts("stdlib") == ["stdlib"]


def test_it_is_measured_on_the_first_and_says_what_it_saw(
    config: Config, collections: list[Collection], tmp_path: Path
) -> None:
    bench = Workbench(config.data, "cpu", tmp_path / "cache", keep_prefix=False)
    assert bench.collection.name == "tiny"
    result = run_trial(config, "joint", tmp_path / "joint" / "seed0", bench)
    assert result["data"]["fingerprint"] == collections[0].fingerprint
    assert result["data"]["mixture"] == f"other {collections[1].fingerprint}"
    assert set(result["scores"]["embedding"]) == set(collections[0].qrels["test"])
    assert len(result["curve"]) == 8
    assert run_baselines(config, bench, lambda *_: None)["data"] == result["data"]
    alone = Workbench(str(collections[0].provenance["path"]), "cpu", tmp_path, keep_prefix=False)
    assert alone.mixture == ""


def test_killed_and_continued(collections, config, tmp_path) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int, line: dict) -> None:
        if step == 4:
            raise Stopped

    def run(place: Path, callback=None) -> list[dict]:
        model, _ = build(replace(config, data=str(collections[0].provenance["path"])))
        data = training_data(collections, model.tokenizer, config, tokens_only)
        return train(model, data, config, place, callback=callback)

    with pytest.raises(Stopped):
        run(tmp_path / "a", stop)
    assert run(tmp_path / "a") == run(tmp_path / "b")


def test_a_temperature_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="mixture_temperature must be > 0 and finite, got 0"):
        Config(mixture_temperature=0)
