"""A model whose reranker is its embedder, asked by a pseudo-query."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from model.packed import pack
from model.pseudo import ByPseudoQuery, PseudoQuery
from model.router import RouterConfig
from model.unimoer import ModelConfig, UniMoER
from tests.model import made

make = partial(made.make, rerank_head="pseudo_query")
QUERY, OTHER = "what is the capital of France?", "who?"
DOCUMENTS = ["the Seine", "Paris", "", "a path", "Paris, on the Seine"]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> UniMoER:
    return make(tiny_base)


def test_a_score_is_the_cosine_with_the_pseudo_query(model: UniMoER) -> None:
    """Of texts that are embedded one by one."""
    [ids] = PseudoQuery().ids(model.tokenizer, [(QUERY, DOCUMENTS)])
    asked = model.embed(pack([ids]))[0][0]
    documents = torch.cat([model.embed(pack([d]))[0] for d in model.tokenizer.documents(DOCUMENTS)])
    [found] = model.score_lists([(QUERY, DOCUMENTS)])
    torch.testing.assert_close(found, (documents @ asked).detach(), rtol=0, atol=1e-5)
    assert found.std() > 1e-3
    other = make_embedder(model)
    [same] = ByPseudoQuery(other.tokenizer).scores(other.embed_all, [(QUERY, DOCUMENTS)])
    torch.testing.assert_close(found, same, rtol=0, atol=1e-6)


def make_embedder(model: UniMoER) -> UniMoER:
    """The same experts under the usual head, which has no part in it."""
    other = make(Path(model.config.base), rerank_head="linear")
    heads = {name: p for name, p in other.kept().items() if name.startswith("head.")}
    other.load_trained({**model.kept(), **heads}, "test")
    return other


def test_every_way_to_rerank_says_the_same(model: UniMoER) -> None:
    [scores] = model.score_lists([(QUERY, DOCUMENTS)])
    pairs = [(QUERY, d) for d in DOCUMENTS]
    torch.testing.assert_close(model.score_pairs(pairs), scores)
    torch.testing.assert_close(model.predict(pairs), (1 + scores) / 2)
    ranked = model.rank(QUERY, DOCUMENTS)
    assert [i for i, _ in ranked] == scores.argsort(descending=True, stable=True).tolist()
    vectors = model.encode_document(DOCUMENTS)
    stored = model.rank(QUERY, DOCUMENTS, vectors=vectors)
    assert [i for i, _ in stored] == [i for i, _ in ranked]
    assert [s for _, s in stored] == pytest.approx([s for _, s in ranked], abs=1e-6)
    assert model.rank(QUERY, DOCUMENTS, top_k=2) == ranked[:2] and model.rank(QUERY, []) == []
    # Each query has its own list, and the order in it is read.
    mixed = [(OTHER, "yes"), *pairs, (OTHER, "no")]
    found = model.score_pairs(mixed)
    torch.testing.assert_close(found[1:-1], scores)
    torch.testing.assert_close(found[[0, -1]], model.score_lists([(OTHER, ["yes", "no"])])[0])
    [turned] = model.score_lists([(QUERY, DOCUMENTS[::-1])])
    assert (turned.flip(0) - scores).abs().max() > 1e-4


def test_documents_at_hand_are_not_encoded_again(model: UniMoER, monkeypatch) -> None:
    vectors, asked = model.encode_document(DOCUMENTS), []
    whole = UniMoER.embed_all

    def counted(self: UniMoER, texts, **options):
        asked.append(len(texts.ids))
        return whole(self, texts, **options)

    monkeypatch.setattr(UniMoER, "embed_all", counted)
    model.rank(QUERY, [*DOCUMENTS, "Paris"])  # of equal documents one is encoded
    model.rank(QUERY, DOCUMENTS, vectors=vectors)
    assert asked == [5, 1, 1]


def test_saved_and_loaded_is_identical(model: UniMoER, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = UniMoER.from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.config.listwise
    assert loaded.rank(QUERY, DOCUMENTS) == model.rank(QUERY, DOCUMENTS)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["rerank_head"] == (
        "pseudo_query"
    )


@pytest.mark.parametrize(
    "router",
    [RouterConfig("task"), RouterConfig("similarity-max"), RouterConfig(task_prior=1.0)],
    ids=["task", "similarity", "prior"],
)
def test_a_router_that_would_leave_an_expert_idle_is_refused(router: RouterConfig) -> None:
    with pytest.raises(ValueError, match="would leave the reranking expert idle: use another"):
        ModelConfig(rerank_head="pseudo_query", router=router)


def test_vectors_as_they_are_stored(model: UniMoER) -> None:
    """fp16 from disk; and of other documents than these."""
    vectors = model.encode_document(DOCUMENTS)
    halved = model.rank(QUERY, DOCUMENTS, vectors=vectors.half())
    assert dict(halved) == pytest.approx(dict(model.rank(QUERY, DOCUMENTS)), abs=2e-3)
    with pytest.raises(ValueError, match=r"query 'what is .*': 5 documents, 4 vectors"):
        model.rank(QUERY, DOCUMENTS, vectors=vectors[:4])


def test_a_long_list_is_cut_to_fit(model: UniMoER) -> None:
    """Documents get equal shares of what template and query leave; the query stays whole."""
    long = [f"document {i} " * 30 for i in range(6)]
    [whole] = PseudoQuery().ids(model.tokenizer, [(QUERY, long)])
    [cut] = PseudoQuery(tokens=250).ids(model.tokenizer, [(QUERY, long)])
    assert 220 < len(cut) <= 250 < len(whole)
    tail = model.tokenizer.fast.encode(f"Query: {QUERY}", add_special_tokens=False).ids
    assert cut[-len(tail) - 1 : -1] == tail == whole[-len(tail) - 1 : -1]
    text = model.tokenizer.fast.decode(cut)
    assert all(f"[{i + 1}] d" in text for i in range(6))
    assert PseudoQuery(tokens=9999).ids(model.tokenizer, [(QUERY, long)]) == [whole]
    with pytest.raises(ValueError, match=r"list_tokens=60 leaves no room for 6 documents behind"):
        PseudoQuery(tokens=60).ids(model.tokenizer, [(QUERY, long)])
    # The model's own takes its bound from the config.
    short = make(Path(model.config.base), list_tokens=60)
    with pytest.raises(ValueError, match=r"list_tokens=60"):
        short.rank(QUERY, long)


def test_what_other_heads_do_not_take(model: UniMoER, tiny_base: Path) -> None:
    linear = UniMoER(ModelConfig(base=str(tiny_base)))
    with pytest.raises(ValueError, match="rerank_head='linear' has no use for vectors"):
        linear.rank(QUERY, DOCUMENTS, vectors=torch.zeros(5, 32))
    lists = make(tiny_base, rerank_head="interaction")
    with pytest.raises(ValueError, match="rerank_head='interaction' has no use for vectors"):
        lists.score_lists([(QUERY, DOCUMENTS)], vectors=[torch.zeros(5, 32)])
    with pytest.raises(AssertionError, match="a pseudo-query scores lists"):
        model.score(pack([[1, 2]]))
