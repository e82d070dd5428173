"""The model as its user meets it: save and load, encode, rank, refuse; and that it can learn."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from model import texts
from model.lora import LinearGroup, LoRAConfig
from model.packed import pack
from model.router import ROUTES, SIMILARITY, RouterConfig
from model.tokens import Prompts
from model.unimoer import ModelConfig, UniMoER

LORA = LoRAConfig(("embedding", "reranking", "shared"), (4, 3, 2), (8.0, 6.0, 4.0), first_layer=1)
TEXTS = ["Paris", "the capital of France", "", "yes", "def read(path): return the text", "Paris"]
QUERY = "what is the capital of France?"


def make(base: Path, **changes: object) -> UniMoER:
    """An untrained model, moved away from its start: experts, routers and head do something."""
    config = ModelConfig(base=str(base), lora=LORA, router=RouterConfig(), document_tokens=32)
    model = UniMoER(replace(config, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained().values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise.to(parameter))
    return model


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> UniMoER:
    return make(tiny_base)


# On disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"router": RouterConfig(kind, always_on="shared")}
        for kind in sorted(set(ROUTES) - set(SIMILARITY))
    ]
    + [
        {"router": None},
        {"lora": None, "router": None},
        {"rerank_head": "yes_no", "reranking_pooling": "mean"},
        {"causal": False, "embedding_pooling": "first"},
        {"layers": 2, "dtype": "bfloat16", "prompts": Prompts(query="Find:{query}")},
        {"dtype": "float64", "lora": replace(LORA, targets=("q_proj", "down_proj"))},
    ],
    ids=lambda changes: "-".join(getattr(v, "kind", str(v)[:8]) for v in changes.values()),
)
def test_saved_and_loaded_is_identical(tiny_base: Path, tmp_path: Path, changes: dict) -> None:
    model = make(tiny_base, **changes)
    model.save_pretrained(tmp_path / "saved")
    loaded = UniMoER.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    assert not loaded.training, "what is loaded is ready for use: no dropout, no noise"
    assert loaded.trained().keys() == model.trained().keys()
    for name, parameter in model.trained().items():
        assert torch.equal(loaded.trained()[name], parameter), name
    assert torch.equal(loaded.encode_query([QUERY]), model.encode_query([QUERY]))
    assert torch.equal(loaded.encode_document(TEXTS), model.encode_document(TEXTS))
    assert loaded.rank(QUERY, TEXTS) == model.rank(QUERY, TEXTS)
    plain = UniMoER(model.config)
    assert not torch.equal(plain.predict([(QUERY, "a")]), model.predict([(QUERY, "a")])) or (
        not model.trained()
    ), "an untrained model must give something else"


def test_saved_folder_holds_the_adapters_and_no_base(model: UniMoER, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "adapters.safetensors",
        "heads.safetensors",
    }
    adapters = load_file(tmp_path / "adapters.safetensors")
    assert not [name for name in adapters if "bordered" in name or "embed_tokens" in name]
    assert len(adapters) == 3 * (7 * 2 + 5), "three layers: A and B of seven, a router of five"
    assert set(load_file(tmp_path / "heads.safetensors")) == {
        "head.linear.weight",
        "head.linear.bias",
    }
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["model"]["prompts"]["query"] == model.config.prompts.query


def test_saving_over_an_older_one_replaces_it(tiny_base: Path, tmp_path: Path) -> None:
    make(tiny_base, lora=None, router=None).save_pretrained(tmp_path)
    model = make(tiny_base)
    model.save_pretrained(tmp_path)
    loaded = UniMoER.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(TEXTS), model.encode(TEXTS))


def test_another_base_is_refused(
    model: UniMoER, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """Same shapes, other weights: nothing but the fingerprint can tell."""
    model.save_pretrained(tmp_path)
    other = make_base(seed=1)
    with pytest.raises(ValueError, match="give the original base"):
        UniMoER.from_pretrained(tmp_path, base=str(other))
    moved = make_base()  # the same content in another place
    loaded = UniMoER.from_pretrained(tmp_path, base=str(moved))
    assert torch.equal(loaded.encode(TEXTS), model.encode(TEXTS))


A_NAME = "decoder.layers.1.self_attn.qkv.lora_A.q_proj"


@pytest.mark.parametrize("what", ["missing", "unexpected", "shape"])
def test_tensors_that_do_not_fit(model: UniMoER, tmp_path: Path, what: str) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapters.safetensors"
    tensors = load_file(path)
    if what == "missing":
        del tensors[A_NAME]
    elif what == "unexpected":
        tensors["decoder.layers.9.x"] = torch.zeros(1)
    else:
        tensors[A_NAME] = tensors[A_NAME][:-1].clone()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{what}: ") as error:
        UniMoER.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    expected = {"missing": A_NAME, "unexpected": "layers.9.x", "shape": "(8, 32), expected (9, 32)"}
    assert expected[what] in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "adapters.safetensors", "heads.safetensors"])
def test_absent_files_are_named(model: UniMoER, tmp_path: Path, name: str) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name):
        UniMoER.from_pretrained(tmp_path)


def test_truncated_adapters_are_named(model: UniMoER, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"adapters.safetensors is truncated"):
        UniMoER.from_pretrained(tmp_path)


def test_another_format_is_refused(model: UniMoER, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        UniMoER.from_pretrained(tmp_path)


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


@pytest.mark.parametrize("damage", [
    lambda r: r["identity"].pop("fingerprint"), lambda r: r["model"].update(lora=[]),
    lambda r: r["model"].update(dtype="int4"), lambda r: r["model"].update(unknown=1),
])  # fmt: skip
def test_a_damaged_config_is_named(model: UniMoER, tmp_path: Path, damage: Callable) -> None:
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    damage(record)
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="config.json is not what save_pretrained writes"):
        UniMoER.from_pretrained(tmp_path)


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


# Learning ------------------------------------------------------------------------------------

QUERIES = ["capital", "read a file", "yes or no", "river", "the text", "path", "France", "none"]
DOCUMENTS = ["Paris is it.", "open(path)", "no", "the Seine", "a, b", "/a/b", "Lyon", "None"]


def steps_until(loss: Callable[[], torch.Tensor], model: UniMoER, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.trained().values(), lr=4e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.trained().values(), 1.0)
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("kind", ["sparsegen", "uniform"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_embedding_batch_can_be_learnt(tiny_base: Path, kind: str, checkpointing: bool) -> None:
    config = ModelConfig(
        base=str(tiny_base), lora=LORA, router=RouterConfig(kind), checkpointing=checkpointing
    )
    model = UniMoER(config).train()
    q = pack(model.tokenizer.queries(QUERIES))
    d = pack(model.tokenizer.documents(DOCUMENTS))

    def loss() -> torch.Tensor:
        scores = model.embed(q)[0] @ model.embed(d)[0].t() / 0.1
        return F.cross_entropy(scores, torch.arange(8))

    losses = steps_until(loss, model, 40)
    assert losses[0] > 1.5 and losses[-1] < 0.02, losses


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_one_reranking_batch_can_be_learnt(tiny_base: Path, pooling: str) -> None:
    """Which document goes with which query: the head alone, on states of the base, cannot tell."""
    config = ModelConfig(
        base=str(tiny_base), lora=LORA, router=RouterConfig(), reranking_pooling=pooling
    )
    model = UniMoER(config).train()
    pairs = [(q, d) for q in QUERIES[:4] for d in DOCUMENTS[:4]]
    batch = pack(model.tokenizer.pairs(pairs))
    labels = torch.eye(4).flatten()

    def loss() -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(model.score(batch)[0], labels)

    losses = steps_until(loss, model, 90)
    assert losses[0] > 0.5 and losses[-1] < 0.02, losses


def test_training_leaves_the_base_alone(tiny_base: Path) -> None:
    model = make(tiny_base)
    groups = [m for m in model.modules() if isinstance(m, LinearGroup)]
    before = [group.weight(name).clone() for group in groups for name in group.outs]
    table = model.decoder.embed_tokens.weight.clone()
    batch = pack(model.tokenizer.documents(DOCUMENTS))
    steps_until(lambda: model.embed(batch)[0][:, 0].sum(), model.train(), 3)
    after = [group.weight(name) for group in groups for name in group.outs]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(model.decoder.embed_tokens.weight, table)
    assert all(p.requires_grad for p in model.trained().values())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(name.endswith(("norm.weight", "embed_tokens.weight")) for name in frozen)
