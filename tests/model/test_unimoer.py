"""The model as its user meets it: seeds, encode, rank, refuse."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import texts
from model.packed import pack
from model.router import RouterConfig
from model.unimoer import ModelConfig, UniMoER
from tests.model.made import A_NAME, LORA, QUERY, TEXTS, make


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> UniMoER:
    return make(tiny_base)


# Seeds ---------------------------------------------------------------------------------------


def test_a_seed_is_a_start(tiny_base: Path) -> None:
    """The same seed gives the same model, also after training; another one another."""
    config = ModelConfig(base=str(tiny_base), lora=LORA, router=RouterConfig())
    first, second = UniMoER(config, seed=1), UniMoER(config, seed=2)
    start = {name: p.detach().clone() for name, p in first.trained().items()}
    assert not torch.equal(start[A_NAME], second.trained()[A_NAME])
    with torch.no_grad():
        for parameter in second.trained().values():
            parameter.add_(1.0)
    torch.manual_seed(99)  # what was drawn elsewhere does not count
    second.reset_parameters(1)
    for name, parameter in second.trained().items():
        assert torch.equal(parameter, start[name]), name


def test_an_untrained_model_is_its_base(tiny_base: Path) -> None:
    bare = UniMoER(ModelConfig(base=str(tiny_base)))
    start = UniMoER(ModelConfig(base=str(tiny_base), lora=LORA, router=RouterConfig()))
    torch.testing.assert_close(start.encode(TEXTS), bare.encode(TEXTS), rtol=1e-5, atol=1e-6)


# Encoding and ranking ------------------------------------------------------------------------


def test_encode_to_fewer_dimensions(model: UniMoER) -> None:
    whole = model.encode_document(TEXTS)
    for encode in (model.encode_document, model.encode_query):
        few = encode(TEXTS, dimensions=8)
        assert few.shape == (len(TEXTS), 8)
        torch.testing.assert_close(few.norm(dim=-1), torch.ones(len(TEXTS)))
    expected = F.normalize(whole[:, :8], dim=-1)
    torch.testing.assert_close(model.encode_document(TEXTS, dimensions=8), expected)
    with pytest.raises(ValueError, match="dimensions must be 1 to 32, got 33"):
        model.encode(TEXTS, dimensions=33)


def test_encode_is_one_unit_vector_a_text(model: UniMoER) -> None:
    vectors = model.encode_document(TEXTS)
    assert vectors.shape == (6, 32) and vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(vectors[0], vectors[5])  # the same text
    assert (vectors[0] - vectors[1]).norm() > 0.1
    # Each is what the decoder and its last token say of that text alone.
    for text, vector in zip(TEXTS, vectors, strict=True):
        batch = pack(model.tokenizer.documents([text]))
        with torch.no_grad():
            hidden, _ = model.hidden(batch, "embedding")
        torch.testing.assert_close(vector, F.normalize(hidden[-1], dim=0), rtol=1e-4, atol=1e-5)


def test_templates_differ_by_task(model: UniMoER) -> None:
    assert torch.equal(model.encode_query(TEXTS), model.encode(TEXTS, task="query"))
    assert (model.encode_query(TEXTS) - model.encode_document(TEXTS)).abs().max() > 0.01
    assert torch.equal(model.encode_document([f"Query: {QUERY}"]), model.encode_query([QUERY])), (
        "the default document template adds nothing, the query's adds its word"
    )


@pytest.mark.parametrize("budget", [1, 20, 4096])
def test_order_and_company_do_not_matter(model: UniMoER, budget: int) -> None:
    expected = model.encode(TEXTS)
    torch.testing.assert_close(model.encode(TEXTS, budget=budget), expected, rtol=1e-4, atol=1e-5)
    backwards = model.encode(TEXTS[::-1], budget=budget).flip(0)
    torch.testing.assert_close(backwards, expected, rtol=1e-4, atol=1e-5)
    more = model.encode([*TEXTS, *["something else altogether " * 3] * 4], budget=budget)
    torch.testing.assert_close(more[: len(TEXTS)], expected, rtol=1e-4, atol=1e-5)


def test_similarity(model: UniMoER) -> None:
    q, d = model.encode_query([QUERY, "yes"]), model.encode_document(TEXTS)
    scores = model.similarity(q, d)
    assert scores.shape == (2, 6)
    torch.testing.assert_close(scores[1, 2], (q[1] * d[2]).sum())


@pytest.mark.parametrize("head", ["linear", "yes_no"])
def test_permuting_documents_permutes_scores(tiny_base: Path, head: str) -> None:
    model = make(tiny_base, rerank_head=head)
    scores = model.predict([(QUERY, text) for text in TEXTS])
    assert scores.shape == (6,) and (scores > 0).all() and (scores < 1).all()
    assert scores.std() > 1e-3
    order = [3, 1, 5, 0, 2, 4]
    permuted = model.predict([(QUERY, TEXTS[i]) for i in order])
    torch.testing.assert_close(permuted, scores[order], rtol=1e-4, atol=1e-5)


def test_rank(model: UniMoER) -> None:
    scores = model.predict([(QUERY, text) for text in TEXTS])
    ranked = model.rank(QUERY, TEXTS)
    assert sorted(i for i, _ in ranked) == list(range(6))
    assert [s for _, s in ranked] == sorted((s for _, s in ranked), reverse=True)
    for i, score in ranked:
        assert score == pytest.approx(scores[i].item(), rel=1e-6)
    assert model.rank(QUERY, TEXTS, top_k=2) == ranked[:2]
    assert model.rank(QUERY, TEXTS, top_k=100) == ranked


def test_long_work_shows_a_bar_and_short_work_none(model: UniMoER, monkeypatch) -> None:
    shown = []

    def bar(disable: bool, **options: Any) -> tqdm:
        shown.append(not disable)
        return tqdm(disable=True, **options)

    monkeypatch.setattr(texts, "tqdm", bar)
    for count in (999, 1000):
        some = ["a"] * count
        model.encode_document(some)
        model.predict([("b", text) for text in some])
        model.rank("b", some)
    assert shown == [False] * 3 + [True] * 3


def test_ties_keep_the_order_given(model: UniMoER) -> None:
    assert [i for i, _ in model.rank(QUERY, ["same"] * 4)] == [0, 1, 2, 3]


def test_nothing_to_do(model: UniMoER) -> None:
    assert model.encode([]).shape == (0, 32)
    assert model.predict([]).shape == (0,)
    assert model.rank(QUERY, []) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.encode(QUERY),
        lambda model: model.encode_query(QUERY),
        lambda model: model.encode_document(QUERY),
        lambda model: model.predict("ab"),
        lambda model: model.rank(QUERY, "a document"),
    ],
)
def test_one_string_is_not_a_list(model: UniMoER, call: Callable[[UniMoER], object]) -> None:
    with pytest.raises(ValueError, match="must be a list"):
        call(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(["a", None]), r"texts\[1\] must be a string, got None"),
        (lambda m: m.encode_query(["a", "b", "\ud800"]), r"texts\[2\] has half of a surrogate"),
        (lambda m: m.predict([("a", "b"), ("a", "b", "c")]), r"pairs\[1\] must be 2 strings"),
        (lambda m: m.predict([("a", 3)]), r"pairs\[0\] must be 2 strings"),
        (lambda m: m.rank("\udfff", ["a"]), r"query\[0\] has half of a surrogate"),
        (lambda m: m.rank("a", ["b", 1.5]), r"documents\[1\] must be a string, got 1.5"),
        (lambda m: m.rank("a", ["b"], top_k=-1), "top_k must be at least 0"),
    ],
)
def test_one_bad_text_is_named(model: UniMoER, call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model)


def test_bad_dimensions_cost_no_pass(model: UniMoER, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "embed_all", None)
    with pytest.raises(ValueError, match="dimensions must be 1 to 32, got 64"):
        model.encode(TEXTS, dimensions=64)


@pytest.mark.parametrize("call", [
    lambda m: m.encode(["fine", "too"]), lambda m: m.predict([("a", "b")]),
    lambda m: m.rank("a", ["b", "c"]),
])  # fmt: skip
def test_values_that_overflow_are_no_result(tiny_base: Path, call: Callable) -> None:
    model = make(tiny_base)
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite in torch.float32 for the texts"):
        call(model)


def test_an_end_token_that_the_base_does_not_embed(make_base: Callable[..., Path]) -> None:
    folder = make_base(vocab_size=3)
    with pytest.raises(ValueError, match="but the base embeds 3 tokens"):
        UniMoER(ModelConfig(base=str(folder), end_token="yes"))


def test_unknown_task(model: UniMoER) -> None:
    with pytest.raises(ValueError, match="'passage'"):
        model.encode(TEXTS, task="passage")


@pytest.mark.parametrize(("change", "message"), [
    ({"dtype": "int8"}, "'int8'"),
    ({"rerank_head": "cosine"}, "'cosine'"),
    ({"embedding_pooling": "max"}, "'max'"),
    ({"router": RouterConfig()}, "a router weighs experts"),
])  # fmt: skip
def test_bad_configs(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**change)


def test_encoding_leaves_no_noise_on(tiny_base: Path) -> None:
    """Dropout and router noise are for training: encode switches them off itself."""
    noisy = make(
        tiny_base,
        lora=replace(LORA, dropout=0.5),
        router=RouterConfig(noise=1.0, expert_dropout=0.3),
    )
    calm = noisy.encode(TEXTS)
    noisy.train()
    assert torch.equal(noisy.encode(TEXTS), calm)
    assert noisy.training  # and on again for whoever is training


def test_tasks_reach_the_router(tiny_base: Path) -> None:
    """With routing by task, embedding uses its expert alone, and reranking its own."""
    model = make(tiny_base, router=RouterConfig("task", always_on="shared"))
    batch = pack(model.tokenizer.documents(TEXTS))
    with torch.no_grad():
        for step, expected in ((model.embed, [1.0, 0, 1]), (model.score, [0, 1.0, 1])):
            routing = step(batch)[1]
            assert len(routing) == 3, "one for each adapted layer"
            for weights in routing:
                assert torch.equal(weights, torch.tensor(expected).expand(6, 3))
